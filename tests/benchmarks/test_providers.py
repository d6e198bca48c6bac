"""Providers agree with the reference, forward and backward; a wrong one is reported and not timed."""

import argparse
import dataclasses
import json
import os
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import footprint, kernels, libraries
from benchmarks.__main__ import main
from benchmarks.calibrate import _base_gate_up
from benchmarks.clocks import CaptureError, CudaClock, ProcessClock
from benchmarks.inputs import Inputs
from benchmarks.machine import describe
from benchmarks.providers import PROVIDERS, Trial, provider
from benchmarks.runner import Step, Timing, interleave
from benchmarks.schema import load
from benchmarks.session import Job, Session
from benchmarks.shapes import Cell, matrix
from benchmarks.verify import Reference
from qar_kernels.testing import WrongResult
from qar_kernels.triton.runner import recording
from train.errors import UserError

CELL = Cell(24, 3, 5, 16, 32, 64, "float32")


def others():
    return [name for name, p in PROVIDERS.items() if name != "base_compiled" and "cpu" in p.devices]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changed", [{}, {"I": 0}, {"A": 8}])
@pytest.mark.parametrize("name", others())
def test_providers_are_right(name, changed, training):
    cell = dataclasses.replace(CELL, **changed)
    if not PROVIDERS[name].applies(cell, "cpu", training):
        pytest.skip("takes no part")
    inputs = Inputs.draw(cell, "cpu", training)
    Reference(inputs).check(PROVIDERS[name].prepare(inputs))


@pytest.mark.parametrize("path", ["fused", "grouped"])
@pytest.mark.parametrize("adapters", [None, 8])
@pytest.mark.parametrize("training", [False, True])
def test_forced_paths_are_right_and_leave_the_environment_alone(monkeypatch, path, adapters, training):
    monkeypatch.setenv("QAR_KERNELS_PATH", "before")
    inputs = Inputs.draw(dataclasses.replace(CELL, A=adapters), "cpu", training)
    Reference(inputs).check(PROVIDERS[f"ours_{path}"].prepare(inputs))
    assert os.environ["QAR_KERNELS_PATH"] == "before"


def test_a_name_is_given_once():
    before = dict(PROVIDERS)
    with pytest.raises(ValueError, match="provider 'loop': there is one of that name already"):
        provider()(before["loop"].prepare)
    assert before == PROVIDERS


def wrong_output(inputs):
    right = PROVIDERS["loop"].prepare(inputs)
    return Trial(lambda: right.forward() * 1.001, right.experts)


def wrong_gradient(inputs):
    """The right output, and gradients that leave one querier's out."""
    right = PROVIDERS["loop_slices"].prepare(inputs)

    class Forget(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, d_y):
            return torch.cat([d_y[:-8], torch.zeros_like(d_y[-8:])])

    return Trial(lambda: Forget.apply(right.forward()), right.experts)


@pytest.mark.parametrize(
    ("wrong", "training", "name"),
    [(wrong_output, False, "y"), (wrong_output, True, "y"), (wrong_gradient, True, "d_x")],
)
def test_a_wrong_provider_is_refused(wrong, training, name):
    inputs = Inputs.draw(CELL, "cpu", training)
    with pytest.raises(WrongResult, match=f"^{name}: relative error"):
        Reference(inputs).check(wrong(inputs))


def test_one_wrong_row_among_thousands_is_refused():
    inputs = Inputs.draw(dataclasses.replace(CELL, T=6144, dtype="bfloat16"), "cpu", False)
    right = PROVIDERS["loop_slices"].prepare(inputs)
    kept = torch.ones(6144, 1, dtype=torch.bfloat16)
    kept[4000] = 0
    Reference(inputs).check(right)
    with pytest.raises(WrongResult, match=r"^y: relative error of a row"):
        Reference(inputs).check(Trial(lambda: right.forward() * kept, right.experts))


def test_a_wrong_or_failing_provider_is_reported_and_not_timed(monkeypatch, tmp_path, capsys):
    def fails(inputs):
        raise NotImplementedError("no such kernel")

    for name, prepare in (("slow_and_wrong", wrong_output), ("fails", fails)):
        changed = dataclasses.replace(PROVIDERS["loop"], prepare=prepare)
        monkeypatch.setitem(PROVIDERS, name, changed)
    monkeypatch.delitem(PROVIDERS, "base_compiled")
    out = tmp_path / "result.json"
    session = Session("cpu", out, minutes=1)
    assert session.run([kernels.mlp_job(0, "fused_mlp", CELL, "cpu", False, budget_s=0.01)]) == []
    result = load(out)
    timed = {row["provider"] for row in result["rows"]}
    assert {"base", "ours", "loop"} <= timed
    assert not timed & {"slow_and_wrong", "fails"}
    reasons = {refused["provider"]: refused["reason"] for refused in result["refused"]}
    assert "relative error" in reasons["slow_and_wrong"]
    assert reasons["fails"] == "NotImplementedError: no such kernel"
    assert "slow_and_wrong       NOT TIMED" in capsys.readouterr().out


