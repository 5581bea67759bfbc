"""Figures: what is drawn, that nothing of the user's changes it, that none costs the run."""

import itertools
import re
import sys
import types

import canvas
import perturbations
import plots

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay"]
ODD = [
    "$5_$10",
    "\\frac",
    "100%",
    "{x}",
    "long " * 40,
    "猫と犬",
    "🐈 cat",
    "two\nlines",
    "_hidden",
    "a\udcffb",
]
NAMES = {
    "part1": "cross-entropy",
    "part3": "augmented",
    "part3_crop_flip": "crop and flip",
    "part4": "Angular",
    "part4_augmented": "Angular, augmented",
    "part4_proxies": "Angular, proxies",
    "part4_proxies_augmented": "Angular, proxies, augmented",
}
ATTACKS = (
    "fgsm",
    "pgd",
    "random_sign",
    "fgsm_predicted",
    "fgsm_targeted",
    "fgsm_from_part1",
    "worst_case",
)


def run_of(classes=ANIMALS, dataset="toys"):
    return types.SimpleNamespace(
        part="part3", label="augmented", dataset=dataset, classes=classes, seed=7,
        sizes={"training": 10_000, "evaluation": 40_000, "test": 10_000},
    )


def row(condition, severity="", value=0.5, n=2000):
    return {
        "part": "part3",
        "split": "test",
        "condition": condition,
        "severity": severity,
        "head": "own",
        "metric": "accuracy",
        "value": value,
        "ci_low": value - 0.02,
        "ci_high": value + 0.03,
        "n": n,
    }


HISTORY = [
    {"epoch": e, "loss": 2.0 / e, "train_accuracy": 0.3 + e / 20, "eval_accuracy": 0.4,
     "eval_n": 500, "lr": 0.1}
    for e in range(1, 5)
]
PERTURBED = [row("clean", value=0.9)]
for _name in perturbations.PERTURBATIONS:
    _levels = ("",) if _name in perturbations.NO_SEVERITY else ("1", "3", "5")
    PERTURBED += [row(_name, level, 0.8 - 0.05 * int(level or 1)) for level in _levels]
ATTACKED = [row("fgsm", "0", 0.7)]
for _e in (1, 2, 4, 8, 16):
    ATTACKED += [
        row(name, str(_e), 0.6 - _e / 40, 2000 if name != "pgd" else 100) for name in ATTACKS
    ]


def predictions(classes):
    """Predictions and labels, 20 of each class: 14 right, 4 the next class, 2 the one after it."""
    labels = np.repeat(np.arange(classes), 20)
    return (labels + np.tile([0] * 14 + [1] * 4 + [2] * 2, classes)) % classes, labels


def panels(classes, number=2):
    generator = np.random.default_rng(0)
    labels = np.arange(300) % classes
    centers = generator.normal(size=(classes, 2)) * 5
    return [
        plots.Panel(f"condition {i}", centers[labels] + generator.normal(size=(300, 2)), labels)
        for i in range(number)
    ]


def table(parts=tuple(NAMES)):
    rows = []
    for shift, part in enumerate(parts):
        for source in PERTURBED + [r for r in ATTACKED if r["condition"] in ("fgsm", "pgd")]:
            family = perturbations.FAMILY.get(source["condition"], "")
            if source["condition"] in ATTACKS:
                family = "attack"
            moved = {k: source[k] - shift / 50 for k in ("ci_low", "ci_high")}
            rows.append(
                source
                | moved
                | {
                    "part": part,
                    "accuracy": source["value"] - shift / 50,
                    "family": family,
                    "dataset": "toys",
                }
            )
    return rows


def draw_all(folder, run):
    """Every figure once, of data that belong to `run`; returns their paths."""
    classes = len(run.classes)
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    names = dict.fromkeys(NAMES, run.label)
    dataset = [r | {"dataset": run.dataset} for r in table()]
    plots.history(folder / "history.png", HISTORY, run)
    plots.confusion(folder / "confusion.png", *predictions(classes), run)
    plots.umap(folder / "umap.png", panels(classes), run)
    plots.examples(
        folder / "examples.png",
        [(run.classes[0], images), ("half", images / 255)],
        run,
        run.dataset,
    )
    plots.severities(folder / "severities.png", PERTURBED, run)
    plots.attack(folder / "attack.png", ATTACKED, run, "inf", [run.classes[0]])
    plots.comparison(folder / "comparison.png", dataset, names)
    return sorted(folder.glob("*.png"))


