"""Other block sizes than the shipped ones, timed on a card kernel by kernel.

``python -m benchmarks.tune [--rows 16 256 4096] [--kernels gate_up down ...] [--minutes 5]`` starts each
kernel from its shipped configuration, tries every one that differs in a single number, and goes on from the
fastest until none is faster, or its share of the time is spent. Each must give the shipped one's results
before it is timed. The list that it prints, and leaves as JSON, says what to write into
``qar_kernels/triton/configs.py``; it changes nothing by itself.

T rows, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.clocks import Clock, clock_of
from benchmarks.inputs import Inputs
from benchmarks.machine import describe, versions
from benchmarks.runner import interleave
from benchmarks.session import require_device
from benchmarks.shapes import MODELS, Cell
from qar_kernels.tile_plan import tile_plan
from qar_kernels.triton import launch
from qar_kernels.triton.configs import CONFIGS, Gemm, select_config
from qar_kernels.triton.launch import Call
from qar_kernels.triton.lora import LoraOperands
from train.cli import run
from train.errors import UserError
from train.files import write_atomic

KERNELS = ("gate_up", "down", "d_hidden", "d_x", "weight_grad")
_SMALLEST, _LARGEST = {"block_n": 32, "block_k": 16}, {"block_n": 256, "block_k": 128}
_STAGES = range(1, 7)
_GAIN = 0.98  # of the time: less is noise
Outputs = Callable[[Call], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tried:
    """One configuration of one kernel: its time over the shipped one's, or why it has none."""

    gemm: Gemm
    ratio: float | None
    reason: str = ""


