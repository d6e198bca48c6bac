"""Tests that need a card: ``make test-gpu``. Elsewhere they are skipped in one line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
