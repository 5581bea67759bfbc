"""Trees and results directories by chance: no traceback, nothing lost, no weights mixed."""

import os
import random
import shutil

import checkpoints
import common
import comparison
import report
import storage
import summary
from arguments import RunError, UsageError

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from .conftest import (
    QUIET,
    call,
    contents,
    count,
    is_sentence,
    make_narrow,
    on_checkpoint,
    on_tree,
)
from .test_hostile import mutated

OURS = ("part1.pt", "part1.csv", "part1.json", "part1_correct.npz", "part1_history.csv",
        "part1_state.pt", "part2.csv", "part2.json", "part2_correct.npz", "part3.pt", "part3.csv",
        "part3.json", "part3_correct.npz", "comparison.csv", "summary.md", "summary.html")
FIGURES = ("comparison.png", "part1_umap.png", "part2_umap.png", "part2_fgsm.png")
WRITTEN = {f"{name}{ending}" for part in common.PARTS
           for name in (part, storage.robustness_name(part))
           for ending in (*report.ROBUSTNESS_FILES, ".pt", "_history.csv", "_history.png",
                          "_confusion.png")}
WRITTEN |= {"comparison.csv", "comparison.png", "summary.md", "summary.html"}
HARM = st.sampled_from(["other"] * 8 + ["absent"] * 3 + ["mutate", "cut", "empty", "noise", "swap",
                                                         "folder"])
HARMS = st.dictionaries(st.sampled_from(OURS), HARM, max_size=4)  # most of a folder is whole
USERS = st.from_regex(r"\A\.?(part[1-4]|summary|comparison|notes|\u00e9)[a-z_0-9 .~-]{0,12}\Z")


@pytest.fixture(scope="module", autouse=True)
def narrow_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        yield


@pytest.fixture(scope="module")
def sources(trained, tree, tmp_path_factory):
    """(results of seed 0, results of seed 1 with the same parts)"""
    other = tmp_path_factory.mktemp("other") / "results"
    for script, argv in (
            ("part1_baseline", on_tree(tree, other, "--seed", 1)),
            ("part2_robustness", on_checkpoint(other / "part1.pt", other)),
            ("part3_augmented", on_tree(tree, other, "--seed", 1, "--no-part2"))):
        code, error, _ = call(script, argv)
        assert code == 0, error
    return trained, other


def harm(path, how, sources, chance):
    """Makes one file of a results directory another, or none."""
    ours, others = (source / path.name for source in sources)
    data = ours.read_bytes() if ours.is_file() else b""
    if how == "other" and others.is_file():
        data = others.read_bytes()
    elif how == "mutate" and data:
        data = mutated(data, chance)
    elif how == "cut":
        data = data[: chance.randrange(len(data) + 1)]
    elif how == "empty":
        data = b""
    elif how == "noise":
        data = chance.randbytes(chance.randrange(300))
    elif how == "swap":
        data = (sources[0] / chance.choice(OURS)).read_bytes()
    if how == "folder":
        path.mkdir()
        (path / "inside").write_bytes(b"mine")
    elif how != "absent" and (data or how != "keep"):
        path.write_bytes(data)


def hashes(path):
    """The weights that the files of one table claim."""
    return {row["weights"] for row in storage.read_table(path)}


def check_comparison(folder):
    """Whatever is in the folder: a comparison of one set of weights a part, or one sentence."""
    try:
        study = comparison.read_study(folder)
        summary.compare(folder)
    except (UsageError, RunError) as error:
        assert "\n" not in str(error)
        return
    table = storage.csv.DictReader((folder / "comparison.csv").read_text("utf-8").splitlines())
    for row in table:
        part = study.parts[row["part"]]
        assert row["weights"] == part.weights
        sources = [values for values in part.rows
                   if (values["split"], values["condition"], values["severity"], values["head"],
                       values["metric"]) == (row["split"], row["condition"], row["severity"],
                                             "own", "accuracy")]
        assert {values["weights"] for values in sources} == {row["weights"]}
        if row["p_holm"]:  # McNemar's test joined the images of the same weights
            for name in (row["part"], row["reference"]):
                theirs = study.parts[name]
                files = (name, storage.robustness_name(name))
                kept = [storage.read_correct(folder, file) for file in files]
                assert theirs.weights in {found.weights for found in kept if found}
    for part in study.parts.values():
        assert {row["weights"] for row in part.rows} == {part.weights}
        for record in (part.record, part.part2_record):
            assert record is None or record["weights"] == part.weights


@pytest.mark.full
@settings(max_examples=count(60, 1000), **QUIET)
@given(harms=HARMS, users=st.lists(USERS, max_size=4), seed=st.integers(0, 2**32),
       turn=st.integers(0, 9))
