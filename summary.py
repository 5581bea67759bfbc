"""The comparison of all parts: comparison.csv, comparison.png and summary.md, made from the files that are there.

Every part calls it at its end. Over several trainings, each in a results directory of its own, it gives mean ± standard
deviation, on the terminal and in seeds.md beside them:

    python summary.py results/seed0 results/seed1 results/seed2
"""

from pathlib import Path

import numpy as np

import arguments
import common
import report

REFERENCE = {"part3": "part1", "part4": "part1", "part4_augmented": "part3"}  # compared with, on the same images
ALPHA = 0.05  # of Holm's correction over the whole table of one model
COLUMNS = ("dataset", "split_hash", "condition", "severity", "family", "in_part3_training", "part", "accuracy",
           "ci_low", "ci_high", "n", "reference", "difference", "p_holm", "verdict")
ATTACKS = ("fgsm", "pgd", "random")  # how their conditions' names begin
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
    names = labels(folder, table)
    report.write_rows(folder / "comparison.csv", table)
    plot_comparison(folder / "comparison.png", shared(table), names)
    with common.atomic(folder / "summary.md") as temporary:
        temporary.write_text(summary(folder, table, names))
    report.print_table(f"Comparison on {table[0]['dataset']}, test accuracy in % ({folder}/summary.md)", header(names),
                       [(title.strip("*"), *cells(values)) for title, values in overview(shared(table), list(names))])


def labels(folder, table):
    """The models that are there, with what each was trained with: {"part1": "cross-entropy", …}."""
    names = {m: label for m, label in report.MODELS.items() if any(r["part"] == m for r in table)}
    for model in names:
        meta = common.read_meta(folder / f"{model}.pt")
        loss = meta["args"].get("loss", "angular") if meta else "angular"
        names[model] = names[model].replace("angular", loss)
    return names


def comparison(folder):
    """One row a model and condition: accuracy of its own head on the test set, and the test against its reference.

    Raises UsageError if the tables in `folder` are not of one data set and split.
    """
    accuracy, correct, rows = {}, {}, report.read_all(folder)
    studies = {(r["dataset"], r["split_hash"]) for r in rows}
    if len(studies) != 1:
        raise common.UsageError(f"{folder} holds results of {len(studies)} data sets or splits, expected one: "
                                f"{sorted(studies)}; give each its own --results-dir")
    for row in rows:  # a part's own table comes before part 2's on it, and counts
        if row["split"] == "test" and row["head"] == "own" and row["metric"] == "accuracy":
            part = "part1" if row["part"] == "part2" else row["part"]
            accuracy.setdefault((row["condition"], row["severity"], part), row)
    for model in report.MODELS:
        for name in (report.robustness_name(model), model):
            path = folder / f"{name}_correct.npz"
            if path.exists():
                with np.load(path) as file:
                    correct |= {(*key.split("/"), model): file[key] for key in file.files if "/" in key}
        for key in [k for k in accuracy if k[2] == model and k[0].endswith("_from_part1")]:
            if not of_this_part1(folder, model):
                del accuracy[key]
    table = []
    for part in report.MODELS:
        mine = [key for key in accuracy if key[2] == part]
        pairs = {k: (correct.get(k, NONE), correct.get((*k[:2], REFERENCE.get(part)), NONE)) for k in mine}
        tested = [k for k, (ours, theirs) in pairs.items() if 0 < len(ours) == len(theirs) and k[1] != "0"]
        adjusted = dict(zip(tested, common.holm([common.mcnemar(*pairs[k]) for k in tested]), strict=True))
        for key in mine:
            condition, severity, _ = key
            row, family = accuracy[key], common.FAMILY.get(condition, "")
            if not family and condition != "clean":
                family = "attack" if condition.startswith(ATTACKS) else "CIFAR-10-C"
            seen = "" if condition not in common.FAMILY else "yes" if family in common.SEEN_FAMILIES else "no"
            reference = difference = verdict = ""
            if key in adjusted:
                reference, difference = REFERENCE[part], float(pairs[key][0].mean() - pairs[key][1].mean())
                verdict = "no difference shown" if adjusted[key] >= ALPHA else "better" if difference > 0 else "worse"
            table.append(dict(zip(COLUMNS, (
                row["dataset"], row["split_hash"], condition, severity, family, seen, part, float(row["value"]),
                float(row["ci_low"]), float(row["ci_high"]), int(row["n"]), reference, difference,
                adjusted.get(key, ""), verdict), strict=True)))
    return table


