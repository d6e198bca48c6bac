"""Launch configurations: block sizes, warps and pipeline stages per architecture and batch size.

T rows, H hidden, I intermediate, R expert rank. None of these was tuned on a card yet: the block sizes
are those that compile for the architecture without spills and within its shared memory
(``python -m qar_kernels.inspect``).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch

# A tile of 64 x 64 reads every operand twice as often as one of 128 x 128: at 8B size and 256 rows 1.4 GB
# pass between L2 cache and multiprocessors for gate/up alone, twice what the larger tile moves. Not measured.
DECODE_ROWS = 64
# Up to so many rows a segment, at the most segments there can be, tiles of 64 are mostly empty: one program
# of gate/up and three of down fit on a multiprocessor, with tiles of 16 three and four (R 64). Not measured.
SHORT_SEGMENT = 16

# Configurations of each compute capability that the kernels were compiled for and fit on.
FAMILIES = {(8, 0): "sm80", (8, 6): "sm80", (8, 9): "sm80", (9, 0): "sm90", (10, 0): "sm90", (12, 0): "sm80"}


@dataclass(frozen=True)
class Gemm:
    """One GEMM kernel: columns per tile, depth per step, warps and pipeline stages.

    Attributes:
        tight_stages: stages where ranks leave less room than usual, see ``launch``; default the same.
        programs: persistent programs for each multiprocessor, as many as fit on it; tiles of segments alone
            have a number of their own.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    tight_stages: int | None = None
    programs: int = 1


@dataclass(frozen=True)
class LaunchConfig:
    """Everything that a launch needs besides the tensors.

    Attributes:
        block_rows: dense rows per base tile, in every kernel: one tile plan serves them all.
        block_expert: rows per tile of a segment.
        group: row tiles that share a column of weights before the next column is read.
        gate_up, down, d_hidden, d_x, weight_grad: the five kernels.
        tma: read dense operands through tensor descriptors.
        max_splits: parts that the K loops of ``down`` and ``d_x`` may have where tiles are too few.
    """

    block_rows: int
    block_expert: int
    group: int
    gate_up: Gemm
    down: Gemm
    d_hidden: Gemm
    d_x: Gemm
    weight_grad: Gemm
    tma: bool = False
    max_splits: int = 1


