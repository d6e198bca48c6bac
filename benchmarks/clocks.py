"""Clocks: one thread's processor time on a CPU, events around a flushed cache on a card."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the last-level cache of any card
_GRAPH_WARM_UPS = 3

Call = Callable[[], object]


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
    """Device time between two events; the L2 cache is overwritten before each call."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def prepare(self, call: Call, graph: bool) -> Call:
        """A replay of the captured call where ``graph``."""
        if not graph:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        return captured.replay

    def sample(self, call: Call) -> Callable[[], float]:
        """One call behind a flush, which also hides the host's latency as a busy queue would."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        """Until the device is idle."""
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """The clock of ``"cpu"`` or ``"cuda"``; on a CPU this process then runs one thread."""
    if device == "cuda":
        return CudaClock()
    torch.set_num_threads(1)
    return ProcessClock()
