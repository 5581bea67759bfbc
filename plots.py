"""Every figure. None of them can end the run, and none depends on the user's own matplotlib.

Each public function writes one PNG, complete or not at all; if it cannot, it prints one line.
`run` has the attributes part ("part3"), label ("augmented"), dataset, classes (names), sizes and
seed. `rows` are dicts of split, condition, severity (text: "", "3", or eps in 1/255), head, metric,
value, ci_low, ci_high (fractions) and n.
"""

import math
from typing import NamedTuple

from canvas import SMALL, TEXT, WIDTH, cells, guarded, legend, new_figure, plain, save
from common import HELD_OUT_FAMILIES
from datasets import JPEG_COPY
from metrics import percent, wilson_interval
from perturbations import FAMILY

import numpy as np
import torch
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

# ---- colors -------------------------------------------------------------------------------------

# No color is in two of these sets. Those of classes, of parts and of attacks can be told apart with
# protanopia and deuteranopia.
CLASS_COLORS = ("#409595", "#4080FF", "#EABF00", "#552A00", "#801555",
                "#15D4FF", "#00D4AA", "#955555", "#BF6A15", "#0015EA")
PART_COLORS = {"part1": "#0072B2", "part3": "#D55E00", "part3_crop_flip": "#E6B800",
               "part4": "#009E73", "part4_augmented": "#EA95FF",
               "part4_proxies": "#AA006A", "part4_proxies_augmented": "#AA0015"}
PART_MARKERS = dict(zip(PART_COLORS, "osvDP^X<>ph", strict=False))


class Look(NamedTuple):
    """How a curve is drawn."""

    label: str
    color: str
    marker: str
    line: str


# by condition; in the L2 norm, "_l2" follows the first word. What is tried at few eps has no line,
# which would be a guess between them.
ATTACK = {
    "fgsm": Look("FGSM", "#6A55EA", "o", "-"),
    "fgsm_predicted": Look("FGSM, predicted labels", "#80BFEA", "x", ""),
    "fgsm_targeted": Look("FGSM, least likely class", "#4FA82E", "D", ""),
    "fgsm_from_part1": Look("FGSM, transferred from part 1", "#005500", "v", ""),
    "pgd": Look("PGD", "#2A156A", "^", ""),
    "worst_case": Look("worst of its own one-step attacks", "#000000", "*", ":"),
    "random": Look("random noise of the same size", "#777777", "s", ""),
}
SEVERITY_COLORS = {"1": "#C9B799", "2": "#AA9373", "3": "#8A7355", "4": "#614C32", "5": "#3A2914"}
NEUTRAL = "#555555"  # training curves, reference lines, what has no severity
FAINT = "#CCCCCC"  # points of classes that are not named, lines to guide the eye
DIAGONAL = "#DDDDDD"

ALL_NAMED = 20  # with more classes, only some are named and colored in a UMAP
CELL_TEXT = 25  # with more classes, the cells of a confusion matrix have no numbers
MOST_LABELS = 40  # along one side of a confusion matrix
BARS = {"elinewidth": 0.9, "capsize": 1.5}  # of intervals


# ---- what captions and axes have in common ------------------------------------------------------


def model_name(part, label):
    """What captions and legends call a model: "Part 3 (augmented)"."""
    return f"Part {part[4]} ({plain(label, 40)})"  # part: one of common.PARTS


def described(run):
    """How the caption of one model's figure begins."""
    return f"{model_name(run.part, run.label)} on {plain(run.dataset, 40)}, seed {run.seed}."


def counted(numbers):
    """ "n = 2,000", or the range where n differs."""
    low, high = min(numbers), max(numbers)
    return f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"


