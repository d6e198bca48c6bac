"""Processes that train together."""

from __future__ import annotations

import torch.distributed as dist


def num_ranks() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
