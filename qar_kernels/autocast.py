"""What autocast does to the arguments: cast as ``F.linear`` would, of the experts only those in the batch.

E experts owned, C segment capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qar_kernels.segments import Segments

Three = tuple[Tensor, Tensor, Tensor]


def cast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that ``tensor`` is computed in: autocast's where that is on, but for float64."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(
        device_type
    ):  # meta has no autocast, and raises
        return tensor.dtype
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if casts else tensor.dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtypes that they are computed in."""
    return tuple(tensor.to(cast_dtype(tensor)) for tensor in tensors)


def autocast_experts(experts: Three, segments: Segments) -> tuple[Three, Segments]:
    """The experts ``(E, ...)`` in the dtype that they are computed in, and segments that index them.

    A bank of thousands is not cast for a batch of a few: their rows are taken first. How many they are is
    known on the host where reading it is free; elsewhere there are at most C.
    """
    if cast_dtype(experts[0]) == experts[0].dtype:
        return experts, segments
    is_known = segments.device.type == "cpu" and not torch.compiler.is_compiling()
    ids, renumbered = segments.present if is_known else segments.slots
    if ids.shape[0] < experts[0].shape[0]:
        experts, segments = tuple(weight.index_select(0, ids) for weight in experts), renumbered
    return autocast(*experts), segments
