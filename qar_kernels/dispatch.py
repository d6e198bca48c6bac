"""Which of the two Triton paths runs ``fused_mlp``: one fused operation, or a vendor-library base MLP
with grouped expert kernels added to it.

T rows, Q segments. What was measured decides; where nothing was measured, a rule does.
"""

from __future__ import annotations

import os

import torch

from qar_kernels.dispatch_table import MEASUREMENTS

PATHS = ("fused", "grouped")
OVERRIDE = "QAR_KERNELS_PATH"

# A segment that meets a row tile costs that whole tile R/I more matrix work, whoever owns the rows:
# +0.45 % at R 64, I 14336. Beyond 16 per tile (+7 %) the grouped path does less work.
_MAX_SEGMENTS_PER_TILE = 16
_ROW_TILE = 128


def choose_path(device: torch.device, hidden: int, intermediate: int, rows: int, segments: int) -> str:
    """``"fused"`` or ``"grouped"`` for a call of T ``rows`` with at most Q ``segments``.

    ``QAR_KERNELS_PATH=fused|grouped`` in the environment overrides it.

    Raises:
        ValueError: if the environment names another path.
    """
    forced = os.environ.get(OVERRIDE)
    if forced:
        if forced not in PATHS:
            raise ValueError(f"{OVERRIDE}: got {forced!r}, expected one of {', '.join(PATHS)}")
        return forced
    name = _device_name(device)
    measured = measured_path(MEASUREMENTS, name, hidden, intermediate, rows, segments)
    return measured or default_path(rows, segments)


@torch.compiler.assume_constant_result
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def default_path(rows: int, segments: int) -> str:
    """The rule where nothing was measured: fused while a row tile meets few segments."""
    tiles = max(1, -(-rows // _ROW_TILE))
    return "fused" if segments <= _MAX_SEGMENTS_PER_TILE * tiles else "grouped"


def measured_path(
    table: list[dict], device: str, hidden: int, intermediate: int, rows: int, segments: int
) -> str | None:
    """The faster path in the nearest measured cell of that device and shape, None if there is none.

    A cell is near when T and Q are within a factor of two; the nearest has the least product of factors.
    """
    near = []
    for cell in table:
        if (cell["device"], cell["H"], cell["I"]) != (device, hidden, intermediate):
            continue
        factors = [max(a, b) / min(a, b) for a, b in ((cell["T"], rows), (cell["Q"], max(segments, 1)))]
        if max(factors) <= 2:
            near.append((factors[0] * factors[1], cell["fused_over_grouped"]))
    if not near:
        return None
    return "fused" if min(near)[1] <= 1 else "grouped"
