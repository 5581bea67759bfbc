"""The four scripts as subprocesses on small real data: what they write, how they resume, what they refuse."""

import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import report

# float32, since a precision that is chosen by a measurement may be another one under load
SMALL = ["--dataset", "digits", "--quick", "--umap-points", "60", "--amp", "off"]


def start(script, *arguments, cwd=ROOT, **options):
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *map(str, arguments)], text=True, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def run(script, *arguments, code=0, **options):
    return finish(start(script, *arguments, **options), code)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The four parts in order, as a grader runs them."""
    folder = tmp_path_factory.mktemp("results")
    run("part1_baseline", *SMALL, "--results-dir", folder)
    run("part2_robustness", "--checkpoint", folder / "part1.pt", "--results-dir", folder, "--umap-points", 60,
        "--amp", "off", "--targeted")
    run("part3_augmented", *SMALL, "--results-dir", folder, "--no-umap")  # compiling it takes most of the time
    run("part4_angular", *SMALL, "--results-dir", folder, "--no-umap")
    return folder


def test_every_part_writes_its_files(results):
    for part in ("part1", "part3", "part4"):
        for ending in (".pt", ".csv", "_history.csv", "_history.png", "_confusion.png", "_correct.npz"):
            assert (results / f"{part}{ending}").stat().st_size > 0
    for part in ("part2", "part3_robustness", "part4_robustness"):
        for ending in (".csv", "_severities.png", "_examples.png", "_fgsm.png", "_adversarial.png"):
            assert (results / f"{part}{ending}").stat().st_size > 0
    for part in ("part1", "part2"):
        assert (results / f"{part}_umap.png").stat().st_size > 0
    for name in ("comparison.csv", "comparison.png", "summary.md"):
        assert (results / name).stat().st_size > 0
    assert not [p for p in results.iterdir() if p.name.startswith(".") and p.suffix != ".lock"]  # no temporary file


def test_tables_are_tidy_and_of_one_split(results):
    rows = report.read_all(results)
    assert {r["part"] for r in rows} == {"part1", "part2", "part3", "part4"}
    assert {r["dataset"] for r in rows} == {"digits (QUICK)"}
    assert len({r["split_hash"] for r in rows}) == 1
    for r in rows:
        assert tuple(r) == report.COLUMNS
        if r["metric"] == "accuracy":
            assert 0 <= float(r["ci_low"]) <= float(r["value"]) <= float(r["ci_high"]) <= 1
            n = {"evaluation": 80, "test": 100}[r["split"]]
            assert int(r["n"]) == n or r["condition"].startswith(("fgsm", "pgd", "random"))


def test_every_perturbation_and_eps_is_in_the_table(results):
    for name in ("part2", "part3_robustness", "part4_robustness"):
        found = {(r["condition"], r["severity"]) for r in read(results / f"{name}.csv") if r["metric"] == "accuracy"}
        wanted = {(n, "" if n in common.NO_SEVERITY else "3") for n in common.PERTURBATIONS}
        assert found >= wanted | {("fgsm", eps) for eps in ("0", "1", "2", "4", "8", "16")}
        attacks = {"part2": ("fgsm_predicted", "random_sign", "pgd", "fgsm_targeted")}.get(
            name, ("fgsm_predicted", "random_sign", "pgd", "fgsm_from_part1"))
        assert found >= {(attack, eps) for attack in attacks for eps in ("8", "16")}


def test_transferred_images_are_part_1s(results):
    """Part 1's adversarial images, made again with its checkpoint alone, on part 3's model."""
    data = common.load_data("digits", "data", torch.device("cpu"), quick=True)
    some = common.spread(len(data.test_labels), 50)
    images, labels = data.test_images[some] / 255, data.test_labels[some]
    part1, part3 = (common.load_checkpoint(results / f"{part}.pt", "cpu")[0] for part in ("part1", "part3"))
    adversarial = common.fgsm(part1, images, labels, 8 / 255)
    with torch.no_grad():
        right = part3(adversarial).argmax(1) == labels
    row = next(r for r in read(results / "part3_robustness.csv") if r["condition"] == "fgsm_from_part1"
               and r["severity"] == "8")
    assert float(row["value"]) == pytest.approx(right.float().mean().item(), abs=0.021)  # one image of 50


def test_the_table_is_what_the_checkpoint_does(results):
    """Independently of the evaluation code: load, classify, count."""
    data = common.load_data("digits", "data", torch.device("cpu"), quick=True)
    for part in ("part1", "part3", "part4"):
        model, meta = common.load_checkpoint(results / f"{part}.pt", "cpu")
        assert meta["epoch"] == 2
        with torch.no_grad():
            logits = model(data.test_images.float() / 255)
        right = (logits.argmax(1) == data.test_labels).float().mean().item()
        assert right == pytest.approx(meta["metrics"]["test"], abs=0.011)  # one image of 100
        row = next(r for r in read(results / f"{part}.csv") if (r["split"], r["head"]) == ("test", "own"))
        assert float(row["value"]) == pytest.approx(meta["metrics"]["test"], abs=1e-6)


def test_comparison_and_summary_name_what_is_there_and_what_is_missing(results):
    table = read(results / "comparison.csv")
    assert {r["part"] for r in table} == {"part1", "part3", "part4"}
    for r in table:
        significant = r["p_holm"] != "" and float(r["p_holm"]) < 0.05
        assert (r["verdict"] in ("better", "worse")) == significant
        assert r["in_part3_training"] == {"blur": "no", "attack": "", "": ""}.get(r["family"], "yes")
    text = (results / "summary.md").read_text()
    assert "digits (QUICK)" in text
    assert "Missing: part4_augmented." in text
    assert common.read_meta(results / "part3.pt")["command"] in text
    assert "- part2: `" in text
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (results / figure).exists()
    assert text.count("part2_fgsm.png") == text.count("part4_robustness_severities.png") == 1


def test_one_umap_frame_for_all_conditions_of_a_model(results):
    with np.load(results / "part2_umap.npz") as file:
        panels = list(dict.fromkeys(file["panel"]))
        assert panels[0] == "clean"
        assert "FGSM 8/255" in panels
        assert len(file["coordinates"]) == len(file["label"]) == 50 * len(panels)
        assert np.isfinite(file["coordinates"]).all()


def test_part2_works_on_every_checkpoint_alone_and_says_the_same_again(results, tmp_path):
    for part, name in (("part3", "part3_robustness"), ("part4", "part4_robustness")):
        run("part2_robustness", "--checkpoint", results / f"{part}.pt", "--results-dir", tmp_path, "--no-umap",
            "--perturbations", "gaussian_noise", "--eps-255", 8, "--amp", "off")
        first = {(r["condition"], r["severity"]): r["value"] for r in read(results / f"{name}.csv")
                 if r["metric"] == "accuracy" and r["condition"] != "pgd"}
        again = {(r["condition"], r["severity"]): r["value"] for r in read(tmp_path / f"{name}.csv")
                 if r["metric"] == "accuracy" and r["condition"] in ("clean", "gaussian_noise", "fgsm")}
        assert again
        assert all(first[key] == value for key, value in again.items())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_part2_computes_in_the_precision_of_the_training(results, tmp_path, amp):
    model, meta = common.load_checkpoint(results / "part1.pt", "cpu")
    common.save_checkpoint(tmp_path / "part1.pt", model, meta | {"args": meta["args"] | {"amp": amp}})
    out, _ = run("part2_robustness", "--checkpoint", tmp_path / "part1.pt", "--results-dir", tmp_path, "--no-umap",
                 "--perturbations", "horizontal_flip", "--eps-255", 0)
    assert f"mixed precision {amp}" in out


def test_cifar10c_files_are_tested_as_they_are(results, tmp_path):
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in common.CIFAR10_CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    run("part1_baseline", "--dataset", "folder", "--data-dir", tmp_path / "data", "--train-fraction", "0.5", "--quick",
        "--no-umap", "--results-dir", tmp_path, "--amp", "off")
    tree = tmp_path / "CIFAR-10-C"
    tree.mkdir()
    pixels = random.randint(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    pixels[40:60] = pixels[:20]  # severity 3 shows the images of severity 1
    np.save(tree / "labels.npy", np.tile(np.arange(20, dtype=np.uint8) % 10, 5))
    np.save(tree / "fog.npy", pixels)
    arguments = ["--checkpoint", tmp_path / "part1.pt", "--no-umap", "--perturbations", "grayscale", "--eps-255", 0,
                 "--amp", "off"]
    run("part2_robustness", *arguments, "--results-dir", tmp_path, "--cifar10c", tree)
    rows = {r["severity"]: float(r["value"]) for r in read(tmp_path / "part2.csv") if r["condition"] == "cifar10c fog"}
    assert list(rows) == ["1", "2", "3", "4", "5"]
    assert rows["1"] == rows["3"]
    model, _ = common.load_checkpoint(tmp_path / "part1.pt", "cpu")
    for severity in (1, 2):
        with torch.no_grad():
            block = torch.from_numpy(pixels[20 * severity - 20 : 20 * severity]).permute(0, 3, 1, 2) / 255
            right = (model(block).argmax(1) == torch.arange(20) % 10).float().mean().item()
        assert rows[str(severity)] == pytest.approx(right, abs=0.051)  # one image of 20
    assert "cifar10c fog" in (tmp_path / "summary.md").read_text()
    np.save(tree / "snow.npy", pixels[:20])
    for checkpoint, message in ((tmp_path / "part1.pt", "snow.npy is uint8 (20, 32, 32, 3)"),
                                (results / "part1.pt", "needs a checkpoint of CIFAR-10's ten classes")):
        _, err = run("part2_robustness", "--checkpoint", checkpoint, "--results-dir", tmp_path / "no", "--cifar10c",
                     tree, code=2)
        assert message in err
        assert not (tmp_path / "no").exists()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_ctrl_c_prints_the_command_that_continues(tmp_path):
    process = start("part1_baseline", *SMALL, "--results-dir", tmp_path,  # a job in the background ignores Ctrl-C
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(tmp_path / "part1_state.pt", process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert "to continue: python" in err
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_full_disk_is_one_sentence_and_earlier_results_stand(results, tmp_path):
    """A limit on the size of a file stands for the full disk."""
    shutil.copy(results / "part1.csv", tmp_path)
    before = contents(tmp_path)
    _, err = run("part1_baseline", *SMALL, "--results-dir", tmp_path, code=1,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))
    assert "cannot write" in err
    assert "what was there before still stands" in err
    assert "Traceback" not in err
    after = contents(tmp_path)
    assert {name: after.pop(name) for name in before} == before
    assert set(after) == {"part1_history.csv", "part1_history.png"}  # of the first epoch, whole; no half-written state


@pytest.mark.parametrize(("script", "classes"), [("part1_baseline", 12), ("part4_angular", 3)])
def test_other_numbers_of_classes_go_through_training_attack_and_tables(tmp_path, script, classes):
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        for c in range(classes):
            (tmp_path / "data" / split / f"class {c}").mkdir(parents=True)
            for i in range(12):
                pixels = random.randint(0, 80, (24, 30, 3), dtype=np.uint8)
                pixels[..., c % 3] += 150
                Image.fromarray(pixels).save(tmp_path / "data" / split / f"class {c}" / f"{i}.png")
    out, _ = run(script, "--dataset", "folder", "--data-dir", tmp_path / "data", "--train-fraction", "0.5", "--amp",
                 "off", "--results-dir", tmp_path / "results", "--quick", "--no-umap")
    assert f"{classes} classes" in out
    if script == "part1_baseline":
        run("part2_robustness", "--results-dir", tmp_path / "results", "--checkpoint", tmp_path / "results/part1.pt",
            "--no-umap", "--perturbations", "rotation", "--eps-255", "8")
        metrics = {r["metric"] for r in read(tmp_path / "results/part1.csv")}
        assert len([m for m in metrics if m.startswith("accuracy of class")]) == classes
    assert len(report.read_all(tmp_path / "results")) > 20


def test_another_data_set_or_split_is_refused_and_nothing_is_touched(results, tmp_path):
    before = contents(results)
    _, err = run("part1_baseline", "--dataset", "digits", "--results-dir", results, code=2)
    assert "holds results on the data set digits (QUICK), this run is on digits" in err
    _, err = run("part1_baseline", *SMALL, "--split-seed", "1", "--results-dir", results, code=2)
    assert "split" in err
    _, err = run("part2_robustness", "--checkpoint", results / "part1.pt", "--split-seed", "1", "--results-dir",
                 tmp_path, code=2)
    assert "was trained on the data or split" in err
    assert contents(results) == before
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    _, err = run("part1_baseline", *SMALL, "--lr", "100", "--weight-decay", "10", "--epochs", "2", "--batch-size", "2",
                 "--no-umap", "--results-dir", tmp_path, code=1)
    assert "in epoch" in err
    assert "lower --lr" in err
    assert not (tmp_path / "part1.pt").exists()


def test_help_needs_no_torch():
    for script in ("part1_baseline", "part2_robustness", "part3_augmented", "part4_angular"):
        code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', '--help']; "
                f"runpy.run_path('{script}.py', run_name='__main__')")
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert "default" in result.stdout


def test_importing_a_part_does_nothing(tmp_path):
    code = "import part1_baseline, part2_robustness, part3_augmented, part4_angular"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
