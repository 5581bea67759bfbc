"""The comparison: what it joins, what it says, and what it refuses to."""

import contextlib
import csv
import html.parser
import itertools
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import claims
import common
import comparison
import metrics
import pages
import plots
import report
import storage
import summary
import trainings
from arguments import UsageError

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel

N = 1000  # images of every made accuracy
CLEAN = ("test", "clean", "")
A, B, C = "a" * 12, "b" * 12, "c" * 12  # weights
SPLIT = "5" * 12


def run_of(folder, name, part, weights=A, seed=0, split_hash=SPLIT, dataset="toy", command="python",
           **args):
    values = {"seed": seed, "split_seed": seed, "epochs": 6, "train_fraction": 0.2} | args
    return report.Run(part, "", name, Path(folder), f"{part}.pt", weights, dataset, ("cat", "dog"),
                      {}, split_hash, seed, values, command, {"torch": "2"}, torch.device("cpu"),
                      "cpu", "off")


def write(run, accuracies, order=0, part1="none", n=N, extra=(), pixels=None):
    """A part's table, record and correct images from {(split, condition, severity): accuracy}."""
    run.folder.mkdir(exist_ok=True)
    labels = torch.zeros(n, dtype=torch.int64)
    rows = []
    images = {}
    for (split, condition, severity), accuracy in accuracies.items():
        wrong = torch.roll(torch.arange(n) >= round(n * accuracy), order).long()
        rows.append(report.accuracy_row(run, split, condition, severity, "own", wrong, labels))
        images[f"{split}/{condition}/{severity}"] = report.correct(wrong, labels)
    for metric, value in extra:
        rows.append(report.row(run, "test", "fgsm", "", "own", metric, value, n))
    storage.write_rows(run.path(".csv"), rows)
    storage.write_record(run.path(".json"), run)
    storage.write_correct(run.path("_correct.npz"), run, images, part1, pixels)


def perturbed(**accuracies):
    """{("test", condition, "3"): accuracy}; of attacks at 8/255."""
    return {("test", name, "8" if name.startswith(("fgsm", "pgd", "worst")) else "3"): value
            for name, value in accuracies.items()}


def two_parts(folder, ours, theirs, order=0):
    """Parts 3 and 1 with clean accuracy 0.7, and what `perturbed` takes under part 2."""
    write(run_of(folder, "part1", "part1", A), {CLEAN: 0.7})
    write(run_of(folder, "part2", "part1", A), perturbed(**theirs))
    write(run_of(folder, "part3", "part3", B), {CLEAN: 0.702}, order)
    write(run_of(folder, "part3_robustness", "part3", B), perturbed(**ours), part1=A)


def verdicts_of(folder, part="part3", reference="part1"):
    """{(condition, severity): row of comparison.csv} of a part against a reference."""
    summary.compare(folder)
    return {(row["condition"], row["severity"]): row for row in read(folder / "comparison.csv")
            if (row["part"], row["reference"]) == (part, reference) and row["split"] == "test"}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def edited(path):
    """The record in a file, which is written again with what the block changes."""
    record = json.loads(path.read_text(encoding="utf-8"))
    yield record
    path.write_text(json.dumps(record), encoding="utf-8")


def text_of(folder):
    summary.compare(folder)
    return (folder / "summary.md").read_text(encoding="utf-8")


def lines_of(folder):
    study = comparison.read_study(folder)
    [table] = comparison.shared([comparison.measured(study)])
    return {line.title: line.values for line in comparison.overview(table, list(study.parts))}


# ---- one training: tests and means --------------------------------------------------------------


def test_verdicts_are_of_mcnemar_on_the_same_images_and_corrected(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65, "jpeg": 0.45}, {"rotation": 0.5, "jpeg": 0.6}, order=1)
    found = verdicts_of(tmp_path)
    assert found["clean", ""]["verdict"] == "no difference shown"
    assert found["rotation", "3"]["verdict"] == "better"
    assert found["jpeg", "3"]["verdict"] == "worse"
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "of 2 perturbed conditions better in 1, worse in 1, no difference shown in 0." in text
    assert "shows no difference" not in text


@pytest.mark.parametrize(("theirs", "ours", "verdict"), [
    ("a", "a", "better"), ("a", "b", "not tested: their perturbed images differ")])
def test_cifar10c_is_paired_only_on_the_same_files(tmp_path, theirs, ours, verdict):
    for name, part, weights, pixels, value in (("part2", "part1", A, theirs, 0.5),
                                               ("part3_robustness", "part3", B, ours, 0.7)):
        write(run_of(tmp_path, part, part, weights), {CLEAN: 0.7})
        write(run_of(tmp_path, name, part, weights), {("test", "cifar10c fog", "3"): value},
              pixels={"test/cifar10c fog/3": pixels})
    found = verdicts_of(tmp_path)
    assert found["cifar10c fog", "3"]["verdict"] == verdict
    assert found["clean", ""]["verdict"] == "no difference shown"


def test_means_by_hand(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65, "jpeg": 0.45}, {"rotation": 0.5, "jpeg": 0.6})
    found = lines_of(tmp_path)
    assert found[comparison.ALL_PERTURBED] == pytest.approx({"part1": 0.55, "part3": 0.55})
    assert found[comparison.SEEN] == pytest.approx({"part1": 0.5, "part3": 0.65})
    assert found[comparison.HELD_OUT] == pytest.approx({"part1": 0.6, "part3": 0.45})
    assert found["mPC relative to clean"]["part3"] == pytest.approx(0.55 / 0.702)
    assert found["corruption error (part1: 100)"]["part3"] == pytest.approx(
        (0.35 / 0.5 + 0.55 / 0.4) / 2)
    text = text_of(tmp_path)
    for lowest in ("rotation (geometry): 50.0 %", "JPEG (blur): 45.0 %"):  # of parts 1 and 3
        assert f"- **Perturbed:** 55.0 % on average (mPC), lowest under {lowest}.\n" in text


def test_cifar10c_and_what_is_no_longer_there_do_not_count_in_the_means(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.8})
    write(run_of(tmp_path, "part2", "part1"),
          perturbed(rotation=0.5, jpeg=0.6, removed=0.2) | {("test", "cifar10c fog", "5"): 0.1})
    found = lines_of(tmp_path)
    assert found["removed (other)"]["part1"] == 0.2
    assert found["cifar10c fog (CIFAR-10-C)"]["part1"] == 0.1
    assert found[comparison.ALL_PERTURBED]["part1"] == pytest.approx(0.55)
    assert found["mPC relative to clean"]["part1"] == pytest.approx(0.55 / 0.8)
    text = text_of(tmp_path)
    assert "55.0 % on average (mPC), lowest under rotation (geometry): 50.0 %." in text
    assert "Means are taken over severities (3), then over perturbations." in text


def test_an_error_of_part_1_that_is_zero_divides_nothing(tmp_path):
    two_parts(tmp_path, {"rotation": 0.9}, {"rotation": 1.0})
    found = lines_of(tmp_path)["corruption error (part1: 100)"]
    assert np.isnan([*found.values()]).all()


def test_severities_are_averaged_before_perturbations(tmp_path):
    levels = {"part1": (0.9, 0.6, 0.3), "part3": (0.8, 0.8, 0.5)}  # means 0.6 and 0.7
    for name, part, weights in (("part2", "part1", A), ("part3_robustness", "part3", B)):
        rotation = {("test", "rotation", severity): value
                    for severity, value in zip("135", levels[part], strict=True)}
        write(run_of(tmp_path, name, part, weights), rotation | perturbed(jpeg=0.4, scale=0.5))
    found = lines_of(tmp_path)
    assert found[comparison.ALL_PERTURBED] == pytest.approx({"part1": 0.5, "part3": 1.6 / 3})
    assert found["corruption error (part1: 100)"]["part3"] == pytest.approx(
        (0.3 / 0.4 + 0.6 / 0.6 + 0.5 / 0.5) / 3)


def append(run, *rows):
    path = run.path(".csv")
    storage.write_rows(path, [*storage.read_table(path), *rows])


def head_row(run, split, head, accuracy):
    return report.row(run, split, "clean", "", head, "accuracy", accuracy, N, (0, 1))


def test_calibration_is_averaged_over_severities_before_perturbations(tmp_path):
    """Rotation has 0.1, 0.2 and 0.3, grayscale 0.6: (0.2 + 0.6) / 2."""
    part1 = run_of(tmp_path, "part1", "part1")
    write(part1, {CLEAN: 0.7})
    append(part1, report.row(part1, "test", "clean", "", "own", "calibration_error", 0.02, N))
    run = run_of(tmp_path, "part2", "part1")
    write(run, {("test", "rotation", s): 0.5 for s in "123"}
          | {("test", "grayscale", ""): 0.5, ("test", "cifar10c fog", "3"): 0.5})
    append(run, *(report.row(run, "test", name, s, "own", "calibration_error", error, N)
                  for name, s, error in (("rotation", 1, 0.1), ("rotation", 2, 0.2),
                                         ("rotation", 3, 0.3), ("grayscale", "", 0.6),
                                         ("clean", "", 0.5),  # does not replace the part's own
                                         ("cifar10c fog", 3, 0.9))))  # which does not count
    part3 = run_of(tmp_path, "part3_robustness", "part3", B)
    write(part3, {("test", "rotation", s): 0.5 for s in "123"} | {("test", "grayscale", ""): 0.5,
                                                                  ("test", "jpeg", "3"): 0.5})
    append(part3, *(report.row(part3, "test", name, s, "own", "calibration_error", error, N)
                    for name, s, error in (("rotation", 1, 0.1), ("jpeg", 3, 0.8))))  # not of both
    text = text_of(tmp_path)
    assert "| calibration error, % | test set | mean over perturbations |" in text
    assert "| part3 (augmented) | - | 10.0 |" in text
    assert "| part1 (cross-entropy) | 2.0 | 40.0 |" in text


