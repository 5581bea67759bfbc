"""A run that is killed at any moment and resumed ends as if nothing had happened, to the bit."""

import csv
import functools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time

import checkpoints
import common
import part1_baseline
import part2_robustness
import perturbations
import plots
import report
import storage

import numpy as np
import pytest
import torch

from .conftest import ROOT, call, count, end, on_checkpoint, on_tree, read, start, write_tree


def no_part2():
    """Parts 3 and 4 go on with part 2, whose resuming has a test of its own."""
    part2_robustness.main = lambda argv=None: []


def begin(script, argv, folder):
    return start(script, argv, folder, None if script == "part2_robustness" else no_part2)


def kill_at_random(script, argv, folder, kills, keep=None):
    """Kills a run `kills` times at work, each time resumed where it was, then lets it end.

    What ends sooner than it is killed starts anew, without its results but those that `keep` names.
    """
    chance = random.Random(0)
    hits = 0
    while hits < kills:
        process = begin(script, [*argv, "--resume"], folder)
        wait_for_states(folder / "results", chance.randint(0, 4), process)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()
        hits += process.exitcode != 0
        if process.exitcode == 0:
            for path in (folder / "results").iterdir():
                if not (keep and path.name.startswith(keep)):
                    path.unlink()
    end(begin(script, [*argv, "--resume"], folder), folder)


def wait_for_states(results, times, process):
    """Waits until a state has been written so many times more, or the process has ended."""
    before = None
    while times >= 0 and process.is_alive():
        now = [path.stat().st_mtime_ns for path in results.glob("*_state.pt")]
        if now != before:
            before = now
            times -= 1
        time.sleep(0.001)


def names_of(folder, ending):
    return sorted(path.name for path in (folder / "results").glob(f"*{ending}")
                  if not path.name.endswith("_state.pt"))


