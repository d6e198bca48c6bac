"""Time and peak memory of every provider over T x Q on one card, as JSON.

``python -m benchmarks.bench_gpu [--model Llama-3-8B] [--rank 64] [--out FILE]``. T rows, Q queriers.
First the card is calibrated: copy bandwidth, vendor-library GEMM rate, and our gate/up kernel on base
tiles alone (two accumulators) against it. Forward is without gradients, "fwd+bwd" has the base frozen.
For T <= 256 a call is captured in a CUDA graph. Every provider is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

from qar_kernels import Segments
from qar_kernels.triton import launch
from qar_kernels.triton.configs import CONFIGS, DECODE_ROWS, select_config
from qar_kernels.triton.launch import Call, Weights

from .providers import PROVIDERS, Inputs, verify
from .shapes import MODELS, Cell, matrix

_QUANTILES = (0.2, 0.5, 0.8)
# Reading the ids on the host or allocating by them cannot be captured.
_NO_GRAPH = ("loop", "grouped_mm", "base_compiled")
_GATHER_LIMIT = 32 * 2**30


def rows_of(model: str, rank: int) -> Iterator[dict]:
    """One result per cell, pass and provider."""
    for cell in matrix(model, rank):
        for training in (False, True):
            inputs = Inputs.draw(cell, "cuda", trains_experts=training)
            base_ms = None
            for name in PROVIDERS:
                if name == "gather_bmm" and 6 * cell.T * cell.R * cell.H > _GATHER_LIMIT:
                    continue
                verify(name, inputs)
                ms, peak = _measure(name, inputs, training, graph=cell.T <= DECODE_ROWS)
                base_ms = base_ms or ms["p50"]
                yield _row(name, cell, training, ms, peak, base_ms)


def _row(name: str, cell: Cell, training: bool, ms: dict, peak: int, base_ms: float) -> dict:
    return {
        "op": "fused_mlp",
        "provider": name,
        "pass": "fwd+bwd" if training else "fwd",
        **asdict(cell),
        "ms": ms,
        "peak_bytes": peak,
        "ratio_to_base": ms["p50"] / base_ms,
    }


def _measure(name: str, inputs: Inputs, training: bool, graph: bool) -> tuple[dict[str, float], int]:
    wanted = [t for t in (inputs.x, *inputs.experts) if t.requires_grad]
    d_y = torch.randn_like(inputs.x)

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = PROVIDERS[name](inputs)
        if training:
            torch.autograd.grad(y, wanted, d_y, allow_unused=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    bench = triton.testing.do_bench_cudagraph if graph and name not in _NO_GRAPH else triton.testing.do_bench
    times = bench(step, quantiles=_QUANTILES)
    return dict(zip(("p20", "p50", "p80"), times, strict=True)), peak


def calibrate(model: str) -> dict[str, float]:
    """The card's ceilings and the ratio that decides about large T."""
    hidden, inter = MODELS[model]
    rows = 4096
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = _median(lambda: target.copy_(source))
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    gate, up = (torch.randn(inter, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    both = torch.cat([gate, up])
    gemm_ms = _median(lambda: x @ both.t())
    ours_ms = _median(_base_gate_up(x, gate, up))
    return {
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / copy_ms * 1e3,
        "gemm_flops_per_s": 4 * rows * hidden * inter / gemm_ms * 1e3,
        "library_gemm_over_gate_up_kernel": gemm_ms / ours_ms,
    }


def _base_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Callable[[], object]:
    """Our gate/up kernel where no row has an expert."""
    segments = Segments.from_ids(torch.full((x.shape[0],), -1, device=x.device))
    config = CONFIGS[select_config(x.device, x.dtype, x.shape[0])]
    plan = segments.tile_plan(config.block_rows, config.block_expert)
    one = x.new_zeros(1, 16, x.shape[1])
    experts = Weights(one, one, one.reshape(1, x.shape[1], 16))
    call = Call("fused", Weights(gate, up, gate), experts, segments.perm, plan, 1.0, config)
    return lambda: launch.gate_up(call, x, x, save=False)


def _median(step: Callable[[], object]) -> float:
    return triton.testing.do_bench(step, quantiles=[0.5])


def main(argv: list[str] | None = None) -> int:
    """Write the results; returns 1, saying so in one line, where there is no card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="Llama-3-8B")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stdout.write("bench-gpu: no CUDA device on this machine, nothing was measured\n")
        return 1
    result = {
        "machine": {"device": torch.cuda.get_device_name(), "calibration": calibrate(args.model)},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "rows": [],
    }
    out = args.out or Path(__file__).with_name("results") / f"{args.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows_of(args.model, args.rank):
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=1))  # a run that is cut short keeps what it has
        sys.stdout.write(
            f"{row['pass']:8} T={row['T']:<6} Q={row['Q']:<4} {row['provider']:15} "
            f"{row['ms']['p50']:9.4f} ms  {row['ratio_to_base']:7.3f}\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