def test_every_head_stands_under_its_own_name(tmp_path):
    run = run_of(tmp_path, "part1", "part1")
    write(run, {CLEAN: 0.7, ("train", "clean", ""): 0.9})
    append(run, head_row(run, "test", "knn", 0.6), head_row(run, "test", "probe", 0.5))
    write(run_of(tmp_path, "part2", "part1"), {CLEAN: 0.5})  # does not replace the part's own
    text = text_of(tmp_path)
    assert "| accuracy, % | test, own | test, knn | test, probe |" in text
    assert "| part1 (cross-entropy) | 70.0 | 60.0 | 50.0 |" in text
    assert "| test set | 70.0 |" in text


def test_p_values_can_be_recomputed_from_the_npz_files_alone(tmp_path):
    ours = {"rotation": 0.55, "jpeg": 0.56, "scale": 0.501, "contrast": 0.6}
    two_parts(tmp_path, ours, {"rotation": 0.5, "jpeg": 0.52, "scale": 0.5, "contrast": 0.5}, 7)
    write(run_of(tmp_path, "part1", "part1", A), {CLEAN: 0.7, ("evaluation", "clean", ""): 0.6})
    write(run_of(tmp_path, "part3", "part3", B), {CLEAN: 0.71, ("evaluation", "clean", ""): 0.65})
    summary.compare(tmp_path)
    images = {}
    for name in ("part1", "part2", "part3", "part3_robustness"):
        with np.load(tmp_path / f"{name}_correct.npz") as file:
            weights = str(file["weights"])
            images |= {(weights, key): file[key] for key in file.files if "/" in key}
    p_values = {}
    for weights, key in images:
        if weights == B:
            ours, theirs = images[B, key], images[A, key]
            gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            p_values[key] = binomtest(gained, gained + lost).pvalue
    corrected = {}
    for clean in (True, False):  # counted apart
        mine = [key for key in sorted(p_values, key=p_values.get) if ("/clean/" in key) == clean]
        largest = 0.0
        for i, key in enumerate(mine):  # Holm, by its definition
            largest = max(largest, min(1, (len(mine) - i) * p_values[key]))
            corrected[key] = largest
    found = {f"{row['split']}/{row['condition']}/{row['severity']}": float(row["p_holm"])
             for row in read(tmp_path / "comparison.csv") if row["reference"] == "part1"}
    assert found == pytest.approx(corrected, rel=1e-5)
    assert "evaluation/clean/" in found and len(found) == 6
    assert len({value < 0.05 for value in found.values()}) == 2  # both verdicts occur


def test_means_are_over_conditions_that_all_models_have(tmp_path):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5, "jpeg": 0.9})
    assert lines_of(tmp_path)[comparison.ALL_PERTURBED] == pytest.approx(
        {"part1": 0.5, "part3": 0.6})
    text = text_of(tmp_path)
    assert "not every model was tested on them: 1 pairs of condition" in text
    assert "| **mean over perturbations (mPC)** | 50.0 | 60.0 |" in text


def test_every_reference_has_its_rows(tmp_path):
    for part, weights, accuracy in (("part1", A, 0.5), ("part3", B, 0.8),
                                    ("part3_crop_flip", C, 0.7), ("part4_augmented", "d" * 12, 0.7),
                                    ("part4_proxies", "e" * 12, 0.6), ("part4", "f" * 12, 0.6),
                                    ("part4_proxies_augmented", "0" * 12, 0.6)):
        write(run_of(tmp_path, part, part, weights), {CLEAN: accuracy})
    text = text_of(tmp_path)
    found = {(row["part"], row["reference"]): row for row in read(tmp_path / "comparison.csv")}
    assert set(found) == {("part1", ""), ("part3", "part1"), ("part3", "part3_crop_flip"),
                          ("part3_crop_flip", "part1"), ("part4_augmented", "part3"),
                          ("part4_proxies", "part1"), ("part4", "part1"),
                          ("part4_proxies_augmented", "part3")}
    assert found["part4_augmented", "part3"]["verdict"] == "worse"
    assert float(found["part3", "part3_crop_flip"]["difference"]) == pytest.approx(0.1)
    sentence = r"^- \*\*This network against (\w+) .*?:\*\* (\S+) points on clean test images, p"
    assert re.findall(sentence, text, re.M) == [
        ("part1", "+30.0"), ("part3_crop_flip", "+10.0"), ("part1", "+20.0"), ("part1", "+10.0"),
        ("part3", "-10.0"), ("part1", "+10.0"), ("part3", "-20.0")]
    claimed = r"^\| (\w+) .* than (\w+) .* clean test images \| (\S+) .* \*\*this network: (\w+)"
    said = re.findall(claimed, text, re.M)
    assert {(part, reference) for part, reference, _, _ in said} == set(found) - {("part1", "")}
    assert len(said) == 7
    assert ("part3", "part3_crop_flip", "+10.0", "supported") in said
    assert ("part4_augmented", "part3", "-10.0", "contradicted") in said


def test_rows_have_the_interval_of_their_own_accuracy(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65}, {"rotation": 0.5})
    row = verdicts_of(tmp_path)["rotation", "3"]
    expected = binomtest(650, N).proportion_ci(method="wilson")
    assert float(row["ci_low"]) == pytest.approx(expected.low, abs=1e-5)
    assert float(row["ci_high"]) == pytest.approx(expected.high, abs=1e-5)


def test_attacks_have_no_verdict_of_one_network_and_stand_with_their_n(tmp_path):
    two_parts(tmp_path, {"rotation": 0.5, "fgsm": 0.4}, {"rotation": 0.5, "fgsm": 0.1})
    found = verdicts_of(tmp_path)["fgsm", "8"]
    assert found["verdict"] == "not tested: an attack needs several trainings"
    assert found["p_holm"] == "" and float(found["difference"]) == pytest.approx(0.3)
    fewer = perturbed(rotation=0.5, fgsm=0.4)
    write(run_of(tmp_path, "part3_robustness", "part3", B), fewer, n=500)
    verdict = verdicts_of(tmp_path)["fgsm", "8"]["verdict"]
    assert verdict == "not tested: 500 images, part1 has 1000 others"
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "attacks not compared, since they are on other images: 500 images, part1 has" in text
    assert "| FGSM 8/255, n = 500 | - | 40.0 |" in text


