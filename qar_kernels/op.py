"""The public operations: check the arguments, choose a backend, run it.

T rows (all leading dimensions flattened), H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from qar_kernels import reference, torch_backend
from qar_kernels.autocast import autocast, cast_experts
from qar_kernels.checks import (
    check_base,
    check_base_y,
    check_experts,
    check_lora,
    check_numbers,
    check_tensors,
    check_towers,
)
from qar_kernels.lora import NO_LORA, LoRA
from qar_kernels.row_sparse import present_rows
from qar_kernels.segments import Segments
from qar_kernels.triton.configs import has_kernels
from qar_kernels.weights import SwiGLUWeights

_HAS_TRITON = find_spec("triton") is not None
Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS = get_args(Backend)
MAX_TRITON_RANK = 128  # of an expert: beyond it tiles do not fit into shared memory


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
    *,
    recompute: bool = False,
    lora: LoRA = NO_LORA,
    sparse_gradients: bool = False,
) -> Tensor:
    """``base(x) + expert_scale * expert_q(x)``, differentiable in ``x``, all six weights and the adapters.

    Args:
        x: ``(..., H)``, T rows in all.
        gate, up, down: base SwiGLU weights ``(I, H)``, ``(I, H)``, ``(H, I)``.
        expert_gate, expert_up, expert_down: ``(E, R, H)``, ``(E, R, H)``, ``(E, H, R)``, in the dtype of
            ``x``, or fp32 where ``x`` is bf16 or fp16: then the experts of the batch are cast, and their
            gradients come back in fp32.
        seg: the expert of each of the T rows.
        expert_scale: weight of the experts' output.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. ``"auto"`` is ``"triton"`` on
            NVIDIA devices that the kernels were compiled for, where Triton is installed (but for float64
            and R above 128), else ``"torch"``.
        recompute: save only ``x`` and run the gate/up GEMMs again in the backward pass. "triton" only, and it
            forces the fused path there: over what was measured, and over ``QAR_KERNELS_PATH``.
        lora: adapters of the base projections, of any floating dtype. Their dropout is drawn from
            PyTorch's generator; "triton" draws that of the hidden units differently from the others.
        sparse_gradients: gradients of the experts are sparse COO tensors with rows for the experts of the
            batch, as ``nn.Embedding(sparse=True)`` makes them: the cost of a step does not grow with E.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    ``torch.func`` transforms (``grad``, ``vmap``, ``jvp``) and gradients of gradients are not supported.
    """
    check_tensors(x=x, gate=gate, up=up, down=down)
    check_numbers(expert_scale=expert_scale)
    x, gate, up, down = autocast(x, gate, up, down)
    check_base(x, gate, up, down)
    check_lora(lora, gate, down)
    check_experts(x, "x", expert_gate, expert_up, expert_down, seg)
    rows = _rows(x)
    name = _resolve(backend, expert_gate.shape[1], rows)
    bank = SwiGLUWeights(expert_gate, expert_up, expert_down)
    experts, seg, sparse = _experts_for(name, bank, seg, rows, sparse_gradients)
    if name == "triton":
        from qar_kernels.triton import backend as triton_backend

        base = SwiGLUWeights(gate, up, down)
        y = triton_backend.fused_mlp(rows, base, experts, seg, expert_scale, recompute, lora, len(bank.gate))
        return y.reshape(x.shape)
    base = _module(name).swiglu_mlp(rows, gate, up, down, lora)
    expert = _run_experts(name, rows, experts, seg, sparse)
    y = torch_backend.add_scaled(base, expert, expert_scale)
    return y if x.dim() == 2 else y.reshape(x.shape)


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
    *,
    recompute: bool = False,
    lora: LoRA = NO_LORA,
    sparse_gradients: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two towers of a layer: ``base(x_general)`` and ``expert_q(x_specific)`` (paper, section 3).

    Args:
        x_general: ``(..., H)`` rows of the general tower.
        x_specific: ``(..., H)`` rows of the querier-specific tower; ``seg`` describes these.

    Other arguments, errors and differentiability as in :func:`fused_mlp`.

    Returns:
        Two tensors, like ``x_general`` and like ``x_specific``; rows of the latter without an expert (-1) are
        zeros.
    """
    check_tensors(x_general=x_general, x_specific=x_specific, gate=gate, up=up, down=down)
    x_general, x_specific, gate, up, down = autocast(x_general, x_specific, gate, up, down)
    check_base(x_general, gate, up, down)
    check_lora(lora, gate, down)
    check_towers(x_general, x_specific)
    check_experts(x_specific, "x_specific", expert_gate, expert_up, expert_down, seg)
    rows, specific_rows = _rows(x_general), _rows(x_specific)
    name = _resolve(backend, expert_gate.shape[1], rows, specific_rows)
    bank = SwiGLUWeights(expert_gate, expert_up, expert_down)
    experts, seg, sparse = _experts_for(name, bank, seg, specific_rows, sparse_gradients)
    if name == "triton":
        from qar_kernels.triton import backend as triton_backend

        base = SwiGLUWeights(gate, up, down)
        general, specific = triton_backend.dual_mlp(
            rows, specific_rows, base, experts, seg, recompute, lora, len(bank.gate)
        )
        return general.reshape(x_general.shape), specific.reshape(x_specific.shape)
    general = _module(name).swiglu_mlp(rows, gate, up, down, lora)
    specific = _run_experts(name, specific_rows, experts, seg, sparse)
    return general.reshape(x_general.shape), specific.reshape(x_specific.shape)


