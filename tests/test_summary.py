"""The comparison of one training: its tests, its means and what it says."""

import html
import re
from dataclasses import replace

import claims
import common
import comparison
import plots
import report
import storage
import summary

import numpy as np
import pytest
import torch
from made import (
    CLEAN,
    A,
    B,
    C,
    N,
    append,
    edited,
    head_row,
    lines_of,
    perturbed,
    read,
    run_of,
    text_of,
    two_parts,
    verdicts_of,
    write,
)
from scipy.stats import binomtest, ttest_rel


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


@pytest.mark.parametrize(("p_holm", "difference", "said"), [
    (0.0499, 0.1, "better"), (0.0499, -0.1, "worse"), (0.05, 0.1, ""), (1.0, -0.1, "")])
def test_a_verdict_needs_a_p_below_5_percent(p_holm, difference, said):
    assert comparison.verdict(p_holm, difference) == said


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


def test_evaluation_images_that_edited_code_perturbs_stand_in_the_table_alone(tmp_path):
    measured = perturbed(rotation=0.5, jpeg=0.6) | {("test", "fgsm", "4"): 0.4,
                                                    ("test", "worst_case", "4"): 0.6}
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.8})
    run = run_of(tmp_path, "part2", "part1")
    write(run, measured)
    text = text_of(tmp_path)
    write(run, measured | {("train", "scale", "1"): 0.9, ("evaluation", "fgsm", "8"): 0.9,
                           ("evaluation", "fgsm", "16"): 0.9,
                           ("evaluation", "worst_case", "16"): 0.1})
    labels = torch.zeros(4 * N, dtype=torch.int64)  # of more images than the test set has
    predicted = (torch.arange(4 * N) >= 3.6 * N).long()
    append(run, report.accuracy_row(run, "evaluation", "rotation", "3", "own", predicted, labels))
    images = storage.read_correct(tmp_path, "part2").images
    images["evaluation/rotation/3"] = report.correct(predicted, labels)
    storage.write_correct(run.path("_correct.npz"), run, images, "none", None)
    assert text_of(tmp_path) == text
    found = {(row["split"], row["condition"], row["severity"]): row["accuracy"]
             for row in read(tmp_path / "comparison.csv")}
    assert found["evaluation", "rotation", "3"] == found["evaluation", "fgsm", "8"] == "0.9"


def test_only_perturbed_test_images_are_counted_in_a_finding(tmp_path):
    for name, part, weights, value in (("part2", "part1", A, 0.5),
                                       ("part3_robustness", "part3", B, 0.7)):
        write(run_of(tmp_path, part, part, weights), {CLEAN: 0.7})
        measured = {(split, "rotation", "3"): value for split in ("test", "evaluation")}
        n = 500 if part == "part3" else 100  # of which the attack is not compared
        run = run_of(tmp_path, name, part, weights)
        write(run, measured)
        attacked = torch.zeros(n, dtype=torch.int64)
        append(run, report.accuracy_row(run, "evaluation", "fgsm", "8", "own", attacked, attacked))
    text = text_of(tmp_path)
    assert "of 1 perturbed conditions better in 1, worse in 0, no difference shown in 0. " in text


def test_clean_images_of_a_severity_do_not_replace_the_clean_ones(tmp_path, monkeypatch):
    """As edited code has them that draws a curve from severity 0 on."""
    shown = []
    monkeypatch.setattr(plots, "comparison", lambda path, rows, names: shown.extend(rows))
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    write(run_of(tmp_path, "part2", "part1"),
          {("test", "clean", "0"): 0.5} | perturbed(rotation=0.35))
    found = lines_of(tmp_path)
    assert found["test set"]["part1"] == 0.7
    assert found["mPC relative to clean"]["part1"] == pytest.approx(0.5)
    summary.compare(tmp_path)
    assert [row["accuracy"] for row in shown if row["condition"] == "clean"] == [0.7]


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
    append(run, report.row(run, "test", "rotation", 1, "knn", "calibration_error", 0.9, N))
    part3 = run_of(tmp_path, "part3_robustness", "part3", B)
    write(part3, {("test", "rotation", s): 0.5 for s in "123"}
          | {("test", "grayscale", ""): 0.5, ("test", "jpeg", "3"): 0.5,
             ("test", "cifar10c fog", "3"): 0.5})
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
             ("random_l2", "64"), ("pgd_l2", "64"), ("fgsm_l2", "32"), ("worst_case_l2", "32"),
             ("random_l2", "32"))
    write(run_of(tmp_path, "part2", "part1"), {("test", *each): 0.5 for each in tried})
    assert [title for title in lines_of(tmp_path) if "/255" in title] == [
        "FGSM L2 32/255, n = 1,000", "PGD 8/255, n = 1,000", "PGD L2 64/255, n = 1,000",
        "random L2 64/255, n = 1,000", "random sign 8/255, n = 1,000",
        "worst of its own one-step attacks 4/255, n = 1,000",
        "worst of its own one-step attacks L2 32/255, n = 1,000"]


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
          {("test", "fgsm", eps): value
           for eps, value in (("0", 0.7), ("2", 0.5), ("8", 0.2), ("16", 0.1))})
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
    write(run_of(tmp_path, "part3_robustness", "part3", B), perturbed(rotation=0.5, fgsm=0.5), n=50)
    write(run_of(tmp_path, "part2", "part1"), perturbed(rotation=0.5, fgsm=0.5))
    assert ("p < 0.001: worse; attacks not compared, since they are on other images: 50 images, "
            "part1 has 1000 others. ") in text_of(tmp_path)
    write(run_of(tmp_path, "part3_robustness", "part3", B), perturbed(rotation=0.5), n=50)
    assert "p < 0.001: worse. " in text_of(tmp_path)


