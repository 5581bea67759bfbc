"""The comparison of all parts: comparison.csv, comparison.png and summary.md, made from the files that are there.

Every part calls it at its end. Over several trainings, each in a results directory of its own, it gives mean ± standard
deviation, on the terminal and in seeds.md beside them:

    python summary.py results/seed0 results/seed1 results/seed2
"""

import sys
from pathlib import Path

import numpy as np

import arguments
import common
import report

REFERENCE = "part1"  # what every other model is compared with, on the same images
ALPHA = 0.05  # of Holm's correction over the whole table of one model
COLUMNS = ("condition", "severity", "family", "trained_on", "part", "accuracy", "ci_low", "ci_high", "n",
           "difference", "p_holm", "verdict")
NONE = np.zeros(0, bool)
QUESTIONS = {
    "part1": "How well does the network generalize from one fifth of the training data?",
    "part2": "How robust is it to perturbed and attacked test images?",
    "part3": "What does it gain from perturbed training data?",
    "part4": "Does the Angular loss do better than cross-entropy?",
    "part4_augmented": "Does the Angular loss do better on perturbed training data?",
}


def compare(folder):
    """Writes the three files of the comparison into `folder` and prints its table."""
    folder = Path(folder)
    table = comparison(folder)
    models = [m for m in report.MODELS if any(r["part"] == m for r in table)]
    report.write_rows(folder / "comparison.csv", table)
    plot_comparison(folder / "comparison.png", table, models, dataset(folder))
    with common.atomic(folder / "summary.md") as temporary:
        temporary.write_text(summary(folder, table, models))
    report.print_table(f"Comparison on {dataset(folder)}, test accuracy in % ({folder}/summary.md)", header(models),
                       [(title.strip("*"), *cells(values)) for title, values in overview(table, models)])


def dataset(folder):
    return report.read_all(folder)[0]["dataset"]


def comparison(folder):
    """One row a model and condition: accuracy of its own head on the test set, and the test against part 1."""
    accuracy, correct = {}, {}
    for row in report.read_all(folder):
        if row["split"] == "test" and row["head"] == "own" and row["metric"] == "accuracy":
            part = REFERENCE if row["part"] == "part2" else row["part"]
            accuracy[row["condition"], row["severity"], part] = row
    for model in report.MODELS:
        for name in (model, report.robustness_name(model)):
            path = folder / f"{name}_correct.npz"
            if path.exists():
                with np.load(path) as file:
                    correct |= {(*key.split("/"), model): file[key] for key in file.files}
    table = []
    for part in report.MODELS:
        mine = [key for key in accuracy if key[2] == part]
        pairs = {k: (correct.get(k, NONE), correct.get((*k[:2], REFERENCE), NONE)) for k in mine if part != REFERENCE}
        tested = [k for k, (ours, theirs) in pairs.items() if 0 < len(ours) == len(theirs)]  # the same images
        p_values = [common.mcnemar(*pairs[k]) for k in tested]
        adjusted = dict(zip(tested, common.holm(p_values), strict=True))
        for key in mine:
            condition, severity, _ = key
            row, reference = accuracy[key], accuracy.get((condition, severity, REFERENCE))
            difference = float(row["value"]) - float(reference["value"]) if key in adjusted else ""
            family = common.FAMILY.get(condition, "attack" if condition in report.ATTACKS
                                       else "CIFAR-10-C" if condition.startswith("cifar10c ") else "")
            verdict = "" if key not in adjusted else "no difference shown" if adjusted[key] >= ALPHA else (
                "better" if difference > 0 else "worse")
            trained_on = "" if condition not in common.FAMILY else "yes" if family in common.SEEN_FAMILIES else "no"
            table.append(dict(zip(COLUMNS, (
                condition, severity, family, trained_on, part, float(row["value"]), float(row["ci_low"]),
                float(row["ci_high"]), int(row["n"]), difference, adjusted.get(key, ""), verdict), strict=True)))
    return table


