"""Generated parts of hand-written documents, between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

from train.errors import UserError


def embedded(document: str, name: str) -> str:
    """What stands between the markers of ``name``.

    Raises:
        UserError: if they are not there.
    """
    start, end = _bounds(document, name)
    return document[start:end]


def embed(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` between the markers of ``name``."""
    start, end = _bounds(document, name)
    return document[:start] + text + document[end:]


def _bounds(document: str, name: str) -> tuple[int, int]:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if begin not in document or end not in document:
        raise UserError(f"expected the markers <!-- {name}: begin --> and <!-- {name}: end -->")
    return document.index(begin) + len(begin), document.index(end)
