"""Host side of the optimizer's kernel.

E rows owned, n rows with a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qar_kernels.triton.kernels_adamw import adamw_rows_kernel
from qar_kernels.triton.runner import cdiv, run_kernel

_BLOCK = 1024


def adamw_rows(
    weights: Tensor,
    rounded: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    ids: Tensor,
    gradient: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW for the rows ``ids``, in place and in one launch; no other row is read or written.

    Args:
        weights, exp_avg, exp_avg_sq: ``(E, ...)`` fp32, contiguous.
        rounded: the parameter itself ``(E, ...)`` where ``weights`` are its fp32 copy.
        steps: ``(E,)`` fp32, steps that each row has made.
        ids: ``(n,)`` int64, each once.
        gradient: ``(n, ...)`` of any floating dtype, contiguous.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`.
        found_inf: one fp32 element, not zero to do nothing (``torch.amp.GradScaler``).
    """
    rows, width = ids.shape[0], weights[0].numel()
    if not rows:
        return
    made = torch.ones_like(ids, dtype=steps.dtype)
    run_kernel(
        adamw_rows_kernel, (rows, cdiv(width, _BLOCK)),
        weights, weights if rounded is None else rounded, exp_avg, exp_avg_sq, steps, ids, gradient,
        steps if found_inf is None else found_inf,
        float(lr), 1 - lr * weight_decay, *(math.log(beta) if beta else -math.inf for beta in betas),
        *(1 - beta for beta in betas), float(eps),
        WIDTH=width, BLOCK=_BLOCK, ROUND=rounded is not None, MAY_SKIP=found_inf is not None,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    steps.index_add_(0, ids, made if found_inf is None else made * (found_inf == 0))
