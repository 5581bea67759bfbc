"""Part 2 hands the right images, labels and features on: one run, done again in plain steps."""

import copy
import types
from dataclasses import replace

import audit
import checkpoints
import common
import comparison
import datasets
import part2_robustness
import plots
import report
import summary
from arguments import UsageError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, meta_of
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

CPU = torch.device("cpu")
CONDITIONS = [("gaussian_noise", 1), ("gaussian_noise", 5), ("rotation", 1), ("rotation", 5),
              ("vertical_flip", "")]
STRONGEST = [("gaussian_noise", 5), ("rotation", 5), ("vertical_flip", "")]
ATTACKED = 120  # images
POINTS = 60  # of the UMAP


def features_of(model, images):
    """What the last layer is given for uint8 or float images: a plain pass, nothing folded."""
    body = copy.deepcopy(model)
    body.backbone.fc = nn.Identity()
    with torch.no_grad():
        return body(images / 255 if images.dtype == torch.uint8 else images)


def logits_of(model, images):
    return model.backbone.fc(features_of(model, images)).detach()


def fitted(data):
    """A model that answers with every class, often wrongly: ridge regression on random features."""
    torch.manual_seed(0)
    model = common.Model(10).eval()
    features = features_of(model, data.train_images)
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    targets = 8 * F.one_hot(data.train_labels, 10).float()
    weights = torch.linalg.solve(inputs.T @ inputs + torch.eye(65), inputs.T @ targets)
    model.backbone.fc.weight.data = weights[:-1].T.contiguous()
    model.backbone.fc.bias.data = weights[-1].contiguous()
    return model


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One run of part 2 on digits, its figures caught, with what it was given."""
    folder = tmp_path_factory.mktemp("results")
    data = common.load_data("digits", "", CPU)
    fog = common.perturb(data.test_images, "gaussian_blur", 2)  # in a published corruption's place
    published = datasets.Corrupted("cifar10c fog", "2", fog.numpy(), data.test_labels.numpy())
    shown = {}  # file name -> what it was drawn from
    maps = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("torchvision.models.resnet18", Tiny)
        monkeypatch.setattr(datasets, "cifar10c", lambda *_: [published])
        monkeypatch.setattr(common, "umap_coordinates", lambda features, seed: features.numpy())
        monkeypatch.setattr(plots, "umap", lambda path, *drawn: maps.append(drawn))
        for name in ("severities", "attack", "examples"):
            monkeypatch.setattr(plots, name,
                                lambda path, *drawn: shown.__setitem__(path.name, drawn))
        monkeypatch.setattr(summary, "compare", lambda _: None)
        model = fitted(data)
        split = common.split_data(data, 0.2, 0)
        common.save_checkpoint(
            folder / "part1.pt", model,
            meta_of(model) | {"classes": list(data.classes), "split_hash": split.hash})
        rows = part2_robustness.main([
            "--checkpoint", str(folder / "part1.pt"), "--results-dir", str(folder), "--amp", "off",
            "--device", "cpu", "--perturbations", "gaussian_noise", "rotation", "vertical_flip",
            "--severities", "1", "5", "--cifar10c", "fog", "--eps-255", "2", "8", "16",
            "--targeted", "--attack-images", str(ATTACKED), "--audit-images", "10",
            "--umap-points", str(POINTS)])
    with np.load(folder / "part2_correct.npz") as file:
        right = {key: file[key] for key in file.files}
    values = {(row["condition"], row["severity"], row["metric"]): row["value"] for row in rows}
    panels, run = maps[0]
    return types.SimpleNamespace(
        model=model, images=data.test_images, labels=data.test_labels, fog=fog, right=right,
        values=values, attacked=spread(len(data.test_labels), ATTACKED), panels=panels, run=run,
        shown=shown, perturbed_examples=shown["part2_examples.png"][0])


def spread(total, n):
    """n positions over `total`, as part 2 spreads the images it attacks and maps."""
    return np.linspace(0, total - 1, n).round().astype(int)


def assert_alike(found, expected):
    """Booleans of images of which one may differ, by rounding."""
    assert np.sum(found != np.asarray(expected)) <= 1


def in_bins(logits, labels):
    """The expected calibration error, bin by bin."""
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels.numpy()
    error = 0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_every_condition_is_that_of_its_own_images_and_the_true_labels(study):
    conditions = {("clean", ""): study.images, ("cifar10c fog", "2"): study.fog}
    for name, severity in CONDITIONS:
        conditions[name, str(severity)] = common.perturb(study.images, name, severity or 1)
    accuracies = set()
    for (name, severity), images in conditions.items():
        logits = logits_of(study.model, images)
        right = (logits.argmax(1) == study.labels).numpy()
        assert_alike(study.right[f"test/{name}/{severity}"], right)
        assert study.values[name, severity, "accuracy"] == pytest.approx(right.mean(), abs=0.003)
        assert study.values[name, severity, "calibration_error"] == pytest.approx(
            in_bins(logits, study.labels), abs=0.006)  # one of 364 images in another bin
        assert len(logits.argmax(1).unique()) >= 3  # a constant answer would hide everything
        accuracies.add(round(right.mean(), 2))
    assert len(accuracies) >= 5


@checkpoints.releases_locks()
def test_rows_have_the_label_and_the_seed_of_the_training(tmp_path):
    """Not those of part 2's own arguments."""
    args = part2_robustness.parse_args(["--seed", "4", "--results-dir", str(tmp_path)])
    data = common.load_data("digits", "", CPU)
    split = common.split_data(data, 0.2, 0)
    meta = {"part": "part4", "seed": 5, "args": {"loss": "arcface"}}
    run = report.start(args, "part4", data, split, CPU, common.Amp("off", CPU), "a" * 12, meta)
    assert (run.label, run.seed, run.name) == ("ArcFace", 5, "part4_robustness")
    assert report.row(run, "test", "clean", "", "own", "accuracy", 0.5, 9)["seed"] == 5


