"""Peak memory and launches of single calls, measured apart from their time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.clocks import Call

_MARK = "benchmark:"


@dataclass(frozen=True)
class Footprint:
    """What one call takes.

    Attributes:
        peak_bytes: most memory that PyTorch held during the call above what it held before.
        launches: kernels launched by the host on a card; on a CPU, ATen operators called from outside ATen.
    """

    peak_bytes: int
    launches: int


def footprints(calls: Mapping[str, Call], device: str) -> dict[str, Footprint]:
    """Run every (warm) call once under the profiler."""
    cuda = device == "cuda"
    peaks = {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=not cuda) as profiled:
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            with record_function(_MARK + name):
                call()
            peaks[name] = torch.cuda.max_memory_allocated() - before if cuda else 0
    # The profiler's own list keeps allocations; its summaries keep only their sums.
    events = [(e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.nbytes()) for e in _host(profiled)]
    found = {}
    for name, start, end, _ in events:
        if name.startswith(_MARK):
            call = name.removeprefix(_MARK)
            inside = [e for e in events if start <= e[1] and e[2] <= end]
            peak = peaks[call] if cuda else _peak((e[1], e[3]) for e in inside if e[0] == "[memory]")
            launches = sum("LaunchKernel" in e[0] for e in inside) if cuda else _outer_operators(inside)
            found[call] = Footprint(peak, launches)
    return found


def _host(profiled: profile) -> list:
    """Events of the host's clock: a mark has a second event of its name on the device's."""
    events = profiled.profiler.kineto_results.events()
    return [e for e in events if not e.is_hidden_event() and e.device_type() == DeviceType.CPU]


def _peak(allocations: Iterable[tuple[int, int]]) -> int:
    held = peak = 0
    for _, size in sorted(allocations, key=lambda pair: pair[0]):
        held += size
        peak = max(peak, held)
    return peak


def _outer_operators(events: list[tuple[str, int, int, int]]) -> int:
    """ATen calls that no other ATen call contains; the events of one thread nest."""
    count, covered = 0, -1
    for name, start, end, _ in sorted(events, key=lambda e: (e[1], -e[2])):
        if name.startswith("aten::") and start > covered:
            count += 1
            covered = end
    return count
