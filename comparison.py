"""What a results directory holds, joined by weights, and what can be compared in it."""

import math
from pathlib import Path
from typing import NamedTuple

import checkpoints
import common
import metrics
import report
import storage
from arguments import UsageError
from datasets import JPEG_COPY
from metrics import percent
from pages import code, escape, markdown_table

import numpy as np

ALPHA = 0.05  # after Holm's correction
REFERENCES = {"part3": ("part1", "part3_crop_flip"), "part3_crop_flip": ("part1",),
              "part4": ("part1",), "part4_proxies": ("part1",), "part4_augmented": ("part3",),
              "part4_proxies_augmented": ("part3",)}  # what a part is compared with
ATTACKS = ("fgsm", "pgd", "random", "worst_case")  # how the names of attacks begin
SWEPT = ("fgsm", "fgsm_l2", "worst_case", "worst_case_l2")  # shown at every eps
ACRONYMS = {"fgsm": "FGSM", "pgd": "PGD", "l2": "L2", "jpeg": "JPEG", "part1": "part 1"}
JPEG_NOTE = "training images are JPEG"
SEEN = "mean, perturbations of seen families"
HELD_OUT = "mean, perturbations of held-out families"
CROP_AND_FLIP = ("horizontal_flip", "translation")  # part 3 trains on both with any --families
MEANS = {"yes": SEEN, "no": HELD_OUT}  # by in_part3_training
ALL_PERTURBED = "mean over perturbations (mPC)"
TEST = "test set"
TRAIN = "training images"
GROUPS = {"clean": "Clean images", "perturbed": "Perturbed test images",
          "attacked": "Attacked test images"}  # of the lines of the large tables
SPLITS = {"train": TRAIN, "evaluation": "evaluation split", "test": TEST}
ABOUT_HEADS = (
    "`own` is the part's own classifier; the others are fitted only to the training images' "
    "features (the input of the network's last layer): nearest class mean, nearest neighbours, "
    "linear probe.")


# ---- what a folder holds ------------------------------------------------------------------------


class Part(NamedTuple):
    """What a folder holds of one part; everything is of the same weights."""

    name: str
    label: str
    weights: str
    seed: int
    rows: list  # of its own table, then of part 2's on it
    correct: dict  # "split/condition/severity" -> booleans (n,)
    pixels: dict  # of perturbed images, the same -> hash of them; {} in older files
    record: dict  # of its training, or None
    part2_record: dict  # of part 2 on it, or None
    has_own: bool  # a table of its own
    has_part2: bool  # one of part 2 on it
    accuracies: dict  # (split, condition, severity) -> row of its own head; its own table first

    @property
    def title(self):
        return f"{self.name} ({escape(self.label)})"

    @property
    def args(self):
        return self.record["args"] if self.record else {}


class Study(NamedTuple):
    """One results directory: parts of one data set and one split."""

    folder: Path
    dataset: str
    split_hash: str
    parts: dict  # name -> Part
    left_out: list  # sentences
    seen: list  # families that part 3 trained on
    trained_on: list  # the perturbations of these families that the code had then

    @property
    def titles(self):
        return {name: part.title for name, part in self.parts.items()}


