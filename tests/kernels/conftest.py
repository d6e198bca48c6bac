"""Kernel tests run the Triton kernels in the interpreter, with every allocation poisoned."""

import pytest
import torch
from poison import poisoned_allocations  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
