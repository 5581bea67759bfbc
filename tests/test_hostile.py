"""Wrong arguments and files, by table and by chance: one sentence, an exit code, and nothing touched."""

import contextlib
import hashlib
import importlib
import io
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import arguments
import common

TRAINING = ("part1_baseline", "part3_augmented", "part4_angular")
EVERY = (*TRAINING, "part2_robustness")
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
         "derandomize": True, "database": None}


def call(script, argv):
    """Runs a part as its command line does: (exit code, the error on stderr). What raises here is a traceback there."""
    module, err = importlib.import_module(script), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            arguments.run(lambda: module.main(list(map(str, argv))))
        except SystemExit as stop:
            return stop.code, err.getvalue()[err.getvalue().rfind("error: "):].rstrip("\n")
    return 0, ""


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".lock"}


def stamps(folder):
    """Faster than hashes: which files there are, and when each was written."""
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir() if p.suffix != ".lock"}


def write_tree(folder, classes=("ant", "bee"), n=6):
    pixels = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pixels.randint(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good data, bad data, a good checkpoint and results that must stay as they are."""
    top = tmp_path_factory.mktemp("place")
    good = write_tree(top / "good")
    write_tree(top / "one_class", classes=("ant",))
    for name, damage in {
        "no_test": lambda d: [p.unlink() for p in (d / "test").rglob("*.png")],
        "zero_bytes": lambda d: (d / "train/ant/0.png").write_bytes(b""),
        "text": lambda d: (d / "train/bee/3.png").write_text("not an image"),
        "cut": lambda d: (d / "test/ant/1.png").write_bytes((d / "test/ant/1.png").read_bytes()[:90]),
        "other_classes": lambda d: (d / "test/bee").rename(d / "test/wasp"),
        "empty_class": lambda d: [p.unlink() for p in (d / "train/ant").iterdir()],
        "no_train": lambda d: (d / "train").rename(d / "training"),
    }.items():
        damage(write_tree(top / name))
    results = top / "results"
    assert call("part1_baseline", ["--dataset", "folder", "--data-dir", good, "--train-fraction", 0.5, "--epochs", 1,
                                   "--batch-size", 2, "--no-umap", "--amp", "off", "--results-dir", results])[0] == 0
    content = torch.load(results / "part1.pt", weights_only=True)
    meta, weights = content["meta"], content["model"]
    conv = weights["backbone.conv1.weight"]
    for name, changed in {
        "newer": {"version": 99}, "foreign": {"format": "another"}, "no_meta": {"meta": None},
        "no_model": {"model": {}},
        "nan": {"model": weights | {"backbone.conv1.weight": conv * float("nan")}},
        "integers": {"model": weights | {"backbone.conv1.weight": conv.int()}},
        "less": {"model": {k: v for k, v in weights.items() if k != "backbone.fc.bias"}},
        "outside": {"meta": meta | {"part": "../../part1"}}, "no_args": {"meta": meta | {"args": {}}},
        "dataset": {"meta": meta | {"args": meta["args"] | {"dataset": "imagenet"}}},
        "fraction": {"meta": meta | {"args": meta["args"] | {"train_fraction": float("nan")}}},
        "outputs": {"meta": meta | {"outputs": 10**12}}, "classes": {"meta": meta | {"classes": [1, 2]}},
        "another": {"meta": meta | {"split_hash": "000000000000"}},
    }.items():
        torch.save(content | changed, top / f"{name}.pt")
    torch.save(weights, top / "weights.pt")
    (top / "empty.pt").write_bytes(b"")
    (top / "text.pt").write_text("hello")
    whole = (results / "part1.pt").read_bytes()
    (top / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (top / "file").write_text("a file, not a folder")
    (results / "part1_state.pt").unlink()  # to have less to hash
    before = hashes(results)
    yield top
    assert hashes(results) == before


NUMBERS = [("--train-fraction", ("0", "-0.1", "1.01", "nan", "inf", "half", "1e-9", "0.999")),
           ("--batch-size", ("1", "0", "-3", "2.5", "nan")), ("--umap-points", ("49", "1e3", "-1")),
           ("--seed", ("-1", "4294967296", "x")), ("--split-seed", ("-1", "0.5")),
           ("--epochs", ("0", "-1", "1.5", "inf")), ("--lr", ("0", "-0.1", "nan", "inf", "101", "")),
           ("--weight-decay", ("-1e-9", "11", "nan"))]
BAD = [(script, [flag, value], 2, flag) for k, (flag, values) in enumerate(NUMBERS) for j, value in enumerate(values)
       for script in (TRAINING[(j + k) % 3],)]
BAD += [(script, argv, 2, message) for script in EVERY for argv, message in (
    (["--device", "cuda:77"], "--device cuda:77"), (["--device", "abacus"], "--device abacus"),
    (["--dataset", "imagenet"], "--dataset"), (["--amp", "int8"], "--amp"), (["--epoch", "3"], "--epoch"))]
BAD += [("part4_angular", argv, 2, argv[0]) for argv in (
    ["--alpha-deg", "-1"], ["--alpha-deg", "70.5"], ["--alpha-deg", "nan"], ["--margin", "5"], ["--margin", "nan"],
    ["--scale", "0"], ["--scale", "inf"], ["--npair-weight", "-1"], ["--loss", "triplet"])]
BAD += [("part4_angular", ["--loss", "sphereface", "--margin", "0.5"], 2, "argument --margin: sphereface")]
BAD += [("part1_baseline", ["--label-smoothing", "1"], 2, "--label-smoothing")]
BAD += [("part1_baseline", ["--data-dir", f"{{top}}/{name}"], 1, message) for name, message in (
    ("nowhere", "nowhere/train does not exist"), ("one_class", "at least two"), ("no_test", "holds no image"),
    ("zero_bytes", "ant/0.png is not an image"), ("text", "bee/3.png is not an image"),
    ("cut", "ant/1.png is not an image"), ("other_classes", "the same in train and test"),
    ("empty_class", "ant holds no image"), ("no_train", "no_train/train does not exist"))]
BAD += [("part2_robustness", ["--checkpoint", f"{{top}}/{name}.pt"], 2, f"{name}.pt") for name in (
    "missing", "newer", "foreign", "no_meta", "no_model", "nan", "integers", "less", "outside", "no_args", "dataset",
    "fraction", "outputs", "classes", "another", "weights", "empty", "text", "cut")]
BAD += [("part2_robustness", argv, 2, message) for argv, message in (
    (["--checkpoint", "{top}"], "not a checkpoint"), (["--severities", "0"], "--severities"),
    (["--severities", "6"], "--severities"), (["--severities"], "--severities"),
    (["--perturbations", "fog"], "gaussian_noise"), (["--eps-255", "-1"], "--eps-255"),
    (["--eps-255", "nan"], "--eps-255"), (["--norm", "1"], "--norm"), (["--attack-images", "9"], "--attack-images"),
    (["--audit-images", "0"], "--audit-images"), (["--cifar10c", "{top}"], "--cifar10c"),
    (["--split-seed", "1"], "was trained on"), (["--train-fraction", "0.3"], "was trained on"),
    (["--epochs", "3"], "--epochs"))]
BAD += [(script, ["--results-dir", "{top}/file"], 1, "file") for script in EVERY]


def test_there_are_enough_of_them():
    assert len(BAD) >= 60
    assert {b[0] for b in BAD} == set(EVERY)


@pytest.mark.parametrize(("script", "argv", "code", "message"), BAD, ids=[f"{b[0][:5]} {' '.join(b[1])}" for b in BAD])
def test_bad_input_is_one_sentence_and_nothing_is_touched(place, script, argv, code, message):
    before = hashes(place / "results"), stamps(place)
    defaults = ["--results-dir", place / "results"]
    defaults += (["--checkpoint", place / "results/part1.pt"] if script == "part2_robustness" else
                 ["--dataset", "folder", "--data-dir", place / "good", "--train-fraction", "0.5"])
    found, line = call(script, [*defaults, *(a.format(top=place) for a in argv)])
    assert found == code, line
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert len(line) < 600
    assert (hashes(place / "results"), stamps(place)) == before


FLAGS = ("--dataset", "--data-dir", "--train-fraction", "--split-seed", "--seed", "--batch-size", "--device", "--amp",
         "--umap-points", "--no-umap", "--resume", "--quick", "--epochs", "--lr", "--weight-decay", "--label-smoothing",
         "--loss", "--alpha-deg", "--margin", "--scale", "--npair-weight", "--no-centers", "--augment",
         "--checkpoint", "--perturbations", "--severities", "--cifar10c", "--eps-255", "--norm", "--attack-images",
         "--audit-images", "--targeted", "--help-me", "-x")
VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-inf", "-1", "0", "1e309", "0x10", "1_000", "٣", "all", "folder", "digits",
                     "cpu", "meta", "cuda:0", "mps", "bf16", "angular", "\t", "--", "None"]),
    st.integers(-10**20, 10**20).map(str), st.floats().map(str),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8))


@settings(max_examples=800, **QUIET)
@given(script=st.sampled_from(EVERY), words=st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=2)),
                                                     max_size=5))
@example(script="part2_robustness", words=[("--checkpoint", [".."])])
@example(script="part1_baseline", words=[("--device", ["meta"])])
def test_command_lines_by_chance(place, script, words):
    """What is valid by chance ends at a folder that does not exist, before anything is trained or written."""
    before = stamps(place / "results")
    argv = [word for flag, values in words for word in (flag, *values)]
    code, line = call(script, [*argv, "--results-dir", place / "results", "--dataset", "folder", "--data-dir",
                               place / "nowhere"])
    assert code in (1, 2), line
    assert line.startswith("error: ")
    assert stamps(place / "results") == before


@settings(max_examples=300, **QUIET)
@given(seed=st.integers(0, 2**32))
def test_mutated_checkpoints(place, seed):
    """Bytes are changed, cut out or doubled where the file's structure is: at its ends. It loads, or is refused."""
    chance, whole = random.Random(seed), (place / "results/part1.pt").read_bytes()
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        at = chance.choice((chance.randrange(12_000), len(data) - 1 - chance.randrange(12_000)))
        length = chance.choice((1, 1, 1, 2, 8, 100))
        data[at : at + length] = chance.choice((
            bytes([chance.randrange(256)]), bytes([data[at] ^ 1 << chance.randrange(8)]), b"",
            bytes(data[at : at + length]) * 2, chance.randbytes(length)))
    path = place / "mutated.pt"
    path.write_bytes(data)
    try:
        model, meta = common.load_checkpoint(path, "cpu")
        assert meta["part"] in common.PARTS
        assert not model.training
    except common.UsageError as error:
        assert "mutated.pt: " in str(error)
        assert "\n" not in str(error)
    finally:
        path.unlink()


def test_a_checkpoint_that_carries_code_does_not_run_it(place):
    import pickle
    import zipfile

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(place / 'exploded')!r}, 'w')",))

    whole = place / "results/part1.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(place / "bomb.pt", "w") as new:
        for name in old.namelist():  # a real checkpoint in all but its pickle
            new.writestr(name, pickle.dumps(Bomb()) if name.endswith("data.pkl") else old.read(name))
    code, line = call("part2_robustness", ["--checkpoint", place / "bomb.pt", "--results-dir", place / "new"])
    assert code == 2
    assert "bomb.pt: not a checkpoint of this project" in line
    assert not (place / "exploded").exists()
    assert not (place / "new").exists()
    assert "part2_robustness" in sys.modules
    (place / "bomb.pt").unlink()