@example(harms={"part2.csv": "other"}, users=[], seed=0, turn=9)
@example(harms={"part1.csv": "other", "part3.json": "other"}, users=[], seed=0, turn=9)
@example(harms={"part2_correct.npz": "other"}, users=[], seed=0, turn=5)
def test_results_directories_by_chance(sources, tree, tmp_path_factory, harms, users, seed, turn):
    chance = random.Random(seed)
    folder = tmp_path_factory.mktemp("chance")
    for name in OURS:
        harm(folder / name, harms.get(name, "keep"), sources, chance)
    for name in FIGURES:
        if chance.random() < 0.3:
            harm(folder / name, chance.choice(("noise", "folder")), sources, chance)
    for name in users:
        if not (folder / name).exists() and name not in WRITTEN and ".tmp." not in name:
            (folder / name).write_bytes(b"mine: " + chance.randbytes(9))
    kept = {name: content for name, content in contents(folder).items() if name not in WRITTEN}
    before = contents(folder)
    resume = ["--resume"] if chance.random() < 0.3 else []
    if turn == 0:
        outcome = call("part1_baseline", on_tree(tree, folder, *resume))
    elif turn == 1:
        outcome = call("part3_augmented", on_tree(tree, folder, "--no-part2", *resume))
    elif turn < 5:
        checkpoint = chance.choice((*sources, folder)) / chance.choice(("part1.pt", "part3.pt"))
        outcome = call("part2_robustness", on_checkpoint(checkpoint, folder, *resume))
    else:
        outcome = 0, "", ""
    code, error, _ = outcome
    assert code in (0, 1, 2), outcome
    if code:
        assert is_sentence(error), error
    if code == 2:
        assert contents(folder) == before
    assert not checkpoints.LOCKS
    after = contents(folder)
    assert {name: after[name] for name in kept} == kept  # what the scripts did not write
    assert not [name for name in after if ".tmp." in name]
    check_comparison(folder)
    assert {name: contents(folder)[name] for name in kept} == kept
    shutil.rmtree(folder)


# ---- trees --------------------------------------------------------------------------------------

NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8)
KIND = st.sampled_from(["png"] * 8 + ["gray", "large", "text", "empty", "cut", "nested", "hidden",
                                      "link", "jpeg"])


def write_image(path, kind, chance):
    """One entry of a class folder; most are images."""
    random_pixels = np.frombuffer(chance.randbytes(12 * 9 * 3), np.uint8).reshape(12, 9, 3)
    image = Image.fromarray(random_pixels)
    if kind == "nested":
        path = path / "deeper" / path.name
        path.parent.mkdir(parents=True)
    elif kind == "hidden":
        path = path.with_name("." + path.name)
    if kind == "gray":
        image = image.convert("L")
    elif kind == "large":
        image = image.resize((70, 41))
    if kind == "text":
        path.write_bytes(b"no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "link":
        os.symlink("nowhere", path)
    else:
        image.save(path, "JPEG" if kind == "jpeg" else "PNG")
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:60])


@pytest.mark.full
@settings(max_examples=count(60, 1000), **QUIET)
@given(classes=st.lists(NAME, max_size=4, unique=True), n=st.integers(1, 5),
       kinds=st.lists(KIND, min_size=1, max_size=6), missing=st.integers(0, 12),
       fraction=st.floats(0.01, 1), seed=st.integers(0, 2**32))
def test_trees_by_chance(tmp_path_factory, classes, n, kinds, missing, fraction, seed):
    """Every tree is trained on, with its classes by name, or refused in one sentence."""
    chance = random.Random(seed)
    top = tmp_path_factory.mktemp("chance")
    data = top / "tree"
    for split in ("train", "test"):
        for c, name in enumerate(classes):
            if name in (".", "..") or (split == "test" and c == missing):
                continue
            place = data / split / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                write_image(place / f"{i}", chance.choice(kinds), chance)
    before = contents(data)
    argv = on_tree(data, top / "results", f"--train-fraction={fraction}")
    code, error, _ = call("part1_baseline", argv)
    assert code in (0, 1, 2)
    assert contents(data) == before
    if code:
        assert is_sentence(error), error
        assert not (top / "results").exists()
    else:
        _, meta = common.load_checkpoint(top / "results/part1.pt", "cpu")
        found = {row["metric"] for row in storage.read_table(top / "results/part1.csv")}
        assert {f"accuracy of {name}" for name in meta["classes"]} <= found
        images = len([name for name in before
                      if name.startswith("train/") and "/." not in name])
        record = storage.read_record(top / "results", "part1")
        assert record["sizes"]["training"] + record["sizes"]["evaluation"] == images
    shutil.rmtree(top)
