"""`make study`: what it runs, in which order, and that parts which end together take turns."""

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import checkpoints

import pytest

ROOT = Path(__file__).parent.parent.parent
FAKE = """#!/bin/sh
# stands for python: notes its command and writes what a part would
echo "$@" >> commands.txt
case "$*" in *$(cat failing 2> /dev/null || echo nothing)*) exit 3;; esac
"""


@pytest.fixture
def study(tmp_path):
    """Runs `make study` in a directory of its own, with a python that only takes notes."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "v").mkdir()
    for name in ("requirements.txt", "constraints.txt", "v/installed"):  # the last is the newest
        (tmp_path / name).touch()
    python = tmp_path / "bin/python"
    python.write_text(FAKE, encoding="utf-8")
    python.chmod(0o755)

    def run(*words, goal="study"):
        (tmp_path / "commands.txt").write_text("", encoding="utf-8")
        done = subprocess.run(["make", goal, "VENV=v", f"BIN={tmp_path}/bin", *words], cwd=tmp_path,
                              capture_output=True, check=False, encoding="utf-8")
        run.said = done.stdout
        return (tmp_path / "commands.txt").read_text(encoding="utf-8").splitlines()

    return run


def test_every_seed_gets_six_trainings_on_its_own_split_each_tested_part_1_first(study):
    commands = study("SEEDS=1 2", "ARGS=--epochs 5")
    for seed in "12":
        trained = [c for c in commands if f"--seed {seed} --split-seed {seed} --resume" in c]
        assert all(c.endswith("--epochs 5") for c in trained)
        assert sorted(c.split(" --results-dir")[0] for c in trained) == [
            "part1_baseline.py", "part3_augmented.py --families none --no-part2",
            "part3_augmented.py --no-part2", "part4_angular.py --augment --no-part2",
            "part4_angular.py --no-part2", "part4_angular.py --proxies --no-part2"]
        assert trained[0].startswith("part1_baseline.py")
        tested = [c for c in commands if c.startswith("part2") and f"seed{seed}/" in c]
        assert len(tested) == 6 and all("--resume --severities 1 2 3 4 5" in c for c in tested)
        assert f"seed{seed}/part1.pt" in tested[0]
        assert commands.index(trained[0]) < commands.index(tested[0]) < commands.index(trained[1])
    assert commands[-1] == "summary.py results/study/seed1 results/study/seed2"


def test_what_is_finished_is_not_run_again_what_failed_is(study, tmp_path):
    def scripts(*words):
        return [command.split()[0] for command in study("SEEDS=1", *words)]

    part1, part2, part3 = "part1_baseline.py", "part2_robustness.py", "part3_augmented.py"
    assert scripts("STUDIED=part1 part3") == [part1, part2, part3, part2]
    (tmp_path / "failing").write_text("part4")
    assert scripts("STUDIED=part1 part4") == ["part4_angular.py"]
    (tmp_path / "failing").unlink()
    assert scripts("STUDIED=part1 part3 part4") == ["part4_angular.py", part2]


def test_a_study_that_was_begun_with_other_arguments_is_not_gone_on_with(study, tmp_path):
    (tmp_path / "failing").write_text("part")
    study("SEEDS=1", "ARGS=--no-such-flag")  # what makes nothing binds nobody
    (tmp_path / "failing").unlink()
    args = "ARGS=--epochs 5 --data-dir 'a\\b c'"
    assert len(study("SEEDS=1", args)) == 12
    assert study("SEEDS=1", args) == []  # finished
    assert study("SEEDS=1 2", "ARGS=--epochs 6") == []
    assert study("SEEDS=1 2", args, "TESTS=--severities 3") == []
    assert len(study("SEEDS=1 2", args)) == 13  # another seed, and the summary
    assert len(study("SEEDS=1", "ARGS=--epochs 6", "RESULTS=another")) == 12


def test_the_arguments_of_part_2_reach_it(study):
    args = "--epochs 5 --no-umap --device  cpu --compile --resume --umap-points=50"
    reached = "--no-umap --device=cpu --compile --resume --umap-points=50"
    (run,) = [c for c in study(f"ARGS={args}", goal="run") if c.startswith("part2")]
    assert run.endswith(f"--results-dir results {reached}")
    tested = [c for c in study(f"ARGS={args}", "SEEDS=1") if c.startswith("part2")]
    assert len(tested) == 6 and all(c.endswith(f"5 {reached}") for c in tested)


@pytest.mark.parametrize("word", ["RESULTS=", "RESULTS=a b", "SEEDS="])
def test_what_an_unset_variable_leaves_empty_is_refused(study, word):
    assert study(word, goal="run") == []  # RESULTS= would be /study, SEEDS= a study of nothing


def test_code_that_was_edited_after_a_training_is_told(study, tmp_path):
    """What is finished is not made again: its results are of the code before."""
    code = tmp_path / "part1_baseline.py"
    code.touch()
    os.utime(code, (0, 0))
    words = "SEEDS=1", "STUDIED=part1 part3"
    assert len(study(*words)) == 4
    assert study(*words) == [] and "older" not in study.said
    stamp = "results/study/seed1/part1.trained"
    os.utime(code, (2**31, 2**31))
    assert study(*words) == []
    assert study.said.count("is older than part1_baseline.py, but is not made anew") == 1
    assert stamp in study.said
    assert "remove" not in study.said  # --resume would go on from the finished state, untrained


@pytest.mark.parametrize(("part", "script"), [("part3", "part3_augmented.py"),
                                              ("part4_proxies", "part4_angular.py")])
def test_a_model_is_tested_after_part_1s_training_and_waits_for_nothing_else(study, part, script):
    *trained, tested = study(goal=f"results/study/seed7/{part}.tested")
    assert {command.split()[0] for command in trained} == {"part1_baseline.py", script}
    assert tested.startswith(f"part2_robustness.py --checkpoint results/study/seed7/{part}.pt")


def test_comparisons_of_one_directory_take_turns(tmp_path):
    inside = []
    most = []

    @checkpoints.one_at_a_time
    def compare(folder):
        inside.append(folder)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()

    threads = [threading.Thread(target=compare, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
