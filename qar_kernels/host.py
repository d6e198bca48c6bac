"""What the host may do at this moment: read a tensor's values, keep what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read the values of ``tensor`` without waiting for a device.

    Not those of an accelerator's tensor, and not where there are none: while ``torch.compile`` traces, in
    fake tensors, and in other subclasses, which may stand for anything.
    """
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def is_capturing() -> bool:
    """Whether work is recorded into a CUDA graph: its results hold nothing until the graph is replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
