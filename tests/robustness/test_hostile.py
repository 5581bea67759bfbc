"""Wrong arguments and checkpoints, listed and by chance: one sentence, an exit code, no change."""

import pickle
import random
import shutil
import zipfile
from types import SimpleNamespace

import checkpoints
import common
import storage
from arguments import UsageError

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .conftest import (
    PARTS,
    QUIET,
    TRAINING,
    call,
    contents,
    count,
    is_sentence,
    make_narrow,
    stamps,
    write_tree,
)


@pytest.fixture(scope="module", autouse=True)
def narrow_module():  # of a module's scope, as hypothesis wants it
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch)
        yield


def damage_trees(top):
    """Trees of which each has one fault."""
    write_tree(top / "one_class", classes=("ant",))
    names = ("no_test", "zero_bytes", "text", "cut", "other_classes", "empty_class", "no_train")
    trees = {name: write_tree(top / name) for name in names}
    for path in (trees["no_test"] / "test").rglob("*.png"):
        path.unlink()
    for path in (trees["empty_class"] / "train/ant").iterdir():
        path.unlink()
    (trees["zero_bytes"] / "train/ant/0.png").write_bytes(b"")
    (trees["text"] / "train/bee/3.png").write_text("not an image")
    cut = trees["cut"] / "test/ant/1.png"
    cut.write_bytes(cut.read_bytes()[:90])
    (trees["other_classes"] / "test/bee").rename(trees["other_classes"] / "test/wasp")
    (trees["no_train"] / "train").rename(trees["no_train"] / "training")


