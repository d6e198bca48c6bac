"""Matplotlib figures as SVG text, without pyplot's global state."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the browser has the glyphs for Chinese names
    "svg.hashsalt": "qar",  # ids that are the same in every run
    "text.parse_math": False,  # names may hold a "$"
    "font.size": 9.5,
    "axes.spines.top": False,
}


@contextmanager
def canvas(width: float, height: float, style: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """A figure of so many inches; it is drawn and written inside the block, where ``style`` (rc) holds."""
    with matplotlib.rc_context({**_STYLE, **(style or {})}):
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, whole_file: bool = False, **options: Any) -> str:
    """The ``<svg>`` element, or a file with its XML header; the same figure gives the same text.

    ``options`` are those of matplotlib's ``savefig``.
    """
    left_out = ("Date",) if whole_file else ("Creator", "Date", "Format", "Type")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(left_out), **options)
    text = buffer.getvalue()
    return text if whole_file else text[text.index("<svg") :]
