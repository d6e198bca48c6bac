"""The public operations: check the arguments, choose a backend, run it.

T rows (all leading dimensions flattened), H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qar_kernels import reference, torch_backend
from qar_kernels.checks import check_base, check_experts
from qar_kernels.segments import Segments

BACKENDS = ("auto", "triton", "torch", "reference")


def fused_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    seg: Segments,
    expert_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """``base(x) + expert_scale * expert_q(x)``, differentiable in ``x`` and all six weights.

    Args:
        x: ``(..., H)``, T rows in all.
        gate, up, down: base SwiGLU weights ``(I, H)``, ``(I, H)``, ``(H, I)``.
        expert_gate, expert_up, expert_down: ``(E, R, H)``, ``(E, R, H)``, ``(E, H, R)``.
        seg: the expert of each of the T rows.
        expert_scale: weight of the experts' output.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    x, gate, up, down, expert_gate, expert_up, expert_down = _autocast(
        x, gate, up, down, expert_gate, expert_up, expert_down
    )
    check_base(x, gate, up, down)
    check_experts(x, "x", expert_gate, expert_up, expert_down, seg)
    impl = _backend(backend)
    rows = x.reshape(-1, x.shape[-1])
    base = impl.swiglu_mlp(rows, gate, up, down)
    expert = impl.expert_mlp(rows, expert_gate, expert_up, expert_down, seg)
    return torch.add(base, expert, alpha=expert_scale).reshape(x.shape)


def dual_mlp(
    x_general: Tensor,
    x_specific: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    seg: Segments,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The two towers of a layer: ``base(x_general)`` and ``expert_q(x_specific)`` (paper, section 3).

    Args:
        x_general: ``(..., H)`` rows of the general tower.
        x_specific: ``(..., H)`` rows of the querier-specific tower; ``seg`` describes these.

    Other arguments, errors and differentiability as in :func:`fused_mlp`. Specific rows without an
    expert (-1) give zeros.
    """
    x_general, x_specific, gate, up, down, expert_gate, expert_up, expert_down = _autocast(
        x_general, x_specific, gate, up, down, expert_gate, expert_up, expert_down
    )
    check_base(x_general, gate, up, down)
    check_experts(x_specific, "x_specific", expert_gate, expert_up, expert_down, seg)
    impl = _backend(backend)
    general = impl.swiglu_mlp(x_general.reshape(-1, x_general.shape[-1]), gate, up, down)
    specific = impl.expert_mlp(
        x_specific.reshape(-1, x_specific.shape[-1]), expert_gate, expert_up, expert_down, seg
    )
    return general.reshape(x_general.shape), specific.reshape(x_specific.shape)


def expert_mlp(
    x: Tensor,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    seg: Segments,
    backend: str = "auto",
) -> Tensor:
    """``expert_q(x)`` alone, for callers whose base MLP runs elsewhere (adapters, quantised weights)."""
    x, expert_gate, expert_up, expert_down = _autocast(x, expert_gate, expert_up, expert_down)
    check_experts(x, "x", expert_gate, expert_up, expert_down, seg)
    rows = x.reshape(-1, x.shape[-1])
    return _backend(backend).expert_mlp(rows, expert_gate, expert_up, expert_down, seg).reshape(x.shape)


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton":
        raise ValueError("backend: got 'triton', not in this version; expected 'torch' or 'auto'")
    return reference if name == "reference" else torch_backend


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as ``F.linear`` would do."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
