"""Files: what is written is complete, what is read is checked, what is the user's stays."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import checkpoints
import common
import part2_robustness
import part4_angular
import storage
from arguments import RunError, UsageError

import numpy as np
import pytest
import torch
from conftest import META, meta_of
from torch import nn

from .conftest import (
    ROOT,
    call,
    contents,
    count,
    is_sentence,
    on_checkpoint,
    on_tree,
    write_tree,
)

pytestmark = pytest.mark.usefixtures("narrow")
CPU = torch.device("cpu")


# ---- complete or absent -------------------------------------------------------------------------


def fail_at(monkeypatch, owner, name, when=lambda *args: True, error=errno.ENOSPC):
    """Makes a function raise OSError where `when` says so of its arguments."""
    honest = getattr(owner, name)

    def failing(*args, **keywords):
        if when(*args):
            raise OSError(error, os.strerror(error))
        return honest(*args, **keywords)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("failure", ["written", "flushed", "named"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.csv"
    storage.write_rows(path, [{"x": 1.23456789}])
    assert path.read_bytes() == b"x\n1.23457\n"
    rows = [{"x": 2}, {"x": 3}]
    if failure == "written":
        fail_at(monkeypatch, storage.csv.DictWriter, "writerow", lambda writer, row: row["x"] == 3)
    elif failure == "flushed":
        fail_at(monkeypatch, os, "fsync")
    else:
        fail_at(monkeypatch, checkpoints.Path, "replace")
    with pytest.raises(RunError, match=r"a.csv: No space left on device; what was there before"):
        storage.write_rows(path, rows)
    assert path.read_bytes() == b"x\n1.23457\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_measure_that_only_some_epochs_have_is_a_column(tmp_path):
    """As where a student's history has one in every fifth epoch: the table comes after the last."""
    storage.write_rows(tmp_path / "a.csv", [{"epoch": 1}, {"epoch": 2, "norm": 0.5}, {"epoch": 3}])
    assert (tmp_path / "a.csv").read_text() == "epoch,norm\n1,\n2,0.5\n3,\n"


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.pt"
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, checkpoints\n"
            f"while True: checkpoints.write({str(path)!r}, {{'weights': torch.ones(1_000_000)}})")
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        while not path.exists():
            time.sleep(0.01)
        for _ in range(count(10, 100)):
            time.sleep(0.013)  # whole at every moment while it is replaced
            assert checkpoints.read(path, CPU)["weights"].sum() == 1_000_000
        writer.send_signal(signal.SIGKILL)
    assert checkpoints.read(path, CPU)["weights"].sum() == 1_000_000
    storage.write_rows(tmp_path / "state.csv", [{"x": 1}])
    checkpoints.write(path, {})  # what the kill left is used up by the next write
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.csv", "state.pt"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*a.csv.*choose another directory"):
        storage.write_rows(tmp_path / "file" / "a.csv", [{"x": 1}])


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoints.write(path, {"n": 1})

    def save(content, to):
        to.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 1")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match=r"a.pt: disk full, .* is unchanged; .*--resume"):
        checkpoints.write(path, {"n": 2})
    assert checkpoints.read(path, CPU)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_one_flipped_bit_is_noticed(tmp_path):
    """Of a state there is no hash of weights, as a checkpoint has one."""
    run = run_in(tmp_path)
    path = run.path("_state.pt")
    checkpoints.write(path, {"parts": torch.zeros(1000)})
    assert checkpoints.read(path, "cpu")["parts"].sum() == 0
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a checkpoint .*damaged .*; leave --resume out"):
        checkpoints.resume(run, {}, torch.Generator())
    with pytest.raises(UsageError, match="not a checkpoint .*damaged .*; leave --resume out"):
        checkpoints.resume_finished(run)


