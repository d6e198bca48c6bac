"""What the backward passes that are written by hand have in common."""

from __future__ import annotations

import torch


def refuse_second_order(what: str) -> None:
    """Raise ``RuntimeError`` where a backward pass is itself to be differentiated.

    ``once_differentiable`` lets the pass through where no incoming gradient needs one itself: its results
    would count as constants, although they depend on rows and weights.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what}: gradients of gradients (create_graph=True) are not implemented")
