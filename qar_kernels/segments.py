"""Which rows of a batch belong to which expert, sorted once and shared by every layer.

T rows (flattened tokens), C segment capacity (an upper bound on the number of experts present).
Everything is a tensor of fixed shape on the ids' device: no value is read back to the host, so the
same code runs eagerly, under ``torch.compile`` and inside a CUDA graph. On a CPU the rows are sorted when
somebody asks: the torch backend groups them by itself (:mod:`qar_kernels.row_groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qar_kernels.host import is_capturing, is_readable

_LAST = torch.iinfo(torch.int64).max
IdsLike = Tensor | Sequence[int]
Value = TypeVar("Value")


def _execution_mode() -> str:
    """Whether tensors made now are eager, traced by a compiler, or captured into a CUDA graph.

    The last are empty until the graph is replayed.
    """
    if torch.compiler.is_compiling():
        return "traced"
    return "captured" if is_capturing() else "eager"


def _outside_inference_mode() -> AbstractContextManager:
    """For tensors that are kept: no backward pass can save those that inference mode makes."""
    leaves = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if leaves else nullcontext()


class SortedRows(NamedTuple):
    """See the properties of :class:`Segments` of the same names."""

    perm: Tensor
    offsets: Tensor
    experts: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows grouped by expert.

    Attributes:
        row_expert: ``(T,)`` int64, expert of each row in the batch's own order, -1 for none.
        capacity: C.
        max_id: largest expert id, or None where it is only known on an accelerator.
    """

    row_expert: Tensor
    capacity: int
    max_id: int | None = None
    _sorted: SortedRows | None = field(default=None, repr=False)
    _mode: str = field(default_factory=_execution_mode, init=False, repr=False)
    _memo: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # where the host cannot read them at once: graphs that are captured later, and layers that are
        # checkpointed in a compiled program (which may not change what is outside of them), find them
        if self._sorted is None and not is_readable(self.row_expert):
            object.__setattr__(self, "_sorted", _sort(self.row_expert, self.capacity))

    @property
    def sorted_rows(self) -> SortedRows:
        """:attr:`perm`, :attr:`offsets` and :attr:`experts`, made once per batch."""
        if self._sorted is not None:
            return self._sorted
        return self.memo("sorted rows", lambda: _sort(self.row_expert, self.capacity))

    @property
    def perm(self) -> Tensor:
        """``(T,)`` int64, row numbers sorted by expert (stable); rows without an expert come last."""
        return self.sorted_rows.perm

    @property
    def offsets(self) -> Tensor:
        """``(C + 1,)`` int64: segment ``s`` owns ``perm[offsets[s]:offsets[s + 1]]``; unused ones last."""
        return self.sorted_rows.offsets

    @property
    def experts(self) -> Tensor:
        """``(C,)`` int64, the expert of each segment, -1 where unused."""
        return self.sorted_rows.experts

    @property
    def num_rows(self) -> int:
        """Number of rows T."""
        return self.row_expert.shape[0]

    @property
    def device(self) -> torch.device:
        """Device that every tensor lives on."""
        return self.row_expert.device

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        with _outside_inference_mode():
            rows = SortedRows(*(tensor.to(device) for tensor in self.sorted_rows))
            return Segments(self.row_expert.to(device), self.capacity, self.max_id, rows)

    def memo(self, key: object, make: Callable[[], Value]) -> Value:
        """``make()``, computed once per batch and shared by all layers; backends keep theirs here.

        A result is kept where it stays true: in the execution mode that the segments were made in, and in
        eager code for segments that a compiled program returned. A training step keeps none while it is
        traced: a checkpointed layer may not change what is outside of it, and the compiler merges equal
        nodes. A capture also uses eager results, which every replay finds, but keeps none beside them: until
        its graph is replayed they hold nothing. So make segments inside each CUDA graph that is to see other
        ids; for one that replays the same, run once before.

        Args:
            key: names the result, among those of all callers.
            make: computes it from the segments alone.
        """
        made, now = self._mode, _execution_mode()
        keeps = made == now or (made == "traced" and now == "eager")
        keeps = keeps and not (now == "traced" and torch.is_grad_enabled())
        if (keeps or (made == "eager" and now == "captured")) and key in self._memo:
            return self._memo[key]
        with _outside_inference_mode():
            value = make()
        if keeps:
            self._memo[key] = value
        return value

    @property
    def present(self) -> tuple[Tensor, Segments]:
        """The experts that have rows, ``(n,)`` int64 ascending, and the same segments with these as 0 .. n-1.

        For callers who pass the kernels the present experts' weights alone. Made once per batch; on an
        accelerator reading ``n`` waits for the device.
        """
        return self.memo("present", self._without_unused)

    @property
    def slots(self) -> tuple[Tensor, Segments]:
        """As :attr:`present` without waiting: C experts, those of unused segments are expert 0."""
        return self.memo("slots", self._renumbered)

    def _without_unused(self) -> tuple[Tensor, Segments]:
        ids, renumbered = self.slots
        ids = ids[: int((self.experts >= 0).sum())]
        return ids, replace(renumbered, max_id=ids.shape[0] - 1)

    def _renumbered(self) -> tuple[Tensor, Segments]:
        perm, offsets, experts = self.sorted_rows
        used = experts >= 0
        slot = torch.searchsorted(torch.where(used, experts, _LAST), self.row_expert)
        row_slot = torch.where(self.row_expert >= 0, slot, -1)
        slots = torch.where(used, torch.arange(self.capacity, device=self.device), -1)
        rows = SortedRows(perm, offsets, slots)
        return experts.clamp(min=0), Segments(row_slot, self.capacity, _sorted=rows)

    def require_ids_below(self, num_experts: int) -> None:
        """Raise ``ValueError`` for an expert id that is too large.

        Where the host does not know the ids, the device asserts that they are -1 or more, and small enough.
        """
        if self.max_id is not None:
            if self.max_id >= num_experts:
                raise ValueError(
                    f"seg: got expert id {self.max_id}, expected ids below {num_experts} experts"
                )
        elif torch.compiler.is_compiling():  # a checkpointed layer may not change the memo
            self._assert_ids_below(num_experts)
        elif not is_readable(self.row_expert):
            self.memo(("ids below", num_experts), lambda: self._assert_ids_below(num_experts))

    def _assert_ids_below(self, num_experts: int) -> None:
        allowed = (self.row_expert >= -1) & (self.row_expert < num_experts)
        torch._assert_async(allowed.all(), "seg: expert id out of range")

    @classmethod
    def from_ids(cls, expert_ids: IdsLike) -> Segments:
        """One id per row.

        Args:
            expert_ids: ``(T,)`` integers in any order, -1 for rows without an expert.

        Raises:
            TypeError: if the ids are not integers.
            ValueError: if they are not one-dimensional or (checked on the CPU) below -1.
        """
        ids, max_id = _checked_ids(expert_ids)
        with _outside_inference_mode():
            return cls(ids.clone(), ids.shape[0], max_id)  # a copy: the caller may overwrite the ids

    @classmethod
    def from_sequences(cls, expert_ids: IdsLike, seq_len: int) -> Segments:
        """One id per sequence of a padded batch: rows are ``B * seq_len``, sequence after sequence.

        Args:
            expert_ids: ``(B,)`` integers, -1 for sequences without an expert.
            seq_len: rows of every sequence.

        Raises:
            TypeError: if the ids or ``seq_len`` are not integers.
            ValueError: if the ids are not one-dimensional or (checked on the CPU) below -1, or ``seq_len`` is
                negative.
        """
        _check_count(seq_len, "seq_len")
        ids, max_id = _checked_ids(expert_ids)
        with _outside_inference_mode():
            return cls(ids.repeat_interleave(seq_len), ids.shape[0], max_id)

    @classmethod
    def from_cu_seqlens(
        cls, expert_ids: IdsLike, cu_seqlens: IdsLike, num_rows: int | None = None
    ) -> Segments:
        """One id per packed sequence: sequence ``b`` owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.

        On an accelerator this waits for the device unless ``num_rows`` is given.

        Args:
            expert_ids: ``(B,)`` integers, -1 for sequences without an expert.
            cu_seqlens: ``(B + 1,)`` integers, non-decreasing, starting at 0.
            num_rows: T; default ``cu_seqlens[-1]``, read back to the host.

        Raises:
            TypeError: if the ids, the bounds or ``num_rows`` are not integers.
            ValueError: if shapes do not match, or (checked on the CPU) an id is below -1, the bounds decrease
                or do not start at 0, or ``num_rows`` is not the last bound.
        """
        if num_rows is not None:
            _check_count(num_rows, "num_rows")
        ids, max_id = _checked_ids(expert_ids)
        bounds = _integers(cu_seqlens, "cu_seqlens").to(ids.device)
        _check_bounds(bounds, ids.shape[0], num_rows)
        if bounds.is_meta and num_rows is None:
            raise ValueError("num_rows: missing, expected the number of rows, which meta tensors cannot tell")
        total = int(bounds[-1]) if num_rows is None else num_rows
        rows = torch.arange(total, device=ids.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), rows, right=True)
        with _outside_inference_mode():
            return cls(ids[sequence], ids.shape[0], max_id)


