"""What became slower between two result files: ``python -m benchmarks.compare A.json B.json``.

A is before, B after. Compared are ratios to the op's baseline, which a slower machine moves alike, so the
baselines themselves are left out. A row regressed where its ratio grew by more than the threshold and by
more than both runs' spread. The exit code is 1 if any did, 2 if the files have no row in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.schema import OPS, load
from benchmarks.tables import by_cell, markdown, place
from train.cli import run
from train.errors import UserError


@dataclass(frozen=True)
class Change:
    """One row in both files: ``factor`` is B's ratio over A's, ``spread`` what noise alone may make of it."""

    row: dict
    before: float
    after: float
    spread: float

    @property
    def factor(self) -> float:
        """Above 1: slower."""
        return self.after / self.before

    def beyond(self, threshold: float) -> bool:
        """Whether the change, either way, exceeds the threshold and the spread."""
        return max(self.factor, 1 / self.factor) > 1 + max(threshold, self.spread)


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Rows that both files have, with a ratio to a baseline other than themselves."""
    earlier = by_cell(before["rows"])
    for key, providers in by_cell(after["rows"]).items():
        old = earlier.get(key, {})
        base = OPS[key[0]]
        if base not in providers or base not in old:
            continue
        for name in [name for name in providers if name in old and name != base]:
            spread = _spread(old, name, base) + _spread(providers, name, base)
            row = providers[name]
            yield Change(row, old[name]["ratio_to_base"], row["ratio_to_base"], spread)


def _spread(providers: dict[str, dict], *names: str) -> float:
    """Half the distance between the 20th and the 80th percentile, relative to the median, summed."""
    times = [providers[name]["ms"] for name in names]
    return sum((ms["p80"] - ms["p20"]) / 2 / ms["p50"] for ms in times)


def report(found: list[Change], threshold: float) -> str:
    """A table of what changed beyond threshold and spread, the worst first, and one line of counts."""
    moved = sorted((c for c in found if c.beyond(threshold)), key=lambda c: -c.factor)
    slower = sum(c.factor > 1 for c in moved)
    text = (
        f"{len(found)} rows in both files: {slower} slower, {len(moved) - slower} faster "
        f"(beyond {threshold:.0%} and both runs' spread)"
    )
    body = [
        [
            "SLOWER" if c.factor > 1 else "faster",
            f"{c.row['op']} {c.row['pass']}",
            c.row["provider"],
            place(c.row),
            f"{c.before:.3g}",
            f"{c.after:.3g}",
            f"{c.factor:.3f}",
            f"{c.spread:.3f}",
        ]
        for c in moved
    ]
    head = ["", "op", "provider", "cell", "ratio in A", "ratio in B", "B / A", "spread"]
    return f"{markdown(head, body)}\n\n{text}" if body else text


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit with 1 if anything became slower; ``UserError`` if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="a fraction (default 0.1)")
    args = parser.parse_args(argv)
    found = list(changes(load(args.before), load(args.after)))
    if not found:
        raise UserError(
            f"{args.before} and {args.after} have no row in common with a ratio: nothing was compared"
        )
    sys.stdout.write(report(found, args.threshold) + "\n")
    if any(c.factor > 1 and c.beyond(args.threshold) for c in found):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
