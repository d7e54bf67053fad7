"""Plots with matplotlib: for the report of a run, and for the pages in docs/.

A chart is data: what to draw and in which words. It becomes an Axes, and that an SVG or a PNG. In the SVG of the
report, colors are variables of the page's style, so that one SVG is right on a light and on a dark page. There is no
script, so a page opens without a network, in a mail or in a code review.
"""

import contextlib
import html
import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

# Colors by their names in metrics/report/style.css: for a light page, for a PNG, and for docs/.
COLORS = {
    "--c1": "#2563eb",
    "--c2": "#d9480f",
    "--c3": "#0f8a5f",
    "--c4": "#9333c9",
    "--c5": "#b7791f",
    "--c6": "#0e7490",
    "--c7": "#c2255c",
    "--c8": "#5c6b7a",
    "--base": "#c3c9d1",
    "--bad": "#d6202f",
    "--text": "#24292f",
    "--soft": "#6a737d",
    "--grid": "#e4e7eb",
}
RUN_COLORS = [name for name in COLORS if re.fullmatch(r"--c\d", name)]

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the font of the page
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": COLORS["--text"],
    "axes.labelcolor": COLORS["--soft"],
    "axes.edgecolor": COLORS["--grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["--grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLORS["--grid"],
    "ytick.color": COLORS["--grid"],
    "xtick.labelcolor": COLORS["--soft"],
    "ytick.labelcolor": COLORS["--soft"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "text.color": COLORS["--text"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": COLORS["--soft"],
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "white",
    "axes.facecolor": "none",
}

LONGEST = 80  # characters of a label

Kind = Literal["line", "faint", "points", "dashed", "level", "marks"]


@dataclass
class Series:
    """Something in a chart. `marks` are ticks at the bottom; a `level` is a horizontal line at y[0]."""

    label: str
    x: ArrayLike
    y: ArrayLike
    color: str = "--c1"
    kind: Kind = "line"
    width: float = 1.6
    low: ArrayLike | None = None  # a band from low to high, around the line
    high: ArrayLike | None = None

    def __post_init__(self) -> None:
        self.label = plain(self.label)


@dataclass
class Chart:
    """A chart over steps, or bars if `bars` has some: a name and a value each."""

    name: str  # for the anchor in the page
    title: str
    unit: str
    series: list[Series] = field(default_factory=list)
    bars: list[tuple[str, float]] = field(default_factory=list)
    caption: str = ""  # what a reader must know to read it right
    across: str = "step"
    log: bool = False
    from_zero: bool = False
    percent: bool = False  # values are fractions

    def __post_init__(self) -> None:
        self.title = plain(self.title)
        self.bars = [(plain(name), value) for name, value in self.bars]


def plain(text: str, longest: int = LONGEST) -> str:
    """A text for a picture: on one line, not too long, without characters that have no shape."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"


def draw(axes: Axes, chart: Chart, bare: bool = False) -> None:
    """Draw a chart. With `bare`, the page has its title, unit and legend; else they are above the plot."""
    if chart.bars:
        _draw_bars(axes, chart)
    else:
        for series in chart.series:
            _draw_series(axes, series)
        _scale(axes, chart)
        axes.set_xlabel(chart.across)
        axes.set_ylabel("" if bare else chart.unit)
    labels = [series.label for series in chart.series]
    if bare:
        return
    lines = 0
    if len(labels) > 1:
        columns = 1 if max(map(len, labels)) > 30 else 2 if max(map(len, labels)) > 16 else 3
        lines = math.ceil(len(labels) / columns)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            borderaxespad=0.2,
            borderpad=0,
            handlelength=1.6,
            columnspacing=1.4,
            labelspacing=0.3,
        )
    axes.set_title(chart.title, pad=8 + 13 * lines)


def _scale(axes: Axes, chart: Chart) -> None:
    """Round ticks, a logarithmic axis where values differ much, and a word where there is nothing to see."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    values = np.concatenate(
        [np.ravel(np.asarray(series.y, dtype=np.float64)) for series in chart.series] or [np.zeros(0)]
    )
    values = values[np.isfinite(values)]
    if not len(values):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=COLORS["--soft"])
        return
    if chart.log and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if values.max() < 300 * values.min() else (1,), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if chart.from_zero:
            axes.set_ylim(0, max(values.max() * 1.12, 1e-12))
    sign, factor = ("%", 100) if chart.percent else ("", 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(factor * value) + sign))


