"""What every figure is drawn on: its style, its texts, its legend, its file.

A figure does not depend on the user's own matplotlib, and none can end the run.
"""

import functools
import math
import unicodedata
import warnings
from pathlib import Path

from arguments import RunError
from checkpoints import atomic

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.2  # inches: the width of a page's text, for which the font sizes are meant
LARGEST = 15  # inches: no side of a figure is longer
SMALL, TEXT = 7.5, 8  # points
STYLE = {
    "font.size": TEXT, "axes.labelsize": TEXT, "axes.titlesize": SMALL, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.linewidth": 0.6, "grid.alpha": 0.3, "grid.linewidth": 0.5,
    "lines.linewidth": 1.3, "lines.markersize": 4, "figure.dpi": 160,
    "text.parse_math": False,  # a class may be called $5_$10
}


def guarded(draw):
    """Makes any failure to draw or to write one printed line: a figure never ends a training.

    A figure of that name that is already there shows an earlier model, so it is removed first.
    """

    @functools.wraps(draw)
    def drawn(path, *args, **kwargs):
        try:
            Path(path).unlink(missing_ok=True)
            with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
                warnings.simplefilter("ignore")  # about characters that no font has
                draw(path, *args, **kwargs)
        except Exception as error:  # MemoryError included; matplotlib raises whatever it likes
            line = f"{path}: not drawn ({reason(error)})"
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)

    return drawn


def reason(error):
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, RunError):
        return text.split(";")[0]  # without "what was there before is unchanged": it is not
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def new_figure(height, width=WIDTH):
    """A figure (inches) on its own canvas, unknown to pyplot."""
    figure = Figure(figsize=(min(width, LARGEST), min(height, LARGEST)), layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def save(figure, path, caption):
    """Writes a figure with its caption, complete or not at all; same input, same bytes."""
    size = SMALL * figure.get_figwidth() / WIDTH  # as large on the page, whatever the width
    lines = [""]
    for word in caption.replace(" %", "\N{NO-BREAK SPACE}%").split(" "):
        if cells(f"{lines[-1]} {word}") > 108:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip(" ")
    figure.supxlabel("\n".join(lines), fontsize=size, color="#444444")
    with atomic(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def cells(text):
    """How wide a text is, in Latin characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plain(text, width):
    """A user's text in one line, without its middle if wider than `width` Latin characters."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    if cells(text) <= width:
        return text
    keep = width // 2 if cells(text) > len(text) else width
    return f"{text[: keep - keep // 3 - 1]}…{text[-(keep // 3) :]}"


def legend(figure, handles, labels):
    """A legend above the figure, in as few lines as fit."""
    # matplotlib before 3.10 leaves out labels that begin with an underscore
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    for lines in range(1, len(labels) + 1):
        columns = np.array_split(labels, math.ceil(len(labels) / lines))  # as matplotlib does
        if sum(9 + max(map(cells, column)) for column in columns) <= 17 * WIDTH:
            break
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, labels, loc="outside upper center", ncols=len(columns))
