"""The contrastive loss as the paper's code computes it, for checkpoints of that code.

Q queriers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qar_models.config import QARConfig
from qar_models.contrast import QuerierContrast

PHANTOM_CLASSES = 2  # the reference numbers its queriers from 2 and sizes its tables for the gap
EMPTY = 1e-6  # every component of the prototype of a querier without memory


class ReferenceContrast(QuerierContrast):
    """All classes compete: also the two phantom ones, and queriers whose memory is still empty."""

    def __init__(self, qar: QARConfig, hidden_size: int, norm: nn.Module) -> None:
        count = qar.num_queriers + PHANTOM_CLASSES
        classes = dataclasses.replace(qar, num_queriers=count, querier_names=None, querier_experts=None)
        super().__init__(classes, hidden_size, norm)
        self.num_queriers = qar.num_queriers

    def _prototypes(self) -> tuple[Tensor, Tensor]:
        prototypes, known = super()._prototypes()
        return torch.where(known.unsqueeze(-1), prototypes, EMPTY), torch.ones_like(known)
