"""Tests that need a card: ``make test-gpu``.

Without one, ``QAR_REHEARSE=1 python -m pytest tests/gpu`` runs what the interpreter can, small, so that a
mistake in a test is found before a card is at hand; otherwise they are skipped in one line.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))


def pytest_collection_modifyitems(items):
    """What compute-sanitizer watches takes longest and says least about a first run: last."""
    items.sort(key=lambda item: item.get_closest_marker("sanitizer") is not None)
