"""Which of the two Triton paths runs: base and experts in the same launches, or a vendor-library base MLP
with grouped expert kernels beside it.

T rows, Q segments, H hidden, I intermediate, R expert rank. What was measured decides; where nothing was
measured, a rule does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from qar_kernels.dispatch_steps import Steps, faster_path, measured_steps
from qar_kernels.dispatch_table import MEASUREMENTS
from qar_kernels.distributed import num_ranks

PATHS = ("fused", "grouped")
OVERRIDE = "QAR_KERNELS_PATH"

# A segment that meets a row tile costs that whole tile R/I more matrix work, whoever owns the rows:
# +0.45 % at R 64, I 14336. Beyond 16 per tile (+7 %) the grouped path does less work.
_MAX_SEGMENTS_PER_TILE = 16
_ROW_TILE = 128
# Up to here reading the base weights is about the bottleneck (cards do 150 to 300 operations per byte), and
# fewer launches and passes win. Beyond, matrix products are: the vendor library's are the safe choice.
_FUSED_ROWS = 512
# Without a matrix unit, a tile of 64 rows costs more than reading the weights, even for a single row.
_EXACT = "float32"


@dataclass(frozen=True)
class Shape:
    """What the choice depends on besides the device.

    Attributes:
        rows, segments: T, and Q or an upper bound on it (the host does not know which ids came).
        hidden, intermediate, rank: H, I, R.
        dtype: such as ``"bfloat16"``.
        training: whether a backward pass follows.
        adapted: whether base projections have adapters.
    """

    rows: int
    segments: int
    hidden: int
    intermediate: int
    rank: int
    dtype: str
    training: bool
    adapted: bool = False


def choose_path(device: torch.device, shape: Shape) -> str:
    """``"fused"`` or ``"grouped"``.

    ``QAR_KERNELS_PATH=fused|grouped`` in the environment overrides it. If several ranks train, all take
    the same path.

    Raises:
        ValueError: if the environment names another path.
    """
    forced = os.environ.get(OVERRIDE)
    if forced:
        if forced not in PATHS:
            raise ValueError(f"{OVERRIDE}: got {forced!r}, expected one of {', '.join(PATHS)}")
        return forced
    if shape.training and _several_ranks():
        # Ranks differ in their number of rows, and the paths produce gradients in different orders:
        # frameworks that pack gradients as they arrive (ZeRO) would add up those of different parameters.
        return "fused" if shape.adapted and shape.dtype != _EXACT else "grouped"
    return _measured(_device_name(device), shape) or default_path(shape)


def _measured(device: str, shape: Shape) -> str | None:
    steps = _steps(device, shape.dtype, shape.training, shape.adapted)
    return faster_path(steps, shape.hidden, shape.intermediate, shape.rank, shape.segments, shape.rows)


# sizes are compared with a few constants: under ``torch.compile`` each comparison is a guard
@torch.compiler.assume_constant_result
def _steps(*kind: str | bool) -> tuple[tuple[int, int, Steps], ...]:
    return _cached_steps(*kind)


@lru_cache(maxsize=1024)
def _cached_steps(*kind: str | bool) -> tuple[tuple[int, int, Steps], ...]:
    return measured_steps(MEASUREMENTS, *kind)


@torch.compiler.assume_constant_result
def _several_ranks() -> bool:
    return num_ranks() > 1


@torch.compiler.assume_constant_result
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def default_path(shape: Shape) -> str:
    """The rule where nothing was measured: fused while rows are few and a row tile meets few segments.

    With adapters also where rows are many: outside the kernels each is two more passes over (T, I). Never in
    fp32.
    """
    if shape.dtype == _EXACT:
        return "grouped"
    tiles = max(1, -(-shape.rows // _ROW_TILE))
    if shape.segments > _MAX_SEGMENTS_PER_TILE * tiles:
        return "grouped"
    return "fused" if shape.rows <= _FUSED_ROWS or shape.adapted else "grouped"