def mean(table, part, wanted):
    """Mean accuracy of a model over the conditions that `wanted` picks: over severities, then over conditions."""
    groups = {}
    for row in table:
        if row["part"] == part and wanted(row):
            groups.setdefault(row["condition"], []).append(row["accuracy"])
    return np.mean([np.mean(values) for values in groups.values()]) if groups else np.nan


def overview(table, models):
    """What a reader compares: [(line's title, [value of each model])], fractions, nan where there is none.

    Severities are averaged. mPC is the mean over perturbations; the corruption error is each perturbation's error
    divided by part 1's, averaged (Hendrycks & Dietterich 2019, with part 1 in AlexNet's place).
    """
    families = {r["condition"]: r["family"] for r in table}
    seen = [c for c, f in families.items() if f in common.SEEN_FAMILIES]
    held_out = [c for c, f in families.items() if f in common.HELD_OUT_FAMILIES]
    published = [c for c, f in families.items() if f == "CIFAR-10-C"]
    attacks = sorted({(r["condition"], float(r["severity"])) for r in table if r["family"] == "attack"})
    attacks = [(c, e) for c, e in attacks if e > 0 and (c != "random_sign" or ("pgd", e) in attacks)]

    def values(wanted):
        return np.array([mean(table, m, wanted) for m in models])

    def of(*conditions):
        return values(lambda r: r["condition"] in conditions)

    lines = [("clean", of("clean"))]
    for group, title in ((seen, "seen family"), (held_out, "held-out family"), (published, "CIFAR-10-C")):
        lines += [(f"{c.replace('_', ' ')} ({families[c]})", of(c)) for c in group]
        lines += [(f"**mean, {title}**", of(*group))] * bool(group)
    perturbed = seen + held_out
    if perturbed:
        errors = np.array([1 - of(c) for c in perturbed])  # (conditions, models)
        reference = [1 - mean(table, REFERENCE, lambda r, c=c: r["condition"] == c) for c in perturbed]
        lines += [("**mean over perturbations (mPC)**", of(*perturbed)),
                  ("mPC relative to clean", of(*perturbed) / of("clean")),
                  ("corruption error (part 1: 100)", (errors / np.maximum(reference, 1e-9)[:, None]).mean(0))]
    return lines + [(f"{c.replace('_', ' ')} {e:g}/255",
                     values(lambda r, c=c, e=e: r["condition"] == c and float(r["severity"]) == e)) for c, e in attacks]


def header(models):
    return ("condition", *(f"{m} ({report.MODELS[m]})" for m in models))


def cells(values):
    return [report.percent(v) if np.isfinite(v) else "-" for v in values]


def answer(part, table, rows):
    """One sentence, made from the numbers; None where they are not there."""
    def perturbed(r):
        return r["condition"] in common.FAMILY

    def percent(model, wanted):
        return f"{100 * mean(table, model, wanted):.1f} %"

    mine = [r for r in table if r["part"] == part]
    if part == "part1" and mine:
        found = {r["split"]: r for r in rows if (r["part"], r["condition"], r["head"], r["metric"])
                 == ("part1", "clean", "own", "accuracy")}
        return "It classifies " + " and ".join(
            f"{report.percent(r['value'])} % of the {int(r['n']):,} {name} images (95 % interval "
            f"{report.percent(r['ci_low'])}–{report.percent(r['ci_high'])})" for name, r in found.items()) + "."
    if part == "part2":
        mine = [r for r in table if r["part"] == REFERENCE and perturbed(r)]
        if mine:
            worst = min(mine, key=lambda r: r["accuracy"])
            name = f"{worst['condition'].replace('_', ' ')} {worst['severity']}".strip()
            sentence = (f"Accuracy is {percent(REFERENCE, lambda r: r['condition'] == 'clean')} on clean images and "
                        f"{percent(REFERENCE, perturbed)} in the mean over perturbations; lowest under "
                        f"{name} ({report.percent(worst['accuracy'])} %)")
            attacks = {float(r["severity"]): r for r in table if r["part"] == REFERENCE and r["condition"] == "fgsm"}
            return sentence + "".join(f"; FGSM at {eps:g}/255 leaves {report.percent(attacks[eps]['accuracy'])} %"
                                      for eps in (1, 8) if eps in attacks) + "."
    tested = [r for r in mine if r["verdict"]]
    if part in report.MODELS and part != REFERENCE and tested:
        clean = next((r for r in tested if r["condition"] == "clean"), None)
        others = [r for r in tested if r["condition"] != "clean"]
        counts = ", ".join(f"{verdict} in {sum(r['verdict'] == verdict for r in others)}"
                           for verdict in ("better", "worse"))
        sentence = "" if clean is None else (f"On clean test images {100 * clean['difference']:+.1f} points against "
                                             f"part 1: {clean['verdict']}. ")
        if any(perturbed(r) for r in others):
            sentence += f"Mean over perturbations {percent(part, perturbed)}, part 1 {percent(REFERENCE, perturbed)}. "
        return sentence + (f"Of {len(others)} perturbed and attacked conditions: {counts}, the rest shows no "
                           "difference." if others else "")
    return None


