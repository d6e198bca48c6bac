"""Groups hold every row once, in runs of equally long segments of the right experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qar_kernels import Segments, expert_mlp, row_products, torch_backend
from qar_kernels.row_groups import group_rows


def groups_of(ids, most):
    return group_rows(torch.tensor(ids, dtype=torch.int64), most)


def numbers(index):
    """A group's experts or slots, spelled out."""
    return torch.arange(index.start, index.stop) if isinstance(index, slice) else index


def expert_of_rows(groups, rows):
    """The expert of each row, read back from the groups."""
    order = torch.arange(rows) if groups.order is None else groups.order
    found = torch.full((rows,), -1)
    for group, part in zip(groups.groups, order.split(groups.lengths), strict=False):
        ids = numbers(group.experts)
        assert len(ids) == group.count
        assert torch.equal(part, order[group.start : group.stop])
        assert torch.equal(groups.present[numbers(group.slots)], ids)
        length = (group.stop - group.start) // group.count
        found[order[group.start : group.stop]] = ids.repeat_interleave(length)
    return found


@given(st.lists(st.integers(-1, 9), max_size=40), st.sampled_from([1, 2, 100]))
def test_every_row_is_in_the_group_of_its_expert(ids, most):
    groups = groups_of(ids, most)
    assert expert_of_rows(groups, len(ids)).tolist() == ids
    assert groups.used == sum(id >= 0 for id in ids)
    assert groups.present.tolist() == sorted({id for id in ids if id >= 0})
    assert groups.max_id == max(ids, default=-1)
    if most == 1:
        assert all(group.count == 1 for group in groups.groups)


@pytest.mark.parametrize("ids", [[4, 4, 1, 1, 7, 7], [3, 3, 3], [2, 0, 1, -1], []])
def test_whole_sequences_keep_the_order_of_the_batch(ids):
    assert groups_of(ids, 100).order is None


def test_neighbours_are_a_slice_and_others_come_a_few_at_a_time():
    neighbours = groups_of([5, 6, 7, 8], 2).groups
    assert [group.experts for group in neighbours] == [slice(5, 9)]
    others = groups_of([5, 7, 9, 11, 13], 2).groups
    assert [group.count for group in others] == [2, 2, 1]


def test_read_once_and_shared_by_layers():
    segments, layers = Segments.from_ids([1, 0, 1]), torch.randn(2, 2, 4, 8)
    assert torch_backend.products_of(segments, layers[0]) is torch_backend.products_of(segments, layers[1])


def test_an_expert_that_is_not_there_is_named_where_only_the_groups_know_it():
    weights = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(2, 8, 4)
    segments = Segments.from_ids([0, 3])
    with pytest.raises(ValueError, match="got expert id 3, expected ids below 2"):
        torch_backend.expert_mlp(torch.randn(2, 8), *weights, segments)


@pytest.mark.parametrize("limit", ["_COPY_BYTES", "_CACHE_BYTES"])
def test_copied_and_read_in_place_agree(limit, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    shapes = ((9, 4, 16), (9, 4, 16), (9, 16, 4))
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ids = torch.tensor([3, 3, 8, 8, 0, 0, 5, 5, 1, 1, -1, 7, 7, 7, 2, 4, 4, 4, 6, 8, 0, 5, -1])

    def outcome():
        y = expert_mlp(x, *weights, Segments.from_ids(ids), backend="torch")
        return [y, *torch.autograd.grad(y.square().sum(), [x, *weights])]

    together = outcome()
    each = shapes[0][1] * shapes[0][2] * 8
    monkeypatch.setattr(row_products, limit, 0 if limit == "_COPY_BYTES" else 2 * each)
    for a, b in zip(together, outcome(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("rank", [2, 4, 16])
def test_a_segment_alone_has_the_bits_of_one_in_a_batch(length, rank):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((9, rank, 48), (9, rank, 48), (9, 48, rank))]
    x = torch.randn(3 * length, 48)

    def outcome(ids):
        leaves = [t.clone().requires_grad_() for t in (x[: len(ids) * length], *weights)]
        y = expert_mlp(*leaves, Segments.from_sequences(ids, length), backend="torch")
        d_x, *d_weights = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [y[:length], d_x[:length], *(d_weight[4] for d_weight in d_weights)]

    try:
        for alone, together in zip(outcome([4]), outcome([4, 0, 7]), strict=True):
            assert torch.equal(alone, together)
    finally:
        torch.set_num_threads(threads)