def record(monkeypatch):
    """{file name: (figure, caption)} of what is saved from now on."""
    figures, original = {}, plots.save

    def save(figure, path, caption):
        figures[path.name] = figure, caption
        original(figure, path, caption)

    monkeypatch.setattr(plots, "save", save)
    return figures


@pytest.fixture
def drawn(monkeypatch):
    return record(monkeypatch)


@pytest.fixture(scope="module")
def every_figure(tmp_path_factory):
    """Every figure of ten classes: (paths, what was drawn, whether that imported pyplot)."""
    had_pyplot = "matplotlib.pyplot" in sys.modules
    with pytest.MonkeyPatch.context() as monkeypatch:
        figures = record(monkeypatch)
        paths = draw_all(tmp_path_factory.mktemp("figures"), run_of())
    return paths, figures, ("matplotlib.pyplot" in sys.modules) != had_pyplot


def texts(figure):
    """The texts that are seen; matplotlib also keeps labels of ticks beyond the ends of an axis."""
    beyond = []
    for axis in itertools.chain(*((a.xaxis, a.yaxis) for a in figure.axes)):
        low, high = sorted(axis.get_view_interval())
        beyond += [t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high]
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [t for t in found if t not in beyond]


def png(path):
    """(width, height) in pixels, and what else the file says."""
    with Image.open(path) as image:
        return image.size, image.info


def words(figure):
    return [t.get_text() for t in texts(figure)]


# ---- colours ----

