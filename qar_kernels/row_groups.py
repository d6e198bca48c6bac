"""Segments as a CPU processes them: groups of equally long segments that share batched products.

The host reads them, because it loops over them. T rows, C segment capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """``count`` segments of equal length, rows ``start`` to ``stop`` of the grouped order.

    ``experts`` are their ids, ``slots`` their positions among the present experts in ascending order: a slice
    if consecutive, else a ``(count,)`` tensor.
    """

    start: int
    stop: int
    count: int
    experts: slice | Tensor
    slots: slice | Tensor


@dataclass(frozen=True, eq=False)
class RowGroups:
    """All rows of a batch.

    Attributes:
        order: ``(T,)`` int64, row numbers in the grouped order, rows without an expert last; None if that is
            the batch's own order.
        groups: in the grouped order.
        whole: the group that contains all rows, None if there is none.
        lengths: the number of rows of each group, then of the rows without an expert.
        present: ``(n,)`` experts that have rows, ascending.
        max_id: the largest id among them, -1 without any.
    """

    order: Tensor | None
    groups: tuple[Group, ...]
    whole: Group | None
    lengths: tuple[int, ...]
    present: Tensor
    max_id: int

    @property
    def used(self) -> int:
        """Rows that have an expert."""
        return self.groups[-1].stop if self.groups else 0


class _Segment(NamedTuple):
    expert: int
    slot: int
    """Its position among the present experts."""
    at: int
    """Its start in ``perm``."""
    length: int
    first_row: int
    """Its first row in the batch: segments in this order need no reordering of rows."""


def group_rows(perm: Tensor, offsets: Tensor, experts: Tensor, most: int) -> RowGroups:
    """Group the segments of :class:`qar_kernels.Segments`; this reads them on the host.

    Args:
        perm: ``(T,)``, row numbers sorted by expert.
        offsets: ``(C + 1,)``, bounds of the segments in ``perm``.
        experts: ``(C,)``, expert of each segment, -1 where unused.
        most: segments whose weights may be copied together. With 1 every segment is a group of its own, and
            no result depends on another segment.
    """
    segments = _segments(perm, offsets, experts)
    present = torch.tensor([segment.expert for segment in segments], dtype=torch.int64, device=perm.device)
    used = sum(segment.length for segment in segments)
    segments.sort(key=lambda segment: (segment.length if most > 1 else 0, segment.first_row))
    order = torch.cat([*(perm[s.at : s.at + s.length] for s in segments), perm[used:]])
    if torch.equal(order, torch.arange(order.shape[0], device=order.device)):
        order = None
    groups, start = [], 0
    for length, equal in groupby(segments, key=lambda segment: segment.length):
        for together in _together(list(equal), most):
            stop = start + len(together) * length
            ids, slots = [s.expert for s in together], [s.slot for s in together]
            groups.append(Group(start, stop, len(ids), _index(ids, perm.device), _index(slots, perm.device)))
            start = stop
    whole = groups[0] if len(groups) == 1 and used == perm.shape[0] else None
    lengths = *(group.stop - group.start for group in groups), perm.shape[0] - used
    max_id = max((segment.expert for segment in segments), default=-1)
    return RowGroups(order, tuple(groups), whole, lengths, present, max_id)


def _segments(perm: Tensor, offsets: Tensor, experts: Tensor) -> list[_Segment]:
    bounds, ids = offsets.tolist(), experts.tolist()
    first_rows = perm[offsets[:-1].clamp(max=max(perm.shape[0] - 1, 0))].tolist() if perm.shape[0] else ids
    return [
        _Segment(expert, slot, at, end - at, first)
        for slot, (expert, at, end, first) in enumerate(
            zip(ids, bounds[:-1], bounds[1:], first_rows, strict=True)
        )
        if expert >= 0
    ]


def _together(segments: list[_Segment], most: int) -> Iterator[list[_Segment]]:
    """Cut ``segments``: consecutive experts need no copy, so all at once; others ``most`` at a time."""
    if most > 1 and _are_consecutive([segment.expert for segment in segments]):
        yield segments
        return
    for at in range(0, len(segments), most):
        yield segments[at : at + most]


def _index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """An index for these rows: a slice, which copies nothing, if they are consecutive."""
    if _are_consecutive(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=device)


def _are_consecutive(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
