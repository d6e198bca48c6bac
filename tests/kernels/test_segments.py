"""Segments and the tile plan: every row exactly once, whatever the ids."""

import dataclasses

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from qar_kernels import Segments, segments
from qar_kernels.tile_plan import tile_plan

META = torch.zeros(2, dtype=torch.int64, device="meta")
IDS = st.lists(st.integers(-1, 6), min_size=1, max_size=60)


@settings(deadline=None)
@given(IDS)
def test_rows_are_grouped_stably(ids):
    seg = Segments.from_ids(ids)
    expected = sorted(range(len(ids)), key=lambda row: (ids[row] < 0, ids[row]))
    assert seg.perm.tolist() == expected
    bounds = seg.offsets.tolist()
    for expert, start, end in zip(seg.experts.tolist(), bounds, bounds[1:], strict=False):
        assert {ids[row] for row in expected[start:end]} == ({expert} if expert >= 0 else set())
    assert bounds[-1] == sum(i >= 0 for i in ids)


@settings(deadline=None)
@given(IDS, st.sampled_from([1, 4, 16]), st.sampled_from([4, 16]))
def test_tiles_cover_every_row_once(ids, block_expert, block_rows):
    seg = Segments.from_ids(ids)
    plan = tile_plan(seg, block_rows, block_expert)
    assert plan.inverse_perm[seg.perm].tolist() == list(range(len(ids)))
    with_experts, everything = plan.tile_count.tolist()
    owned = []
    for tile in range(everything):
        segment = int(plan.tile_segment[tile])
        start = int(plan.tile_start[tile])
        rows = range(start, min(start + block_expert, int(plan.offsets[segment + 1])))
        assert len(rows) > 0
        assert (int(plan.experts[segment]) >= 0) == (tile < with_experts)
        assert {ids[row] for row in seg.perm[list(rows)].tolist()} == {int(plan.experts[segment])}
        owned += rows
    assert sorted(owned) == list(range(len(ids)))
    assert everything <= -(-len(ids) // block_expert) + min(len(ids), 7) + 1  # what a launch's grid relies on
    assert int(plan.segment_count) == len(set(ids) - {-1})


@settings(deadline=None)
@given(IDS, st.sampled_from([1, 4, 16]))
def test_row_tiles_meet_exactly_their_segments(ids, block_rows):
    seg = Segments.from_ids(ids)
    plan = tile_plan(seg, block_rows, 16)
    sorted_ids = [ids[row] for row in seg.perm.tolist()]
    for tile, (first, last) in enumerate(zip(plan.first_segment, plan.last_segment, strict=True)):
        met = set(sorted_ids[tile * block_rows : (tile + 1) * block_rows]) - {-1}
        assert plan.experts[int(first) : int(last)].tolist() == sorted(met)


def test_the_plan_is_made_once():
    seg = Segments.from_ids([0, 1, 1, -1])
    assert tile_plan(seg, 16, 16) is tile_plan(seg, 16, 16)
    assert tile_plan(seg, 16, 16) is not tile_plan(seg, 32, 16)
    assert tile_plan(seg, 16, 16) is not tile_plan(seg, 16, 32)


def test_what_a_capture_computes_serves_it_alone(monkeypatch):
    """Before its graph is replayed it holds nothing; eager results are there in every replay."""
    before, fresh = Segments.from_ids([1, 0, 1]), Segments.from_ids([1, 0, 1])
    eager = tile_plan(before, 16, 16), before.slots[0]
    for asked in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, asked, lambda: True)
    assert (tile_plan(before, 16, 16), before.slots[0]) == eager
    assert tile_plan(fresh, 16, 16) is not tile_plan(fresh, 16, 16)
    assert fresh.slots[0] is not fresh.slots[0]
    inside = Segments.from_ids([1, 0, 1])
    assert tile_plan(inside, 16, 16) is tile_plan(inside, 16, 16)
    monkeypatch.undo()
    assert tile_plan(inside, 16, 16) is not tile_plan(inside, 16, 16)


def test_layers_of_a_compiled_program_share_a_plan():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph.graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def layers(ids):
        seg = Segments.from_ids(ids)
        return [tile_plan(seg, 16, 16).inverse_perm + layer for layer in range(4)]

    with torch.no_grad():
        layers(torch.tensor([1, 0, 1]))
    (graph,) = graphs
    assert searches(graph) == ONCE


ONCE = 1 + 3  # the offsets, and what a plan looks up