def assert_equal(one, other):
    """The same tables to the byte, and the same weights."""
    for ending in (".csv", "_correct.npz", ".pt", ".json"):
        assert names_of(one, ending) == names_of(other, ending)
    for name in names_of(one, ".csv"):
        assert (one / "results" / name).read_bytes() == (other / "results" / name).read_bytes()
    for name in names_of(one, "_correct.npz"):
        with np.load(one / "results" / name) as ours, np.load(other / "results" / name) as theirs:
            assert all((ours[key] == theirs[key]).all() for key in ours.files)
    assert names_of(one, ".pt")
    for name in names_of(one, ".pt"):
        ours, theirs = (common.load_checkpoint(folder / "results" / name, "cpu")[0].state_dict()
                        for folder in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_tree(folder / "tree", n=12)


@pytest.mark.full
@pytest.mark.parametrize(("script", "options", "kills"), [
    ("part1_baseline", [], count(4, 40)),
    ("part3_augmented", [], count(2, 10)),
    ("part4_angular", ["--augment", "--loss", "cosface"], count(2, 10))])
def test_a_training_killed_at_random_moments(narrow, data, tmp_path, script, options, kills):
    argv = on_tree(data, "results", "--epochs", 12, *options)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(begin(script, argv, whole), whole)
    kill_at_random(script, argv, killed, kills)
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    end(begin(script, [*argv, "--lr", "0.3", "--resume"], killed), killed, code=2)
    assert "had --lr 0.02, this one has 0.3; set it back" in (killed / "log").read_text()


@pytest.mark.full
def test_part_2_goes_on_after_the_condition_it_was_at(narrow, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(start("part1_baseline", on_tree(data, "results"), whole), whole)
    shutil.copytree(whole, killed)
    argv = on_checkpoint("results/part1.pt", "results", "--perturbations", "gaussian_noise",
                         "rotation", "cutout", "--severities", 1, 2, 3, 4, 5)
    end(begin("part2_robustness", argv, whole), whole)
    kill_at_random("part2_robustness", argv, killed, count(3, 30), keep="part1")
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    assert not list(killed.glob("results/part2_state.pt"))


def test_with_a_state_of_other_weights_part_2_does_not_resume(narrow, data, tmp_path):
    folder = tmp_path / "run"
    end(start("part1_baseline", on_tree(data, "results"), folder), folder)
    process = start("part2_robustness", on_checkpoint("results/part1.pt", "results"), folder,
                    stop_at_the_attack)
    end(process, folder, code=130)
    state = folder / "results/part2_state.pt"
    kept = state.read_bytes()
    log = end(start("part1_baseline", on_tree(data, "results", "--lr", 0.05), folder), folder)
    assert "Removed as results of earlier weights" in log
    assert not state.exists()
    state.write_bytes(kept)  # as if copied from elsewhere
    argv = on_checkpoint("results/part1.pt", "results", "--resume")
    log = end(start("part2_robustness", argv, folder), folder, code=2)
    assert "--checkpoint with the weights" in log
    log = end(start("part2_robustness", argv[:-1], folder), folder)
    assert "an unfinished run (2 conditions done) will be replaced" in log


def stop_at_the_attack():
    def interrupted(*args):
        raise KeyboardInterrupt

    part2_robustness.attack = interrupted


# ---- what has ended, other code, other arguments ------------------------------------------------


@pytest.mark.parametrize(("change", "kept"), [(1e-7, True), (0.3, False)])
def test_a_finished_training_keeps_its_weights_but_for_what_other_code_changes(
        narrow, tree, mine, monkeypatch, change, kept):
    """Other threads change the last bits of BatchNorm's statistics; part 2's results then stay."""
    def estimated_again(average, images, amp):
        model = estimate(average, images, amp)
        model.backbone.bn1.running_mean += change
        return model

    estimate = common.WeightAverage.for_evaluation
    before = read(mine / "part1.csv")[0]["weights"]
    monkeypatch.setattr(common.WeightAverage, "for_evaluation", estimated_again)
    code, error, _ = call("part1_baseline", on_tree(tree, mine, "--resume"))
    assert code == 0, error
    assert ({row["weights"] for row in read(mine / "part1.csv")} == {before}) == kept
    assert (mine / "part2.csv").exists() == kept


def test_a_checkpoint_of_another_training_does_not_pass_for_the_resumed_one(narrow, tree, mine,
                                                                            other_seed):
    before, _ = common.load_checkpoint(mine / "part1.pt", "cpu")
    shutil.copy(other_seed, mine / "part1.pt")
    code, error, _ = call("part1_baseline", on_tree(tree, mine, "--resume"))
    assert code == 0, error
    model, _ = common.load_checkpoint(mine / "part1.pt", "cpu")
    for trained, found in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(trained, found)  # BatchNorm's statistics may differ in their last bits
    assert {row["weights"] for row in read(mine / "part1.csv")} == {checkpoints.weights_hash(model)}


def test_a_run_that_goes_on_with_other_code_says_so_and_records_both(narrow, tree, tmp_path,
                                                                     monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    finish = report.finish
    for i, commit in enumerate(("abc", "def-dirty", "def-dirty")):
        monkeypatch.setattr(report, "versions", lambda commit=commit: {"commit": commit})
        monkeypatch.setattr(report, "finish", finish if i else interrupted)
        code, _, out = call("part1_baseline", on_tree(tree, tmp_path, "--resume"))
        assert code == (0 if i else 130)
        assert ("begun with commit abc and continues with def-dirty" in out) == (i > 0)
    record = json.loads((tmp_path / "part1.json").read_text(encoding="utf-8"))
    assert record["versions"]["commit"] == "abc, then def-dirty"


def commit_now():
    report.versions.cache_clear()
    return report.versions()["commit"]


def test_a_changed_line_changes_the_commit_that_is_recorded(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path,
                       check=True, capture_output=True)

    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "part.py").write_text("z")  # a downloaded archive, without git
    found = [commit_now()]
    (tmp_path / "part.py").write_text("y")
    found.append(commit_now())
    (tmp_path / ".#part.py").symlink_to("nowhere")  # an editor's lock
    git("init")  # of something else
    (tmp_path / ".gitignore").write_text("*.py")
    git("add", ".gitignore")
    git("commit", "-m", "x")
    assert commit_now() == found[-1]
    assert all(commit.startswith("none-dirty-") for commit in found)
    (tmp_path / ".gitignore").unlink()
    for content in ("a", "b", "c"):
        (tmp_path / "part.py").write_text(content)
        if content == "a":
            git("add", "part.py")
            git("commit", "-m", "x")
        found.append(commit_now())
    (tmp_path / "README.md").write_text("no code")
    git("add", "README.md")
    assert commit_now() == found[-1]
    (tmp_path / "part.py").write_text("a")
    (tmp_path / "losses.py").write_text("a student's own, not added yet")
    found.append(commit_now())
    assert len(set(found)) == 6
    assert [commit.count("-dirty-") for commit in found] == [1, 1, 0, 1, 1, 1]


def test_the_same_code_is_known_by_the_same_hash_on_windows(tmp_path, monkeypatch):
    found = []
    for system, ending in (("linux", b"\n"), ("windows", b"\r\n")):
        folder = tmp_path / system
        folder.mkdir()
        for name in ("report.py", "Part1_mine.py"):  # Windows sorts paths without regard to case
            (folder / name).write_bytes(b"x = 1" + ending + b"y = 2" + ending)
        monkeypatch.setattr(report, "__file__", str(folder / "report.py"))
        with monkeypatch.context() as patch:
            if system == "windows":
                patch.setattr(pathlib.PurePath, "__lt__",
                              lambda a, b: str(a).lower() < str(b).lower())
            found.append(commit_now())
    assert found[0] == found[1]
    assert found[0].startswith("none-dirty-")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_git_for_windows_keeps_line_ends_that_make_and_bash_read(tmp_path):
    config = ["-c", "core.autocrlf=true"]  # as its installer proposes; make and bash: in WSL
    subprocess.run(["git", *config, "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    for name in ("Makefile", ".ci/run", "part1_baseline.py", "results/reference/README.md"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes(), name


def test_without_a_checkout_git_is_not_called(tmp_path, monkeypatch):
    """On a Mac without developer tools git is a program that opens a window and offers them."""
    def called(*words, **keywords):
        raise AssertionError(words)

    (tmp_path / "report.py").write_text("a downloaded archive")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setattr(report.subprocess, "run", called)
    assert commit_now().startswith("none-dirty-")


def test_part_2_calls_the_model_what_its_training_called_it(narrow, tree, tmp_path, monkeypatch):
    def severities(path, rows, run):
        found.append((run.label, run.seed))

    found = []
    monkeypatch.setattr(plots, "severities", severities)
    monkeypatch.setattr(plots, "attack", lambda path, rows, run, norm, failed: found.append(norm))
    argv = on_tree(tree, tmp_path, "--loss", "arcface", "--no-part2", "--seed", 3)
    assert call("part4_angular", argv)[0] == 0
    argv = on_checkpoint(tmp_path / "part4.pt", tmp_path, "--seed", 7, "--norm", 2)
    assert call("part2_robustness", argv)[0] == 0
    assert found == [("ArcFace", 3), "2"]
    assert {row["seed"] for row in read(tmp_path / "part4_robustness.csv")} == {"3"}


def test_part_2_says_which_table_it_will_replace(narrow, mine, monkeypatch):
    def told(*argv):
        code, error, out = call("part2_robustness", on_checkpoint(mine / "part1.pt", mine, *argv))
        assert code == 0, error
        return [line for line in out.splitlines() if "will be replaced" in line]

    assert told() == told("--batch-size", 7, "--amp", "off") == []
    [line] = told("--severities", 5, "--norm", 2)
    assert f"{mine / 'part2.csv'}, made with --norm inf, --severities 3, and what belongs" in line
    assert told("--severities", 5, "--norm", 2, "--resume") == []
    [line] = told("--resume")  # has ended: there is nothing to continue
    assert "part2.csv, made with --norm 2, --severities 5, and what belongs" in line
    changed = report.versions() | {"commit": "abc"}
    monkeypatch.setattr(report, "versions", lambda: changed)
    [line] = told()
    assert "part2.csv, made with the code" in line


def test_a_students_copy_of_a_part_is_told_from_the_part(narrow, tree, tmp_path, monkeypatch):
    """The commit, a hash of all the code, is the same."""
    argv = on_tree(tree, tmp_path)
    assert call("part1_baseline", argv)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(part1_baseline, "__file__", "part1_mine.py")
        code, error, out = call("part1_baseline", argv)
        assert code == 0, error
    assert "part1.csv, made with the script part1_baseline.py, and what belongs to it will" in out
    code, error, out = call("part1_baseline", [*argv, "--resume"])
    assert code == 0, error
    assert "begun with script part1_mine.py and continues with part1_baseline.py" in out
    assert "script" not in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_part_2_goes_on_in_a_directory_that_was_moved(narrow, mine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(part2_robustness, "attack", interrupt)
        assert call("part2_robustness", on_checkpoint(mine / "part1.pt", mine))[0] == 130
    moved = mine.rename(mine.parent / "moved")
    code, error, out = call("part2_robustness",
                            on_checkpoint(moved / "part1.pt", moved, "--resume"))
    assert code == 0, error
    assert "Resumed after 2 conditions" in out


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("script", "figure", "gone"), [
    ("part1_baseline", "history", ("part1_history.png", "part1_confusion.png", "part1_umap.png",
                                   "part1_umap.npz")),
    ("part2_robustness", "severities", ("part2_severities.png", "part2_fgsm.png"))])
def test_a_run_stopped_while_it_draws_leaves_no_earlier_figure(narrow, tree, mine, monkeypatch,
                                                               script, figure, gone):
    for name in gone:
        (mine / name).write_bytes(b"of an earlier run")
    (mine / "part1_umap of mine.png").write_bytes(b"mine")
    monkeypatch.setattr(plots, figure, interrupt)
    argv = on_tree(tree, mine, "--seed", 7)
    if script == "part2_robustness":
        argv = on_checkpoint(mine / "part1.pt", mine)
    assert call(script, [word for word in argv if word != "--no-umap"])[0] == 130
    assert not any((mine / name).exists() for name in gone)
    assert (mine / "part1_umap of mine.png").exists()


def test_no_earlier_figure_stands_beside_a_new_table(narrow, tree, mine, monkeypatch):
    before = (mine / "part1.csv").read_bytes()
    monkeypatch.setattr(report, "remove_figures", interrupt)
    assert call("part1_baseline", on_tree(tree, mine, "--seed", 7))[0] == 130
    assert (mine / "part1.csv").read_bytes() == before


@pytest.mark.parametrize(("module", "name"), [(common, "predict_splits"), (storage, "write_rows")])
def test_the_table_of_epochs_is_of_the_training_whose_table_is_beside_it(
        narrow, tree, mine, monkeypatch, module, name):
    before = (mine / "part1_history.csv").read_bytes()
    argv = on_tree(tree, mine, "--seed", 7)
    with monkeypatch.context() as stopped:
        stopped.setattr(module, name, interrupt)
        assert call("part1_baseline", argv)[0] == 130
    assert (mine / "part1_history.csv").read_bytes() == before
    assert read(mine / "part1.csv")[0]["seed"] == "0"
    assert call("part1_baseline", [*argv, "--resume"])[0] == 0
    assert [row["seed"] for row in read(mine / "part1_history.csv")] == ["7"]


def test_part_2_says_that_it_replaces_a_table_of_other_weights(narrow, tree, mine, tmp_path):
    other = tmp_path / "other"
    assert call("part1_baseline", on_tree(tree, other, "--lr", 0.003))[0] == 0
    (mine / "part1.csv").unlink()  # a folder of part 2's results alone
    before = read(mine / "part2.csv")[0]["weights"]
    code, error, out = call("part2_robustness", on_checkpoint(other / "part1.pt", mine))
    assert code == 0, error
    assert f"the weights {before}, and what belongs to it will be replaced" in out


def test_a_state_of_part_2_goes_with_the_weights_that_it_tested(narrow, tree, mine):
    state = mine / "part2_state.pt"
    weights = read(mine / "part1.csv")[0]["weights"]
    for tested, stays in ((weights, True), ("f" * 12, False)):
        checkpoints.write(state, {"identity": {checkpoints.TESTED_WEIGHTS: tested},
                                  "finished": [], "versions": {}})
        code, error, out = call("part1_baseline", on_tree(tree, mine, "--resume"))  # has ended
        assert code == 0, error
        assert state.exists() == stays
        assert ("as results of earlier weights" in out) != stays
        assert read(mine / "part2.csv")[0]["weights"] == weights  # stays in any case
        assert (mine / "part2.csv").exists()  # of the weights that stay


def test_a_run_is_of_the_code_that_it_began_with(narrow, tree, tmp_path, monkeypatch):
    """Part 3 trains for long; what is edited meanwhile is not what its part 2 runs."""
    commits = iter(("abc", "def", "ghi"))
    monkeypatch.setattr(report, "versions", functools.cache(lambda: {"commit": next(commits)}))
    code, error, _ = call("part3_augmented", on_tree(tree, tmp_path))
    assert code == 0, error
    for name in ("part3", "part3_robustness"):
        record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert record["versions"]["commit"] == "abc"


@pytest.mark.parametrize("edited", [False, True])
def test_images_that_edited_code_perturbs_are_not_compared_as_the_same(narrow, trained, tmp_path,
                                                                       monkeypatch, edited):
    mine = tmp_path / "results"
    shutil.copytree(trained, mine)
    if edited:
        another = perturbations.PERTURBATIONS["vertical_flip"]
        monkeypatch.setitem(perturbations.PERTURBATIONS, "rotation",
                            lambda *arguments: another(*arguments))
    code, error, _ = call("part2_robustness", on_checkpoint(mine / "part3.pt", mine))
    assert code == 0, error
    with open(mine / "comparison.csv", newline="", encoding="utf-8") as file:
        said = {(row["part"], row["condition"]): row["verdict"] for row in csv.DictReader(file)}
    differ = said["part3", "rotation"] == "not tested: their perturbed images differ"
    assert differ == edited
    assert not said["part3", "cutout"].startswith("not tested")
    text = (mine / "summary.md").read_text(encoding="utf-8")
    assert ("perturbations that part 3 trains on" in text) != edited
    told = "part3 against part1 under rotation 3: their perturbed images differ"
    assert (told in text) == edited


def test_what_was_tested_on_other_pixels_is_tested_again(narrow, trained, tmp_path, monkeypatch):
    """A resumed part 2 keeps predictions, but of the images that the code makes now alone."""
    def interrupted(*args):
        raise KeyboardInterrupt

    another = perturbations.PERTURBATIONS["vertical_flip"]
    argv = on_checkpoint(tmp_path / "part3.pt", tmp_path, "--resume")
    shutil.copy(trained / "part3.pt", tmp_path)
    finish = part2_robustness.finish
    monkeypatch.setattr(part2_robustness, "finish", interrupted)
    assert call("part2_robustness", argv)[0] == 130
    monkeypatch.setattr(part2_robustness, "finish", finish)
    monkeypatch.setitem(perturbations.PERTURBATIONS, "rotation",
                        lambda *arguments: another(*arguments))
    predicted = []
    predict = common.predict
    monkeypatch.setattr(common, "predict", lambda model, images, amp, *rest: predicted.append(
        images.dtype) or predict(model, images, amp, *rest))
    assert call("part2_robustness", argv)[0] == 0
    assert predicted.count(torch.uint8) == 2  # clean images and rotation's, not cutout's
    rows = read(tmp_path / "part3_robustness.csv")
    assert [row["condition"] for row in rows if row["metric"] == "accuracy"].count("rotation") == 1
