"""Every kernel once, small: what compute-sanitizer watches. ``python small_case.py [cpu]``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from helpers import TOWERS, Case, check

DEVICE = "cpu" if sys.argv[1:] == ["cpu"] else "cuda"

# Neither the rows nor H, I and R fill a tile; both the decode and (on a card) the large configurations.
for rows in (37, 300) if DEVICE == "cuda" else (37,):
    ids = [row % 5 - 1 for row in range(rows)]
    for tower in TOWERS:
        check(Case(ids, H=80, I=144, R=24, E=4), tower, "triton", torch.float16, device=DEVICE)
