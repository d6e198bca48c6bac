"""Allocations that no kernel can leave unwritten without being seen."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """An element that no kernel writes is NaN, and NaN fails every comparison."""
    # Closures: torch.compile looks globals up by the module's name, and there are several conftest.
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    def new_empty(like, *size, dtype=None, device=None):
        # not by the method itself, which torch.compile of PyTorch 2.11 does not trace without an instance
        return poison(empty(*size, dtype=dtype or like.dtype, device=device or like.device))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
