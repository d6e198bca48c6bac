"""The one place where a kernel is launched, or recorded for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.errors import TritonError


@dataclass(frozen=True)
class Recorded:
    """A launch that was asked for: the kernel, its grid, its positional and its keyword arguments."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    meta: dict


# Local to a context, so that a thread that records does not swallow another thread's launches.
_launcher: ContextVar[Callable[[Recorded], object] | None] = ContextVar("launcher", default=None)


@contextmanager
def launching_by(launcher: Callable[[Recorded], object]) -> Iterator[None]:
    """Hand launches to ``launcher`` instead of Triton, to be collected, compiled or emulated."""
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Collect launches instead of running them, so that exactly what would run is compiled ahead of time."""
    launches: list[Recorded] = []
    with launching_by(launches.append):
        yield launches


def run_kernel(kernel: object, grid: tuple[int, ...], *args: object, **meta: object) -> None:
    """Launch ``kernel`` over ``grid``; inside :func:`launching_by`, hand it over instead.

    Raises:
        RuntimeError: if the kernel cannot be compiled for this device or does not fit on it. Other errors,
            such as an earlier kernel's that CUDA reports late, pass through unchanged.
    """
    launcher = _launcher.get()
    if launcher is not None:
        launcher(Recorded(kernel, grid, args, meta))
        return
    try:
        with _device_of(args):
            kernel[grid](*args, **meta)
    except (TritonError, RuntimeError) as error:  # the compiler's passes raise the latter
        if "CUDA" in str(error):
            raise
        raise RuntimeError(
            f"{kernel.__name__}: {type(error).__name__} while it was compiled or launched: {error}. Made for "
            'the devices of qar_kernels.triton.configs.FAMILIES; backend="torch" does without, and '
            "QAR_KERNELS_PATH=grouped leaves at least the base MLP to the vendor library"
        ) from error


def cdiv(rows: int, block: int) -> int:
    """Blocks that cover ``rows``; ``triton.cdiv`` is made for kernels and costs the host 2 us a call."""
    return -(-rows // block)


def _device_of(args: tuple) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' (``device_map="auto"``)."""
    index = next((arg.get_device() for arg in args if isinstance(arg, Tensor)), -1)  # -1: not on a card
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
