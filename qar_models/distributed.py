"""Collectives of the contrastive loss and of row-sparse gradients."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qar_kernels.distributed import num_ranks


def check_not_sharded(module: nn.Module, what: str) -> None:
    """Raise ``NotImplementedError`` if parameters are FSDP2's shards, naming ``what`` needs them whole."""
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise NotImplementedError(
            f"{what}: got sharded parameters (fully_shard), expected whole ones; do it before sharding, or "
            "to a model that loads the saved weights"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, told without importing what PyTorch may be built without."""
    return hasattr(tensor, "full_tensor")


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of every rank's ``tensor``, without gradient."""
    mean = tensor.detach() / num_ranks()
    if num_ranks() > 1:
        dist.all_reduce(mean)
    return mean


def gather_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate each tensor along its batch dimension over all ranks, in order of rank.

    The batch dimension is the first one of ``(B,)`` tensors and the second one of ``(views, B, P)``.
    Ranks may hold batches of different size (the last batch of an epoch); shorter ones are padded for
    the exchange. No gradient flows through.
    """
    if num_ranks() == 1:
        return tensors
    lengths = _gather_lengths(tensors[-1].shape[0])
    return tuple(_gather_padded(tensor, lengths) for tensor in tensors)


def _gather_lengths(length: int) -> list[int]:
    """The batch size of every rank, exchanged between hosts so as not to wait for the device."""
    size = torch.tensor([length])
    sizes = [torch.empty_like(size) for _ in range(num_ranks())]
    dist.all_gather(sizes, size, group=_host_group(dist.group.WORLD))
    return torch.cat(sizes).tolist()


@functools.lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


def _gather_padded(tensor: Tensor, lengths: list[int]) -> Tensor:
    dim = 0 if tensor.dim() == 1 else 1
    local = tensor.movedim(dim, 0).contiguous()
    # gloo and NCCL have no boolean all_gather
    local = local.to(torch.uint8) if tensor.dtype == torch.bool else local
    padding = [0, 0] * (local.dim() - 1) + [0, max(lengths) - local.shape[0]]
    padded = F.pad(local, padding)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    joined = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return joined.to(tensor.dtype).movedim(0, dim)