def read_study(folder):
    """The Study in `folder`.

    Raises UsageError if nothing is there, if a file is not what a part wrote, or if its tables are
    of several data sets or splits.
    """
    folder = Path(folder)
    studies = {(row["dataset"], row["split_hash"]) for row in storage.read_all(folder)}
    if not studies:
        raise UsageError(f"{folder} holds no results; expected a directory that the parts wrote")
    if len(studies) > 1:
        raise UsageError(f"{folder} holds results of {len(studies)} data sets or splits, expected "
                         f"one: {sorted(studies)}; give each its own --results-dir")
    left_out = []
    parts = {}
    for name in common.PARTS:  # part 1 first
        part1 = parts["part1"].weights if "part1" in parts else ""
        part = read_part(folder, name, part1, left_out)
        if part:
            parts[name] = part
    if not parts:
        raise UsageError(f"{folder} holds no table of the part that its name says: "
                         f"{'; '.join(left_out)}")
    seen, trained_on = seen_by_part3(parts, left_out)
    for name, other in pairs(parts):
        differing = [key.removeprefix("test/").replace("/", " ") for key in parts[name].pixels
                     if other_pixels(parts[name], parts[other], key.split("/"))]
        if differing:
            left_out.append(f"{name} against {other} under {', '.join(differing)}: their perturbed "
                            "images differ (other code, data or versions, or random numbers that "
                            "are not the generator's), so their means are of different images; run "
                            "part 2 on both again")
    dataset, split_hash = studies.pop()
    return Study(folder, dataset, split_hash, parts, left_out, seen, trained_on)


def seen_by_part3(parts, left_out):
    """(families, perturbations) that part 3 trained on, by its record, else by today's code."""
    args = parts["part3"].args if "part3" in parts else {}
    seen = args.get("families")
    if not isinstance(seen, list):
        seen = common.SEEN_FAMILIES
        if "part3" in parts:
            left_out.append("part3.json: names no families, is missing, or is of other weights; "
                            f"part 3 is assumed to have trained on {', '.join(seen)}")
    shares = args.get("shares")
    if not isinstance(shares, dict):
        shares = [name for name, family in common.FAMILY.items() if family in seen]
    return seen, [*shares]


def read_part(folder, name, part1, left_out):
    """The Part in `folder`, or None; appends to `left_out` what is there but is not of it.

    Its own table decides which weights count; where there is none, part 2's table on it does.
    part1: the weights of the part 1 in the folder, or "".
    """
    robustness = storage.robustness_name(name)
    own = rows_of_part(folder, name, name, left_out)
    part2 = rows_of_part(folder, robustness, name, left_out)
    if not own and not part2:
        return None
    first = (own or part2)[0]
    weights = first["weights"]
    decides = f"{name if own else robustness}.csv"

    def same(file, found):
        if found == weights:
            return True
        sentence = f"{file}: of weights {found}, but {decides} is of {weights}"
        if sentence not in left_out:
            left_out.append(sentence)
        return False

    own = [row for row in own if same(f"{name}.csv", row["weights"])]
    part2 = [row for row in part2 if same(f"{robustness}.csv", row["weights"])]
    correct = {}
    records = {}
    pixels = {}
    made_on = "that no file names"
    for file, rows in ((robustness, part2), (name, own)):  # the part's own images replace part 2's
        images = storage.read_correct(folder, file)
        if images and same(f"{file}_correct.npz", images.weights):
            other = unlike(images.images, rows)
            if other:
                left_out.append(f"{file}_correct.npz: of another run than {file}.csv, since it "
                                f"gives another accuracy ({other})")
            else:
                correct |= images.images
                if file == robustness:
                    made_on = images.part1
                    pixels = images.pixels
        record = storage.read_record(folder, file)
        if record and same(f"{file}.json", record["weights"]):
            records[file] = record
    if part1 and made_on not in (part1, "none"):
        kept = [row for row in part2 if "from_part1" not in row["condition"] + row["metric"]]
        if len(kept) < len(part2):
            left_out.append(f"{robustness}.csv, attacks with part 1's images: made on weights "
                            f"{made_on}, but the part 1 here is of {part1}")
            part2 = kept
    record = records.get(name)
    title = report.label(name, record["args"] if record else {})
    return Part(name, title, weights, first["seed"], own + part2, correct, pixels, record,
                records.get(robustness), bool(own), bool(part2), accuracies_of(own + part2))


def accuracies_of(rows):
    """{(split, condition, severity): row} of a part's own head; of two rows the first counts."""
    found = {}
    for row in rows:
        if (row["head"], row["metric"]) == ("own", "accuracy"):
            found.setdefault((row["split"], row["condition"], row["severity"]), row)
    return found


