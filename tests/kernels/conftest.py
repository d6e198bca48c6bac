"""Kernel tests run the Triton kernels in the interpreter, with every allocation poisoned."""

import pytest
import torch
from poison import poisoned_allocations  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fused_path(monkeypatch):
    """In fp32, too, where the rule leaves the base to the vendor library."""
    monkeypatch.setenv("QAR_KERNELS_PATH", "fused")
