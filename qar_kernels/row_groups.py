"""The rows of a batch as a CPU processes them: groups of equally long segments that share batched products.

A segment is the rows of one expert. Grouped in plain Python: a call into PyTorch costs as much as hundreds of
rows here, and several times as much when the layer before has filled the caches. T rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
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
        experts: those that have rows, ascending.
        device: that of the batch.
    """

    order: Tensor | None
    groups: tuple[Group, ...]
    whole: Group | None
    lengths: tuple[int, ...]
    experts: tuple[int, ...]
    device: torch.device

    @property
    def used(self) -> int:
        """Rows that have an expert."""
        return self.groups[-1].stop if self.groups else 0

    @property
    def max_id(self) -> int:
        """The largest id, -1 without any."""
        return self.experts[-1] if self.experts else -1

    @cached_property
    def present(self) -> Tensor:
        """:attr:`experts` as ``(n,)`` int64."""
        return torch.tensor(self.experts, dtype=torch.int64, device=self.device)


class _Segment(NamedTuple):
    length: int
    first_row: int
    """Segments in this order need no reordering of rows, where each was one sequence."""
    rows: list[int]
    expert: int
    slot: int
    """Its position among the present experts."""


def group_rows(row_expert: Tensor, most: int) -> RowGroups:
    """Group the rows of a batch; this reads their experts on the host.

    Args:
        row_expert: ``(T,)`` int64, the expert of each row, negative for none.
        most: segments whose weights may be copied together. With 1 every segment is a group of its own, and
            no result depends on another segment.
    """
    device = row_expert.device
    rows, without = _rows_of(row_expert.tolist())
    experts = tuple(sorted(rows))
    segments = [_Segment(len(rows[e]), rows[e][0], rows[e], e, slot) for slot, e in enumerate(experts)]
    segments.sort(key=None if most > 1 else itemgetter(1))  # by length, then by first row
    runs = [run for _, equal in groupby(segments, key=itemgetter(0)) for run in _together(list(equal), most)]
    groups = tuple(_groups(runs, device))
    whole = groups[0] if len(groups) == 1 and not without else None
    lengths = *(group.stop - group.start for group in groups), len(without)
    order = _order([*(segment.rows for segment in segments), without], device)
    return RowGroups(order, groups, whole, lengths, experts, device)


def _rows_of(row_expert: list[int]) -> tuple[dict[int, list[int]], list[int]]:
    """Row numbers, ascending: of each expert, and of none."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, expert in enumerate(row_expert):
        rows[expert].append(row)
    nobody = [expert for expert in rows if expert < 0]
    return rows, sorted(chain.from_iterable(rows.pop(expert) for expert in nobody))


def _order(parts: list[list[int]], device: torch.device) -> Tensor | None:
    """The rows of all ``parts``, None if they are 0, 1, 2 and so on."""
    rows = list(chain.from_iterable(parts))
    return None if rows == list(range(len(rows))) else torch.tensor(rows, device=device)


def _together(segments: list[_Segment], most: int) -> Iterator[list[_Segment]]:
    """Cut ``segments``: consecutive experts need no copy, so all at once; others ``most`` at a time."""
    if len(segments) == 1 or (most > 1 and _are_consecutive([segment.expert for segment in segments])):
        yield segments
        return
    for at in range(0, len(segments), most):
        yield segments[at : at + most]


def _groups(runs: list[list[_Segment]], device: torch.device) -> Iterator[Group]:
    """A group for each of ``runs``: segments of equal length that share products."""
    experts = _indices([[segment.expert for segment in run] for run in runs], device)
    slots = _indices([[segment.slot for segment in run] for run in runs], device)
    start = 0
    for run, *index in zip(runs, experts, slots, strict=True):
        stop = start + len(run) * run[0].length
        yield Group(start, stop, len(run), *index)
        start = stop


def _indices(runs: list[list[int]], device: torch.device) -> list[slice | Tensor]:
    """An index for each of ``runs``: a slice, which copies nothing, if its numbers are consecutive."""
    slices = [slice(run[0], run[-1] + 1) if _are_consecutive(run) else None for run in runs]
    if None not in slices:
        return slices
    numbers = torch.tensor(list(chain.from_iterable(runs)), device=device)
    parts = numbers.split_with_sizes([len(run) for run in runs])
    return [part if index is None else index for index, part in zip(slices, parts, strict=True)]


def _are_consecutive(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
