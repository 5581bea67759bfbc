"""A run that is killed at any moment and resumed ends as if nothing had happened, to the bit."""

import multiprocessing
import os
import random
import shutil
import sys
import time

import pytest
import torch
from test_hostile import write_tree

import arguments
import common

FORKS = multiprocessing.get_context("forkserver")  # a server that has imported everything: a start costs no seconds
FORKS.set_forkserver_preload(["part1_baseline", "part4_angular", "sklearn.metrics", "matplotlib.pyplot", "PIL.Image"])


def work(script, argv, folder):
    os.chdir(folder)
    sys.stdout = sys.stderr = open("log", "a", buffering=1)  # noqa: SIM115 - open until the process ends
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    arguments.run(__import__(script).main)


def start(script, argv, folder):
    folder.mkdir(exist_ok=True)
    process = FORKS.Process(target=work, args=(script, [*map(str, argv)], folder))
    process.start()
    return process


def end(process, folder, code=0):
    process.join(300)
    assert process.exitcode == code, (folder / "log").read_text()


def kill_at_random(script, argv, folder, kills, longest):
    """Starts and kills a run `kills` times, each time where it was, then lets it end; how many kills hit it at work."""
    chance, hits = random.Random(0), 0
    for _ in range(kills):
        process = start(script, [*argv, "--resume"], folder)
        time.sleep(chance.uniform(0, longest))
        hits += process.is_alive()
        process.kill()
        process.join()
    end(start(script, [*argv, "--resume"], folder), folder)
    return hits


def assert_equal(one, other):
    """The same tables to the byte, and the same weights."""
    for pattern in ("*.csv", "*_correct.npz", "*.pt"):
        names = sorted(p.name for p in (one / "results").glob(pattern) if not p.name.endswith("_state.pt"))
        assert names == sorted(p.name for p in (other / "results").glob(pattern) if not p.name.endswith("_state.pt"))
        for name in names:
            if pattern == "*.csv":
                assert (one / "results" / name).read_bytes() == (other / "results" / name).read_bytes()
            elif pattern == "*.pt":
                ours, theirs = (common.load_checkpoint(folder / "results" / name, "cpu")[0].state_dict()
                                for folder in (one, other))
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (one / "results/part1.csv").exists() or (one / "results/part4_augmented.csv").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data") / "tree", n=12)


@pytest.mark.parametrize(("script", "options", "kills", "longest"), [
    ("part1_baseline", [], 24, 0.9), ("part4_angular", ["--augment", "--loss", "cosface"], 8, 3)])
def test_a_training_killed_at_random_moments(data, tmp_path, script, options, kills, longest):
    argv = ["--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5, "--epochs", 10, "--batch-size", 4,
            "--no-umap", "--amp", "off", *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(start(script, argv, whole), whole)
    assert kill_at_random(script, argv, killed, kills, longest) >= kills - 2
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    end(start(script, [*argv, "--lr", "0.05", "--resume"], killed), killed, code=2)
    assert "had --lr 0.1, this one has 0.05" in (killed / "log").read_text()


def test_part_2_goes_on_after_the_condition_it_was_at(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(start("part1_baseline", ["--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5, "--epochs", 1,
                                 "--batch-size", 4, "--no-umap", "--amp", "off"], whole), whole)
    shutil.copytree(whole, killed)
    argv = ["--checkpoint", "results/part1.pt", "--no-umap", "--amp", "off", "--severities", 1, 5, "--eps-255", 8]
    end(start("part2_robustness", argv, whole), whole)
    kill_at_random("part2_robustness", argv, killed, 6, 3)
    assert "Resumed after" in (killed / "log").read_text()
    assert_equal(whole, killed)
    assert not list(killed.glob("results/part2_state.pt"))
