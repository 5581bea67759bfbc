"""Statistics against scipy, scikit-learn, or values worked by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier

import common


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (7412, 10_000), (1, 1)])
def test_wilson_against_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    low, high = common.wilson_interval(correct, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= correct / n <= high <= 1


@pytest.mark.parametrize(("correct", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(ValueError, match="not a proportion"):
        common.wilson_interval(correct, n)


def test_mcnemar_by_hand():
    a = np.array([True] * 6 + [False] * 1 + [True] * 20)
    b = np.array([False] * 6 + [True] * 1 + [True] * 20)
    assert common.mcnemar(a, b) == pytest.approx(2 * (1 + 7) / 2**7)  # 6 against 1 of 7 discordant images
    assert common.mcnemar(b, a) == common.mcnemar(a, b)
    assert common.mcnemar(a, a) == 1


def test_holm_by_hand():
    assert common.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert common.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(common.holm([])) == 0


def test_calibration_error_by_hand():
    # Two images at confidence 0.9 of which one is right, two at 0.6 of which both are: (2·|.5-.9| + 2·|1-.6|) / 4
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    assert common.calibration_error(logits, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4, abs=1e-6)


def test_knn_against_sklearn():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 8, generator=generator) * 0.7
    labels = torch.arange(5).repeat(80)
    points = centers[labels] + torch.randn(400, 8, generator=generator)
    reference = KNeighborsClassifier(7, metric="cosine").fit(points[:300].numpy(), labels[:300].numpy())
    votes = reference.predict_proba(points[300:].numpy())
    clear = np.sort(votes)[:, -1] > np.sort(votes)[:, -2]  # no tie
    ours = common.knn_predict(points[:300], labels[:300], points[300:], k=7).numpy()
    assert (ours == votes.argmax(1))[clear].all()
    assert clear.sum() > 50


def test_knn_can_leave_out_the_image_itself():
    points = torch.eye(4)
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(common.knn_predict(points, labels, points, k=1), labels)
    assert not (common.knn_predict(points, labels, points, k=1, not_itself=True) == labels).any()


def test_spread_takes_every_class_of_an_ordered_set():
    labels = torch.arange(10).repeat_interleave(1000)
    counts = labels[common.spread(10_000, 500)].bincount()
    assert (counts - 50).abs().max() <= 1
    assert torch.equal(common.spread(5, 100), torch.arange(5))


def test_umap_is_the_same_for_the_same_seed_and_keeps_neighbours_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(40)
    features = 8 * torch.randn(4, 16, generator=generator)[labels] + torch.randn(160, 16, generator=generator)
    first, again = common.umap_coordinates(features, seed=1), common.umap_coordinates(features, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, common.umap_coordinates(features, seed=2))
    near = common.knn_predict(torch.from_numpy(first - first.mean(0)), labels, torch.from_numpy(first - first.mean(0)),
                              k=10, not_itself=True)
    assert (near == labels).float().mean() > 0.95


def test_linear_probe_against_sklearn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 12, generator=generator) * 0.8
    labels = torch.arange(5).repeat(120)
    features = centers[labels] + torch.randn(600, 12, generator=generator)
    train, test = (features[:300], labels[:300]), (features[300:], labels[300:])
    mean, std = train[0].mean(0), train[0].std(0)
    theirs = LogisticRegression(C=1 / (2 * 1e-3 * 300), max_iter=1000)  # the same penalty, in sklearn's terms
    expected = torch.from_numpy(theirs.fit((train[0] - mean) / std, train[1]).predict((test[0] - mean) / std))
    found = common.probe_predict(*train, test[0])
    assert (found == expected).float().mean() > 0.99
    assert 0.5 < (found == test[1]).float().mean() < 0.99  # a task on which heads can differ
