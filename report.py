"""Tables and plots: rows of results, the CSV files they go into, figures, and the comparison of all parts."""

import csv
import math
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import common

COLUMNS = ("part", "dataset", "split", "condition", "severity", "head", "metric", "value", "ci_low", "ci_high", "n",
           "seed", "split_hash", "checkpoint")
MODELS = dict(zip(common.PARTS, ("cross-entropy", "augmented", "angular", "angular, augmented"), strict=True))
PART_COLORS = dict(zip(MODELS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))  # Okabe & Ito 2008
CLASS_COLORS = ("#CC6677", "#332288", "#B8A030", "#117733", "#56B4E9", "#882255", "#44AA99", "#6A6A00", "#AA4499",
                "#777777")  # Paul Tol's "muted", its two palest darkened
ATTACKS = {"inf": ("fgsm", "pgd", "random_sign"), "2": ("fgsm_l2", "pgd_l2", "random_l2")}  # by norm
VARIANTS = {"predicted": "predicted labels", "targeted": "least likely class",  # of FGSM, after its name
            "from_part1": "made on part 1"}
LOCKS = {}  # path -> open file
NEIGHBOURS = 20  # of the k-nearest-neighbour measures


# ---- rows and files -------------------------------------------------------------------------------------------------


class Paths(NamedTuple):
    """The files of one part."""

    folder: Path
    name: str

    def __call__(self, ending):
        return self.folder / f"{self.name}{ending}"


def start(run, name=None):
    """Prints the header of a part. Raises UsageError if its results directory holds another study's results."""
    folder = Path(run["args"]["results_dir"])
    for row in read_all(folder):
        for key, what in (("dataset", "data set"), ("split_hash", "split")):
            if row[key] != run[key]:
                raise common.UsageError(f"{folder} holds results on the {what} {row[key]}, this run is on {run[key]}; "
                                        "give another --results-dir, or remove the old results")
    lock(folder, name or run["part"])
    sizes = ", ".join(f"{n:,} {name}" for name, n in run["sizes"].items())
    print(f"{run['part']}: {run['dataset']}, {len(run['classes'])} classes; images: {sizes}; "
          f"split {run['split_hash']}, seed {run['seed']}\ndevice {run['device']}; mixed precision {run['amp']}",
          flush=True)
    return Paths(folder, name or run["part"])


def lock(folder, name):
    """Holds this process's claim on the files of one part until it ends. Raises UsageError if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - open until the process ends
    except OSError as error:
        raise common.RunError(f"cannot write to {folder}: {error.strerror}; choose another --results-dir") from None
    LOCKS.pop(path, None)  # a second run in the same process, as tests and notebooks have it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise common.UsageError(f"another run is writing {folder}/{name}.*; wait for it, or give another "
                                "--results-dir") from None
    LOCKS[path] = file
    for left in folder.glob(f".{name}_state-*.pt"):  # by a run that was killed while it wrote
        left.unlink()


def retire(paths, model):
    """Removes part 2's results of the part's former checkpoint, unless it holds the very weights of `model`."""
    try:
        former = common.load_checkpoint(paths(".pt"), "cpu")[0].state_dict()
    except common.UsageError:
        former = {}
    now = model.state_dict()
    if former.keys() != now.keys() or any(not torch.equal(former[k], now[k].cpu()) for k in now):
        for path in paths.folder.glob(f"{robustness_name(paths.name)}[._]*"):
            path.unlink()


def row(run, checkpoint, split, condition, severity, head, metric, value, n, interval=("", "")):
    """One fact. value and interval are fractions where the metric is an accuracy."""
    return dict(zip(COLUMNS, (run["part"], run["dataset"], split, condition, severity, head, metric, value, *interval,
                              n, run["seed"], run["split_hash"], Path(checkpoint).as_posix()), strict=True))


def accuracy_row(run, checkpoint, split, condition, severity, head, predicted, labels):
    """The accuracy of predicted labels (N,) with its Wilson interval."""
    n, correct = len(labels), int((predicted == labels).sum())
    return row(run, checkpoint, split, condition, severity, head, "accuracy", correct / n, n,
               common.wilson_interval(correct, n))


def clean_rows(run, checkpoint, passes):
    """Everything that is measured on unperturbed images.

    passes: {"train" | "evaluation" | "test": (Prediction, labels)}. The heads class_means, knn and probe are fitted on
    the training images' 512-d features, the same way in every part, to tell the loss from the head.
    """
    (train, train_labels), classes, rows = passes["train"], run["classes"], []
    means = common.class_means(train.features, train_labels, len(classes))
    for split in ("evaluation", "test"):
        (logits, features), labels = passes[split]
        predicted = logits.argmax(1)
        heads = {"own": predicted,
                 "class_means": (F.normalize(features, dim=1) @ means.T).argmax(1),
                 "knn": common.knn_predict(train.features, train_labels, features, NEIGHBOURS),
                 "probe": common.probe_predict(train.features, train_labels, features)}
        rows += [accuracy_row(run, checkpoint, split, "clean", "", head, p, labels) for head, p in heads.items()]
        rows.append(row(run, checkpoint, split, "clean", "", "own", "calibration_error",
                        common.calibration_error(logits, labels), len(labels)))
        for c, name in enumerate(classes):
            rows.append(accuracy_row(run, checkpoint, split, "clean", "", "own", predicted[labels == c],
                                     labels[labels == c]) | {"metric": f"accuracy of {name}"})
    return rows


def headline(rows):
    """The accuracies of a checkpoint's own head, as its meta keeps them."""
    return {r["split"]: r["value"] for r in rows if r["head"] == "own" and r["metric"] == "accuracy"}