def test_a_state_is_no_checkpoint_and_named(tmp_path):
    save_state(run_in(tmp_path), {"model": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match="the state of a run, which --resume continues"):
        common.load_checkpoint(tmp_path / "x_state.pt", CPU)


def test_a_checkpoint_of_another_network_says_what_differs(tmp_path):
    path = tmp_path / "a.pt"
    weights = common.Model(10).state_dict() | {"backbone.layer9.weight": torch.zeros(1)}
    checkpoints.write(path, {"meta": meta_of(common.Model(10)), "model": weights})
    with pytest.raises(UsageError, match=r"another network .* has backbone.layer9.weight \(1 "):
        common.load_checkpoint(path, CPU)
    weights = common.Model(10).state_dict()  # as of an EMBEDDING_DIM of 10
    weights |= {"head.means": torch.zeros(10, 10), "head.scale": torch.ones(())}
    checkpoints.write(path, {"meta": META | {"weights": "", "head": "class_means"},
                             "model": weights})
    with pytest.raises(UsageError, match=r"fc\.weight is not finite or of another type or shape"):
        common.load_checkpoint(path, CPU)


@pytest.mark.parametrize("name", ["hpu", "privateuseone", "mps:9", "abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_a_short_sentence(name):
    with pytest.raises(UsageError, match=f"--device {name}: not usable") as error:
        common.pick_device(name)
    assert len(str(error.value)) < 200


# ---- checkpoints and states ---------------------------------------------------------------------


def run_in(folder, resume=True, **args):
    """What a state asks of a run."""
    return types.SimpleNamespace(
        path=lambda ending: folder / f"x{ending}", args={"resume": resume, "epochs": 5} | args,
        amp="off", device=CPU, split_hash="abc", weights="0" * 12, versions={})


def save_state(run, parts):
    generator = torch.Generator()
    checkpoints.save_state(run, [{"loss": 1.0}] * 3, parts, generator)
    return generator


@pytest.mark.parametrize("now", [
    {"model": nn.Linear(3, 2)}, {"model": nn.Linear(2, 2), "criterion": nn.Linear(2, 2)},
    {"model": nn.Linear(2, 2, bias=False)}])
def test_a_state_of_other_code_is_refused_in_one_sentence(tmp_path, now):
    before = {"model": nn.Linear(2, 2)}
    run = run_in(tmp_path)
    generator = save_state(run, before)
    assert checkpoints.resume(run, before, generator) == [{"loss": 1.0}] * 3
    with pytest.raises(UsageError, match=r"^--resume: .*x_s.*other code.*leave --resume out.*$"):
        checkpoints.resume(run, now, generator)


@pytest.mark.parametrize(("before", "now", "said"), [
    ({"lr": 0.1}, {"lr": 0.3}, "had --lr 0.1, this one has 0.3"),
    ({"augment": True}, {"augment": False}, "had --augment True, this one has False"),
    ({"severities": [1, 2]}, {"severities": [3]}, "had --severities 1 2, this one has 3"),
    ({}, {"loss": "arcface"}, "had --loss None, this one has arcface"),
    ({"shares": {"rotation": 4}}, {"shares": {"rotation": 2}},
     r"had SHARES \(part3_augmented.py\) {'rotation': 4}, this one has {'rotation': 2}")])
def test_a_state_of_other_arguments_is_refused_with_what_it_had(tmp_path, before, now, said):
    parts = {"model": nn.Linear(2, 2)}
    generator = save_state(run_in(tmp_path, **before), parts)
    with pytest.raises(UsageError, match=f"{said}; set it back, or leave --resume out"):
        checkpoints.resume(run_in(tmp_path, **now), parts, generator)


@pytest.mark.parametrize(("history", "said"), [
    ([{}] * 3, "an unfinished run (3 of 5 epochs done) will be replaced"), ([{}] * 5, ""),
    (3, "not a state that this code can continue"),
    (None, "not a state that this code can continue")])
def test_without_resume_an_unfinished_state_stays_and_is_announced(tmp_path, capsys, history, said):
    run = run_in(tmp_path, resume=False, lr=0.9)
    path = run.path("_state.pt")
    parts = {"model": nn.Linear(2, 2)}
    generator = save_state(run_in(tmp_path, lr=0.1), parts)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"history": history}, path)
    before = path.read_bytes()
    assert checkpoints.resume(run, parts, generator) == []
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n") == bool(said)
    assert path.read_bytes() == before


def test_a_resumed_training_draws_what_it_would_have_drawn(tmp_path):
    """From its generator and, as a student's line may, from torch's own."""
    generator = torch.Generator().manual_seed(1)
    checkpoints.save_state(run_in(tmp_path), [], {}, generator)
    expected = torch.rand(3), torch.rand(3, generator=generator)
    torch.manual_seed(2)
    resumed = torch.Generator()
    checkpoints.resume(run_in(tmp_path), {}, resumed)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=resumed), expected[1])


