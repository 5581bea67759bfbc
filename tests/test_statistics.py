"""Statistics against scipy, scikit-learn, or values worked by hand."""

import math
import os
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal

import common
import metrics
import report

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import binomtest, ttest_rel
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch.overrides import TorchFunctionMode


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (7412, 10_000), (1, 1)])
def test_wilson_against_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    low, high = metrics.wilson_interval(correct, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= correct / n <= high <= 1


@pytest.mark.parametrize(("correct", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(ValueError, match="not a proportion"):
        metrics.wilson_interval(correct, n)


def test_mcnemar_by_hand():
    a = np.array([True] * 6 + [False] * 1 + [True] * 20)
    b = np.array([False] * 6 + [True] * 1 + [True] * 20)
    assert metrics.mcnemar(a, b) == pytest.approx(2 * (1 + 7) / 2**7)  # 6 against 1 of 7
    assert metrics.mcnemar(b, a) == metrics.mcnemar(a, b)
    assert metrics.mcnemar(a, a) == 1


@pytest.mark.parametrize("test", [metrics.mcnemar, metrics.paired_difference])
@pytest.mark.parametrize(("ours", "theirs"), [((9,), (1,)), ((9,), (9, 1)), ((1, 9), (1, 9)),
                                              ((9,), ()), ((9,), (8,))])
def test_arrays_that_are_no_pairs_are_refused(test, ours, theirs):
    """NumPy would compare every entry with every other."""
    with pytest.raises(ValueError, match="of pairs, found the shapes"):
        test(np.ones(ours, dtype=bool), np.zeros(theirs, dtype=bool))


def test_accuracy_needs_one_label_for_each_image():
    logits = torch.eye(3)
    assert common.accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    for shape in ((3, 1), (1,), (), (2,)):
        with pytest.raises(ValueError, match="one label each"):
            common.accuracy(logits, torch.zeros(shape, dtype=torch.int64))


def test_holm_by_hand():
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(metrics.holm([])) == 0


def test_paired_difference_against_scipy():
    generator = np.random.default_rng(0)
    theirs = generator.normal(0.7, 0.02, 5)
    ours = theirs + generator.normal(0.01, 0.005, 5)
    found = metrics.paired_difference(ours, theirs)
    expected = ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx((ours - theirs).mean()) and found.n == 5
    worse = metrics.paired_difference(theirs, ours)
    assert worse.p_value == pytest.approx(expected.pvalue)
    assert (worse.low, worse.high) == pytest.approx((-interval.high, -interval.low))


def test_a_small_spread_is_a_spread():
    gains = np.array([1e-5, 2e-5, 4e-5])
    found = metrics.paired_difference(0.7 + gains, np.full(3, 0.7))
    assert found.p_value == pytest.approx(ttest_rel(0.7 + gains, np.full(3, 0.7)).pvalue, rel=1e-6)
    assert math.isfinite(found.low)


@pytest.mark.parametrize(("ours", "theirs"), [([0.8], [0.7]), ([0.8, 0.9], [0.7, 0.8])])
def test_paired_difference_without_a_spread_tells_nothing(ours, theirs):
    found = metrics.paired_difference(ours, theirs)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high, found.p_value) == (-math.inf, math.inf, 1)


@pytest.mark.parametrize("trainings", [2, 3, 5])
def test_the_same_difference_in_images_is_no_spread_of_six_digits(trainings):
    """Of 364 images 5 more are right in every training; only the sixth digit of that differs."""
    for first in range(300):
        theirs = [first + 7 * i for i in range(trainings)]
        ours = [float(f"{(count + 5) / 364:.6g}") for count in theirs]
        found = metrics.paired_difference(ours, [float(f"{count / 364:.6g}") for count in theirs])
        assert (found.low, found.high, found.p_value) == (-math.inf, math.inf, 1)
    most = metrics.paired_difference([0.700001, 0.7], [0.6, 0.600001])  # that rounding makes
    assert most.p_value == 1
    found = metrics.paired_difference([0.7, 0.700005], [0.6, 0.6])  # one of 200,000 images
    assert math.isfinite(found.low) and found.p_value < 1e-4


def test_calibration_error_by_hand():
    # Between 12/15 and 13/15 one image is right and one is wrong; on each side one is right:
    # (|1-.79| + |1-.81 + 0-.86| + |1-.87|) / 4. Another number of bins parts them elsewhere.
    confidence = torch.tensor([0.79, 0.81, 0.86, 0.87])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    error = metrics.calibration_error(logits, torch.tensor([0, 0, 1, 0]))
    assert error == pytest.approx((0.21 + 0.67 + 0.13) / 4, abs=1e-6)
    sure = torch.tensor([[100.0, 0]] * 4)  # a confidence of 1 is in the last bin
    assert metrics.calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


def test_knn_against_sklearn():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 8, generator=generator) * 0.7
    labels = torch.arange(5).repeat(80)
    points = centers[labels] + torch.randn(400, 8, generator=generator)
    reference = KNeighborsClassifier(7, metric="cosine")
    reference.fit(points[:300].numpy(), labels[:300].numpy())
    votes = reference.predict_proba(points[300:].numpy())
    clear = np.sort(votes)[:, -1] > np.sort(votes)[:, -2]  # no tie
    ours = metrics.knn_predict(points[:300], labels[:300], points[300:], k=7).numpy()
    assert (ours == votes.argmax(1))[clear].all()
    assert clear.sum() > 50


def test_knn_can_leave_out_the_image_itself():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2100, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(2100)  # more than a block of 2,048
    assert torch.equal(metrics.knn_predict(points, labels, points, k=1), labels)
    others = metrics.knn_predict(points, labels, points, k=1, not_itself=True)
    reference = NearestNeighbors(n_neighbors=2, metric="cosine").fit(points.numpy())
    assert others.tolist() == reference.kneighbors(return_distance=False)[:, 0].tolist()
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])  # a negative cosine
    assert metrics.knn_predict(apart, labels[:2], apart, k=1, not_itself=True).tolist() == [1, 0]


