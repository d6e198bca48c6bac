"""The benchmarks' ways of computing agree with the reference; without a card they say so and fail."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import bench_gpu
from benchmarks.providers import PROVIDERS, Inputs, verify
from benchmarks.shapes import Cell, matrix
from qar_kernels.dispatch import default_path, measured_path


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


def test_dispatch():
    assert default_path(rows=4096, segments=64) == "fused"
    assert default_path(rows=256, segments=256) == "grouped"
    cell = {"device": "card", "H": 4096, "I": 14336, "T": 4096, "Q": 64, "fused_over_grouped": 1.1}
    table = [cell, cell | {"T": 256, "fused_over_grouped": 0.9}]
    assert measured_path(table, "card", 4096, 14336, rows=3000, segments=60) == "grouped"
    assert measured_path(table, "card", 4096, 14336, rows=200, segments=60) == "fused"
    assert measured_path(table, "card", 4096, 14336, rows=1024, segments=60) is None
    assert measured_path(table, "other", 4096, 14336, rows=4096, segments=64) is None
