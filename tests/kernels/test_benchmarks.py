"""The benchmarks' ways of computing agree with the reference; without a card they say so and fail."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import bench_gpu
from benchmarks.providers import PROVIDERS, Inputs, verify
from benchmarks.shapes import Cell, matrix


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "base_compiled"])
def test_providers_are_right(name):
    dtype = "bfloat16" if name == "grouped_mm" else "float32"
    verify(name, Inputs.draw(Cell(24, 3, 5, 16, 32, 64, dtype), "cpu", trains_experts=False))


def test_a_wrong_provider_is_refused(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "loop", PROVIDERS["base"])
    with pytest.raises(RuntimeError, match="loop: relative error"):
        verify("loop", Inputs.draw(Cell(24, 3, 5, 16, 32, 64, "float32"), "cpu", trains_experts=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_said_in_one_line(capsys):
    assert bench_gpu.main([]) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_matrix_has_no_querier_without_rows():
    assert all(cell.Q <= cell.T for cell in matrix("Llama-3-8B", 64))