def write_rows(path, rows):
    """Writes rows (dicts of the same keys) as CSV, complete or not at all; floats to 6 digits."""
    with common.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def write_arrays(path, **arrays):
    """Writes a compressed .npz, complete or not at all."""
    with common.atomic(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def write_history(paths, history, run):
    write_rows(paths("_history.csv"), [{"dataset": run["dataset"], "seed": run["seed"]} | h for h in history])
    plot_history(paths("_history.png"), history, run)


def correct(predicted, labels):
    """Which images are classified right, as an array of booleans (N,): what tests on the same images need."""
    return (predicted == labels).cpu().numpy()


def write_clean_correct(paths, prediction, labels):
    """Writes which clean test images are classified right."""
    write_arrays(paths("_correct.npz"), **{"clean/": correct(prediction.logits.argmax(1), labels)})


def robustness_name(part):
    """What part 2's files are called for the checkpoint of a part."""
    return "part2" if part == "part1" else f"{part}_robustness"


def read_all(folder):
    """The rows of every part's tables in `folder`."""
    rows = []
    for model in MODELS:
        for name in (model, robustness_name(model)):
            path = Path(folder) / f"{name}.csv"
            if path.exists():
                with open(path, newline="") as file:
                    rows += csv.DictReader(file)
    return rows


def progress(items, title):
    """The items, with a progress bar where a person watches."""
    from tqdm import tqdm

    return tqdm(items, title, leave=False, disable=not sys.stderr.isatty())


class Clock:
    """Adds up the seconds of each stage."""

    def __init__(self):
        self.stages, self.last = [], time.perf_counter()

    def stop(self, stage):
        now = time.perf_counter()
        self.stages.append((stage, f"{now - self.last:.0f}"))
        self.last = now

    def print(self):
        print_table("Time", ("stage", "seconds"), self.stages)


def print_table(title, header, rows):
    """An aligned table on the terminal; the first column to the left, the others to the right."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [header, *rows]:
        first, *others = (str(cell) for cell in line)
        print("  " + first.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(others, widths[1:],
                                                                                       strict=True)))


def percent(value):
    return f"{100 * float(value):.1f}"


def print_accuracies(title, rows):
    print_table(title, ("condition", "split", "head", "accuracy %", "95 % interval", "n"), [
        (r["condition"] + (f" {r['severity']}" if r["severity"] != "" else ""), r["split"], r["head"],
         percent(r["value"]), f"{percent(r['ci_low'])} - {percent(r['ci_high'])}", r["n"])
        for r in rows if r["metric"] == "accuracy"])


# ---- figures --------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib, drawing to files; imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 160, "figure.dpi": 100})
    return plt


def save(figure, path, caption=""):
    """Writes a figure, complete or not at all, with a caption below it."""
    if caption:
        text = textwrap.fill(caption, int(figure.get_figwidth() * 15))
        figure.text(0.5, -0.01, text, ha="center", va="top", fontsize=8, color="#444444")
    with common.atomic(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)


def plot_history(path, history, run):
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    epochs = [h["epoch"] for h in history]
    left.plot(epochs, [h["loss"] for h in history], color="#0072B2")
    left.set(xlabel="epoch", ylabel="training loss", xlim=(0, None))
    for key, label, color in (("train_accuracy", "training batches", "#0072B2"),
                              ("eval_accuracy", "some evaluation images, averaged weights", "#D55E00")):
        if not all(math.isnan(h[key]) for h in history):
            right.plot(epochs, [100 * h[key] for h in history], color=color, label=label)
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, None))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path, f"{run['part']} on {run['dataset']}, seed {run['seed']}: training loss and accuracy.")


def plot_confusion(path, prediction, labels, run):
    plt = pyplot()
    predicted = prediction.logits.argmax(1)
    classes = run["classes"]
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels.cpu().numpy(), predicted.cpu().numpy()), 1)
    share = 100 * counts / counts.sum(1, keepdims=True)
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(share):
        if round(value):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if value > 55 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    save(figure, path, f"{run['part']} on {run['dataset']}, test set: share of each true class (%), n = {len(labels)}.")


def clean_umap(paths, run, checkpoint, passes):
    """The UMAP of evaluation and test images, none of which was trained on; returns its rows."""
    panels = []
    for split in ("evaluation", "test"):
        prediction, labels = passes[split]
        some = common.spread(len(labels), run["args"]["umap_points"])
        clean = prediction.features[some], labels[some]
        panels.append((f"{split} split, clean" if split == "evaluation" else "test set, clean", split, "clean", "",
                       *clean, clean))
    return umap_panels(paths, run, checkpoint, panels)


def umap_panels(paths, run, checkpoint, panels, ending="_umap", columns=4):
    """One UMAP fit for all panels of a model: picture, coordinates, and 512-d measures as rows.

    panels: [(title, split, condition, severity, features (n,512), labels (n,), clean)], where `clean` is the panel's
    images' own clean (features, labels): the neighbour measure asks the clean images, the image itself left out.
    A failure inside UMAP costs the picture, never the rows.
    """
    rows, titles = [], []
    for title, split, condition, severity, features, labels, (clean_features, clean_labels) in panels:
        nearest = common.knn_predict(clean_features, clean_labels, features, NEIGHBOURS, not_itself=True)
        width = common.silhouette(features, labels)
        rows += [accuracy_row(run, checkpoint, split, condition, severity, "knn", nearest, labels)
                 | {"metric": f"{NEIGHBOURS}-NN accuracy in 512-d"},
                 row(run, checkpoint, split, condition, severity, "", "silhouette in 512-d", width, len(labels))]
        titles.append(f"{title}\n20-NN {percent(rows[-2]['value'])} %, silhouette {width:.2f}")
    for left in (paths(f"{ending}.png"), paths(f"{ending}.npz")):  # of a former model
        left.unlink(missing_ok=True)
    if not run["args"]["no_umap"]:
        labels = [p[5].cpu().numpy() for p in panels]
        try:
            features = torch.cat([p[4] for p in panels])
            coordinates = common.umap_coordinates(features, run["seed"])
            points = np.split(coordinates, np.cumsum([len(p[4]) for p in panels])[:-1])
            write_arrays(paths(f"{ending}.npz"), coordinates=coordinates, label=np.concatenate(labels),
                         panel=np.repeat([p[0] for p in panels], [len(p) for p in points]))
            plot_scatters(paths(f"{ending}.png"), titles, points, labels, run, columns)
        except common.RunError:  # a full disk
            raise
        except Exception as error:  # numba and umap-learn raise whatever they like
            print(f"UMAP failed ({type(error).__name__}: {error}); no picture, the numbers stand")
    return rows


def plot_scatters(path, titles, points, labels, run, columns):
    """Small multiples in one frame: same axes and colours, class names in the legend."""
    plt = pyplot()
    columns = min(columns, len(points))
    lines = math.ceil(len(points) / columns)
    classes = run["classes"]
    colors = CLASS_COLORS if len(classes) <= 10 else plt.get_cmap("hsv")(np.linspace(0, 0.95, len(classes)))
    size = (2.5 if columns > 2 else 3.6)
    figure, grid = plt.subplots(lines, columns, figsize=(size * columns, size * lines + 0.5), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")
    low, high = np.percentile(np.concatenate(points), (0.2, 99.8), axis=0)
    margin = 0.06 * (high - low)
    for axes, title, xy, y in zip(grid.flat, titles, points, labels, strict=False):
        order = np.random.RandomState(0).permutation(len(y))  # no class lies on top of the others
        axes.scatter(*xy[order].T, c=[colors[c] for c in y[order]], s=5 if columns < 3 else 3, linewidths=0, alpha=0.8)
        axes.set_title(title, fontsize=8)
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_box_aspect(1)
    for axes in list(grid.flat)[len(points):]:
        axes.set_visible(False)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=color, label=name)
               for color, name in zip(colors, classes, strict=False)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5 if columns < 3 else 10, len(classes)),
                  fontsize=8, handletextpad=0.1, columnspacing=1.0)
    save(figure, path, f"{run['part']} on {run['dataset']}: UMAP of the backbone's 512-d output, n = {len(points[0])} "
         "images a panel, all panels in one fit. The axes have no unit; maps of different models are not comparable, "
         "the 512-d measures above the panels are.")


def plot_examples(path, rows, run, what):
    """One row of images (n,3,H,W), uint8 or float in [0,1], for each title. rows: [(title, images)]."""
    plt, gap = pyplot(), 2  # pixels of white between images

    def line(images):
        pixels = images.cpu() / 255 if images.dtype == torch.uint8 else images.cpu()
        return F.pad(pixels, (0, gap, 0, gap), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)  # (H+gap, n·(W+gap), 3)

    picture = torch.cat([line(images) for _, images in rows])[:-gap, :-gap]
    n, height = len(rows[0][1]), rows[0][1].shape[2]
    figure, axes = plt.subplots(figsize=(0.75 * n + 1.6, 0.76 * len(rows) + 0.2), layout="constrained")
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], [title for title, _ in rows])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    save(figure, path, f"{what}, {run['dataset']}.")


def plot_severities(path, rows, run):
    """Accuracy under every perturbation, a line each, the severities as points from light to dark."""
    plt = pyplot()
    rows = [r for r in rows if r["metric"] == "accuracy"]
    clean = next(r for r in rows if r["condition"] == "clean")
    names = [n for n in common.PERTURBATIONS if any(r["condition"] == n for r in rows)][::-1]
    figure, axes = plt.subplots(figsize=(6.4, 0.24 * len(names) + 1.1), layout="constrained")
    axes.axvline(100 * clean["value"], color="#777777", linestyle="--", linewidth=1, label="clean")
    shades = plt.get_cmap("viridis_r")
    for y, name in enumerate(names):
        mine = [r for r in rows if r["condition"] == name]
        axes.plot([100 * r["value"] for r in mine], [y] * len(mine), color="#BBBBBB", linewidth=1, zorder=1)
        for r in mine:
            severity = r["severity"] or "none"
            below, above = 100 * (r["value"] - r["ci_low"]), 100 * (r["ci_high"] - r["value"])
            axes.errorbar(100 * r["value"], y, xerr=[[below], [above]], color="#000000" if severity == "none" else
                          shades(severity / 5), marker="o", markersize=4, capsize=2, linestyle="",
                          label=f"severity {severity}")
    axes.set_yticks(range(len(names)), [
        f"{n.replace('_', ' ')} ({common.FAMILY[n]}{', held out' * (common.FAMILY[n] in common.HELD_OUT_FAMILIES)})"
        for n in names])
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100), ylim=(-0.7, len(names) - 0.3))
    entries = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # each label once
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=len(entries), fontsize=8)
    save(figure, path, f"{run['part']} on {run['dataset']}, whole test set, n = {clean['n']}, with 95 % intervals. "
         "Held out: families that part 3 never trains on.")


def plot_attack(path, rows, run, norm, audit):
    """Accuracy over eps under FGSM, beside PGD and random signs of the same eps, and what the audit found."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    fgsm, pgd, random_noise = ATTACKS[norm]
    styles = {fgsm: ("FGSM", "#0072B2", "o"), pgd: ("PGD, 10 steps", "#D55E00", "^"),
              **{f"{fgsm}_{v}": (f"FGSM, {text}", color, marker) for (v, text), color, marker in
                 zip(VARIANTS.items(), ("#56B4E9", "#CC79A7", "#009E73"), "xDv", strict=True)},
              random_noise: ("random noise of the same size", "#777777", "s")}
    for attack, (label, color, marker) in styles.items():
        mine = sorted((r for r in rows if r["condition"] == attack and r["metric"] == "accuracy"),
                      key=lambda r: r["severity"])
        if mine:
            y = np.array([[r["value"], r["value"] - r["ci_low"], r["ci_high"] - r["value"]] for r in mine]) * 100
            axes.errorbar([r["severity"] for r in mine], y[:, 0], y[:, 1:].T, label=f"{label}, n = {mine[0]['n']}",
                          color=color, marker=marker, markersize=4, capsize=2,
                          linestyle="" if attack == pgd else "-")  # at few eps: a line between them would be a guess
    axes.set(xlabel=f"eps (1/255, {norm} norm)", ylabel="accuracy (%)", ylim=(-2, 100), xlim=(-0.2, None))
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    failed = [name for name, _, passed, _ in audit if not passed]
    verdict = f"AUDIT FAILED: {'; '.join(failed)}." if failed else "All audits of the attack pass."
    save(figure, path, f"{run['part']} on {run['dataset']}, test images, float32, true labels where not "
         f"said otherwise. {verdict}")