def test_without_a_neighbour_there_is_no_vote():
    points, labels = torch.eye(3), torch.tensor([0, 1, 1])
    k = metrics.neighbours_for(labels, not_itself=True)
    with pytest.raises(ValueError, match="at least one neighbour, found k = 0"):
        metrics.knn_predict(points, labels, points, k, not_itself=True)


def test_knn_ties_go_to_the_nearer_neighbours():
    near, far = [1.0, 0.1], [1.0, 0.9]
    image = torch.tensor([[1.0, 0.0]])
    for label in (0, 1):
        labels = torch.tensor([label, 1 - label])
        assert metrics.knn_predict(torch.tensor([near, far]), labels, image, k=2) == label


def test_knn_goes_by_the_majority_however_near_or_long_the_others_are():
    features = torch.tensor([[1.0, 0.0]] * 10 + [[-1.0, 0.1]] * 11)
    labels = 5 * (torch.arange(21) >= 10).long()  # 1 to 4 are not there
    assert metrics.knn_predict(features, labels, 1000 * features[:1], k=21) == 5


def two_classes_of_six():
    """Features (12,4) and labels (12,) of two classes far apart."""
    labels = torch.arange(2).repeat_interleave(6)
    noise = 0.01 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return torch.eye(4)[labels] + noise, labels


def a_run(classes=("a", "b")):
    sizes = {"training": 12, "evaluation": 12, "test": 12}
    return report.Run("part1", "cross-entropy", "part1", None, "x.pt", "0" * 12, "toy", classes,
                      sizes, "abc", 0, {}, "x", {}, torch.device("cpu"), "cpu", "off")


