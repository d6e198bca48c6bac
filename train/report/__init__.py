"""Self-contained pages: the demo's report, and the curves of one training run (`run_page`)."""

from pathlib import Path

from train.files import write_atomic
from train.report.page import render

__all__ = ["render", "write_html"]


def write_html(page: str, out_dir: Path) -> Path:
    """Write a rendered page; a lone surrogate in the text becomes a character reference."""
    path = out_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "xmlcharrefreplace"))
    return path
