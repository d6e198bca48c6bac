"""The one schema of result files, and its check.

``{"machine": {...}, "versions": {...}, "rows": [...]}``; a row is one provider in one cell and pass:

=================  ===============================================================================
op                 what is computed, a key of ``OPS``
provider           who computes it
pass               ``"fwd"`` or ``"fwd+bwd"``
T Q E R H I        rows, queriers present, experts owned, rank, hidden, intermediate
dtype              of activations and weights
ms                 ``{"p20", "p50", "p80"}`` of one call
peak_bytes         memory held during the call above what was held before it; null where not measured
ratio_to_base      p50 over the p50 of the op's baseline in the same cell; null where that has none
S, L (optional)    context in tokens, decoder layers, of models
A (optional)       rank of LoRA adapters on the base's three projections
launches (opt.)    kernels launched (card), operators called (CPU)
=================  ===============================================================================

An optional fourth key ``refused`` lists providers that were wrong or failed, and so were not timed. Where
there is a card, ``machine["calibration"]`` holds its measured ceilings. ``python -m benchmarks.schema
FILE...`` checks files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from train.cli import run
from train.errors import UserError
from train.files import load_json

# The provider that an op's ratios divide by.
OPS = {
    "fused_mlp": "base",
    "expert_mlp": "loop",
    "decoder_layer": "base",
    "prefill": "base",
    "decode": "base",
    "train_step": "base",
    "first_token": "base",
    "generate": "base",
    "finetune_step": "straightforward",
}
PASSES = ("fwd", "fwd+bwd")
SHAPE = ("T", "Q", "E", "R", "H", "I")
PLACE = ("S", "L", "A")
_REQUIRED = {"op", "provider", "pass", *SHAPE, "dtype", "ms", "peak_bytes", "ratio_to_base"}
_OPTIONAL = {*PLACE, "launches"}
_REFUSED = {"op", "provider", "pass", *SHAPE, "dtype", "reason"}
_MACHINE = {"name", "device", "processor", "cores", "date"}
_PERCENTILES = ["p20", "p50", "p80"]


def cell_key(row: dict) -> tuple:
    """What rows that may be compared have in common: everything but the provider and what was measured."""
    return row["op"], row["pass"], row["dtype"], *(row.get(name) for name in (*SHAPE, *PLACE))


def problems(result: object) -> Iterator[str]:
    """Everything that is wrong with a result, each in one line that names the place."""
    if not isinstance(result, dict) or not {"machine", "versions", "rows"} <= set(result):
        yield "expected an object with machine, versions and rows"
        return
    if unknown := set(result) - {"machine", "versions", "rows", "refused"}:
        yield f"unknown keys {sorted(unknown)}"
    if wrong := [part for part in ("machine", "versions") if not isinstance(result[part], dict)]:
        yield f"{wrong[0]}: got {type(result[wrong[0]]).__name__}, expected an object"
        return
    yield from _machine_problems(result)
    rows = result["rows"]
    if not rows and not result.get("refused") and "calibration" not in result["machine"]:
        yield "rows: got none, and nothing refused or calibrated, expected at least one"
    sound = []
    for index, row in enumerate(rows):
        found = list(_row_problems(row))
        yield from (f"rows[{index}]: {problem}" for problem in found)
        sound += [] if found else [row]
    yield from _relations(sound)
    for index, refused in enumerate(result.get("refused", [])):
        if missing := _REFUSED - set(refused):
            yield f"refused[{index}]: missing {sorted(missing)}"


def _machine_problems(result: dict) -> Iterator[str]:
    for name in _MACHINE - set(result["machine"]):
        yield f"machine: missing {name}"
    for part in ("machine", "versions"):
        for name, value in result[part].items():
            if isinstance(value, str) and ("/" in value or "\\" in value):
                yield f"{part}: {name} holds a path: {value!r}"
    if "torch" not in result["versions"]:
        yield "versions: missing torch"


def _row_problems(row: dict) -> Iterator[str]:
    if missing := _REQUIRED - set(row):
        yield f"missing {sorted(missing)}"
        return
    if unknown := set(row) - _REQUIRED - _OPTIONAL:
        yield f"unknown keys {sorted(unknown)}"
    if row["op"] not in OPS:
        yield f"op: got {row['op']!r}, expected one of {', '.join(OPS)}"
    if row["pass"] not in PASSES:
        yield f"pass: got {row['pass']!r}, expected one of {', '.join(PASSES)}"
    for name in ("provider", "dtype"):
        if not isinstance(row[name], str) or not row[name]:
            yield f"{name}: got {row[name]!r}, expected a name"
    for name in (*SHAPE, *(_OPTIONAL & set(row))):
        if not _count(row[name]) or (row[name] == 0 and name not in ("I", "launches")):
            yield f"{name}: got {row[name]!r}, expected a positive integer"
    if row["peak_bytes"] is not None and not _count(row["peak_bytes"]):
        yield f"peak_bytes: got {row['peak_bytes']!r}, expected bytes or null"
    if row["ratio_to_base"] is not None and not _positive(row["ratio_to_base"]):
        yield f"ratio_to_base: got {row['ratio_to_base']!r}, expected a positive number or null"
    yield from _time_problems(row["ms"])


def _time_problems(ms: object) -> Iterator[str]:
    if not isinstance(ms, dict) or list(ms) != _PERCENTILES or not all(_positive(v) for v in ms.values()):
        yield f"ms: got {ms!r}, expected positive p20, p50 and p80"
    elif not ms["p20"] <= ms["p50"] <= ms["p80"]:
        yield f"ms: got {ms!r}, expected p20 <= p50 <= p80"


def _relations(rows: list[dict]) -> Iterator[str]:
    """No row twice; every ratio is what the file's own times give."""
    bases, seen = {}, set()
    for row in rows:
        key = (*cell_key(row), row["provider"])
        if key in seen:
            yield f"twice: {row['op']} {row['provider']} {row['pass']} T={row['T']} Q={row['Q']}"
        seen.add(key)
        if row["provider"] == OPS[row["op"]]:
            bases[cell_key(row)] = row["ms"]["p50"]
        if row["Q"] > row["E"]:
            yield f"Q {row['Q']} of E {row['E']}: more queriers present than experts owned"
    for row in rows:
        base = bases.get(cell_key(row))
        expected = None if base is None else row["ms"]["p50"] / base
        got = row["ratio_to_base"]
        if (got is None) != (expected is None) or (got and not math.isclose(got, expected, rel_tol=1e-3)):
            yield f"ratio_to_base: got {got} for {row['op']} {row['provider']}, the times give {expected}"


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def load(path: Path) -> dict:
    """A checked result file.

    Raises:
        UserError: naming the file and the first problem.
    """
    result = load_json(path)
    for problem in problems(result):
        raise UserError(f"{path}: {problem}")
    return result


def main(argv: list[str] | None = None) -> None:
    """Check files; the first problem is an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schema", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args(argv).files:
        load(path)


if __name__ == "__main__":
    run(main)
