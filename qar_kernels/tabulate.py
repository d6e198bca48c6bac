"""Turn benchmark results into the dispatcher's table.

``python -m qar_kernels.tabulate RESULT.json [RESULT.json ...] [--out FILE]`` reads result files
``{"machine": {"accelerator" or "device": name}, "rows": [{"op", "provider", "pass", "T", "Q", "R", "H", "I",
"dtype", "ms": {"p50"}}]}`` and writes ``dispatch_table.py``. Only rows of ``fused_mlp`` by both
``triton_fused`` and ``triton_grouped`` count; of one cell measured twice the later file counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_CELL = ("pass", "dtype", "T", "Q", "R", "H", "I")
_PROVIDERS = {"triton_fused": "fused", "triton_grouped": "grouped"}
_TABLE = Path(__file__).with_name("dispatch_table.py")

_MODULE = '''"""What was measured of the two Triton paths.

Written by ``python -m qar_kernels.tabulate RESULT.json``.
"""

from __future__ import annotations

# Cells {{"device", "pass", "dtype", "T", "Q", "R", "H", "I", "fused_over_grouped"}}; the last is a ratio of
# median times, under 1 the fused path wins. The device is torch.cuda.get_device_name's.
MEASUREMENTS: list[dict] = [
{cells}
]
'''


def cells(results: Iterable[dict]) -> list[dict]:
    """The table's cells, sorted.

    Raises:
        ValueError: if no cell has both paths.
    """
    found = {}
    for result in results:
        machine = result["machine"]
        device = machine.get("accelerator", machine.get("device"))
        for cell, times in _times(result["rows"]).items():
            if times.keys() == set(_PROVIDERS.values()):
                found[(device, *cell)] = round(times["fused"] / times["grouped"], 4)
    if not found:
        raise ValueError(f"results: got no cell of fused_mlp with both {' and '.join(_PROVIDERS)}")
    return [
        dict(zip(("device", *_CELL), key, strict=True)) | {"fused_over_grouped": found[key]}
        for key in sorted(found)
    ]


def _times(rows: Iterable[dict]) -> dict[tuple, dict[str, float]]:
    """Median time of each path in each cell of one file."""
    times = {}
    for row in rows:
        if row["op"] == "fused_mlp" and row["provider"] in _PROVIDERS:
            path = _PROVIDERS[row["provider"]]
            times.setdefault(tuple(row[name] for name in _CELL), {})[path] = row["ms"]["p50"]
    return times


def module_text(table: list[dict]) -> str:
    """``dispatch_table.py`` with these cells."""
    return _MODULE.format(cells="\n".join(f"    {json.dumps(cell)}," for cell in table))


def main(argv: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m qar_kernels.tabulate", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=_TABLE)
    args = parser.parse_args(argv)
    try:
        table = cells(json.loads(path.read_text(encoding="utf-8")) for path in args.results)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"tabulate: {type(error).__name__}: {error}\n")
        return 1
    whole = args.out.with_name(args.out.name + ".part")
    whole.write_text(module_text(table), encoding="utf-8")
    os.replace(whole, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
