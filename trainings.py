"""The comparison over several trainings: what holds for a method, not just for one network."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import checkpoints
import claims
import common
import comparison
import metrics
import pages
import storage
import terminal
from arguments import UsageError
from comparison import ALL_PERTURBED, ALPHA, GROUPS, TEST, TRAIN, Line
from metrics import percent
from pages import bullets, code, markdown_table

import numpy as np

# `made_with` names --compile; of CIFAR-10-C the pixels are compared, not where they are
NOT_COMPARED = {"seed", "split_seed", "compile", "cifar10c"}
RECORDED = ("script", "optimizer", "stopped")  # of a record's versions; no flags
HEADS = ["own", "class_means", "knn", "probe"]
MAIN_ATTACK = "FGSM 8/255"  # the one that a claim is about


class MethodTest(NamedTuple):
    """The paired difference of a part and its reference over trainings, of one Line."""

    line: Line
    part: str
    reference: str
    change: metrics.Difference
    p_holm: float

    @property
    def verdict(self):
        found = comparison.verdict(self.p_holm, self.change.mean)
        return found or f"not resolved with {trainings(self.change.n)}"


def trainings(n):
    return f"{n} training{'s' if n > 1 else ''}"


def compare_trainings(folders):
    """Writes trainings.csv, trainings.md and trainings.html beside the first of `folders`.

    Prints the table; returns the rows of trainings.csv.  Raises UsageError unless the folders hold
    different trainings of the same study.
    """
    studies = [comparison.read_study(folder) for folder in folders]
    check(studies)
    one = next((study for study in studies if "part3" in study.parts), studies[0])
    studies = [study._replace(seen=one.seen, trained_on=one.trained_on) for study in studies]
    counts = {}  # part -> number of trainings
    for name in common.PARTS:
        n = sum(name in study.parts for study in studies)
        if n:
            counts[name] = n
    tables = comparison.shared([comparison.measured(study) for study in studies])
    overviews = [comparison.overview(table, counts) for table in tables]
    lines = over_trainings(overviews, counts)
    tests = method_tests(lines, counts)
    rows = training_rows(studies[0].dataset, lines, counts, tests)
    parent = Path(os.path.abspath(studies[0].folder)).parent  # beside a link, not beside its target
    cells = [[spread(line.values[name], n) for name, n in counts.items()] for line in lines]
    write(parent, rows, training_text(studies, tables, lines, cells, counts, tests))
    body = [(pages.plain(line.title), *texts) for line, texts in zip(lines, cells, strict=True)]
    terminal.print_table(f"{studies[0].dataset}, accuracy in %, mean ± standard deviation over "
                         f"trainings ({parent / 'trainings.md'})", ("", *counts), body)
    return rows


@checkpoints.one_at_a_time
def write(parent, rows, text):
    storage.write_rows(parent / "trainings.csv", rows)
    storage.write_text(parent / "trainings.md", text)
    pages.write(parent / "trainings.html", text)


# ---- what may be summarized ---------------------------------------------------------------------


def check(studies):
    """Raises UsageError unless the Studies are different trainings that differ in seeds alone."""
    if len(studies) < 2:
        raise UsageError(f"expected at least two results directories, found {len(studies)}; what "
                         "one training shows is in its own summary.html")
    first = studies[0]
    weights = {}
    draws = {}  # (seed, split) -> folder; the same twice also where a folder is listed twice
    for study in studies:
        if study.dataset != first.dataset:
            raise UsageError(f"{first.folder} holds results on {first.dataset}, {study.folder} on "
                             f"{study.dataset}; expected one data set")
        seeds = sorted({part.seed for part in study.parts.values()})
        if len(seeds) > 1:
            raise UsageError(f"{study.folder} holds parts of the seeds {seeds}, expected one seed; "
                             "give each seed its own --results-dir")
        draw = seeds[0], study.split_hash
        if draw in draws:
            raise UsageError(f"{draws[draw]} and {study.folder} are both of seed {seeds[0]}, split "
                             f"{study.split_hash}; expected different trainings")
        draws[draw] = study.folder
        for part in study.parts.values():
            other = weights.setdefault(part.weights, study.folder)
            if other != study.folder:  # of edited code that does not use its seed
                raise UsageError(f"{part.name} has the same weights in {other} and "
                                 f"{study.folder}; expected different trainings")
    for name in common.PARTS:
        trained = []
        tested = []
        for study in studies:
            part = study.parts.get(name)
            if part:
                trained.append((study.folder, part.record))
            if part and part.has_part2:
                tested.append((study.folder, part.part2_record))
        check_records(name, trained)
        check_records(storage.robustness_name(name), tested)
    check_data(studies)


def check_records(name, records):
    """Raises UsageError if (folder, record) of one part differ in what changes results."""
    arguments = []
    for folder, record in records:
        if record is None:
            raise UsageError(f"{folder}/{name}.json is missing or of other weights, so the "
                             f"arguments of {name} cannot be compared; run it again, or leave the "
                             "directory out")
        skipped = NOT_COMPARED | checkpoints.no_effect(record["args"])
        values = {key: record["versions"].get(key, "absent") for key in RECORDED}
        values |= {key: value for key, value in record["args"].items() if key not in skipped}
        arguments.append((folder, values))
    for argument in sorted({key for _, values in arguments for key in values}):
        found = []
        for folder, values in arguments:
            value = checkpoints.spelled(values.get(argument, "absent"))
            if value != "absent" or argument not in ("shares", "optimizer", "script"):  # new
                found.append((folder, value))
        for folder, value in found:
            first, expected = found[0]
            if value != expected:
                flag = argument if argument in RECORDED else checkpoints.flag(argument)
                raise UsageError(f"{name} has {flag} {expected} in {first} and {value} in "
                                 f"{folder}; expected trainings that differ in seeds alone")


def check_data(studies):
    """Raises UsageError unless all have the same classes, numbers of images, perturbed images."""
    known = {}
    for study in studies:
        for part in study.parts.values():
            for key, what in (("classes", "the classes"), ("sizes", "the numbers of images")):
                found = part.record.get(key)
                other, expected = known.setdefault(key, (study.folder, found))
                if found != expected:
                    raise UsageError(f"{other} has {what} {expected}, {study.folder} {found}; "
                                     "expected one data set")
            for condition, pixels in part.pixels.items():  # the same in every part and training
                tested = f"{part.name} in {study.folder}"
                other, expected = known.setdefault(condition, (tested, pixels))
                if pixels != expected:
                    said = condition.removeprefix("test/").replace("/", " ")
                    raise UsageError(f"{other} and {tested} were tested on different images under "
                                     f"{said}, by other code, data or versions, or by random "
                                     "numbers that are not the generator's; run part 2 on both "
                                     "again")


# ---- means and tests ----------------------------------------------------------------------------


def over_trainings(overviews, names):
    """Lines whose values are arrays (n,), one number a training, nan where there is none."""
    result = {}
    for i, lines in enumerate(overviews):
        for line in lines:
            if line.title not in result:
                empty = {name: np.full(len(overviews), math.nan) for name in names}
                result[line.title] = line._replace(values=empty)
            for name in names:
                result[line.title].values[name][i] = line.values[name]
    return sorted(result.values(), key=lambda line: list(GROUPS).index(line.group))


def difference(ours, theirs):
    """The metrics.Difference over the trainings that both have, or None without any."""
    both = np.isfinite(ours) & np.isfinite(theirs)
    return metrics.paired_difference(ours[both], theirs[both]) if both.any() else None


def method_tests(lines, names):
    """The MethodTests of all parts against their references, over what both have.

    Holm's correction is within each pair's table, separately for clean images, perturbations and
    attacks: what is said of clean images does not depend on which perturbations were tried.
    """
    tests = []
    for part, reference in comparison.pairs(names):
        for group in GROUPS:
            changes = []
            for line in lines:
                if line.group == group and line.compared:
                    change = difference(line.values[part], line.values[reference])
                    if change:
                        changes.append((line, change))
            corrected = metrics.holm([change.p_value for _, change in changes])
            for (line, change), p_holm in zip(changes, corrected, strict=True):
                tests.append(MethodTest(line, part, reference, change, float(p_holm)))
    return tests


def training_rows(dataset, lines, names, tests):
    """The rows of trainings.csv: one a line, part and reference; fractions."""
    rows = []
    for line in lines:
        for name in names:
            values = line.values[name][np.isfinite(line.values[name])]
            row = {"dataset": dataset, "group": line.group, "line": pages.plain(line.title),
                   "part": name, "mean": float(values.mean()) if len(values) else "",
                   "sd": float(values.std(ddof=1)) if len(values) > 1 else "", "n": len(values),
                   "reference": "", "difference": "", "ci_low": "", "ci_high": "", "pairs": "",
                   "p_holm": "", "verdict": ""}
            mine = [test for test in tests if (test.line.title, test.part) == (line.title, name)]
            for test in mine:
                known = math.isfinite(test.change.low)
                rows.append(row | {
                    "reference": test.reference, "difference": test.change.mean,
                    "ci_low": test.change.low if known else "",
                    "ci_high": test.change.high if known else "", "pairs": test.change.n,
                    "p_holm": test.p_holm, "verdict": test.verdict})
            if not mine:
                rows.append(row)
    return rows


# ---- trainings.md -------------------------------------------------------------------------------


def spread(values, expected):
    """Mean ± standard deviation (n - 1) in %, with n where it is not the expected one."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    text = percent(values.mean())
    if len(values) > 1:
        text += f" ± {percent(values.std(ddof=1))}"
    return text if len(values) == expected else f"{text} (n = {len(values)})"


