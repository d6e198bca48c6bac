"""Result files as text: Markdown tables, and the summary that says where ours loses.

Only numbers of result files come out of here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.providers import WITHOUT_EXPERTS
from benchmarks.schema import OPS, cell_key

_TIE = 0.05
OURS = "ours"  # what a user gets; "ours_..." are its forced paths, its other tower and its other gradients
_SETTINGS = (OURS, "ours_sparse")


def by_cell(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows by cell, then by provider, in the file's order."""
    cells: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        cells[cell_key(row)][row["provider"]] = row
    return dict(cells)


def rivals(providers: dict[str, dict]) -> dict[str, dict]:
    """Who computes the same in another way: not ours, not the base alone."""
    return {
        name: row
        for name, row in providers.items()
        if not name.startswith(OURS) and name not in WITHOUT_EXPERTS
    }


def best_setting(providers: dict[str, dict]) -> dict | None:
    """Our row: in training of the faster storage of expert gradients, which users choose for their E."""
    rows = [providers[name] for name in _SETTINGS if name in providers]
    return min(rows, key=lambda row: row["ms"]["p50"], default=None)


def against_best(providers: dict[str, dict]) -> tuple[str, float] | None:
    """The fastest rival and its time over ours: above 1 ours is faster."""
    others, ours = rivals(providers), best_setting(providers)
    if ours is None or not others:
        return None
    best = min(others, key=lambda name: others[name]["ms"]["p50"])
    return best, others[best]["ms"]["p50"] / ours["ms"]["p50"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def place(row: dict) -> str:
    """A cell in words."""
    context = f", S {row['S']}, L {row['L']}" if "S" in row else ""
    inter = f", I {row['I']}" if row["I"] else ""
    lora = f", LoRA {row['A']}" if "A" in row else ""
    return f"T {row['T']}, Q {row['Q']} of {row['E']}, R {row['R']}, H {row['H']}{inter}{context}{lora}"


def number(ratio: float) -> str:
    """A ratio with two decimals, large ones with three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def ratio(row: dict | None) -> str:
    """The ratio to the baseline, a dash where there is none."""
    return "-" if row is None or row["ratio_to_base"] is None else number(row["ratio_to_base"])


@dataclass(frozen=True)
class Standing:
    """How ours stands in the cells of one op and pass.

    Attributes:
        factors: per cell, the fastest other way's time over ours, and that way's name and our row.
        over_base: per cell, our time over the base's.
    """

    op: str
    run: str
    factors: list[tuple[float, str, dict]]
    over_base: list[float]

    def count(self, verdict: str) -> int:
        """Cells that ours ``"wins"``, ``"ties"`` or ``"loses"``."""
        return sum(_verdict(factor) == verdict for factor, _, _ in self.factors)

    @property
    def losses(self) -> list[tuple[float, str, dict]]:
        """The lost cells, the worst first."""
        lost = [entry for entry in self.factors if _verdict(entry[0]) == "loses"]
        return sorted(lost, key=lambda entry: entry[0])


def standings(result: dict) -> list[Standing]:
    """One for every op and pass in which ours met another way."""
    found: dict[tuple[str, str], Standing] = {}
    for (op, run, *_), providers in by_cell(result["rows"]).items():
        best = against_best(providers)
        if best is None:
            continue
        standing = found.setdefault((op, run), Standing(op, run, [], []))
        ours = best_setting(providers)
        standing.factors.append((best[1], best[0], ours))
        if OPS[op] in WITHOUT_EXPERTS and ours["ratio_to_base"]:
            standing.over_base.append(ours["ratio_to_base"])
    return list(found.values())


def summary(result: dict) -> str:
    """For every op and pass: cells won, tied and lost against the fastest other way, and each loss."""
    lines = []
    for standing in standings(result):
        lines.append(
            f"{standing.op} {standing.run}: against the fastest other way {standing.count('wins')} wins, "
            f"{standing.count('ties')} ties (within 5 %), {standing.count('loses')} losses; "
            f"its time over ours: {spread([factor for factor, _, _ in standing.factors])}"
        )
        for factor, best, row in standing.losses:
            lines.append(f"  LOSES  {place(row)}: {best} takes {factor:.2f} of our time")
    for refused in result.get("refused", []):
        lines.append(
            f"NOT TIMED  {refused['op']} {refused['provider']} {place(refused)}: {refused['reason']}"
        )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Least, median and most."""
    if not values:
        return "-"
    return f"{min(values):.2f} / {median(values):.2f} / {max(values):.2f}"


def standings_table(result: dict) -> str:
    """The standings as a Markdown table: the README's."""
    body = [
        [
            f"`{s.op}` {s.run}",
            f"{s.count('wins')} / {s.count('ties')} / {s.count('loses')}",
            spread([factor for factor, _, _ in s.factors]),
            spread(s.over_base),
        ]
        for s in standings(result)
    ]
    head = [
        "",
        "cells won / tied / lost",
        "fastest other way's time / ours: least / median / most",
        "our time / base alone: least / median / most",
    ]
    return markdown(head, body)


def _verdict(factor: float) -> str:
    return "wins" if factor > 1 + _TIE else "loses" if factor < 1 - _TIE else "ties"


def operation_table(result: dict, op: str, run: str) -> str:
    """One row for each cell: p50 and spread of the baseline, every other provider's ratio to it."""
    cells = [c for key, c in by_cell(result["rows"]).items() if key[:2] == (op, run)]
    if not cells:
        return ""
    base = OPS[op]
    names = list(dict.fromkeys(name for cell in cells for name in cell if name != base))
    body = []
    for cell in cells:
        first = next(iter(cell.values()))
        best = against_best(cell)
        body.append(
            [
                place(first),
                _milliseconds(cell.get(base)),
                *(ratio(cell.get(name)) for name in names),
                f"{best[1]:.2f} ({best[0]})" if best else "-",
            ]
        )
    return markdown(["cell", f"{base}, ms [p20, p80]", *names, "fastest other way / ours"], body)


def _milliseconds(row: dict | None) -> str:
    if row is None:
        return "-"
    ms = row["ms"]
    return f"{ms['p50']:.3g} [{ms['p20']:.3g}, {ms['p80']:.3g}]"


def value_table(result: dict, op: str, run: str, value: Callable[[dict], str]) -> str:
    """One row for each cell, one column for each provider."""
    cells = [c for key, c in by_cell(result["rows"]).items() if key[:2] == (op, run)]
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    body = [
        [place(next(iter(cell.values()))), *(value(cell[name]) if name in cell else "-" for name in names)]
        for cell in cells
    ]
    return markdown(["cell", *names], body)


def tokens_per_second(row: dict) -> str:
    """Tokens that went through the call, per second."""
    return f"{row['T'] / row['ms']['p50'] * 1e3:,.0f}"


def footprint(row: dict) -> str:
    """Peak memory in MiB and launches."""
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return f"{peak} / {row.get('launches', '-')}"
