"""What the machine does to a run: no locks, no rights, a full disk, no memory, Ctrl-C, a pipe."""

import errno
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import arguments
import checkpoints
import common
import plots
import storage
import summary

import pytest
import torch

from .conftest import (
    ROOT,
    call,
    contents,
    end,
    is_sentence,
    on_checkpoint,
    on_tree,
    start,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("narrow")


def failure(number):
    return OSError(number, os.strerror(number))


def raising(error):
    def fail(*args, **keywords):
        raise error

    return fail


# ---- file systems with less than all ------------------------------------------------------------


def test_without_file_locks_a_run_warns_once_and_goes_on(tree, mine, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", raising(failure(errno.ENOLCK)))
    for name, argv in (("part3_augmented", on_tree(tree, mine, "--no-part2")),
                       ("part2_robustness", on_checkpoint(mine / "part1.pt", mine))):
        code, error, out = call(name, argv)
        assert code == 0, error
        assert out.count("no file locks here") == 1


def test_without_fcntl_a_run_goes_on(tree, mine, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    code, error, out = call("part1_baseline", on_tree(tree, mine))
    assert code == 0, error
    assert "no file locks here" in out


@pytest.mark.parametrize("owner", [pathlib.Path, os], ids=["Path", "os"])
@pytest.mark.parametrize("name", ["chmod", "unlink"])
def test_without_the_right_to_remove_or_chmod_a_run_goes_on(tree, mine, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, raising(failure(errno.EACCES)))
    code, error, out = call("part1_baseline", on_tree(tree, mine, "--seed", 4))
    assert code == 0, error
    if (owner, name) == (pathlib.Path, "unlink"):
        assert "part2.csv should be removed as results of earlier weights" in out
        assert "but cannot be (" in out
    code, error, out = call("part2_robustness", on_checkpoint(mine / "part3.pt", mine))
    assert code == 0, error
    assert (mine / "part3_robustness.csv").exists()


@pytest.mark.parametrize("lost", [("part2.csv",), ("part2.csv", "part2.json"),
                                  ("part2.csv", "part2_correct.npz")])
def test_what_part_2_wrote_of_former_weights_goes_without_its_table_too(tree, mine, lost):
    for name in lost:
        (mine / name).unlink()
    (mine / "part2_umap.npz").write_bytes(b"of a run with UMAP")
    code, error, out = call("part1_baseline", on_tree(tree, mine, "--seed", 4))
    assert code == 0, error
    assert "as results of earlier weights" in out
    assert not list(mine.glob("part2*"))


@pytest.mark.parametrize("name", ["part1_baseline", "part2_robustness"])
def test_a_directory_that_cannot_be_written_is_refused_at_once(tree, mine, monkeypatch, name):
    before = contents(mine)
    argv = on_tree(tree, mine)
    if name == "part2_robustness":
        argv = on_checkpoint(mine / "part1.pt", mine)
    monkeypatch.setattr(common, "predict", None)
    monkeypatch.setattr(common, "WeightAverage", None)
    monkeypatch.setattr(os, "open", raising(failure(errno.EROFS)))  # root may write anywhere
    code, error, _ = call(name, argv)
    assert code == 1, error
    assert is_sentence(error)
    assert "choose another --results-dir" in error
    assert contents(mine) == before


def refused_by_windows(winerror):
    error = PermissionError(errno.EACCES, "Access is denied")
    error.winerror = winerror
    return error


@pytest.mark.parametrize("winerror", [5, 32])
@pytest.mark.parametrize("times", [2, 99])
def test_a_file_that_windows_holds_open_for_a_moment_is_replaced(
        tmp_path, monkeypatch, winerror, times):
    """A scanner opens what was just written: a second later it can be replaced."""
    honest = pathlib.Path.replace
    tried = []
    waited = []

    def held_open(path, target):
        tried.append(target)
        if len(tried) <= times:
            raise refused_by_windows(winerror)
        return honest(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", held_open)
    monkeypatch.setattr(time, "sleep", waited.append)
    (tmp_path / "a.csv").write_text("before")
    if times == 2:
        storage.write_text(tmp_path / "a.csv", "after")
        assert len(tried) == 3
    else:  # open in Excel, say
        with pytest.raises(arguments.RunError, match="cannot write .*a.csv: Access is denied"):
            storage.write_text(tmp_path / "a.csv", "after")
        assert 1 < sum(waited) < 5
    expected = "after" if times == 2 else "before"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.csv": expected}


def test_what_other_systems_refuse_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "replace", raising(failure(errno.EACCES)))
    monkeypatch.setattr(time, "sleep", raising(AssertionError("waits")))
    with pytest.raises(arguments.RunError, match="Permission denied"):
        storage.write_text(tmp_path / "a.csv", "after")


# ---- a full disk --------------------------------------------------------------------------------


def fill_disk_at(monkeypatch, number):
    """The disk is full from the number-th write on; returns the list of what was written."""
    honest = os.fsync
    written = []
    safe = set()

    def fsync(file):
        info = os.fstat(file)
        if (info.st_ino, info.st_mtime_ns) in safe:  # nothing was written to it since
            return None
        written.append(os.readlink(f"/proc/self/fd/{file}"))
        safe.add((info.st_ino, info.st_mtime_ns))
        if len(written) > number:
            raise failure(errno.ENOSPC)
        return honest(file)

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    return written


def writes(name, argv, monkeypatch):
    """How many files a part writes."""
    with monkeypatch.context() as patch:
        written = fill_disk_at(patch, 10**9)
        assert call(name, argv)[0] == 0
    return written


def without_figures(found):
    return {name: content for name, content in found.items()
            if not name.endswith((".png", "_umap.npz"))}


@pytest.mark.parametrize("name", ["part1_baseline", "part2_robustness"])
def test_a_full_disk_at_any_write_is_one_sentence_and_earlier_results_stand(
        tree, mine, monkeypatch, name):
    """Each file is the one at which the disk is full; what was written before it is whole."""
    argv = on_tree(tree, mine, "--epochs", 2)
    if name == "part2_robustness":
        argv = on_checkpoint(mine / "part1.pt", mine)
    written = writes(name, argv, monkeypatch)
    ended = 0
    for number, file in enumerate(written):
        before = contents(mine)
        with monkeypatch.context() as patch:
            fill_disk_at(patch, number)
            code, error, out = call(name, argv)
        after = contents(mine)
        assert not [path for path in after if ".tmp" in path], file
        if code == 1:
            ended += 1
            assert is_sentence(error), error
            assert "No space left on device" in error
        else:  # no figure costs a run, nor the page that shows it
            assert code == 0, file
            assert file.endswith((".png", ".html")), file
            assert f"{file.rpartition('.')[2]}: not drawn" in out or ".html" in out
        for path, content in without_figures(before).items():
            if path in after and after[path] != content:
                assert is_whole(mine / path), path
    assert ended > 3
    code, error, _ = call(name, argv)  # with room again all is well
    assert code == 0, error


@pytest.mark.parametrize("name", ["part1_baseline", "part2_robustness"])
def test_a_full_disk_leaves_table_record_and_figures_of_one_run(tree, mine, monkeypatch, name):
    file, argv = "part1", on_tree(tree, mine, "--seed", 7)
    if name == "part2_robustness":
        file, argv = "part2", on_checkpoint(mine / "part1.pt", mine, "--norm", 2)
    former = shutil.copytree(mine, mine.with_name("former"))
    results = [path for path in contents(former)
               if path.startswith(file) and not path.endswith(".pt")]
    assert len(results) > 5
    tables = {path for path in results if path.endswith((".csv", ".json", ".npz"))}
    for number in itertools.count():
        with monkeypatch.context() as patch:
            written = fill_disk_at(patch, number)
            assert call(name, argv)[0] == 1
        before, after = contents(former), contents(mine)
        kept = {path for path in results if after.get(path) == before[path]}
        if not tables & kept:
            break
        assert kept == set(results), written[-1]
    assert written[-1].endswith("comparison.tmp.csv")  # all of the run's own files were in place
    code, _, out = call(name, [*argv, "--resume"])
    assert code == 0
    assert "Resumed after" in out


def is_whole(path):
    if path.suffix == ".pt":
        return checkpoints.read(path, "cpu") is not None
    if path.name.endswith("_history.csv") or path.name == "comparison.csv":
        return path.read_bytes().endswith(b"\n")
    if path.suffix == ".csv":
        return len(storage.read_table(path)) > 0
    return path.stat().st_size > 0


# ---- no memory ----------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    MemoryError(), MemoryError("Unable to allocate 9.3 GiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 99999 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


@pytest.mark.parametrize(("error", "where"), [
    *((error, "training") for error in OUT_OF_MEMORY), (OUT_OF_MEMORY[2], "prediction"),
    (OUT_OF_MEMORY[2], "attack")], ids=lambda value: str(value)[:20])
def test_out_of_memory_is_one_sentence_with_what_to_make_smaller(
        tree, mine, monkeypatch, error, where):
    before = contents(mine)
    name, argv = "part1_baseline", on_tree(tree, mine)
    if where == "training":
        monkeypatch.setattr(common.Amp, "step", raising(error))
    elif where == "prediction":
        monkeypatch.setattr(common, "predict_splits", raising(error))
    else:
        monkeypatch.setattr(common, "pgd", raising(error))
        name, argv = "part2_robustness", on_checkpoint(mine / "part1.pt", mine)
    code, sentence, _ = call(name, argv)
    assert code == 1
    assert is_sentence(sentence)
    assert "out of memory" in sentence
    assert "--batch-size" in sentence
    after = contents(mine)
    assert {path for path in before if after[path] != before[path]} <= {
        "part1_state.pt", "part1_history.csv"}


def test_no_memory_to_read_a_checkpoint_is_not_called_damage(mine, monkeypatch):
    monkeypatch.setattr(torch, "load", raising(torch.OutOfMemoryError("CUDA out of memory")))
    code, error, _ = call("part2_robustness", on_checkpoint(mine / "part1.pt", mine))
    assert code == 1
    assert "out of memory" in error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(tree, mine, monkeypatch, error):
    monkeypatch.setattr(common.Amp, "step", raising(error))
    with pytest.raises(type(error), match="a bug"):
        call("part1_baseline", on_tree(tree, mine))
    assert not checkpoints.LOCKS


@pytest.mark.parametrize("error", [MemoryError(), SystemError("numba")])
def test_a_umap_that_fails_costs_only_its_picture(mine, monkeypatch, error):
    monkeypatch.setattr(common, "umap_coordinates", raising(error))
    argv = [word for word in on_checkpoint(mine / "part1.pt", mine) if word != "--no-umap"]
    code, sentence, out = call("part2_robustness", argv)
    assert code == 0, sentence
    assert "UMAP failed" in out
    assert not (mine / "part2_umap.png").exists()


# ---- Ctrl-C -------------------------------------------------------------------------------------

INTERRUPTS = {
    "in the first epoch": ("part1_baseline", common.Amp, "step"),
    "while the state is saved": ("part1_baseline", checkpoints, "save_state"),
    "while the checkpoint is written": ("part1_baseline", torch, "save"),
    "in a figure": ("part1_baseline", plots, "new_figure"),
    "in UMAP": ("part2_robustness", common, "umap_coordinates"),
    "in perturbations": ("part2_robustness", common, "perturb"),
    "in the attack": ("part2_robustness", common, "pgd"),
    "in the comparison": ("part2_robustness", summary, "compare"),
    "in a lock": ("part1_baseline", checkpoints, "lock"),
    "while data is read": ("part1_baseline", common, "load_data")}


@pytest.mark.parametrize("where", INTERRUPTS)
def test_ctrl_c_anywhere_is_one_sentence_and_exit_code_130(
        tree, mine, monkeypatch, where):
    name, owner, function = INTERRUPTS[where]
    argv = on_tree(tree, mine)
    if name == "part2_robustness":
        argv = [word for word in on_checkpoint(mine / "part1.pt", mine) if word != "--no-umap"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--lr", "0.1", "--data-dir", "a b"])
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, raising(KeyboardInterrupt()))
        code, sentence, _ = call(name, argv)
    assert code == 130
    assert sentence.count("\n") == 0
    assert sentence.endswith(f"to continue: python {name}.py --lr 0.1 --data-dir 'a b' --resume")
    assert not [path for path in contents(mine) if ".tmp" in path]
    assert not checkpoints.LOCKS
    code, error, _ = call(name, [*argv, "--resume"])
    assert code == 0, error


def test_only_the_parts_are_said_to_resume(monkeypatch):
    for name, ending in (("part1_baseline.py", " --resume"), ("summary.py", "")):
        monkeypatch.setattr(sys, "argv", [f"a/{name}", "x"])
        assert arguments.resuming_command() == f"python a/{name} x{ending}"
    monkeypatch.setattr(sys, "argv", ["part1_baseline.py", "--resume", "x"])
    assert arguments.resuming_command() == "python part1_baseline.py --resume x"


def test_ctrl_c_to_a_process_at_work(tree, tmp_path):
    folder = tmp_path / "run"
    argv = on_tree(tree, "results", "--epochs", 10_000)
    process = start("part1_baseline", argv, folder)
    wait_for((folder / "results/part1_state.pt").exists, process)
    os.kill(process.pid, signal.SIGINT)
    log = end(process, folder, code=130)
    assert "to continue: python part1_baseline" in log
    assert "--resume" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("name", ["part1_baseline", "part4_angular", "summary"])
def test_ctrl_c_during_imports_is_one_sentence_and_exit_code_130(name):
    process = subprocess.Popen([sys.executable, "-v", ROOT / f"{name}.py", "--help"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    for line in process.stderr:
        if "import 'torch." in line:  # said by -v when a module of torch's is there
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    process.communicate()
    assert process.returncode == 130, said[-2000:]
    assert f"Interrupted. What is finished is kept; to continue: python {ROOT / name}.py" in said
    assert "Traceback" not in said


# ---- a pipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["| head -1", "2>&1 | head -1"])
def test_a_pipe_that_closes_is_one_sentence_and_exit_code_1(tree, tmp_path, ending):
    words = " ".join(map(str, on_tree(tree, tmp_path, "--epochs", 200, "--quick")))
    command = (f"set -o pipefail; {sys.executable} {ROOT}/part1_baseline.py {words} {ending}; "
               "exit ${PIPESTATUS[0]}")

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 1, done
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    if not ending.startswith("2"):
        assert "the program that read the output has ended; to continue: python" in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_error_of_the_machine_names_the_file_and_the_way_on(monkeypatch, capsys):
    def main():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/a.bin")

    monkeypatch.setattr(sys, "argv", ["part1_baseline.py"])
    with pytest.raises(SystemExit) as stop:
        arguments.run(main)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "/data/a.bin: Input/output error; what is finished is kept" in error
    assert error.rstrip().endswith("python part1_baseline.py --resume")