def test_every_condition_of_a_run_has_its_family(study):
    families = {name: comparison.family_of(name) for name, _, _ in study.values}
    expected = {"clean": "", "gaussian_noise": "noise", "rotation": "geometry",
                "vertical_flip": "geometry", "cifar10c fog": "CIFAR-10-C"}
    assert {name: families.pop(name) for name in expected} == expected
    assert {"fgsm_unit", "pgd_unit", "random_sign", "worst_case_audit"} < families.keys()
    assert set(families.values()) == {"attack"}


def test_examples_are_one_image_of_each_class_at_the_largest_severity(study):
    clean = study.perturbed_examples[0][1]
    shown = [int((study.images == image).flatten(1).all(1).nonzero()[0]) for image in clean]
    assert study.labels[shown].tolist() == list(range(10))
    titles = [title for title, _ in study.perturbed_examples]
    assert titles == ["clean", "gaussian noise 5", "rotation 5", "vertical flip"]
    for (name, severity), (_, images) in zip(STRONGEST, study.perturbed_examples[1:], strict=True):
        assert torch.equal(images, common.perturb(study.images, name, severity or 1)[shown])


def moved(study, labels, eps_255):
    """The attacked images after one step up the loss, or down it for eps < 0, by hand."""
    images = (study.images[study.attacked] / 255).requires_grad_()
    loss = F.cross_entropy(study.model(images), labels, reduction="sum")
    gradient, = torch.autograd.grad(loss, images)
    return (images + eps_255 / 255 * gradient.sign()).clamp(0, 1).detach()


