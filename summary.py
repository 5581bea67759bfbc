"""The comparison of parts, and of trainings, made from the tables that are there.

Every part calls `compare` at its end: it writes comparison.csv, comparison.png, summary.md and the
same as one page, summary.html. For several trainings with different seeds or splits, each in its
own results directory, this writes trainings.csv, .md and .html beside those directories:

    python summary.py results/seed1 results/seed2 results/seed3

One training tells of one network: McNemar's exact test on the same images. Several trainings tell
of a method: Student's t on the paired differences over trainings. Both are Holm-corrected within
each pair of a part and its reference, separately for clean images, perturbations and attacks.
"""

import math

import arguments
import checkpoints
import claims
import common
import comparison
import pages
import plots
import report
import storage
import terminal
from claims import points, probability, with_interval
from metrics import percent
from pages import bullets, code, escape, markdown_table
from trainings import compare_trainings

import numpy as np

STUDY = ("part1", "part3", "part4")  # the other parts are variants of these
QUESTIONS = {
    "part1": "How well does a network generalize from {share} of the training images?",
    "part3": "What does perturbed training data change?",
    "part3_crop_flip": "What do crop and flip alone change?",
    "part4": "Does the {loss} loss do better than cross-entropy?",
    "part4_proxies": "Does the {loss} loss with learned proxies do better than cross-entropy?",
    "part4_augmented": "Does the {loss} loss do better on perturbed training images?",
    "part4_proxies_augmented":
        "Does the {loss} loss with learned proxies do better on perturbed training images?",
}


# ---- summary.md ---------------------------------------------------------------------------------


def share_of(args):
    """The share of the training images that was trained on, in words."""
    fraction = args.get("train_fraction")
    if fraction == 0.2:
        return "a fifth"
    return f"{100 * fraction:g} %" if isinstance(fraction, float | int) else "a part"


def findings(study, part, lines, tests):
    """What one part shows, as a Markdown list of sentences made from its numbers."""
    loss = escape(part.label.split(" + ")[0].split(",")[0])
    question = QUESTIONS.get(part.name, "What does it change?")
    question = question.format(share=share_of(part.args), loss=loss)
    items = [*clean_findings(part), *perturbed_findings(part.name, lines), *attack_findings(part)]
    for name, reference in comparison.pairs(study.parts):
        if name == part.name:
            mine = [row for row in tests if (row["part"], row["reference"]) == (name, reference)]
            items.append(compared(part, study.parts[reference], mine))
    text = f"### {part.title}: {question}\n"
    for item in items:
        text += f"\n- {item}"
    return text


def clean_findings(part):
    """[the sentence on clean images], or []."""
    found = []
    for split in ("evaluation", "test"):
        row = part.accuracies.get((split, "clean", ""))
        if row:
            found.append(f"{with_interval(row)} of the {split} images")
    train = part.accuracies.get(("train", "clean", ""))
    test = part.accuracies.get(("test", "clean", ""))
    if train:
        found.append(f"{percent(train['value'])} % of its {train['n']:,} training images")
    if train and test:
        gap = percent(train["value"] - test["value"])
        found.append(f"a generalization gap (training - test) of {gap} points")
    return [f"**Clean:** {', '.join(found)}."] if found else []


def perturbed_findings(name, lines):
    """[the sentence on a part's mean and its worst perturbation], or []."""
    worst = None
    mean = math.nan
    for line in lines:
        value = line.values[name]
        if line.title == comparison.ALL_PERTURBED:
            mean = value
        elif line.single and (worst is None or value < worst.values[name]):
            worst = line
    if not math.isfinite(mean):
        return []
    return [f"**Perturbed:** {percent(mean)} % on average (mPC), lowest under {worst.title}: "
            f"{percent(worst.values[name])} %."]


def attack_findings(part):
    """[the sentence on attacks at 8/255, or else at their largest eps], or []."""
    tried = {eps for split, condition, eps in part.accuracies
             if split == "test" and condition in claims.STRONGEST and eps}
    at = "8" if "8" in tried else max(tried, key=float, default="")
    found = []
    for condition in reversed(claims.STRONGEST):
        row = part.accuracies.get(("test", condition, at))
        if row:
            found.append(f"{comparison.spoken(condition)} {with_interval(row)}")
    return [f"**Attacked** at {at}/255: {', '.join(found)}."] if found else []