def test_a_cell_that_cannot_be_built_costs_no_other_and_is_not_tried_again(tmp_path):
    def breaks(refuse):
        raise RuntimeError("an illegal memory access")

    sound = kernels.mlp_job(1, "expert_mlp", dataclasses.replace(CELL, I=0), "cpu", False, budget_s=0.01)
    broken = Job(0, "fused_mlp", False, CELL, breaks)
    session = Session("cpu", tmp_path / "result.json", minutes=1)
    assert session.run([broken, sound]) == []
    assert session.result["rows"]
    (refused,) = load(session.out)["refused"]
    assert refused["provider"] == "*"
    again = Session("cpu", session.out, minutes=0, resume=load(session.out))
    assert again.run([broken, sound]) == []


@pytest.mark.parametrize("profiler", ["refuses", "sees nothing"])
def test_on_a_card_a_profiler_without_rights_costs_the_count_of_launches_only(monkeypatch, profiler):
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 164)

    def events(calls, profiled):
        if profiler == "refuses":
            raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
        return {name: [] for name in calls}

    monkeypatch.setattr(footprint, "_events_inside", events)
    calls = []
    found = footprint.footprints({"ours": lambda: calls.append(1)}, "cuda")
    assert found == {"ours": footprint.Footprint(peak_bytes=64, launches=None)} and calls == [1]


def test_memory_is_the_most_held_at_a_time_and_operators_inside_others_are_not_launches():
    assert footprint._peak([(3, 2), (1, 5), (4, -7), (2, -3), (5, 1)]) == 5
    assert footprint._peak([(3, -5), (1, 5), (2, 7)]) == 12
    calls = [("aten::addmm", 2, 8), ("aten::linear", 0, 10), ("mark", 11, 20), ("aten::mul", 12, 13)]
    assert footprint._outer_operators([(*call, 0) for call in calls]) == 2


def test_queriers_of_a_cell_are_neither_neighbours_nor_in_order():
    """What is in order is read without a copy, which would flatter our own."""
    present = Inputs.draw(Cell(64, 8, 64, 4, 16, 0, "float32"), "cpu", training=False).present
    assert len(set(present)) == 8 and present != sorted(present) and max(present) - min(present) > 8


def test_milliseconds_and_their_percentiles(monkeypatch):
    ticks = iter((1_000_000, 4_500_000))
    monkeypatch.setattr("benchmarks.clocks.time.process_time_ns", lambda: next(ticks))
    assert ProcessClock().sample(lambda: None)() == 3.5
    assert Timing.of(list(range(101))) == Timing(20, 50, 80)


class TurnClock(ProcessClock):
    """Every call takes a millisecond."""

    def sample(self, call):
        call()
        return lambda: 1.0