def test_each_attack_climbs_the_loss_of_its_own_labels(study):
    truth = study.labels[study.attacked]
    clean = logits_of(study.model, study.images[study.attacked])
    assert 0.2 < common.accuracy(clean, truth) < 0.8  # so that the labels make a difference
    least = clean.argmin(1)
    for name, labels, eps in (("fgsm", truth, 2), ("fgsm", truth, 8),
                              ("fgsm_predicted", clean.argmax(1), 2),
                              ("fgsm_targeted", least, -16)):
        found = logits_of(study.model, moved(study, labels, eps)).argmax(1)
        assert_alike(study.right[f"test/{name}/{abs(eps)}"], found == truth)
    reached = (found == least).float().mean().item()
    assert reached > 0.2
    assert study.values["fgsm_targeted", "16", "target class reached"] == pytest.approx(
        reached, abs=1.01 / ATTACKED)


def test_a_run_is_gone_on_with_by_other_code_but_not_with_other_maps(study, tmp_path):
    run = replace(study.run, folder=tmp_path, versions={"commit": "abc"},
                  args=study.run.args | {"resume": True})
    begun = checkpoints.resume_finished(run)
    begun["rotation", 2, "a" * 12] = torch.zeros(3), 0.5, None
    checkpoints.save_finished(run, begun)
    for severity in (3, 4):  # with other code, twice
        run.versions["commit"] = "def"
        run.args["cifar10c"] = f"folder{severity}"  # where its files are does not count
        begun = checkpoints.resume_finished(run)
        assert begun and run.versions["commit"] == "abc, then def"
        begun["rotation", severity, "a" * 12] = torch.zeros(3), 0.5, None
        checkpoints.save_finished(run, begun)
    run.args["umap_points"] += 1  # of which features are kept
    with pytest.raises(UsageError, match="--umap-points"):
        checkpoints.resume_finished(run)


