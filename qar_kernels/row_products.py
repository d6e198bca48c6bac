"""Products of grouped rows with their own experts' matrices, on a CPU.

Small experts of equally long segments share batched products, for which their weights are copied once a
segment (never once a row); large ones, and an expert alone, are read in place. Absent experts are never
touched.

T rows in grouped order, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels.row_groups import Group, RowGroups
from qar_kernels.row_sparse import row_sparse

# Measured on one core: up to here a copy of an expert costs less than the calls that batched products save.
_COPY_BYTES = 64 * 2**10
# Copies of a group stay in a core's second-level cache.
_CACHE_BYTES = 2**20
# Multiply-adds from which PyTorch leaves a product in a batch to the vendor's library, as it does with one
# alone: the bits are the same from there on.
_LEAST_ALONE = 400


def most_together(weight: Tensor) -> int:
    """How many experts' weights ``(E, R, H)`` may be copied to share a batched product."""
    each = weight.shape[1] * weight.shape[2] * weight.element_size()
    return _CACHE_BYTES // each if 0 < each <= _COPY_BYTES else 1


def in_groups(tensor: Tensor, rows: RowGroups) -> Tensor:
    """Rows of ``(T, n)`` from the batch's order into the grouped one."""
    return tensor if rows.order is None else tensor.index_select(0, rows.order)


def in_batch(tensor: Tensor, rows: RowGroups) -> Tensor:
    """Rows of ``(T, n)`` from the grouped order back into the batch's."""
    return tensor if rows.order is None else torch.empty_like(tensor).index_copy_(0, rows.order, tensor)


def linear(x: Tensor, weight: Tensor, rows: RowGroups) -> Tensor:
    """Every row through its own ``weight`` (E, m, n), as ``F.linear`` would: ``x`` (T, n) -> (T, m).

    Rows without an expert give zeros.
    """
    whole = rows.whole
    if whole is not None:
        if _alone(whole, weight):
            return F.linear(x, weight[whole.experts.start])
        return torch.bmm(_batch(x, whole), _weights(weight, whole).mT).view(x.shape[0], -1)
    out = x.new_empty(x.shape[0], weight.shape[1])
    transposed = weight.mT
    for group, part, out_part in zip(rows.groups, rows.parts(x), rows.parts(out), strict=False):
        if _alone(group, weight):
            torch.mm(part, transposed[group.experts.start], out=out_part)
        else:
            torch.bmm(_batch(part, group), _weights(weight, group).mT, out=_batch(out_part, group))
    return _cleared(out, rows)


def linear_backward(d_out: Tensor, weight: Tensor, rows: RowGroups, add_to: Tensor | None = None) -> Tensor:
    """The gradient of ``x`` in :func:`linear`: ``d_out`` (T, m) -> (T, n), added to ``add_to`` if given."""
    whole = rows.whole
    if whole is not None and add_to is None:
        if _alone(whole, weight):
            return torch.mm(d_out, weight[whole.experts.start])
        return torch.bmm(_batch(d_out, whole), _weights(weight, whole)).view(d_out.shape[0], -1)
    if whole is not None and _alone(whole, weight):
        return add_to.addmm_(d_out, weight[whole.experts.start])
    d_x = d_out.new_empty(d_out.shape[0], weight.shape[2]) if add_to is None else add_to
    beta = 0 if add_to is None else 1
    for group, part, d_part in zip(rows.groups, rows.parts(d_out), rows.parts(d_x), strict=False):
        if _alone(group, weight):
            torch.addmm(d_part, part, weight[group.experts.start], beta=beta, out=d_part)
        else:
            batch = _batch(d_part, group)
            torch.baddbmm(batch, _batch(part, group), _weights(weight, group), beta=beta, out=batch)
    return d_x if beta else _cleared(d_x, rows)


def weight_gradient(d_out: Tensor, x: Tensor, like: Tensor, rows: RowGroups, sparse: bool) -> Tensor:
    """The gradient of the weights ``like`` (E, m, n) in :func:`linear`, zero for absent experts.

    Where ``sparse`` in COO layout, with values for the experts present only.
    """
    count, owned = rows.present.shape[0], like.shape[0]
    # Where every row is written there is nothing to clear: filling is half the cost of a small batch.
    grad = like.new_empty(count, *like.shape[1:]) if sparse or count == owned else torch.zeros_like(like)
    for group, d_part, part in zip(rows.groups, rows.parts(d_out.t(), 1), rows.parts(x), strict=False):
        at = group.slots if sparse else group.experts
        if _alone(group, like):
            torch.mm(d_part, part, out=grad[at.start])
        elif isinstance(at, slice):
            torch.bmm(_batch(d_part.t(), group).mT, _batch(part, group), out=grad[at])
        else:
            grad.index_copy_(0, at, torch.bmm(_batch(d_part.t(), group).mT, _batch(part, group)))
    return row_sparse(rows.present, grad, like.shape) if sparse else grad


def _alone(group: Group, weight: Tensor) -> bool:
    """Whether a plain product, fewer calls than a batch of one, gives the bits of a batched one."""
    size = (group.stop - group.start) * weight.shape[1] * weight.shape[2]
    return group.count == 1 and size >= _LEAST_ALONE


def _batch(part: Tensor, group: Group) -> Tensor:
    """A group's rows ``(count * length, n)`` as ``(count, length, n)``."""
    return part.view(group.count, -1, part.shape[1])


def _weights(weight: Tensor, group: Group) -> Tensor:
    """The group's experts: a view where they are neighbours, else a copy."""
    if isinstance(group.experts, slice):
        return weight[group.experts]
    return weight.index_select(0, group.experts)


def _cleared(tensor: Tensor, rows: RowGroups) -> Tensor:
    """``tensor`` with zeros in the rows without an expert, which come last."""
    if rows.lengths[-1]:
        tensor[rows.used :] = 0
    return tensor