VISION = {  # Machado et al. 2009, severity 1, on linear RGB
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(color, vision="normal"):
    """CIE Lab (D65) of a colour #RRGGBB as this vision has it."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ linear / to_xyz.sum(1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(first, second, vision="normal"):
    """Of two colours, as their distance in CIE Lab (1976); 2 can just be seen."""
    return np.linalg.norm(lab(first, vision) - lab(second, vision))


def attack_colors():
    return [look.color for look in plots.ATTACK.values()]


@pytest.mark.parametrize(
    "colors, number",
    [(plots.CLASS_COLORS, 10), (tuple(plots.PART_COLORS.values()), 7), (attack_colors(), 7)],
)
def test_colours_stay_apart_with_every_kind_of_vision_and_on_white(colors, number):
    assert len(colors) == number
    for vision in VISION:
        assert min(difference(*two, vision) for two in itertools.combinations(colors, 2)) >= 19
    assert min(difference(c, "#FFFFFF") for c in colors) >= 35


def test_no_colour_means_two_things():
    sets = [
        plots.CLASS_COLORS,
        plots.PART_COLORS.values(),
        attack_colors(),
        plots.SEVERITY_COLORS.values(),
        (plots.NEUTRAL, plots.FAINT, plots.DIAGONAL),
    ]
    everything = list(itertools.chain(*sets))
    assert len(set(everything)) == len(everything)
    pairs = itertools.product(plots.PART_COLORS.values(), attack_colors())
    assert min(difference(*two) for two in pairs) >= 30


# ---- a figure never costs the run ----


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(28, "No space left on device"), ValueError("first\nsecond ✗")]
)
def test_a_failure_is_one_line_and_the_former_figure_goes(error, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(canvas.Figure, "savefig", fail)
    path = tmp_path / "part3_history.png"
    path.write_bytes(b"of an earlier model")
    assert plots.history(path, HISTORY, run_of()) is None
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "part3_history.png: not drawn" in out and err == ""
    assert (str(error).split("\n")[0] or "MemoryError").split("] ")[-1] in out
    assert list(tmp_path.iterdir()) == []


def test_impossible_data_is_one_line_in_every_figure(tmp_path, capsys):
    broken = object()
    plots.history(tmp_path / "a.png", broken, run_of())
    plots.confusion(tmp_path / "b.png", [1], [99], run_of())
    plots.umap(tmp_path / "c.png", [], run_of())
    plots.examples(tmp_path / "d.png", [], run_of(), "none")
    plots.severities(tmp_path / "e.png", [{}], run_of())
    plots.attack(tmp_path / "f.png", [], run_of(), "inf", [])
    plots.comparison(tmp_path / "g.png", [], NAMES)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": not drawn (")[0][-5:] for line in lines] == [
        f"{c}.png" for c in "abcdefg"
    ]


# ---- nothing of the user's changes a figure, and no figure changes the user's ----

HOSTILE = {
    "text.usetex": True,
    "font.size": 40,
    "backend": "TkAgg",
    "axes.facecolor": "red",
    "savefig.dpi": 12,
    "axes.prop_cycle": matplotlib.cycler(color=["pink"]),
    "savefig.bbox": "tight",
    "lines.linestyle": ":",
    "image.origin": "lower",
    "figure.constrained_layout.use": False,
    "axes.grid": True,
    "legend.loc": "center",
    "savefig.transparent": True,
    "path.sketch": (9, 9, 9),
    "axes.unicode_minus": False,
}


def test_the_bytes_depend_on_the_data_alone(every_figure, tmp_path, monkeypatch):
    plain, _, imported_pyplot = every_figure
    assert not imported_pyplot
    for key, value in HOSTILE.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    before = dict(matplotlib.rcParams)
    hostile = draw_all(tmp_path, run_of())
    assert dict(matplotlib.rcParams) == before
    assert len(plain) == len(hostile) == 7
    assert [
        p.name for p, q in zip(plain, hostile, strict=True) if p.read_bytes() != q.read_bytes()
    ] == []
    _, info = png(plain[0])
    assert "Software" not in info and info["dpi"] == pytest.approx((160, 160), abs=0.1)


@pytest.mark.filterwarnings("error")
def test_odd_text_is_drawn_as_it_is(tmp_path, drawn, capfd):
    paths = draw_all(tmp_path, run_of(ODD, dataset="$\\alpha_{" + "猫" * 100))
    assert len(paths) == 7
    assert capfd.readouterr() == ("", "")
    for path in paths:
        check_readable(drawn[path.name][0], path)
    for name in ("confusion.png", "umap.png"):
        found = [w.strip() for w in words(drawn[name][0])]
        assert {"$5_$10", "\\frac", "100%", "{x}", "two lines", "_hidden", "a?b"} <= set(found)
        assert max(len(w) for w in found if w.startswith("long")) <= 24
    assert all(not t.get_parse_math() for figure, _ in drawn.values() for t in texts(figure))


# ---- readable ----


def check_readable(figure, path):
    """Every text is inside the figure and at least 7 points once the figure is 7.2 inches wide."""
    scale = 7.2 / figure.get_figwidth()
    renderer = figure.canvas.get_renderer()
    size = figure.bbox
    for text in texts(figure):
        assert text.get_fontsize() * scale >= 7, text
        box = text.get_window_extent(renderer)
        assert box.x0 >= size.x0 - 1 and box.x1 <= size.x1 + 1, text
        assert box.y0 >= size.y0 - 1 and box.y1 <= size.y1 + 1, text
    assert max(png(path)[0]) <= 2400


def test_every_figure_is_readable_and_says_what_it_shows(every_figure):
    paths, drawn, _ = every_figure
    for path in paths:
        figure, caption = drawn[path.name]
        check_readable(figure, path)
        assert "toys" in caption
        if path.name != "comparison.png":
            assert "Part 3 (augmented) on toys, seed 7" in caption
        if path.name not in ("history.png", "examples.png"):
            assert re.search(r"n = \d", " ".join([caption, *words(figure)]))


@pytest.mark.parametrize("classes", [2, 37, 200])
def test_many_classes_stay_readable(classes, tmp_path, drawn):
    run = run_of([f"a class with the number {i}" for i in range(classes)])
    plots.confusion(tmp_path / "confusion.png", *predictions(classes), run)
    plots.umap(tmp_path / "umap.png", panels(classes), run)
    for name, (figure, _) in drawn.items():
        check_readable(figure, tmp_path / name)
    figure, caption = drawn["confusion.png"]
    axes = figure.axes[0]
    named = [t.get_text() for t in axes.get_yticklabels()]
    assert len(named) == min(classes, -(-classes // -(-classes // 40))) <= 40
    assert ("is named" in caption) == (classes > 40)
    assert bool(axes.texts) == (classes == 2)
    boxes = [t.get_window_extent() for t in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in zip(boxes, boxes[1:], strict=False))
    figure, caption = drawn["umap.png"]
    assert bool(figure.legends) == (classes <= 20)
    assert len(figure.axes[0].texts) == min(classes, 10)
    assert (f"10 of the {classes} classes" in caption) == (classes > 20)


# ---- each figure ----


def legend_of(figure):
    """[(label, colour)] of a figure's legend."""
    legend = figure.legends[0]
    colors = [matplotlib.colors.to_rgba_array(h.get_color())[0] for h in legend.legend_handles]
    return [(text.get_text(), matplotlib.colors.to_hex(color).upper())
            for text, color in zip(legend.get_texts(), colors, strict=True)]


def test_every_legend_names_what_has_its_colour(every_figure):
    _, drawn, _ = every_figure
    found = {name[:-4]: legend_of(figure) for name, (figure, _) in drawn.items() if figure.legends}
    gray = plots.NEUTRAL
    assert found["history"] == [("training batches", gray), (
        "500 evaluation images, averaged weights", plots.PART_COLORS["part3"])]
    assert found["umap"] == list(zip(ANIMALS, plots.CLASS_COLORS, strict=True))
    assert found["severities"] == [("clean", gray), ("without severity", gray)] + [
        (f"severity {s}", plots.SEVERITY_COLORS[s]) for s in "135"]
    assert found["attack"] == [
        (f"{look.label}, n = {'100' if look.label == 'PGD' else '2,000'}", look.color)
        for look in plots.ATTACK.values()]
    assert found["comparison"] == [(f"Part {part[4]} (augmented)", color)
                                   for part, color in plots.PART_COLORS.items()]


def test_the_numbers_of_a_confusion_matrix_stand_in_their_cells(tmp_path, drawn):
    labels = [0] * 8 + [1] * 2
    predicted = [0] * 5 + [1] * 5  # 62.5 and 100 % of the classes, 70 % of the images
    plots.confusion(tmp_path / "x.png", predicted, labels, run_of(["ant", "bee"]))
    figure, caption = drawn["x.png"]
    axes = figure.axes[0]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {
        (0, 0): "63", (1, 0): "38", (1, 1): "100"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "70.0 % are classified correctly" in caption


def test_a_confusion_matrix_of_many_classes_names_the_rows_and_columns_it_marks(tmp_path, drawn):
    names = [f"class {c}" for c in range(50)]
    plots.confusion(tmp_path / "x.png", *predictions(50), run_of(names))
    axes = drawn["x.png"][0].axes[0]
    for ticks, labels in ((axes.get_xticks(), axes.get_xticklabels()),
                          (axes.get_yticks(), axes.get_yticklabels())):
        assert [t.get_text() for t in labels] == [names[tick] for tick in ticks] == names[::2]


def test_every_panel_of_a_umap_has_its_own_title_and_names(tmp_path, drawn):
    points = np.repeat([[0.0, 0.0], [10.0, 10.0]], 9, 0)
    labels = np.repeat([0, 1], 9)
    shown = [plots.Panel("first", points, labels), plots.Panel("second", points, 1 - labels)]
    plots.umap(tmp_path / "x.png", shown, run_of(["one", "two"]))
    found = {}
    for axes in drawn["x.png"][0].axes:
        from_left = sorted(axes.texts, key=lambda t: t.get_position()[0])
        found[axes.get_title()] = [t.get_text() for t in from_left]
    assert found == {"first": ["one", "two"], "second": ["two", "one"]}


def test_a_umap_of_many_classes_leaves_out_no_point_and_names_those_it_shows(tmp_path, drawn):
    for classes, named in ((20, range(20)), (30, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29))):
        plots.umap(tmp_path / f"{classes}.png", panels(classes, 1),
                   run_of([f"class {c}" for c in range(classes)]))
        axes = drawn[f"{classes}.png"][0].axes[0]
        assert [t.get_text() for t in axes.texts] == [f"class {c}" for c in named]
        assert sum(len(dots.get_offsets()) for dots in axes.findobj(PathCollection)) == 300
    looks = {(h.get_color(), h.get_marker())
             for h in drawn["20.png"][0].legends[0].legend_handles}
    assert len(looks) == 20


def test_the_confusion_matrix_scales_errors_on_their_own(tmp_path, drawn):
    predicted, labels = predictions(10)
    plots.confusion(tmp_path / "x.png", torch.tensor(predicted), torch.tensor(labels), run_of())
    figure, caption = drawn["x.png"]
    errors, diagonal = figure.axes[0].images
    shares = np.asarray(errors.get_array())
    assert (shares[0, 1], shares[0, 2], shares[3, 3], shares.max()) == (20, 10, 0, 20)
    assert errors.get_clim() == (0, 20)
    assert [t.get_text() for t in figure.axes[0].texts[:3]] == ["70", "20", "10"]
    gray = np.unique(diagonal.to_rgba(diagonal.get_array())[np.eye(10, dtype=bool)], axis=0)
    assert gray.shape == (1, 4) and len(set(gray[0, :3])) == 1
    assert diagonal.get_array().mask.sum() == 90
    assert "n = 200" in caption and "70.0 %" in caption
    assert any("(%)" in w and "errors" in w for w in words(figure))


def test_shares_round_as_the_reader_does_and_no_cell_says_0(tmp_path, drawn):
    labels = np.zeros(1000, int)
    predicted = np.repeat([0, 1, 2, 3], [966, 5, 4, 25])  # 96.6, 0.5, 0.4 and 2.5 %
    plots.confusion(tmp_path / "x.png", predicted, labels, run_of())
    assert [t.get_text() for t in drawn["x.png"][0].axes[0].texts] == ["97", "1", "3"]


def test_a_class_without_images_leaves_the_confusion_matrix_whole(tmp_path, drawn):
    plots.confusion(tmp_path / "x.png", [0, 0], [0, 0], run_of())
    assert np.isfinite(drawn["x.png"][0].axes[0].images[0].get_array()).all()


def test_umap_panels_share_axes_and_every_class_keeps_its_colour(tmp_path, drawn):
    shown = panels(10)
    plots.umap(tmp_path / "x.png", shown, run_of())
    figure, caption = drawn["x.png"]
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    for axes, panel in zip(figure.axes, shown, strict=True):
        dots = max(axes.findobj(PathCollection), key=lambda c: len(c.get_offsets()))
        for place, color in zip(dots.get_offsets(), dots.get_facecolors(), strict=True):
            label = panel.labels[np.abs(panel.points - place).sum(1).argmin()]
            assert matplotlib.colors.to_hex(color[:3]).upper() == plots.CLASS_COLORS[label]
        assert [t.get_text() for t in axes.texts] == ANIMALS
        assert all(t.get_path_effects() for t in axes.texts)
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ANIMALS
    assert "n = 300" in caption and "not comparable" in caption


def test_names_stand_at_their_clusters_and_not_on_each_other(tmp_path, drawn):
    far = np.array([[0.0, 0.0], [10.0, 90.0], [10.0, 90.0]])
    plots.umap(
        tmp_path / "x.png",
        [plots.Panel("all", np.tile(far, (9, 1)), np.tile([0, 1, 2], 9))],
        run_of(["one", "two", "three"]),
    )
    axes = drawn["x.png"][0].axes[0]
    one, two, three = (t.get_window_extent() for t in axes.texts)
    assert one.contains(*axes.transData.transform(far[0]))
    assert two.contains(*axes.transData.transform(far[1]))
    assert not two.overlaps(three)


def test_examples_show_the_pixels(tmp_path, drawn):
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    plots.examples(
        tmp_path / "x.png", [("bytes", images), ("floats", images / 255)], run_of(), "Pictures"
    )
    axes = drawn["x.png"][0].axes[0]
    titles = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [(y, text.get_text()) for y, text in titles] == [(2.5, "bytes"), (9.5, "floats")]
    picture = axes.images[0].get_array()
    assert picture.shape == (2 * 5 + 2, 3 * 7 + 2 * 2, 3)
    expected = images[1].permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(picture[:5, 9:16], expected, atol=1e-6)
    np.testing.assert_allclose(picture[7:12, 9:16], expected, atol=1e-6)


def test_history_shows_one_epoch_and_leaves_out_what_was_not_measured(tmp_path, drawn):
    nan = float("nan")
    plots.history(tmp_path / "x.png", [HISTORY[0] | {"train_accuracy": nan}], run_of())
    plots.history(tmp_path / "y.png", HISTORY, run_of())
    _, one = drawn["x.png"][0].axes[1].lines
    assert one.get_marker() == "o" and one.get_ydata() == pytest.approx([40])
    (loss,) = drawn["y.png"][0].axes[0].lines
    assert loss.get_ydata() == pytest.approx([2, 1, 2 / 3, 0.5])
    training, evaluation = drawn["y.png"][0].axes[1].lines
    assert evaluation.get_color() == plots.PART_COLORS[
        "part3"
    ] and evaluation.get_ydata() == pytest.approx([40] * 4)
    assert {"500 evaluation images, averaged weights", "training batches", "accuracy (%)"} <= set(
        words(drawn["y.png"][0])
    )
    plots.history(tmp_path / "z.png", HISTORY, run_of(), measured=0.345)
    axes = drawn["z.png"][0].axes[1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines
            if len(line.get_xdata()) == 1] == [(4, 34.5)]
    assert "all 40,000" in words(drawn["z.png"][0]) and axes.get_ylim()[0] < 34.5
    (band,) = drawn["y.png"][0].axes[1].collections  # Wilson's interval of 200 of 500
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((35.8, 44.4), abs=0.05)


def test_every_curve_of_a_training_stands_at_its_epochs(tmp_path, drawn):
    watched = {"eval_accuracy": 0.5, "eval_n": 18}
    plots.history(tmp_path / "x.png", [h | watched for h in HISTORY], run_of())
    left, right = drawn["x.png"][0].axes
    assert [list(line.get_xdata()) for line in (*left.lines, *right.lines)] == 3 * [[1, 2, 3, 4]]
    band = right.collections[0].get_paths()[0].vertices
    expected = binomtest(9, 18).proportion_ci(method="wilson")
    assert (band[:, 0].min(), band[:, 0].max()) == (1, 4)
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-3)
    assert (left.get_ylabel(), left.get_xlabel()) == ("training loss", "epoch")


