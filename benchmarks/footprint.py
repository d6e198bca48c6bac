"""Peak memory and launches of single calls, measured apart from their time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.clocks import Call

_MARK = "benchmark:"
Event = tuple[str, int, int, int]  # name, start and end in ns, bytes


@dataclass(frozen=True)
class Footprint:
    """What one call takes.

    Attributes:
        peak_bytes: most memory that PyTorch held during the call above what it held before.
        launches: kernels launched by the host on a card, None where the profiler sees none (it may lack the
            rights); on a CPU, ATen operators called from outside ATen.
    """

    peak_bytes: int
    launches: int | None


def footprints(calls: Mapping[str, Call], device: str) -> dict[str, Footprint]:
    """Run every (warm) call once under the profiler, on a card once before it, too."""
    if device == "cuda":
        return _on_card(calls)
    inside = _events_inside(calls, profile(activities=[ProfilerActivity.CPU], profile_memory=True))
    return {
        name: Footprint(_peak((e[1], e[3]) for e in events if e[0] == "[memory]"), _outer_operators(events))
        for name, events in inside.items()
    }


def _on_card(calls: Mapping[str, Call]) -> dict[str, Footprint]:
    peaks = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    try:
        inside = _events_inside(calls, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]))
    except RuntimeError:
        inside = {}
    launches = {name: sum("LaunchKernel" in e[0] for e in events) for name, events in inside.items()}
    return {name: Footprint(peak, launches.get(name) or None) for name, peak in peaks.items()}


def _events_inside(calls: Mapping[str, Call], profiler: profile) -> dict[str, list[Event]]:
    """The host's events of every call."""
    with profiler as profiled:
        for name, call in calls.items():
            with record_function(_MARK + name):
                call()
    # The profiler's own list keeps allocations; its summaries keep only their sums.
    events = [(e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.nbytes()) for e in _host(profiled)]
    return {
        name.removeprefix(_MARK): [e for e in events if start <= e[1] and e[2] <= end]
        for name, start, end, _ in events
        if name.startswith(_MARK)
    }


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


def _outer_operators(events: list[Event]) -> int:
    """ATen calls that no other ATen call contains; the events of one thread nest."""
    count, covered = 0, -1
    for name, start, end, _ in sorted(events, key=lambda e: (e[1], -e[2])):
        if name.startswith("aten::") and start > covered:
            count += 1
            covered = end
    return count
