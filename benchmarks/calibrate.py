"""What the card itself can do: the ceilings that every ratio should be read against.

Copy bandwidth, the vendor library's GEMM rate, and our gate/up kernel on base tiles alone (a bare GEMM with
two accumulators) against it: below 0.93 the dispatcher should leave large T to the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.clocks import CudaClock
from benchmarks.runner import interleave
from benchmarks.session import attempt
from benchmarks.shapes import MODELS
from qar_kernels import Segments

_ROWS = 4096
_COPIED = 2**29  # elements: far beyond any cache


def calibrate(model: str = "Llama-3-8B") -> dict[str, float]:
    """Bytes per second, operations per second, and library time over our time of the gate/up GEMM."""
    hidden, inter = MODELS[model]
    source = torch.randn(_COPIED, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    x = torch.randn(_ROWS, hidden, device="cuda", dtype=torch.bfloat16)
    both = torch.randn(2 * inter, hidden, device="cuda", dtype=torch.bfloat16)
    calls = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: x @ both.t(),
    }
    calls |= attempt("gate_up", _report, lambda: _base_gate_up(x, *both.chunk(2)))
    ms = {name: timing.p50 for name, timing in interleave(calls, CudaClock(), budget_s=0.5).items()}
    found = {
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / ms["copy"] * 1e3,
        "gemm_flops_per_s": 4 * _ROWS * hidden * inter / ms["gemm"] * 1e3,
    }
    if "gate_up" in ms:
        found["library_gemm_over_gate_up_kernel"] = ms["gemm"] / ms["gate_up"]
    return found


def _report(name: str, error: BaseException) -> None:
    sys.stdout.write(f"calibration: {name} NOT TIMED  {type(error).__name__}: {error}\n")


def _base_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Callable[[], object]:
    """Our gate/up kernel where no row has an expert, compiled and run once."""
    from qar_kernels.tile_plan import tile_plan
    from qar_kernels.triton import launch
    from qar_kernels.triton.configs import CONFIGS, select_config
    from qar_kernels.triton.launch import Call
    from qar_kernels.triton.lora import LoraOperands
    from qar_kernels.weights import SwiGLUWeights

    segments = Segments.from_ids(torch.full((x.shape[0],), -1, device=x.device))
    config = CONFIGS[select_config(x.device, x.dtype, x.shape[0], "fused", 1)]
    plan = tile_plan(segments, config.block_rows, config.block_expert)
    one = x.new_zeros(1, 16, x.shape[1])
    experts = SwiGLUWeights(one, one, one.reshape(1, x.shape[1], 16))
    no_lora = LoraOperands.none(x)
    call = Call("fused", SwiGLUWeights(gate, up, gate), experts, segments.perm, plan, 1.0, config, no_lora)
    launch.gate_up(call, x, x, save=False)
    return lambda: launch.gate_up(call, x, x, save=False)