def test_nothing_to_resume_is_said(tmp_path, capsys):
    for wanted in (True, False):
        run = run_in(tmp_path, wanted)
        assert checkpoints.resume(run, {}, None) == []
        assert checkpoints.resume_finished(run) == {}
    said = f"--resume: no {tmp_path / 'x_state.pt'} to continue, so this run starts anew"
    assert capsys.readouterr().out.splitlines() == [said, said]


@pytest.mark.parametrize(("part", "others"), [
    (part4_angular, {"amp", "data_dir", "no_part2", "umap_points"}),
    (part2_robustness, {"checkpoint", "batch_size", "cifar10c"})])
def test_whatever_changes_a_run_is_in_its_identity(part, others):
    """A checkpoint counts by its weights, not by its name; CIFAR-10-C's files by their pixels."""
    def identity(args=None, **others):
        run = vars(run_in(None)) | {"args": values | (args or {})} | others
        return checkpoints.identity(types.SimpleNamespace(**run))

    values = vars(part.parse_args([]))
    del values["command"]
    without_effect = {name for name in values if identity({name: "x"}) == identity()}
    assert without_effect == {"device", "results_dir", "resume", "no_umap", *others}
    for other in ({"amp": "bf16"}, {"device": torch.device("cuda")}, {"split_hash": "abd"}):
        assert identity(**other) != identity()  # what --amp and --device came to
    changed = identity(weights="1" * 12)
    assert (changed != identity()) == (part is part2_robustness)


@pytest.mark.parametrize("finished", [[], None, 7])
def test_an_odd_state_of_part_2_is_announced_too(tmp_path, capsys, finished):
    run = run_in(tmp_path)
    del run.args["epochs"]
    checkpoints.write(run.path("_state.pt"), {"identity": checkpoints.identity(run),
                                              "finished": finished})
    run.args["resume"] = False
    assert checkpoints.resume_finished(run) == {}
    assert "will be replaced" in capsys.readouterr().out
    if finished != []:
        run.args["resume"] = True
        with pytest.raises(UsageError, match="does not fit"):
            checkpoints.resume_finished(run)


# ---- one writer ---------------------------------------------------------------------------------