def unlike(images, rows):
    """The first condition whose images right do not give the table's accuracy, or "".

    One is enough to tell another run: of the rest, one in a thousand has the same accuracy.
    """
    for key, row in accuracies_of(rows).items():
        array = images.get("/".join(key))
        if array is not None and not gives(array, row):
            return " ".join(key).strip()
    return ""


def gives(array, row):
    """Whether booleans (n,) give the accuracy of a row, which has six digits."""
    return len(array) == row["n"] and abs(array.mean() - row["value"]) < 1e-6


def heads_of(part):
    """{(split, head): clean accuracy}, not of training images; of two rows the first counts."""
    found = {}
    for row in part.rows:
        if (row["metric"], row["condition"]) == ("accuracy", "clean") and row["split"] != "train":
            found.setdefault((row["split"], row["head"]), row["value"])
    return found


def rows_of_part(folder, file, name, left_out):
    """The rows of a table that are about the part `name`; what else it holds is left out."""
    mine = []
    others = {}
    for row in storage.read_table(folder / f"{file}.csv"):
        if row["part"] == name:
            mine.append(row)
        else:
            others[row["part"]] = None
    if others:
        left_out.append(f"{file}.csv: rows of {', '.join(others)}, expected {name}")
    return mine


# ---- accuracies, and the test of one network against another ------------------------------------


def family_of(condition):
    """The family of a condition; "" for clean images."""
    if condition == "clean":
        return ""
    if condition in common.FAMILY:
        return common.FAMILY[condition]
    if condition.startswith(ATTACKS):
        return "attack"
    return "CIFAR-10-C" if condition.startswith("cifar10c") else "other"


def in_training(study, condition):
    """Whether part 3 trained on a perturbation: "yes", "no", or JPEG_NOTE; "" for the rest."""
    if condition not in common.FAMILY:
        return ""
    if condition == "jpeg" and study.dataset.startswith(JPEG_COPY):  # with --quick, too
        return JPEG_NOTE
    return "yes" if condition in (*study.trained_on, *CROP_AND_FLIP) else "no"


def measured(study):
    """The accuracies of every part's own head, a dict each; training images included."""
    table = []
    for part in study.parts.values():
        for (split, condition, severity), row in part.accuracies.items():
            table.append({
                "dataset": row["dataset"], "split_hash": row["split_hash"], "split": split,
                "condition": condition, "severity": severity, "family": family_of(condition),
                "in_part3_training": in_training(study, condition), "part": part.name,
                "accuracy": row["value"], "ci_low": row["ci_low"], "ci_high": row["ci_high"],
                "n": row["n"], "weights": part.weights})
    return table


def network_tests(study):
    """The rows of comparison.csv: one a condition, part and reference.

    Adds to those of `measured`, without training images: reference, difference (fraction), p_holm
    (McNemar's exact test on the same images, Holm's correction within this part and reference,
    separately for clean images and perturbations) and verdict: "better", "worse" or "no difference
    shown", about these networks only, or "not tested" and why.
    """
    rows = measured(study)
    empty = {"reference": "", "difference": "", "p_holm": "", "verdict": ""}
    table = []
    for name, part in study.parts.items():
        mine = [row | empty for row in rows if row["part"] == name and row["split"] != "train"]
        references = [other for other in REFERENCES.get(name, ()) if other in study.parts]
        for other in references:
            table += against(part, study.parts[other], mine)
        if not references:
            table += mine
    return table


