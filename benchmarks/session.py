"""One run: jobs in order of importance until the time is up, a result file that is whole after each."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.clocks import Call, CaptureError, clock_of
from benchmarks.footprint import Footprint, footprints
from benchmarks.machine import describe, versions
from benchmarks.runner import Step, Timing, interleave
from benchmarks.schema import OPS, cell_key
from benchmarks.shapes import Cell
from train.errors import UserError
from train.files import write_atomic

_SHOWN = {"T": 5, "Q": 3, "E": 5, "R": 3, "H": 4}
T = TypeVar("T")
Refuse = Callable[[str, BaseException], None]


@dataclass(frozen=True)
class Job:
    """One cell of one op and pass.

    Attributes:
        rank: jobs run in ascending order of it.
        op: a key of ``schema.OPS``.
        training: forward and backward, else forward alone.
        cell: the shape.
        build: makes the checked steps by provider; hands what is wrong or fails to its argument.
        budget_s: seconds for the rounds.
    """

    rank: int
    op: str
    training: bool
    cell: Cell
    build: Callable[[Refuse], dict[str, Step]]
    budget_s: float = 0.3

    @property
    def identity(self) -> dict:
        """The keys of its rows that do not depend on the provider."""
        shape = {name: value for name, value in asdict(self.cell).items() if value is not None}
        return {"op": self.op, "pass": "fwd+bwd" if self.training else "fwd", **shape}


class Session:
    """Runs jobs and keeps the result file.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        out: the result file.
        minutes: no job is begun after that.
        resume: keep the rows that ``out`` has already, and do not measure them again; in a cell without rows,
            try no provider again that was refused there.
    """

    def __init__(self, device: str, out: Path, minutes: float, resume: dict | None = None) -> None:
        self.device, self.out = device, out
        self.deadline = time.monotonic() + 60 * minutes
        self.clock = clock_of(device)
        self.result = resume or {"machine": describe(device), "versions": versions(), "rows": []}
        refused = self.result.get("refused", [])
        self._refused = {(cell_key(row), row["provider"]) for row in refused}
        failed = (row for row in refused if row["provider"] == "*")
        self._done = {cell_key(row) for row in (*self.result["rows"], *failed)}

    def calibrate(self, measure: Callable[[], dict[str, float]]) -> None:
        """Record the card's ceilings, once."""
        if "calibration" not in self.result["machine"]:
            self.result["machine"]["calibration"] = measure()
            self._write()

    def run(self, jobs: Iterable[Job]) -> list[Job]:
        """Measure what is not there yet; returns the jobs that there was no time for."""
        waiting = [job for job in sorted(jobs, key=lambda job: job.rank) if self._is_new(job)]
        for index, job in enumerate(waiting):
            if time.monotonic() > self.deadline:
                return waiting[index:]
            self._measure(job)
        return []

    def _is_new(self, job: Job) -> bool:
        return cell_key(job.identity) not in self._done

    def _measure(self, job: Job) -> None:
        def refuse(provider: str, error: BaseException) -> None:
            self._refuse(job, provider, error)

        try:
            self._time(job, self._warm(job, refuse), refuse)
        except CaptureError as error:
            self._write()
            raise UserError(
                f"no graph holds that call ({error}), and work after a broken capture may fail; "
                "--resume goes on without that provider in this cell"
            ) from error
        except Exception as error:  # noqa: BLE001 - one cell must not cost the others
            refuse("*", error)
            self._write()
            require_device(self.device, error)
        gc.collect()  # autograd's cycles hold tensors; the next cell may need the room
        self._write()

    def _warm(self, job: Job, refuse: Refuse) -> dict[str, Step]:
        """The steps that survive a first call, without those that did not survive the cell the last time."""
        key, steps = cell_key(job.identity), job.build(refuse)
        steps = {name: step for name, step in steps.items() if (key, name) not in self._refused}
        return {name: step for name, step in steps.items() if attempt(name, refuse, step.call)}

    def _time(self, job: Job, steps: dict[str, Step], refuse: Refuse) -> None:
        taken = footprints({name: step.call for name, step in steps.items()}, self.device)
        calls: dict[str, Call] = {}
        for name, step in steps.items():
            try:
                calls |= attempt(name, refuse, partial(self.clock.prepare, step.call, step.graph))
            except CaptureError as error:
                refuse(name, error)
                raise
        if calls:
            self._add(job, interleave(calls, self.clock, job.budget_s), taken)

    def _add(self, job: Job, times: dict[str, Timing], taken: dict[str, Footprint]) -> None:
        base = times.get(OPS[job.op])
        for provider, timing in times.items():
            row = {
                **job.identity,
                "provider": provider,
                "ms": asdict(timing),
                **{key: value for key, value in asdict(taken[provider]).items() if value is not None},
                "ratio_to_base": timing.p50 / base.p50 if base else None,
            }
            self.result["rows"].append(row)
            _say(f"{_label(row)} {provider:20} {timing.p50:10.4f} ms  {_ratio(row)}")

    def _refuse(self, job: Job, provider: str, error: BaseException) -> None:
        key, reason = (cell_key(job.identity), provider), _reason(error)
        if key not in self._refused:  # else --resume met what stands there already
            self._refused.add(key)
            refused = self.result.setdefault("refused", [])
            refused.append({**job.identity, "provider": provider, "reason": reason})
        _say(f"{_label(job.identity)} {provider:20} NOT TIMED  {reason}")

    def _write(self) -> None:
        write_atomic(self.out, json.dumps(self.result, indent=1) + "\n")


def require_device(device: str, error: BaseException) -> None:
    """Raise ``UserError`` if a card takes no work any more, as after an illegal access."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise UserError(
            f"the card takes no work any more ({_reason(error)}); --resume goes on behind this cell"
        ) from broken


def attempt(name: str, refuse: Refuse, build: Callable[[], T]) -> dict[str, T]:
    """What one provider's ``build`` gives, or nothing: what it raises is reported, the others go on.

    Raises:
        CaptureError: as it came, for after it the others cannot go on.
    """
    try:
        return {name: build()}
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001 - a library's failure may be of any kind
        refuse(name, error)
        return {}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _label(row: dict) -> str:
    shape = " ".join(f"{name}={row[name]:<{width}}" for name, width in _SHOWN.items())
    return f"{row['op']:13} {row['pass']:7} {shape}"


def _ratio(row: dict) -> str:
    value = row["ratio_to_base"]
    return "" if value is None else f"{value:7.3f} x {OPS[row['op']]}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
