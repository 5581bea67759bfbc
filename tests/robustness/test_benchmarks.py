"""The benchmarks: both sides do the same work, on evaluation images, and nothing is lost."""

import pickle
import queue
import subprocess
import sys
import types

import arguments
import common

import pytest
import torch

from .conftest import ROOT, Narrow, call, on_tree

sys.path.insert(0, str(ROOT / "benchmarks"))
import angular
import losses
import throughput
import time_to_accuracy
from torchvision import transforms


@pytest.fixture
def clock(narrow, monkeypatch):
    """In the place of the time: how many images went through the network."""
    seen = []
    forward = Narrow.forward

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    def now(device):
        seen.append(1e-9)  # time always passes
        return sum(seen)

    monkeypatch.setattr(Narrow, "forward", counted)
    monkeypatch.setattr(throughput, "now", now)
    monkeypatch.setattr(time_to_accuracy, "now", now)


def started(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    module.main()


@pytest.mark.parametrize(("flag", "cells"), [
    ("--compile", "| 1 | 1 | 1 | 1 | 1.00 | 1.00 | 1.00 |"),
    ("--no-compile", "| 1 | 1 | 1 | 1.00 | 1.00 |")])
def test_every_contestant_of_throughput_sees_all_images_once(clock, tmp_path, monkeypatch, capsys,
                                                             flag, cells):
    monkeypatch.setattr(torch, "matmul", torch.add)  # 17 GFLOP, five times
    monkeypatch.setattr(common, "compile_backbone", lambda *_, **__: None)
    monkeypatch.setattr(common, "perturb", lambda images, *_: images)
    started(monkeypatch, throughput, "--images", 12, "--batch-sizes", 4, "--rounds", 1,
            "--umap-points", 53, "--device", "cpu", flag, "--output", tmp_path)
    (file,) = tmp_path.iterdir()
    text = file.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| training", "| inference |"))]
    assert len(rows) == 3
    for row in rows:
        assert row.endswith(f"| 4 {cells}")
    for name in common.PERTURBATIONS:
        assert f"| {name.replace('_', ' ')} | " in text


@pytest.mark.parametrize("argv", [("--images", 10, "--batch-sizes", 4), ("--rounds", 0),
                                  ("--umap-points", 5)])
def test_throughput_refuses_what_it_could_not_compare(argv, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, throughput, *argv)


def test_the_usual_pictures_reach_workers_that_are_not_forked(photos):
    steps = [*throughput.crop_and_flip(32), transforms.ToTensor()]
    pictures = throughput.Pictures(photos, torch.arange(len(photos)), steps)
    again = pickle.loads(pickle.dumps(pictures))  # macOS, Windows, Python 3.14
    image, label = again[3]
    assert (image.shape, label, len(again)) == ((3, 32, 32), 3, len(photos))
    pictures.transform = transforms.ToTensor()
    assert torch.equal(pictures[3][0], common.to_float(photos[3:4])[0])


def test_time_to_accuracy_counts_training_alone_and_tests_evaluation_images(
        clock, tree, tmp_path, monkeypatch):
    images = []
    predict = common.predict

    def noted(model, some, *rest):
        images.append(some)
        return predict(model, some, *rest)

    monkeypatch.setattr(common, "predict", noted)
    data = common.load_data("folder", tree, torch.device("cpu"))
    split = common.split_data(data, 0.5, 0)
    n = len(split.train_labels)
    started(monkeypatch, time_to_accuracy, "--output", tmp_path, "--usual-epochs", 3,
            *on_tree(tree, "unused", "--epochs", 2, "--device", "cpu"))
    rows = [line.split(",") for line in
            (tmp_path / "time_to_accuracy.csv").read_text(encoding="utf-8").splitlines()[1:]]
    assert [row[:2] for row in rows] == [["ours", "1"], ["usual", "1"], ["ours", "2"],
                                         ["usual", "2"], ["usual", "3"]]
    for name, epoch, seen, minutes, _ in rows:
        assert int(seen) == n * int(epoch)
        if name == "usual":
            assert float(minutes) == pytest.approx(n * int(epoch) / 60, rel=1e-3)
    evaluated = {image.numpy().tobytes() for some in images for image in some}
    assert evaluated == {image.numpy().tobytes() for image in split.eval_images}
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 5000
    assert "ends at" in (tmp_path / "time_to_accuracy.md").read_text(encoding="utf-8")


def test_losses_runs_what_is_not_there_and_binds_nobody_to_a_command_that_failed(
        narrow, tree, tmp_path, monkeypatch):
    ran = []

    def run(command, cwd, check):
        code, _, _ = call(command[1].removesuffix(".py"), command[2:])
        ran.append((command[1], code))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(losses, "subprocess", types.SimpleNamespace(run=run))
    monkeypatch.setattr(losses, "TESTS", [*losses.TESTS, "--attack-images", "10"])
    argv = ["--results-dir", tmp_path / "losses", "--output", tmp_path / "losses.md", "--losses",
            "cross-entropy", "angular + proxies", "--epochs", 1, "--"]
    training = on_tree(tree, "unused")[:-2]
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, losses, *argv, "--no-such-flag")
    assert ran == [("part1_baseline.py", 2)]
    ran.clear()
    started(monkeypatch, losses, *argv, *training)
    assert ran == [("part1_baseline.py", 0), ("part2_robustness.py", 0),
                   ("part4_angular.py", 0), ("part2_robustness.py", 0)]
    text = (tmp_path / "losses.md").read_text(encoding="utf-8")
    assert text.count("\n| cross-entropy (") == text.count("\n| angular + proxies (") == 1
    started(monkeypatch, losses, *argv, *training)
    assert len(ran) == 4  # all is there
    with pytest.raises(arguments.UsageError, match="another command.*another --results-dir"):
        started(monkeypatch, losses, *argv, *training, "--lr", 0.01)
    assert len(ran) == 4


def test_losses_has_the_parts_own_accuracy_as_its_p_value_has():
    found = losses.values(ROOT / "results/reference/seed3", "part1")
    assert found["test"] == 0.7741  # part 2, whose batches round otherwise, has 0.7742
    assert found["FGSM 2"] == 0.306 and found["PGD 8"] == 0.03


@pytest.mark.parametrize("library", [False, True])
def test_angular_measures_both_losses(library):
    results = queue.SimpleQueue()
    angular.measure(library, 40, 1, results)
    seconds, megabytes = results.get()
    assert seconds > 0 and megabytes >= 0
