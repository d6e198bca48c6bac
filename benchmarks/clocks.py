"""Clocks: one thread's processor time on a CPU, events around a flushed cache on a card."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Protocol

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the last-level cache of any card
_GRAPH_WARM_UPS = 3
_HEAD_START = 600_000  # cycles, about 0.3 ms: what the host takes to launch a training step
# options of glibc's mallopt: no buffer is a mapping of its own, and the heap's free end is kept
_MMAP_MAX, _TRIM_THRESHOLD, _MOST = -4, -1, 2**31 - 1

Call = Callable[[], object]


class CaptureError(Exception):
    """A call could not be captured into a CUDA graph.

    PyTorch 2.11 does not undo its bookkeeping then, and later work of the process ends in internal errors.
    """


class Clock(Protocol):
    """Times single calls."""

    def prepare(self, call: Call, graph: bool) -> Call:
        """What is timed in place of ``call``: where ``graph``, its replay, if the device has graphs."""

    def sample(self, call: Call) -> Callable[[], float]:
        """Run ``call`` once; the result gives the milliseconds after :meth:`wait`."""

    def wait(self) -> None:
        """Until all samples are done."""


class ProcessClock:
    """Processor time of this process, which must run one thread: other work on the machine does not count."""

    def prepare(self, call: Call, graph: bool) -> Call:
        """The call itself."""
        return call

    def sample(self, call: Call) -> Callable[[], float]:
        """One call."""
        start = time.process_time_ns()
        call()
        spent = (time.process_time_ns() - start) / 1e6
        return lambda: spent

    def wait(self) -> None:
        """Nothing runs behind the call."""


class CudaClock:
    """Device time between two events; before each call the L2 cache is filled with something else.

    By reading: lines that were written would be written back while the call runs, at its expense.
    """

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def prepare(self, call: Call, graph: bool) -> Call:
        """A replay of the captured call where ``graph``.

        Raises:
            CaptureError: if the call does what no graph can hold.
        """
        if not graph:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                call()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        return captured.replay

    def sample(self, call: Call) -> Callable[[], float]:
        """One call behind a flush; a wait hides the launches of the host, as a busy queue would."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        if not isinstance(getattr(call, "__self__", None), torch.cuda.CUDAGraph):
            torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        """Until the device is idle."""
        torch.cuda.synchronize()


def keep_memory() -> None:
    """Let freed buffers stay with the process, where the C library is one that can.

    Else every large one is mapped anew at each call, and what a fresh page costs is up to the system: on a
    virtual machine training steps that clear 100 MB took 3 or 25 ms, now 2.9 to 3.0.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _MOST)


def clock_of(device: str) -> Clock:
    """The clock of ``"cpu"`` or ``"cuda"``; for a CPU this process gets one thread and keeps its memory."""
    if device == "cuda":
        return CudaClock()
    torch.set_num_threads(1)
    keep_memory()
    return ProcessClock()
