"""The table that opens a summary: claims, their evidence, and whether it supports them."""

import math
from typing import NamedTuple

import common
import metrics
import storage
from comparison import HELD_OUT, JPEG_NOTE, SEEN, TEST, other_pixels, pairs, right, spoken, verdict
from metrics import percent
from pages import escape, markdown_table

import numpy as np

STRONGEST = ("worst_case_audit", "worst_case_audit_l2",  # of all attacks, PGD with them
             "worst_case", "worst_case_l2", "pgd", "pgd_l2", "fgsm", "fgsm_l2")
OUTCOMES = {"better": "supported", "worse": "contradicted"}
CLAIMED = {TEST: "on clean test images", SEEN: "under perturbations that part 3 trains on",
           HELD_OUT: "under perturbations that part 3 does not train on"}


class Claim(NamedTuple):
    """A line of the table that opens a summary."""

    claim: str
    evidence: str
    verdict: str  # "supported", "contradicted" or "not resolved", and for what
    file: str


def claims_table(claims):
    body = [(claim.claim, claim.evidence, f"**{claim.verdict}**", claim.file) for claim in claims]
    return markdown_table(("claim", "evidence", "verdict", "file"), body, left=4)


def claims_of_one(study, table, tests):
    """The Claims that one training of each part allows: all are about these networks only."""
    claims = []
    part1 = study.parts.get("part1")
    if part1:
        claims += gap_claim(part1) + perturbation_claim(part1, table)
    for part, reference in pairs(study.parts):
        ours, theirs = study.parts[part], study.parts[reference]
        for row in tests:
            key = row["split"], row["condition"], row["severity"]
            mine = row["part"], row["reference"]
            if mine == (part, reference) and key == ("test", "clean", ""):
                change = image_difference(ours, theirs, {"clean": [key]})
                claims.append(network_claim(ours, theirs, TEST, change, row["p_holm"]))
        means = {}
        for title, note in ((SEEN, "yes"), (HELD_OUT, "no")):
            change = image_difference(ours, theirs, keys_of(table, note))
            if change:
                means[title] = change
        corrected = metrics.holm([change.p_value for change in means.values()])
        for (title, change), p_value in zip(means.items(), corrected, strict=True):
            claims.append(network_claim(ours, theirs, title, change, p_value))
    claims += attack_claims([study])
    return claims + audit_claim([study])


def outcome_of(supported, contradicted):
    """What intervals that lie apart say of a claim."""
    if supported:
        return "supported"
    return "contradicted" if contradicted else "not resolved"


def gap_claim(part):
    """That a part is more accurate on its training images than on test images."""
    train = part.accuracies.get(("train", "clean", ""))
    test = part.accuracies.get(("test", "clean", ""))
    if not train or not test:
        return []
    outcome = outcome_of(train["ci_low"] > test["ci_high"], train["ci_high"] < test["ci_low"])
    gap = f"{percent(train['value'] - test['value'])} points"
    return [Claim(f"{part.title} is more accurate on its training images than on test images",
                  f"training {with_interval(train)}, test {with_interval(test)}: a generalization "
                  f"gap of {gap}", f"this network: {outcome}", f"{part.name}.csv")]


def perturbation_claim(part, table):
    """That perturbations cost accuracy on the same images, averaged over all of them as in mPC."""
    perturbed = mean_right(part, keys_of(table, "yes", "no", JPEG_NOTE))
    clean = right(part, ("test", "clean", ""))
    if perturbed is None or clean is None or len(perturbed) != len(clean):
        return []
    change = metrics.paired_difference(clean, perturbed)
    outcome = OUTCOMES.get(verdict(change.p_value, change.mean), "not resolved")
    return [Claim(f"Perturbations cost {part.title} accuracy",
                  f"{over_images(change)}, {tested(change, change.p_value)}",
                  f"this network: {outcome}", f"{storage.robustness_name(part.name)}.csv")]


def keys_of(table, *notes):
    """{condition: [(split, condition, severity)]} of the perturbations of these notes.

    A note is what `comparison.in_training` says of a perturbation.
    """
    keys = {}
    for row in table:
        if row["in_part3_training"] in notes:
            key = row["split"], row["condition"], row["severity"]
            keys.setdefault(row["condition"], {})[key] = None  # a dict: each once, in order
    return keys


def mean_right(part, keys):
    """(n,) shares of conditions under which each image is right; None unless all are known."""
    means = []
    for severities in keys.values():
        arrays = [right(part, key) for key in severities]
        if any(array is None for array in arrays):
            return None
        means.append(np.mean(arrays, axis=0))
    return np.mean(means, axis=0) if means else None