def _draw_series(axes: Axes, series: Series) -> None:
    x, y, color = np.asarray(series.x), np.asarray(series.y, dtype=np.float64), COLORS[series.color]
    if series.low is not None and series.high is not None:
        axes.fill_between(x, series.low, series.high, color=color, alpha=0.22, linewidth=0)
    alone = np.isfinite(y) & ~np.isfinite(np.r_[np.nan, y[:-1]]) & ~np.isfinite(np.r_[y[1:], np.nan])
    match series.kind:
        case "points":
            axes.plot(x, y, color=color, linewidth=1.1, marker="o", markersize=4, markeredgewidth=0, label=series.label)
        case "level":
            axes.axhline(float(y[0]), color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=series.label)
        case "marks":
            axes.plot(
                x,
                np.zeros(len(x)),
                transform=axes.get_xaxis_transform(),
                color=color,
                linestyle="none",
                marker="|",
                markersize=12,
                markeredgewidth=1.6,
                clip_on=False,
                label=series.label,
            )
        case _:
            faint = series.kind == "faint"
            axes.plot(
                x,
                y,
                color=color,
                linewidth=0.8 if faint else series.width,
                alpha=0.4 if faint else 1,
                linestyle=(0, (4, 2)) if series.kind == "dashed" else "-",
                label=series.label,
            )
            if alone.any():  # a line through one point would not be seen
                axes.plot(x[alone], y[alone], color=color, linestyle="none", marker="o", markersize=3.5)


def _draw_bars(axes: Axes, chart: Chart) -> None:
    names, values = [name for name, _ in chart.bars], [value for _, value in chart.bars]
    places = list(range(len(values)))
    axes.barh(places, values, color=COLORS["--c1"], height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", labelcolor=COLORS["--text"])
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, max([*values, 1e-12]) * 1.4)
    total = sum(values) or 1
    for place, value in zip(places, values, strict=True):
        text = f"{value:,.3g} {chart.unit} ({value / total:.0%})"
        axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)


def to_svg(chart: Chart, inches: tuple[float, float] = (5.0, 2.6), for_page: bool = False) -> str:
    """A chart as SVG: a file by itself, or for the page, where variables are its colors and the page its background."""
    with _style(chart.name):
        figure = _figure(inches)
        draw(figure.subplots(), chart, bare=for_page)
        if chart.caption and not for_page:
            figure.supxlabel(plain(chart.caption, 400), fontsize=8, color=COLORS["--soft"])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=for_page, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", text)
    if not for_page:
        return text
    for name, color in COLORS.items():
        text = text.replace(color, f"var({name})")
    width, height = (72 * inch for inch in inches)
    label = html.escape(f"{chart.title}, {chart.unit}", quote=True)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
    return start + text[text.index(">") + 1 :]


def overlaid(name: str, title: str, unit: str, curves: Mapping[str, Sequence[float]]) -> Chart:
    """Curves of steps 1, 2, ... that cover one another: each is thinner than the one below it."""
    difference = max(max(step) - min(step) for step in zip(*curves.values(), strict=True))
    caption = f"largest difference between the curves at one step: {difference:.1e} {unit.split()[0]}"
    chart = Chart(name, title, unit, caption=caption)
    colors = ["--base", *("--c3", "--c5", "--c1", "--c2")[-len(curves) + 1 :]]
    for number, (label, curve) in enumerate(curves.items()):
        steps, width = range(1, len(curve) + 1), 1.0 + 2 * (len(curves) - 1 - number)
        chart.series.append(Series(label, steps, curve, colors[number], width=width))
    return chart


def to_png(charts: Sequence[Chart], title: str, columns: int = 2) -> bytes:
    """All charts in one picture, for a slide or a chat."""
    rows = max(1, math.ceil(len(charts) / columns))
    with _style("png"):
        figure = _figure((5.4 * columns, 3.2 * rows + 0.5))
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=14, fontweight="bold")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, chart in zip(grid.flat, charts, strict=False):
            draw(axes, chart)
            if chart.caption:
                across = "" if chart.bars else f"{chart.across}\n"
                axes.set_xlabel(across + textwrap.fill(plain(chart.caption, 400), 80), fontsize=8)
        for axes in grid.flat[len(charts) :]:
            axes.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _figure(inches: tuple[float, float]) -> Figure:
    return Figure(figsize=inches, layout="constrained")


@contextlib.contextmanager
def _style(name: str) -> Iterator[None]:
    """The style, whatever the user's matplotlibrc says. Equal charts of a `name` give equal bytes."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # fonts that are not there
    try:
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")  # characters that the font of a PNG does not have
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
            yield
    finally:
        logger.setLevel(level)


def short_number(value: float) -> str:
    """A number of an axis: 1,500, 20k, 5M, 0.003, 5e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return EngFormatter(sep="")(value)
    if abs(value) < 1e-3:
        return re.sub(
            r"e([+-])0",
            r"e\1",
            f"{value:.3g}" if abs(value) < 1e-4 else f"{value:.2e}".replace(".00e", "e").replace("0e", "e"),
        )
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
