"""The four parts in order, as a grader runs them: what they write, and that it is what they did."""

import json
import re
import shutil
import subprocess
import sys

import common
import datasets
import muon
import part2_robustness
import part3_augmented
import report
import storage

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import (
    DIGITS,
    ROOT,
    TRAINING,
    call,
    contents,
    make_narrow,
    on_tree,
    read,
    write_tree,
)


@pytest.fixture(scope="module", autouse=True)
def narrow_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        yield


def run(script, *argv, code=0):
    found, error, out = call(script, argv)
    assert found == code, error
    return out, error


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run("part1_baseline", *DIGITS, "--results-dir", folder)
    run("part2_robustness", "--checkpoint", folder / "part1.pt", "--results-dir", folder,
        "--umap-points", 60, "--targeted")
    run("part3_augmented", *DIGITS, "--results-dir", folder, "--no-umap")
    run("part4_angular", *DIGITS, "--results-dir", folder, "--no-umap")
    return folder


def test_part_1_as_it_is(tmp_path):
    """The script, ResNet18, UMAP and figures, nothing replaced."""
    done = subprocess.run([sys.executable, ROOT / "part1_baseline.py", *map(str, DIGITS),
                           "--results-dir", tmp_path, "--epochs", "1", "--batch-size", "10"],
                          text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits (QUICK)" in done.stdout
    assert "UMAP failed" not in done.stdout
    for ending in (".pt", ".csv", ".json", "_history.csv", "_history.png", "_confusion.png",
                   "_umap.png", "_umap.npz", "_correct.npz"):
        assert (tmp_path / f"part1{ending}").stat().st_size > 0
    history = (tmp_path / "part1_history.csv").read_text(encoding="utf-8").splitlines()
    assert history[0].startswith("dataset,seed,eval_n,epoch,")
    assert history[1].split(",")[2] == "2"  # of 80: a tenth of an epoch of 20 training images
    with Image.open(tmp_path / "part1_umap.png") as image:
        assert min(image.size) > 300
    weights = torch.load(tmp_path / "part1.pt", weights_only=True)["model"]
    assert weights["backbone.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)


def test_compiled_parts_find_the_same(results, tmp_path):
    try:
        common.compile_backbone(common.Model(2), torch.device("cpu"))
    except common.UsageError as error:
        pytest.skip(str(error))
    run("part3_augmented", *DIGITS, "--results-dir", tmp_path, "--no-umap", "--compile")
    record = (tmp_path / "part3_robustness.json").read_text(encoding="utf-8")
    assert json.loads(record)["args"]["compile"] is True  # part 3 hands it on
    for name in ("part3.csv", "part3_robustness.csv"):
        found, expected = [[float(row["value"]) for row in read(folder / name)
                            if row["head"] == "own" and row["metric"] == "accuracy"
                            and row["condition"] in ("clean", "cutout", "rotation")]
                           for folder in (tmp_path, results)]
        assert len(found) >= 3
        assert found == pytest.approx(expected, abs=0.03)


def test_every_part_writes_its_files(results):
    for part in ("part1", "part3", "part4"):
        for ending in (".pt", ".csv", ".json", "_history.csv", "_history.png", "_confusion.png",
                       "_correct.npz"):
            assert (results / f"{part}{ending}").stat().st_size > 0
    for part in ("part2", "part3_robustness", "part4_robustness"):
        for ending in (".csv", ".json", "_severities.png", "_examples.png", "_fgsm.png",
                       "_adversarial.png", "_correct.npz"):
            assert (results / f"{part}{ending}").stat().st_size > 0
    for name in ("part1_umap.png", "part2_umap.png", "comparison.csv", "comparison.png",
                 "summary.md", "summary.html"):
        assert (results / name).stat().st_size > 0
    hidden = [path.name for path in results.iterdir() if path.name.startswith(".")]
    assert all(name.endswith(".lock") for name in hidden)  # no temporary file


def test_tables_are_tidy_and_of_one_split(results):
    rows = storage.read_all(results)
    assert {row["part"] for row in rows} == {"part1", "part3", "part4"}
    assert {row["dataset"] for row in rows} == {"digits (QUICK)"}
    assert len({row["split_hash"] for row in rows}) == 1
    sizes = {"train": 20, "evaluation": 80, "test": 100}
    attacks = ("fgsm", "pgd", "random", "worst_case")
    for row in rows:
        assert tuple(row) == storage.COLUMNS
        if row["metric"] == "accuracy":
            assert 0 <= row["ci_low"] <= row["value"] <= row["ci_high"] <= 1
            assert row["n"] == sizes[row["split"]] or row["condition"].startswith(attacks)


def test_every_perturbation_and_eps_is_in_the_table(results):
    wanted = {(name, "" if name in common.NO_SEVERITY else "3") for name in common.PERTURBATIONS}
    for name, last in (("part2", "fgsm_targeted"), ("part3_robustness", "fgsm_from_part1"),
                       ("part4_robustness", "fgsm_from_part1")):
        found = {(row["condition"], row["severity"]) for row in read(results / f"{name}.csv")
                 if row["metric"] == "accuracy"}
        assert found >= wanted | {("fgsm", eps) for eps in ("0", "1", "2", "4", "8", "16")}
        for attack in ("fgsm_predicted", "random_sign", "pgd", "worst_case", last):
            assert found >= {(attack, "8"), (attack, "16")}


def test_another_parts_checkpoint_is_not_taken_for_part_1(results, tmp_path, capsys):
    meta = common.load_checkpoint(results / "part4.pt", "cpu")[1]
    for part, is_part1 in (("part1", True), ("part3", False)):
        shutil.copy(results / f"{part}.pt", tmp_path / "part1.pt")
        found = report.part1_beside(tmp_path, meta, "cpu")
        assert (found is not None) == is_part1
        assert ("is of another part" in capsys.readouterr().out) != is_part1


def test_transferred_images_are_part_1s(results):
    """Part 1's adversarial images, made again with its checkpoint alone, on part 3's model."""
    data = common.load_data("digits", "data", torch.device("cpu"), quick=True)
    some = common.evenly_spaced(len(data.test_labels), 50)
    images, labels = data.test_images[some] / 255, data.test_labels[some]
    part1, part3 = (common.load_checkpoint(results / f"{part}.pt", "cpu")[0]
                    for part in ("part1", "part3"))
    adversarial = common.fgsm(part1, images, labels, 8 / 255)
    with torch.no_grad():
        right = part3(adversarial).argmax(1) == labels
    row = next(row for row in read(results / "part3_robustness.csv")
               if (row["condition"], row["severity"]) == ("fgsm_from_part1", "8"))
    assert float(row["value"]) == pytest.approx(right.float().mean().item(), abs=0.021)


def test_the_table_is_what_the_checkpoint_does(results):
    """Independently of the evaluation code: load, classify, count."""
    data = common.load_data("digits", "data", torch.device("cpu"), quick=True)
    split = common.split_data(data, 0.2, 0)
    for part in ("part1", "part3", "part4"):
        model, meta = common.load_checkpoint(results / f"{part}.pt", "cpu")
        assert meta["epoch"] == 2
        for where, images, labels in (("train", split.train_images, split.train_labels),
                                      ("evaluation", split.eval_images, split.eval_labels),
                                      ("test", data.test_images, data.test_labels)):
            with torch.no_grad():
                logits = model(images.float() / 255)
            right = (logits.argmax(1) == labels).float().mean().item()
            found = meta["metrics"][where]
            assert right == pytest.approx(found, abs=1.01 / len(labels))  # one image
            row = next(row for row in read(results / f"{part}.csv")
                       if (row["split"], row["head"]) == (where, "own"))
            assert float(row["value"]) == pytest.approx(found, abs=1e-5)
            assert int(row["n"]) == len(labels)


def test_the_summary_names_what_ran_and_what_is_there(results):
    assert {row["part"] for row in read(results / "comparison.csv")} == {"part1", "part3", "part4"}
    text = (results / "summary.md").read_text(encoding="utf-8")
    assert "digits (QUICK)" in text
    assert storage.read_record(results, "part3")["command"] in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert "part2_fgsm.png" in figures
    for figure in figures:
        assert (results / figure).exists()
    assert len(figures) == len(set(figures))


def test_one_umap_frame_for_all_conditions_of_a_model(results):
    with np.load(results / "part2_umap.npz") as file:
        panels = list(dict.fromkeys(file["panel"]))
        assert panels[0] == "clean"
        assert "FGSM 8/255" in panels
        assert len(file["coordinates"]) == len(file["label"]) == 50 * len(panels)
        assert np.isfinite(file["coordinates"]).all()


@pytest.mark.parametrize("part", ["part3", "part4"])
def test_part2_works_on_every_checkpoint_alone_and_says_the_same_again(results, tmp_path, part):
    run("part2_robustness", "--checkpoint", results / f"{part}.pt", "--results-dir", tmp_path,
        "--no-umap", "--perturbations", "gaussian_noise", "--eps-255", 8)
    first, again = ({(row["condition"], row["severity"]): row["value"]
                     for row in read(folder / f"{part}_robustness.csv")
                     if row["metric"] == "accuracy"
                     and row["condition"] in ("clean", "gaussian_noise", "fgsm")}
                    for folder in (results, tmp_path))
    assert len(again) > 3
    assert {key: first[key] for key in again} == again


def test_cifar10c_files_are_tested_as_they_are(results, tmp_path):
    data = write_tree(tmp_path / "data", datasets.CIFAR10_CLASSES, n=4)
    run("part1_baseline", "--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5,
        "--quick", "--no-umap", "--results-dir", tmp_path, "--amp", "off")
    random = np.random.RandomState(0)
    corrupted = tmp_path / "CIFAR-10-C"
    corrupted.mkdir()
    pixels = random.randint(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    pixels[40:60] = pixels[:20]  # severity 3 shows the images of severity 1
    np.save(corrupted / "labels.npy", np.tile(np.arange(20, dtype=np.uint8) % 10, 5))
    np.save(corrupted / "fog.npy", pixels)
    run("part2_robustness", "--checkpoint", tmp_path / "part1.pt", "--no-umap", "--perturbations",
        "grayscale", "--eps-255", 0, "--results-dir", tmp_path, "--cifar10c", corrupted)
    rows = {row["severity"]: float(row["value"]) for row in read(tmp_path / "part2.csv")
            if (row["condition"], row["metric"]) == ("cifar10c fog", "accuracy")}
    assert list(rows) == ["1", "2", "3", "4", "5"]
    assert rows["1"] == rows["3"]
    model, _ = common.load_checkpoint(tmp_path / "part1.pt", "cpu")
    for severity in (1, 2):
        block = torch.from_numpy(pixels[20 * severity - 20 : 20 * severity]).permute(0, 3, 1, 2)
        with torch.no_grad():
            right = (model(block / 255).argmax(1) == torch.arange(20) % 10).float().mean().item()
        assert rows[str(severity)] == pytest.approx(right, abs=0.051)  # one image of 20
    assert "fog" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    np.save(corrupted / "snow.npy", pixels[:20])
    for checkpoint, message in (
            (tmp_path / "part1.pt", "snow.npy: uint8 (20, 32, 32, 3)"),
            (results / "part1.pt", "needs a checkpoint of CIFAR-10's ten classes")):
        _, error = run("part2_robustness", "--checkpoint", checkpoint, "--results-dir",
                       tmp_path / "no", "--cifar10c", corrupted, code=2)
        assert message in error
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("script", "classes"), [("part1_baseline", 12), ("part4_angular", 3),
                                                 ("part3_augmented", 37)])
def test_other_numbers_of_classes_go_through_training_attack_and_tables(tmp_path, script, classes):
    names = [f"class {c}" for c in range(classes)]
    data = write_tree(tmp_path / "data", names, n=4, side=24)
    out, _ = run(script, "--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5,
                 "--amp", "off", "--results-dir", tmp_path / "results", "--quick", "--no-umap")
    assert f"{classes} classes" in out
    part = script[:5]
    if part == "part1":
        run("part2_robustness", "--results-dir", tmp_path / "results", "--checkpoint",
            tmp_path / "results/part1.pt", "--no-umap", "--perturbations", "rotation", "--eps-255",
            8)
    metrics = {row["metric"] for row in read(tmp_path / f"results/{part}.csv")}
    assert len([m for m in metrics if m.startswith("accuracy of class")]) == classes
    assert len(storage.read_all(tmp_path / "results")) > 20


def test_another_data_set_or_split_is_refused_and_nothing_is_touched(results, tmp_path):
    before = contents(results)
    _, error = run("part1_baseline", "--dataset", "digits", "--results-dir", results, code=2)
    assert "holds results on digits (QUICK), split" in error
    assert "this run is on digits, split" in error
    _, error = run("part1_baseline", *DIGITS, "--split-seed", 1, "--results-dir", results, code=2)
    assert "give another --results-dir" in error
    _, error = run("part2_robustness", "--checkpoint", results / "part1.pt", "--split-seed", 1,
                   "--results-dir", tmp_path, code=2)
    assert "was trained on the data or split" in error
    assert contents(results) == before
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy",
                        lambda logits, labels, **words: logits.sum() * float("nan"))
    _, error = run("part1_baseline", *DIGITS, "--results-dir", tmp_path, code=1)
    assert "the loss became nan in epoch 1; try a lower --lr" in error
    assert not (tmp_path / "part1.pt").exists()


@pytest.mark.parametrize("epochs", [1, 5])
@pytest.mark.parametrize("script", TRAINING)
def test_a_training_of_very_few_steps(tree, tmp_path, script, epochs):
    """OneCycleLR divides by zero with 5 steps, and starts near its peak with fewer."""
    argv = on_tree(tree, tmp_path, "--batch-size", 6, "--epochs", epochs)
    code, error, _ = call(script, argv if script == "part1_baseline" else [*argv, "--no-part2"])
    assert code == 0, error
    part = script.split("_")[0]
    rates = [float(row["lr"]) for row in read(tmp_path / f"{part}_history.csv")]
    assert rates[0] == pytest.approx(0.02)  # after a step from a tenth of it
    assert rates == sorted(rates, reverse=True)


def test_severities_and_eps_that_stand_twice_count_once():
    args = part2_robustness.parse_args(["--severities", "3", "1", "1", "--eps-255", "8",
                                        "8.0000001", "0"])
    assert (args.severities, args.eps_255) == ([1, 3], [0, 8])


@pytest.mark.parametrize(("labels", "expected"), [
    ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0] * 20, range(10)), ([1, 0] * 50, [0] * 5 + [1] * 5),
    ([2, 0, 1], range(3)), ([0] * 100 + [2] * 3, [0] * 5 + [2] * 3),
    ([*range(19)] * 3, range(0, 19, 2))])