def claims_of_method(studies, titles, lines, tests):
    """The Claims that several trainings allow."""
    found = []
    by_title = {line.title: line.values for line in lines}
    costs = []
    for claim, more, less in (
            (f"{titles.get('part1')} is more accurate on its training images than on test images",
             TRAIN, TEST),
            (f"Perturbations cost {titles.get('part1')} accuracy", TEST, ALL_PERTURBED)):
        if "part1" in titles and less in by_title:  # what was not perturbed has no such line
            change = difference(by_title[more]["part1"], by_title[less]["part1"])
            if change:
                costs.append((claim, change))
    corrected = metrics.holm([change.p_value for _, change in costs])
    for (claim, change), p_holm in zip(costs, corrected, strict=True):
        found.append(method_claim(claim, change, p_holm))
    for test in tests:
        where = claims.CLAIMED.get(test.line.title)
        if test.line.title.startswith(MAIN_ATTACK):
            where = f"under {test.line.title}"
        if where:
            claim = f"{titles[test.part]} is more accurate than {titles[test.reference]} {where}"
            found.append(method_claim(claim, test.change, test.p_holm))
    return found + claims.attack_claims(studies) + claims.audit_claim(studies)


def head_table(studies, counts, titles):
    """Clean test accuracy of every head, of each part and of each part against its reference."""
    accuracies = {}  # head -> {part: (n,), one number a training, nan where there is none}
    for i, study in enumerate(studies):
        for part in study.parts.values():
            for (split, head), value in comparison.heads_of(part).items():
                if split == "test":
                    empty = {name: np.full(len(studies), math.nan) for name in counts}
                    accuracies.setdefault(head, empty)[part.name][i] = value
    heads = [head for head in HEADS if head in accuracies]
    body = []
    for name, n in counts.items():
        body.append((titles[name], *(spread(accuracies[head][name], n) for head in heads)))
    for part, reference in comparison.pairs(counts):
        cells = []
        for head in heads:
            change = difference(accuracies[head][part], accuracies[head][reference])
            cells.append(claims.between(change) if change else "-")
        body.append((f"{titles[part]} against {reference}", *cells))
    columns = [head.replace("_", " ") for head in heads]
    return markdown_table(("accuracy on the test set, %", *columns), body)


