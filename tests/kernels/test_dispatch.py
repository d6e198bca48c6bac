"""The dispatcher: overridable, never a path that the table says loses, a rule where nothing was measured."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from helpers import Case
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from qar_kernels import Adapter, LoRA, Segments, dispatch, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.dispatch import Shape, choose_path, default_path
from qar_kernels.dispatch_steps import faster_path, measured_steps
from qar_kernels.triton import backend, configs

CARD = "card"
SHAPE = Shape(4096, 64, 4096, 14336, 64, "bfloat16", training=False)


def cell(ratio, shape=SHAPE, device=CARD):
    return {
        "device": device,
        "pass": "fwd+bwd" if shape.training else "fwd",
        "dtype": shape.dtype,
        "T": shape.rows,
        "Q": shape.segments,
        "R": shape.rank,
        "H": shape.hidden,
        "I": shape.intermediate,
        **({"A": 16} if shape.adapted else {}),
        "fused_over_grouped": ratio,
    }


def measured_path(table, device, shape):
    steps = measured_steps(table, device, shape.dtype, shape.training, shape.adapted)
    return faster_path(steps, shape.hidden, shape.intermediate, shape.rank, shape.segments, shape.rows)


sizes = st.sampled_from([1, 2, 16, 100, 256, 4096])
shapes = st.builds(
    Shape,
    rows=sizes,
    segments=sizes,
    hidden=st.just(4096),
    intermediate=st.just(14336),
    rank=st.sampled_from([8, 64, 128]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    training=st.booleans(),
    adapted=st.booleans(),
)


@given(st.dictionaries(shapes, st.floats(0.5, 2), min_size=1, max_size=12))
def test_a_measured_cell_always_decides_for_itself(ratios):
    table = [cell(ratio, shape) for shape, ratio in ratios.items()]
    for shape, ratio in ratios.items():
        assert measured_path(table, CARD, shape) == ("fused" if ratio <= 1 else "grouped")


@pytest.mark.parametrize(
    ("rows", "expected"), [(3000, "grouped"), (200, "fused"), (1024, "grouped"), (63, None)]
)
def test_the_nearest_cell_within_reach_decides(rows, expected):
    table = [cell(1.1), cell(0.9, replace(SHAPE, rows=256))]
    assert measured_path(table, CARD, replace(SHAPE, rows=rows)) == expected


@given(st.dictionaries(st.integers(1, 300), st.booleans(), min_size=1, max_size=6), st.integers(1, 2000))
def test_steps_are_the_nearest_cell_in_every_size(wins, rows):
    table = [cell(0.9 if won else 1.1, replace(SHAPE, rows=t)) for t, won in wins.items()]
    ratios = {t: max(t, rows) / min(t, rows) for t in wins}
    nearest = [wins[t] for t, ratio in ratios.items() if ratio == min(ratios.values()) <= 4]
    expected = ("fused" if all(nearest) else "grouped") if nearest else None
    assert measured_path(table, CARD, replace(SHAPE, rows=rows)) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 3584},
        {"intermediate": 512},
        {"dtype": "float16"},
        {"training": True},
        {"rank": 8},
        {"adapted": True},
    ],
)
def test_a_cell_speaks_only_for_its_kind(other):
    assert measured_path([cell(1.1)], CARD, replace(SHAPE, **other)) is None
    assert measured_path([cell(1.1)], "another card", SHAPE) is None


@pytest.mark.parametrize("order", [(0.9, 1.1), (1.1, 0.9)])
def test_of_equally_near_cells_the_safe_one_decides(order):
    rows = (1024, 16384)
    table = [cell(ratio, replace(SHAPE, rows=r)) for ratio, r in zip(order, rows, strict=True)]
    assert measured_path(table, CARD, SHAPE) == "grouped"


@pytest.mark.parametrize("order", [(0.9, 1.1), (1.1, 0.9)])
def test_of_cells_that_differ_in_other_things_the_safe_one_decides(order):
    """Such as the number of experts owned, which no choice depends on."""
    assert measured_path([cell(ratio) for ratio in order], CARD, SHAPE) == "grouped"


@pytest.mark.parametrize(
    ("rows", "segments", "path"),
    [(512, 64, "fused"), (513, 1, "grouped"), (256, 256, "grouped"), (1, 1, "fused"), (16, 17, "grouped")],
)
def test_the_rule_where_nothing_was_measured(rows, segments, path):
    assert default_path(replace(SHAPE, rows=rows, segments=segments)) == path


@pytest.mark.parametrize(("rows", "segments", "path"), [(4096, 64, "fused"), (256, 256, "grouped")])
def test_adapters_stay_in_the_kernels_however_many_rows(rows, segments, path):
    assert default_path(replace(SHAPE, rows=rows, segments=segments, adapted=True)) == path


@pytest.mark.parametrize(("rows", "adapted"), [(1, False), (4096, True)])
def test_exact_fp32_is_left_to_the_vendor_library(rows, adapted, monkeypatch):
    shape = replace(SHAPE, rows=rows, segments=1, dtype="float32", adapted=adapted)
    assert default_path(shape) == "grouped"
    monkeypatch.setattr(dispatch, "_several_ranks", lambda: True)
    assert choose_path(torch.device("cpu"), replace(shape, training=True)) == "grouped"


def fill_table(monkeypatch, cells):
    monkeypatch.setattr(dispatch, "MEASUREMENTS", cells)
    monkeypatch.setattr(dispatch, "_cached_steps", lru_cache(lambda *kind: measured_steps(cells, *kind)))


def test_table_before_rule_and_environment_before_both(monkeypatch):
    device = torch.device("cpu")
    assert choose_path(device, SHAPE) == "grouped"
    fill_table(monkeypatch, [cell(0.9, device="cpu")])
    assert choose_path(device, SHAPE) == "fused"
    monkeypatch.setenv("QAR_KERNELS_PATH", "grouped")
    assert choose_path(device, SHAPE) == "grouped"


@pytest.mark.parametrize("trained", ["weights", "adapters", "nothing"])
def test_what_the_operation_asks_for(monkeypatch, trained):
    asked = []
    monkeypatch.setattr(dispatch, "choose_path", lambda device, shape: asked.append(shape) or "fused")
    case = Case([0, 1, 1, -1])
    leaves = case.leaves(torch.float32, requires_grad=trained == "weights")
    names = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
    a, b = torch.zeros(2, case.H), torch.zeros(case.I, 2, requires_grad=trained == "adapters")
    seg, lora = Segments.from_ids(case.ids), LoRA(up=Adapter(a, b))
    fused_mlp(*(leaves[n] for n in names), seg, backend="triton", lora=lora)
    assert asked == [Shape(4, 4, case.H, case.I, case.R, "float32", trained != "nothing", adapted=True)]


def test_of_two_towers_the_rows_of_the_base_count(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "choose_path", lambda device, shape: asked.append(shape.rows) or "fused")
    x, *weights = operands(Case([0, 1, 1, -1]))
    dual_mlp(x, x[:3], *weights, Segments.from_ids([0, 1, -1]), backend="triton")
    assert asked == [4]


@pytest.mark.parametrize(("adapted", "path"), [(False, "grouped"), (True, "fused")])
def test_ranks_that_train_together_take_one_path(monkeypatch, adapted, path):
    """Whatever their numbers of rows and segments, which differ between ranks."""
    few, crowded = (replace(SHAPE, rows=128, segments=n, training=True, adapted=adapted) for n in (1, 100))
    device = torch.device("cpu")
    assert choose_path(device, few) == "fused" and choose_path(device, crowded) == "grouped"
    monkeypatch.setattr(dispatch, "_several_ranks", lambda: True)
    assert choose_path(device, few) == choose_path(device, crowded) == path
    assert choose_path(device, replace(few, training=False)) == "fused"


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((9, 0), None, True), ((8, 9), None, True), ((7, 5), None, False), ((9, 4), "6.0", False)],
)
def test_auto_takes_the_kernels_where_they_were_compiled_for(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    configs._has_kernels.cache_clear()
    with nullcontext() if expected else pytest.warns(UserWarning, match=r"none of NVIDIA's .* 8.9, 9.0"):
        assert configs.has_kernels(torch.device("cuda:0")) is expected
    configs._has_kernels.cache_clear()


@pytest.mark.parametrize(
    ("rows", "segments", "tower", "config"),
    [
        (64, 64, "expert", "decode"),
        (256, 64, "expert", "short"),
        (4096, 256, "expert", "short"),
        (4096, 255, "expert", "experts"),
        (256, 64, "fused", "large"),
    ],
)
def test_blocks_follow_the_rows_of_a_segment(monkeypatch, rows, segments, tower, config):
    monkeypatch.setattr(configs, "_capability", lambda device: (9, 0))
    name = configs.select_config(torch.device("cuda"), torch.bfloat16, rows, tower, segments)
    assert name == f"sm90_{config}"


@pytest.mark.parametrize("sparse", [False, True])
def test_how_many_experts_are_present_decides_nothing(monkeypatch, sparse):
    """Else bits would depend on the company: for row-sparse gradients kernels get copies of those present."""
    asked = []
    select, choose = backend.select_config, choose_path
    monkeypatch.setattr(backend, "select_config", lambda *a: asked.append(a[-1]) or select(*a))
    monkeypatch.setattr(dispatch, "choose_path", lambda *a: asked.append(a[-1].segments) or choose(*a))
    x, *weights = operands(Case([0, 1, 1, -1, 1], E=4))
    for ids in ([0, 1, 1, -1, 1], [0, 1, 2, 3, -1], [-1] * 5):
        seg = Segments.from_ids(ids)
        fused_mlp(x, *weights, seg, backend="triton", sparse_gradients=sparse)
        expert_mlp(x, *weights[3:], seg, backend="triton", sparse_gradients=sparse)
    assert set(asked) == {4} and len(asked) == 9


def test_a_cpu_is_not_warned_of(recwarn):
    assert not configs.has_kernels(torch.device("cpu")) and not recwarn


def operands(case, **options):
    leaves = case.leaves(torch.float32, **options)
    return [leaves[n] for n in ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")]


def test_compiled_programs_take_the_measured_path(monkeypatch):
    """As many programs as there are paths, and one of a fixed size that the first call makes."""
    case = Case([0, 1, 1, -1])
    shape = Shape(4, 4, case.H, case.I, case.R, "float32", training=False)
    ratios = {4: 0.9, 8: 0.9, 16: 0.9, 32: 1.1, 64: 1.1, 128: 1.1}
    cells = [cell(r, replace(shape, rows=t, segments=q), "cpu") for t, r in ratios.items() for q in (1, 4)]
    fill_table(monkeypatch, cells)
    x, *weights = operands(case, requires_grad=False)
    programs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=programs)
    def step(x, ids):
        return fused_mlp(x, *weights, Segments.from_ids(ids), backend="triton")

    for rows in (4, 17, 20, 24, 40, 60, 19, 50):
        many, ids = x[0].expand(rows, -1), torch.arange(rows) % 2
        torch.testing.assert_close(step(many, ids), fused_mlp(many, *weights, Segments.from_ids(ids)))
    assert ["'fused'" in program.code for program in programs.graphs] == [True, True, False]


def test_compiled_programs_take_symbols_for_every_size():
    """H, I and R are symbols where a compiled function sees a second one of each."""
    torch._dynamo.reset()
    step = torch.compile(
        lambda ids, *leaves: fused_mlp(*leaves, Segments.from_ids(ids), backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for sizes in ({}, {"R": 8}, {"H": 64, "I": 48}, {"E": 7}):
        case = Case([0, 1, 1, -1], **sizes)
        leaves = operands(case, requires_grad=False)
        expected = fused_mlp(*leaves, Segments.from_ids(case.ids))
        torch.testing.assert_close(step(torch.tensor(case.ids), *leaves), expected)


def test_a_checkpoint_draws_the_same_dropout_on_the_way_there_and_back(monkeypatch):
    """The reentrant kind runs a first pass without gradients, for which other paths may be measured."""
    case = Case([0, 1, 1, -1])
    by_pass = lambda device, shape: "fused" if shape.training else "grouped"  # noqa: E731
    monkeypatch.setattr(dispatch, "choose_path", by_pass)
    x, *weights = operands(case, requires_grad=True)
    seg, a, b = Segments.from_ids(case.ids), torch.randn(2, case.I), torch.randn(case.H, 2)
    lora, seen = LoRA(down=Adapter(a, b, dropout=0.5)), []

    def layer(x):
        seen.append(fused_mlp(x, *weights, seg, backend="triton", lora=lora))
        return seen[-1]

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert torch.equal(*(y.detach() for y in seen))