def test_clean_accuracy_of_attacked_images_is_not_the_clean_accuracy(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"), {("test", "fgsm", "0"): 0.75}, n=100)
    found = lines_of(tmp_path)
    assert found["test set"]["part1"] == 0.7
    assert found["FGSM: the same 100 images, not attacked"]["part1"] == 0.75


def test_attacks_stand_where_they_are_swept_or_pgd_ran(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    tried = (("worst_case", "4"), ("random_sign", "4"), ("random_sign", "8"), ("pgd", "8"),
             ("random_l2", "64"), ("pgd_l2", "64"))
    write(run_of(tmp_path, "part2", "part1"), {("test", *each): 0.5 for each in tried})
    assert [title for title in lines_of(tmp_path) if "/255" in title] == [
        "PGD 8/255, n = 1,000", "PGD L2 64/255, n = 1,000", "random L2 64/255, n = 1,000",
        "random sign 8/255, n = 1,000", "worst of its own one-step attacks 4/255, n = 1,000"]


def test_jpeg_on_the_jpeg_copy_is_marked_and_no_held_out_perturbation(tmp_path):
    for dataset, expected in ((comparison.JPEG_COPY, 0.4), ("CIFAR-10", 0.65),
                              (f"{comparison.JPEG_COPY} (QUICK)", 0.4)):
        write(run_of(tmp_path, "part1", "part1", dataset=dataset), {CLEAN: 0.9})
        write(run_of(tmp_path, "part2", "part1", dataset=dataset),
              perturbed(jpeg=0.9, pixelate=0.4))
        assert lines_of(tmp_path)[comparison.HELD_OUT]["part1"] == pytest.approx(expected)
        text = text_of(tmp_path)
        marked = "| JPEG (blur; training images are JPEG) | 90.0 |" in text
        assert marked == (dataset != "CIFAR-10")
        assert ("JPEG is left out of the held-out mean" in text) == marked


def test_a_perturbation_that_is_newer_than_part_3_was_not_trained_on(tmp_path):
    two_parts(tmp_path, {"gaussian_noise": 0.65, "rotation": 0.5}, {"rotation": 0.4})
    with edited(tmp_path / "part3.json") as record:
        record["args"]["shares"] = {"rotation": 4}  # no noise was there then
    summary.compare(tmp_path)
    said = {row["condition"]: row["in_part3_training"] for row in read(tmp_path / "comparison.csv")}
    assert (said["gaussian_noise"], said["rotation"]) == ("no", "yes")


def test_seen_families_are_those_that_part_3_trained_on(tmp_path):
    two_parts(tmp_path, {"rotation": 0.6, "contrast": 0.5}, {"rotation": 0.5, "contrast": 0.5})
    write(run_of(tmp_path, "part3", "part3", B, families=["color"]), {CLEAN: 0.7})
    found = lines_of(tmp_path)
    assert found[comparison.SEEN]["part3"] == 0.5
    assert found[comparison.HELD_OUT]["part3"] == 0.6
    assert "part3 (augmented: color)" in text_of(tmp_path)


def test_crop_and_flip_train_on_what_they_do_whatever_the_families(tmp_path):
    made = {"horizontal_flip": 0.6, "translation": 0.8, "rotation": 0.5}
    two_parts(tmp_path, made, made)
    write(run_of(tmp_path, "part3", "part3", B, families=["noise"]), {CLEAN: 0.7})
    found = lines_of(tmp_path)
    assert found[comparison.SEEN]["part3"] == pytest.approx(0.7)
    assert found[comparison.HELD_OUT]["part3"] == 0.5


def test_the_generalization_gap_and_the_actual_share_are_said(tmp_path):
    write(run_of(tmp_path, "part1", "part1", train_fraction=0.05),
          {("train", "clean", ""): 1.0, CLEAN: 0.7})
    text = text_of(tmp_path)
    assert "generalize from 5 % of the training images?" in text
    assert "a generalization gap (training - test) of 30.0 points" in text
    assert "| generalization gap (training - test) | 30.0 |" in text
    assert "a generalization gap of 30.0 points | **this network: supported** |" in text
    assert "fifth" not in text


@pytest.mark.parametrize(("train", "test", "verdict"), [
    (0.78, 0.7, "supported"), (0.73, 0.7, "not resolved"), (0.67, 0.7, "not resolved"),
    (0.62, 0.7, "contradicted")])
def test_the_gap_is_claimed_where_the_intervals_do_not_meet(tmp_path, train, test, verdict):
    """Of 1,000 images: 70 % is 67.1 to 72.8, 73 % is 70.2 to 75.7."""
    write(run_of(tmp_path, "part1", "part1"), {("train", "clean", ""): train, CLEAN: test})
    [line] = [line for line in text_of(tmp_path).splitlines() if "on its training images" in line]
    assert f"| **this network: {verdict}** |" in line


def test_findings_give_every_number_to_its_own_images(tmp_path):
    write(run_of(tmp_path, "part1", "part1"),
          {("train", "clean", ""): 0.9, ("evaluation", "clean", ""): 0.6, CLEAN: 0.7})
    rows = storage.read_table(tmp_path / "part1.csv")
    rows[0]["n"] = 200
    storage.write_rows(tmp_path / "part1.csv", rows)
    write(run_of(tmp_path, "part2", "part1"),
          {("test", "fgsm", eps): value for eps, value in (("0", 0.7), ("2", 0.5), ("8", 0.2))})
    text = text_of(tmp_path)
    assert ("- **Clean:** 60.0 % (56.9 to 63.0, n = 1,000) of the evaluation images, 70.0 % (67.1 "
            "to 72.8, n = 1,000) of the test images, 90.0 % of its 200 training images, a "
            "generalization gap (training - test) of 20.0 points.\n") in text
    assert "- **Attacked** at 8/255: FGSM 20.0 % (17.6 to 22.6, n = 1,000)." in text
    write(run_of(tmp_path, "part2", "part1"),
          {("test", "fgsm", "64"): 0.2, ("test", "pgd", "128"): 0})
    assert "- **Attacked** at 128/255: PGD 0.0 % (0.0 to 0.4, n = 1,000)." in text_of(tmp_path)


def test_questions_and_commands_are_of_their_own_part(tmp_path):
    run = run_of(tmp_path, "part1", "part1", train_fraction=0.5, command="python one")
    write(run, {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1", command="python two"), perturbed(rotation=0.5))
    write(run_of(tmp_path, "part4", "part4", B, loss="cosface"), {CLEAN: 0.7})
    text = text_of(tmp_path)
    assert "generalize from 50 % of the training images?" in text
    assert "Does the CosFace loss do better than cross-entropy?" in text
    for line in ("- part1: `python one`; 6 epochs, seed 0,", "- part2: `python two`; 6 epochs,",
                 f"- part4: `python`; 6 epochs, seed 0, cpu, mixed precision off, weights {B}\n"):
        assert line in text


def test_findings_count_what_is_better_and_what_is_worse(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65, "scale": 0.65, "contrast": 0.65, "cutout": 0.65,
                         "jpeg": 0.45, "pixelate": 0.45, "brightness": 0.5},
              dict.fromkeys(("rotation", "scale", "contrast", "cutout", "jpeg", "pixelate",
                             "brightness"), 0.5))
    write(run_of(tmp_path, "part3", "part3", B), {CLEAN: 0.5})
    text = text_of(tmp_path)
    assert ("- **This network against part1 (cross-entropy):** -20.0 points on clean test images, "
            "p < 0.001: worse; of 7 perturbed conditions better in 4, worse in 2, no difference "
            "shown in 1.") in text


def test_the_figure_is_of_test_images_the_table_of_none_trained_on(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "comparison", lambda path, rows, names: shown.extend(rows))
    write(run_of(tmp_path, "part1", "part1"),
          {("train", "clean", ""): 0.9, ("evaluation", "clean", ""): 0.6, CLEAN: 0.7})
    tests = summary.compare(tmp_path)
    assert [(row["condition"], row["accuracy"]) for row in shown] == [("clean", 0.7)]
    assert [row["split"] for row in tests] == ["evaluation", "test"]


def test_severities_are_said_that_the_means_are_over(tmp_path):
    for name, part, weights, severities in (("part2", "part1", A, "123"),
                                            ("part3_robustness", "part3", B, "35")):
        write(run_of(tmp_path, name, part, weights),
              {("test", "rotation", severity): 0.5 for severity in severities})
    assert "Means are taken over severities (3), then over perturbations." in text_of(tmp_path)


def test_the_audits_that_pass_are_counted(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7},
          extra=[("audit: a", 1.0), ("audit: b", 0.0), ("audit: c", 1.0)])
    text = text_of(tmp_path)
    assert "2 of 3 checks passed.\n\n- **does not hold**: part1: b\n" in text
    assert "| 2 of 3 pass | **contradicted** |" in text


def test_every_differing_argument_is_named(tmp_path):
    write(run_of(tmp_path, "part1", "part1", A, weight_decay=0.002, data_dir="x", lr=1,
                 eps_255=[0, 8], amp="auto", margin=0.5), {CLEAN: 0.7})
    write(replace(run_of(tmp_path, "part3", "part3", B, seed=3, epochs=30, weight_decay=0.001,
                         families=["noise"], data_dir="y", lr=1.0, eps_255=[0.0, 8.0],
                         amp="bf16",
                         shares={"rotation": 4}),  # long, and of part 3 alone: not said
                  sizes={"training": 12}, amp="bf16", device_name="H100",
                  versions={"torch": "3", "commit": "abc", "optimizer": "SGD"}), {CLEAN: 0.9})
    found = re.search("Their trainings differ in (.*)$", text_of(tmp_path), re.M)[1]
    assert found == ("`--seed` (3; part1 0), `--split-seed` (3; part1 0), `--epochs` (30; part1 6),"
                     " `--weight-decay` (0.001; part1 0.002), training images (12; part1 unknown),"
                     " mixed precision (bf16; part1 off), optimizer (SGD; part1 unknown), device"
                     " (H100; part1 cpu), torch (3; part1 2), commit (abc; part1 unknown);"
                     " arguments that only one has: "
                     "`--families` noise, `--margin` 0.5 (part1).")


def test_claims_are_of_this_network_and_open_the_summary(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65, "jpeg": 0.45}, {"rotation": 0.5, "jpeg": 0.6})
    text = text_of(tmp_path)
    table = text.split("\n\n")[1].splitlines()
    assert table[0] == "| claim | evidence | verdict | file |"
    verdicts = {line.split(" | ")[0]: line.split(" | ")[2] for line in table[2:]}
    start = "| part3 (augmented) is more accurate than part1 (cross-entropy) "
    assert verdicts[start + "on clean test images"] == "**this network: not resolved**"
    assert verdicts[start + claims.CLAIMED[comparison.SEEN]] == "**this network: supported**"
    assert verdicts[start + claims.CLAIMED[comparison.HELD_OUT]] == "**this network: contradicted**"


def test_p_values_of_claims_are_corrected_over_the_two_means(tmp_path):
    two_parts(tmp_path, {"rotation": 0.505, "jpeg": 0.603}, {"rotation": 0.5, "jpeg": 0.6})
    for part, weights, accuracy in (("part1", A, 0.7), ("part3", B, 0.704)):
        write(run_of(tmp_path, part, part, weights),
              {("evaluation", "clean", ""): 0.6, CLEAN: accuracy})
    ours, theirs = (1.0 * (np.arange(N) < count)
                    for count in (np.array([[505], [603]]), np.array([[500], [600]])))
    seen, held_out = ttest_rel(ours, theirs, axis=1).pvalue
    assert seen < held_out
    text = text_of(tmp_path)
    assert ("+0.0 points on clean evaluation images, p = 1: no difference shown; +0.4 points on "
            "clean test images, p = 0.25: no difference shown; of 2 perturbed") in text
    lines = [line for line in text.splitlines() if "more accurate than part1" in line]
    for line, p_value in zip(lines, (2 * 2 * 0.5**4, 2 * seen, held_out), strict=True):
        assert f", p {claims.probability(p_value)} |" in line  # 4 images of McNemar's, two splits


@pytest.mark.parametrize(("p_value", "said"), [
    (0.00099, "< 0.001"), (0.001, "= 0.001"), (0.0049, "= 0.0049"), (0.24, "= 0.24")])
def test_p_values_in_words(p_value, said):
    assert claims.probability(p_value) == said


def test_interval_of_a_claim_against_the_formula_for_paired_proportions(tmp_path):
    two_parts(tmp_path, {"rotation": 0.65}, {"rotation": 0.5})  # 150 images gained, none lost
    half = 1.96 * np.sqrt(0.15 - 0.15**2) / np.sqrt(N)
    assert (f"+15.0 points ({100 * (0.15 - half):+.1f} to {100 * (0.15 + half):+.1f}), "
            "n = 1,000 images") in text_of(tmp_path)


def test_attacks_are_claimed_against_the_largest_class(tmp_path):
    run = run_of(tmp_path, "part1", "part1")
    write(run, {CLEAN: 0.7}, extra=[("accuracy of cat", 0.9), ("accuracy of dog", 0.2)])
    rows = storage.read_table(tmp_path / "part1.csv")
    rows[-1]["n"] = 250  # dogs, and 1,000 cats
    rows += [row | {"split": "evaluation", "n": 4000} for row in rows[-2:]]  # these do not count
    storage.write_rows(tmp_path / "part1.csv", rows)
    write(run_of(tmp_path, "part2", "part1"), perturbed(worst_case=0.7))
    line = next(line for line in text_of(tmp_path).splitlines() if "is not robust to" in line)
    assert "less accurate than always naming the largest class (80.0 %)" in line
    assert "**this network: supported**" in line


def test_attacks_are_claimed_against_guessing(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    for accuracy, expected in ((0.4, "supported"), (0.6, "contradicted"), (0.48, "not resolved"),
                               (0.52, "not resolved")):  # their intervals reach 50 %
        write(run_of(tmp_path, "part2", "part1"), perturbed(fgsm=0.7, worst_case=accuracy))
        line = next(line for line in text_of(tmp_path).splitlines() if "is not robust to" in line)
        assert "guessing (50.0 %) at 8/255 (worst of its own one-step attacks)" in line
        assert f"**this network: {expected}**" in line
    write(run_of(tmp_path, "part2", "part1"), perturbed(worst_case=0.6, worst_case_audit=0.4))
    line = next(line for line in text_of(tmp_path).splitlines() if "is not robust to" in line)
    assert "at 8/255 (worst of its own attacks)" in line  # with PGD, the strongest
    assert "**this network: supported**" in line
    write(run_of(tmp_path, "part2", "part1"), perturbed(fgsm=0.6, pgd=0.4))
    assert "guessing (50.0 %) at 8/255 (PGD) | 40.0 % (" in text_of(tmp_path)
    write(run_of(tmp_path, "part2", "part1"),
          {("test", "fgsm", "2"): 0.6, ("test", "fgsm", "16"): 0.1})
    largest = "guessing (50.0 %) at 16/255 (FGSM) | 10.0 % (8.3 to 12.0, n = 1,000)"
    assert f"{largest} | **this network: supported**" in text_of(tmp_path)


# ---- one training: rows of other weights --------------------------------------------------------


def test_part_2_of_other_weights_is_left_out_and_said(tmp_path, capsys):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5})
    write(run_of(tmp_path, "part2", "part1", C, seed=1), perturbed(rotation=0.99, fgsm=0.99))
    text = text_of(tmp_path)
    assert f"- part2.csv: of weights {C}, but part1.csv is of {A}" in text
    assert f"- part2_correct.npz: of weights {C}" in text
    assert "99.0" not in text
    verdict = verdicts_of(tmp_path)["rotation", "3"]["verdict"]
    assert verdict == "not tested: part1 has no such figure"
    assert f"Left out of the comparison: part2.csv: of weights {C}" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["part1", "part3"])