def method_claim(claim, change, p_holm):
    outcome = claims.OUTCOMES.get(comparison.verdict(p_holm, change.mean),
                                  f"not resolved with {trainings(change.n)}")
    evidence = f"{claims.between(change)}, n = {trainings(change.n)}"
    return claims.Claim(claim, f"{evidence}, {claims.tested(change, p_holm)}", outcome,
                        "trainings.csv")


def pair_table(tests):
    """The differences of one part to its reference as a Markdown table."""
    body = []
    for test in tests:
        change = test.change
        interval = p_holm = "-"
        if math.isfinite(change.low):
            interval = f"{percent(change.low, '+')} to {percent(change.high, '+')}"
            p_holm = claims.probability(test.p_holm).removeprefix("= ")
        body.append((test.line.markdown, percent(change.mean, "+"), interval, change.n, p_holm,
                     test.verdict))
    return markdown_table(("difference, points", "mean", "95 % interval", "n", "p (Holm)",
                           "verdict"), body)


def made_with(*studies):
    """{"commit", "mixed precision", "device", "torch", "--compile": {each value found: None}}."""
    found = {name: {} for name in ("commit", "mixed precision", "device", "torch", "--compile")}
    for study in studies:
        for part in study.parts.values():
            for record in filter(None, (part.record, part.part2_record)):
                said = record["versions"] | {"mixed precision": record.get("amp", "unknown"),
                                             "device": record.get("device", "unknown"),
                                             "--compile": record["args"].get("compile", "unknown")}
                for name, values in found.items():
                    values[checkpoints.spelled(said.get(name, "unknown"))] = None  # once, in order
    return found