def markdown_table(first, lines):
    rows = [first, ("---", *["---:"] * (len(first) - 1)), *lines]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in rows)


def summary(folder, table, models):
    """The text of summary.md."""
    rows = report.read_all(folder)
    missing, text = [], [f"# Results on {dataset(folder)}", ""]
    for part, question in QUESTIONS.items():
        sentence = answer(part, table, rows)
        if sentence:
            text += [f"**{part}. {question}** {sentence}", ""]
        else:
            missing.append(part)
    lines = [(title, *cells(values)) for title, values in overview(table, models)]
    severities = ", ".join(sorted({r["severity"] for r in table if r["condition"] in common.FAMILY} - {""}))
    text += ["## Accuracy on the test set (%)", "",
             f"Means over severities (tested: {severities or 'none yet'}); `comparison.csv` has each, with intervals "
             f"and tests. \"Seen\" families ({', '.join(common.SEEN_FAMILIES)}) are in part 3's training data, the "
             f"held-out one ({', '.join(common.HELD_OUT_FAMILIES)}) never is.", "",
             markdown_table(header(models), lines), "",
             "\"Better\" and \"worse\" are said where McNemar's exact test on the same images, Holm-corrected over "
             f"all conditions of a model, gives p < {ALPHA}. They speak of these trained networks, not of "
             "other seeds.", ""]
    heads = [r for r in rows if r["metric"] == "accuracy" and r["condition"] == "clean" and r["part"] != "part2"]
    by_head = {(r["part"], r["split"], r["head"]): report.percent(r["value"]) for r in heads}
    columns = list(dict.fromkeys(key[1:] for key in by_head))
    text += ["## Loss or head? Clean accuracy (%) of each head", "",
             "`own` is the part's classifier; `class_means` and `knn` (k = 20) use the backbone's 512-d output and the "
             "training images alone.", "",
             markdown_table(("part", *(f"{s}, {h}" for s, h in columns)), [
                 (m, *(by_head.get((m, *column), "-") for column in columns)) for m in models]), ""]
    audits = [r for r in rows if r["metric"].startswith("audit: ")]
    failed = [f"{r['checkpoint']}: {r['metric'].removeprefix('audit: ')}" for r in audits if float(r["value"]) != 1]
    if audits:
        text += ["## Audit of the attacks", "", f"{len(audits) - len(failed)} of {len(audits)} checks passed."
                 + "".join(f"\n- **failed**: {line}" for line in failed), ""]
    text += ["## What ran", ""]
    for model in models:
        meta = common.read_meta(folder / f"{model}.pt")
        if meta:
            versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
            text.append(f"- {model}: `{meta['command']}`; {meta['epoch']} epochs, seed {meta['seed']}, split "
                        f"{meta['split_hash']}; {meta['device']}, mixed precision {meta['amp']}; {versions}")
    text += ["", f"Missing: {', '.join(missing) or 'nothing'}.", ""]
    return "\n".join(text)