def intervals(axes):
    """The ends of all intervals: for each curve an array (n, 2 ends, 2 coordinates)."""
    return [np.array(bars.get_segments()) for c in axes.containers for bars in c.lines[2]]


def test_severities_stand_under_their_family_with_their_intervals(tmp_path, drawn):
    others = [row("jpeg", "3", 0.1, 3) | other for other in (  # not drawn
        {"metric": "calibration_error"}, {"head": "knn"}, {"split": "evaluation"},
        {"condition": "cifar10c fog"})]
    fewer = PERTURBED[-1] | {"n": 1000}
    plots.severities(tmp_path / "x.png", [*others, *PERTURBED[:-1], fewer], run_of())
    figure, caption = drawn["x.png"]
    assert "n = 1,000 to 2,000, with" in caption
    axes = figure.axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    bold = [t.get_text() for t in axes.get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["Noise", "Blur, held out", "Color", "Geometry"]
    assert (
        labels.index("jpeg")
        < labels.index("Color")
        < labels.index("grayscale")
        < labels.index("Geometry")
    )
    bars = np.concatenate(intervals(axes))
    assert len(bars) == len(PERTURBED) - 1
    jpeg = bars[bars[:, 0, 1] == labels.index("jpeg")][:, :, 0]
    np.testing.assert_allclose(sorted(jpeg.tolist()), [[53, 58], [63, 68], [73, 78]])
    values = {}
    for dots in (container.lines[0] for container in axes.containers):
        values[dots.get_color()] = dots.get_xdata()[dots.get_ydata() == labels.index("jpeg")]
    for severity, value in (("1", 75), ("3", 65), ("5", 55)):
        assert values[plots.SEVERITY_COLORS[severity]] == pytest.approx([value])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [90]


ATTACK_TEXTS = {"FGSM": "fgsm", "FGSM, predicted labels": "fgsm_predicted",
                "FGSM, least likely class": "fgsm_targeted",
                "FGSM, transferred from part 1": "fgsm_from_part1", "PGD": "pgd",
                "worst of its own one-step attacks": "worst_case",
                "random noise of the same size": "random_sign"}


def test_every_attack_is_drawn_from_its_own_rows_at_its_own_eps(tmp_path, drawn):
    values = {name: 0.1 * (i + 1) for i, name in enumerate(ATTACKS)}
    rows = [row("fgsm", eps, values["fgsm"]) for eps in ("0", "2", "16")]
    rows += [row(name, eps, value) for name, value in values.items() if name != "fgsm"
             for eps in ("4", "16")]
    rows.append(row("fgsm_targeted", "4", 0.99) | {"metric": "target class reached"})
    rows += [row(name, "4", 0.99) for name in ("fgsm_unit", "pgd_unit", "worst_case_audit")]
    plots.attack(tmp_path / "x.png", rows, run_of(), "inf", [])
    figure, _ = drawn["x.png"]
    texts_of = {color: text.split(", n =")[0] for text, color in legend_of(figure)}
    for curve in figure.axes[0].containers:
        dots = curve.lines[0]
        name = ATTACK_TEXTS[texts_of[dots.get_color().upper()]]
        assert set(dots.get_ydata()) == {100 * values[name]}
        assert list(dots.get_xdata()) == ([0, 1, 3] if name == "fgsm" else [2, 3])  # of 0 2 4 16


def test_no_attack_is_beyond_the_end_of_the_axis(tmp_path, drawn):
    rows = [row("fgsm", "0", 0.7), row("fgsm", "8", 0.4), row("pgd", "8", 0.1)]
    plots.attack(tmp_path / "x.png", rows, run_of(), "inf", [])
    axes = drawn["x.png"][0].axes[0]
    low, high = axes.get_ylim()
    assert low < 8 and high > 73  # the ends of the intervals


@pytest.mark.parametrize("norm, name", [("inf", "L∞"), ("2", "L2")])
def test_attacks_are_of_one_norm_and_eps_stand_evenly(norm, name, tmp_path, drawn):
    other = {
        "fgsm": "fgsm_l2",
        "pgd": "pgd_l2",
        "random_sign": "random_l2",
        "fgsm_predicted": "fgsm_l2_predicted",
    }
    l2 = [
        r | {"condition": other[r["condition"]], "value": 0.123}
        for r in ATTACKED
        if r["condition"] in other
    ]
    plots.attack(tmp_path / "x.png", ATTACKED + l2, run_of(), norm, ["zero gradients"])
    figure, caption = drawn["x.png"]
    axes = figure.axes[0]
    assert len(axes.containers) == (7 if norm == "inf" else 4)
    assert list(axes.get_xticks()) == [0, 1, 2, 3, 4, 5]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2", "4", "8", "16"]
    assert list(np.round(axes.containers[0].lines[0].get_xdata())) == [0, 1, 2, 3, 4, 5]
    assert name in axes.get_xlabel() and "1/255" in axes.get_xlabel()
    values = np.concatenate([c.lines[0].get_ydata() for c in axes.containers])
    assert np.isclose(values, 12.3).all() == (norm == "2")
    assert "AUDIT FAILED, this should hold and does not: zero gradients" in caption
    assert sum("n = 100" in w for w in words(figure)) == 1
    for curve in axes.containers:  # none is shifted: what is stronger stands lower
        assert set(curve.lines[0].get_xdata()) <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(("classes", "low", "said"), [
    (10, 0.05, "guessing, 10 %"), (300, 0.001, "guessing, 0.333 %"), (10, 0.6, "")])
def test_the_attack_shows_what_guessing_gives_where_it_is_in_sight(classes, low, said, tmp_path,
                                                                   drawn):
    rows = [row("fgsm", "0", 0.7), row("fgsm", "8", low)]
    run = run_of([f"class {i}" for i in range(classes)])
    plots.attack(tmp_path / "x.png", rows, run, "inf", [])
    figure = drawn["x.png"][0]
    assert [w for w in words(figure) if "guessing" in w] == [said] * bool(said)


def test_that_all_images_are_jpeg_is_said_where_jpeg_is_held_out(tmp_path, drawn):
    for dataset, rows, said in (("CIFAR-10 (JPEG copy) (QUICK)", PERTURBED, True),
                                ("CIFAR-10", PERTURBED, False),
                                ("CIFAR-10 (JPEG copy)", PERTURBED[:2], False)):
        plots.severities(tmp_path / "x.png", rows, run_of(dataset=dataset))
        assert ("all images of this copy are JPEG" in drawn["x.png"][1]) == said


@pytest.mark.parametrize("absent", ATTACKS[1:])
def test_the_legend_fits_whatever_attacks_were_tried(absent, tmp_path, drawn):
    rows = [r for r in ATTACKED if r["condition"] != absent]
    plots.attack(tmp_path / "x.png", rows, run_of(), "inf", [])
    figure, _ = drawn["x.png"]
    check_readable(figure, tmp_path / "x.png")


def test_passed_audits_are_said_and_half_an_eps_has_its_place(tmp_path, drawn):
    plots.attack(
        tmp_path / "x.png", [row("fgsm", e) for e in ("16", "0.5", "0")], run_of(), "inf", []
    )
    figure, caption = drawn["x.png"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "0.5", "16"]
    assert "All audit checks" in caption and "FAILED" not in caption


def test_the_comparison_is_landscape_and_shows_every_model_with_intervals(tmp_path, drawn):
    plots.comparison(tmp_path / "x.png", table(), NAMES)
    figure, caption = drawn["x.png"]
    width, height = png(tmp_path / "x.png")[0]
    assert width > 1.3 * height
    left, middle, fgsm = figure.axes
    headings = [
        t.get_text()
        for a in (left, middle)
        for t in a.get_yticklabels()
        if t.get_fontweight() == "bold"
    ]
    assert headings == ["Noise", "Blur, held out", "Color", "Geometry"]
    assert left.get_xlim() == middle.get_xlim()
    low, high = left.get_xlim()
    assert 48 < low < 51 and 93 < high < 96  # the intervals reach from 51 to 93 %
    labels = [t.get_text() for t in left.get_yticklabels()]
    for container, color in zip(left.containers, plots.PART_COLORS.values(), strict=True):
        assert container.lines[0].get_color() == color
    jpeg = [c.lines[0].get_xdata()[labels.index("jpeg") - 2] for c in left.containers]
    np.testing.assert_allclose(
        jpeg, [65 - 2 * i for i in range(7)]
    )  # the mean of 75, 65 and 55, minus 2 a model
    for found in intervals(left):
        np.testing.assert_allclose(np.diff(found[:, :, 0], axis=1), 5)  # from 2 below to 3 above
    assert [t.get_text() for t in fgsm.get_xticklabels()] == ["0", "1", "2", "4", "8", "16"]
    for i, (curve, color) in enumerate(
        zip(fgsm.containers, plots.PART_COLORS.values(), strict=True)
    ):  # 70, then 60 minus eps / 0.4; minus 2 a model
        assert curve.lines[0].get_color() == color
        expected = np.array([70, 57.5, 55, 50, 40, 20]) - 2 * i
        np.testing.assert_allclose(curve.lines[0].get_ydata(), expected)
    assert "n = 2,000" in caption
    assert "Means over severities 1, 3, 5; bars: means of the 95 % bounds." in caption
    assert "Part 4 (Angular, proxies, augmented)" in words(figure)


def test_the_comparison_draws_every_mean_on_its_own_line_and_counts_its_images(tmp_path, drawn):
    number = {"fgsm": 500, "clean": 2000}
    rows = [r | {"n": number.get(r["condition"], 1000)} for r in table(("part1", "part4"))
            if (r["part"], r["condition"]) != ("part1", "jpeg")]
    plots.comparison(tmp_path / "x.png", rows, {"part1": "a", "part4": "b"})
    figure, caption = drawn["x.png"]
    colors = [plots.PART_COLORS[part] for part in ("part1", "part4")]
    assert [color for _, color in legend_of(figure)] == colors
    for axes in figure.axes:
        assert [curve.lines[0].get_color() for curve in axes.containers] == colors
    assert "test images, n = 1,000 to 2,000 (FGSM: n = 500;" in caption
    assert figure.axes[2].get_xlabel() == "eps (1/255, L∞ norm)"
    for axes in figure.axes[:2]:
        labels = [t.get_text() for t in axes.get_yticklabels()]
        assert axes.get_xlabel() == "test accuracy (%)"
        for part, dots in zip(("part1", "part4"), axes.containers, strict=True):
            tested = {r["condition"].replace("_", " ") for r in rows if r["part"] == part}
            lines = np.round(dots.lines[0].get_ydata()).astype(int)
            assert [labels[y] for y in lines] == [text for text in labels if text in tested]


def test_the_comparison_shows_fgsm_in_the_norm_that_was_tried(tmp_path, drawn):
    rows = [row("clean"), row("fgsm_l2", "0", 0.7), row("fgsm_l2", "64", 0.3)]
    rows = [r | {"accuracy": r["value"], "dataset": "toys",
                 "family": "attack" if r["severity"] else ""} for r in rows]
    plots.comparison(tmp_path / "x.png", rows, {"part3": "augmented"})
    _, fgsm = drawn["x.png"][0].axes
    assert fgsm.get_xlabel() == "eps (1/255, L2 norm)"
    [curve] = fgsm.containers
    assert curve.lines[0].get_ydata() == pytest.approx([70, 30])


@pytest.mark.parametrize(("notes", "heading"), [
    ({"rotation": "no", "scale": "no"}, "Geometry, held out"),
    ({"rotation": "no", "translation": "yes"}, "Geometry")])  # trained on with any --families
def test_held_out_is_a_family_of_which_part_3_saw_nothing(notes, heading, tmp_path, drawn):
    rows = [row(name, "3") | {"accuracy": 0.5, "family": "geometry", "dataset": "toys",
                              "in_part3_training": note} for name, note in notes.items()]
    plots.comparison(tmp_path / "x.png", rows, {"part3": "augmented"})
    assert heading in [t.get_text() for t in drawn["x.png"][0].axes[0].get_yticklabels()]


def test_severities_of_cifar10c_are_not_said_of_ours(tmp_path, drawn):
    rows = [r | {"severity": "3"} for r in table(("part1",)) if r["severity"] == "3"]
    published = [rows[0] | {"condition": "cifar10c fog", "family": "CIFAR-10-C", "severity": s}
                 for s in "12345"]
    plots.comparison(tmp_path / "x.png", rows + published, {"part1": "cross-entropy"})
    assert "Severity 3. Bars: 95 % intervals." in drawn["x.png"][1]


@pytest.mark.parametrize(
    "keep, axes", [(lambda r: r["condition"] == "clean", 1), (lambda r: r["family"] != "attack", 2)]
)
def test_the_comparison_of_what_is_there_so_far(keep, axes, tmp_path, drawn):
    rows = [r for r in table(("part1", "part3")) if keep(r)]
    plots.comparison(tmp_path / "x.png", rows, {"part1": "cross-entropy", "part3": "augmented"})
    figure, _ = drawn["x.png"]
    assert len(figure.axes) == axes
    check_readable(figure, tmp_path / "x.png")
