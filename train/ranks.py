"""The processes of one run: how they find each other, and what only one of them does.

One process per accelerator, started by ``torchrun`` or ``deepspeed``; without a launcher there is one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from train.errors import UserError
from train.files import read_json

TIMEOUT = timedelta(minutes=30)  # rank 0 may run the frozen layers over all windows while the others wait
_LAUNCH = "start with torchrun --nproc-per-node N -m train.finetune, or deepspeed train/finetune.py"


def launched() -> bool:
    """Whether ``torchrun`` or ``deepspeed`` started this process."""
    return "LOCAL_RANK" in os.environ


def start(deepspeed: str | None) -> None:
    """Join the other ranks, once; without a launcher there is nothing to join.

    Called before the model is loaded. DeepSpeed's configuration is not in force yet, so that every rank
    builds the whole model (and converts and cuts it); ZeRO-3 shards it when training starts.

    Raises:
        UserError: if DeepSpeed is asked for without its package, a readable file or a launcher, or if one
            process would have to serve several GPUs.
    """
    cards = torch.cuda.device_count()
    if deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed: the package is not installed (pip install '.[deepspeed]')")
    if deepspeed is not None:
        _check_deepspeed(Path(deepspeed))
    if deepspeed is not None and not launched():
        raise UserError(f"deepspeed: there is no launcher; {_LAUNCH}")
    if cards > 1 and not launched():
        raise UserError(f"{cards} GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0, or {_LAUNCH}")
    if not launched() or PartialState._shared_state:
        return
    if deepspeed is None:
        PartialState(cpu=not cards, timeout=TIMEOUT)
        return
    if not cards:
        import deepspeed.ops as ops

        # hides its compiled operations: the one it would build here (two minutes, and it needs a compiler) is
        # for inference only
        ops.__compatible_ops__ = {}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as accelerate's own launcher tells it
    PartialState(backend="nccl" if cards else "gloo", timeout=TIMEOUT)


def _check_deepspeed(path: Path) -> None:
    for section in ("optimizer", "scheduler"):
        if section in read_json(path, ()):
            raise UserError(
                f"{path}: remove the section '{section}', which would replace LoRA's and the experts' "
                "learning rates by one; the run's own settings apply"
            )


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) if launched() else 1


def from_main(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def on_any(value: bool) -> bool:
    """Whether ``value`` holds on any rank; all ranks must call this."""
    if world_size() == 1:
        return value
    found = torch.tensor(int(value), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def wait() -> None:
    """Wait for the other ranks."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find its cached files."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def watching() -> Iterator[None]:
    """Within the block, the death of another rank ends this one with a one-line error.

    The connection to a dead process breaks at once; a process that hangs is given up after ``TIMEOUT``.
    """
    try:
        yield
    except RuntimeError as error:  # what gloo raises; NCCL's is a subclass
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if world_size() == 1 or not lost:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"another rank was lost ({reason}); its own output says why; --resume continues"
        ) from error


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block every rank has these parameters whole, even if ZeRO-3 shards them."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
