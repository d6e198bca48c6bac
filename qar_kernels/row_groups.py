"""Segments as a CPU takes them: runs of equally long segments that share batched products.

Known on the host, because a loop over them runs there. T rows, C segment capacity.
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

    ``experts`` are their ids: a slice of the weights where they are neighbours, else a ``(count,)`` tensor.
    """

    start: int
    stop: int
    count: int
    experts: slice | Tensor


@dataclass(frozen=True, eq=False)
class RowGroups:
    """All rows of a batch.

    Attributes:
        order: ``(T,)`` int64, row numbers in the grouped order, rows without an expert last; None where that
            is the batch's own order.
        groups: in the grouped order.
        whole: the group that all rows are in, None where there is none.
        used: rows that have an expert.
        present: experts that have rows.
        max_id: the largest id among them, -1 without any.
    """

    order: Tensor | None
    groups: tuple[Group, ...]
    whole: Group | None
    used: int
    present: int
    max_id: int


class _Segment(NamedTuple):
    expert: int
    at: int
    """Where it begins in ``perm``."""
    length: int
    first_row: int
    """In the batch's order: segments that keep it need no sorting of rows."""


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
    used = sum(segment.length for segment in segments)
    segments.sort(key=lambda segment: (segment.length if most > 1 else 0, segment.first_row))
    order = torch.cat([*(perm[s.at : s.at + s.length] for s in segments), perm[used:]])
    if torch.equal(order, torch.arange(order.shape[0], device=order.device)):
        order = None
    groups, start = [], 0
    for length, equal in groupby(segments, key=lambda segment: segment.length):
        for ids in _together([segment.expert for segment in equal], most):
            stop = start + len(ids) * length
            if ids == list(range(ids[0], ids[0] + len(ids))):
                groups.append(Group(start, stop, len(ids), slice(ids[0], ids[-1] + 1)))
            else:
                groups.append(Group(start, stop, len(ids), torch.tensor(ids, device=perm.device)))
            start = stop
    max_id = max((segment.expert for segment in segments), default=-1)
    whole = groups[0] if len(groups) == 1 and used == perm.shape[0] else None
    return RowGroups(order, tuple(groups), whole, used, len(segments), max_id)


def _segments(perm: Tensor, offsets: Tensor, experts: Tensor) -> list[_Segment]:
    bounds, ids = offsets.tolist(), experts.tolist()
    first_rows = perm[offsets[:-1].clamp(max=max(perm.shape[0] - 1, 0))].tolist() if perm.shape[0] else ids
    return [
        _Segment(expert, at, end - at, first)
        for expert, at, end, first in zip(ids, bounds[:-1], bounds[1:], first_rows, strict=True)
        if expert >= 0
    ]


def _together(ids: list[int], most: int) -> Iterator[list[int]]:
    """Cut ``ids``: ascending neighbours need no copy, so all at once, others ``most`` at a time."""
    if most > 1 and ids == list(range(ids[0], ids[0] + len(ids))):
        yield ids
        return
    for at in range(0, len(ids), most):
        yield ids[at : at + most]