def plot_comparison(path, table, models, dataset):
    plt = report.pyplot()
    conditions = list(dict.fromkeys(r["condition"] for r in table if r["family"] != "attack"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.3 * len(conditions) + 2.2), layout="constrained",
                                         width_ratios=(3, 2))
    order = sorted(conditions, key=lambda c: (c != "clean", common.FAMILY.get(c) in common.HELD_OUT_FAMILIES,
                                              common.FAMILY.get(c, "")), reverse=True)
    left.set_ylim(-0.6, len(order) - 0.4)
    for offset, model in zip(0.15 * ((len(models) - 1) / 2 - np.arange(len(models))), models, strict=True):
        values = [mean(table, model, lambda r, c=c: r["condition"] == c) * 100 for c in order]
        left.plot(values, np.arange(len(order)) + offset, "o", markersize=5, color=report.PART_COLORS[model],
                  label=f"{model} ({report.MODELS[model]})")
        attack = sorted((float(r["severity"]), r["accuracy"] * 100, (r["accuracy"] - r["ci_low"]) * 100,
                         (r["ci_high"] - r["accuracy"]) * 100) for r in table
                        if r["part"] == model and r["condition"] == "fgsm")
        if attack:
            x, y, below, above = zip(*attack, strict=True)
            right.errorbar(x, y, (below, above), color=report.PART_COLORS[model], marker="o", markersize=4, capsize=2)
    left.set_yticks(range(len(order)), [c.replace("_", " ") + (
        f" ({common.FAMILY[c]}{', held out' if common.FAMILY[c] in common.HELD_OUT_FAMILIES else ''})"
        if c in common.FAMILY else "") for c in order])
    left.set(xlabel="test accuracy (%), mean over severities", xlim=(0, 100))
    right.set(xlabel="FGSM eps (1/255)", ylabel="test accuracy (%)", ylim=(0, 100), xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(models), fontsize=8)
    report.save(figure, path, f"{dataset}, test images, 95 % intervals under attack.")


def compare_seeds(folders):
    """Prints mean ± standard deviation (n - 1) over results directories of different seeds; writes seeds.md."""
    tables, studies, seeds = [], set(), []
    for folder in folders:
        rows = report.read_all(folder)
        if not rows:
            raise common.UsageError(f"{folder} holds no results; expected directories that the parts wrote")
        tables.append(comparison(Path(folder)))
        studies |= {(r["dataset"], r["split_hash"]) for r in rows}
        seeds.append(tuple(sorted({r["seed"] for r in rows})))
    if len(studies) > 1 or len(set(seeds)) < len(seeds) or len(seeds) < 2:
        raise common.UsageError(f"expected at least two directories of one data set and split and of different seeds; "
                                f"found {sorted(studies)} and the seeds {seeds}")
    models = [m for m in report.MODELS if all(any(r["part"] == m for r in table) for table in tables)]
    overviews = [dict(overview(table, models)) for table in tables]
    lines = []
    for title in (t for t in overviews[0] if all(t in o for o in overviews)):
        values = 100 * np.array([o[title] for o in overviews])  # (seeds, models)
        lines.append((title, *(f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(0), values.std(0, ddof=1),
                                                                   strict=True))))
    name = studies.pop()[0]
    report.print_table(f"{name}, test accuracy in %, mean ± standard deviation of {len(tables)} trainings",
                       header(models), [(title.strip("*"), *line) for title, *line in lines])
    with common.atomic(Path(folders[0]).parent / "seeds.md") as temporary:
        temporary.write_text("\n".join([
            f"# {len(tables)} trainings on {name}", "", "Test accuracy in %, mean ± standard deviation (n - 1) over "
            f"{', '.join(map(str, folders))}.", "", markdown_table(header(models), lines), ""]))


if __name__ == "__main__":
    arguments.run(lambda: compare_seeds(sys.argv[1:]))
