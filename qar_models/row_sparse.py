"""Row-sparse gradients (:mod:`qar_kernels.row_sparse`) in training: finding, averaging and clipping them.

n experts present. A gradient has indices ``(1, n)`` and values ``(n, ...)``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qar_kernels.distributed import num_ranks
from qar_kernels.row_sparse import row_sparse
from qar_models.distributed import gather_batch

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``(n,)``, each once, and rows ``(n, ...)`` of a row-sparse gradient; rows of one id are summed."""
    ids = gradient._indices()[0]
    # accumulation drops the coalesced flag, but the ids of a single backward pass are in ascending order
    if not gradient.is_coalesced() and not bool((ids[1:] > ids[:-1]).all()):
        gradient = gradient.coalesce()
    return gradient._indices()[0], gradient._values()


def sparse_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are row-sparse, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if hasattr(type(module), "sparse_parameters")  # a wrapper around experts would name them once more
        for name, parameter in module.sparse_parameters.items()
    }


def exclude_from_ddp(module: nn.Module) -> nn.Module:
    """Make DistributedDataParallel leave row-sparse gradients to :func:`average_row_gradients`.

    A querier-aware model, a PEFT model around one and ``torch.compile`` of either need no help; any other
    module that DDP is to wrap (a ``LightningModule``, a module that computes the loss) does: call this on it
    first.

    Returns:
        The same object.
    """
    ignored = [*getattr(module, _DDP_IGNORES, ()), *sparse_parameters(module)]
    vars(module)[_DDP_IGNORES] = ignored  # a compiled module would pass it on to the module it compiles
    return module


@torch.no_grad()
def average_row_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average row-sparse gradients over all ranks, in place; only rows that some rank has are exchanged.

    Call it on every rank with the same parameters, after the backward pass and before the optimizer's step.
    A rank without a gradient counts as zeros. In a single process it does nothing.
    """
    if num_ranks() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            ids, rows = (
                parameter.new_empty(0, dtype=torch.int64),
                parameter.new_empty(0, *parameter.shape[1:]),
            )
        else:
            ids, rows = rows_of(parameter.grad)
        rows, ids = gather_batch(rows[None] / num_ranks(), ids)
        parameter.grad = row_sparse(ids, rows[0], parameter.shape).coalesce() if ids.shape[0] else None


def clip_grad_norm_(parameters: nn.Parameter | Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As :func:`torch.nn.utils.clip_grad_norm_` (2-norm), but row-sparse gradients may be among the dense.

    Returns:
        The norm of all gradients together before clipping, a scalar.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    values = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            ids, gradient = rows_of(gradient)
            parameter.grad = row_sparse(ids, gradient, parameter.shape)
        values.append(gradient)
    total = torch.nn.utils.get_total_norm(values)
    for value in values:
        value.mul_((max_norm / (total + 1e-6)).clamp(max=1.0).to(value.device))
    return total
