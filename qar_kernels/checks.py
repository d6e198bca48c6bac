"""Argument checks: metadata only, so they never wait for a device.

T rows, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from qar_kernels.autocast import cast_dtype
from qar_kernels.lora import Adapter, LoRA
from qar_kernels.segments import Segments


def check_tensors(**arguments: object) -> None:
    """Raise unless every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def check_numbers(**arguments: object) -> None:
    """Raise unless every argument is a number."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")


def check_base(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise unless the base weights are ``(I, H)``, ``(I, H)``, ``(H, I)`` and match ``x``."""
    _check_floating("x", x)
    hidden = _hidden(x, "x")
    intermediate = gate.shape[0] if gate.dim() == 2 else 0
    _check("gate", gate, (intermediate or "I", hidden), x, "x")
    _check("up", up, (intermediate, hidden), x, "x")
    _check("down", down, (hidden, intermediate), x, "x")


def check_lora(lora: LoRA, gate: Tensor, down: Tensor) -> None:
    """Raise unless every adapter is ``a`` (r, in), ``b`` (out, r) of one floating dtype, 0 <= dropout < 1.

    ``gate`` (I, H) and ``down`` (H, I) are base weights, already checked.
    """
    if not isinstance(lora, LoRA):
        raise TypeError(f"lora: got {type(lora).__name__}, expected LoRA")
    for name, adapter, weight in (
        ("gate", lora.gate, gate),
        ("up", lora.up, gate),
        ("down", lora.down, down),
    ):
        if adapter is None:
            continue
        if not isinstance(adapter, Adapter):
            raise TypeError(f"lora.{name}: got {type(adapter).__name__}, expected Adapter or None")
        a_name, b_name = f"lora.{name}.a", f"lora.{name}.b"
        check_tensors(**{a_name: adapter.a, b_name: adapter.b})
        check_numbers(**{f"lora.{name}.scale": adapter.scale, f"lora.{name}.dropout": adapter.dropout})
        out_features, in_features = weight.shape
        rank = adapter.a.shape[0] if adapter.a.dim() == 2 else "r"
        _check_floating(a_name, adapter.a)
        _check(a_name, adapter.a, (rank, in_features), adapter.a, a_name)
        _check(b_name, adapter.b, (out_features, rank), adapter.a, a_name)
        if adapter.a.device != weight.device:
            raise ValueError(f"{a_name}: got device {adapter.a.device}, expected {weight.device} like {name}")
        if not 0 <= adapter.dropout < 1:
            raise ValueError(f"lora.{name}.dropout: got {adapter.dropout}, expected at least 0 and below 1")


def check_towers(x_general: Tensor, x_specific: Tensor) -> None:
    """Raise unless the rows of both towers have the same hidden size, dtype and device."""
    hidden = _hidden(x_general, "x_general")
    _check("x_specific", x_specific, (*x_specific.shape[:-1], hidden), x_general, "x_general")


def check_base_y(x: Tensor, base_y: Tensor) -> None:
    """Raise unless ``base_y`` has the shape, dtype and device of ``x``."""
    _check("base_y", base_y, tuple(x.shape), x, "x")


def check_experts(
    x: Tensor, name: str, expert_gate: Tensor, expert_up: Tensor, expert_down: Tensor, segments: Segments
) -> None:
    """Raise unless the experts are ``(E, R, H)``, ``(E, R, H)``, ``(E, H, R)`` and match ``x``.

    They may be fp32 where ``x`` has 16 bits: an optimizer would round small updates of 16-bit weights away.
    """
    if not _experts_fit(x, expert_gate, expert_up, expert_down):
        check_tensors(expert_gate=expert_gate, expert_up=expert_up, expert_down=expert_down)
        _check_floating(name, x)
        hidden = _hidden(x, name)
        known = expert_gate.dim() == 3 and expert_gate.shape[1]
        experts, rank = expert_gate.shape[:2] if known else ("E", "R")
        like, like_name = (expert_gate, "expert_gate") if _is_master_of(expert_gate, x) else (x, name)
        _check("expert_gate", expert_gate, (experts, rank, hidden), like, like_name)
        _check("expert_up", expert_up, (experts, rank, hidden), like, like_name)
        _check("expert_down", expert_down, (experts, hidden, rank), like, like_name)
        if expert_gate.device != x.device:
            raise ValueError(f"expert_gate: got device {expert_gate.device}, expected {x.device} like {name}")
    _check_segments(x, name, segments, expert_gate.shape[0])


def _experts_fit(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """The common case, in one expression: a small batch on a CPU takes hardly longer than its checks."""
    if not (isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)):
        return False
    shape = gate.shape
    if len(shape) != 3 or x.dim() == 0:
        return False
    experts, rank, hidden = shape
    return (
        0 not in shape
        and x.shape[-1] == hidden
        and up.shape == shape
        and down.shape == (experts, hidden, rank)
        and gate.dtype == up.dtype == down.dtype
        and (gate.dtype == x.dtype or _is_master_of(gate, x))
        and x.device == gate.device == up.device == down.device
        and x.is_floating_point()
    )


def _is_master_of(expert: Tensor, x: Tensor) -> bool:
    return expert.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def _check_segments(x: Tensor, name: str, segments: Segments, num_experts: int) -> None:
    if not isinstance(segments, Segments):
        raise TypeError(f"seg: got {type(segments).__name__}, expected Segments, e.g. Segments.from_ids(ids)")
    rows, row_expert = x.numel() // x.shape[-1], segments.row_expert
    if row_expert.shape[0] != rows:
        raise ValueError(f"seg: got {segments.num_rows} rows, expected {rows} for {name} {tuple(x.shape)}")
    if row_expert.device != x.device:
        raise ValueError(f"seg: got device {segments.device}, expected {x.device} like {name}")
    segments.require_ids_below(num_experts)


def _hidden(x: Tensor, name: str) -> int:
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., H)")
    return x.shape[-1]


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating-point dtype")


def _check(name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor, like_name: str) -> None:
    if tensor.shape != shape:
        expected = "(" + ", ".join(str(size) for size in shape) + ")"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype != like.dtype and cast_dtype(tensor) != cast_dtype(like):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {like.dtype} like {like_name}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {like.device} like {like_name}")
