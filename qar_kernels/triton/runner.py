"""The one place where a kernel is launched, or recorded for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.errors import TritonError


@dataclass(frozen=True)
class Recorded:
    """A launch that was asked for: the kernel, its positional arguments and its keyword arguments."""

    kernel: object
    args: tuple
    meta: dict


_recorded: list[Recorded] | None = None


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Collect launches instead of running them: what is compiled ahead of time is what would run."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def run_kernel(kernel: object, grid: tuple[int, ...], *args: object, **meta: object) -> None:
    """Launch ``kernel`` over ``grid``; inside :func:`recording`, only note it down.

    Raises:
        RuntimeError: if the kernel cannot be compiled for this device or launched on it.
    """
    if _recorded is not None:
        _recorded.append(Recorded(kernel, args, meta))
        return
    try:
        with _device_of(args):
            kernel[grid](*args, **meta)
    except (TritonError, RuntimeError) as error:  # the driver and the compiler's passes raise the latter
        raise RuntimeError(
            f"{kernel.__name__}: {type(error).__name__} while it was compiled or launched: {error}. Made for "
            'NVIDIA devices of compute capability 8.0, 9.0 or 10.0; backend="torch" does without, and '
            "QAR_KERNELS_PATH=grouped leaves at least the base MLP to the vendor library"
        ) from error


def _device_of(args: tuple) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' (``device_map="auto"``)."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor) and arg.is_cuda), None)
    return nullcontext() if tensor is None else torch.cuda.device_of(tensor)