def against(part, reference, mine):
    """The rows `mine` of a part with the test against a reference."""
    results = []
    tested = {"clean": [], "perturbed": []}  # (result, p-value)
    for row in mine:
        key = row["split"], row["condition"], row["severity"]
        other = reference.accuracies.get(key)
        ours_right, theirs_right = right(part, key), right(reference, key)
        result = row | {"reference": reference.name}
        if other is None:
            result["verdict"] = f"not tested: {reference.name} has no such figure"
        elif other["n"] != row["n"]:
            result["verdict"] = (f"not tested: {row['n']} images, {reference.name} has "
                                 f"{other['n']} others")
        else:
            result["difference"] = row["accuracy"] - other["value"]
            if row["family"] == "attack":
                result["verdict"] = "not tested: an attack needs several trainings"
            elif other_pixels(part, reference, key):
                result["verdict"] = "not tested: their perturbed images differ"
            elif ours_right is None or theirs_right is None:
                result["verdict"] = "not tested: which images are right is not known for both"
            else:
                group = "perturbed" if is_perturbed(row) else "clean"
                tested[group].append((result, metrics.mcnemar(ours_right, theirs_right)))
        results.append(result)
    for found in tested.values():
        corrected = metrics.holm([p_value for _, p_value in found])
        for (result, _), p_holm in zip(found, corrected, strict=True):
            result["p_holm"] = float(p_holm)
            result["verdict"] = verdict(p_holm, result["difference"]) or "no difference shown"
    return results


def other_pixels(ours, theirs, key):
    """Whether two parts were tested on different images of one name, by other code or versions.

    key: (split, condition, severity).
    """
    mine, other = ours.pixels.get("/".join(key)), theirs.pixels.get("/".join(key))
    return mine != other and None not in (mine, other)


def right(part, key):
    """Which images are classified right, booleans (n,); None where no file says it.

    key: (split, condition, severity).  An array that does not give the table's accuracy is ignored:
    without a part's own file there is part 2's, by other batches, which may differ in a few images.
    """
    row = part.accuracies.get(key)
    images = part.correct.get("/".join(key))
    return images if row and images is not None and gives(images, row) else None


def verdict(p_holm, difference):
    """ "better", "worse", or "" where the corrected p-value is not below ALPHA."""
    if p_holm >= ALPHA:
        return ""
    return "better" if difference > 0 else "worse"


# ---- the lines that a reader compares -----------------------------------------------------------


class Line(NamedTuple):
    """One line of the large tables: a measure of every part."""

    group: str  # one of GROUPS
    title: str
    values: dict  # part -> fraction, nan where it was not measured
    compared: bool = True  # whether larger is better, and differences are tested
    single: bool = False  # whether it is one of the perturbations that the means count

    @property
    def markdown(self):
        return f"**{self.title}**" if self.title.startswith("mean") else self.title


def shared(tables):
    """The tables with only the perturbations that every model of every table was tested on.

    Only then can means be compared. Models that were tested on no perturbation do not count. Of
    other images than the test set's only the clean ones stay, and these without a severity: edited
    code may perturb evaluation images, too, which then stand in comparison.csv alone.
    """
    tested = {}
    for i, table in enumerate(tables):
        for row in table:
            if is_perturbed(row) and row["split"] == "test":
                tested.setdefault((i, row["part"]), set()).add((row["condition"], row["severity"]))
    in_all = set.intersection(*tested.values()) if tested else set()

    def kept(row):
        if row["condition"] == "clean":
            return not row["severity"]
        condition = row["condition"], row["severity"]
        return row["split"] == "test" and (not is_perturbed(row) or condition in in_all)

    return [list(filter(kept, table)) for table in tables]


def is_perturbed(row):
    return row["family"] not in ("", "attack")


def perturbations_of(rows):
    """{(condition, severity)} of the perturbed test images among rows."""
    return {(row["condition"], row["severity"]) for row in rows
            if is_perturbed(row) and row["split"] == "test"}