def test_neighbours_are_no_more_than_the_smallest_class_has():
    features, labels = two_classes_of_six()
    assert metrics.neighbours_for(labels) == 6
    assert metrics.neighbours_for(labels, not_itself=True) == 5
    assert metrics.neighbours_for(torch.arange(3).repeat(100)) == 20
    assert metrics.neighbours_for(torch.tensor([0, 0, 5, 5, 5])) == 2  # 1 to 4 are not there
    panel = report.Panel("clean", "test", "clean", "", features, labels, features)
    neighbours, width = report.umap_rows(a_run(), [panel])
    assert (neighbours["value"], neighbours["metric"]) == (1, "5-NN accuracy in 4-d")
    assert width["value"] > 0.9
    prediction = common.Prediction(torch.eye(2)[labels], features, labels)
    predictions = dict.fromkeys(("train", "evaluation", "test"), prediction)
    rows = report.clean_rows(a_run(), predictions, 0)
    assert {row["value"] for row in rows if row["head"] == "knn"} == {1}


def test_all_panels_ask_as_many_neighbours():
    features, labels = two_classes_of_six()
    some = [*range(3), *range(6, 12)]  # three images of the first class
    panels = [report.Panel("all", "evaluation", "clean", "", features, labels, features),
              report.Panel("few", "test", "clean", "", features[some], labels[some],
                           features[some])]
    metrics_found = [row["metric"] for row in report.umap_rows(a_run(), panels)]
    assert metrics_found[::2] == ["2-NN accuracy in 4-d"] * 2


def test_a_class_of_one_image_has_no_neighbour_measure():
    features, labels = two_classes_of_six()
    panel = report.Panel("clean", "test", "clean", "", features[:7], labels[:7], features[:7])
    neighbours, _ = report.umap_rows(a_run(), [panel])
    assert math.isnan(neighbours["value"])
    assert neighbours["metric"] == "k-NN in 4-d: a class has one image"
    for labels in (torch.arange(12), torch.zeros(12)):  # every image a class of its own, or all one
        assert math.isnan(metrics.silhouette(features, labels))


def test_the_tables_have_training_accuracy_and_repeated_images():
    features, labels = two_classes_of_six()
    right = common.Prediction(torch.eye(2)[labels], features, labels)
    half = right._replace(logits=torch.eye(2)[labels * 0])
    rows = report.clean_rows(a_run(), {"train": right, "evaluation": half, "test": half}, 3)
    own = {row["split"]: row["value"] for row in rows
           if (row["head"], row["metric"]) == ("own", "accuracy")}
    assert own == {"train": 1, "evaluation": 0.5, "test": 0.5}  # a generalization gap of 50 points
    assert [row["n"] for row in rows if row["split"] == "train"] == [12]
    repeated = [row for row in rows if row["metric"] == "images of the training set, too"]
    assert [(row["value"], row["n"]) for row in repeated] == [(3, 12)]


def test_evenly_spaced_takes_every_class_of_an_ordered_set():
    labels = torch.arange(10).repeat_interleave(1000)
    counts = labels[common.evenly_spaced(10_000, 500)].bincount()
    assert (counts - 50).abs().max() <= 1
    assert torch.equal(common.evenly_spaced(5, 100), torch.arange(5))
    assert common.evenly_spaced(5, 1).tolist() == [0]


def test_evenly_spaced_is_the_same_on_every_processor():
    """Which images are attacked, for one: some roundings hang on the last bit of a float32."""
    sizes = [(10_000, 2000), (12_345, 1000), (40_000, 1000), (40_000, 10_000), (60_000, 2000)]
    code = ("import common, sys\n"
            "print([common.evenly_spaced(*size).tolist() for size in eval(sys.argv[1])])")
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(sizes)], env=plain, check=True,
                          capture_output=True, text=True)  # torch without AVX2
    ours = [common.evenly_spaced(*size).tolist() for size in sizes]
    assert done.stdout.strip() == str(ours)
    for (total, n), places in zip(sizes, ours, strict=True):
        exact = np.arange(n) * (total - 1) / (n - 1)
        assert np.abs(np.array(places) - exact).max() <= 0.5


