"""Figures of result files as SVG.

Drawn on white, so that they read the same in light and dark pages; colours from Okabe and Ito's palette
(Color Universal Design, 2008), which people with any common colour blindness can tell apart; markers differ
too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.tables import number
from train.plotting import canvas, to_svg

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_STYLE = {
    "svg.hashsalt": "benchmarks",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "legend.frameon": False,
}

Series = Mapping[str, Sequence[tuple[float, float]]]


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with canvas(width, height, _STYLE) as figure:
        yield figure, figure.subplots()


def _svg(figure: Figure) -> str:
    return to_svg(figure, facecolor="white")


def _plain(value: float, _: int = 0) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def heat_map(rows: Sequence[int], columns: Sequence[int], values: np.ndarray, title: str, unit: str) -> str:
    """T x Q: ``values`` (rows, columns) around 1, NaN where there is no cell; every number is written.

    Purple is below 1 (faster), orange above.
    """
    spread = max(1.5, np.nanmax(np.maximum(values, 1 / values)))
    with _canvas(1.9 + 0.85 * len(columns), 1.3 + 0.5 * len(rows)) as (figure, axes):
        norm = LogNorm(1 / spread, spread)
        mesh = axes.pcolormesh(values, cmap="PuOr_r", norm=norm, edgecolors="white", linewidth=2)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = abs(np.log(value)) > 0.6 * np.log(spread)
                colour = "white" if dark else "black"
                axes.text(column + 0.5, row + 0.5, number(value), ha="center", va="center", color=colour)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [_plain(c) for c in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_plain(r) for r in rows])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="Q, queriers in the batch", ylabel="T, rows", title=title)
        bar = figure.colorbar(mesh, ax=axes, label=unit, shrink=0.9)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.outline.set_visible(False)
        return _svg(figure)


def lines(series: Series, title: str, x_label: str, y_label: str) -> str:
    """Points joined by lines, both axes logarithmic."""
    with _canvas(6.4, 3.6) as (figure, axes):
        for index, (name, points) in enumerate(series.items()):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, label=name, linewidth=1.8, **_look(index))
        _log_axes(axes, {x for points in series.values() for x, _ in points})
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        figure.legend(loc="outside right upper")
        return _svg(figure)


def roofline(points: Series, bandwidth: float, rate: float, title: str) -> str:
    """Reached operations per second over operations per byte, under the card's measured ceilings.

    Args:
        points: by provider, ``(operations per byte, operations per second)``.
        bandwidth: bytes per second.
        rate: operations per second.
    """
    xs = [x for pairs in points.values() for x, _ in pairs]
    with _canvas(6.4, 3.8) as (figure, axes):
        x = np.geomspace(min(xs) / 2, max([*xs, rate / bandwidth]) * 2, 100)
        ceiling = np.minimum(x * bandwidth, rate) / 1e12
        axes.plot(x, ceiling, color="#888888", linewidth=2, label="measured ceiling")
        hollow = {
            "markerfacecolor": "none",
            "markersize": 8,
            "markeredgewidth": 1.6,
        }  # they lie close together
        for index, (name, pairs) in enumerate(points.items()):
            found = np.array(pairs)
            axes.plot(found[:, 0], found[:, 1] / 1e12, label=name, linestyle="none", **_look(index) | hollow)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="operations per byte", ylabel="10^12 operations per second")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.grid(color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside right upper")
        return _svg(figure)


def _look(index: int) -> dict:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 6,
    }


def _log_axes(axes: Axes, ticks: set[float]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted(ticks), [_plain(tick) for tick in sorted(ticks)])
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dddddd", linewidth=0.6)