def test_a_kill_between_checkpoint_and_table_mixes_nothing(tmp_path, part):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5})
    table = (tmp_path / f"{part}.csv").read_bytes()
    write(run_of(tmp_path, part, part, C, epochs=99, command="python new.py"), {CLEAN: 0.234})
    (tmp_path / f"{part}.csv").write_bytes(table)  # record and images are of the new weights
    text = text_of(tmp_path)
    old = A if part == "part1" else B
    for file in (f"{part}_correct.npz", f"{part}.json"):
        assert f"- {file}: of weights {C}, but {part}.csv is of {old}" in text
    assert "new.py" not in text and "23.4" not in text
    found = verdicts_of(tmp_path)
    assert found["clean", ""]["verdict"] == (
        "not tested: which images are right is not known for both")
    assert found["rotation", "3"]["verdict"] == "better"  # part 2's files are of the old weights


def test_without_a_parts_own_table_part_2s_decides(tmp_path):
    write(run_of(tmp_path, "part3_robustness", "part3", B), perturbed(rotation=0.6))
    study = comparison.read_study(tmp_path)
    assert study.parts["part3"].weights == B
    write(run_of(tmp_path, "part3", "part3", C), {CLEAN: 0.7})
    (tmp_path / "part3.csv").unlink()
    text = text_of(tmp_path)
    assert f"part3.json: of weights {C}, but part3_robustness.csv is of {B}" in text


def test_a_table_of_two_weights_gives_those_of_its_first_row(tmp_path):
    write(run_of(tmp_path, "part1", "part1", A), {CLEAN: 0.7})
    rows = storage.read_table(tmp_path / "part1.csv")
    other = rows[0] | {"weights": C, "condition": "rotation", "severity": "3", "value": 0.123,
                       "ci_low": 0.1, "ci_high": 0.2}
    storage.write_rows(tmp_path / "part1.csv", [*rows, other])
    text = text_of(tmp_path)
    assert f"part1.csv: of weights {C}" in text and "12.3" not in text


def test_rows_of_another_part_in_a_file_are_left_out(tmp_path):
    write(run_of(tmp_path, "part1", "part1", A), {CLEAN: 0.7})
    write(run_of(tmp_path, "part3", "part4", C), {CLEAN: 0.99})
    text = text_of(tmp_path)
    assert "- part3.csv: rows of part4, expected part3" in text
    assert "99.0" not in text
    (tmp_path / "part1.csv").unlink()
    with pytest.raises(UsageError, match="rows of part4, expected part3"):
        summary.compare(tmp_path)


@pytest.mark.parametrize(("made_on", "kept"), [(A, True), ("none", True), (C, False),
                                               ("that no file names", False)])
def test_adversarial_images_of_another_part_1_do_not_count(tmp_path, made_on, kept):
    write(run_of(tmp_path, "part1", "part1", A), {CLEAN: 0.7})
    write(run_of(tmp_path, "part3", "part3", B), {CLEAN: 0.7})
    write(run_of(tmp_path, "part3_robustness", "part3", B),
          perturbed(fgsm=0.4, pgd=0.3, fgsm_from_part1=0.33, worst_case=0.22), part1=made_on,
          extra=[("audit: fgsm_from_part1 8/255 is not stronger than fgsm", 0.0),
                 ("audit: |delta| is at most eps", 1.0)])
    if made_on.startswith("that"):
        (tmp_path / "part3_robustness_correct.npz").unlink()
    text = text_of(tmp_path)
    assert ("33.0" in text) == ("1 of 2 pass" in text) == kept
    assert ("1 of 1 pass" in text) != kept
    assert "| FGSM 8/255, n = 1,000 | - | 40.0 |" in text
    assert "22.0" in text  # the worst of the attacks on the model itself
    assert (f"made on weights {made_on}, but the part 1 here is of {A}" in text) != kept


