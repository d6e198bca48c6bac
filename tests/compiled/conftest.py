"""The kernels as they are compiled for a card, run by an emulator of its instructions.

Outside of the interpreter only: ``TRITON_INTERPRET=0 python -m pytest tests/compiled``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from poison import poisoned_allocations  # noqa: F401
