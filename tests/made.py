"""Results directories as the parts write them, of made accuracies, and what is made of them."""

import contextlib
import csv
import json
from pathlib import Path

import comparison
import report
import storage
import summary

import torch

N = 1000  # images of every made accuracy
CLEAN = ("test", "clean", "")
A, B, C = "a" * 12, "b" * 12, "c" * 12  # weights
SPLIT = "5" * 12


def run_of(folder, name, part, weights=A, seed=0, split_hash=SPLIT, dataset="toy", command="python",
           **args):
    values = {"seed": seed, "split_seed": seed, "epochs": 6, "train_fraction": 0.2} | args
    return report.Run(part, "", name, Path(folder), f"{part}.pt", weights, dataset, ("cat", "dog"),
                      {}, split_hash, seed, values, command, {"torch": "2"}, torch.device("cpu"),
                      "cpu", "off")


def write(run, accuracies, order=0, part1="none", n=N, extra=(), pixels=None):
    """A part's table, record and correct images from {(split, condition, severity): accuracy}."""
    run.folder.mkdir(exist_ok=True)
    labels = torch.zeros(n, dtype=torch.int64)
    rows = []
    images = {}
    for (split, condition, severity), accuracy in accuracies.items():
        wrong = torch.roll(torch.arange(n) >= round(n * accuracy), order).long()
        rows.append(report.accuracy_row(run, split, condition, severity, "own", wrong, labels))
        images[f"{split}/{condition}/{severity}"] = report.correct(wrong, labels)
    for metric, value in extra:
        rows.append(report.row(run, "test", "fgsm", "", "own", metric, value, n))
    storage.write_rows(run.path(".csv"), rows)
    storage.write_record(run.path(".json"), run)
    storage.write_correct(run.path("_correct.npz"), run, images, part1, pixels)


def perturbed(**accuracies):
    """{("test", condition, "3"): accuracy}; of attacks at 8/255."""
    return {("test", name, "8" if name.startswith(("fgsm", "pgd", "worst")) else "3"): value
            for name, value in accuracies.items()}


def two_parts(folder, ours, theirs, order=0):
    """Parts 3 and 1 with clean accuracy 0.7, and what `perturbed` takes under part 2."""
    write(run_of(folder, "part1", "part1", A), {CLEAN: 0.7})
    write(run_of(folder, "part2", "part1", A), perturbed(**theirs))
    write(run_of(folder, "part3", "part3", B), {CLEAN: 0.702}, order)
    write(run_of(folder, "part3_robustness", "part3", B), perturbed(**ours), part1=A)


def verdicts_of(folder, part="part3", reference="part1"):
    """{(condition, severity): row of comparison.csv} of a part against a reference."""
    summary.compare(folder)
    return {(row["condition"], row["severity"]): row for row in read(folder / "comparison.csv")
            if (row["part"], row["reference"]) == (part, reference) and row["split"] == "test"}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def edited(path):
    """The record in a file, which is written again with what the block changes."""
    record = json.loads(path.read_text(encoding="utf-8"))
    yield record
    path.write_text(json.dumps(record), encoding="utf-8")


def text_of(folder):
    summary.compare(folder)
    return (folder / "summary.md").read_text(encoding="utf-8")


def lines_of(folder):
    study = comparison.read_study(folder)
    [table] = comparison.shared([comparison.measured(study)])
    return {line.title: line.values for line in comparison.overview(table, list(study.parts))}


def append(run, *rows):
    path = run.path(".csv")
    storage.write_rows(path, [*storage.read_table(path), *rows])


def head_row(run, split, head, accuracy):
    return report.row(run, split, "clean", "", head, "accuracy", accuracy, N, (0, 1))