def damage_checkpoints(top, checkpoint):
    """Checkpoints of which each has one fault."""
    content = torch.load(checkpoint, weights_only=True)
    meta, weights = content["meta"], content["model"]
    conv = weights["backbone.conv1.weight"]
    zeroed = conv.clone()
    zeroed[3] = 0  # as after a bad block on the disk
    args = meta["args"]

    def written_with(conv):
        changed = weights | {"backbone.conv1.weight": conv}
        model = SimpleNamespace(state_dict=lambda: changed)
        return {"model": changed, "meta": meta | {"weights": checkpoints.weights_hash(model)}}

    without_bias = {key: value for key, value in weights.items() if key != "backbone.fc.bias"}
    changes = {
        "newer": {"version": 99}, "older": {"version": 1}, "foreign": {"format": "another"},
        "no_meta": {"meta": None}, "no_model": {"model": {}}, "less": {"model": without_bias},
        "list": {"model": [conv]}, "nan": written_with(conv * float("nan")),
        "zeroed": {"model": weights | {"backbone.conv1.weight": zeroed}},
        "integers": written_with(conv.int()), "doubles": written_with(conv.double()),
        "outside": {"meta": meta | {"part": "../../part1"}},
        "no_args": {"meta": meta | {"args": {}}},
        "dataset": {"meta": meta | {"args": args | {"dataset": "imagenet"}}},
        "fraction": {"meta": meta | {"args": args | {"train_fraction": float("nan")}}},
        "classes": {"meta": meta | {"classes": [1, 2]}},
        "another": {"meta": meta | {"split_hash": "000000000000"}}}
    for name, changed in changes.items():
        torch.save(content | changed, top / f"{name}.pt")
    torch.save(weights, top / "weights.pt")
    (top / "empty.pt").write_bytes(b"")
    (top / "text.pt").write_text("hello")
    whole = checkpoint.read_bytes()
    (top / "cut.pt").write_bytes(whole[: len(whole) // 2])
    return [*changes, "weights", "empty", "text", "cut", "missing"]


@pytest.fixture(scope="module")
def place(trained, tree, tmp_path_factory):
    """A folder with good data, bad data, bad checkpoints, and results that must not change."""
    top = tmp_path_factory.mktemp("place")
    shutil.copytree(tree, top / "good")
    damage_trees(top)
    results = shutil.copytree(trained, top / "results")
    damage_checkpoints(top, results / "part1.pt")
    (top / "file").write_text("a file, not a folder")
    before = contents(results)
    yield top
    assert contents(results) == before


NUMBERS = {"--train-fraction": ("0", "-0.1", "1.01", "nan", "inf", "half", "1e-9", "0.999"),
           "--batch-size": ("1", "0", "-3", "2.5", "nan"), "--umap-points": ("49", "1e3", "-1"),
           "--seed": ("-1", "4294967296", "x"), "--split-seed": ("-1", "0.5"),
           "--epochs": ("0", "-1", "1.5", "inf"), "--lr": ("0", "-0.1", "nan", "inf", "101", ""),
           "--weight-decay": ("-1e-9", "11", "nan")}
EVERYWHERE = [("--device", "cuda:77"), ("--device", "abacus"), ("--dataset", "imagenet"),
              ("--amp", "int8"), ("--epoch", "3"), ("--help-me", "")]
PART4 = [("--alpha-deg", "-1"), ("--alpha-deg", "70.5"), ("--alpha-deg", "nan"), ("--margin", "5"),
         ("--margin", "nan"), ("--scale", "0"), ("--scale", "inf"), ("--loss", "triplet")]
TREES = {"nowhere": "nowhere/train does not exist", "one_class": "at least two",
         "no_test": "no image", "zero_bytes": "ant/0.png", "text": "bee/3.png",
         "cut": "ant/1.png", "other_classes": "the same in train and test",
         "empty_class": "no image", "no_train": "no_train/train does not exist"}
CHECKPOINTS = ("missing", "newer", "older", "foreign", "no_meta", "no_model", "list", "less",
               "outside", "no_args", "dataset", "fraction", "classes", "another", "weights",
               "empty", "text", "cut")
UNFIT = "backbone.conv1.weight is not finite or of another type"
PART2 = [(["--checkpoint", "{top}/zeroed.pt"], "it was written with the weights"),
         (["--checkpoint", "{top}/nan.pt"], UNFIT), (["--checkpoint", "{top}/integers.pt"], UNFIT),
         (["--checkpoint", "{top}/doubles.pt"], UNFIT),
         (["--checkpoint", "{top}"], "not a checkpoint"), (["--severities", "0"], "--severities"),
         (["--severities", "6"], "--severities"), (["--severities"], "--severities"),
         (["--perturbations", "fog"], "gaussian_noise"), (["--eps-255", "-1"], "--eps-255"),
         (["--eps-255", "nan"], "--eps-255"), (["--eps-255", "8", "256"], "expected 0 to 255"),
         (["--norm", "1"], "--norm"),
         (["--attack-images", "9"], "--attack-images"), (["--audit-images", "0"], "--audit-images"),
         (["--cifar10c", "{top}"], "--cifar10c"), (["--split-seed", "1"], "was trained on"),
         (["--train-fraction", "0.3"], "was trained on"), (["--epochs", "3"], "--epochs")]


def wrong_command_lines():
    """[(script, words, exit code, what the sentence says)]"""
    found = []
    turn = 0
    for flag, values in NUMBERS.items():
        for value in values:
            found.append((TRAINING[turn % 3], [flag, value], 2, flag))
            turn += 1
    for script in PARTS:
        found += [(script, list(words), 2, words[0]) for words in EVERYWHERE]
        found.append((script, ["--results-dir", "{top}/file"], 1, "file"))
        found.append((script, ["--results-dir", "a\udcffb"], 2, "is not text"))
        found.append((script, ["--results-dir", ""], 2, "--results-dir: the path is empty"))
        found.append((script, ["--data-dir=~nobody-here/x"], 2, "--data-dir: no home folder"))
        found.append((script, ["--data-dir", "a\0b"], 2, "is not text"))
        found += [(script, [f"{flag}=--"], 2, f"{flag}: -- is not a value")
                  for flag in ("--seed", "--results-dir", "--amp")]
    found += [("part4_angular", list(words), 2, words[0]) for words in PART4]
    found.append(("part4_angular", ["--loss", "sphereface", "--margin", "0.5"], 2, "--margin: sph"))
    found.append(("part4_angular", ["--loss", "arcface", "--alpha-deg", "40"], 2, "not of"))
    found.append(("part4_angular", ["--loss", "arcface", "--proxies"], 2, "--proxies: not of"))
    found.append(("part4_angular", ["--margin", "0.3"], 2, "--margin: not of --loss ang"))
    found += [("part4_angular", [*loss, "--scale", "30"], 2, "--scale: not of --loss")
              for loss in ([], ["--loss", "sphereface"])]
    found.append(("part1_baseline", ["--label-smoothing", "1"], 2, "--label-smoothing"))
    found.append(("part3_augmented", ["--families", "blur"], 2, "--families"))
    found.append(("part3_augmented", ["--families=--"], 2, "--families: -- is not a value"))
    found += [("part1_baseline", ["--data-dir", f"{{top}}/{name}"], 1, message)
              for name, message in TREES.items()]
    found += [("part2_robustness", ["--checkpoint", f"{{top}}/{name}.pt"], 2, f"{name}.pt")
              for name in CHECKPOINTS]
    return found + [("part2_robustness", words, 2, message) for words, message in PART2]


WRONG = wrong_command_lines()


@pytest.mark.parametrize(("script", "words", "code", "message"), WRONG,
                         ids=[ascii(f"{w[0][:5]} {' '.join(w[1])}") for w in WRONG])
def test_wrong_use_is_one_sentence_and_nothing_is_touched(place, script, words, code, message):
    before = stamps(place / "results"), stamps(place)
    argv = ["--results-dir", place / "results"]
    if script == "part2_robustness":
        argv += ["--checkpoint", place / "results/part1.pt"]
    else:
        argv += ["--dataset", "folder", "--data-dir", place / "good", "--train-fraction", 0.5]
    found, error, _ = call(script, [*argv, *(word.format(top=place) for word in words)])
    assert found == code, error
    assert is_sentence(error)
    assert message in error
    assert (stamps(place / "results"), stamps(place)) == before


FLAGS = ("--dataset", "--data-dir", "--train-fraction", "--split-seed", "--seed", "--batch-size",
         "--device", "--amp", "--umap-points", "--no-umap", "--resume", "--quick", "--epochs",
         "--lr", "--weight-decay", "--label-smoothing", "--compile", "--families", "--no-part2",
         "--loss", "--alpha-deg", "--margin", "--scale", "--proxies", "--augment", "--checkpoint",
         "--perturbations", "--severities", "--cifar10c", "--eps-255", "--norm", "--attack-images",
         "--audit-images", "--targeted", "--help-me", "-x")
VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-inf", "-1", "0", "1e309", "0x10", "1_000", "٣", "all",
                     "folder", "digits", "cpu", "meta", "cuda:0", "mps", "bf16", "angular", "\t",
                     "--", "None", "none", "@file", "a" * 5000, "\udcff", "\0"]),
    st.integers(-10**20, 10**20).map(str), st.floats().map(str), st.text(max_size=8))