def of_this_part1(folder, model):
    """Whether the adversarial images tried on a model were made on the part 1 that is in the folder, if one is."""
    path, part1 = folder / f"{report.robustness_name(model)}_correct.npz", folder / "part1.pt"
    if not path.exists() or not part1.exists():
        return True
    with np.load(path) as file:
        return str(file["part1"]) == common.digest(common.load_checkpoint(part1, "cpu")[0])


def shared(table):
    """The attacks, and the rows whose condition all models have that part 2 was run on, so that means compare."""
    conditions = {}
    for r in table:
        conditions.setdefault(r["part"], set()).add((r["condition"], r["severity"]))
    tested = [keys for keys in conditions.values() if len(keys) > 1]
    return [r for r in table if r["family"] == "attack"
            or all((r["condition"], r["severity"]) in keys for keys in tested)]


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
    attacks = sorted({(r["condition"], float(r["severity"]), r["n"]) for r in table if r["family"] == "attack"})
    full = {e for c, e, _ in attacks if c.startswith("pgd")}  # where every attack is shown, elsewhere FGSM alone
    attacks = [(c, e, n) for c, e, n in attacks if e > 0 and (e in full or c in ("fgsm", "fgsm_l2"))]

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
        reference = np.array([[1 - mean(table, "part1", lambda r, c=c: r["condition"] == c)] for c in perturbed])
        reference[reference == 0] = np.nan
        lines += [("**mean over perturbations (mPC)**", of(*perturbed)),
                  ("mPC relative to clean", of(*perturbed) / of("clean")),
                  ("corruption error (part 1: 100)", (errors / reference).mean(0))]
    return lines + [(f"{c.replace('_', ' ')} {e:g}/255, n = {n}", values(
        lambda r, c=c, e=e, n=n: r["condition"] == c and float(r["severity"]) == e and r["n"] == n))
        for c, e, n in attacks]


def header(names):
    return ("condition", *(f"{model} ({label})" for model, label in names.items()))


def cells(values):
    return [report.percent(v) if np.isfinite(v) else "-" for v in values]


def answer(part, table, rows, epochs):
    """One sentence or two, made from the numbers; empty where they are not there. epochs: of each model's training."""
    def perturbed(r):
        return r["condition"] in common.FAMILY

    def percent(model, wanted):
        return f"{100 * mean(table, model, wanted):.1f} %"

    if part == "part2":
        mine = [r for r in table if r["part"] == "part1" and perturbed(r)]
        if not mine:
            return ""
        worst = min(mine, key=lambda r: r["accuracy"])
        name = f"{worst['condition'].replace('_', ' ')} {worst['severity']}".strip()
        attacks = {r["severity"]: r for r in table if r["part"] == "part1" and r["condition"] == "fgsm"}
        return (f"Accuracy is {percent('part1', lambda r: r['condition'] == 'clean')} on clean images and "
                f"{percent('part1', perturbed)} in the mean over perturbations; lowest under {name} "
                f"({report.percent(worst['accuracy'])} %)") + "".join(
                    f"; FGSM at {eps}/255 leaves {report.percent(attacks[eps]['accuracy'])} %"
                    for eps in ("1", "8") if eps in attacks) + "."
    found = {r["split"]: r for r in rows if (r["part"], r["condition"], r["head"], r["metric"])
             == (part, "clean", "own", "accuracy") and r["checkpoint"].endswith(f"{part}.pt")}
    if "evaluation" not in found:
        return ""
    sentence = "It classifies " + " and ".join(
        f"{report.percent(r['value'])} % of the {int(r['n']):,} {name} images (95 % interval "
        f"{report.percent(r['ci_low'])}–{report.percent(r['ci_high'])})" for name, r in found.items()) + "."
    tested = [r for r in table if r["part"] == part and r["verdict"]]
    reference = REFERENCE.get(part)
    if tested and epochs.get(part) != epochs.get(reference):
        sentence += f" Trained for {epochs.get(part, '?')} epochs, {reference} for {epochs.get(reference, '?')}."
    for r in tested:
        if r["condition"] == "clean":
            sentence += f" On clean test images {100 * r['difference']:+.1f} points to {reference}: {r['verdict']}."
    if any(perturbed(r) for r in tested):
        sentence += f" Mean over perturbations {percent(part, perturbed)}, {reference} {percent(reference, perturbed)}."
    others = [r["verdict"] for r in tested if r["condition"] != "clean"]
    if others:
        sentence += (f" Of {len(others)} perturbed and attacked conditions better in {others.count('better')}, worse "
                     f"in {others.count('worse')}; the rest shows no difference.")
    return sentence


