"""What an operation of the kernels takes, in one piece and as the flat arguments of a registered operator.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors; also, in their places, their gradients or whether these are wanted.

    Attributes:
        x: ``(T, H)`` rows of the base, None in the expert tower.
        base: gate, up and down of the base, empty in the expert tower.
        x_expert: ``(S, H)`` rows of the experts, None in the fused tower, where they are ``x``.
        experts: gate, up and down of the experts.
        base_y: ``(S, H)``, added to the expert rows' output; expert tower only, and None there for zeros.
        perm: ``(S,)`` rows sorted by expert.
        plan: the tensors of :class:`qar_kernels.tile_plan.TilePlan`, in the order of its fields.
        lora: those of :class:`qar_kernels.triton.lora.LoraOperands`, empty without adapters.
    """

    x: Tensor | None
    base: Sequence[Tensor]
    x_expert: Tensor | None
    experts: Sequence[Tensor]
    base_y: Tensor | None
    perm: Tensor
    plan: Sequence[Tensor]
    lora: Sequence[Tensor]

    def flat(self) -> tuple[list[Tensor | None], list[int | None]]:
        """All in a row, and the lengths of the fields that are sequences, None for the others."""
        lengths = [len(field) if isinstance(field, (list, tuple)) else None for field in self]
        groups = [[field] if length is None else field for field, length in zip(self, lengths, strict=True)]
        return list(chain.from_iterable(groups)), lengths

    @classmethod
    def from_flat(cls, flat: Iterable[Any], lengths: Sequence[int | None]) -> Operands:
        """The inverse of :meth:`flat`."""
        rest = iter(flat)
        return cls(*(next(rest) if length is None else list(islice(rest, length)) for length in lengths))


class Constants(NamedTuple):
    """What is no tensor.

    Attributes:
        tower: "fused", "dual" or "expert".
        scale: expert_scale.
        config: the name of a launch configuration.
    """

    tower: str
    scale: float
    config: str


def split_arguments(arguments: Sequence[Any]) -> tuple[Operands, Constants, Sequence[Any]]:
    """A registered operator's arguments: operands and constants, which come first, and the others."""
    first = len(Operands._fields)
    behind = first + len(Constants._fields)
    return Operands(*arguments[:first]), Constants(*arguments[first:behind]), arguments[behind:]
