"""Random tensors of a cell, and the float64 answer that every provider must come near.

T rows, Q queriers present, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.shapes import Cell
from qar_kernels import Adapter, LoRA, Segments, reference
from qar_kernels.lora import NO_LORA
from qar_kernels.weights import SwiGLUWeights


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of a cell.

    Attributes:
        cell: the shape.
        x: ``(T, H)``; needs a gradient in training.
        d_y: ``(T, H)``, the gradient of the output.
        base: gate, up ``(I, H)`` and down ``(H, I)``, frozen; None where the cell has no base MLP.
        experts: gate, up ``(E, R, H)`` and down ``(E, H, R)``; need gradients in training.
        present: the Q expert ids, in the order of their sequences of ``T / Q`` rows each.
        segments: the same for the kernels.
        lora: adapters of the base; need gradients in training.
    """

    cell: Cell
    x: Tensor
    d_y: Tensor
    base: SwiGLUWeights | None
    experts: SwiGLUWeights
    present: list[int]
    segments: Segments
    lora: LoRA = NO_LORA

    @classmethod
    def draw(cls, cell: Cell, device: str, training: bool, seed: int = 0) -> Inputs:
        """Fresh random inputs: sequences of equal length, their queriers in no order."""
        torch.manual_seed(seed)
        dtype = getattr(torch, cell.dtype)

        def normal(*shape: int, fan_in: int, grad: bool = False) -> Tensor:
            values = torch.randn(shape, device=device, dtype=dtype) / fan_in**0.5
            return values.requires_grad_(grad)

        e, r, h, i = cell.E, cell.R, cell.H, cell.I
        base = None
        if i:
            base = SwiGLUWeights(normal(i, h, fan_in=h), normal(i, h, fan_in=h), normal(h, i, fan_in=i))
        shapes = (e, r, h), (e, r, h), (e, h, r)
        experts = SwiGLUWeights(*(normal(*shape, fan_in=shape[-1], grad=training) for shape in shapes))

        def adapter(inputs: int, outputs: int) -> Adapter:
            a = normal(cell.A, inputs, fan_in=inputs, grad=training)
            return Adapter(a, normal(outputs, cell.A, fan_in=cell.A, grad=training), scale=0.5)

        lora = LoRA(adapter(h, i), adapter(h, i), adapter(i, h)) if cell.A else NO_LORA
        present = torch.randperm(e)[: cell.Q]
        return cls(
            cell,
            x=normal(cell.T, h, fan_in=1, grad=training),
            d_y=normal(cell.T, h, fan_in=1),
            base=base,
            experts=experts,
            present=present.tolist(),
            segments=Segments.from_sequences(present.to(device), cell.T // cell.Q),
            lora=lora,
        )

    @property
    def training(self) -> bool:
        """Whether gradients of x and of the experts are wanted."""
        return self.x.requires_grad


def base_answer(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base MLP alone: ``y`` and, in training, ``d_x``."""
    x = inputs.x.detach().to(dtype).requires_grad_(inputs.training)
    lora = _cast(inputs.lora, dtype)
    return _with_gradients(inputs, _base(inputs, x, lora), {"d_x": x, **_factors(lora)})


def expert_answer(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Base plus experts: ``y`` and, in training, ``d_x`` and the present experts' gradients ``(Q, ...)``."""
    x = inputs.x.detach().to(dtype).requires_grad_(inputs.training)
    # Only the present experts: what a thousand absent ones would add to the check is time.
    gate, up, down = (
        w.detach()[inputs.present].to(dtype).requires_grad_(inputs.training) for w in inputs.experts
    )
    ids = torch.arange(inputs.cell.Q, device=x.device).repeat_interleave(inputs.cell.T // inputs.cell.Q)
    lora = _cast(inputs.lora, dtype)
    y = _base(inputs, x, lora) + reference.expert_mlp(x, gate, up, down, Segments.from_ids(ids))
    wanted = {"d_x": x, "d_expert_gate": gate, "d_expert_up": up, "d_expert_down": down}
    return _with_gradients(inputs, y, {**wanted, **_factors(lora)})


def _base(inputs: Inputs, x: Tensor, lora: LoRA) -> Tensor:
    if inputs.base is None:
        return torch.zeros_like(x)
    return reference.swiglu_mlp(x, *(w.to(x.dtype) for w in inputs.base), lora)


def _cast(lora: LoRA, dtype: torch.dtype) -> LoRA:
    """Adapters of their own in another dtype, with gradients where these have any."""

    def cast(adapter: Adapter | None) -> Adapter | None:
        if adapter is None:
            return None
        a, b = (w.detach().to(dtype).requires_grad_(w.requires_grad) for w in (adapter.a, adapter.b))
        return replace(adapter, a=a, b=b)

    return LoRA(*map(cast, (lora.gate, lora.up, lora.down)))


def _factors(lora: LoRA) -> dict[str, Tensor]:
    return {f"d_lora_{index}": factor for index, factor in enumerate(lora.factors)}


def _with_gradients(inputs: Inputs, y: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if not inputs.training:
        return {"y": y}
    grads = torch.autograd.grad(y, list(wanted.values()), inputs.d_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}