def neighbours(gemm: Gemm) -> Iterator[Gemm]:
    """Every configuration that differs in one number: half or twice as much, or one stage."""
    for field, smallest in _SMALLEST.items():
        for value in (getattr(gemm, field) // 2, getattr(gemm, field) * 2):
            if smallest <= value <= _LARGEST[field]:
                yield replace(gemm, **{field: value})
    yield replace(gemm, warps=12 - gemm.warps)  # 4 or 8
    for stages in (gemm.stages - 1, gemm.stages + 1):
        if stages in _STAGES:
            yield replace(gemm, stages=stages)


def prepare(inputs: Inputs, config: str, tower: str) -> tuple[Call, dict[str, Outputs]]:
    """The shipped call, and for every kernel what it computes under a call with other block sizes.

    ``tower``: "fused", or "expert", which adds to what a base left.
    """
    x, d_y, segments = inputs.x, inputs.d_y, inputs.segments
    blocks = CONFIGS[config]
    plan = tile_plan(segments, blocks.block_rows, blocks.block_expert)
    base_weights = inputs.base if tower == "fused" else inputs.experts
    no_lora = LoraOperands.none(x)
    call = Call(tower, base_weights, inputs.experts, segments.perm, plan, 1.0, blocks, no_lora)
    base, expert = launch.gate_up(call, x, x, save=True)
    d_base, d_expert = launch.d_hidden(call, d_y, d_y, base, expert, keep_h=False)
    base_y = None if tower == "fused" else d_y

    def gate_up(call: Call) -> tuple[Tensor, ...]:
        found, found_expert = launch.gate_up(call, x, x, save=True)
        return _filled(*found[:3], *found_expert[:3])

    def d_hidden(call: Call) -> tuple[Tensor, ...]:
        found, found_expert = launch.d_hidden(call, d_y, d_y, base, expert, keep_h=False)
        return _filled(*found[:2], *found_expert[:3])

    return call, {
        "gate_up": gate_up,
        "down": lambda call: _filled(*launch.down(call, base.h, expert.h, x, base_y)),
        "d_hidden": d_hidden,
        "d_x": lambda call: _filled(*launch.d_input(call, d_base, d_expert, x)),
        "weight_grad": lambda call: tuple(launch.expert_weight_grads(call, x, d_y, d_expert)),
    }


def _filled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Those that the tower has."""
    return tuple(tensor for tensor in tensors if tensor.numel())


def search(
    kernel: str, outputs: Outputs, call: Call, clock: Clock, deadline: float, budget_s: float = 0.1
) -> list[Tried]:
    """The configurations tried, the shipped one first; fewer where the time runs out."""
    best = getattr(call.config, kernel)
    expected = outputs(call)
    tried, fastest = {best: Tried(best, 1.0)}, 1.0
    while True:
        at = best
        for gemm in neighbours(best):
            if gemm in tried:
                continue
            if time.monotonic() > deadline:
                return list(tried.values())
            tried[gemm] = _try(kernel, gemm, outputs, call, expected, clock, budget_s)
            ratio = tried[gemm].ratio
            if ratio is not None and ratio < _GAIN * fastest:
                at, fastest = gemm, ratio
        if at == best:
            return list(tried.values())
        best = at


def _try(
    kernel: str,
    gemm: Gemm,
    outputs: Outputs,
    call: Call,
    expected: tuple[Tensor, ...],
    clock: Clock,
    budget_s: float,
) -> Tried:
    other = replace(call, config=replace(call.config, **{kernel: gemm}))
    try:
        error = max(_distance(got, right) for got, right in zip(outputs(other), expected, strict=True))
    except RuntimeError as failure:  # does not compile for the card, or does not fit
        require_device(expected[0].device.type, failure)
        return Tried(gemm, None, str(failure).splitlines()[0][:200])
    # Both add in fp32 and round once: they differ in the order of sums.
    if not error <= 4 * torch.finfo(expected[0].dtype).eps:
        return Tried(gemm, None, f"results differ by {error:.1e}")
    ms = interleave({"shipped": lambda: outputs(call), "other": lambda: outputs(other)}, clock, budget_s)
    return Tried(gemm, ms["other"].p50 / ms["shipped"].p50)


def _distance(got: Tensor, right: Tensor) -> float:
    return ((got.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30)).item()


def rows_of(args: argparse.Namespace, device: str) -> Iterator[dict]:
    """One result per number of rows, tower, kernel and configuration, printed as it is found."""
    clock, deadline = clock_of(device), time.monotonic()
    work = [
        (rows, *tower)
        for rows in args.rows
        for tower in _towers(rows, min(args.queriers, rows), args.dtype, device)
    ]
    share = 60 * args.minutes / len(work) / len(args.kernels)
    hidden, inter = MODELS[args.model]
    for rows, tower, config in work:
        queriers = min(args.queriers, rows)
        cell = Cell(rows, queriers, queriers, args.rank, hidden, inter, args.dtype)
        call, kernels = prepare(Inputs.draw(cell, device, training=False), config, tower)
        for kernel in args.kernels:
            deadline += share
            for tried in search(kernel, kernels[kernel], call, clock, deadline):
                sys.stdout.write(_line(rows, config, kernel, tried) + "\n")
                sys.stdout.flush()
                yield {"config": config, "kernel": kernel, **asdict(cell), **asdict(tried)}


def _towers(rows: int, queriers: int, dtype: str, device: str) -> list[tuple[str, str]]:
    """Base with experts, and the experts beside a library's base where they have their own block sizes."""
    kind = torch.device(device), getattr(torch, dtype), rows
    names = {select_config(*kind, tower, queriers): tower for tower in ("expert", "fused")}
    return [(tower, name) for name, tower in reversed(names.items())]


def _line(rows: int, config: str, kernel: str, tried: Tried) -> str:
    gemm, ratio = tried.gemm, tried.ratio
    value = f"Gemm({gemm.block_n}, {gemm.block_k}, warps={gemm.warps}, stages={gemm.stages})"
    outcome = f"{ratio:.3f} of the shipped time" if ratio is not None else f"refused: {tried.reason}"
    return f"T {rows:<6} {config:11} {kernel:12} {value:38} {outcome}"


def main(argv: list[str] | None = None) -> None:
    """Tune on this machine's card."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="Llama-3-8B")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--queriers", type=int, default=64, help="present, at most one a row")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--minutes", type=float, default=5.0, help="for all kernels together")
    parser.add_argument("--out", type=Path, help="default: runs/tune/MACHINE-DATE.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: nothing was tuned")
    machine = describe("cuda")
    out = args.out or Path("runs/tune") / f"{machine['name']}-{machine['date']}.json"
    result = {"machine": machine, "versions": versions(), "rows": []}
    for row in rows_of(args, "cuda"):
        result["rows"].append(row)
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    run(main)
