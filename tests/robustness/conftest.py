"""What the robustness tests share: a network that trains in seconds, small data, calls of parts.

Heavy counts (kills, damaged files, generated trees) are at about a tenth unless FULL=1 is set, as
`make test-all` does; those tests have the marker `full`.
"""

import contextlib
import csv
import importlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import arguments
import checkpoints
import common
import plots
import report

import numpy as np
import pytest
import torch
import torchvision.models
from hypothesis import HealthCheck
from PIL import Image
from torch import nn

ROOT = Path(common.__file__).parent
PARTS = ("part1_baseline", "part2_robustness", "part3_augmented", "part4_angular")
TRAINING = ("part1_baseline", "part3_augmented", "part4_angular")
# float32, since a precision that is chosen by a measurement may be another one under load
DIGITS = ["--dataset", "digits", "--quick", "--umap-points", 60, "--amp", "off"]
QUIET = {"deadline": None, "derandomize": True, "database": None,
         "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def count(few, full):
    """How often a heavy test tries: `full` times under `make test-all`, else `few`."""
    return full if os.environ.get("FULL") == "1" else few


class Narrow(nn.Module):
    """One convolution under ResNet18's names: all that plumbing needs, in milliseconds."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images):
        outputs = self.maxpool(self.bn1(self.conv1(images)).relu())
        return self.fc(self.avgpool(outputs).flatten(1))


def plane(features, seed, neighbours=15):
    """In UMAP's place, which takes longer to compile than all else here to run."""
    return features[:, :2].cpu().numpy()


def write_dot(figure, path, caption):
    """In the place of plots.save, which lays out a whole figure."""
    with checkpoints.atomic(path) as temporary:
        Image.new("L", (1, 1)).save(temporary)


def make_narrow(monkeypatch):
    monkeypatch.setattr(torchvision.models, "resnet18", Narrow)
    monkeypatch.setattr(common, "umap_coordinates", plane)
    monkeypatch.setattr(plots, "save", write_dot)


@pytest.fixture
def narrow(monkeypatch):
    make_narrow(monkeypatch)


# ---- data ---------------------------------------------------------------------------------------


def write_tree(folder, classes=("ant", "bee"), n=6, side=32):
    """A tree of PNG files: n random images of every class in train and in test."""
    pixels = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in classes:
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                image = pixels.randint(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(image).save(place / f"{i}.png")
    return folder


def on_tree(data, results, *more):
    """The command line of a short training on a tree."""
    return ["--dataset", "folder", "--data-dir", data, "--train-fraction", 0.5, "--epochs", 1,
            "--batch-size", 4, "--no-umap", "--amp", "off", "--results-dir", results, *more]


def on_checkpoint(checkpoint, results, *more):
    """The command line of a short part 2."""
    return ["--checkpoint", checkpoint, "--results-dir", results, "--no-umap", "--perturbations",
            "cutout", "rotation", "--eps-255", 8, "--attack-images", 10, "--audit-images", 10,
            *more]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data") / "tree")


@pytest.fixture(scope="session")
def trained(tree, tmp_path_factory):
    """A results directory of parts 1 (trained and tested) and 3 on `tree`; copy before writing."""
    results = tmp_path_factory.mktemp("trained") / "results"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        for script, argv in (("part1_baseline", on_tree(tree, results)),
                             ("part2_robustness", on_checkpoint(results / "part1.pt", results)),
                             ("part3_augmented", on_tree(tree, results, "--no-part2"))):
            code, error, _ = call(script, argv)
            assert code == 0, error
    return results


@pytest.fixture(scope="session")
def other_seed(tree, tmp_path_factory):
    """Part 1's checkpoint with seed 1, alone in its directory."""
    results = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        code, error, _ = call("part1_baseline", on_tree(tree, results, "--seed", 1))
        assert code == 0, error
    return results / "part1.pt"


@pytest.fixture
def mine(trained, tmp_path):
    """A copy of `trained` that a test may write to."""
    return Path(shutil.copytree(trained, tmp_path / "mine"))


# ---- a part in this process ---------------------------------------------------------------------


def call(script, argv):
    """Runs a part as its command line does: (exit code, the error, all that it printed).

    What raises here would be a traceback there.
    """
    module = importlib.import_module(script)
    with contextlib.suppress(AttributeError):  # of a test's own
        report.versions.cache_clear()  # as in a process of its own
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (contextlib.redirect_stderr(err), contextlib.redirect_stdout(out),
          warnings.catch_warnings()):
        warnings.simplefilter("ignore")
        try:
            arguments.run(lambda: module.main(list(map(str, argv))))
        except SystemExit as stop:
            code = stop.code
    before, colon, error = err.getvalue().rpartition(": error: ")
    return code, (colon[2:] + error).strip("\n"), out.getvalue()


def is_sentence(error):
    return error.startswith("error: ") and "\n" not in error and len(error) < 1500


def contents(folder):
    """{path: bytes} of all files below a folder but its locks."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix != ".lock"}


def stamps(folder):
    """Faster than contents: which files there are, and when each was written."""
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()
            if p.suffix != ".lock"}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- a part in a process of its own -------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # has imported everything: a start costs nothing
FORKS.set_forkserver_preload([*PARTS, "robustness.conftest", "sklearn.metrics", "scipy.stats"])


def start_server():
    """Starts the server with our folders in its path, without which it imports nothing of ours."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()


def work(script, argv, folder, prepare):
    os.chdir(folder)
    sys.stdout = sys.stderr = open("log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make_narrow(pytest.MonkeyPatch())
    sys.argv = [script, *argv]
    if prepare:
        prepare()
    arguments.run(importlib.import_module(script).main)


def start(script, argv, folder, prepare=None):
    """Starts a part in `folder`, where it writes a log; the process."""
    folder.mkdir(exist_ok=True)
    start_server()
    process = FORKS.Process(target=work, args=(script, [*map(str, argv)], folder, prepare))
    process.start()
    return process


def end(process, folder, code=0):
    """Waits for a part to end as expected; returns its log."""
    process.join(300)
    log = (folder / "log").read_text(encoding="utf-8")
    assert process.exitcode == code, log
    return log


def wait_for(condition, process=None):
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit
        assert process is None or process.is_alive()
        time.sleep(0.005)


NARROW_SCRIPT = """
import runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
sys.argv = sys.argv[1:]
import pytest
from robustness import conftest
conftest.make_narrow(pytest.MonkeyPatch())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(name, *argv, narrow=True, options=(), **keywords):
    """Runs a script in a fresh interpreter: (exit code, stdout, stderr), as bytes."""
    command = [sys.executable, *options]
    if narrow:
        command += ["-c", NARROW_SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"))]
    command += [str(ROOT / f"{name}.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, **keywords)
    return done.returncode, done.stdout, done.stderr