def markdown_table(first, lines):
    rows = [first, ("---", *["---:"] * (len(first) - 1)), *lines]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in rows)


def summary(folder, table, names):
    """The text of summary.md."""
    rows, alike = report.read_all(folder), shared(table)
    metas = {m: meta for m in names if (meta := common.read_meta(folder / f"{m}.pt"))}
    epochs = {m: meta["epoch"] for m, meta in metas.items()}
    missing, text = [], [f"# Results on {table[0]['dataset']}", ""]
    for part, question in QUESTIONS.items():
        sentence = answer(part, alike, rows, epochs)
        if sentence:
            question = question.replace("Angular loss", f"{names.get(part, 'angular').split(',')[0]} loss")
            text += [f"**{part}. {question}** {sentence}", ""]
        else:
            missing.append(part)
    lines = [(title, *cells(values)) for title, values in overview(alike, list(names))]
    severities = ", ".join(sorted({r["severity"] for r in alike if r["condition"] in common.FAMILY} - {""}))
    left_out = len({(r["condition"], r["severity"]) for r in table}) - len(
        {(r["condition"], r["severity"]) for r in alike})
    text += ["## Accuracy on the test set (%)", "",
             f"Means over severities (tested: {severities or 'none yet'}); `comparison.csv` has each, with n, "
             f"intervals and tests. \"Seen\" families ({', '.join(common.SEEN_FAMILIES)}) are in part 3's training "
             f"data, the held-out one ({', '.join(common.HELD_OUT_FAMILIES)}) never is."
             + f" {left_out} conditions that not every model was tested on are left out." * bool(left_out), "",
             markdown_table(header(names), lines), "",
             "\"Better\" and \"worse\" are said where McNemar's exact test on the same images, Holm-corrected over "
             f"all conditions of a model, gives p < {ALPHA}. They speak of these trained networks, not of "
             "other seeds.", ""]
    heads = [r for r in rows if r["metric"] == "accuracy" and r["condition"] == "clean" and r["part"] != "part2"]
    by_head = {(r["part"], r["split"], r["head"]): report.percent(r["value"]) for r in heads}
    columns = list(dict.fromkeys(key[1:] for key in by_head))
    text += ["## Loss or head? Clean accuracy (%) of each head", "",
             "`own` is the part's classifier; `class_means`, `knn` (k = 20) and `probe` (linear) are fitted to the "
             "backbone's 512-d output of the training images alone.", "",
             markdown_table(("part", *(f"{s}, {h}" for s, h in columns)), [
                 (m, *(by_head.get((m, *column), "-") for column in columns)) for m in names]), ""]
    audits = [r for r in rows if r["metric"].startswith("audit: ")]
    failed = [f"{r['checkpoint']}: {r['metric'].removeprefix('audit: ')}" for r in audits if float(r["value"]) != 1]
    if audits:
        text += ["## Audit of the attacks", "", f"{len(audits) - len(failed)} of {len(audits)} checks passed."
                 + "".join(f"\n- **failed**: {line}" for line in failed), ""]
    text += ["## What ran", ""]
    for model in names:
        meta = metas.get(model)
        if meta:
            versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
            text.append(f"- {model}: `{meta['command']}`; {meta['epoch']} epochs, seed {meta['seed']}, split "
                        f"{meta['split_hash']}; {meta['device']}, mixed precision {meta['amp']}; {versions}")
        name = report.robustness_name(model)
        if (folder / f"{name}_correct.npz").exists():
            with np.load(folder / f"{name}_correct.npz") as file:
                text += [f"- {name}: `{file['command']}`"] * ("command" in file.files)
    text += ["", f"Missing: {', '.join(missing) or 'nothing'}.", ""]
    endings = ("history", "confusion", "umap", "severities", "examples", "fgsm", "adversarial")
    figures = [folder / f"{name}_{ending}.png" for m in names for name in (m, report.robustness_name(m))
               for ending in endings if (folder / f"{name}_{ending}.png").exists()]
    text += ["## Figures", "", *(f"![{f.stem}]({f.name})\n" for f in [folder / "comparison.png", *figures])]
    return "\n".join(text)


