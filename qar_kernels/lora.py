"""LoRA on the base projections, as all backends take it (Hu et al., arXiv 2106.09685, section 4.1).

T rows, H hidden, I intermediate, r rank of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """The low-rank update of one projection: ``scale * b · a · dropout(x)``.

    Attributes:
        a: ``(r, in)``, of any floating dtype: the input is cast to it, as PEFT does.
        b: ``(out, r)`` in the dtype of ``a``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (arXiv 2312.03732).
        dropout: probability that an input of ``a`` is zeroed, 0 outside training.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def low(self, x: Tensor) -> Tensor:
        """``scale * dropout(x) · aᵀ``: ``x`` (T, in) -> (T, r) in the dtype of ``a`` (or of autocast)."""
        x = x.to(self.a.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout)
        return F.linear(x, self.a) * self.scale


@dataclass(frozen=True, eq=False)
class LoRA:
    """The adapters of a base MLP, None where a projection has none."""

    gate: Adapter | None = None
    up: Adapter | None = None
    down: Adapter | None = None

    @property
    def drops(self) -> bool:
        """Whether any adapter's input has dropout."""
        return any(adapter.dropout > 0 for adapter in (self.gate, self.up, self.down) if adapter is not None)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``a`` and ``b`` of every adapter there is."""
        adapters = [adapter for adapter in (self.gate, self.up, self.down) if adapter is not None]
        return tuple(factor for adapter in adapters for factor in (adapter.a, adapter.b))


NO_LORA = LoRA()


def project(x: Tensor, weight: Tensor, adapter: Adapter | None) -> Tensor:
    """``x · weightᵀ`` plus the adapter's update, in the dtype of the former: (T, in) -> (T, out)."""
    return add_update(F.linear(x, weight), x, adapter)


def add_update(y: Tensor, x: Tensor, adapter: Adapter | None) -> Tensor:
    """``y`` (T, out) plus the adapter's update for ``x`` (T, in), in the dtype of ``y``.

    If dtypes agree, the addition is part of the product and needs no pass over (T, out). On accelerators they
    always do, as in the kernels. On a CPU fp32 adapters stay fp32: few CPUs multiply 16-bit numbers faster.
    """
    if adapter is None:
        return y
    low, b = adapter.low(x), adapter.b
    if y.device.type != "cpu":
        low, b = low.to(y.dtype), b.to(y.dtype)
    if low.dtype == b.dtype == y.dtype:
        return torch.addmm(y, low, b.t())
    return (y + F.linear(low, b)).to(y.dtype)
