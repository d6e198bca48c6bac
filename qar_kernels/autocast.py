"""In which dtype is computed: autocast's, as ``F.linear`` would, and for the experts that of their rows.

E experts owned, C segment capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qar_kernels.host import is_readable
from qar_kernels.segments import Segments
from qar_kernels.weights import SwiGLUWeights


def is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    # the meta device has no autocast, and raises
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def cast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that ``tensor`` is computed in: autocast's where that is on, but for float64."""
    casts = is_on(tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if casts else tensor.dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtypes that they are computed in."""
    if not is_on(tensors[0]):
        return tensors
    return tuple(tensor.to(cast_dtype(tensor)) for tensor in tensors)


def cast_experts(
    experts: SwiGLUWeights, segments: Segments, dtype: torch.dtype
) -> tuple[SwiGLUWeights, Segments]:
    """The experts ``(E, ...)`` in ``dtype``, that of their rows, and segments that index them.

    A bank of thousands is not cast for a batch of a few: the rows of the experts present are taken first. How
    many they are is known where the host may read it; elsewhere there are at most C. Gradients come back to
    the bank in its own dtype.
    """
    ids, renumbered = segments.present if is_readable(segments.row_expert) else segments.slots
    if ids.shape[0] < experts.gate.shape[0]:
        experts, segments = [weight.index_select(0, ids) for weight in experts], renumbered
    return SwiGLUWeights(*(weight.to(dtype) for weight in experts)), segments