def overview(table, names):
    """The Lines of a table of `shared` rows, for the parts `names`. Severities are averaged.

    mPC is the mean over perturbations; the corruption error is each perturbation's error divided by
    part 1's, averaged (Hendrycks & Dietterich 2019, with part 1 in AlexNet's place).
    """
    clean = {}
    levels = {}
    groups = {"yes": [], "no": [], JPEG_NOTE: [], "": []}  # conditions by in_part3_training
    for row in table:
        condition = row["condition"]
        if condition == "clean":
            clean[row["split"], row["part"]] = row["accuracy"]
        elif is_perturbed(row):
            levels.setdefault((condition, row["part"]), []).append(row["accuracy"])
            if condition not in groups[row["in_part3_training"]]:
                groups[row["in_part3_training"]].append(condition)

    def over(conditions):
        values = {}
        for name in names:
            means = [np.mean(levels.get((condition, name), math.nan)) for condition in conditions]
            values[name] = float(np.mean(means))
        return values

    lines = []
    values = {}  # split -> {part: fraction}
    for split, title in SPLITS.items():
        values[split] = {name: clean.get((split, name), math.nan) for name in names}
        lines.append(Line("clean", title, values[split], split != "train"))
    train, test = values["train"], values["test"]
    gaps = {name: train[name] - test[name] for name in names}
    lines.append(Line("clean", "generalization gap (training - test)", gaps, False))
    for note, conditions in groups.items():
        for condition in conditions:
            about = f"; {note}" if note == JPEG_NOTE else ""
            title = f"{spoken(condition)} ({family_of(condition)}{about})"
            lines.append(Line("perturbed", title, over([condition]), single=bool(note)))
        if conditions and note in MEANS:
            lines.append(Line("perturbed", MEANS[note], over(conditions)))
    perturbed = groups["yes"] + groups["no"] + groups[JPEG_NOTE]
    if perturbed:
        means = over(perturbed)
        relative = {name: means[name] / (test[name] or math.nan) for name in names}
        errors = {}
        for name in names:
            each = [corruption_error(line.values, name) for line in lines if line.single]
            errors[name] = np.mean(each)
        lines += [Line("perturbed", ALL_PERTURBED, means),
                  Line("perturbed", "mPC relative to clean", relative, False),
                  Line("perturbed", "corruption error (part1: 100)", errors, False)]
    return lines + attack_lines(table, names)


def corruption_error(accuracy, name):
    reference = 1 - accuracy.get("part1", math.nan)
    return (1 - accuracy[name]) / reference if reference else math.nan


def attack_lines(table, names):
    """A Line for each attack, eps and number of images; not in SWEPT: only where PGD ran."""
    values = {}
    for row in table:
        if row["family"] == "attack":
            key = row["condition"], float(row["severity"] or 0), row["n"]
            values.setdefault(key, dict.fromkeys(names, math.nan))[row["part"]] = row["accuracy"]
    audited = {eps for condition, eps, _ in values if condition.startswith("pgd")}
    lines = []
    for condition, eps, n in sorted(values):
        if eps == 0 and condition in SWEPT:
            title = f"{spoken(condition)}: the same {n:,} images, not attacked"
        elif eps > 0 and (eps in audited or condition in SWEPT):
            title = f"{spoken(condition)} {eps:g}/255, n = {n:,}"
        else:
            continue
        lines.append(Line("attacked", title, values[condition, eps, n], eps > 0))
    return lines


def spoken(name):
    """A condition's name as a person reads it, escaped."""
    name = name.replace("worst_case_audit", "worst of its own attacks")  # each image's
    name = name.replace("worst_case", "worst of its own one-step attacks")
    return escape(" ".join(ACRONYMS.get(word, word) for word in name.split("_")))


def cell(value):
    return percent(value) if math.isfinite(value) else "-"


def line_tables(lines, columns, cells, explained, note=""):
    """The Lines as Markdown, each group under its heading; means in bold.

    cells: a list of texts for each line, one a column.  explained: what follows the perturbations.
    """
    text = []
    for group, title in GROUPS.items():
        body = [(line.markdown, *texts) for line, texts in zip(lines, cells, strict=True)
                if line.group == group]
        if body:
            text += [f"## {title}{note}", markdown_table(("accuracy, %", *columns), body)]
        if group == "perturbed":
            text += explained
    return text