def room(values):
    """Limits (percent) of an axis that uses all its length for the values (percent)."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0, 100)
    margin = max(0.05 * (high - low), 1)
    return max(low - margin, -1.5), min(high + margin, 101.5)


# ---- training -----------------------------------------------------------------------------------


@guarded
def history(path, history, run, measured=None):
    """Curves of the training. history: dicts of epoch, loss, train_accuracy, eval_accuracy,
    eval_n.

    measured: the final accuracy on all evaluation images, a fraction.
    """
    figure = new_figure(2.6)
    left, right = figure.subplots(1, 2)
    epochs = [h["epoch"] for h in history]
    marker = "o" if len(epochs) <= 12 else ""  # a line through one point is invisible
    training = {"color": NEUTRAL, "linestyle": "--", "marker": marker}
    left.plot(epochs, [h["loss"] for h in history], **training)
    accuracies = 100 * np.array([[h["train_accuracy"], h["eval_accuracy"]] for h in history], float)
    right.plot(epochs, accuracies[:, 0], label="training batches", **training)
    n = history[-1]["eval_n"]
    bounds = 100 * np.array([wilson_interval(h["eval_accuracy"] * n, n) for h in history])
    color = PART_COLORS[run.part]
    right.plot(epochs, accuracies[:, 1], color=color, marker=marker,
               label=f"{n} evaluation images, averaged weights")
    right.fill_between(epochs, *bounds.T, color=color, alpha=0.15, linewidth=0)
    shown = [*accuracies.flat, *bounds.flat]
    if measured is not None and n < run.sizes["evaluation"]:
        right.plot(epochs[-1:], [100 * measured], color=color, marker="D", linestyle="",
                   clip_on=False, label=f"all {run.sizes['evaluation']:,}")
        shown.append(100 * measured)
    left.set_ylabel("training loss")
    right.set(ylabel="accuracy (%)", ylim=room(shown))
    for axes in (left, right):
        axes.set(xlabel="epoch", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
    legend(figure, *right.get_legend_handles_labels())
    means = "loss and accuracy are" if np.isfinite(accuracies[:, 0]).any() else "loss is"
    save(figure, path, f"{described(run)} Training {means} measured on each epoch's batches; no "
         "evaluation image is ever trained on. Band: 95 % interval.")


# ---- clean test images --------------------------------------------------------------------------


@guarded
def confusion(path, predicted, labels, run):
    """Shares of each true class, the errors on a scale of their own. Integer labels (N,)."""
    predicted = torch.as_tensor(predicted).cpu().numpy()
    labels = torch.as_tensor(labels).cpu().numpy()
    classes = len(run.classes)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predicted), 1)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    diagonal = np.eye(classes, dtype=bool)
    errors = np.where(diagonal, 0, share)
    largest = errors.max() or 1

    larger = min(max(classes / 60, 1), 1.5)  # more pixels for more cells
    small, text = SMALL * larger, TEXT * larger
    figure = new_figure(min(2.8 + 0.4 * classes, 0.9 * WIDTH * larger), WIDTH * larger)
    axes = figure.subplots()
    image = axes.imshow(errors, cmap="Oranges", vmin=0, vmax=largest, interpolation="nearest")
    gray = ListedColormap([DIAGONAL])
    axes.imshow(np.ma.masked_where(~diagonal, diagonal), cmap=gray, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("errors, share of the true class (%)", size=text)
    bar.ax.tick_params(labelsize=small)
    if classes <= CELL_TEXT:
        write_shares(axes, share, largest)

    every = math.ceil(classes / MOST_LABELS)
    named = range(0, classes, every)
    names = [plain(run.classes[c], 22) for c in named]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(named, names, **turned if classes <= 12 else {"rotation": 90})
    axes.set_yticks(named, names)
    axes.tick_params(labelsize=small, length=2)
    axes.set_xlabel("predicted class", size=text)
    axes.set_ylabel("true class", size=text)
    axes.spines[:].set_visible(False)
    right = percent(np.trace(counts) / len(labels))
    thinned = f" One class in {every} is named." if every > 1 else ""
    save(figure, path, f"{described(run)} Clean test images, n = {len(labels):,}; {right} % are "
         f"classified correctly (gray).{thinned}")


def write_shares(axes, share, largest):
    """Writes every share (percent) that rounds to at least 1 into its cell."""
    for (true, predicted), value in np.ndenumerate(share):
        right = true == predicted
        rounded = int(value + 0.5)
        if rounded:
            axes.text(predicted, true, rounded, ha="center", va="center", fontsize=SMALL,
                      fontweight="bold" if right else "normal",
                      color="white" if value > 0.65 * largest and not right else "black")


class Panel(NamedTuple):
    """One map of a UMAP figure."""

    title: str
    points: np.ndarray  # (n,2)
    labels: np.ndarray  # (n,), class indices


@guarded
def umap(path, panels, run):
    """Maps of one UMAP fit (Panels): same axes and colors, names at the clusters' medians."""
    classes = len(run.classes)
    shown = np.arange(classes)
    if classes > ALL_NAMED:
        shown = np.linspace(0, classes - 1, len(CLASS_COLORS)).round().astype(int)
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    side = min(WIDTH / columns, 4)  # inches of a panel
    figure = new_figure(lines * (side + 0.32) + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    low, high = np.percentile(np.concatenate([p.points for p in panels]), (0.2, 99.8), axis=0)
    margin = np.where(high > low, 0.07 * (high - low), 1)
    limits = np.stack([low - margin, high + margin], 1)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        scatter(axes, panel, shown, classes)
        title = [plain(line, int(side * 19)) for line in panel.title.split("\n")]
        axes.set(title="\n".join(title), xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
        axes.set_box_aspect(1)
        axes.spines[:].set(visible=True, color=FAINT)

    if columns <= 2 or len(shown) <= 12:  # else the names would hide the points
        for axes, panel in zip(grid.flat, panels if columns <= 2 else panels[:1], strict=False):
            name_clusters(axes, panel, shown, run.classes, side)
    note = f" {len(shown)} of the {classes} classes, evenly spaced, are named and colored."
    if classes <= ALL_NAMED:
        note, handles = "", []
        for color, marker in map(class_look, shown):
            handles.append(Line2D([], [], linestyle="", color=color, marker=marker))
        legend(figure, handles, [plain(name, 24) for name in run.classes])
    n = counted([len(p.labels) for p in panels])
    save(figure, path, f"{described(run)} UMAP of the last layer's input, {n} images a panel, "
         f"all panels in one fit.{note} The axes have no unit. Maps of different models are not "
         "comparable; between figures of the same name the measures above the panels are, which "
         "are of the features. k-NN finds its neighbors among the panel's other images, clean.")


def class_look(place):
    """Color and marker; the second ten classes repeat the colors."""
    number = len(CLASS_COLORS)
    return CLASS_COLORS[place % number], "o" if place < number else "^"


def scatter(axes, panel, shown, classes):
    """Draws a panel's points in random order, so that no class covers the others."""
    order = np.random.RandomState(0).permutation(len(panel.labels))
    points = panel.points[order]
    place = np.full(classes, -1)
    place[shown] = np.arange(len(shown))
    place = place[panel.labels[order]]  # (n,): where each point's class is in `shown`, or -1
    size = float(np.clip(5000 / len(points), 1, 7))
    axes.scatter(*points[place < 0].T, c=FAINT, s=size, linewidths=0)
    looks = np.array([class_look(p) for p in place])  # (n,2): color, marker
    for marker in "o^":
        mine = (looks[:, 1] == marker) & (place >= 0)
        axes.scatter(*points[mine].T, c=looks[mine, 0].tolist(), s=size, marker=marker,
                     linewidths=0, alpha=0.85)


def name_clusters(axes, panel, shown, names, side):
    """Writes class names at the medians of their points, moved where one would cover another."""
    line = 1.25 * SMALL / (72 * side)  # height of a line, as a share of the panel
    to_panel = axes.transData + axes.transAxes.inverted()
    taken = []
    for place, c in enumerate(shown):
        mine = panel.points[panel.labels == c]
        if not len(mine):
            continue
        name = plain(names[c], 16)
        half = 0.25 * line * cells(name)  # of its width
        x, y = to_panel.transform(np.median(mine, axis=0))
        x = min(max(x, half), 1 - half) if half < 0.5 else 0.5
        near = [other for at, other, width in taken if abs(at - x) < half + width]
        y = free_height(y, near, line)
        taken.append((x, y, half))
        dark = 0.5 * np.array(to_rgb(class_look(place)[0]))
        axes.text(x, y, name, transform=axes.transAxes, ha="center", va="center", fontsize=SMALL,
                  color=dark, path_effects=[withStroke(linewidth=2, foreground="white")])


def free_height(y, near, line):
    """The height nearest y, in [0, 1], that is a line away from all in `near`, else y."""
    heights = np.arange(line / 2, 1 - line / 2, line / 8)
    for other in near:
        heights = heights[np.abs(heights - other) >= line]
    return heights[np.abs(heights - y).argmin()] if len(heights) else y


@guarded
def examples(path, rows, run, what):
    """A line of images for each title. rows: [(title, images (n,3,H,W), uint8 or in [0,1])]."""
    from torchvision.utils import make_grid

    gap = 2  # pixels of white between images
    number, _, height, width = rows[0][1].shape
    pixels = [images.cpu() / (255 if images.dtype == torch.uint8 else 1) for _, images in rows]
    grid = make_grid(torch.cat(pixels).clamp(0, 1), number, gap, pad_value=1.0)
    picture = grid[:, gap:-gap, gap:-gap].permute(1, 2, 0)
    side = min((WIDTH - 1.6) / number, 0.7)  # inches of an image
    figure = new_figure(len(rows) * side * height / width + 0.5)
    axes = figure.subplots()
    axes.imshow(picture.numpy(), interpolation="nearest")
    middles = [i * (height + gap) + height / 2 for i in range(len(rows))]
    axes.set_yticks(middles, [plain(title, 26) for title, _ in rows])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, path,
         f"{plain(what, 80)}. {number} test images, one column each. {described(run)}")


# ---- accuracy under perturbation and attack -----------------------------------------------------


def where(rows, **wanted):
    """The rows that have these values."""
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def n_of(rows):
    return counted([r["n"] for r in rows])


def in_percent(rows, key="value"):
    """Accuracies and the bounds of their intervals (n,3), in percent."""
    return 100 * np.array([[r[key], r["ci_low"], r["ci_high"]] for r in rows], float).reshape(-1, 3)


def lengths(points):
    """What errorbar takes for points (n,3) with their bounds: lengths below and above (2,n)."""
    return np.abs(points[:, 1:] - points[:, :1]).T


def families(rows):
    """[(text, condition)] for each family: its heading, without condition, then its conditions."""
    blocks = []
    for family in dict.fromkeys(r["family"] for r in rows):
        mine = where(rows, family=family)
        default = "no" if family in HELD_OUT_FAMILIES else "yes"  # a comparison's rows say it
        notes = {r.get("in_part3_training", default) for r in mine}
        held_out = ", held out" if "no" in notes and "yes" not in notes else ""
        block = [(family[:1].upper() + family[1:] + held_out, "")] if family else []
        for condition in dict.fromkeys(r["condition"] for r in mine):
            text = condition.removeprefix("cifar10c ").replace("_", " ")
            block.append((text, condition))
        blocks.append(block)
    return blocks


def write_conditions(axes, lines, total):
    """Writes lines (text, condition) down the vertical axis, of which `total` fill its height."""
    axes.set_yticks(range(len(lines)), [plain(text, 26) for text, _ in lines])
    axes.set(ylim=(total - 0.4, -0.6), xlabel="test accuracy (%)")
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    for y, (label, (_, condition)) in enumerate(zip(axes.get_yticklabels(), lines, strict=True)):
        if condition:
            axes.axhline(y, color=FAINT, linewidth=0.4, zorder=0)
        else:
            label.set_fontweight("bold")


@guarded
def severities(path, rows, run):
    """Accuracy under every perturbation and severity, families as headings."""
    rows = where(rows, metric="accuracy", head="own", split="test")
    clean = in_percent(where(rows, condition="clean"))[:1]
    rows = [r | {"family": FAMILY[r["condition"]]} for r in rows if r["condition"] in FAMILY]
    lines = sum(families(rows), [])
    height = {condition: y for y, (_, condition) in enumerate(lines)}
    figure = new_figure(0.19 * len(lines) + 0.9)
    axes = figure.subplots()
    write_conditions(axes, lines, len(lines))
    for value in clean[:, 0]:
        axes.axvline(value, color=NEUTRAL, linestyle="--", linewidth=1, label="clean")
    for severity in sorted({r["severity"] for r in rows}):
        mine = where(rows, severity=severity)
        points = in_percent(mine)
        heights = [height[r["condition"]] for r in mine]
        color = SEVERITY_COLORS.get(severity, NEUTRAL)
        axes.errorbar(points[:, 0], heights, xerr=lengths(points), color=color, marker="o",
                      linestyle="", markerfacecolor=color if severity else "white",
                      label=f"severity {severity}" if severity else "without severity", **BARS)
    axes.set_xlim(room(np.concatenate([clean, in_percent(rows)])))
    legend(figure, *axes.get_legend_handles_labels())
    save(figure, path, f"{described(run)} Test images, {n_of(rows)}, with 95 % intervals. "
         f"{held_out_note(run.dataset, rows)}")


def held_out_note(dataset, rows):
    note = "Held out: part 3 does not train on these perturbations"
    if dataset.startswith(JPEG_COPY) and where(rows, condition="jpeg"):
        note += " (but all images of this copy are JPEG)"
    return f"{note}."


def draw_over_eps(axes, curves, norm, key="value", width=0):
    """Draws curves [(rows, Look)], every eps at its rank: 0, 1, 2, 4, 8, 16 are evenly spaced.

    width: over how much of an eps's room the curves are shifted, so that no interval covers
    another.  Returns the artists.
    """
    eps = sorted({float(r["severity"]) for rows, _ in curves for r in rows})
    shifts = np.linspace(-width / 2, width / 2, len(curves))
    artists = []
    drawn = []
    for (rows, look), shift in zip(curves, shifts, strict=True):
        rows = sorted(rows, key=lambda r: float(r["severity"]))
        points = in_percent(rows, key)
        ranks = np.array([eps.index(float(r["severity"])) for r in rows])
        artists.append(axes.errorbar(
            ranks + shift, points[:, 0], lengths(points), color=look.color, marker=look.marker,
            linestyle=look.line, **BARS))
        drawn.append(points)
    axes.set_xticks(range(len(eps)), [f"{e:g}" for e in eps])
    axes.set(xlabel=f"eps (1/255, {norm} norm)", ylabel="test accuracy (%)",
             ylim=room(np.concatenate(drawn)))
    axes.grid(True, axis="y")
    return artists


@guarded
def attack(path, rows, run, norm, failed_audits):
    """Accuracy over eps under every attack in one norm ("inf" or "2"), and which audits failed."""
    l2 = norm == "2"
    rows = where(rows, metric="accuracy", head="own", split="test")
    rows = [r for r in rows if ("_l2" in r["condition"]) == l2]
    curves = []
    labels = []
    for name, look in ATTACK.items():
        names = (name, f"{name}_sign")  # random_sign, random_l2
        mine = [r for r in rows if r["condition"].replace("_l2", "") in names]
        if mine:
            curves.append((mine, look))
            labels.append(f"{look.label}, {n_of(mine)}")
    figure = new_figure(3.3)
    axes = figure.subplots()
    artists = draw_over_eps(axes, curves, "L2" if l2 else "L∞")
    guessing = 100 / len(run.classes)
    if guessing > axes.get_ylim()[0]:
        line = {"color": NEUTRAL, "linewidth": 0.8, "linestyle": "-.", "zorder": 0}
        artists.append(axes.axhline(guessing, **line))
        labels.append(f"guessing, {guessing:.3g} %")
    legend(figure, artists, labels)
    verdict = "All audit checks of the attack pass."
    if failed_audits:
        failed = plain("; ".join(failed_audits), 400)
        verdict = f"AUDIT FAILED, this should hold and does not: {failed}."
    save(figure, path, f"{described(run)} Test images, attacked in float32 with their true labels "
         f"unless stated otherwise; 95 % intervals; eps values are evenly spaced. {verdict}")


@guarded
def comparison(path, table, names):
    """All models: clean and perturbed accuracy by family, and FGSM over eps.

    table: dicts of part, condition, severity, family, accuracy, ci_low, ci_high, n, dataset.
    names: {part: label}.
    """
    perturbed = [r for r in table if r["family"] != "attack"]
    columns = balanced(families(perturbed))
    total = max(map(len, columns))
    norm = "L∞" if where(table, condition="fgsm") else "L2"
    fgsm = where(table, condition="fgsm" if norm == "L∞" else "fgsm_l2")
    widths = [1.25] * len(columns)
    if fgsm:
        widths.append(1)
    figure = new_figure(min(max(max(0.26, 0.07 * len(names)) * total + 0.8, 2), 0.68 * WIDTH))
    all_axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    looks = {part: Look("", PART_COLORS[part], PART_MARKERS[part], "-") for part in names}
    reach = 0.5 * (len(names) - 1) / (len(names) + 1)  # twice as much between lines as in them
    offsets = np.linspace(-reach, reach, len(names))
    drawn = []
    for axes, lines in zip(all_axes, columns, strict=False):
        write_conditions(axes, lines, total)
        for offset, (part, look) in zip(offsets, looks.items(), strict=True):
            points, heights = means(perturbed, part, lines)
            axes.errorbar(points[:, 0], heights + offset, xerr=lengths(points), color=look.color,
                          linestyle="", marker=look.marker, markersize=4.5, markeredgewidth=0,
                          ecolor="black", elinewidth=0.8, barsabove=True)  # often smaller than it
            drawn.append(points)
    for axes in all_axes[: len(columns)]:
        axes.set_xlim(room(np.concatenate(drawn)))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if fgsm:
        curves = [(where(fgsm, part=part), look) for part, look in looks.items()]
        draw_over_eps(all_axes[-1], curves, norm, "accuracy", 0.16)
        all_axes[-1].set_title("FGSM", fontweight="bold")
    handles = [Line2D([], [], ls="", color=k.color, marker=k.marker) for k in looks.values()]
    legend(figure, handles, [model_name(part, label) for part, label in names.items()])
    save(figure, path, comparison_caption(perturbed, fgsm))


def means(rows, part, lines):
    """A model's accuracies (n,3) as means over severities, in percent, and their heights (n,)."""
    points = []
    heights = []
    for y, (_, condition) in enumerate(lines):
        mine = where(rows, part=part, condition=condition)
        if mine:
            points.append(in_percent(mine, "accuracy").mean(0))
            heights.append(y)
    return np.array(points).reshape(-1, 3), np.array(heights)


def balanced(blocks):
    """The lines of all blocks in one column if they are few, else in two of about equal length."""
    columns = [sum(blocks, [])]
    if len(columns[0]) <= 8:
        return columns
    for cut in range(1, len(blocks)):
        two = [sum(blocks[:cut], []), sum(blocks[cut:], [])]
        columns = min(columns, two, key=lambda some: max(map(len, some)))
    return columns


def comparison_caption(perturbed, fgsm):
    ours = [r for r in perturbed if r["condition"] in FAMILY]  # CIFAR-10-C has its own severities
    severities = sorted({str(r["severity"]) for r in ours} - {""})
    text = plain(perturbed[0]["dataset"], 40)
    text += f", one training each, test images, {n_of(perturbed)}"
    if fgsm:
        text += f" (FGSM: {n_of(fgsm)}; eps values evenly spaced, curves slightly shifted)"
    bars = "Bars: 95 % intervals."
    if len(severities) > 1:
        bars = f"Means over severities {', '.join(severities)}; bars: means of the 95 % bounds."
    elif severities:
        bars = f"Severity {severities[0]}. {bars}"
    note = held_out_note(perturbed[0]["dataset"], perturbed)
    return f"{text}. {bars} {note}"
