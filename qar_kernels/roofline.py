"""Bytes and operations of one fused MLP, and the least time that a chip could take for them.

T rows, H hidden, I intermediate, R expert rank, Q experts present. The rates below are the vendors'
datasheet figures (dense bf16, memory bandwidth), not measurements.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

_BYTES = 2  # bf16


@dataclass(frozen=True)
class Chip:
    """Datasheet rates: dense bf16 operations per second, bytes per second."""

    flops: float
    bandwidth: float


CHIPS = {
    "A100": Chip(312e12, 2.04e12),
    "H100": Chip(989e12, 3.35e12),
    "H200": Chip(989e12, 4.8e12),
}
ROWS = (1, 16, 256, 4096, 16384)
QUERIERS = (1, 8, 64, 256)


@dataclass(frozen=True)
class Floor:
    """The forward pass of one layer's MLP: ``over_base`` compares it with the base MLP alone."""

    chip: str
    shape: str
    T: int
    Q: int
    flops: float
    bytes: float
    floor_us: float
    bound_by: str
    over_base: float


def forward_flops(rows: int, hidden: int, inter: int, rank: int) -> float:
    """Three GEMMs of the base, three of each row's expert."""
    return 6.0 * rows * hidden * (inter + rank)


def forward_bytes(rows: int, hidden: int, inter: int, rank: int, queriers: int) -> float:
    """Weights of the base and of the experts present once; x, y once; hidden units written and read."""
    weights = 3 * hidden * (inter + queriers * rank)
    return float(_BYTES * (weights + 2 * rows * hidden + 2 * rows * (inter + rank)))


def floor(chip: str, shape: str, hidden: int, inter: int, rank: int, rows: int, queriers: int) -> Floor:
    """The larger of operations over their rate and bytes over theirs."""
    rates = CHIPS[chip]

    def seconds(r: int, q: int) -> tuple[float, float]:
        work, traffic = forward_flops(rows, hidden, inter, r), forward_bytes(rows, hidden, inter, r, q)
        return work / rates.flops, traffic / rates.bandwidth

    compute, memory = seconds(rank, queriers)
    return Floor(
        chip, shape, rows, queriers,
        flops=forward_flops(rows, hidden, inter, rank),
        bytes=forward_bytes(rows, hidden, inter, rank, queriers),
        floor_us=max(compute, memory) * 1e6,
        bound_by="operations" if compute > memory else "bytes",
        over_base=max(compute, memory) / max(seconds(0, 0)),
    )  # fmt: skip


def report(shapes: dict[str, tuple[int, int]], rank: int, as_json: bool) -> str:
    """Floors of every chip and shape over T and Q (at most one querier per row)."""
    floors = [
        floor(chip, shape, hidden, inter, rank, rows, queriers)
        for chip in CHIPS
        for shape, (hidden, inter) in shapes.items()
        for rows in ROWS
        for queriers in QUERIERS
        if queriers <= rows
    ]
    if as_json:
        return json.dumps([asdict(f) for f in floors], indent=1)
    form = "{:5} {:11} {:>6} {:>4} {:>9} {:>8} {:>10} {:>10} {:>7}"
    head = form.format("chip", "shape", "T", "Q", "GFLOP", "MB", "floor us", "bound by", "/ base")
    return "\n".join(
        [head]
        + [
            form.format(
                f.chip, f.shape, f.T, f.Q, f"{f.flops / 1e9:.1f}", f"{f.bytes / 1e6:.0f}",
                f"{f.floor_us:.1f}", f.bound_by, f"{f.over_base:.3f}",
            )
            for f in floors
        ]
    )  # fmt: skip
