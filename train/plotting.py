"""What figures share: the methods' colours, rows by name, and SVG text without pyplot's global state."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = {"zero_shot": "#8e979f", "ft": "#4f7a9e", "qar": "#e2570b"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the browser has the glyphs for Chinese names
    "svg.hashsalt": "qar",  # ids that are the same in every run
    "text.parse_math": False,  # names may hold a "$"
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def canvas(width: float, height: float, style: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """A figure of so many inches; it is drawn and written inside the block, where ``style`` (rc) holds."""
    with matplotlib.rc_context({**_STYLE, **(style or {})}):
        yield Figure(figsize=(width, height), layout="constrained")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows 0, 1, ... of ``axes``, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def to_svg(figure: Figure, whole_file: bool = False, **options: Any) -> str:
    """The ``<svg>`` element, or a file with its XML header; the same figure gives the same text.

    ``options`` are those of matplotlib's ``savefig``.
    """
    left_out = ("Date",) if whole_file else ("Creator", "Date", "Format", "Type")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(left_out), **options)
    text = buffer.getvalue()
    return text if whole_file else text[text.index("<svg") :]