@pytest.mark.parametrize(("right", "n"), [(601, N), (300, N // 2)])  # 0.6 of others
def test_images_that_do_not_give_the_tables_accuracy_are_no_evidence(tmp_path, right, n):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5})
    run = run_of(tmp_path, "part3_robustness", "part3", B)
    images = {"test/rotation/3": np.arange(n) < right}
    storage.write_correct(run.path("_correct.npz"), run, images, A)
    assert "not known" in verdicts_of(tmp_path)["rotation", "3"]["verdict"]


def test_images_of_another_run_are_no_evidence_where_they_happen_to_give_the_accuracy(tmp_path):
    both = {"rotation": 0.6, "jpeg": 0.5}, {"rotation": 0.5, "jpeg": 0.4}
    two_parts(tmp_path, *both)
    assert verdicts_of(tmp_path)["rotation", "3"]["verdict"] == "better"
    run = run_of(tmp_path, "part3_robustness", "part3", B)
    images = {"test/rotation/3": np.arange(N) >= N - 600,  # 600, but of others
              "test/jpeg/3": np.arange(N) < 501}
    storage.write_correct(run.path("_correct.npz"), run, images, A, {"test/rotation/3": "x"})
    part = comparison.read_study(tmp_path).parts["part3"]
    assert not part.pixels and "test/rotation/3" not in part.correct
    assert "not known" in verdicts_of(tmp_path)["rotation", "3"]["verdict"]
    assert verdicts_of(tmp_path)["clean", ""]["verdict"] == "no difference shown"  # its own file
    assert ("- part3_robustness_correct.npz: of another run than part3_robustness.csv, since it "
            "gives another accuracy (test jpeg 3)") in text_of(tmp_path)


@pytest.mark.parametrize(("ours", "theirs", "verdict"), [
    ("x", "x", "better"), ("x", None, "better"), (None, "x", "better"),  # None: an older file
    ("x", "y", "not tested: their perturbed images differ")])
def test_images_of_other_pixels_are_not_paired(tmp_path, ours, theirs, verdict):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5})
    for name, part, weights, pixels in (("part3_robustness", "part3", B, ours),
                                        ("part2", "part1", A, theirs)):
        run = run_of(tmp_path, name, part, weights)
        images = storage.read_correct(tmp_path, name).images
        storage.write_correct(run.path("_correct.npz"), run, images, "none",
                             {"test/rotation/3": pixels} if pixels else {})
    assert verdicts_of(tmp_path)["rotation", "3"]["verdict"] == verdict
    [line] = [line for line in text_of(tmp_path).splitlines()
              if claims.CLAIMED[comparison.SEEN] in line] or [""]
    assert ("supported" in line) == (verdict == "better")


def test_one_image_of_many_too_many_is_no_evidence(tmp_path):
    n = 200_000
    for name, weights, accuracy in (("part1", A, 0.7), ("part3", B, 0.71)):
        write(run_of(tmp_path, name, name, weights), {CLEAN: accuracy}, n=n)
    assert verdicts_of(tmp_path)["clean", ""]["verdict"] == "better"
    run = run_of(tmp_path, "part3", "part3", B)
    storage.write_correct(run.path("_correct.npz"), run, {"test/clean/": np.arange(n) < 142_001})
    assert "not known" in verdicts_of(tmp_path)["clean", ""]["verdict"]


def test_a_parts_own_images_count_before_part_2s(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"), {CLEAN: 0.7} | perturbed(rotation=0.5), order=9)
    right = comparison.read_study(tmp_path).parts["part1"].correct
    assert np.array_equal(right["test/clean/"], np.arange(N) < 700)
    assert not np.array_equal(right["test/rotation/3"], np.arange(N) < 500)


@pytest.mark.parametrize(("accuracy", "verdict"), [
    (0.7, "no difference shown"),
    (0.701, "not tested: which images are right is not known for both")])  # by other batches
def test_part_2s_images_count_for_a_parts_own_table_if_they_give_it(tmp_path, accuracy, verdict):
    two_parts(tmp_path, {"rotation": 0.6}, {"rotation": 0.5})
    write(run_of(tmp_path, "part2", "part1"), {CLEAN: accuracy} | perturbed(rotation=0.5))
    (tmp_path / "part1_correct.npz").unlink()
    assert verdicts_of(tmp_path)["clean", ""]["verdict"] == verdict


def test_different_splits_and_data_sets_are_never_mixed(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.5})
    for odd in ({"split_hash": "6" * 12}, {"dataset": "another"}):
        write(run_of(tmp_path, "part3", "part3", B, **odd), {CLEAN: 0.8})
        with pytest.raises(UsageError, match="2 data sets or splits"):
            summary.compare(tmp_path)


def test_missing_parts_are_named_and_part_2_only_if_it_is_missing(tmp_path):
    write(run_of(tmp_path, "part3", "part3", B), {CLEAN: 0.8})
    assert "Missing: part1, part4, part2 (no robustness table of any part)." in text_of(tmp_path)
    write(run_of(tmp_path, "part3_robustness", "part3", B), perturbed(rotation=0.5))
    assert "Missing: part1, part4. Variants" in text_of(tmp_path)
    write(run_of(tmp_path, "part1", "part1", A), {CLEAN: 0.8})
    assert "Missing: part4, part2 on part1 (part2.csv). Variants" in text_of(tmp_path)


# ---- odd files and odd text ---------------------------------------------------------------------


DAMAGE = [("part1.csv", b"a,b\n1,2\n"), ("part1.csv", b"\xff\xfe\x00"), ("part1.json", b"{}"),
          ("part1.json", b"[1"), ("part1_correct.npz", b"PK\x03\x04 no"), ("part2.csv", b"")]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, name, content):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}: not .*; move it away") as found:
        summary.compare(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("column", "value"), [("ci_low", ""), ("n", "x"), ("severity", "nan"),
                                               ("condition", ""), ("head", "?"), ("split", "x")])
def test_an_odd_cell_is_one_sentence_or_harmless(tmp_path, column, value):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"), perturbed(rotation=0.5, fgsm=0.4))
    rows = storage.read_table(tmp_path / "part2.csv")
    for row in rows:
        row[column] = value
    storage.write_rows(tmp_path / "part2.csv", rows)
    try:
        summary.compare(tmp_path)
    except UsageError as error:
        assert "part2.csv: not a table" in str(error)


def test_an_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="holds no results"):
        summary.compare(tmp_path)