def test_conditions_are_gone_on_with_only_on_the_same_pixels_and_labels(study, tmp_path):
    run = replace(study.run, folder=tmp_path, args=study.run.args | {"resume": True})
    args = types.SimpleNamespace(severities=[1], umap_points=POINTS)
    data = types.SimpleNamespace(test_images=study.images, test_labels=study.labels)
    amp = common.Amp("off", CPU)
    clean = common.predict(study.model, study.images, amp, study.labels)
    finished = checkpoints.resume_finished(run)
    fog, labels = study.fog, study.labels
    darker = fog.clone()
    darker[-1, 0, 0, 0] ^= 1
    other = labels.clone()
    other[-1] = (other[-1] + 1) % 10
    hashes = []
    for images, truth, known in ((fog, labels, 1), (fog, labels, 1), (darker, labels, 2),
                                 (fog, other, 3)):
        tested = part2_robustness.test_perturbations(
            args, run, study.model, data, amp, [("cifar10c fog", "2", images, truth)], clean,
            torch.arange(POINTS), finished)
        assert len(finished) == known
        hashes.append(tested.pixels["test/cifar10c fog/2"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert len(checkpoints.resume_finished(run)) == 3  # from the disk


def test_pictures_of_attacks_are_of_attacked_images_and_captions_say_what_is_shown(study):
    attacked, _, what = study.shown["part2_adversarial.png"]
    clean, truth = study.images[study.attacked] / 255, study.labels[study.attacked]
    shown = [int((clean - image).abs().sum((1, 2, 3)).argmin()) for image in attacked[0][1]]
    assert truth[shown].tolist() == list(range(10))
    for (title, images), eps in zip(attacked, (0, 2, 8, 16), strict=True):
        assert title == f"FGSM {eps}/255"
        apart = (images - moved(study, truth, eps)[shown]).abs() > 1e-6
        assert apart.float().mean() < 0.001  # where a gradient is 0 but for rounding
    assert what == "FGSM: attacked images"
    assert study.shown["part2_examples.png"][2] == "Perturbations at severity 5"
    failed = [metric.removeprefix("audit: ") for (_, _, metric), value in study.values.items()
              if metric.startswith("audit: ") and value == 0]
    assert study.shown["part2_fgsm.png"][2:] == ("inf", failed)


@pytest.mark.parametrize(("norm", "order"), [("inf", np.inf), ("2", 2)])
def test_random_noise_is_as_large_as_the_attack(study, norm, order):
    args = part2_robustness.parse_args(["--norm", norm])
    images = study.images[:4] / 255
    clean = logits_of(study.model, images)
    names = audit.NAMES[norm]
    noise, again = (part2_robustness.make_directions(
        args, names, study.model, images, study.labels[:4], clean, None)[names.random].flatten(1)
        for _ in range(2))
    assert torch.equal(noise, again)  # the same in every run
    assert torch.allclose(noise.norm(order, dim=1), torch.ones(4))
    if norm == "inf":
        assert (noise.abs() == 1).all()


def test_attacks_are_in_float32_also_after_a_training_in_bf16(study):
    inside = []
    model = copy.deepcopy(study.model)
    model.head.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    args = part2_robustness.parse_args(["--amp", "bf16", "--eps-255", "8", "--audit-images", "10"])
    part2_robustness.attack(args, study.run, model, study.images[:20] / 255, study.labels[:20])
    assert len(inside) > 20  # of PGD's steps alone
    assert not any(inside)


def test_a_students_attack_is_not_taken_for_a_perturbation(study, monkeypatch):
    make_directions = part2_robustness.make_directions

    def with_mine(args, names, *rest):
        found = make_directions(args, names, *rest)
        return found | {"deepfool": found[names.fgsm]}

    monkeypatch.setattr(part2_robustness, "make_directions", with_mine)
    args = part2_robustness.parse_args(["--eps-255", "8", "--audit-images", "10"])
    with pytest.raises(UsageError, match="comparison.ATTACKS has no beginning .* 'deepfool'"):
        part2_robustness.attack(args, study.run, study.model, study.images[:10] / 255,
                                study.labels[:10])


def test_one_image_that_is_moved_too_far_is_found():
    images = torch.full((3, 3, 2, 2), 0.5)
    adversarial = images + 0.1
    adversarial[1, 2, 0, 1] = 0.75
    assert part2_robustness.excess_over(0.1, images, adversarial, "inf") == pytest.approx(0.15)
    far = (11 * 0.1**2 + 0.25**2) ** 0.5
    assert part2_robustness.excess_over(0.3, images, adversarial, "2") == pytest.approx(far - 0.3)
    assert part2_robustness.excess_over(8, images, images + 10, "inf") == pytest.approx(2 / 8)


def nearest_neighbours(clean, labels, features, k):
    """Which images the k nearest other clean ones classify right, by scikit-learn."""
    right = []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        judge = KNeighborsClassifier(k, metric="cosine", weights=lambda d: 1 + 1e-3 * (1 - d))
        judge.fit(clean[others], labels[others])
        right.append(judge.predict(features[i : i + 1])[0] == labels[i])
    return np.mean(right)


def test_each_map_shows_and_measures_its_own_images(study):
    some = spread(ATTACKED, POINTS)
    mapped = study.attacked[some]
    labels = study.labels[mapped].numpy()
    clean = features_of(study.model, study.images[mapped]).numpy()
    k = np.bincount(labels).min() - 1
    expected = [("clean", "clean", "", study.images[mapped])]
    for name, severity in STRONGEST:
        title = f"{name} {severity}".replace("_", " ").strip()
        images = common.perturb(study.images, name, severity or 1)[mapped]
        expected.append((title, name, str(severity), images))
    adversarial = moved(study, study.labels[study.attacked], 8)[some]
    expected.append(("FGSM 8/255", "fgsm", "8", adversarial))
    assert len(study.panels) == len(expected)
    for (title, name, severity, images), panel in zip(expected, study.panels, strict=True):
        features = features_of(study.model, images).numpy()
        assert np.allclose(panel.points, features, atol=1e-3)
        assert (panel.labels == labels).all()
        neighbours = study.values[name, severity, f"{k}-NN accuracy in 64-d"]
        width = silhouette_score(features, labels)
        assert neighbours == pytest.approx(nearest_neighbours(clean, labels, features, k),
                                           abs=1.01 / POINTS)
        assert study.values[name, severity, "silhouette in 64-d"] == pytest.approx(width, abs=1e-3)
        found = f"{k}-NN {100 * neighbours:.1f} %, silhouette {width:.2f}"
        assert panel.title == f"{title}\n{found}"


@pytest.mark.parametrize(("attacked", "titles"), [
    (slice(None), ["clean", "FGSM 8/255"]), (slice(0, 40), ["clean"]), (slice(1, None), ["clean"])])
def test_an_attack_on_other_images_has_no_map(study, tmp_path, monkeypatch, attacked, titles):
    """As of code that attacks only what is classified right."""
    shown = []
    for name in ("severities", "examples", "attack"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(report, "draw_umap", lambda run, panels, _: shown.extend(panels))
    labels = torch.arange(ATTACKED) % 10
    features = torch.randn(ATTACKED, 4, generator=torch.Generator().manual_seed(0))
    some = common.evenly_spaced(ATTACKED, POINTS)
    clean = report.Panel("clean", "test", "clean", "", features[some], labels[some], features[some])
    args = types.SimpleNamespace(norm="inf", umap_points=POINTS, severities=[3], checkpoint="x")
    rows = part2_robustness.finish(
        args, replace(study.run, folder=tmp_path),
        part2_robustness.Tested([], {}, {}, [clean], []),
        part2_robustness.Attacked([], {}, [], features[attacked], labels[attacked], 8, []), None)
    assert [panel.title for panel in shown] == titles
    assert len(rows) == 2 * len(titles)


@pytest.mark.parametrize(("then", "passes"), [
    (None, True), (0.7, True), (0.721, True), (0.679, True), (0.73, False), (0.67, False)])
def test_an_accuracy_may_differ_by_rounding_alone(then, passes):
    logits = torch.eye(2)[(torch.arange(1000) >= 700).long()]
    clean = common.Prediction(logits, None, torch.zeros(1000, dtype=torch.long))
    try:
        report.check_network("part1.pt", {"metrics": {"test": then}}, clean)
        assert passes
    except UsageError:
        assert not passes


@pytest.mark.parametrize("edit", ["a constant input", "another activation", "nothing"])
def test_a_network_edited_since_its_training_is_refused(study, tmp_path, monkeypatch, edit):
    """The same weights, loaded strictly, are another network if the code has changed."""
    right = np.mean((logits_of(study.model, study.images).argmax(1) == study.labels).numpy())
    classes = [str(c) for c in range(10)]
    data = common.load_data("digits", "", CPU)
    meta = meta_of(study.model) | {"classes": classes, "metrics": {"test": float(right)},
                                   "split_hash": common.split_data(data, 0.2, 0).hash}
    monkeypatch.setattr("torchvision.models.resnet18", Tiny)
    common.save_checkpoint(tmp_path / "part1.pt", study.model, meta)
    if edit == "a constant input":
        monkeypatch.setattr(common, "to_float", lambda images: torch.zeros(images.shape))
    if edit == "another activation":
        monkeypatch.setattr(Tiny, "forward", lambda self, images: self.fc(
            self.avgpool(self.bn1(self.conv1(images)).sigmoid()).flatten(1)))
    arguments = ["--checkpoint", str(tmp_path / "part1.pt"), "--results-dir", str(tmp_path),
                 "--amp", "off", "--device", "cpu", "--perturbations", "vertical_flip",
                 "--attack-images", "10", "--audit-images", "10", "--eps-255", "8", "--no-umap"]
    if edit == "nothing":
        assert part2_robustness.main(arguments)
    else:
        with pytest.raises(UsageError, match=r"part1.pt: test accuracy was 6\d.* with this code"):
            part2_robustness.main(arguments)
        assert not (tmp_path / "part2.csv").exists()