def test_examples_are_of_all_classes(labels, expected):
    labels = torch.tensor(labels)
    assert labels[part2_robustness.of_all_classes(labels)].tolist() == list(expected)


class Stops(muon.Muon):
    """A student's other optimizer."""


def test_what_trains_and_how_long_is_recorded_compared_and_told(tree, tmp_path, monkeypatch):
    """No argument says it: edited lines do."""
    code, error, _ = call("part1_baseline", on_tree(tree, tmp_path))
    assert code == 0, error
    monkeypatch.setattr("muon.Muon", Stops)
    code, error, out = call("part3_augmented", on_tree(tree, tmp_path, "--no-part2"))
    assert code == 0, error
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("part1", "part3")]
    found = [record["versions"]["optimizer"] for record in records]
    assert found[0] == "Muon (lr 0.02, momentum 0.9, weight_decay 0.001) with OneCycleLR"
    assert found[1] == found[0].replace("Muon", "Stops")
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f"optimizer ({found[1]}; part1 {found[0]})" in text.replace("\\_", "_")
    assert "stopped" not in out


def test_a_training_that_stops_early_is_told_from_a_whole_one(tree, tmp_path, monkeypatch):
    finish = report.finish
    monkeypatch.setattr(report, "finish", lambda run, model, predictions, history, repeated: finish(
        run, model, predictions, history[:1], repeated))  # as after a student's `break`
    code, error, out = call("part1_baseline", [*on_tree(tree, tmp_path), "--epochs", 2])
    assert code == 0, error
    assert "stopped after epoch 1 of 2; the record says so" in out
    assert json.loads((tmp_path / "part1.json").read_text())["versions"]["stopped"] == (
        "after epoch 1 of 2")
    assert common.load_checkpoint(tmp_path / "part1.pt", "cpu")[1]["epoch"] == 1
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "2 epochs" in text and "stopped after epoch 1 of 2" in text


class Cosines(common.ClassMeans):
    """A student's other head."""


def test_a_head_that_part_2_could_not_make_is_refused_before_it_is_trained(
        tree, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ClassMeans", Cosines)
    code, error, out = call("part4_angular", on_tree(tree, tmp_path))
    assert code == 2
    assert "its head Cosines is not as in network.py's Model" in error
    assert "epoch" not in out


def test_a_part_of_a_students_own_name_is_refused_with_what_it_needs(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(part3_augmented, "part_name", lambda args: "part5")
    code, error, _ = call("part3_augmented", on_tree(tree, tmp_path, "--no-part2"))
    assert code == 2
    assert "'part5'" in error and "common.PARTS" in error
    assert not list(tmp_path.glob("part5*"))