def image_difference(ours, theirs, keys):
    """The metrics.Difference of two networks over the same images, or None."""
    for severities in keys.values():
        if any(other_pixels(ours, theirs, key) for key in severities):
            return None
    mine, other = mean_right(ours, keys), mean_right(theirs, keys)
    if mine is None or other is None or mine.shape != other.shape:
        return None
    return metrics.paired_difference(mine, other)


def network_claim(ours, theirs, title, change, p_value):
    """That one network is more accurate than another."""
    sentence = f"{ours.title} is more accurate than {theirs.title} {CLAIMED[title]}"
    if change is None:
        return Claim(sentence, "which images are right is not known for both", "not tested",
                     "comparison.csv")
    outcome = OUTCOMES.get(verdict(p_value, change.mean), "not resolved")
    return Claim(sentence, f"{over_images(change)}, {tested(change, p_value)}",
                 f"this network: {outcome}", "comparison.csv")


def attack_claims(studies):
    """That parts are less accurate than guessing under the strongest attack, network by network.

    With several trainings, a verdict is given only if it is the same for each of them.
    """
    of_each = {}  # sentence -> its Claim on each training
    for name in common.PARTS:
        for study in studies:
            claim = attack_claim(study.parts[name]) if name in study.parts else None
            if claim:
                of_each.setdefault(claim.claim, []).append(claim)
    claims = []
    for sentence, found in of_each.items():
        verdicts = {claim.verdict for claim in found}
        said = verdicts.pop() if len(verdicts) == 1 else "not resolved"
        evidence = "; ".join(claim.evidence for claim in found)
        whose = "this network: " if len(found) == 1 else ""
        claims.append(Claim(sentence, evidence, whose + said, found[0].file))
    return claims


def attack_claim(part):
    """The Claim about the strongest attack tried on a part at its largest eps, or None."""
    classes = part.record.get("classes") if part.record else None
    if not isinstance(classes, list) or not classes:
        return None
    for condition in STRONGEST:
        rows = [row for key, row in part.accuracies.items()
                if key[:2] == ("test", condition) and key[2]]
        if rows:
            row = max(rows, key=lambda row: float(row["severity"]))
            accuracy, how = without_looking(part, classes)
            outcome = outcome_of(row["ci_high"] < accuracy, row["ci_low"] > accuracy)
            return Claim(f"{part.title} is not robust to attacks: less accurate than {how} "
                         f"({percent(accuracy)} %) at {float(row['severity']):g}/255 "
                         f"({spoken(condition)})", with_interval(row), outcome,
                         f"{storage.robustness_name(part.name)}.csv")
    return None


def without_looking(part, classes):
    """(accuracy, how) of the best answer that does not depend on the image."""
    named = {f"accuracy of {name}" for name in classes}
    sizes = {}  # of each class once: edited code may have rows of one twice, or of several together
    for row in part.rows:
        if (row["split"], row["condition"]) == ("test", "clean") and row["metric"] in named:
            sizes[row["metric"]] = row["n"]
    counts = [*sizes.values()]  # none where part 2's table is alone
    if counts and min(counts) < max(counts):
        return max(counts) / sum(counts), "always naming the largest class"
    return 1 / len(classes), "guessing"


def audits(study):
    """[(sentence, passed)] of the audits of all attacks."""
    found = []
    for part in study.parts.values():
        for row in part.rows:
            if row["metric"].startswith("audit: "):
                text = f"{part.name}: {escape(row['metric'].removeprefix('audit: '))}"
                found.append((text, row["value"] == 1))
    return found


def audit_claim(studies):
    found = sum(map(audits, studies), [])
    if not found:
        return []
    passed = sum(passed for _, passed in found)
    outcome = "supported" if passed == len(found) else "contradicted"
    claim = "No audit check speaks against the attacks"
    return [Claim(claim, f"{passed} of {len(found)} pass", outcome,
                  "summary.md, Audit of the attacks")]


def with_interval(row):
    """An accuracy with its interval and n, in words."""
    return (f"{percent(row['value'])} % ({percent(row['ci_low'])} to "
            f"{percent(row['ci_high'])}, n = {row['n']:,})")


def points(difference):
    return f"{percent(difference, '+')} points"


def between(change):
    """A Difference with its interval, in points."""
    if not math.isfinite(change.low):
        return f"{points(change.mean)} (no interval)"
    low, high = percent(change.low, "+"), percent(change.high, "+")
    return f"{points(change.mean)} ({low} to {high})"


def over_images(change):
    return f"{between(change)}, n = {change.n:,} images"


def tested(change, p_value):
    """What a test of a Difference says, its p corrected; without a spread there is none."""
    return f"p {probability(p_value)}" if math.isfinite(change.low) else "no test"


def probability(p_value):
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.2g}"
