"""Files of results: rows as CSV, a run's record as JSON, which images were right as NumPy arrays.

Written whole or not at all; read with every number checked, since anybody can edit them.
"""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import checkpoints
import common
from arguments import UsageError, first_line

import numpy as np

COLUMNS = ("part", "dataset", "split", "condition", "severity", "head", "metric", "value", "ci_low",
           "ci_high", "n", "seed", "split_hash", "checkpoint", "weights")
REWRITE = "move it away; its part will write it again"


def robustness_name(part):
    """What part 2's files are called for the checkpoint of a part."""
    return "part2" if part == "part1" else f"{part}_robustness"


def write_rows(path, rows):
    """Writes rows (dicts) as CSV, whole or not at all; floats to 6 digits, a missing key empty."""
    columns = dict.fromkeys(key for values in rows for key in values)  # once, in order
    with (checkpoints.atomic(path) as temporary,
          open(temporary, "w", newline="", encoding="utf-8") as file):
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for values in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                             for key, value in values.items()})


def write_text(path, text):
    with checkpoints.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_record(path, run):
    """Writes the run as JSON: its command, arguments, versions, weights."""
    write_text(path, json.dumps(run.record(), indent=1, ensure_ascii=False) + "\n")


def read_record(folder, name):
    """The dict that `write_record` wrote, or None where there is none. Raises UsageError."""
    path = Path(folder) / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("args", dict), ("command", str), ("weights", str), ("versions", dict)):
            if type(record[key]) is not kind:
                raise ValueError(f"{key} is {record[key]!r}")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: not the record of a run ({first_line(error)}); "
                         f"{REWRITE}") from None


def read_table(path):
    """The rows of a table that a part wrote, with numbers as numbers; [] where there is none.

    severity stays text: "", "3", or eps in 1/255.  Raises UsageError for any other file.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                found = ", ".join(reader.fieldnames or ["none"])
                raise ValueError(f"its columns are not storage.COLUMNS but {found[:100]}")
            rows = [typed(values) for values in reader]
            if not rows:  # else its part would pass for one that was not run
                raise ValueError("it has no rows")
            return rows
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; make it readable, or "
                         "give another directory") from None
    except (csv.Error, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a table that this code wrote ({first_line(error)}); "
                         f"{REWRITE}") from None


def typed(values):
    """A row of text with numbers as numbers. Raises ValueError or TypeError for what is no row."""
    if None in values or None in values.values():
        raise ValueError("a row has too many or too few cells")
    row = dict(values)
    row["value"] = float(row["value"])
    row["n"] = int(row["n"])
    row["seed"] = int(row["seed"])
    for name in ("ci_low", "ci_high"):
        row[name] = float(row[name]) if row[name] else ""
    if row["severity"] and f"{float(row['severity']):g}" != row["severity"]:
        raise ValueError(f"severity {row['severity']!r}")
    if row["part"] not in common.PARTS:
        raise ValueError(f"part {row['part']!r}")
    for name in ("split_hash", "weights"):
        if len(row[name]) != 12 or not set(row[name]) <= set("0123456789abcdef"):
            raise ValueError(f"{name} {row[name]!r}")
    if row["metric"].startswith("accuracy") and not 0 <= row["value"] <= 1:
        raise ValueError(f"an accuracy of {row['value']}")
    if row["metric"] == "accuracy":
        low, high = row["ci_low"], row["ci_high"]
        if "" in (low, high) or row["n"] < 1 or not low - 1e-6 <= row["value"] <= high + 1e-6:
            raise ValueError(f"an accuracy of {row['value']}, interval {low} to {high}, n "
                             f"{row['n']}")
    return row


def read_all(folder):
    """The rows of every part's tables in `folder`."""
    rows = []
    for part in common.PARTS:
        rows += read_table(Path(folder) / f"{part}.csv")
        rows += read_table(Path(folder) / f"{robustness_name(part)}.csv")
    return rows


class Correct(NamedTuple):
    """Which images a model classifies right: {"split/condition/severity": booleans (N,)}."""

    weights: str
    part1: str  # hash of the part 1 whose adversarial images were tried, or "none"
    images: dict
    pixels: dict  # of perturbed images: {"split/condition/severity": hash of their pixels}


def write_correct(path, run, images, part1="none", pixels=None):
    """Writes a Correct as .npz, complete or not at all."""
    with checkpoints.atomic(path) as temporary:
        np.savez_compressed(temporary, weights=run.weights, part1=part1,
                            pixels=json.dumps(pixels or {}), **images)


def read_correct(folder, name):
    """The Correct that `write_correct` wrote, or None where there is none. Raises UsageError."""
    path = Path(folder) / f"{name}_correct.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            images = {key: file[key] for key in file.files if "/" in key}
            if any(array.dtype != bool or array.ndim != 1 for array in images.values()):
                raise ValueError("arrays that are not booleans")
            pixels = json.loads(str(file["pixels"])) if "pixels" in file.files else {}
            return Correct(str(file["weights"]), str(file["part1"]), images, dict(pixels))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged archive can fail anywhere in zlib and numpy
        raise UsageError(f"{path}: not what a part wrote ({first_line(error)}); "
                         f"{REWRITE}") from None