def compared(part, reference, tests):
    """A sentence on one network against another, and what else differs between them."""
    found = []
    counts = {"better": 0, "worse": 0, "no difference shown": 0}
    attacks = {}
    for row in tests:
        if row["split"] != "test" and row["condition"] != "clean":
            continue  # which edited code may perturb or attack, too
        if row["condition"] == "clean" and row["p_holm"] != "":
            found.append(f"{points(row['difference'])} on clean {row['split']} images, p "
                         f"{probability(row['p_holm'])}: {row['verdict']}")
        elif row["p_holm"] != "":
            counts[row["verdict"]] += 1
        elif row["family"] == "attack" and row["verdict"].endswith("others"):
            attacks[row["verdict"].removeprefix("not tested: ")] = None
    if sum(counts.values()):
        found.append(f"of {sum(counts.values())} perturbed conditions better in "
                     f"{counts['better']}, worse in {counts['worse']}, no difference shown in "
                     f"{counts['no difference shown']}")
    if attacks:
        found.append(f"attacks not compared, since they are on other images: {'; '.join(attacks)}")
    return (f"**This network against {reference.title}:** {'; '.join(found) or 'not tested'}. "
            + comparison.argument_differences(part, reference))


def calibration_table(study, table):
    """Calibration errors on clean test images and their mean over perturbations."""
    perturbed = {(row["condition"], row["severity"]) for row in table if row["in_part3_training"]}
    body = []
    for part in study.parts.values():
        clean = math.nan
        levels = {}
        for row in part.rows:
            if (row["split"], row["head"], row["metric"]) != ("test", "own", "calibration_error"):
                continue
            if row["condition"] == "clean":
                clean = row["value"] if math.isnan(clean) else clean  # a part's own table first
            elif (row["condition"], row["severity"]) in perturbed:
                levels.setdefault(row["condition"], []).append(row["value"])
        means = [np.mean(values) for values in levels.values()]
        mean = np.mean(means) if means else math.nan
        body.append((part.title, comparison.cell(clean), comparison.cell(mean)))
    return markdown_table(("calibration error, %", comparison.TEST, "mean over perturbations"),
                          body)


def heads_table(study):
    """Clean accuracy of each head of each part."""
    heads = {part.title: comparison.heads_of(part) for part in study.parts.values()}
    columns = dict.fromkeys(key for found in heads.values() for key in found)  # once, in order
    body = []
    for title, found in heads.items():
        cells = [comparison.cell(found.get(key, math.nan)) for key in columns]
        body.append((title, *cells))
    names = [f"{split}, {escape(head.replace('_', ' '))}" for split, head in columns]
    return markdown_table(("accuracy, %", *names), body)


def audit_text(study):
    found = claims.audits(study)
    if not found:
        return "No attack was run."
    failed = [f"- **does not hold**: {text}" for text, passed in found if not passed]
    return "\n".join([f"{len(found) - len(failed)} of {len(found)} checks passed.\n", *failed])


def what_ran(study):
    """A Markdown list of the commands, with what they ran on."""
    items = []
    versions = {}
    for part in study.parts.values():
        names = part.name, storage.robustness_name(part.name)
        for name, record in zip(names, (part.record, part.part2_record), strict=True):
            if record is None:
                continue
            about = [f"seed {checkpoints.spelled(record.get('seed', 'unknown'))}",
                     checkpoints.spelled(record.get("device", "unknown device")),
                     f"mixed precision {checkpoints.spelled(record.get('amp', 'unknown'))}",
                     f"weights {record['weights']}"]
            if "epochs" in record["args"]:
                about.insert(0, f"{checkpoints.spelled(record['args']['epochs'])} epochs")
            packages = [f"{package} {found}" for package, found in record["versions"].items()
                        if package != "script"]  # the command has it
            versions.setdefault(", ".join(packages), []).append(name)
            items.append(f"- {name}: {code(record['command'])}; {escape(', '.join(about))}")
    for packages, names in versions.items():
        items.append(f"- {', '.join(names)}: {escape(packages)}")
    return "\n".join(items) or "No record (.json) of a run is here."


