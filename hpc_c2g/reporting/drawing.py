"""Style of the figures, and drawing them as SVG and PNG: the same data give the same bytes. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpc_c2g.reporting.laws import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Palette of Okabe and Ito (2008), with gray for their yellow, which is hard to see on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    "-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (9, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4))
)  # fmt: skip
FAINT, INK = "#8A8A8A", "#3D3D3D"
WIDTH, SMALL = 9.0, 9
LONGEST = 56
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same letters everywhere
    "font.size": SMALL,
    "axes.titlesize": SMALL,
    "axes.labelsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "text.parse_math": False,  # a $ in a label is a $
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "svg.fonttype": "path",  # what a browser has for fonts does not matter
    "svg.hashsalt": "hpc_c2g",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Figure:
    """A figure, which is drawn when its picture is first asked for.

    Attributes:
        name: Name that is safe for a file and a TensorBoard tag.
        title: Title in one line.
        alt: Description in words with the numbers.
        draw: Function that draws it in a format, ``svg`` or ``png``.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[str], bytes]

    @cached_property
    def svg(self) -> str:
        """An ``<svg>`` element, text as outlines."""
        return self.draw("svg").decode()

    @cached_property
    def png(self) -> bytes:
        """The picture at 144 dots per inch."""
        return self.draw("png")


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Bold title.
        note: Note below the title.
        paint: Function that draws into the axes.
    """

    title: str
    note: str
    paint: Callable[[Axes], None]


def figure(name: str, title: str, alt: str, panels: Sequence[Panel], height: float = 2.5) -> Figure:
    """Return a figure of panels in rows of three at most, with one legend of all labels below.

    Args:
        name: Any text; made safe for a file.
        title: Title in one line.
        alt: Description in words with the numbers.
        panels: Panels, at least one.
        height: Height of a row of panels in inches.
    """
    title = plain(title)

    def draw(kind: str) -> bytes:
        from matplotlib import style

        with style.context(STYLE, after_reset=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn instead
            canvas = _compose(title, panels, height)
            return _svg(canvas).encode() if kind == "svg" else _png(canvas)

    return Figure(safe(name), title, plain(alt), draw)


def _compose(title: str, panels: Sequence[Panel], height: float) -> Canvas:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import AutoLocator, MaxNLocator

    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = math.ceil(len(panels) / columns)
    width = WIDTH if columns > 1 else 7.0
    canvas = Canvas(figsize=(width, rows * (height + 0.45) + 0.9), layout="constrained")
    canvas.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)  # type: ignore[union-attr,call-arg]
    canvas.suptitle(short(title, 90), x=0.01, ha="left")
    grid = canvas.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(panel.note, loc="left", color=INK, pad=5)
        axes.annotate(
            short(panel.title), (0, 1), (0, 19), "axes fraction", "offset points", fontsize=10, fontweight="bold"
        )
        panel.paint(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), AutoLocator):
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _legend(canvas)
    canvas.get_layout_engine().execute(canvas)  # type: ignore[union-attr]
    canvas.set_layout_engine("none")  # the SVG and the PNG share the layout found here
    return canvas


def _legend(canvas: Canvas) -> None:
    found: dict[str, Any] = {}
    for axes in canvas.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        longest = max(map(len, found)) + 9
        columns = max(1, min(len(found), 4, int(canvas.get_size_inches()[0] * 14.5) // longest))
        columns = math.ceil(len(found) / math.ceil(len(found) / columns))
        canvas.legend(list(found.values()), list(found), loc="outside lower left", ncols=columns)


def _svg(canvas: Canvas) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].strip()


def _png(canvas: Canvas) -> bytes:
    out = io.BytesIO()
    canvas.savefig(out, format="png", dpi=144)
    return out.getvalue()


def safe(name: str) -> str:
    """Return a name of letters, digits, dots, dashes and underscores alone, 80 characters at most."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip("._") or "figure"


def short(text: Any, longest: int = LONGEST) -> str:
    """Return the text on one line, its middle left out if it is too long."""
    line = plain(text)
    if len(line) <= longest:
        return line
    tail = longest // 3
    return f"{line[: longest - tail - 1]}…{line[-tail:]}"


def marks(k: int) -> dict[str, Any]:
    """Return color, marker and dashes of the k-th line, each of which alone identifies it; from the ninth on all lines are faint."""
    if k >= len(COLORS):
        return {"color": FAINT, "marker": ".", "linestyle": "-", "linewidth": 0.6, "markersize": 3, "zorder": 1}
    face = COLORS[k] if k % 2 == 0 else "white"
    return {"color": COLORS[k], "marker": MARKERS[k], "linestyle": DASHES[k], "markerfacecolor": face, "zorder": 3}


def logarithmic(values: Sequence[float], least: float) -> bool:
    """Return True if the values are positive and span more than a factor ``least``."""
    return min(values) > 0 and max(values) > least * min(values)


def ticks(axes: Axes, values: Sequence[float], log: bool) -> None:
    """Put the marks of the x-axis at the values themselves, without those whose labels would overlap."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if log:
        axes.set_xscale("log")
    scale = math.log if log else float
    ordered = sorted(set(values))
    low, span = scale(ordered[0]), (scale(ordered[-1]) - scale(ordered[0])) or 1.0
    kept = [ordered[0]]
    for x in ordered[1:]:
        room = 0.022 * (len(tick(x)) + len(tick(kept[-1]))) + 0.02
        if (scale(x) - scale(kept[-1])) / span >= room:
            kept.append(x)
    if log:
        axes.set_xlim(math.exp(low - 0.06 * span), math.exp(low + 1.06 * span))
    else:
        axes.set_xlim(low - 0.06 * span, low + 1.06 * span)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def decades(axes: Axes, which: str = "y") -> None:
    """Make an axis logarithmic with plain numbers, also at 2 and 5 if it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    (axes.set_yscale if which == "y" else axes.set_xscale)("log", nonpositive="clip")
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    span = math.log10(high / low)
    if span >= 2.2:
        subs: tuple[float, ...] = (1.0,)
    elif span >= 0.9:
        subs = (1.0, 2.0, 5.0) if which == "y" or span < 1.3 else (1.0, 3.0)
    else:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if which == "y" else (1.0, 2.0, 4.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    if span < 2.2:
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axis.set_minor_formatter(NullFormatter())


def tick(x: float) -> str:
    """Return a number as an axis shows it: 0.002, 1600, 2×10⁻⁵."""
    if x == 0 or 1e-4 <= abs(x) < 1e6:
        return f"{x:.6g}"
    mantissa, power = f"{x:.2g}".partition("e")[::2] if "e" in f"{x:.2g}" else f"{x:.2e}".partition("e")[::2]
    digits = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    shown = f"{float(mantissa):g}"
    return f"10{digits}" if shown == "1" else f"{shown}×10{digits}"