HOLD = """
import sys; sys.path.insert(0, {root!r})
import checkpoints
try:
    checkpoints.lock({folder!r}, {name!r})
    print("held", flush=True)
except checkpoints.UsageError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def holder(folder, name):
    """Another process that takes a lock and keeps it until its input ends."""
    code = HOLD.format(root=str(ROOT), folder=str(folder), name=name)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE)


def test_two_runs_into_the_same_files_are_refused(tree, mine):
    """Two trainings of a part; part 2 while the part it tests is trained; part 2 twice."""
    before = contents(mine)
    for name, script, argv in (
            ("part1", "part1_baseline", on_tree(tree, mine)),
            ("part1", "part2_robustness", on_checkpoint(mine / "part1.pt", mine)),
            ("part2", "part2_robustness", on_checkpoint(mine / "part1.pt", mine))):
        with holder(mine, name) as other:
            assert other.stdout.readline() == "held\n"
            code, error, _ = call(script, argv)
            assert code == 2
            assert f"another run is writing {mine}/{name}.*" in error
            assert not checkpoints.LOCKS
            if script == "part2_robustness" and name == "part1":  # another part's files are free
                more = on_checkpoint(mine / "part3.pt", mine, "--perturbations", "grayscale")
                assert call("part2_robustness", more)[0] == 0
            other.kill()
        if name == "part1" and script == "part1_baseline":
            assert contents(mine) == before
    for name in ("part1", "part2"):  # free again once that run is gone
        checkpoints.lock(mine, name)
        os.close(checkpoints.LOCKS.pop(mine / f".{name}.lock"))


# ---- what is the user's -------------------------------------------------------------------------

USERS = ("part2_notes.md", "part2_backup/part2.csv", "part1_state-old.pt", ".part1_state-x.pt",
         "part2_umap.png.bak", "part3_robustness_mine.csv", "part2 (copy).csv", "part10.csv",
         "part1.pt.old", ".part2.tmp", "part2_fgsm.svg", "part3_robustness_state.pt.txt",
         "comparison_old.csv", "summary.md~", "notes/part2_umap.png", "PART2.txt", "part2_.png",
         "part1_history.xlsx", ".hidden", "part4.ods")


def test_the_users_files_survive_training_and_testing_byte_for_byte(tree, mine):
    for name in USERS:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_bytes(f"mine: {name}".encode() + os.urandom(20))
    umap = mine / "part2_umap.png"
    umap.mkdir()  # a folder of the name of a figure
    (umap / "inside").write_text("mine")
    before = {name: (mine / name).read_bytes() for name in (*USERS, "part2_umap.png/inside")}
    old = (mine / "part1.pt").read_bytes()
    (mine / "part1_umap.npz").write_bytes(b"of a run with UMAP")

    code, error, out = call("part1_baseline", on_tree(tree, mine, "--seed", 5))
    assert code == 0, error
    assert (mine / "part1.pt").read_bytes() != old
    said = " ".join(line for line in out.splitlines() if line.startswith("Removed"))
    gone = {"part2.csv", "part2.json", "part2_correct.npz", "part2_severities.png",
            "part2_examples.png", "part2_fgsm.png", "part2_adversarial.png", "part1_umap.npz"}
    for name in gone:
        assert name in said
        assert not (mine / name).exists()
    for run in ("part1", "part3"):
        code, error, out = call("part2_robustness", on_checkpoint(mine / f"{run}.pt", mine))
        assert code == 0, error
    assert call("part1_baseline", on_tree(tree, mine, "--seed", 6))[0] == 0
    umapped = [word for word in on_checkpoint(mine / "part1.pt", mine) if word != "--no-umap"]
    code, error, out = call("part2_robustness", umapped)
    assert code == 0, error
    assert "part2_umap.png: not drawn" in out
    for name, content in before.items():
        assert (mine / name).read_bytes() == content, name


@pytest.mark.parametrize("name", ["part1.pt", "part1_state.pt", "part1_history.csv",
                                  "part1_correct.npz", "part1_confusion.png", "part1.json"])
def test_a_folder_of_the_name_of_a_file_is_one_sentence_and_stays(tree, tmp_path, name):
    results = tmp_path / "results"
    (results / name).mkdir(parents=True)
    (results / name / "inside").write_text("mine")
    code, error, out = call("part1_baseline", on_tree(tree, results))
    if name.endswith(".png"):  # no figure costs a run
        assert code == 0, error
        assert f"{name}: not drawn" in out
        assert (results / "part1.pt").is_file()
    else:
        assert code in (1, 2)
        assert is_sentence(error)
        assert name in error
    assert (results / name / "inside").read_text() == "mine"
    assert not [p.name for p in results.iterdir() if ".tmp" in p.name]


# ---- tables that another program saved ----------------------------------------------------------


def resaved(text, how):
    """A table's bytes as another program would save them, or damaged."""
    lines = text.splitlines()
    if how == "semicolons":
        return text.replace(",", ";").encode()
    if how == "Latin-1":
        return text.replace("accuracy", "Pr\u00e4zision").encode("latin-1")
    if how == "UTF-16":
        return text.encode("utf-16")
    if how == "missing column":
        return "\n".join(line.rsplit(",", 1)[0] for line in lines).encode()
    if how == "columns in another order":
        return "\n".join(",".join(reversed(line.split(","))) for line in lines).encode()
    if how == "cut after its header":
        return lines[0].encode()
    if how == "cut in the middle":
        return text.encode()[: len(text) // 2]
    if how == "Excel-mangled hash":
        return "\n".join([lines[0]] + [line.rsplit(",", 1)[0] + ",1.23E+11" for line in lines[1:]]
                         ).encode()
    if how == "decimal commas":
        return text.replace("0.", '"0,').replace(',"0,', ',"0,', 1).encode()
    if how == "text for a number":
        return (text + lines[-1].replace(lines[-1].split(",")[7], "good") + "\n").encode()
    changed = {"an accuracy of 200": {7: "200", 9: "210"}, "no images": {10: "0"},
               "a value above its interval": {7: "0.999"}, "a severity of 03": {4: "03"},
               "a value below its interval": {8: "1.5"}, "a lost zero of a hash": {14: 11 * "1"},
               "a cell too many": {14: 12 * "1" + ",x"}, "an unknown part": {0: "part9"},
               "a hash of other letters": {12: 12 * "g"},
               "a class's accuracy of 200": {6: "accuracy of ant", 7: "200"}}
    if how in changed:
        words = next(line for line in lines if ",accuracy," in line).split(",")
        for place, word in changed[how].items():
            words[place] = word
        return (text + ",".join(words) + "\n").encode()
    return {"empty": b"", "binary": bytes(range(256)) * 20, "a page": b"<html></html>"}[how]


@pytest.mark.parametrize("how", [
    "semicolons", "Latin-1", "UTF-16", "missing column", "columns in another order",
    "cut in the middle", "cut after its header", "Excel-mangled hash", "decimal commas",
    "text for a number", "an accuracy of 200", "a value above its interval",
    "a value below its interval", "no images", "a severity of 03", "a lost zero of a hash",
    "a cell too many", "an unknown part", "a hash of other letters",
    "a class's accuracy of 200", "empty", "binary", "a page"])
@pytest.mark.parametrize("name", ["part2.csv", "part3.csv"])
def test_a_table_saved_by_another_program_is_one_sentence_before_any_training(
        tree, mine, monkeypatch, name, how):
    text = (mine / name).read_text(encoding="utf-8")
    (mine / name).write_bytes(resaved(text, how))
    refused_before_training(tree, mine, monkeypatch, name)


def test_a_table_with_a_byte_order_mark_and_other_line_ends_is_read(mine):
    rows = storage.read_all(mine)
    for path in (mine / "part1.csv", mine / "part2.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert storage.read_all(mine) == rows


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 10_000, b"\xff\xfe{",
                                     b'{"args": 1, "command": "x", "weights": "", "versions": {}}'])