def test_calls_take_turns_in_an_order_that_is_drawn_anew():
    order = []
    timed = interleave({name: partial(order.append, name) for name in "abc"}, TurnClock(), budget_s=0.03)
    rounds = ["".join(order[start : start + 3]) for start in range(6, len(order), 3)]  # behind two warm-ups
    assert len(rounds) == 10 and {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    assert timed == dict.fromkeys("abc", Timing(1.0, 1.0, 1.0))


def test_the_calibration_launches_what_it_times():
    x, gate, up = torch.zeros(8, 32), torch.zeros(48, 32), torch.zeros(48, 32)
    with recording() as recorded:
        _base_gate_up(x, gate, up)()
    assert [asked.kernel.__name__ for asked in recorded] == ["gate_up_kernel"] * 2


def test_measured_rows_are_kept_and_resumed(monkeypatch, tmp_path):
    monkeypatch.delitem(PROVIDERS, "base_compiled")
    out = tmp_path / "result.json"
    job = kernels.mlp_job(0, "expert_mlp", dataclasses.replace(CELL, I=0), "cpu", True, budget_s=0.01)
    Session("cpu", out, minutes=1).run([job])
    rows = load(out)["rows"]
    ours = next(row for row in rows if row["provider"] == "ours")
    assert ours["launches"] > 0
    assert ours["peak_bytes"] >= 3 * 5 * 16 * 32 * 4  # at least the stacked gradients
    again = Session("cpu", out, minutes=1, resume=json.loads(out.read_text()))
    again.run([job])
    assert again.result["rows"] == rows
    assert Session("cpu", out, minutes=0).run([job]) == [job]


class BreaksCaptures(ProcessClock):
    """As PyTorch 2.11 does: one capture that fails, and the process is of no more use."""

    def __init__(self):
        self.broken = False

    def prepare(self, call, graph):
        assert not self.broken
        if graph:
            self.broken = True
            raise CaptureError("RuntimeError: operation not permitted when stream is capturing")
        return call


def test_a_broken_capture_ends_the_process_and_resume_goes_on_without(tmp_path):
    calls = []
    steps = {
        "base": Step(lambda: calls.append("base")),
        "peft_mixed": Step(lambda: None, graph=True),
        "ours": Step(lambda: calls.append("ours")),
    }

    def run(cell, resume=None):
        session = Session("cpu", tmp_path / "result.json", 1, resume)
        session.clock = BreaksCaptures()
        return session.run([Job(0, "fused_mlp", False, cell, lambda refuse: dict(steps), budget_s=0.0)])

    with pytest.raises(UserError, match=r"not permitted when stream is capturing.*--resume"):
        run(CELL)
    left = load(tmp_path / "result.json")
    assert left["rows"] == [] and left["refused"][0]["provider"] == "peft_mixed"
    for _ in range(2):
        assert run(CELL, load(tmp_path / "result.json")) == []
        done = load(tmp_path / "result.json")
        assert [row["provider"] for row in done["rows"]] == ["base", "ours"]
        assert done["refused"] == left["refused"]
    with pytest.raises(UserError):  # in other cells it is tried
        run(dataclasses.replace(CELL, Q=1), load(tmp_path / "result.json"))


def test_only_a_capture_that_fails_is_a_broken_one(monkeypatch):
    """Not the warm-up before it, after which all goes on."""
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    clock = CudaClock.__new__(CudaClock)
    calls = []

    def fails_at(count):
        def call():
            calls.append(1)
            if len(calls) == count:
                raise RuntimeError("not permitted")

        calls.clear()
        return call

    with pytest.raises(RuntimeError, match=r"^not permitted"):
        clock.prepare(fails_at(1), graph=True)
    with pytest.raises(CaptureError, match=r"^RuntimeError: not permitted"):
        clock.prepare(fails_at(4), graph=True)
    assert clock.prepare(fails_at(5), graph=True) is torch.cuda.CUDAGraph().replay


def test_results_of_another_machine_are_neither_resumed_nor_overwritten(monkeypatch, tmp_path):
    args = argparse.Namespace(device="cpu", quick=False, resume=True)
    monkeypatch.setattr(command, "_HERE", tmp_path)
    here = describe("cpu")
    today = tmp_path / "results" / f"{here['name']}-{here['date']}.json"
    assert command._default_out(args) == today
    Session("cpu", today, minutes=1).run(
        [kernels.mlp_job(0, "expert_mlp", CELL, "cpu", False, budget_s=0.01)]
    )
    assert command._default_out(args) == today
    result = load(today)
    for part, key, value in (("machine", "cores", 1000), ("versions", "torch", "1.0")):
        today.write_text(json.dumps({**result, part: {**result[part], key: value}}))
        assert command._default_out(args) == today.with_name(f"{today.stem}-2.json")
        with pytest.raises(UserError, match="on another machine"):
            command._resumed(today, args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_said(capsys):
    with pytest.raises(UserError, match="no CUDA device on this machine: nothing was measured"):
        main(["all", "--device", "cuda"])
    assert capsys.readouterr().out == ""


def test_cells_have_rows_for_every_querier():
    assert all(cell.Q <= cell.T for cell in matrix("Llama-3-8B", 64))
    with pytest.raises(ValueError, match="Q: got 9"):
        Cell(8, 9, 16, 16, 32, 64)
    with pytest.raises(ValueError, match="multiple of Q"):
        Cell(8, 3, 16, 16, 32, 64)


def test_lora_rank_matches_parameters():
    cell = Cell(16, 1, 1, 64, 4096, 14336)
    expert, lora = 3 * 64 * 4096, 3 * libraries.lora_rank(cell) * (4096 + 14336)
    assert abs(lora / expert - 1) < 0.02


def test_gpu_jobs_put_the_main_matrix_first():
    ranked = sorted(kernels.gpu_jobs(), key=lambda job: job.rank)
    main_matrix = matrix("Llama-3-8B", 64)
    assert [job.cell for job in ranked[: len(main_matrix)]] == main_matrix
    assert not any(job.training for job in ranked[: len(main_matrix)])
    assert len({(job.op, job.training, job.cell) for job in ranked}) == len(ranked)