class Cells(html.parser.HTMLParser):
    """The texts of a page's table cells, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.cells = []
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.mark.parametrize("odd", ["a|b<script>", "`x`|*y*", "<b>&amp;\n# z", "$5_$10 [c](d) ~~e~~"])
def test_text_of_the_user_breaks_out_of_no_table_and_no_page(tmp_path, odd):
    name = odd.replace("\n", " ")
    write(run_of(tmp_path, "part1", "part1", dataset=f"folder {name}", command=f"python x '{odd}'"),
          {CLEAN: 0.7}, extra=[(f"audit: {name}", 0.0)])
    write(run_of(tmp_path, "part2", "part1", dataset=f"folder {name}"),
          {("test", f"cifar10c {name}", "3"): 0.5})
    summary.compare(tmp_path)
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    found = Cells(page)
    assert f"cifar10c {name.replace('_', ' ')} (CIFAR-10-C)" in map(str.strip, found.cells)
    assert not {"script", "b", "em", "del"} & set(found.tags)
    assert not re.search('href="(?!#)', page)
    assert f"<title>Results on folder {html.escape(name)}</title>" in page
    for line in (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| cifar10c"):
            assert line.count("|") == 3


def test_every_character_that_some_markup_takes_is_escaped():
    for c in "\\`*<>&|[]#~!$_":
        assert pages.escape(c) == f"&#{ord(c)};"
    assert pages.escape("a_b\nc\td\re") == "a_b c d e"
    for odd in ("a|b", "a`b", "a\nb", "a\rb"):
        assert pages.code(odd) == f"<code>{pages.escape(odd)}</code>"
    assert pages.bullets(["*a*"]) == "- &#42;a&#42;"


def test_surrogates_of_a_record_do_not_cost_the_summary(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    with edited(tmp_path / "part1.json") as record:
        record["command"] = "python \ud800"
        record["args"] = {"loss": ["?"], "families": 3, "x": "\ud800"}
    assert "part1 (cross-entropy)" in text_of(tmp_path)


def test_the_page_needs_no_other_file_and_leaves_out_missing_figures(tmp_path):
    (tmp_path / "there.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder.png").mkdir()
    text = ("# A & B\n\n| a |\n| --- |\n| n = 1, p < 0.1 |\n\n## C & D\n\n![there](there.png)\n\n"
            "![gone](gone.png)\n\n![gone](folder.png)\n")
    pages.write(tmp_path / "page.html", text)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall('src="([^"]*)"', page) == ["data:image/png;base64,iVBORw=="]
    assert "gone" not in page and "<title>A &amp; B</title>" in page
    assert '<html lang="en">' in page and 'name="viewport"' in page
    assert '<div class="table"><table>' in page
    assert "n&nbsp;=&nbsp;1, p&nbsp;&lt;&nbsp;0.1" in page
    (link,) = re.findall('<nav>.*href="#([^"]*)">C &amp; D</a>.*</nav>', page, re.DOTALL)
    assert f'<h2 id="{link}">' in page
    assert not re.search(r'(href|src)="(?!data:|#)', page)


def test_without_markdown_only_the_page_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "markdown", None)
    (tmp_path / "summary.html").write_text("of former results", encoding="utf-8")
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    summary.compare(tmp_path)
    assert (tmp_path / "summary.md").exists() and not (tmp_path / "summary.html").exists()
    assert "summary.html: no page (ModuleNotFoundError" in capsys.readouterr().out


# ---- several trainings --------------------------------------------------------------------------


def training(parent, seed, part1, part3=None, **args):
    """A results directory of one training: parts from {(split, condition, severity): accuracy}."""
    folder = parent / f"seed{seed}"
    for name, values, letter in (("part1", part1, "1"), ("part3", part3, "3")):
        if values:
            own = {key: value for key, value in values.items() if key[1] == "clean"}
            rest = {key: value for key, value in values.items() if key[1] != "clean"}
            weights = f"{seed:011x}{letter}"
            common_to_both = (name, weights, seed, f"{seed:012x}")
            write(run_of(folder, name, *common_to_both, **args), own)
            if rest:
                write(run_of(folder, storage.robustness_name(name), *common_to_both), rest)
    return folder


def trainings_text(folders):
    trainings.compare_trainings(folders)
    return (folders[0].parent / "trainings.md").read_text(encoding="utf-8")


def method(parent, folders):
    """{(line, part): row of trainings.csv}."""
    trainings.compare_trainings(folders)
    return {(row["line"], row["part"]): row for row in read(parent / "trainings.csv")}


def test_mean_and_deviation_over_trainings_of_different_splits(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: accuracy})
               for seed, accuracy in enumerate((0.70, 0.72, 0.74))]
    write(run_of(folders[2], "part3", "part4", C, 2, f"{2:012x}"), {CLEAN: 0.99})
    row = method(tmp_path, folders)["test set", "part1"]
    assert (float(row["mean"]), float(row["sd"]), row["n"]) == pytest.approx((0.72, 0.02, "3"))
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "| test set | 72.0 ± 2.0 |" in text
    assert "part1 (cross-entropy), n = 3" in text
    assert f"- {folders[2].as_posix()}: part3.csv: rows of part4, expected part3\n" in text
    assert (tmp_path / "trainings.html").exists()


def test_the_same_head_on_both_parts_by_a_hand_calculation(tmp_path):
    folders = []
    for seed, gain in enumerate((0.01, 0.03)):
        folder = training(tmp_path, seed, {CLEAN: 0.7}, {CLEAN: 0.8})
        for name, knn in (("part1", 0.6), ("part3", 0.6 + gain)):
            run = run_of(folder, name, name, f"{seed:011x}{name[-1]}", seed, f"{seed:012x}")
            append(run, head_row(run, "test", "knn", knn), head_row(run, "evaluation", "knn", 0.5))
            again = run_of(folder, storage.robustness_name(name), name, run.weights, seed,
                           run.split_hash)
            write(again, {CLEAN: 0.5})  # part 2's figure, after the part's own
        folders.append(folder)
    append(run, head_row(run, "test", "probe", 0.9))  # of one training alone
    text = trainings_text(folders)
    table = text[text.index("## Loss or head?") : text.index("## What ran")]
    assert "| accuracy on the test set, % | own | knn | probe |" in table
    assert "| part1 (cross-entropy) | 70.0 ± 0.0 | 60.0 ± 0.0 | - |" in table
    assert "| part3 (augmented) | 80.0 ± 0.0 | 62.0 ± 1.4 | 90.0 (n = 1) |" in table
    # 2 ± 12.706 (t of one degree of freedom) × 1.414 / √2 points
    assert ("| part3 (augmented) against part1 | +10.0 points (no interval) | "
            "+2.0 points (-10.7 to +14.7) | - |") in table


def test_without_a_spread_no_test_and_no_p_are_claimed(tmp_path):
    both = training(tmp_path, 1, {CLEAN: 0.7}, {CLEAN: 0.8})
    text = trainings_text([both, training(tmp_path, 2, {CLEAN: 0.7})])
    assert "| +10.0 points (no interval), n = 1 training, no test |" in text
    assert "| test set | +10.0 | - | 1 | - | not resolved with 1 training |" in text
    assert "p = 1" not in text


def test_the_interval_of_a_true_difference_is_that_of_a_hand_calculation(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):  # mean 2 points, standard deviation 0.4
        folders.append(training(tmp_path, seed, {CLEAN: 0.7}, {CLEAN: 0.7 + gain}))
    row = method(tmp_path, folders)["test set", "part3"]
    half = 4.302653 * 0.004 / 3**0.5  # t of 0.975 with 2 degrees of freedom: 4.302653
    assert float(row["difference"]) == pytest.approx(0.02, abs=1e-6)
    assert float(row["ci_low"]) == pytest.approx(0.02 - half, abs=1e-6)
    assert float(row["ci_high"]) == pytest.approx(0.02 + half, abs=1e-6)
    t = 0.02 / (0.004 / 3**0.5)
    assert float(row["p_holm"]) == pytest.approx(1 - t / (2 + t * t) ** 0.5, rel=1e-4)  # 2 d.f.
    assert row["verdict"] == "better"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "| test set | +2.0 | +1.0 to +3.0 | 3 | 0.013 | better |" in text
    assert ("| part3 (augmented) is more accurate than part1 (cross-entropy) on clean test images "
            "| +2.0 points (+1.0 to +3.0), n = 3 trainings, p = 0.013 | **supported** |") in text


def test_holm_takes_the_verdict_that_one_interval_alone_would_give(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):
        noise = 0.01 * (-1) ** seed
        rest = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, contrast=0.5)
        more = {key: value + noise for key, value in rest.items()}
        more |= perturbed(rotation=0.5 + gain)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | rest, {CLEAN: 0.7 + gain} | more))
    rows = method(tmp_path, folders)
    row = rows["rotation (geometry)", "part3"]
    assert float(row["ci_low"]) > 0
    assert float(row["p_holm"]) > 0.05
    assert row["verdict"] == "not resolved with 3 trainings"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    said = claims.probability(float(row["p_holm"])).removeprefix("= ")
    assert f"| +2.0 | +1.0 to +3.0 | 3 | {said} | not resolved with 3 trainings |" in text
    seen = rows[comparison.SEEN, "part3"]
    [line] = [line for line in text.splitlines() if claims.CLAIMED[comparison.SEEN] in line]
    assert f", p {claims.probability(float(seen['p_holm']))} | **not resolved with" in line
    clean = rows["test set", "part3"]  # the same gain, not among the perturbations
    alone = metrics.paired_difference([0.716, 0.720, 0.724], [0.7, 0.7, 0.7])
    assert float(clean["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)
    assert clean["verdict"] == "better"


def test_what_perturbations_cost_is_one_quantity_for_one_and_for_several_trainings(tmp_path):
    """The accuracy on clean images without mPC, which has JPEG in it on the JPEG copy, too."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        names = (f"{seed:011x}1", seed, f"{seed:012x}")
        write(run_of(folder, "part1", "part1", *names, dataset=comparison.JPEG_COPY), {CLEAN: 0.9})
        write(run_of(folder, "part2", "part1", *names, dataset=comparison.JPEG_COPY),
              perturbed(jpeg=0.8, rotation=0.6, pixelate=0.4))
        folders.append(folder)
        assert "accuracy | +30.0 points" in text_of(folder)  # 0.9 - (0.8 + 0.6 + 0.4) / 3
    text = trainings_text(folders)
    assert re.search(r"Perturbations cost part1 \(cross-entropy\) accuracy \| \+30\.0 points", text)


def test_what_perturbations_cost_counts_every_perturbation_once(tmp_path):
    """Rotation has three severities, grayscale none: 0.9 - ((0.8 + 0.7 + 0.6) / 3 + 0.3) / 2."""
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.9})
    rotations = {("test", "rotation", s): 0.9 - int(s) / 10 for s in "123"}
    run = run_of(tmp_path, "part2", "part1")
    write(run, rotations | {("test", "grayscale", ""): 0.3})
    assert "accuracy | +40.0 points" in text_of(tmp_path)
    images = storage.read_correct(tmp_path, "part2").images
    del images["test/rotation/2"]
    storage.write_correct(run.path("_correct.npz"), run, images)
    assert "Perturbations cost" not in text_of(tmp_path)  # of which images is not known for all


@pytest.mark.parametrize(("rotation", "verdict"), [
    (0.6, "supported"), (0.699, "not resolved"), (0.8, "contradicted")])
def test_a_cost_of_perturbations_is_claimed_where_it_is_shown(tmp_path, rotation, verdict):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"), perturbed(rotation=rotation))
    [line] = [line for line in text_of(tmp_path).splitlines() if "Perturbations cost" in line]
    assert f"| **this network: {verdict}** |" in line


@pytest.mark.parametrize(("gaps", "losses", "verdict"), [
    ((0.04, 0.05, 0.06), (0.1, 0.11, 0.12), "supported"),  # the next: uncorrected p 0.049, 0.037
    ((0.03, 0.05, 0.07), (0.076, 0.11, 0.144), "not resolved with 3 trainings")])
