"""The table of measurements as step functions: which path is faster, for any number of segments and rows.

A measured cell decides for sizes near it; between two cells the step is at their geometric mean. A varying
number of rows is then compared with only as many constants as there are changes of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, pairwise
from math import isqrt
from typing import Any

# (limit, answer), limits rising: each answer holds up to and including its limit.
Steps = tuple[tuple[int, Any], ...]

# A cell decides for numbers of rows, segments and ranks up to these factors away: the cells that the
# benchmarks measure leave no gap between 1 and 65536 rows.
_REACH_ROWS, _REACH = 4, 2


def look_up(steps: Steps | None, size: int) -> Any:
    """The answer for ``size``; None beyond the last step, or without any step."""
    for limit, answer in steps or ():
        if size <= limit:
            return answer
    return None


def measured_steps(
    table: list[dict], device: str, dtype: str, training: bool, adapted: bool
) -> tuple[tuple[int, int, Steps], ...]:
    """H, I and the steps over R, then Q, then T, of all cells of one kind; see :func:`faster_path`.

    A cell counts if its device, dtype and pass are the same, and if it has adapters exactly when ``adapted``.
    """
    kind = device, dtype, "fwd+bwd" if training else "fwd"
    keys = ("device", "dtype", "pass")
    cells = [cell for cell in table if tuple(cell[key] for key in keys) == kind and ("A" in cell) == adapted]
    return tuple(
        (hidden, inter, _nearest({r: _by_segments(some) for r, some in _partition(by_inter, "R")}, _REACH))
        for hidden, by_hidden in _partition(cells, "H")
        for inter, by_inter in _partition(by_hidden, "I")
    )


def faster_path(
    measured: tuple[tuple[int, int, Steps], ...],
    hidden: int,
    intermediate: int,
    rank: int,
    segments: int,
    rows: int,
) -> str | None:
    """The path that was faster, or None if nothing near was measured.

    H and I must be a cell's. Among these the nearest R decides, then the nearest Q, both within a factor of
    two, then the nearest T within one of four. Only comparisons: ``torch.compile`` may pass symbols.
    """
    for cell_hidden, cell_intermediate, by_rank in measured:
        if hidden == cell_hidden and intermediate == cell_intermediate:
            return look_up(look_up(look_up(by_rank, rank), segments), rows)
    return None


def _by_segments(cells: list[dict]) -> Steps:
    return _nearest({q: _by_rows(some) for q, some in _partition(cells, "Q")}, _REACH)


def _by_rows(cells: list[dict]) -> Steps:
    slowest = {t: max(cell["fused_over_grouped"] for cell in some) for t, some in _partition(cells, "T")}
    faster = {t: "fused" if ratio <= 1 else "grouped" for t, ratio in slowest.items()}
    return _nearest(faster, _REACH_ROWS)


def _partition(cells: list[dict], key: str) -> list[tuple[int, list[dict]]]:
    def size(cell: dict) -> int:
        return cell[key]

    return [(value, list(some)) for value, some in groupby(sorted(cells, key=size), size)]


def _nearest(answers: Mapping[int, Any], reach: int) -> Steps:
    """Of ascending sizes: the answer of the nearest by ratio, None beyond a factor of ``reach`` from all.

    On a tie "grouped" wins, because the vendor library's base is the safe choice, then the larger size.
    """
    steps: list[tuple[int, Any]] = []
    for size, larger in pairwise([*answers, None]):
        steps.append((-(-size // reach) - 1, None))
        limit = size * reach if larger is None else min(size * reach, _midpoint(size, larger, answers))
        steps.append((limit, answers[size]))
    return _merged(steps)


def _midpoint(size: int, larger: int, answers: Mapping[int, Any]) -> int:
    """The largest number that is nearer to ``size`` than to ``larger``."""
    middle = isqrt(size * larger)
    is_tie = middle * middle == size * larger
    return middle - 1 if is_tie and answers[size] != "grouped" else middle


def _merged(steps: list[tuple[int, Any]]) -> Steps:
    """Without empty steps, and with adjacent steps of the same answer joined."""
    rising: list[tuple[int, Any]] = []
    for limit, answer in steps:
        if limit > (rising[-1][0] if rising else 0):
            if rising and rising[-1][1] == answer:
                rising.pop()
            rising.append((limit, answer))
    return tuple(rising)
