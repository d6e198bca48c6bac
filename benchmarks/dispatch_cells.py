"""From a card's results to the kernels' dispatch table.

``python -m benchmarks.dispatch_cells FILE...`` writes ``qar_kernels/dispatch_table.py``. A cell is where both
paths were timed; the ratio is of their medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.schema import load
from benchmarks.tables import by_cell
from qar_kernels import dispatch_table
from train.cli import run
from train.errors import UserError
from train.files import write_atomic

_FUSED, _GROUPED = "ours_fused", "ours_grouped"
_HEAD = '''"""What was measured of the two Triton paths. Written by ``benchmarks.dispatch_cells``."""

# ruff: noqa: E501
# fmt: off

from __future__ import annotations

# Cells {"device", "H", "I", "T", "Q", "R", "dtype", "pass", "fused_over_grouped"}, named as in a result file
# of the benchmarks ("pass" is "fwd" or "fwd+bwd"; "A" only where the base has adapters); the last is a ratio
# of median times, under 1 the fused path wins. The device is torch.cuda.get_device_name's.
MEASUREMENTS: list[dict] = [
'''
_KEYS = ("H", "I", "T", "Q", "R", "dtype", "pass", "A")


def dispatch_cells(result: dict) -> list[dict]:
    """The cells of one result file, in the form of ``qar_kernels.dispatch_table``."""
    device = result["machine"].get("accelerator")
    found = []
    for providers in by_cell(row for row in result["rows"] if row["op"] == "fused_mlp").values():
        if device and {_FUSED, _GROUPED} <= set(providers):
            fused, grouped = providers[_FUSED], providers[_GROUPED]
            ratio = round(fused["ms"]["p50"] / grouped["ms"]["p50"], 4)
            shape = {name: fused[name] for name in _KEYS if name in fused}
            found.append({"device": device, **shape, "fused_over_grouped": ratio})
    return found


def source(cells: list[dict]) -> str:
    """The module's text."""
    lines = [f"    {cell!r},\n".replace("'", '"') for cell in cells]
    return _HEAD + "".join(lines) + "]\n"


def main(argv: list[str] | None = None) -> None:
    """Write the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch_cells", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(dispatch_table.__file__), help="the module")
    args = parser.parse_args(argv)
    cells = [cell for path in args.files for cell in dispatch_cells(load(path))]
    if not cells:
        raise UserError(f"{args.files[0]}: no cell where {_FUSED} and {_GROUPED} were both timed")
    write_atomic(args.out, source(cells))
    sys.stdout.write(f"{args.out}: {len(cells)} cells\n")


if __name__ == "__main__":
    run(main)