def test_what_several_trainings_say_of_part_1_alone(tmp_path, gaps, losses, verdict):
    costs = {"training images": gaps, "Perturbations": losses}
    folders = [training(tmp_path, seed, {("train", "clean", ""): 0.7 + gap, CLEAN: 0.7}
                        | perturbed(rotation=0.7 - loss))
               for seed, (gap, loss) in enumerate(zip(*costs.values(), strict=True))]
    text = trainings_text(folders)
    gap, loss = (ttest_rel(values, (0, 0, 0)).pvalue for values in costs.values())
    assert loss < gap  # so that Holm doubles it
    for what, mean, p_value in (("training images", "+5.0", max(gap, 2 * loss)),
                                ("Perturbations", "+11.0", 2 * loss)):
        [line] = [line for line in text.splitlines() if what in line and "n = 3 trainings" in line]
        assert f"| {mean} points" in line and f"p {claims.probability(p_value)} " in line
        assert f"| **{verdict}** |" in line


def test_only_what_compares_is_tested_and_corrected_for(tmp_path):
    folders = []
    for seed, gain in enumerate((0.016, 0.020, 0.024)):
        one = {("train", "clean", ""): 0.9, CLEAN: 0.7, ("test", "fgsm", "0"): 0.7}
        one |= perturbed(rotation=0.5)
        folders.append(training(tmp_path, seed, one, {key: v + gain for key, v in one.items()}))
    rows = method(tmp_path, folders)
    tested = {key for key, row in rows.items() if row["reference"]}
    assert tested == {(line, "part3") for line in (
        "test set", "rotation (geometry)", comparison.SEEN, comparison.ALL_PERTURBED)}
    alone = metrics.paired_difference([0.716, 0.720, 0.724], [0.7, 0.7, 0.7])
    assert float(rows["test set", "part3"]["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)


def test_attacks_are_corrected_apart_from_perturbations(tmp_path):
    folders = []
    for seed, gain in enumerate((0.196, 0.200, 0.204)):
        one = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, fgsm=0.1)
        other = perturbed(rotation=0.5, jpeg=0.5, scale=0.5, fgsm=0.1 + gain)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | one, {CLEAN: 0.7} | other))
    row = method(tmp_path, folders)["FGSM 8/255, n = 1,000", "part3"]
    alone = metrics.paired_difference([0.296, 0.3, 0.304], [0.1, 0.1, 0.1])
    assert float(row["p_holm"]) == pytest.approx(alone.p_value, rel=1e-4)
    assert row["verdict"] == "better"
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "than part1 (cross-entropy) under FGSM 8/255, n = 1,000 | +20.0 points" in text


@pytest.mark.parametrize(("again", "verdict"), [
    (0.3, "supported"), (0.6, "not resolved"), (None, "this network: supported")])
def test_a_verdict_on_attacks_stands_if_every_training_gives_it(tmp_path, again, verdict):
    folders = []
    for seed, accuracy in enumerate((0.4, again)):
        attacked = {} if accuracy is None else perturbed(worst_case=accuracy)
        folders.append(training(tmp_path, seed, {CLEAN: 0.7} | attacked))
        if attacked:
            run = run_of(folders[-1], "part2", "part1", f"{seed:011x}1", seed, f"{seed:012x}")
            append(run, report.row(run, "test", "fgsm", "", "own", "audit: a", 1.0 - seed, N))
    text = trainings_text(folders)
    [line] = [line for line in text.splitlines() if "is not robust to" in line]
    assert f"| **{verdict}** |" in line
    assert line.count(" % (") == (1 if again is None else 2)  # of each training
    audited = "1 of 1 pass | **supported**" if again is None else "1 of 2 pass | **contradicted**"
    assert audited in text


def test_parts_that_not_all_folders_have_stand_with_their_n(tmp_path):
    folders = [training(tmp_path, 1, {CLEAN: 0.7}, {CLEAN: 0.8}),
               training(tmp_path, 2, {CLEAN: 0.71}, {CLEAN: 0.83}),
               training(tmp_path, 3, {CLEAN: 0.72}), training(tmp_path, 4, {}, {CLEAN: 0.9}),
               training(tmp_path, 5, {}, {CLEAN: 0.9})]
    row = method(tmp_path, folders)["test set", "part3"]
    assert (row["n"], row["pairs"]) == ("4", "2")
    assert float(row["difference"]) == pytest.approx(0.11)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "part1 (cross-entropy), n = 3 | part3 (augmented), n = 4 |" in text
    assert ", n = 2 trainings, p = 0.058 | **not resolved with 2 trainings** |" in text


def test_every_pair_of_several_trainings_has_its_own_table(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}, {CLEAN: 0.8}) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write(run_of(folder, "part3_crop_flip", "part3_crop_flip", f"{seed:011x}c", seed,
                     f"{seed:012x}"), {CLEAN: 0.7})
    table = r"^## (\w+) .* against (\w+) .*\n\n.*\n.*\n\| test set \| (\S+) .*\n\n"
    assert re.findall(table, trainings_text(folders), re.M) == [
        ("part3", "part1", "+30.0"), ("part3", "part3_crop_flip", "+10.0"),
        ("part3_crop_flip", "part1", "+20.0")]


def test_means_over_trainings_are_over_conditions_that_all_have(tmp_path):
    folders = [training(tmp_path, 1, {CLEAN: 0.7} | perturbed(rotation=0.6)),
               training(tmp_path, 2, {CLEAN: 0.7} | perturbed(rotation=0.5, jpeg=0.9))]
    row = method(tmp_path, folders)[comparison.ALL_PERTURBED, "part1"]
    assert float(row["mean"]) == pytest.approx(0.55)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "Left out, as not every model was tested on them: 1 pairs" in text


@pytest.mark.parametrize(("name", "flag"), [("epochs", "--epochs"), ("batch_size", "--batch-size"),
                                            ("lr", "--lr"), ("train_fraction", "--train-fraction")])
def test_trainings_that_differ_in_an_argument_are_refused(tmp_path, name, flag):
    folders = [training(tmp_path, 0, {CLEAN: 1.0}, **{name: 1}),
               training(tmp_path, 1, {CLEAN: 0.5}, **{name: 6})]
    with pytest.raises(UsageError, match=f"part1 has {flag} 1 in .*seed0 and 6 in .*seed1"):
        trainings.compare_trainings(folders)


def test_other_code_precision_and_device_are_told(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5 + seed / 10} | perturbed(rotation=0.5),
                        {CLEAN: 0.6}) for seed in (0, 1, 2)]
    text = trainings_text(folders)
    assert text.count("mixed precision off; device cpu; torch 2") == 3
    assert "Not all of these" not in text
    usual = {"amp": "off", "device": "cpu", "versions": {"torch": "2"}}
    for file, change, said in (("part1", {"amp": "bf16"}, "mixed precision"),
                               ("part1", {"amp": ["?"]}, "mixed precision"),
                               ("part1", {"device": "NVIDIA H100"}, "device"),
                               ("part2", {"device": "NVIDIA H100"}, "device"),
                               ("part1", usual | {"versions": {"commit": "a", "torch": "2"}},
                                "commit")):
        for name, folder in itertools.product(("part1", "part2"), folders):  # all are alike
            with edited(folder / f"{name}.json") as record:
                record |= usual | (change if name == file else {})
        text = trainings_text(folders)
        assert f"- **Not all of these have the same {said}.**" in text


def test_families_are_those_of_the_part_3_that_some_folder_has(tmp_path):
    tested = {CLEAN: 0.7} | perturbed(rotation=0.8, gaussian_noise=0.2)
    folders = [training(tmp_path, seed, tested) for seed in (0, 1, 2)]
    write(run_of(folders[2], "part3", "part3", B, 2, f"{2:012x}", families=["noise"]), {CLEAN: 0.7})
    rows = method(tmp_path, folders)
    assert float(rows[comparison.SEEN, "part1"]["mean"]) == pytest.approx(0.2)
    assert float(rows[comparison.HELD_OUT, "part1"]["mean"]) == pytest.approx(0.8)
    text = (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert "Families that part 3 trains on: noise; held out: blur, color, geometry." in text


def test_other_data_of_the_same_name_are_refused(tmp_path):
    for key, other, match in (("classes", ["cow", "dog"], r"seed0 has the classes \['cat'"),
                              ("sizes", {"test": 60}, "seed0 has the numbers of images .* 60")):
        folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1)]
        with edited(folders[1] / "part1.json") as record:
            record[key] = other
        with pytest.raises(UsageError, match=match):
            trainings.compare_trainings(folders)


def test_part_2_is_compared_where_the_first_folder_has_none(tmp_path):
    folders = [training(tmp_path, 0, {CLEAN: 0.5})]
    folders += [training(tmp_path, seed, {CLEAN: 0.5} | perturbed(rotation=0.5)) for seed in (1, 2)]
    write(run_of(folders[2], "part2", "part1", f"{2:011x}1", 2, f"{2:012x}", targeted=True),
          perturbed(rotation=0.5))
    with pytest.raises(UsageError, match="part2 has --targeted absent in .*seed1 and True in"):
        trainings.compare_trainings(folders)
    (folders[2] / "part2.json").unlink()
    with pytest.raises(UsageError, match="seed2/part2.json is missing"):
        trainings.compare_trainings(folders)