def training_text(studies, tables, lines, cells, counts, tests):
    """The text of trainings.md."""
    titles = {}
    for study in studies:
        titles = study.titles | titles
    header = [f"{titles[name]}, n = {n}" for name, n in counts.items()]
    text = [f"# {trainings(len(studies))} on {pages.escape(studies[0].dataset)}",
            claims.claims_table(claims_of_method(studies, titles, lines, tests)),
            "Differences are paired: same seed, same split. Intervals and p-values are Student's "
            "over trainings (n - 1 degrees of freedom); p is Holm-corrected within each table of a "
            "part against its reference, separately for clean images, perturbations and attacks, "
            "and for the claims about part 1 alone over those claims. \"Better\" and \"worse\" are "
            f"said of a method only where p < {ALPHA}; the rest is not resolved with so few "
            "trainings, which shows neither that there is a difference nor that there is none. "
            "With so few, differences that happen to be alike give a small p. All trainings are "
            "tested on the same images, so no interval covers what other test images would change."]
    whole = sum(map(comparison.measured, studies), [])
    text += comparison.line_tables(lines, header, cells,
                                   comparison.explanation(studies, sum(tables, []), whole),
                                   ", mean ± standard deviation")
    for part, reference in comparison.pairs(counts):
        mine = [test for test in tests if (test.part, test.reference) == (part, reference)]
        if mine:
            first = next(study for study in studies if {part, reference} <= {*study.parts})
            said = comparison.argument_differences(first.parts[part], first.parts[reference])
            text += [f"## {titles[part]} against {titles[reference]}", pair_table(mine),
                     f"{said} (By the records in {code(first.folder.as_posix())}.)"]
    text += ["## Loss or head?",
             f"{comparison.ABOUT_HEADS} The same head on both parts separates the loss from the "
             "head. Intervals are Student's, not corrected for multiple comparisons.",
             head_table(studies, counts, titles)]
    items = []
    left_out = []
    for study in studies:
        seed = next(iter(study.parts.values())).seed
        made = [f"{name} {', '.join(values)}" for name, values in made_with(study).items()]
        items.append(f"- {code(study.folder.as_posix())}: seed {seed}, split {study.split_hash}; "
                     f"{', '.join(study.parts)}; {pages.escape('; '.join(made))}")
        left_out += [f"{study.folder.as_posix()}: {sentence}" for sentence in study.left_out]
    differing = [name for name, values in made_with(*studies).items() if len(values) > 1]
    if differing:
        items.append(f"- **Not all of these have the same {', '.join(differing)}.**")
    text += ["## What ran", "\n".join(items), "Each directory's summary.md has the commands.",
             "## Left out", bullets(left_out)]
    return "\n\n".join(text) + "\n"
