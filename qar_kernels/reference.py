"""The formulas as plainly as they can be written: the truth that every backend is tested against.

T rows, H hidden, I intermediate, R expert rank, E experts. Weights are in ``nn.Linear`` layout.
Paper: arXiv 2412.11736, section 3; here every querier has an expert of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels.lora import NO_LORA, Adapter, LoRA
from qar_kernels.segments import Segments


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: LoRA = NO_LORA) -> Tensor:
    """``down · (silu(gate x) * (up x))``: ``x`` (T, H), ``gate``/``up`` (I, H), ``down`` (H, I)."""
    h = F.silu(_project(x, gate, lora.gate)) * _project(x, up, lora.up)
    return _project(h, down, lora.down)


def _project(x: Tensor, weight: Tensor, adapter: Adapter | None) -> Tensor:
    y = x @ weight.T
    if adapter is not None:
        dropped = F.dropout(x.to(adapter.a.dtype), adapter.dropout)
        y = (y + adapter.scale * (dropped @ adapter.a.T) @ adapter.b.T).to(y.dtype)
    return y


def expert_mlp(
    x: Tensor, expert_gate: Tensor, expert_up: Tensor, expert_down: Tensor, segments: Segments
) -> Tensor:
    """Row ``t`` through its own expert ``q(t)``; rows without one give zeros. ``x`` (T, H) -> (T, H)."""
    out = torch.zeros_like(x)
    for expert in segments.row_expert.unique().tolist():
        if expert >= 0:
            rows = (segments.row_expert == expert).nonzero().squeeze(1)
            y = swiglu_mlp(x[rows], expert_gate[expert], expert_up[expert], expert_down[expert])
            out = out.index_copy(0, rows, y)
    return out
