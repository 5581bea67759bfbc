"""The audit of an attack: is the accuracy that it leaves robustness, or gradient masking?

After Carlini et al. 2019, "On Evaluating Adversarial Robustness". A failed check is reported on the
terminal, in the table and in the figure.
"""

from typing import NamedTuple

import report
from metrics import percent

import torch

ZERO_GRADIENTS = 0.01  # share of images without a gradient from which the check fails
PGD_LEAVES = 0.1  # accuracy that PGD may leave at the largest eps if no gradients are masked
PGD_AT_LEAST = {"inf": 8, "2": 256}  # eps in 1/255 that is large enough to leave next to nothing
SCALE_FGSM = 0.02  # by how much unit logits may strengthen FGSM: more shows a saturated softmax
SCALE_PGD = 0.05  # the same for PGD, on fewer images
ROUNDING = 1e-9  # of a difference of two shares


class Names(NamedTuple):
    """What the attacks in one norm are called in tables."""

    fgsm: str
    pgd: str
    random: str


NAMES = {"inf": Names("fgsm", "pgd", "random_sign"),
         "2": Names("fgsm_l2", "pgd_l2", "random_l2")}  # by part 2's --norm


class Check(NamedTuple):
    """One check of the audit."""

    name: str
    found: str
    passed: bool
    n: int


def audit_attacks(names, right, pgd_idx, audited, no_gradient, excess, changed):
    """The audit: a list of Check.

    right: (attack, eps in 1/255) → booleans, which images stay right.  pgd_idx: positions of those
    that PGD attacks.  audited: the eps at which all attacks were tried.  no_gradient: share of
    images without a gradient.  excess: largest |delta| - eps.  changed: predictions eps 0 changes.
    """
    n = len(right[names.fgsm, 0])
    checks = [Check("|delta| is at most eps", f"{excess * 255:+.1e}/255", excess < 1e-6, n),
              Check("few images without a gradient", f"{no_gradient:.2%}",
                    no_gradient < ZERO_GRADIENTS, n),
              Check("eps 0 equals clean", f"{changed} differ", changed == 0, n)]
    for eps in audited:
        checks += checks_at(names, right, pgd_idx, eps)
    for name in (names.pgd, f"{names.pgd}_unit"):
        left = share(right[name, audited[-1]])
        checks.append(Check(f"{name} {audited[-1]:g}/255 leaves next to nothing", f"{left:.1%}",
                            left <= PGD_LEAVES, len(pgd_idx)))
    return checks


def checks_at(names, right, pgd_idx, eps):
    """The checks that compare one attack with another on the same images, at one eps."""
    at = f"{eps:g}/255"
    fgsm, fgsm_unit = right[names.fgsm, eps], right[f"{names.fgsm}_unit", eps]
    pgd, pgd_unit = right[names.pgd, eps], right[f"{names.pgd}_unit", eps]
    noise = right[names.random, eps]
    checks = [
        compared(f"{names.random} {at} is weaker than {names.fgsm}", noise, fgsm,
                 share(noise) > share(fgsm) or share(fgsm) == 0),
        compared(f"{names.pgd} {at} is stronger than {names.fgsm}", pgd, fgsm[pgd_idx],
                 share(pgd) < share(fgsm[pgd_idx]) or share(pgd) == 0),
        compared(f"{names.fgsm}_unit {at} is hardly stronger than {names.fgsm}", fgsm_unit, fgsm,
                 share(fgsm) - share(fgsm_unit) <= SCALE_FGSM + ROUNDING),
        compared(f"{names.pgd}_unit {at} is hardly stronger than {names.pgd}", pgd_unit, pgd,
                 share(pgd) - share(pgd_unit) <= SCALE_PGD + ROUNDING)]
    transfer = right.get((f"{names.fgsm}_from_part1", eps))
    if transfer is not None:
        checks.append(compared(f"{names.fgsm}_from_part1 {at} is not stronger than {names.fgsm}",
                               transfer, fgsm, share(transfer) >= share(fgsm)))
    return checks


def share(right):
    return int(right.sum()) / len(right)


def compared(name, ours, theirs, passed):
    found = f"{percent(share(ours))} against {percent(share(theirs))} %"
    return Check(name, found, passed, len(ours))


def worst_case_rows(run, names, right, pgd_idx, sweep):
    """Accuracy where an image counts as right only if it is so under every attack on the model.

    worst_case: on all attacked images, under the one-step attacks; predicted labels and noise are
    tried only at part 2's AUDIT_EPS.  worst_case_audit: on the audit's images, under PGD as well.
    Transfer from part 1 does not count: part 1 is attacked only by its own adversarial images, and
    the parts must be comparable.
    """
    rows = []
    for eps in sweep[1:]:
        withstood = torch.ones_like(right[names.fgsm, eps])
        by_pgd = torch.ones_like(withstood[pgd_idx])
        for (name, at), found in right.items():
            if at != eps or name.endswith("_from_part1"):
                continue
            if name.startswith(names.pgd):
                by_pgd = by_pgd & found
            else:
                withstood = withstood & found
        ending = "" if names.fgsm == "fgsm" else "_l2"
        everyone = torch.ones_like(withstood)
        rows.append(report.accuracy_row(run, "test", f"worst_case{ending}", f"{eps:g}", "own",
                                        withstood, everyone))
        if (names.pgd, eps) in right:
            rows.append(report.accuracy_row(run, "test", f"worst_case_audit{ending}", f"{eps:g}",
                                            "own", withstood[pgd_idx] & by_pgd, everyone[pgd_idx]))
    return rows