def explanation(studies, table, whole):
    """[the lines under a table of perturbations: what is a mean of what], or [] without any.

    table: the `measured` rows that are `shared`; whole: all of them.
    """
    perturbed = perturbations_of(whole)
    if not perturbed:
        return []
    ours = [row for row in table if row["in_part3_training"]]
    severities = sorted({row["severity"] for row in ours if row["severity"]})
    seen = studies[0].seen
    held_out = [family for family in dict.fromkeys(common.FAMILY.values()) if family not in seen]
    text = (f"Means are taken over severities ({', '.join(severities) or 'none'}), then over "
            f"perturbations. Families that part 3 trains on: "
            f"{escape(', '.join(map(str, seen))) or 'none'}; held out: {', '.join(held_out)}.")
    others = [name for name in common.PARTS if name.endswith("_augmented")
              and any(name in study.parts for study in studies)]
    if others and set(map(str, seen)) != set(common.SEEN_FAMILIES):
        text += f" Trained on {', '.join(common.SEEN_FAMILIES)}: {', '.join(others)}."
    if any(row["in_part3_training"] == JPEG_NOTE for row in ours):
        text += (f" JPEG is left out of the held-out mean, since the {JPEG_NOTE}, but counts in "
                 "mPC.")
    left_out = perturbed - perturbations_of(table)
    if left_out:
        text += (f" Left out, as not every model was tested on them: {len(left_out)} pairs of "
                 "condition and severity.")
    return [text]


def argument_differences(part, reference):
    """Sentences: the arguments in which two trainings differ, or their tests by part 2."""
    if part.record is None or reference.record is None:
        return "Whether their arguments are the same is not known: a record (.json) is missing."
    name = reference.name
    text = f"Their trainings differ in {differences(part.record, reference.record, name)}."
    if part.part2_record and reference.part2_record:
        tests = differences(part.part2_record, reference.part2_record, name)
        text += f" Their tests by part 2 differ in {tests}."
    return text


def differences(record, other, whose):
    """In which arguments a run's record differs from an `other`, in words; whose: the other's."""
    ours, theirs = facts(record), facts(other)
    differing = []
    alone = []
    for name in {**ours, **theirs}:
        if "SHARES" in name and not (name in ours and name in theirs):
            continue  # long, and --families says the essence
        if name not in theirs:
            alone.append(f"{name} {escape(ours[name])}")
        elif name not in ours:
            alone.append(f"{name} {escape(theirs[name])} ({whose})")
        elif ours[name] != theirs[name]:
            differing.append(f"{name} ({escape(ours[name])}; {whose} {escape(theirs[name])})")
    text = ", ".join(differing) or "no argument that both have"
    return f"{text}; arguments that only one has: {', '.join(alone)}" if alone else text


def facts(record):
    """{argument: value} of a run, as far as they change its result, as Markdown."""
    values = {}
    for name, value in record["args"].items():
        if name not in checkpoints.no_effect(record["args"]) and name != "amp":
            values[code(checkpoints.flag(name))] = checkpoints.spelled(value)
    sizes = record.get("sizes")
    if isinstance(sizes, dict):  # of one split, but edited code may train on fewer
        values["training images"] = checkpoints.spelled(sizes.get("training", "unknown"))
    values["mixed precision"] = checkpoints.spelled(record.get("amp", "unknown"))
    values["optimizer"] = checkpoints.spelled(record["versions"].get("optimizer", "unknown"))
    if "stopped" in record["versions"]:
        values["stopped"] = checkpoints.spelled(record["versions"]["stopped"])
    values["device"] = checkpoints.spelled(record.get("device", "unknown"))
    for name in ("torch", "commit"):
        values[name] = checkpoints.spelled(record["versions"].get(name, "unknown"))
    return values


def pairs(parts):
    """(part, reference) of all comparisons that the parts allow."""
    return [(part, reference) for part in parts for reference in REFERENCES.get(part, ())
            if reference in parts]
