"""The one place where a kernel is launched, or recorded for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
    """Launch ``kernel`` over ``grid``; inside :func:`recording`, only note it down."""
    if _recorded is not None:
        _recorded.append(Recorded(kernel, args, meta))
    else:
        kernel[grid](*args, **meta)