WORDS = st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=2)), max_size=5)


@pytest.mark.full
@settings(max_examples=count(80, 800), **QUIET)
@given(script=st.sampled_from(PARTS), words=WORDS)
@example(script="part2_robustness", words=[("--checkpoint", [".."])])
@example(script="part1_baseline", words=[("--device", ["meta"])])
def test_command_lines_by_chance(place, script, words):
    """What is valid by chance ends at a folder that does not exist, before anything is done."""
    before = stamps(place / "results")
    argv = [word for flag, values in words for word in (flag, *values)]
    code, error, _ = call(script, [*argv, "--results-dir", place / "results", "--dataset", "folder",
                                   "--data-dir", place / "nowhere"])
    assert code in (1, 2), error
    assert error.startswith("error: ")
    assert stamps(place / "results") == before


def mutated(data, chance):
    """Bytes changed, cut out or doubled where the file's structure is: at its ends."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(min(12_000, len(data)))
        at = chance.choice((place, len(data) - 1 - place))
        length = chance.choice((1, 1, 1, 2, 8, 100))
        old = bytes(data[at : at + length])
        flipped = bytes([data[at] ^ 1 << chance.randrange(8)])
        data[at : at + length] = chance.choice((chance.randbytes(1), flipped, b"", old * 2,
                                                chance.randbytes(length)))
    return bytes(data)


@pytest.mark.full
@settings(max_examples=count(200, 2000), **QUIET)
@given(seed=st.integers(0, 2**32))
def test_mutated_checkpoints_load_or_are_refused(place, seed):
    path = place / "mutated.pt"
    path.write_bytes(mutated((place / "results/part1.pt").read_bytes(), random.Random(seed)))
    try:
        model, meta = common.load_checkpoint(path, "cpu")
        assert meta["part"] in common.PARTS
        assert not model.training
        assert checkpoints.weights_hash(model) == meta["weights"]
    except UsageError as error:
        assert "mutated.pt: " in str(error)
        assert "\n" not in str(error)
    finally:
        path.unlink()


def test_a_file_that_carries_code_does_not_run_it(place):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(place / 'exploded')!r}, 'w')",))

    whole = place / "results/part1.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(place / "bomb.pt", "w") as new:
        for name in old.namelist():  # a real checkpoint in all but its pickle
            code = pickle.dumps(Bomb())
            new.writestr(name, code if name.endswith("data.pkl") else old.read(name))
    code, error, _ = call("part2_robustness", ["--checkpoint", place / "bomb.pt", "--results-dir",
                                               place / "new"])
    assert code == 2
    assert "bomb.pt: not a checkpoint of this project" in error
    np.savez(place / "bomb_correct.npz", weights="0" * 12, part1="none",
             **{"test/clean/": np.array([Bomb()])})
    with pytest.raises(UsageError, match="bomb_correct.npz: not what a part wrote"):
        storage.read_correct(place, "bomb")
    assert not (place / "exploded").exists()
    assert not (place / "new").exists()
    (place / "bomb.pt").unlink()
