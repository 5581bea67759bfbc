"""`make study`: what it runs, in which order, and that parts which end together take turns."""

import os
import shutil
import subprocess
import sys
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


OTHER = """#!/bin/sh
# stands for a Python of another version
echo "$@" >> commands.txt
[ "$1" = -m ] || exec {} -c 'import sys; sys.version_info = (3, {}); exec(sys.argv[2])' "$@"
"""


def write_script(path, text):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path):
    """A directory with the Makefile and a python that only takes notes."""
    place = tmp_path / "my study"
    (place / "bin").mkdir(parents=True)
    (place / "v").mkdir()
    shutil.copy(ROOT / "Makefile", place)
    for name in ("requirements.txt", "constraints.txt", "v/installed"):  # the last is the newest
        (place / name).touch()
    write_script(place / "bin/python", FAKE)
    return place


@pytest.fixture
def study(place):
    """Runs `make study` there: the commands that it gave."""
    if shutil.which("make") is None:
        pytest.skip("no make")

    def run(*words, goal="study"):
        (place / "commands.txt").write_text("", encoding="utf-8")
        done = subprocess.run(["make", goal, "VENV=v", "BIN=bin", *words], cwd=place,
                              capture_output=True, check=False, encoding="utf-8")
        run.said = done.stdout
        run.error = done.stderr
        return (place / "commands.txt").read_text(encoding="utf-8").splitlines()

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


def test_what_is_finished_is_not_run_again_what_failed_is(study, place):
    def scripts(*words):
        return [command.split()[0] for command in study("SEEDS=1", *words)]

    part1, part2, part3 = "part1_baseline.py", "part2_robustness.py", "part3_augmented.py"
    assert scripts("STUDIED=part1 part3") == [part1, part2, part3, part2]
    (place / "failing").write_text("part4")
    assert scripts("STUDIED=part1 part4") == ["part4_angular.py"]
    (place / "failing").unlink()
    assert scripts("STUDIED=part1 part3 part4") == ["part4_angular.py", part2]
    assert scripts("STUDIED=part3", "RESULTS=b")[-1] == part2  # which needs part 1's training
    assert scripts("STUDIED=part1 part3", "RESULTS=b") == [part2]


def test_a_study_that_was_begun_with_other_arguments_is_not_gone_on_with(study, place):
    (place / "failing").write_text("part")
    study("SEEDS=1", "ARGS=--no-such-flag")  # what makes nothing binds nobody
    (place / "failing").unlink()
    args = "ARGS=--epochs 5 --data-dir 'a\\b c' --data-dir \"a (1)\""
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


def test_code_that_was_edited_after_a_training_is_told(study, place):
    """What is finished is not made again: its results are of the code before."""
    code = place / "part1_baseline.py"
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


def test_the_reference_has_what_was_measured_and_no_weights_or_images(study, place):
    seed = place / "results/study/seed1"
    seed.mkdir(parents=True)
    kept = ["part1.csv", "part1.json", "part1_umap.png", "part2_correct.npz"]
    for name in (*kept, "part1.pt", "part1_umap.npz", "part2_examples.png", "part2_adversarial.png",
                 ".part1.csv"):
        (seed / name).touch()
    *_, compared = study("SEEDS=1", goal="reference")
    assert "summary.compare('results/reference/seed1')" in compared
    found = [path.name for path in (place / "results/reference/seed1").iterdir()]
    assert sorted(found) == kept
    (place / "failing").write_text("seed1')")
    assert study("SEEDS=1 2", goal="reference")[-1] == compared  # what failed is not gone on with


@pytest.mark.parametrize(("minor", "commands"), [(9, ["-c"]), (10, ["-c", "-m", "-m"])])
def test_a_python_that_is_too_old_installs_nothing(study, place, minor, commands):
    (place / "v/installed").unlink()
    write_script(place / "other", OTHER.format(sys.executable, minor))
    found = study("PYTHON=./other", goal="v/installed")
    assert [command.split()[0] for command in found] == commands
    assert study.error.startswith("This needs Python 3.10 or newer; give") == (minor < 10)


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