def test_a_damaged_record_is_one_sentence_before_any_training(tree, mine, monkeypatch, content):
    (mine / "part3.json").write_bytes(content)
    refused_before_training(tree, mine, monkeypatch, "part3.json")


def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path):
    """As where a student's history has a mean that numpy returned."""
    path = tmp_path / "part1_state.pt"
    checkpoints.write(path, {"history": [{"loss": 1.0}]})
    with pytest.raises(UsageError, match="part1_state.pt could not be read again.* of numpy"):
        checkpoints.write(path, {"history": [{"loss": np.mean([1.0, 3.0])}]})
    assert checkpoints.read(path, "cpu")["history"] == [{"loss": 1.0}]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["empty", "text", "cut", "an array", "numbers", "a matrix",
                                     "no weights"])
def test_a_damaged_file_of_correct_images_is_one_sentence_before_any_training(
        tree, mine, monkeypatch, content):
    path = mine / "part3_correct.npz"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif content == "an array":
        np.save(mine / "x.npy", np.arange(3))
        shutil.move(mine / "x.npy", path)
    elif content == "numbers":
        np.savez(path, weights="0" * 12, part1="none", **{"test/clean/": np.arange(3)})
    elif content == "a matrix":
        np.savez(path, weights="0" * 12, part1="none", **{"test/clean/": np.zeros((3, 3), bool)})
    elif content == "no weights":
        np.savez(path, **{"test/clean/": np.zeros(3, bool)})
    else:
        path.write_bytes(b"" if content == "empty" else b"hello")
    refused_before_training(tree, mine, monkeypatch, "part3_correct.npz")


def refused_before_training(tree, results, monkeypatch, name):
    before = contents(results)
    monkeypatch.setattr(common, "Model", None)  # nothing is trained
    code, error, _ = call("part1_baseline", on_tree(tree, results))
    assert code == 2, error
    assert is_sentence(error)
    assert name in error
    assert "move it away; its part will write it again" in error
    assert contents(results) == before


def test_records_are_utf_8_with_their_names_as_they_are(tmp_path):
    data = write_tree(tmp_path / "tree", classes=("ant", "Stra\u00dfe"))
    assert call("part1_baseline", on_tree(data, tmp_path / "results"))[0] == 0
    text = (tmp_path / "results/part1.json").read_text(encoding="utf-8")
    assert '"Stra\u00dfe"' in text  # not "Stra\\u00dfe"
    assert storage.read_record(tmp_path / "results", "part1") == json.loads(text)
    assert json.loads(text)["sizes"] == {"training": 6, "evaluation": 6, "test": 12}
