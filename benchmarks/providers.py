"""Ways to compute ``base(x) + expert_q(x)``, each a function of the same tensors.

T rows, H hidden, I intermediate, R expert rank, E experts. ``base`` and ``base_compiled`` leave the
experts out: they are what everything is divided by.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels import Segments, fused_mlp, reference, torch_backend
from qar_kernels.dispatch import OVERRIDE

from .shapes import Cell


@dataclass(frozen=True)
class Inputs:
    """Tensors of a cell: ``x (T, H)``, base weights, expert weights, the ids."""

    x: Tensor
    base: list[Tensor]
    experts: list[Tensor]
    segments: Segments

    @classmethod
    def draw(cls, cell: Cell, device: str, trains_experts: bool) -> Inputs:
        """Fresh random inputs; the base is frozen, x and (in training) the experts need gradients."""
        dtype = getattr(torch, cell.dtype)

        def normal(*shape: int, grad: bool = False) -> Tensor:
            values = torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
            return values.requires_grad_(grad)

        ids = torch.arange(cell.T, device=device) % cell.Q  # every querier has rows, in no order
        e, r, h, i = cell.E, cell.R, cell.H, cell.I
        experts = [normal(*shape, grad=trains_experts) for shape in ((e, r, h), (e, r, h), (e, h, r))]
        x = torch.randn((cell.T, h), device=device, dtype=dtype).requires_grad_(trains_experts)
        return cls(x, [normal(i, h), normal(i, h), normal(h, i)], experts, Segments.from_ids(ids))


Provider = Callable[[Inputs], Tensor]
_compiled_base = torch.compile(torch_backend.swiglu_mlp)


def base(inputs: Inputs) -> Tensor:
    """B0: two GEMMs, silu and product, one GEMM."""
    return torch_backend.swiglu_mlp(inputs.x, *inputs.base)


def base_compiled(inputs: Inputs) -> Tensor:
    """B0 under ``torch.compile``."""
    return _compiled_base(inputs.x, *inputs.base)


def triton_path(inputs: Inputs, path: str) -> Tensor:
    """This project's kernels on a forced path."""
    before = os.environ.get(OVERRIDE)
    os.environ[OVERRIDE] = path
    try:
        return fused_mlp(inputs.x, *inputs.base, *inputs.experts, inputs.segments, backend="triton")
    finally:
        os.environ.pop(OVERRIDE)
        if before is not None:
            os.environ[OVERRIDE] = before


def loop(inputs: Inputs) -> Tensor:
    """Base, then every querier's rows in turn."""
    return base(inputs) + reference.expert_mlp(inputs.x, *inputs.experts, inputs.segments)


def gather(inputs: Inputs) -> Tensor:
    """Base, then every row's own copy of its expert's weights in batched products."""
    gate, up, down = (weight[inputs.segments.row_expert] for weight in inputs.experts)
    x = inputs.x.unsqueeze(2)
    return base(inputs) + torch.bmm(down, F.silu(torch.bmm(gate, x)) * torch.bmm(up, x)).squeeze(2)


def grouped_mm(inputs: Inputs) -> Tensor:
    """Base, then ``torch._grouped_mm`` over rows sorted by querier (experts 0..Q-1 are present)."""
    segments = inputs.segments
    present = int(segments.row_expert.max()) + 1
    ends = segments.offsets[1 : present + 1].int()
    rows = inputs.x.index_select(0, segments.perm)
    gate, up, down = (weight[:present].transpose(1, 2) for weight in inputs.experts)
    hidden = F.silu(torch._grouped_mm(rows, gate, ends)) * torch._grouped_mm(rows, up, ends)
    expert = torch.empty_like(rows).index_copy(0, segments.perm, torch._grouped_mm(hidden, down, ends))
    return base(inputs) + expert


PROVIDERS: dict[str, Provider] = {
    "base": base,
    "base_compiled": base_compiled,
    "triton_fused": partial(triton_path, path="fused"),
    "triton_grouped": partial(triton_path, path="grouped"),
    "loop": loop,
    "gather_bmm": gather,
    "grouped_mm": grouped_mm,
}
WITHOUT_EXPERTS = ("base", "base_compiled")


def verify(name: str, inputs: Inputs) -> None:
    """A wrong way has no speed.

    Raises:
        RuntimeError: if the output is further from float64 than twice eager PyTorch's error.
    """
    with torch.no_grad():
        x, weights = inputs.x.double(), [w.double() for w in inputs.base]
        expected = reference.swiglu_mlp(x, *weights)
        eager = reference.swiglu_mlp(inputs.x, *inputs.base)
        if name not in WITHOUT_EXPERTS:
            experts = [w.double() for w in inputs.experts]
            expected = expected + reference.expert_mlp(x, *experts, inputs.segments)
            eager = eager + reference.expert_mlp(inputs.x, *inputs.experts, inputs.segments)
        got = PROVIDERS[name](inputs)

        def error(y: Tensor) -> float:
            return ((y.double() - expected).norm() / expected.norm()).item()

        if not error(got) <= 2 * error(eager):
            raise RuntimeError(f"{name}: relative error {error(got):.1e}, eager PyTorch {error(eager):.1e}")
