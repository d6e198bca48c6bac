"""Products of grouped rows with their own experts' matrices, on a CPU.

Small experts of equally long segments share batched products, for which their weights are copied once per
segment (never once per row); large ones, and a single expert, are read in place. Absent experts are never
touched.

T rows in grouped order, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from qar_kernels.row_groups import Group, RowGroups, group_rows
from qar_kernels.row_sparse import row_sparse

# Measured on one core: up to this size copying an expert costs less than the calls that batched products
# save.
_COPY_BYTES = 64 * 2**10
# A group's copies stay within a core's second-level cache.
_CACHE_BYTES = 2**20
# From this many multiply-adds on PyTorch leaves batched products to the vendor's library, as it does plain
# ones: their bits are then the same.
_LEAST_ALONE = 400


def _most_together(weight: Tensor) -> int:
    """How many experts' weights ``(E, R, H)`` may be copied to share a batched product."""
    each = weight.shape[1] * weight.shape[2] * weight.element_size()
    return _CACHE_BYTES // each if 0 < each <= _COPY_BYTES else 1


class Products(Protocol):
    """The products of one batch, every row with its own expert's matrix.

    Rows are ``(T, n)`` in grouped order, in the form that :meth:`to_grouped` returns. Weights are
    ``(E, m, n)``, gradients of the outputs ``(T, m)``.
    """

    def to_grouped(self, tensor: Tensor) -> Tensor:
        """``(T, n)`` in the batch's order, reordered and reshaped to grouped rows."""

    def to_batch_order(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_grouped`; zeros where a row has no expert."""

    def as_grouped(self, tensor: Tensor) -> Tensor:
        """``(T, n)`` already in grouped order, reshaped to grouped rows."""

    def select_weights(self, weight: Tensor) -> Tensor:
        """The weights in the form that the products take; select once for both passes."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """``F.linear`` of every row with its own expert's weight."""

    def linear_backward(self, d_out: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
        """The gradient of ``x`` in :meth:`linear`, added to ``add_to`` if given."""

    def weight_gradient(self, d_out: Tensor, x: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
        """The gradient of weights of ``shape`` in :meth:`linear`, zero for absent experts.

        Where ``sparse`` in COO layout, with values for the experts present only.
        """


def make_products(row_expert: Tensor, weight: Tensor) -> Products:
    """The products of a batch with experts of the shape of ``weight`` (E, R, H).

    ``row_expert`` (T,) is read on the host: the expert of each row, negative for none.

    Raises:
        ValueError: if there is no such expert.
    """
    groups = group_rows(row_expert, _most_together(weight))
    if groups.max_id >= weight.shape[0]:
        raise ValueError(f"seg: got expert id {groups.max_id}, expected ids below {weight.shape[0]} experts")
    if groups.whole is None:
        return ManyGroups(groups)
    return OneGroup(groups, groups.whole, _is_alone(groups.whole, weight))


class OneGroup:
    """All rows are one group, as when all sequences are equally long: no splitting, half the calls.

    Rows are ``(count, length, n)``, or ``(T, n)`` for a single expert (``alone``).
    """

    def __init__(self, groups: RowGroups, group: Group, alone: bool) -> None:
        self.groups, self.group, self.alone = groups, group, alone
        self.product = torch.mm if alone else torch.bmm

    def to_grouped(self, tensor: Tensor) -> Tensor:
        """See :class:`Products`."""
        if self.groups.order is not None:
            tensor = tensor.index_select(0, self.groups.order)
        return self.as_grouped(tensor)

    def to_batch_order(self, rows: Tensor) -> Tensor:
        """See :class:`Products`."""
        if not self.alone:
            rows = rows.view(-1, rows.shape[2])
        return rows if self.groups.order is None else _in_batch(rows, self.groups)

    def as_grouped(self, tensor: Tensor) -> Tensor:
        """See :class:`Products`."""
        return tensor if self.alone else _batch(tensor, self.group)

    def select_weights(self, weight: Tensor) -> Tensor:
        """The group's experts ``(count, m, n)``, a lone one's ``(m, n)``."""
        return weight[self.group.experts.start] if self.alone else _weights(weight, self.group)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Products`."""
        return self.product(x, weight.mT)

    def linear_backward(self, d_out: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
        """See :class:`Products`."""
        if add_to is None:
            return self.product(d_out, weight)
        return add_to.addmm_(d_out, weight) if self.alone else add_to.baddbmm_(d_out, weight)

    def weight_gradient(self, d_out: Tensor, x: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
        """See :class:`Products`."""
        grad = self.product(d_out.mT, x).view(-1, *shape[1:])
        at = self.group.slots if sparse else self.group.experts
        if not isinstance(at, slice):
            grad = _gradient(grad, self.groups, shape, sparse).index_copy_(0, at, grad)
        elif not sparse and len(grad) < shape[0]:
            all_grads = grad.new_zeros(shape)
            all_grads[at] = grad
            grad = all_grads
        return row_sparse(self.groups.present, grad, shape) if sparse else grad


class ManyGroups:
    """Group by group, into buffers shared by all groups. Rows are ``(T, n)``."""

    def __init__(self, groups: RowGroups) -> None:
        self.groups = groups

    def to_grouped(self, tensor: Tensor) -> Tensor:
        """See :class:`Products`."""
        order = self.groups.order
        return tensor if order is None else tensor.index_select(0, order)

    def to_batch_order(self, rows: Tensor) -> Tensor:
        """See :class:`Products`."""
        return _in_batch(rows, self.groups)

    def as_grouped(self, tensor: Tensor) -> Tensor:
        """See :class:`Products`."""
        return tensor

    def select_weights(self, weight: Tensor) -> Tensor:
        """All of them: copies are made group by group, so that they stay in the cache."""
        return weight

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Products`."""
        out = x.new_empty(x.shape[0], weight.shape[1])
        transposed = weight.mT
        for group, part, out_part in self._parts(x, out):
            if _is_alone(group, weight):
                torch.mm(part, transposed[group.experts.start], out=out_part)
            else:
                torch.bmm(_batch(part, group), _weights(weight, group).mT, out=_batch(out_part, group))
        return self._cleared(out)

    def linear_backward(self, d_out: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
        """See :class:`Products`."""
        d_x = d_out.new_empty(d_out.shape[0], weight.shape[2]) if add_to is None else add_to
        beta = 0 if add_to is None else 1
        for group, part, d_part in self._parts(d_out, d_x):
            if _is_alone(group, weight):
                torch.addmm(d_part, part, weight[group.experts.start], beta=beta, out=d_part)
            else:
                batch = _batch(d_part, group)
                torch.baddbmm(batch, _batch(part, group), _weights(weight, group), beta=beta, out=batch)
        return d_x if beta else self._cleared(d_x)

    def weight_gradient(self, d_out: Tensor, x: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
        """See :class:`Products`."""
        grad = _gradient(x, self.groups, shape, sparse)
        for group, d_part, part in self._parts(d_out, x):
            at = group.slots if sparse else group.experts
            if _is_alone(group, grad):
                torch.mm(d_part.t(), part, out=grad[at.start])
            elif isinstance(at, slice):
                torch.bmm(_batch(d_part, group).mT, _batch(part, group), out=grad[at])
            else:
                grad.index_copy_(0, at, torch.bmm(_batch(d_part, group).mT, _batch(part, group)))
        return row_sparse(self.groups.present, grad, shape) if sparse else grad

    def _parts(self, left: Tensor, right: Tensor) -> Iterator[tuple[Group, Tensor, Tensor]]:
        """Each group with its rows of both; views made in one call cost a third of slicing."""
        lengths = self.groups.lengths
        lefts, rights = left.split_with_sizes(lengths), right.split_with_sizes(lengths)
        return zip(self.groups.groups, lefts, rights, strict=False)  # the rest has no expert

    def _cleared(self, tensor: Tensor) -> Tensor:
        """``tensor`` with zeros in the rows without an expert, which come last."""
        if self.groups.lengths[-1]:
            tensor[self.groups.used :] = 0
        return tensor


def _in_batch(tensor: Tensor, groups: RowGroups) -> Tensor:
    return tensor if groups.order is None else torch.empty_like(tensor).index_copy_(0, groups.order, tensor)


def _is_alone(group: Group, weight: Tensor) -> bool:
    """Whether a plain product, with fewer calls than a batch of one, is bitwise equal to a batched one."""
    size = (group.stop - group.start) * weight.shape[1] * weight.shape[2]
    return group.count == 1 and size >= _LEAST_ALONE


def _batch(part: Tensor, group: Group) -> Tensor:
    """A group's rows ``(count * length, n)`` as ``(count, length, n)``."""
    return part.view(group.count, -1, part.shape[1])


def _weights(weight: Tensor, group: Group) -> Tensor:
    """The group's experts: a view if their ids are consecutive, else a copy."""
    if isinstance(group.experts, slice):
        return weight[group.experts]
    return weight.index_select(0, group.experts)


def _gradient(like: Tensor, groups: RowGroups, shape: torch.Size, sparse: bool) -> Tensor:
    """The buffer for the experts' gradients, zeroed if some experts are absent."""
    count = len(groups.experts)
    # If every row gets written, nothing needs zeroing: filling is half the cost of a small batch.
    return like.new_empty(count, *shape[1:]) if sparse or count == shape[0] else like.new_zeros(shape)