def searches(graph):
    return sum("searchsorted" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_of_a_compiled_training_step_share_a_plan(checkpointed):
    """Each makes it anew: a checkpointed layer may change nothing outside. The compiler merges them."""
    torch._dynamo.reset()
    found = []

    def keep(graph, example_inputs):
        found.append(searches(graph.graph))
        return make_boxed_func(graph.forward)

    def layer(x, seg):
        plan = tile_plan(seg, 16, 16)
        return x * sum(getattr(plan, field.name).sum() for field in dataclasses.fields(plan))

    def layers(x, ids):
        seg = Segments.from_ids(ids)
        for _ in range(4):
            x = checkpoint(layer, x, seg, use_reentrant=False) if checkpointed else layer(x, seg)
        return x

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    x, ids = torch.randn(3, requires_grad=True), torch.tensor([1, 0, 1])
    y = torch.compile(layers, fullgraph=True, backend=backend)(x, ids)
    y.sum().backward()
    assert found[0] == ONCE and sum(found) <= 2 * ONCE
    torch.testing.assert_close(y, layers(x, ids))


def test_segments_made_before_are_not_sorted_again_in_a_compiled_program(monkeypatch):
    """As on an accelerator, where the host reads no ids."""
    monkeypatch.setattr(segments, "is_readable", lambda tensor: False)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph.graph)
        return graph.forward

    made = Segments.from_ids([1, 0, 1])
    layers = torch.compile(lambda seg: tile_plan(seg, 16, 16).inverse_perm, fullgraph=True, backend=keep)
    assert layers(made).tolist() == [1, 0, 2]
    assert not [node for node in graphs[0].nodes if node.target == "sort"]


def test_constructors_agree():
    by_row = Segments.from_ids([2, 2, 2, -1, -1, -1, 0, 0, 0])
    by_sequence = Segments.from_sequences([2, -1, 0], seq_len=3)
    packed = Segments.from_cu_seqlens([2, -1, 0], [0, 3, 6, 9])
    for seg in (by_sequence, packed):
        assert seg.row_expert.tolist() == by_row.row_expert.tolist()
        assert seg.perm.tolist() == by_row.perm.tolist()
        assert seg.experts[seg.experts >= 0].tolist() == by_row.experts[by_row.experts >= 0].tolist()


def test_empty_sequences_and_batches():
    assert Segments.from_cu_seqlens([1, 0, 2], [0, 0, 2, 5]).row_expert.tolist() == [0, 0, 2, 2, 2]
    assert Segments.from_ids([]).num_rows == 0
    nothing = Segments.from_ids(torch.empty(0, dtype=torch.int64))
    assert [len(tensor) for tensor in nothing.sorted_rows] == [0, 1, 0] and len(nothing.present[0]) == 0
    assert Segments.from_sequences([1, 2], seq_len=0).num_rows == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Segments.from_ids(None), TypeError, "expert_ids: got NoneType, expected integers"),
        (lambda: Segments.from_ids(["anna"]), TypeError, "expert_ids: got list, expected integers"),
        (lambda: Segments.from_sequences([0], seq_len=2.0), TypeError, "seq_len: got float"),
        (lambda: Segments.from_cu_seqlens([0], [0, 2], num_rows=2.0), TypeError, "num_rows: got float"),
        (lambda: Segments.from_ids([0.5]), TypeError, "expert_ids: got dtype"),
        (lambda: Segments.from_ids([[0]]), ValueError, "expert_ids: got shape"),
        (lambda: Segments.from_ids([-2]), ValueError, "expert_ids: got -2"),
        (lambda: Segments.from_ids(torch.tensor([True])), TypeError, "expert_ids: got dtype"),
        (lambda: Segments.from_sequences([0], seq_len=-1), ValueError, "seq_len: got -1"),
        (lambda: Segments.from_cu_seqlens([0], [0, 1, 2]), ValueError, "cu_seqlens: got 3 values"),
        (lambda: Segments.from_cu_seqlens([0, 1], [0, 3, 2]), ValueError, "non-decreasing"),
        (lambda: Segments.from_cu_seqlens([0], [1, 2]), ValueError, "non-decreasing values from 0"),
        (lambda: Segments.from_cu_seqlens([0], [0, 2], num_rows=3), ValueError, "num_rows: got 3"),
        (lambda: Segments.from_cu_seqlens(META[:1], META), ValueError, "num_rows: missing"),
    ],
)
def test_bad_ids(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_present_experts_are_renumbered():
    seg = Segments.from_ids([5, 2, 5, -1, 2, 2, 9, 5])
    ids, renumbered = seg.present
    assert ids.tolist() == [2, 5, 9]
    assert renumbered.row_expert.tolist() == [1, 0, 1, -1, 0, 0, 2, 1]
    assert renumbered.experts.tolist()[:4] == [0, 1, 2, -1] and renumbered.max_id == 2
    assert renumbered.perm is seg.perm and renumbered.offsets is seg.offsets
    ids, slots = seg.slots
    assert ids.tolist() == [2, 5, 9, 0, 0, 0, 0, 0] and slots.experts.tolist() == renumbered.experts.tolist()
    nobody = Segments.from_ids([-1, -1]).present
    assert nobody[0].tolist() == [] and nobody[1].row_expert.tolist() == [-1, -1]


def test_ids_are_copied():
    ids = torch.tensor([2, 0, 2])
    segments = Segments.from_ids(ids)
    ids.zero_()
    assert segments.row_expert.tolist() == [2, 0, 2]


def test_segments_from_a_compiled_program_keep_what_eager_code_computes():
    """As behind a graph break: otherwise every layer would compute it again."""
    made = torch.compile(lambda ids: Segments.from_ids(ids), backend="eager", fullgraph=True)(
        torch.tensor([1, 0])
    )
    assert made._mode == "traced"
    assert made.present is made.present and tile_plan(made, 16, 16) is tile_plan(made, 16, 16)