CONFIGS = {
    "sm90_large": LaunchConfig(
        block_rows=128,
        block_expert=64,
        group=8,
        # one program a multiprocessor whatever the stages, for registers: so as many as fit (192 KiB of 227)
        gate_up=Gemm(128, 64, warps=8, stages=4, tight_stages=3),
        down=Gemm(256, 64, warps=8, stages=4, tight_stages=3),
        d_hidden=Gemm(128, 64, warps=8, stages=4),
        d_x=Gemm(256, 64, warps=8, stages=4, tight_stages=3),
        weight_grad=Gemm(64, 64, warps=4, stages=3),
        tma=True,
        max_splits=8,
    ),
    "sm90_decode": LaunchConfig(
        block_rows=64,
        block_expert=16,
        group=4,
        # at Llama-3-8B's width gate_up and d_hidden have 224 tiles for 132 multiprocessors, down and d_x 192:
        # with two programs on each all run at a time, with one there are two rounds, the second half empty
        gate_up=Gemm(64, 64, warps=4, stages=4, tight_stages=3, programs=2),
        down=Gemm(64, 128, warps=4, stages=3, programs=2),
        d_hidden=Gemm(64, 128, warps=4, stages=3, programs=2),
        d_x=Gemm(64, 128, warps=4, stages=3, programs=2),
        weight_grad=Gemm(64, 32, warps=4, stages=3),
        tma=True,
        max_splits=8,
    ),
    "sm90_experts": LaunchConfig(
        block_rows=128,
        block_expert=64,
        group=8,
        gate_up=Gemm(64, 128, warps=8, stages=4),
        down=Gemm(128, 64, warps=4, stages=2),
        d_hidden=Gemm(64, 128, warps=8, stages=4),
        d_x=Gemm(128, 64, warps=4, stages=2),
        weight_grad=Gemm(64, 64, warps=4, stages=3),
    ),
    "sm90_short": LaunchConfig(
        block_rows=128,
        block_expert=16,
        group=8,
        gate_up=Gemm(64, 128, warps=4, stages=3),
        down=Gemm(128, 64, warps=8, stages=2),
        d_hidden=Gemm(64, 128, warps=4, stages=4),
        d_x=Gemm(64, 64, warps=4, stages=2),
        weight_grad=Gemm(64, 32, warps=4, stages=3),
    ),
    "sm80_large": LaunchConfig(
        block_rows=128,
        block_expert=64,
        group=8,
        gate_up=Gemm(64, 64, warps=8, stages=3),
        down=Gemm(128, 64, warps=8, stages=3),
        d_hidden=Gemm(128, 64, warps=8, stages=3),
        d_x=Gemm(128, 64, warps=8, stages=3),
        weight_grad=Gemm(64, 64, warps=8, stages=3),
        max_splits=8,
    ),
    "sm80_decode": LaunchConfig(
        block_rows=64,
        block_expert=16,
        group=4,
        # with 4 stages R 128 needs 102 KiB in gate_up; 8.6, 8.9 and 12.0 have 99
        gate_up=Gemm(64, 64, warps=4, stages=3, programs=2),
        down=Gemm(64, 64, warps=4, stages=4, programs=2),
        d_hidden=Gemm(64, 64, warps=4, stages=4, programs=2),
        d_x=Gemm(64, 64, warps=8, stages=3),
        weight_grad=Gemm(64, 32, warps=4, stages=3),
        max_splits=8,
    ),
    "sm80_experts": LaunchConfig(
        block_rows=128,
        block_expert=64,
        group=8,
        gate_up=Gemm(64, 64, warps=8, stages=3),
        down=Gemm(64, 64, warps=4, stages=2),
        d_hidden=Gemm(64, 64, warps=8, stages=3),
        d_x=Gemm(64, 64, warps=4, stages=2),
        weight_grad=Gemm(64, 64, warps=8, stages=3),
    ),
    "sm80_short": LaunchConfig(
        block_rows=128,
        block_expert=16,
        group=8,
        gate_up=Gemm(64, 64, warps=4, stages=3),
        down=Gemm(64, 64, warps=4, stages=2),
        d_hidden=Gemm(64, 64, warps=4, stages=4),
        d_x=Gemm(128, 64, warps=4, stages=2),
        weight_grad=Gemm(64, 32, warps=4, stages=3),
    ),
    "fp32": LaunchConfig(
        block_rows=64,
        block_expert=32,
        group=8,
        gate_up=Gemm(32, 16, warps=8, stages=2),  # larger ones spill in one version of Triton or another
        down=Gemm(64, 32, warps=8, stages=2),
        d_hidden=Gemm(64, 32, warps=8, stages=2),
        d_x=Gemm(64, 32, warps=8, stages=2),
        weight_grad=Gemm(64, 32, warps=4, stages=2),
    ),
    # Several tiles even for tiny shapes: what the interpreter's tests run. Descriptors work there too.
    "tiny": LaunchConfig(
        block_rows=16,
        block_expert=16,
        group=2,
        gate_up=Gemm(32, 32, warps=4, stages=1),
        down=Gemm(32, 32, warps=4, stages=1),
        d_hidden=Gemm(32, 32, warps=4, stages=1),
        d_x=Gemm(32, 32, warps=4, stages=1),
        weight_grad=Gemm(32, 16, warps=4, stages=1),
    ),
}


def select_config(device: torch.device, dtype: torch.dtype, rows: int, tower: str, segments: int) -> str:
    """Name of the configuration for a device, dtype, rows and tower; "tiny" on a CPU (interpreter).

    ``segments``: the most that there can be, as the host knows it without looking at the ids.
    """
    if device.type != "cuda":
        return "tiny"
    if dtype == torch.float32:
        return "fp32"
    family = FAMILIES.get(_capability(device), "sm80")
    if rows <= DECODE_ROWS:
        return f"{family}_decode"
    if tower != "expert":
        return f"{family}_large"
    return f"{family}_short" if rows <= SHORT_SEGMENT * segments else f"{family}_experts"


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels are known to compile for and fit on a device; warns of a CUDA device if not."""
    return _has_kernels(device)  # separate, because dynamo warns about cached functions


@cache
def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if torch.version.hip is None and _capability(device) in FAMILIES:
        return True
    known = ", ".join(f"{major}.{minor}" for major, minor in sorted(FAMILIES))
    warnings.warn(
        f"qar_kernels: {device} is none of NVIDIA's compute capabilities {known}, for which the Triton "
        "kernels were compiled; backend 'auto' is 'torch' there",
        stacklevel=2,
    )
    return False


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