def plot_comparison(path, table, names):
    plt, models = report.pyplot(), list(names)
    conditions = list(dict.fromkeys(r["condition"] for r in table if r["family"] != "attack"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.3 * len(conditions) + 2.2), layout="constrained",
                                         width_ratios=(3, 2))
    order = sorted(conditions, key=lambda c: (c != "clean", common.FAMILY.get(c) in common.HELD_OUT_FAMILIES,
                                              common.FAMILY.get(c, "")))[::-1]
    left.set_ylim(-0.6, len(order) - 0.4)
    for offset, model in zip(0.15 * ((len(models) - 1) / 2 - np.arange(len(models))), models, strict=True):
        values = [mean(table, model, lambda r, c=c: r["condition"] == c) * 100 for c in order]
        left.plot(values, np.arange(len(order)) + offset, "o", markersize=5, color=report.PART_COLORS[model],
                  label=f"{model} ({names[model]})")
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
    right.set_visible(any(r["condition"] == "fgsm" for r in table))
    right.set(xlabel="FGSM eps (1/255)", ylabel="test accuracy (%)", ylim=(0, 100), xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(models), fontsize=8)
    report.save(figure, path, f"{table[0]['dataset']}, test images, 95 % intervals under attack.")


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
    names = {m: label for m, label in report.MODELS.items()
             if all(any(r["part"] == m for r in table) for table in tables)}
    overviews = [dict(overview(shared(table), list(names))) for table in tables]
    lines = []
    for title in (t for t in overviews[0] if all(t in o for o in overviews)):
        values = 100 * np.array([o[title] for o in overviews])  # (seeds, models)
        lines.append((title, *(f"{m:.1f} ± {s:.1f}" if np.isfinite(m) else "-"
                               for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True))))
    name = studies.pop()[0]
    report.print_table(f"{name}, test accuracy in %, mean ± standard deviation of {len(tables)} trainings",
                       header(names), [(title.strip("*"), *line) for title, *line in lines])
    with common.atomic(Path(folders[0]).parent / "seeds.md") as temporary:
        temporary.write_text("\n".join([
            f"# {len(tables)} trainings on {name}", "", "Test accuracy in %, mean ± standard deviation (n - 1) over "
            f"{', '.join(map(str, folders))}.", "", markdown_table(header(names), lines), ""]))


if __name__ == "__main__":
    parser = arguments.new_parser(__doc__)
    parser.add_argument("folder", nargs="+", help="results directories, one a seed")
    arguments.run(lambda: compare_seeds(parser.parse_args().folder))