def expert_mlp(
    x: Tensor,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    seg: Segments,
    *,
    expert_scale: float = 1.0,
    backend: str = "auto",
    base_y: Tensor | None = None,
    sparse_gradients: bool = False,
) -> Tensor:
    """``base_y + expert_scale * expert_q(x)``, for callers whose base MLP runs elsewhere.

    For example a base with quantised weights, or with adapters other than plain LoRA (DoRA). Differentiable
    in all tensors.

    Args:
        x: ``(..., H)``, T rows in all.
        expert_gate, expert_up, expert_down: ``(E, R, H)``, ``(E, R, H)``, ``(E, H, R)``, of one
            floating dtype, as in :func:`fused_mlp`.
        seg: the expert of each of the T rows.
        expert_scale: weight of the experts' output.
        base_y: like ``x``, the output of the base MLP; "triton" adds the experts in the same pass that writes
            them. Without it, rows without an expert (-1) are zeros.
        backend, sparse_gradients: as in :func:`fused_mlp`.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    check_tensors(x=x)
    check_numbers(expert_scale=expert_scale)
    (x,) = autocast(x)
    check_experts(x, "x", expert_gate, expert_up, expert_down, seg)
    rows = _rows(x)
    if base_y is not None:
        check_tensors(base_y=base_y)
        (base_y,) = autocast(base_y)
        check_base_y(x, base_y)
        base_y = base_y.reshape(rows.shape)
    name = _resolve(backend, expert_gate.shape[1], rows)
    bank = SwiGLUWeights(expert_gate, expert_up, expert_down)
    experts, seg, sparse = _experts_for(name, bank, seg, rows, sparse_gradients)
    if name == "triton":
        from qar_kernels.triton import backend as triton_backend

        y = triton_backend.expert_mlp(rows, experts, seg, expert_scale, base_y, len(bank.gate))
        return y.reshape(x.shape)
    y = _run_experts(name, rows, experts, seg, sparse)
    if base_y is not None:
        y = torch_backend.add_scaled(base_y, y, expert_scale)
    elif expert_scale != 1:
        y = y * expert_scale
    return y if x.dim() == 2 else y.reshape(x.shape)


def _rows(x: Tensor) -> Tensor:
    """``(..., H)`` as ``(T, H)``, without a call if it already is."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _resolve(backend: str, rank: int, *rows: Tensor) -> str:
    """The backend that runs: torch instead of the kernels for an empty batch or a rank that no tile holds."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "triton":
        _check_triton(rank)
    elif backend == "auto":
        suits = _HAS_TRITON and rows[0].dtype != torch.float64 and rank <= MAX_TRITON_RANK
        backend = "triton" if suits and has_kernels(rows[0].device) else "torch"
    if backend == "triton" and any(r.shape[0] == 0 for r in rows):
        return "torch"
    return backend


def _check_triton(rank: int) -> None:
    if not _HAS_TRITON:
        raise ValueError("backend: got 'triton', but Triton is not installed; expected 'auto' or 'torch'")
    if rank > MAX_TRITON_RANK:
        raise ValueError(
            f"expert_gate: got rank {rank}, expected at most {MAX_TRITON_RANK} with backend 'triton' "
            "(a tile holds a whole rank); 'auto' and 'torch' take any"
        )


def _experts_for(
    backend: str, bank: SwiGLUWeights, seg: Segments, rows: Tensor, sparse: bool
) -> tuple[SwiGLUWeights, Segments, bool]:
    """The experts as the backend takes them, and whether it must make their gradients row-sparse itself.

    The torch backend can, and reads the bank in place; the others get copies of the present experts' rows.
    """
    is_cast = rows.dtype == bank.gate.dtype == bank.up.dtype == bank.down.dtype
    if sparse and torch.is_grad_enabled() and any(weight.requires_grad for weight in bank):
        if backend == "torch" and is_cast and torch_backend.is_eager(rows):
            return bank, seg, True
        bank, seg = present_rows(bank, seg)
    if is_cast:
        return bank, seg, False
    return *cast_experts(bank, seg, rows.dtype), False


def _run_experts(backend: str, rows: Tensor, experts: SwiGLUWeights, seg: Segments, sparse: bool) -> Tensor:
    """Experts of the backends in plain PyTorch."""
    if backend == "reference":
        return reference.expert_mlp(rows, *experts, seg)
    return torch_backend.expert_mlp(rows, *experts, seg, sparse)


def _module(backend: str) -> ModuleType:
    return reference if backend == "reference" else torch_backend