def missing(study):
    """A sentence on what the study lacks."""
    parts = [name for name in STUDY if name not in study.parts]
    without = [part.name for part in study.parts.values() if not part.has_part2]
    if len(without) == len(study.parts):
        parts.append("part2 (no robustness table of any part)")
    else:
        parts += [f"part2 on {name} ({storage.robustness_name(name)}.csv)" for name in without]
    variants = [name for name in common.PARTS if name not in (*study.parts, *STUDY)]
    text = f"Missing: {', '.join(parts) or 'nothing'}."
    return f"{text} Variants that were not trained: {', '.join(variants)}." if variants else text


def figures(study):
    """The figures that are there, as Markdown images; of a part without a table none."""
    captions = {"comparison.png": "All parts on the test set"}
    for part in study.parts.values():
        if part.has_own:  # else they are of a former model
            for ending, what in report.FIGURES.items():
                captions[f"{part.name}{ending}"] = f"{part.title}: {what}"
        if part.has_part2:
            for ending, what in report.ROBUSTNESS_FIGURES.items():
                captions[f"{storage.robustness_name(part.name)}{ending}"] = f"{part.title}: {what}"
    return [f"![{caption}]({name})" for name, caption in captions.items()
            if (study.folder / name).is_file()]


TESTED = (
    "All this is about these networks, not about other seeds. `comparison.csv` has every severity, "
    "with n, intervals and tests: McNemar's exact test on the same images, Holm-corrected within "
    "each pair of a part and its reference, separately for clean images and perturbations; "
    f"\"better\" and \"worse\" mean p < {comparison.ALPHA}. For means over perturbations, the "
    "claims give Student's interval over the images, with p corrected over the two means of each "
    "pair. Attacks are compared only over several trainings (`python summary.py FOLDER FOLDER …`), "
    "since they vary much from seed to seed.")


def summary(study, lines, cells, table, whole, tests):
    """The text of summary.md. table: the `measured` rows that are `shared`; whole: all of them."""
    text = [f"# Results on {escape(study.dataset)}",
            claims.claims_table(claims.claims_of_one(study, table, tests))]
    text += [findings(study, part, lines, tests) for part in study.parts.values()]
    text += comparison.line_tables(lines, study.titles.values(), cells,
                                   comparison.explanation([study], table, whole))
    text += [TESTED, "## Calibration", calibration_table(study, table),
             "## Loss or head?", comparison.ABOUT_HEADS, heads_table(study),
             "## Audit of the attacks", audit_text(study), "## What ran", what_ran(study),
             "## Left out", bullets(study.left_out), missing(study), "## Figures",
             *figures(study)]
    return "\n\n".join(text) + "\n"


@checkpoints.one_at_a_time
def compare(folder):
    """Writes comparison.csv, comparison.png, summary.md and summary.html into `folder`.

    Prints the table; returns the rows of comparison.csv.  Raises UsageError as `read_study` does.
    """
    study = comparison.read_study(folder)
    tests = comparison.network_tests(study)
    whole = comparison.measured(study)
    [table] = comparison.shared([whole])
    storage.write_rows(study.folder / "comparison.csv", tests)
    rows = [row for row in table if row["split"] == "test"]
    labels = {name: part.label for name, part in study.parts.items()}
    plots.comparison(study.folder / "comparison.png", rows, labels)
    lines = comparison.overview(table, study.parts)
    cells = [[comparison.cell(value) for value in line.values.values()] for line in lines]
    text = summary(study, lines, cells, table, whole, tests)
    storage.write_text(study.folder / "summary.md", text)
    pages.write(study.folder / "summary.html", text)
    body = [(pages.plain(line.title), *texts) for line, texts in zip(lines, cells, strict=True)]
    title = f"Comparison on {study.dataset}, accuracy in % ({study.folder}/summary.md)"
    terminal.print_table(title, ("", *study.parts), body)
    for sentence in study.left_out:
        print(f"Left out of the comparison: {sentence}")
    return tests


if __name__ == "__main__":
    parser = arguments.new_parser(__file__, __doc__)
    parser.add_argument("folder", nargs="+", type=arguments.path,
                        help="results directories, one for each training")
    arguments.run(lambda: compare_trainings(parser.parse_args().folder))
