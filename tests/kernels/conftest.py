"""Kernel tests run the Triton kernels in the interpreter, with every allocation poisoned."""

import os

# Triton reads this when a kernel is decorated: set before anything imports one.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

_EMPTY, _EMPTY_LIKE, _NEW_EMPTY = torch.empty, torch.empty_like, torch.Tensor.new_empty


def _poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """An element that no kernel writes is NaN, and NaN fails every comparison."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_EMPTY(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_EMPTY_LIKE(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(_NEW_EMPTY(*a, **k)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