def test_the_figure_is_of_test_images_the_table_of_none_trained_on(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "comparison", lambda path, rows, names: shown.extend(rows))
    write(run_of(tmp_path, "part1", "part1"),
          {("train", "clean", ""): 0.9, ("evaluation", "clean", ""): 0.6, CLEAN: 0.7})
    tests = summary.compare(tmp_path)
    assert [(row["condition"], row["accuracy"]) for row in shown] == [("clean", 0.7)]
    assert [row["split"] for row in tests] == ["evaluation", "test"]
    write(run_of(tmp_path, "part2", "part1"), perturbed(rotation=0.5, scale=0.5, fgsm=0.4))
    write(run_of(tmp_path, "part3_robustness", "part3", B), perturbed(rotation=0.6, jpeg=0.6))
    shown.clear()
    tests = summary.compare(tmp_path)
    assert {row["condition"] for row in shown} == {"clean", "rotation", "fgsm"}  # what both have
    assert {row["condition"] for row in tests} == {"clean", "rotation", "scale", "fgsm", "jpeg"}


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
                  versions={"torch": "3", "commit": "abc", "optimizer": "SGD",
                            "stopped": "after epoch 2 of 30"}), {CLEAN: 0.9})
    found = re.search("Their trainings differ in (.*)$", text_of(tmp_path), re.M)[1]
    assert found == ("`--seed` (3; part1 0), `--split-seed` (3; part1 0), `--epochs` (30; part1 6),"
                     " `--weight-decay` (0.001; part1 0.002), training images (12; part1 unknown),"
                     " mixed precision (bf16; part1 off), optimizer (SGD; part1 unknown), device"
                     " (H100; part1 cpu), torch (3; part1 2), commit (abc; part1 unknown);"
                     " arguments that only one has: "
                     "`--families` noise, stopped after epoch 2 of 30, `--margin` 0.5 (part1).")


@pytest.mark.parametrize(("ours", "said"), [({"rotation": 2}, True), ({"rotation": 4}, False)])
def test_the_shares_of_two_that_perturb_are_named_where_they_differ(tmp_path, ours, said):
    write(run_of(tmp_path, "part3", "part3", A, shares={"rotation": 4}), {CLEAN: 0.7})
    write(run_of(tmp_path, "part4_augmented", "part4_augmented", B, shares=ours), {CLEAN: 0.7})
    assert ("`SHARES (part3_augmented.py)` ({'rotation': 2}; part3 {'rotation': 4})"
            in html.unescape(text_of(tmp_path))) == said


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
    write(run, {CLEAN: 0.7})
    for name, n in (("cat", 1000), ("dog", 250)):
        metric = f"accuracy of {name}"
        append(run, report.row(run, "test", "clean", "", "own", metric, 0.5, n),
               report.row(run, "evaluation", "clean", "", "own", metric, 0.5, 4 * n),  # not counted
               report.row(run, "test", "rotation", "3", "own", metric, 0.5, n))  # nor is this one
    append(run, report.row(run, "test", "clean", "", "own", "accuracy of pets", 0.5, 1250))
    run = run_of(tmp_path, "part2", "part1")
    write(run, perturbed(worst_case=0.7))
    append(run, report.row(run, "test", "clean", "", "own", "accuracy of cat", 0.5, 1000),
           report.row(run, "test", "clean", "", "own", "accuracy of dog", 0.5, 250))
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
