"""How the suites measure: warm up, take turns, keep the spread."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.clocks import Call, Clock

_MIN_ROUNDS, _MAX_ROUNDS = 5, 100


@dataclass(frozen=True)
class Step:
    """A checked call to be timed; ``graph``: a CUDA graph of it is what a user would replay."""

    call: Call
    graph: bool = False


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Percentiles of the samples."""
        return cls(*(float(value) for value in np.percentile(samples, (20, 50, 80))))


def interleave(calls: Mapping[str, Call], clock: Clock, budget_s: float, seed: int = 0) -> dict[str, Timing]:
    """Time every call in rounds in which all take their turn, in an order drawn anew each round.

    Who comes first finds the allocator and the caches as the last one left them, and a machine that slows
    down does so for everybody. Two calls of each warm up; the second says how many rounds the budget
    allows (5 to 100).
    """
    for call in calls.values():
        call()
    clock.wait()
    first = [clock.sample(call) for call in calls.values()]
    clock.wait()
    round_s = sum(read() for read in first) / 1e3
    rounds = int(min(_MAX_ROUNDS, max(_MIN_ROUNDS, budget_s / max(round_s, 1e-9))))
    draw, names = random.Random(seed), list(calls)
    pending: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        draw.shuffle(names)
        for name in names:
            pending[name].append(clock.sample(calls[name]))
    clock.wait()
    return {name: Timing.of([read() for read in reads]) for name, reads in pending.items()}
