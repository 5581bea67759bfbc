"""A run that is killed at any moment and resumed ends as if nothing had happened, to the bit."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from test_hostile import write_tree

import arguments
import common
import part2_robustness

FORKS = multiprocessing.get_context("forkserver")  # a server that has imported everything: a start costs no seconds
FORKS.set_forkserver_preload(["part1_baseline", "part4_angular", "sklearn.metrics", "matplotlib.pyplot", "PIL.Image"])


def work(script, argv, folder):
    os.chdir(folder)
    sys.stdout = sys.stderr = open("log", "a", buffering=1)  # noqa: SIM115 - open until the process ends
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    main = __import__(script).main
    part2_robustness.main = lambda argv: []  # parts 3 and 4 go on with it; it has a test of its own
    arguments.run(main)


def start(script, argv, folder):
    folder.mkdir(exist_ok=True)
    process = FORKS.Process(target=work, args=(script, [*map(str, argv)], folder))
    process.start()
    return process


def end(process, folder, code=0):
    process.join(300)
    assert process.exitcode == code, (folder / "log").read_text()


def kill_at_random(script, argv, folder, kills, longest, keep=None):
    """Kills a run at work `kills` times, each time resumed where it was, then lets it end. What ends sooner than it is
    killed starts anew, all its results removed but those whose names begin with `keep`."""
    chance, hits = random.Random(0), 0
    while hits < kills:
        process = start(script, [*argv, "--resume"], folder)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()
        hits += process.exitcode != 0
        if process.exitcode == 0:
            for path in (folder / "results").iterdir():
                if not (keep and path.name.startswith(keep)):
                    path.unlink()
    end(start(script, [*argv, "--resume"], folder), folder)


def assert_equal(one, other):
    """The same tables to the byte, and the same weights."""
    for pattern in ("*.csv", "*_correct.npz", "*.pt"):
        names = sorted(p.name for p in (one / "results").glob(pattern) if not p.name.endswith("_state.pt"))
        assert names == sorted(p.name for p in (other / "results").glob(pattern) if not p.name.endswith("_state.pt"))
        for name in names:
            if pattern == "*.csv":
                assert (one / "results" / name).read_bytes() == (other / "results" / name).read_bytes()
            elif pattern == "*_correct.npz":
                with np.load(one / "results" / name) as ours, np.load(other / "results" / name) as theirs:
                    assert all((ours[key] == theirs[key]).all() for key in ours.files if key != "command")
            elif pattern == "*.pt":
                ours, theirs = (common.load_checkpoint(folder / "results" / name, "cpu")[0].state_dict()
                                for folder in (one, other))
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (one / "results/part1.csv").exists() or (one / "results/part4_augmented.csv").exists()


def timed(script, argv, folder):
    """Runs a part to its end; how many seconds that took."""
    began = time.monotonic()
    end(start(script, argv, folder), folder)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    timed("part1_baseline", ["--help"], folder)  # the server imports what it forks
    return write_tree(folder / "tree", n=12)


@pytest.mark.parametrize(("script", "options", "kills"), [
    ("part1_baseline", [], 20), ("part4_angular", ["--augment", "--loss", "cosface"], 5)])
def test_a_training_killed_at_random_moments(data, tmp_path, script, options, kills):
    argv = ["--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5, "--epochs", 6, "--batch-size", 4,
            "--no-umap", "--amp", "off", *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_at_random(script, argv, killed, kills, 0.45 * timed(script, argv, whole))
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    end(start(script, [*argv, "--lr", "0.3", "--resume"], killed), killed, code=2)
    assert "this one has 0.3; give --lr 0." in (killed / "log").read_text()


def test_part_2_goes_on_after_the_condition_it_was_at(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(start("part1_baseline", ["--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5, "--epochs", 1,
                                 "--batch-size", 4, "--no-umap", "--amp", "off"], whole), whole)
    shutil.copytree(whole, killed)
    argv = ["--checkpoint", "results/part1.pt", "--no-umap", "--amp", "off", "--eps-255", 8,
            "--perturbations", "gaussian_noise", "rotation", "cutout", "--severities", 1, 2, 3, 4, 5]
    took = timed("part2_robustness", argv, whole)
    kill_at_random("part2_robustness", argv, killed, 6, 0.5 * took, keep="part1")
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    assert not list(killed.glob("results/part2_state.pt"))
