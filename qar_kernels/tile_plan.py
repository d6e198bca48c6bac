"""Which tile of a kernel owns which rows of which segment: device tensors of fixed shape.

T rows, C segment capacity. Segment ``C`` is the tail of rows without an expert (-1), so that a kernel
that must write every row (with zeros) has a tile for it. Nothing is read back to the host; the sizes
depend on T and C only, so a CUDA graph can be replayed with other ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qar_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Tiles over the sorted rows.

    Attributes:
        inverse_perm: ``(T,)`` int64, sorted position of each row.
        offsets: ``(C + 2,)`` int64, bounds of every segment and of the tail.
        experts: ``(C + 1,)`` int64, expert of every segment, -1 for unused ones and for the tail.
        tile_segment: ``(ceil(T / block_expert) + C + 1,)`` int32, segment of each expert tile.
        tile_start: int32 of that shape, first sorted row of each expert tile.
        tile_count: ``(2,)`` int32, expert tiles in use without and with the tail's.
        segment_count: ``(1,)`` int32, segments in use.
        first_segment: ``(ceil(T / block_rows),)`` int32, first segment that meets a tile of sorted rows.
        last_segment: int32 of that shape, one past the last such segment.
    """

    inverse_perm: Tensor
    offsets: Tensor
    experts: Tensor
    tile_segment: Tensor
    tile_start: Tensor
    tile_count: Tensor
    segment_count: Tensor
    first_segment: Tensor
    last_segment: Tensor


def tile_plan(segments: Segments, block_rows: int, block_expert: int) -> TilePlan:
    """The sorted rows in tiles of ``block_rows``, and every segment in tiles of ``block_expert``.

    Computed once per batch and pair of block sizes, see :meth:`Segments.memo`.
    """
    key = "tile plan", block_rows, block_expert
    return segments.memo(key, lambda: _build(segments, block_rows, block_expert))


def _build(segments: Segments, block_rows: int, block_expert: int) -> TilePlan:
    perm, offsets, experts = segments.perm, segments.offsets, segments.experts
    rows, capacity = perm.shape[0], experts.shape[0]
    device = perm.device
    position = torch.arange(rows, device=device)
    bounds = torch.cat([offsets, offsets.new_full((1,), rows)])

    tiles_of = (bounds.diff() + block_expert - 1) // block_expert
    ends = tiles_of.cumsum(0)
    tile = torch.arange(-(-rows // block_expert) + capacity + 1, device=device)
    segment = torch.searchsorted(ends, tile, right=True).clamp(max=capacity)
    start = bounds[segment] + (tile - (ends - tiles_of)[segment]) * block_expert

    used = offsets[-1]
    row_start = torch.arange(0, rows, block_rows, device=device)
    row_end = torch.minimum(row_start + block_rows, used)
    return TilePlan(
        inverse_perm=torch.zeros_like(perm).scatter(0, perm, position),
        offsets=bounds,
        experts=torch.cat([experts, experts.new_full((1,), -1)]),
        tile_segment=segment.int(),
        tile_start=start.int(),
        tile_count=ends[-2:].int(),
        segment_count=(experts >= 0).sum(0, keepdim=True).int(),
        first_segment=torch.searchsorted(offsets[1:], row_start, right=True).int(),
        last_segment=torch.searchsorted(offsets[:-1], row_end).int(),
    )
