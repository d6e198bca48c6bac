"""The tuner tries what it says, refuses what is wrong, and finds what is faster."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from benchmarks.clocks import ProcessClock
from benchmarks.inputs import Inputs
from benchmarks.shapes import Cell
from qar_kernels.triton import configs
from qar_kernels.triton.configs import Gemm
from train.errors import UserError

GEMM = Gemm(64, 32, warps=4, stages=2)


def test_neighbours_differ_in_one_number_and_stay_within_the_limits():
    found = list(tune.neighbours(GEMM))
    assert len(set(found)) == len(found) == 7
    for gemm in found:
        assert sum(a != b for a, b in zip(vars(gemm).values(), vars(GEMM).values(), strict=True)) == 1
    assert all(gemm.block_n <= 256 and gemm.stages >= 1 for gemm in tune.neighbours(Gemm(256, 16, 8, 1)))


class FakeCall:
    """Stands for a call: only its configuration of one kernel is looked at."""

    def __init__(self, gemm):
        self.config = self
        self.gate_up = gemm


def test_the_search_goes_on_from_the_fastest(monkeypatch):
    times = {256: 4.0, 128: 3.0, 64: 2.0, 32: 2.5}
    asked = []

    def attempt(kernel, gemm, *_):
        asked.append(gemm)
        if gemm.stages == 3:
            return tune.Tried(gemm, None, "does not fit")
        return tune.Tried(gemm, times[gemm.block_n] / 4.0)

    monkeypatch.setattr(tune, "_try", attempt)
    call = FakeCall(Gemm(256, 32, 4, 2))
    tried = tune.search("gate_up", lambda call: (), call, ProcessClock(), time.monotonic() + 60)
    assert tried[0] == tune.Tried(call.gate_up, 1.0)
    assert len(asked) == len(set(asked)) == len(tried) - 1
    best = min((t for t in tried if t.ratio is not None), key=lambda t: t.ratio)
    assert best.gemm.block_n == 64 and best.ratio == 0.5
    assert any(t.ratio is None and t.reason == "does not fit" for t in tried)
    late = tune.search("gate_up", lambda call: (), call, ProcessClock(), time.monotonic() - 1)
    assert late == tried[:1]


def test_a_gain_within_the_noise_is_none(monkeypatch):
    monkeypatch.setattr(tune, "_try", lambda kernel, gemm, *_: tune.Tried(gemm, 0.99))
    call = FakeCall(Gemm(64, 32, 4, 2))
    tried = tune.search("gate_up", lambda call: (), call, ProcessClock(), time.monotonic() + 60)
    assert len(tried) == 1 + len(list(tune.neighbours(call.gate_up)))


@pytest.mark.parametrize("tower", ["fused", "expert"])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_every_kernel_gives_the_same_under_other_block_sizes(kernel, tower):
    inputs = Inputs.draw(Cell(24, 3, 5, 16, 32, 64, "float32"), "cpu", training=False)
    call, kernels = tune.prepare(inputs, "tiny", tower)
    gemm = replace(getattr(call.config, kernel), block_n=16)
    outputs = kernels[kernel]
    expected = outputs(call)
    tried = tune._try(kernel, gemm, outputs, call, expected, ProcessClock(), 0.0)
    assert tried.ratio is not None, tried.reason
    wrong = (expected[0] + 0.1, *expected[1:])
    assert "results differ" in tune._try(kernel, gemm, outputs, call, wrong, ProcessClock(), 0.0).reason


def test_both_towers_are_tuned_where_their_configurations_differ(monkeypatch):
    monkeypatch.setattr(configs, "_capability", lambda device: (9, 0))
    both = [("fused", "sm90_large"), ("expert", "sm90_experts")]
    assert tune._towers(4096, 64, "bfloat16", "cuda") == both
    assert tune._towers(256, 64, "bfloat16", "cuda")[1] == ("expert", "sm90_short")
    assert tune._towers(16, 16, "bfloat16", "cuda") == [("fused", "sm90_decode")]


def test_without_a_card_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a card")
    with pytest.raises(UserError, match="no CUDA device"):
        tune.main([])
