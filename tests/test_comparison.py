"""What the comparison joins, what it leaves out, and what it refuses."""

import claims
import comparison
import storage
import summary
from arguments import UsageError

import numpy as np
import pytest
from made import CLEAN, A, B, C, N, perturbed, run_of, text_of, two_parts, verdicts_of, write

# ---- rows of other weights ----------------------------------------------------------------------


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


# ---- odd files ----------------------------------------------------------------------------------


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
