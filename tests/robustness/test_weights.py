"""Every row says which weights it is of, and rows of other weights never meet."""

import shutil

import checkpoints
import common
import comparison
import report
import storage
from arguments import UsageError

import numpy as np
import pytest

from .conftest import call, contents, is_sentence, on_checkpoint, on_tree, read

pytestmark = pytest.mark.usefixtures("narrow")


def weights_of(checkpoint):
    return checkpoints.weights_hash(common.load_checkpoint(checkpoint, "cpu")[0])


def test_all_rows_and_records_carry_the_hash_of_the_tested_weights(trained):
    for part, names in (("part1", ("part1", "part2")), ("part3", ("part3",))):
        weights = weights_of(trained / f"{part}.pt")
        for name in names:
            assert {row["weights"] for row in read(trained / f"{name}.csv")} == {weights}
            assert storage.read_record(trained, name)["weights"] == weights
            assert storage.read_correct(trained, name).weights == weights
    assert weights_of(trained / "part1.pt") != weights_of(trained / "part3.pt")
    rows = read(trained / "comparison.csv")
    assert {(row["part"], row["weights"]) for row in rows} == {
        (part, weights_of(trained / f"{part}.pt")) for part in ("part1", "part3")}


def refused(monkeypatch, checkpoint, results):
    """Part 2 refuses before it computes or writes anything."""
    before = contents(results)
    monkeypatch.setattr(common, "predict", None)
    code, error, _ = call("part2_robustness", on_checkpoint(checkpoint, results))
    assert code == 2, error
    assert is_sentence(error)
    assert "is of the weights" in error
    assert contents(results) == before


def test_a_checkpoint_of_other_weights_is_refused_before_anything_is_done(
        mine, other_seed, monkeypatch):
    refused(monkeypatch, other_seed, mine)


@pytest.mark.parametrize("part", ["part1", "part3"])
def test_a_kill_between_checkpoint_and_table_is_refused(tree, mine, monkeypatch, part):
    script = {"part1": "part1_baseline", "part3": "part3_augmented"}[part]
    argv = on_tree(tree, mine, "--seed", 7)
    if part == "part3":
        argv.append("--no-part2")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_record", killed)
        assert call(script, argv)[0] == 130
    with monkeypatch.context() as patch:
        refused(patch, mine / f"{part}.pt", mine)
    code, error, out = call(script, [*argv, "--resume"])  # the way out that it names
    assert code == 0, error
    assert "Resumed after epoch 1" in out
    code, error, _ = call("part2_robustness", on_checkpoint(mine / f"{part}.pt", mine))
    assert code == 0, error


@pytest.mark.parametrize("name", ["part3.pt", "a folder/p\u00e4rt 1.pt"])
def test_the_same_weights_under_another_name_are_tested(mine, tmp_path, name):
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir(parents=True)
    shutil.copy(mine / "part1.pt", path)
    code, error, _ = call("part2_robustness", on_checkpoint(path, mine))
    assert code == 0, error
    rows = read(mine / "part2.csv")
    assert {row["weights"] for row in rows} == {weights_of(mine / "part1.pt")}
    assert {row["checkpoint"] for row in rows} == {path.as_posix()}
    assert {row["part"] for row in rows} == {"part1"}


def test_a_training_that_ends_while_part_2_starts_is_noticed(mine, other_seed, monkeypatch):
    """Between the reading of the checkpoint and the claim on its part, a training replaces it."""
    honest = checkpoints.lock

    def slow_lock(folder, name):
        honest(folder, name)
        if name == "part1":
            shutil.copy(other_seed.with_suffix(".csv"), mine)

    monkeypatch.setattr(checkpoints, "lock", slow_lock)
    monkeypatch.setattr(common, "predict", None)
    code, error, _ = call("part2_robustness", on_checkpoint(mine / "part1.pt", mine))
    assert code == 2
    assert "is of the weights" in error


@pytest.mark.parametrize("stray", ["part2.csv", "part2_correct.npz", "part2.json", "part1.json",
                                   "part1_correct.npz"])
def test_the_comparison_leaves_out_what_is_of_other_weights_and_says_so(
        mine, other_seed, tmp_path, stray):
    theirs = tmp_path / "theirs"
    shutil.copytree(other_seed.parent, theirs)
    assert call("part2_robustness", on_checkpoint(theirs / "part1.pt", theirs))[0] == 0
    shutil.copy(theirs / stray, mine)
    study = comparison.read_study(mine)
    weights = weights_of(mine / "part1.pt")
    part = study.parts["part1"]
    assert {row["weights"] for row in part.rows} == {weights}
    for record in (part.record, part.part2_record):
        assert record is None or record["weights"] == weights
    assert any(stray in line and weights_of(other_seed) in line for line in study.left_out)
    for row in comparison.measured(study):
        if row["part"] == "part1":
            assert row["weights"] == weights
    if stray == "part2_correct.npz":  # so McNemar cannot join them
        right = np.load(theirs / stray)["test/cutout/3"]
        assert not any(np.array_equal(right, images) and "cutout" in key
                       for key, images in part.correct.items())


def test_a_run_killed_while_it_removes_part_2s_results_goes_on_with_it(tree, mine, monkeypatch):
    remove = checkpoints.remove

    def killed(paths, why):
        remove(paths[:-2], why)
        raise KeyboardInterrupt

    (mine / "part2_umap.npz").write_bytes(b"of a run with UMAP")
    argv = [word for word in on_tree(tree, mine, "--seed", 7) if word != "--no-umap"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove", killed)
        assert call("part1_baseline", argv)[0] == 130
    assert list(mine.glob("part2*"))
    assert call("part1_baseline", [*argv, "--resume"])[0] == 0
    assert not list(mine.glob("part2*"))


def test_a_training_that_ends_at_the_same_weights_keeps_part_2s_results(tree, mine, monkeypatch):
    weights = read(mine / "part1.csv")[0]["weights"]
    monkeypatch.setattr(checkpoints, "weights_hash", lambda model: weights)  # to the bit
    before = {path.name: path.read_bytes() for path in mine.glob("part2*")}
    code, error, out = call("part1_baseline", on_tree(tree, mine))
    assert code == 0, error
    assert "Removed" not in out
    assert {path.name: path.read_bytes() for path in mine.glob("part2*")} == before


def test_a_part_1_of_another_split_lends_no_adversarial_images(mine, capsys):
    model, meta = common.load_checkpoint(mine / "part1.pt", "cpu")
    common.save_checkpoint(mine / "part1.pt", model, meta | {"split_hash": "0" * 12})
    _, theirs = common.load_checkpoint(mine / "part3.pt", "cpu")
    assert report.part1_beside(mine, theirs, "cpu") is None
    assert "is of another part, data set or split" in capsys.readouterr().out
    with pytest.raises(UsageError):
        common.load_checkpoint(mine / "part9.pt", "cpu")


def test_images_right_are_kept_with_the_part_1_that_lent_its_adversarial_images(mine):
    assert call("part2_robustness", on_checkpoint(mine / "part3.pt", mine))[0] == 0
    found = [storage.read_correct(mine, name).part1 for name in ("part2", "part3_robustness")]
    assert found == ["none", weights_of(mine / "part1.pt")]
