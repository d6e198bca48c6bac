"""Which figures a result file gives: from its rows to the plots of :mod:`benchmarks.plots`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from benchmarks import plots
from benchmarks.schema import OPS
from benchmarks.tables import OURS, against_best, best_setting, by_cell
from qar_kernels import roofline

_MIN_POINTS = 2  # of a line
_MIN_CELLS = 4  # of a heat map


def figures(result: dict) -> Iterator[tuple[str, str]]:
    """``(name, SVG)`` of every figure that the rows have the points for."""
    rows = [row for row in result["rows"] if "A" not in row]  # adapters: cells beside the matrix
    for run in ("fwd", "fwd+bwd"):
        yield from _heat_maps([r for r in rows if r["op"] == "fused_mlp" and r["pass"] == run], run)
        yield from _owned([r for r in rows if r["op"] == "expert_mlp" and r["pass"] == run], run)
    yield from _decoding([r for r in rows if r["op"] == "decode"])
    if "calibration" in result["machine"]:
        yield from _rooflines(rows, result["machine"])


def _slug(*parts: object) -> str:
    return "-".join(str(part) for part in parts).replace("+", "-").lower()


def _heat_maps(rows: list[dict], run: str) -> Iterator[tuple[str, str]]:
    """For every model shape and rank: ours over the base MLP, and the fastest other way over ours."""
    for (hidden, inter, rank), group in _grouped(rows, "H", "I", "R"):
        cells = by_cell(group).values()
        over_base, over_others = {}, {}
        for cell in cells:
            ours = best_setting(cell)
            if ours and ours["ratio_to_base"]:
                over_base[ours["T"], ours["Q"]] = ours["ratio_to_base"]
            if best := against_best(cell):
                over_others[ours["T"], ours["Q"]] = 1 / best[1]
        where = f"fused_mlp {run}, H {hidden}, I {inter}, R {rank}"
        for name, values, unit in (
            ("over-base", over_base, "time with experts / base MLP alone"),
            ("over-fastest-other", over_others, "our time / fastest other way's"),
        ):
            if len(values) >= _MIN_CELLS:
                svg = plots.heat_map(*_grid(values), title=where, unit=unit)
                yield _slug("mlp", name, run, f"h{hidden}", f"r{rank}"), svg


def _grid(values: dict[tuple[int, int], float]) -> tuple[list[int], list[int], np.ndarray]:
    ts, qs = (sorted({key[axis] for key in values}) for axis in (0, 1))
    return ts, qs, np.array([[values.get((t, q), np.nan) for q in qs] for t in ts])


def _owned(rows: list[dict], run: str) -> Iterator[tuple[str, str]]:
    """Time over experts owned at the same number present, where at least three numbers were measured."""
    for (t, q, rank, hidden), group in _grouped(rows, "T", "Q", "R", "H"):
        series = _series(group, "E", lambda row: row["ms"]["p50"])
        if len({row["E"] for row in group}) > _MIN_POINTS:
            title = f"{run}: {q} queriers present, T {t}, R {rank}, H {hidden}"
            svg = plots.lines(series, title, "E, experts owned", "milliseconds, median")
            yield _slug("owned", run, f"q{q}"), svg


def _decoding(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Tokens per second over batch size, every sequence its own querier."""
    mixed = [row for row in rows if row["Q"] == min(row["T"], row["E"])]
    if len({row["T"] for row in mixed}) >= _MIN_POINTS:
        series = _series(mixed, "T", lambda row: row["T"] / row["ms"]["p50"] * 1e3)
        first = mixed[0]
        title = f"decoding, a querier per sequence: {first['L']} layers, H {first['H']}, R {first['R']}"
        yield "decode-tokens", plots.lines(series, title, "sequences in the batch", "tokens per second")


def _rooflines(rows: list[dict], machine: dict) -> Iterator[tuple[str, str]]:
    ceilings = machine["calibration"]
    mlp = [r for r in rows if (r["op"], r["pass"]) == ("fused_mlp", "fwd")]
    for (hidden, inter, rank), group in _grouped(mlp, "H", "I", "R"):
        points = defaultdict(list)
        for row in group:
            queriers = 0 if row["provider"] == OPS["fused_mlp"] else row["Q"]
            work = roofline.forward_flops(row["T"], hidden, inter, rank if queriers else 0)
            traffic = roofline.forward_bytes(row["T"], hidden, inter, rank if queriers else 0, queriers)
            points[row["provider"]].append((work / traffic, work / row["ms"]["p50"] * 1e3))
        shown = {name: points[name] for name in (OPS["fused_mlp"], OURS) if name in points}
        if shown:
            ceiling = (ceilings["copy_bytes_per_s"], ceilings["gemm_flops_per_s"])
            svg = plots.roofline(shown, *ceiling, title=f"forward, H {hidden}, I {inter}, R {rank}")
            yield _slug("roofline", f"h{hidden}", f"r{rank}"), svg


def _series(rows: Iterable[dict], x: str, y: Callable[[dict], float]) -> dict[str, list[tuple[float, float]]]:
    series = defaultdict(list)
    for row in rows:
        series[row["provider"]].append((row[x], y(row)))
    return {name: points for name, points in series.items() if len(points) >= _MIN_POINTS}


def _grouped(rows: Iterable[dict], *names: str) -> Iterator[tuple[tuple, list[dict]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    yield from groups.items()
