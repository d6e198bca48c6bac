"""The kernels run in Triton's interpreter where there is no card, as in ``tests/kernels``."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
