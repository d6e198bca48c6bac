"""The MLP providers under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For its histograms, ``--benchmark-compare`` and ``--benchmark-autosave``. Quoted numbers come from the
interleaved runner (``make bench``), because here one provider runs after the other.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import libraries  # noqa: F401 - registers its providers
from benchmarks.inputs import Inputs
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import MODELS, Cell
from benchmarks.verify import Reference, run_pass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"decode": (16, 16), "prefill": (256, 8)}


@pytest.mark.parametrize("training", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_mlp(benchmark: BenchmarkFixture, name: str, shape: str, training: bool) -> None:
    """One provider, checked against float64 and then timed."""
    model, dtype = ("Llama-3-8B", "bfloat16") if DEVICE == "cuda" else ("SmolLM2-135M", "float32")
    rows, queriers = SHAPES[shape]
    cell = Cell(rows, queriers, 64, 16, *MODELS[model], dtype)
    if not PROVIDERS[name].applies(cell, DEVICE, training):
        pytest.skip(f"{name} takes no part on {DEVICE} in this pass")
    inputs = Inputs.draw(cell, DEVICE, training)
    trial = PROVIDERS[name].prepare(inputs)
    Reference(inputs).check(trial)

    def step() -> None:
        run_pass(trial, inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape} {'fwd+bwd' if training else 'fwd'}"
    benchmark(step)
