"""Chart primitives: figures as inline SVG.

Text and axes are drawn in one ink that becomes `currentColor`, so that the page's theme colours them.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from train.plotting import PALETTE, canvas, name_rows, to_svg

_INK = "#7b7b7b"
_LONGEST = 16  # name on a heat map, in letters
_WIDTH = 4.6  # inches: the text stays readable when a phone shrinks the figure to its width
_STYLE = {
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Interval = Sequence[float] | None


@contextmanager
def _canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    with canvas(_WIDTH, height, _STYLE) as figure, warnings.catch_warnings():
        # The browser draws the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        axes = figure.subplots()
        axes.locator_params(axis="x", nbins=6)
        yield figure, axes


def _svg(figure: Figure) -> Markup:
    text = to_svg(figure, transparent=True)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids would repeat across figures
    return Markup(text.replace(_INK, "currentColor"))  # matplotlib has escaped the names in it


def _error(values: Sequence[float], cis: Sequence[Interval]) -> np.ndarray:
    """(2, N) distances below and above the value; NaN where there is no interval."""
    ends = [ci or (np.nan, np.nan) for ci in cis]
    return np.abs(np.asarray(ends, dtype=float).T - np.asarray(values, dtype=float))


def interval_dots(
    names: Sequence[str],
    values: Sequence[float],
    cis: Sequence[Interval],
    colours: Sequence[str],
    digits: int,
) -> Markup:
    """One dot with its error bar for each row; the axis need not start at zero."""
    with _canvas(0.75 + 0.36 * len(names)) as (figure, axes):
        errors = _error(values, cis)
        for row, value in enumerate(values):
            axes.errorbar(
                value,
                row,
                xerr=errors[:, row : row + 1],
                fmt="o",
                color=colours[row],
                markersize=7,
                capsize=4,
                elinewidth=2,
            )
            axes.annotate(
                f"{value:.{digits}f}",
                (value, row),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        name_rows(axes, names)
        axes.margins(x=0.15)
        axes.grid(axis="x", color=_INK, alpha=0.2, linewidth=0.6)
        return _svg(figure)


def grouped_bars(
    names: Sequence[str],
    series: Mapping[str, tuple[Sequence[float | None], str]],
    axis: str,
    line: tuple[float, str] | None = None,
    digits: int = 2,
) -> Markup:
    """Horizontal bars, one for each (row, series) that has a value; `line` is a labelled dashed mark.

    `series` maps a label to (values, colour). Bars start at zero, so that their lengths can be compared.
    """
    thickness = 0.8 / len(series)
    with _canvas(0.9 + len(names) * max(0.34, 0.2 * len(series))) as (figure, axes):
        for position, (name, (values, fill)) in enumerate(series.items()):
            rows = np.arange(len(names)) - 0.4 + thickness * (position + 0.5)
            lengths = np.array([np.nan if value is None else value for value in values], dtype=float)
            bars = axes.barh(rows, lengths, 0.9 * thickness, color=fill, label=name)
            axes.bar_label(
                bars,
                [f"{value:.{digits}f}" if np.isfinite(value) else "" for value in lengths],
                padding=3,
                fontsize=8,
            )
        name_rows(axes, names)
        axes.margins(x=0.12)
        axes.set_xlabel(axis)
        if line:
            axes.axvline(line[0], color=_INK, linestyle="--", linewidth=1.2, label=line[1])
        if len(series) > 1 or line:
            figure.legend(loc="outside upper left", ncols=4, fontsize=9)
        return _svg(figure)


def difference_bars(
    names: Sequence[str], values: Sequence[float], better: str, worse: str, axis: str
) -> Markup:
    """Horizontal bars around zero; negative ones take the colour `better`."""
    with _canvas(0.75 + 0.4 * len(names)) as (figure, axes):
        bars = axes.barh(
            range(len(names)), values, 0.6, color=[better if value < 0 else worse for value in values]
        )
        axes.bar_label(
            bars, [f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") for value in values], padding=3, fontsize=8
        )
        axes.axvline(0, color=_INK, linewidth=0.8)
        name_rows(axes, names)
        axes.spines.left.set_visible(False)
        axes.margins(x=0.45)  # room for the numbers beside the names
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(axis)
        return _svg(figure)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], str]], x_axis: str, y_axis: str
) -> Markup:
    """For each label, (x, y, colour): the running mean of y over a faint line of its values."""
    with _canvas(3.0) as (figure, axes):
        for name, (x, y, stroke) in series.items():
            width = max(1, len(y) // 25)
            smooth = np.convolve(y, np.full(width, 1 / width), mode="valid")
            axes.plot(x, y, color=stroke, alpha=0.3 if width > 1 else 0, linewidth=0.8)
            axes.plot(x[width - 1 :], smooth, color=stroke, linewidth=2, label=name)
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)
        axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
        axes.legend(loc="upper right")
        return _svg(figure)


def heat_map(names: Sequence[str], matrix: Sequence[Sequence[float]], axis: str) -> Markup:
    """Square matrix by name on both axes; the diagonal is left out of the colour scale and blank."""
    values = np.array(matrix, dtype=float)
    np.fill_diagonal(values, np.nan)
    limit = np.abs(np.nan_to_num(values)).max() or 1.0
    shown = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
    with _canvas(max(0.8 * _WIDTH, 1.6 + 0.16 * len(names))) as (figure, axes):
        mesh = axes.pcolormesh(values, cmap=_diverging(), vmin=-limit, vmax=limit)
        ticks, size = np.arange(len(names)) + 0.5, min(9.5, 150 / max(len(names), 1))
        axes.set_xticks(ticks, shown, rotation=90 if len(names) > 4 else 0, fontsize=size)
        axes.set_yticks(ticks, shown, fontsize=size)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        if len(names) <= 10:
            _write_cells(axes, values)
        figure.colorbar(mesh, ax=axes, shrink=0.7, label=axis).outline.set_visible(False)
        return _svg(figure)


def _write_cells(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)


def _diverging() -> Any:
    """FT's blue for negative, QAR's orange for positive; zero is transparent, so it suits both themes.

    41 levels: above 50, matplotlib would draw the colour bar as an embedded bitmap.
    """
    cold, warm = to_rgba(PALETTE["ft"], 0.85), to_rgba(PALETTE["qar"], 0.85)
    stops = [cold, (*cold[:3], 0.0), (*warm[:3], 0.0), warm]
    return LinearSegmentedColormap.from_list("cosine", list(zip((0, 0.5, 0.5, 1), stops, strict=True)), N=41)
