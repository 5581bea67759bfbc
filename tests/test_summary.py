"""The comparison: what it compares with what, and what it refuses to."""

import numpy as np
import pytest
from conftest import META

import common
import report
import summary

RUN = {"part": "part1", "dataset": "toy", "seed": 0, "split_hash": "abc"}


def write(folder, name, part, accuracies, seed=0, split_hash="abc", order=0, part1="none"):
    """A part's table and correctness from {(condition, severity): accuracy} on 1,000 images."""
    run = RUN | {"part": part, "seed": seed, "split_hash": split_hash}
    labels, rows, correct = np.zeros(1000, int), [], {}
    for (condition, severity), accuracy in accuracies.items():
        wrong = np.roll(np.arange(1000) >= round(1000 * accuracy), order).astype(int)
        rows.append(report.accuracy_row(run, f"{part}.pt", "test", condition, severity, "own", wrong, labels))
        correct[f"{condition}/{severity}"] = wrong == 0
    report.write_rows(folder / f"{name}.csv", rows)
    report.write_arrays(folder / f"{name}_correct.npz", command="x", part1=part1, **correct)


def lines(table):
    return dict(summary.overview(summary.shared(table), ["part1", "part3"]))


def test_tests_are_on_the_same_images_and_corrected(tmp_path):
    write(tmp_path, "part1", "part1", {("clean", ""): 0.7})
    write(tmp_path, "part2", "part2", {("rotation", 3): 0.5, ("jpeg", 3): 0.60})
    write(tmp_path, "part3", "part3", {("clean", ""): 0.702}, order=1)
    write(tmp_path, "part3_robustness", "part3", {("rotation", 3): 0.65, ("jpeg", 3): 0.45})
    verdicts = {r["condition"]: r["verdict"] for r in summary.comparison(tmp_path) if r["part"] == "part3"}
    assert verdicts == {"clean": "no difference shown", "rotation": "better", "jpeg": "worse"}
    found = lines(summary.comparison(tmp_path))
    assert found["**mean over perturbations (mPC)**"] == pytest.approx([0.55, 0.55])
    assert found["mPC relative to clean"] == pytest.approx([0.55 / 0.7, 0.55 / 0.702])
    assert found["corruption error (part 1: 100)"] == pytest.approx([1, (0.35 / 0.5 + 0.55 / 0.4) / 2])
    assert found["**mean, seen family**"] == pytest.approx([0.5, 0.65])
    assert found["**mean, held-out family**"] == pytest.approx([0.6, 0.45])


def test_means_are_over_conditions_that_both_models_have(tmp_path):
    write(tmp_path, "part1", "part1", {("clean", ""): 0.7})
    write(tmp_path, "part2", "part2", {("rotation", 3): 0.5, ("rotation", 5): 0.1, ("jpeg", 3): 0.9})
    write(tmp_path, "part3", "part3", {("clean", ""): 0.7})
    write(tmp_path, "part3_robustness", "part3", {("rotation", 3): 0.6})
    assert lines(summary.comparison(tmp_path))["**mean over perturbations (mPC)**"] == pytest.approx([0.5, 0.6])


def test_a_parts_own_table_counts_before_part_2_of_it(tmp_path):
    write(tmp_path, "part1", "part1", {("clean", ""): 0.9})
    write(tmp_path, "part2", "part2", {("clean", ""): 0.5, ("rotation", 3): 0.5})
    assert lines(summary.comparison(tmp_path))["clean"][0] == 0.9


def test_part4_augmented_is_compared_with_part_3(tmp_path):
    write(tmp_path, "part1", "part1", {("clean", ""): 0.5})
    write(tmp_path, "part3", "part3", {("clean", ""): 0.8})
    write(tmp_path, "part4_augmented", "part4_augmented", {("clean", ""): 0.7})
    row = next(r for r in summary.comparison(tmp_path) if r["part"] == "part4_augmented")
    assert (row["reference"], row["verdict"]) == ("part3", "worse")
    assert row["difference"] == pytest.approx(-0.1)


def test_different_splits_are_never_mixed(tmp_path):
    write(tmp_path, "part1", "part1", {("clean", ""): 0.5})
    write(tmp_path, "part3", "part3", {("clean", ""): 0.8}, split_hash="other")
    with pytest.raises(common.UsageError, match="2 data sets or splits"):
        summary.comparison(tmp_path)


def test_missing_parts_are_named(tmp_path):
    write(tmp_path, "part3", "part3", {("clean", ""): 0.8})
    summary.compare(tmp_path)
    assert "Missing: part1, part2, part3, part4, part4_augmented." in (tmp_path / "summary.md").read_text()
    # (part 3's own sentence needs its accuracy on the evaluation split, which this table has not)


def test_mean_and_deviation_over_seeds(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
        (tmp_path / f"seed{seed}").mkdir()
        write(tmp_path / f"seed{seed}", "part1", "part1", {("clean", ""): accuracy}, seed=seed)
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    summary.compare_seeds(folders)
    assert "| clean | 72.0 ± 2.0 |" in (tmp_path / "seeds.md").read_text()
    with pytest.raises(common.UsageError, match="different seeds"):
        summary.compare_seeds([folders[0], folders[0]])


def test_results_of_a_former_checkpoint_are_removed_with_it(tmp_path, small_model):
    paths = report.Paths(tmp_path, "part1")
    common.save_checkpoint(paths(".pt"), small_model, META)
    write(tmp_path, "part2", "part2", {("rotation", 3): 0.5})
    write(tmp_path, "part3_robustness", "part3", {("rotation", 3): 0.5})
    report.retire(paths, small_model)
    assert (tmp_path / "part2.csv").exists()  # the same weights: the results still hold
    report.retire(paths, common.Model(outputs=10))
    assert not (tmp_path / "part2.csv").exists()
    assert not (tmp_path / "part2_correct.npz").exists()
    assert (tmp_path / "part3_robustness.csv").exists()


def test_images_of_a_former_part_1_do_not_count(tmp_path, small_model):
    common.save_checkpoint(tmp_path / "part1.pt", small_model, META)
    write(tmp_path, "part1", "part1", {("clean", ""): 0.7})
    write(tmp_path, "part3", "part3", {("clean", ""): 0.7})
    for made_on, found in ((common.digest(small_model), 1), ("another", 0)):
        write(tmp_path, "part3_robustness", "part3", {("fgsm_from_part1", 8): 0.3}, part1=made_on)
        assert [r["condition"] for r in summary.comparison(tmp_path)].count("fgsm_from_part1") == found


def test_attacks_stand_with_their_n_and_gaps_with_a_dash(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        write(folder, "part1", "part1", {("clean", ""): 0.7}, seed=seed)
        write(folder, "part2", "part2", {("fgsm", 8): 0.1, ("pgd", 8): 0}, seed=seed)
        write(folder, "part3", "part3", {("clean", ""): 0.7}, seed=seed)
        write(folder, "part3_robustness", "part3", {("fgsm", 8): 0.2, ("fgsm_from_part1", 8): 0.4}, seed=seed)
    summary.compare_seeds([tmp_path / "seed0", tmp_path / "seed1"])
    text = (tmp_path / "seeds.md").read_text()
    assert "| fgsm 8/255, n = 1000 | 10.0 ± 0.0 | 20.0 ± 0.0 |" in text
    assert "| fgsm from part1 8/255, n = 1000 | - | 40.0 ± 0.0 |" in text