class Float32Device(TorchFunctionMode):
    """A device without float64: only what was brought to the CPU before may be made float64."""

    def __init__(self):
        super().__init__()
        self.there = []  # tensors on the device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_device = any(args[0] is tensor for tensor in self.there) if args else False
        if func is torch.Tensor.cpu and on_device:
            return args[0].clone()
        if on_device and func in (torch.Tensor.double, torch.Tensor.to, torch.Tensor.numpy):
            raise TypeError("the device has no float64, nor is it the host")
        result = func(*args, **(kwargs or {}))
        if on_device and isinstance(result, torch.Tensor):
            self.there.append(result)
        return result


def test_umap_on_a_device_without_float64_has_the_exact_neighbours(monkeypatch):
    import umap

    class Reducer:
        def __init__(self, precomputed_knn, **_):
            found.append(precomputed_knn)

        def fit_transform(self, features):
            return features[:, :2]

    found = []
    monkeypatch.setattr(umap, "UMAP", Reducer)
    generator = torch.Generator().manual_seed(0)
    features = 100 + torch.randn(300, 32, generator=generator)  # far off: float32 would be rough
    expected = NearestNeighbors(n_neighbors=15).fit(features.double().numpy())
    distances, indices = expected.kneighbors(features.double().numpy())
    with Float32Device() as device:
        device.there.append(features)
        with pytest.raises(TypeError, match="no float64"):
            features.double()
        common.umap_coordinates(features, seed=0)
    assert np.array_equal(found[0][0], indices)
    assert np.allclose(found[0][1], distances, atol=1e-4)
    assert (found[0][1][:, 0] == 0).all()  # else UMAP takes an image for its own neighbour


def test_umap_leaves_torch_as_many_threads_as_it_had(monkeypatch):
    import umap

    class Reducer:
        def __init__(self, **_):
            pass

        def fit_transform(self, features):
            torch.set_num_threads(before + 1)  # as numba does when it starts its own
            return features[:, :2]

    monkeypatch.setattr(umap, "UMAP", Reducer)
    before = torch.get_num_threads()
    common.umap_coordinates(torch.rand(20, 4), seed=0)
    assert torch.get_num_threads() == before


def test_umap_is_the_same_for_the_same_seed_and_keeps_neighbours_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(40)
    features = 8 * torch.randn(4, 16, generator=generator)[labels]
    features += torch.randn(160, 16, generator=generator)
    first = common.umap_coordinates(features, seed=1)
    assert np.array_equal(first, common.umap_coordinates(features, seed=1))
    assert not np.array_equal(first, common.umap_coordinates(features, seed=2))
    map_of = torch.from_numpy(first - first.mean(0))
    near = metrics.knn_predict(map_of, labels, map_of, k=10, not_itself=True)
    assert (near == labels).float().mean() > 0.95


def test_linear_probe_against_sklearn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 12, generator=generator) * 0.8
    labels = torch.arange(5).repeat(120)
    features = centers[labels] + torch.randn(600, 12, generator=generator)
    features *= torch.logspace(-2, 2, 12)  # which weighs none of them less
    features[:, 5] = 3  # as of a unit that never fires
    train, test = (features[:300], labels[:300]), (features[300:], labels[300:])
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    theirs = LogisticRegression(C=1 / (2 * 1e-3 * 300), max_iter=1000)  # the same penalty
    theirs.fit((train[0] - mean) / std, train[1])
    expected = torch.from_numpy(theirs.predict((test[0] - mean) / std))
    found = metrics.probe_predict(*train, test[0])
    assert (found == expected).float().mean() > 0.99
    assert 0.5 < (found == test[1]).float().mean() < 0.99  # a task on which heads can differ


@pytest.mark.parametrize("n", [100, 364, 2000, 10_000])
def test_percent_rounds_halves_away_from_zero_as_decimal_arithmetic_does(n):
    for count in range(n + 1):
        exact = Decimal(100 * count) / n
        rounded = exact.quantize(Decimal("0.1"), ROUND_HALF_UP)
        assert metrics.percent(count / n) == str(rounded)
        assert metrics.percent(float(f"{count / n:.6g}")) == str(rounded)  # as tables hold it
        if count:
            assert metrics.percent(-count / n, "+") == f"{rounded.copy_negate():+}"
