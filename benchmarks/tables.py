"""Result files as text: Markdown tables, and the summary that says where ours loses.

Only numbers of result files come out of here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.providers import WITHOUT_EXPERTS
from benchmarks.schema import OPS, cell_key

OURS = "ours"  # what a user gets; "ours_..." are its forced paths and its other tower


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


def against_best(providers: dict[str, dict]) -> tuple[str, float] | None:
    """The fastest rival and its time over ours: above 1 ours is faster."""
    others = rivals(providers)
    if OURS not in providers or not others:
        return None
    best = min(others, key=lambda name: others[name]["ms"]["p50"])
    return best, others[best]["ms"]["p50"] / providers[OURS]["ms"]["p50"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def place(row: dict) -> str:
    """A cell in words."""
    context = f", S {row['S']}, L {row['L']}" if "S" in row else ""
    inter = f", I {row['I']}" if row["I"] else ""
    return f"T {row['T']}, Q {row['Q']} of {row['E']}, R {row['R']}, H {row['H']}{inter}{context}"


def ratio(row: dict | None) -> str:
    """A ratio to three significant digits, a dash where there is none."""
    return "-" if row is None or row["ratio_to_base"] is None else f"{row['ratio_to_base']:.3g}"


def summary(result: dict) -> str:
    """For every op and pass: cells won, tied and lost against the best other way, and each loss."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, dict]]] = defaultdict(list)
    for key, providers in by_cell(result["rows"]).items():
        groups[key[:2]].append(providers)
    for (op, run), cells in groups.items():
        found = [(against_best(providers), providers[OURS]) for providers in cells if against_best(providers)]
        if not found:
            continue
        verdicts = [_verdict(factor) for (_, factor), _ in found]
        factors = sorted(factor for (_, factor), _ in found)
        lines.append(
            f"{op} {run}: ours against the fastest other way: {verdicts.count('wins')} wins, "
            f"{verdicts.count('ties')} ties (within 5 %), {verdicts.count('loses')} losses; "
            f"times as fast: {factors[0]:.2f} to {factors[-1]:.2f}"
        )
        for (best, factor), row in found:
            if _verdict(factor) == "loses":
                lines.append(f"  LOSES  {place(row)}: {best} takes {factor:.2f} of our time")
    for refused in result.get("refused", []):
        lines.append(
            f"NOT TIMED  {refused['op']} {refused['provider']} {place(refused)}: {refused['reason']}"
        )
    return "\n".join(lines)


def _verdict(factor: float) -> str:
    return "wins" if factor > 1.05 else "loses" if factor < 0.95 else "ties"


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