def _sort(row_expert: Tensor, capacity: int) -> SortedRows:
    key, perm = torch.where(row_expert < 0, _LAST, row_expert).sort(stable=True)
    before = torch.cat((key.new_full((1,), -1), key))[:-1]  # no slice of T - 1, which would be another guard
    starts = key != before
    # Rows without an expert sort behind every segment, so a segment's offset never counts them.
    segment_of = torch.where(key == _LAST, capacity, starts.cumsum(0) - 1)
    offsets = torch.searchsorted(segment_of, torch.arange(capacity + 1, device=key.device))
    used = offsets[1:] > offsets[:-1]
    first = key[offsets[:-1].clamp(max=max(key.shape[0] - 1, 0))] if key.shape[0] else offsets[:-1]
    return SortedRows(perm, offsets, torch.where(used, first, -1))


def _check_count(rows: int, name: str) -> None:
    if not isinstance(rows, int | torch.SymInt | Integral):
        raise TypeError(f"{name}: got {type(rows).__name__}, expected an integer")
    if rows < 0:
        raise ValueError(f"{name}: got {rows}, expected a number of rows >= 0")


def _integers(values: IdsLike, name: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else _tensor(values, name)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected integers")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected one dimension")
    return tensor.to(torch.int64)


def _tensor(values: Sequence[int], name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(values).__name__}, expected integers ({error})") from error


def _checked_ids(expert_ids: IdsLike) -> tuple[Tensor, int | None]:
    """The ids as int64 and, where reading them costs no device sync, their largest value."""
    ids = _integers(expert_ids, "expert_ids")
    if not is_readable(ids) or not ids.numel():
        return ids, None
    low, high = (int(v) for v in ids.aminmax())
    if low < -1:
        raise ValueError(f"expert_ids: got {low}, expected ids >= 0, or -1 for no expert")
    return ids, high


def _check_bounds(bounds: Tensor, num_sequences: int, num_rows: int | None) -> None:
    if bounds.shape[0] != num_sequences + 1:
        raise ValueError(
            f"cu_seqlens: got {bounds.shape[0]} values for {num_sequences} sequences, "
            f"expected {num_sequences + 1}"
        )
    if not is_readable(bounds):
        return
    if int(bounds[0]) != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: got {bounds.tolist()}, expected non-decreasing values from 0")
    if num_rows is not None and int(bounds[-1]) != num_rows:
        raise ValueError(f"num_rows: got {num_rows}, but cu_seqlens ends at {int(bounds[-1])}")
