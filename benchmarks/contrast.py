"""Time per step of the querier-contrastive loss against a straightforward implementation.

``python -m benchmarks.contrast``. C clusters, Q queriers, K memory slots, P projection, B sequences, S
tokens, H hidden. The straightforward way is that of :mod:`benchmarks.straightforward`: a loop over the batch,
prototypes averaged anew, and the memory copied at every step. Both see the same heads and batch, and their
losses are compared before the clock starts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.straightforward import Contrast
from qar_models import QARConfig
from qar_models.contrast import QuerierContrast

C, Q, P, B, S = 10, 64, 512, 8, 32
ROUNDS = 7


def _filled(slots: int, hidden: int) -> QuerierContrast:
    qar = QARConfig(Q, num_clusters=C, memory_size=slots, projection_dim=P, tower="residual")
    contrast = QuerierContrast(qar, hidden, nn.RMSNorm(hidden))
    contrast.reset_parameters(0.02)
    contrast.memory.normal_()
    contrast.totals.copy_(contrast.memory.sum(3, dtype=torch.float64))
    contrast.writes.fill_(slots)
    return contrast.train()


def _straightforward(ours: QuerierContrast) -> Callable[..., Tensor]:
    loss = Contrast(copy.deepcopy(ours))
    return lambda states, mask, queriers, clusters: loss(states, mask, queriers.tolist(), clusters.tolist())


def _step(loss: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    value = loss(*batch)
    value.backward()
    return value.detach()


def compare(slots: int, hidden: int) -> tuple[float, float]:
    """Median milliseconds of a forward and backward step, ours and the straightforward way, in turns."""
    torch.manual_seed(0)
    ours = _filled(slots, hidden)
    theirs = _straightforward(ours)
    batch = (
        torch.randn(B, S, hidden),
        torch.ones(B, S, dtype=torch.int64),
        torch.randint(0, Q, (B,)),
        torch.randint(0, C, (B,)),
    )
    torch.testing.assert_close(_step(ours, batch), _step(theirs, batch), rtol=1e-4, atol=1e-5)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for loss, found in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            _step(loss, batch)
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    sys.stdout.write(
        f"C {C}, Q {Q}, P {P}, batch {B} x {S}; median of {ROUNDS} steps, straightforward / ours\n"
    )
    for hidden in (64, 1024):
        for slots in (64, 512):
            ours, theirs = compare(slots, hidden)
            sys.stdout.write(
                f"H {hidden:5d}  K {slots:4d}  ours {ours:7.1f} ms  straightforward {theirs:7.1f} ms  "
                f"ratio {theirs / ours:5.1f}\n"
            )


if __name__ == "__main__":
    main()