@pytest.mark.parametrize("condition", ["cifar10c fog", "rotation"])
@pytest.mark.parametrize("differing", ["part1", "part3", None])  # of one part, or of another one
def test_trainings_tested_on_other_pixels_are_refused(tmp_path, condition, differing):
    folders = []
    for seed in (0, 1):
        folders.append(training(tmp_path, seed, {CLEAN: 0.5}, {CLEAN: 0.6}))
        for name, part in (("part2", "part1"), ("part3_robustness", "part3")):
            run = run_of(folders[-1], name, part, f"{seed:011x}{part[-1]}", seed, f"{seed:012x}",
                         cifar10c=f"folder{seed}")
            pixels = "b" if (part, seed) == (differing, 1) else "a"
            write(run, {("test", condition, "3"): 0.3 + seed / 10},
                  pixels={f"test/{condition}/3": pixels})
    if differing is None:
        assert trainings.compare_trainings(folders)
        return
    with pytest.raises(UsageError, match=f"part1 in .*0 and .* images under {condition} 3,"):
        trainings.compare_trainings(folders)


def test_perturbations_that_not_all_have_are_told_with_no_mean_left(tmp_path):
    ours, theirs = {CLEAN: 0.7} | perturbed(rotation=0.5), {CLEAN: 0.7} | perturbed(cutout=0.5)
    folders = [training(tmp_path, 0, ours, theirs), training(tmp_path, 1, ours, theirs)]
    trainings.compare_trainings(folders)
    told = "Left out, as not every model was tested on them: 2 pairs of condition and severity."
    assert told in (tmp_path / "trainings.md").read_text(encoding="utf-8")
    assert told in text_of(folders[0])


def test_arguments_in_which_part_and_reference_differ_stand_with_their_table(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.7} | perturbed(rotation=0.5),
                        {CLEAN: 0.8} | perturbed(rotation=0.6)) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        about = (f"{seed:011x}3", seed, f"{seed:012x}")
        write(run_of(folder, "part3", "part3", *about, epochs=200), {CLEAN: 0.8})
        write(run_of(folder, "part3_robustness", "part3", *about, attack_images=9),
              perturbed(rotation=0.6))
    text = trainings_text(folders)
    assert "Their trainings differ in `--epochs` (200; part1 6)." in text
    assert ("Their tests by part 2 differ in no argument that both have; arguments that only one "
            "has: `--attack-images` 9. (By the records in `") in text
    assert text.count(f"(By the records in `{folders[0].as_posix()}`.)") == 1  # not in all alike


def test_families_of_a_part_3_without_a_record_are_said_to_be_assumed(tmp_path):
    folder = training(tmp_path, 0, {CLEAN: 0.7}, {CLEAN: 0.7}, families=["noise"])
    (folder / "part3.json").unlink()
    assumed = "part 3 is assumed to have trained on noise, color, geometry"
    assert assumed in text_of(folder)


def test_held_out_is_said_of_part_3_alone_where_part_4_trains_on_more(tmp_path):
    folder = training(tmp_path, 0, {CLEAN: 0.7} | perturbed(rotation=0.5),
                      {CLEAN: 0.7} | perturbed(rotation=0.5), families=["noise"])
    write(run_of(folder, "part4_augmented", "part4_augmented", C, 0, f"{0:012x}"), {CLEAN: 0.7})
    write(run_of(folder, "part4_augmented_robustness", "part4_augmented", C, 0, f"{0:012x}"),
          perturbed(rotation=0.9))
    text = text_of(folder)
    assert "under perturbations that part 3 does not train on |" in text
    assert "Trained on noise, color, geometry: part4_augmented." in text


def test_shares_are_compared_where_both_records_have_them(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1, 2)]
    for folder, shares in zip(folders[1:], ({"rotation": 4}, {"rotation": 2}), strict=True):
        with edited(folder / "part1.json") as record:
            record["args"]["shares"] = shares
    trainings.compare_trainings(folders[:2])  # an older record has none
    with pytest.raises(UsageError, match=r"part1 has SHARES \(part3_augmented.py\) .*4.* and .*2"):
        trainings.compare_trainings(folders[1:])


def test_compiled_trainings_are_compared_with_others_and_told(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5 + seed / 10}, {CLEAN: 0.6}, compile=seed > 1)
               for seed in (0, 1, 2)]
    text = trainings_text(folders)
    assert text.count("--compile False") == 2
    assert text.count("--compile True") == 1
    assert "- **Not all of these have the same --compile.**" in text


def test_seeds_directories_devices_and_pictures_may_differ(tmp_path):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}, device=f"cuda:{seed}", no_umap=seed > 0,
                        umap_points=50 + seed, results_dir=str(seed), data_dir=str(seed),
                        resume=seed > 0, no_part2=seed > 0) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write(run_of(folder, "part2", "part1", f"{seed:011x}1", seed, f"{seed:012x}",
                     checkpoint=str(folder), batch_size=seed, cifar10c=str(folder)),
              perturbed(rotation=0.5))
    assert trainings.compare_trainings(folders)


def test_trainings_are_written_beside_links_to_them(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    links = []
    for seed in (0, 1):
        folder = training(study, seed, {CLEAN: 0.5})
        links.append(tmp_path / f"link{seed}")
        links[-1].symlink_to(folder, target_is_directory=True)
    trainings.compare_trainings(iter(links))  # as Path.glob gives them
    assert (tmp_path / "trainings.md").exists()
    assert not (study / "trainings.md").exists()


def test_what_is_no_several_trainings_is_refused(tmp_path):
    first = training(tmp_path, 0, {CLEAN: 0.5}, {CLEAN: 0.6})
    second = training(tmp_path, 1, {CLEAN: 0.5}, {CLEAN: 0.6})
    for folders, match in (([first], "at least two"), ([first, tmp_path / "none"], "no results"),
                           ([first, second, first], "seed0 and .*seed0 are both of seed 0, spl")):
        with pytest.raises(UsageError, match=match):
            trainings.compare_trainings(folders)
    copy = tmp_path / "copy"
    write(run_of(copy, "part1", "part1", f"{0:011x}1", 7, "7" * 12), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="part1 has the same weights in"):
        trainings.compare_trainings([first, copy])
    write(run_of(copy, "part1", "part1", C, 7, f"{0:012x}"), {CLEAN: 0.5})
    assert trainings.compare_trainings([first, copy])  # another seed on the same split
    write(run_of(copy, "part1", "part1", C, 0, f"{0:012x}"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="are both of seed 0, split 000000000000"):
        trainings.compare_trainings([first, copy])
    write(run_of(copy, "part1", "part1", C, 7, "7" * 12, dataset="other"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match="holds results on toy, .* on other"):
        trainings.compare_trainings([first, copy])
    write(run_of(second, "part3", "part3", B, 2, f"{1:012x}"), {CLEAN: 0.5})
    with pytest.raises(UsageError, match=r"holds parts of the seeds \[1, 2\]"):
        trainings.compare_trainings([first, second])
    (second / "part3.csv").unlink()
    (second / "part1.json").unlink()
    with pytest.raises(UsageError, match="part1.json is missing"):
        trainings.compare_trainings([first, second])


def test_the_command_line_takes_folders(tmp_path, monkeypatch):
    folders = [training(tmp_path, seed, {CLEAN: 0.5}) for seed in (0, 1)]
    monkeypatch.setattr("sys.argv", ["summary.py", *map(str, folders)])
    runpy.run_path(summary.__file__, run_name="__main__")
    assert (tmp_path / "trainings.csv").exists()


def test_every_part_has_its_question():
    assert set(summary.QUESTIONS) == set(common.PARTS)


def test_figures_without_a_table_of_their_own_are_not_shown(tmp_path):
    two_parts(tmp_path, {"gaussian_noise": 0.5}, {"gaussian_noise": 0.4})
    for name in ("part1_history", "part2_fgsm", "part3_history", "part3_robustness_fgsm"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "part2.csv").unlink()
    summary.compare(tmp_path)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    shown = [name for name in ("part1_history", "part2_fgsm", "part3_history",
                               "part3_robustness_fgsm") if f"({name}.png)" in text]
    assert shown == ["part1_history", "part3_history", "part3_robustness_fgsm"]
    (tmp_path / "part3.csv").unlink()
    text = text_of(tmp_path)
    assert "(part3_history.png)" not in text and "(part3_robustness_fgsm.png)" in text


@pytest.mark.parametrize(("name", "first", "second"), [
    ("optimizer", "Muon (lr 0.02)", "AdamW (lr 0.001)"),
    ("script", "part1_baseline.py", "part1_mine.py"),
    ("stopped", "after epoch 1 of 6", "absent")])
def test_trainings_of_other_code_are_not_averaged(tmp_path, name, first, second):
    """An optimizer, script or end that no argument names."""
    folders = [training(tmp_path, seed, {CLEAN: 0.7}) for seed in (1, 2)]
    for folder, value in zip(folders, (first, second), strict=True):
        with edited(folder / "part1.json") as record:
            record["versions"][name] = value
    with pytest.raises(UsageError, match=f"{name} {re.escape(first)} in .* and {second[:5]}"):
        trainings.compare_trainings(folders)
