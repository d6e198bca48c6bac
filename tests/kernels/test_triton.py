"""The Triton kernels in the interpreter against float64: outputs and every gradient by name."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import NAMES, TOWERS, Case, check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qar_kernels import Adapter, LoRA, Segments, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.tile_plan import tile_plan
from qar_kernels.triton import backend as triton_backend
from qar_kernels.triton import launch, passes, split_k
from qar_kernels.triton.configs import CONFIGS, Gemm
from qar_kernels.triton.lora import NUM_ADAPTER_TENSORS, prepare
from qar_kernels.triton.operands import Constants, Operands
from qar_kernels.triton.runner import recording

pytestmark = pytest.mark.usefixtures("fused_path")


def ids(rows, experts, seed=0, none=True):
    draw = random.Random(seed)
    return [draw.randrange(-1 if none else 0, experts) for _ in range(rows)]


CASES = {
    "ragged, unsorted, some without": Case(ids(37, 4)),
    "one querier owns everything": Case([2] * 37),
    "every row its own querier": Case(list(reversed(range(21))), E=21),
    "empty segments": Case([0, 5, 5, 0, 9] * 4, E=12),
    "no row has an expert": Case([-1] * 19),
    "one expert": Case([0] * 18, E=1),
    "one row": Case([3]),
    "a thousand experts": Case(ids(23, 1000), E=1000, R=8),
    "rank 8": Case(ids(33, 3), E=3, R=8),
    "rank 24": Case(ids(33, 3), E=3, R=24),
    "rank 40, one step and a part": Case(ids(33, 3), E=3, R=40),
    "rank 96, three steps of four": Case(ids(33, 3), E=3, R=96),
    "rank 64": Case(ids(33, 3), E=3, R=64),
    "rank 128": Case(ids(20, 3), E=3, R=128),
    "odd multiples of 16": Case(ids(35, 4), H=112, I=144),
    "one tile's width": Case(ids(16, 4), H=32, I=32),
}


@pytest.fixture
def use_config(monkeypatch):
    def use(config):
        monkeypatch.setitem(CONFIGS, "test", config)
        monkeypatch.setattr(triton_backend, "select_config", lambda *_: "test")

    return use


@pytest.mark.parametrize("name", CASES)
def test_fused(name):
    check(CASES[name], "fused", "triton", torch.float32)


@pytest.mark.parametrize("tower", ["dual", "expert"])
@pytest.mark.parametrize(
    "name", ["ragged, unsorted, some without", "no row has an expert", "one row", "rank 8"]
)
def test_other_towers(name, tower):
    check(CASES[name], tower, "triton", torch.float32)


@pytest.mark.parametrize("tower", TOWERS)
def test_fp16(tower):
    check(Case(ids(37, 4), R=8), tower, "triton", torch.float16)


@pytest.mark.parametrize("tower", TOWERS)
def test_descriptors(use_config, tower):
    use_config(replace(CONFIGS["tiny"], tma=True))
    check(Case(ids(37, 4)), tower, "triton", torch.float16)


def test_rows_that_a_card_cannot_step_over_have_no_descriptor():
    call = SimpleNamespace(config=CONFIGS["sm90_large"], tower="fused")
    rows = torch.zeros(8, 64, dtype=torch.float16)
    assert launch._use_tma(call, rows)
    one = rows[:1].expand(8, 64)[:1]  # contiguous, and without a stride
    for others in (one, rows[:, 1:], torch.zeros(8, 60, dtype=torch.float16), rows[:0]):
        assert not launch._use_tma(call, rows, others)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny"])
def test_shipped_configurations(use_config, name):
    use_config(CONFIGS[name])
    check(Case(ids(150, 5), H=144, I=272, R=64, E=5), "fused", "triton", torch.float16)


@pytest.mark.parametrize("rank", [72, 96, 128])
def test_large_expert_tiles_are_finished_in_halves(use_config, rank):
    use_config(replace(CONFIGS["tiny"], block_expert=64))
    check(Case(ids(70, 2), R=rank, E=2), "fused", "triton", torch.float32)


def split_config(**changed):
    """Few tiles and many parts, one of them empty: H 48 and I 80 in steps of 16."""
    short = Gemm(64, 16, warps=4, stages=1)
    return replace(CONFIGS["tiny"], block_rows=64, down=short, d_x=short, max_splits=4, **changed)


@pytest.fixture
def slots_used(monkeypatch):
    """Number of slots of every split launch, on a chip of 8 multiprocessors."""
    used = []
    monkeypatch.setattr(launch, "_INTERPRETER_PROGRAMS", 8)
    real = split_k.reduce
    monkeypatch.setattr(split_k, "reduce", lambda parts, *rest: used.append(len(parts)) or real(parts, *rest))
    return used


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_split_k(use_config, slots_used, tower, tma):
    use_config(split_config(tma=tma))
    check(Case(ids(37, 4)), tower, "triton", torch.float16 if tma else torch.float32)
    assert slots_used == {"fused": [5, 5], "dual": [4, 4], "expert": []}[tower]


@pytest.mark.parametrize(
    ("tiles", "multiprocessors", "splits"),
    [(64, 132, 2), (32, 132, 4), (98, 132, 2), (99, 132, 1), (132, 132, 1), (1, 132, 8), (9, 2, 1)],
)
def test_number_of_splits(tiles, multiprocessors, splits):
    assert split_k.count(tiles, multiprocessors, max_splits=8) == splits


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_drawn_shapes(data):
    experts = data.draw(st.integers(1, 8), "E")
    case = Case(
        data.draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=40), "ids"),
        H=16 * data.draw(st.integers(1, 4), "H/16"),
        I=16 * data.draw(st.integers(1, 4), "I/16"),
        R=data.draw(st.sampled_from([8, 16, 32, 64]), "R"),
        E=experts,
        seed=data.draw(st.integers(0, 9), "seed"),
    )
    check(case, data.draw(st.sampled_from(TOWERS), "tower"), "triton", torch.float32)


@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_recompute_is_bitwise_equal_in_fp32(tower):
    case = Case(ids(37, 4))
    saved = run(case, tower, "triton", torch.float32)
    recomputed = run(case, tower, "triton", torch.float32, recompute=True)
    assert all(torch.equal(saved[name], recomputed[name]) for name in saved)


@pytest.mark.parametrize("tower", TOWERS)
def test_two_runs_are_bitwise_equal(tower):
    case = Case(ids(37, 4))
    first, second = (run(case, tower, "triton", torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("dtype", "split"), [(torch.float32, False), (torch.float16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("tower", TOWERS)
def test_isolation(use_config, slots_used, tower, dtype, split):
    """Expert 1's rows and gradients do not change with the company it keeps."""
    if split and tower == "expert":
        pytest.skip("no base, so no K to split")
    use_config(split_config() if split else CONFIGS["tiny"])
    mine = [row % 3 == 1 for row in range(40)]
    results = []
    for company in (0, 2, 3, 7):
        others = ids(40, company, seed=company) if company else [-1] * 40
        others = [other + 2 if other >= 0 else -1 for other in others]
        case = Case([1 if own else other for own, other in zip(mine, others, strict=True)], E=9)
        results.append(run(case, tower, "triton", dtype))
    own = torch.tensor(mine)
    for other in results[1:]:
        for name in ("y", "d_x", "y_specific", "d_x_specific"):
            if name in other:
                assert torch.equal(other[name][own], results[0][name][own]), name
        for name in ("d_expert_gate", "d_expert_up", "d_expert_down"):
            assert torch.equal(other[name][1], results[0][name][1]), name


def test_second_backward_over_a_retained_graph():
    case = Case(ids(37, 4))
    leaves = case.leaves(torch.float32)
    names = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
    y = fused_mlp(*(leaves[n] for n in names), Segments.from_ids(case.ids), backend="triton")
    first = torch.autograd.grad(y.sum(), leaves["x"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), leaves["x"])[0])


@pytest.mark.parametrize("wanted", [("x",), ("gate",), ("expert_up",), ("x", "expert_down")])
def test_only_what_needs_a_gradient_is_computed(wanted, monkeypatch):
    case = Case(ids(20, 4))
    leaves = case.leaves(torch.float32, requires_grad=False)
    for name in wanted:
        leaves[name].requires_grad_()
    launched = []
    for step in ("d_input", "expert_weight_grads"):
        real = getattr(launch, step)
        monkeypatch.setattr(launch, step, lambda *a, step=step, real=real: launched.append(step) or real(*a))
    names = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
    y = fused_mlp(*(leaves[n] for n in names), Segments.from_ids(case.ids), backend="triton")
    y.sum().backward()
    assert {n for n in names if leaves[n].grad is not None} == set(wanted)
    expert = any(name.startswith("expert") for name in wanted)
    assert launched == ["d_input"] * ("x" in wanted) + ["expert_weight_grads"] * expert


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def forward(tower):
    case = Case(ids(20, 3), E=3)
    x, *weights = (case.leaves(torch.float32)[n] for n in NAMES)
    seg = Segments.from_ids(case.ids)
    if tower == "fused":
        outputs = (fused_mlp(x, *weights, seg, backend="triton"),)
    elif tower == "dual":
        outputs = dual_mlp(x, 2 * x, *weights, seg, backend="triton")
    else:
        outputs = (expert_mlp(x, *weights[3:], seg, backend="triton"),)
    return outputs, (x, *weights[3:])


@pytest.mark.parametrize("tower", ["fused", "dual", "expert"])
def test_inference_calls_the_operator_only_where_somebody_watches(tower):
    with torch.no_grad():
        plain, _ = forward(tower)
        with Watch() as watch:
            watched, _ = forward(tower)
    assert torch.ops.qar.swiglu_experts.default in watch.seen
    assert all(map(torch.equal, plain, watched))


@pytest.mark.parametrize("tower", ["fused", "dual", "expert"])
def test_training_calls_the_operators_only_where_somebody_watches(tower):
    def step():
        outputs, leaves = forward(tower)
        return *outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), leaves)

    plain = step()
    with Watch() as watch:
        watched = step()
    assert torch.ops.qar.swiglu_experts_backward.default in watch.seen
    assert all(map(torch.equal, plain, watched))


def test_nothing_is_saved_without_grad():
    case = Case(ids(20, 4))
    leaves = case.leaves(torch.float32, requires_grad=False)
    names = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
    y = fused_mlp(*(leaves[n] for n in names), Segments.from_ids(case.ids), backend="triton")
    assert y.grad_fn is None
    trained = case.leaves(torch.float32)
    y = fused_mlp(*(trained[n] for n in names), Segments.from_ids(case.ids), backend="triton", recompute=True)
    saved = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert sum(t.numel() for t in saved if t.is_floating_point()) == sum(trained[n].numel() for n in names)


def test_non_contiguous_rows():
    case = Case(ids(30, 4))
    leaves = case.leaves(torch.float32, requires_grad=False)
    names = ("gate", "up", "down", "expert_gate", "expert_up", "expert_down")
    weights = [leaves[n] for n in names]
    x = leaves["x"].t().contiguous().t()
    seg = Segments.from_ids(case.ids)
    y = fused_mlp(x, *weights, seg, backend="triton")
    assert torch.equal(y, fused_mlp(leaves["x"], *weights, seg, backend="triton"))


@pytest.mark.parametrize(
    ("tower", "lora_rank"), [("fused", 0), ("dual", 0), ("expert", 0), ("fused", 8), ("dual", 8)]
)
def test_nothing_is_read_back_from_the_device(tower, lora_rank):
    """On "meta" tensors reading a value or copying it to the host raises: what a CUDA graph needs."""
    ids = torch.empty(300, dtype=torch.int64, device="meta")
    leaves = {name: t.to("meta", torch.float16) for name, t in Case([0] * 300, R=64).tensors.items()}
    segments = Segments.from_ids(ids)
    plan = triton_backend.plan_tensors(tile_plan(segments, 16, 16))
    base = [leaves[n] for n in ("gate", "up", "down")] if tower != "expert" else []
    x = leaves["x"] if tower != "expert" else None
    x_expert = leaves["x_specific"] if tower != "fused" else None
    experts = [leaves[n] for n in ("expert_gate", "expert_up", "expert_down")]
    d_y = leaves["d_y"] if x is not None else None
    d_y_expert = leaves["d_y_specific"] if x_expert is not None else None
    adapters = []
    if lora_rank:
        hidden, inter = leaves["down"].shape
        up = Adapter(x.new_empty(lora_rank, hidden), x.new_empty(inter, lora_rank), dropout=0.1)
        down = Adapter(x.new_empty(lora_rank, inter), x.new_empty(hidden, lora_rank), dropout=0.1)
        adapters = list(prepare(LoRA(up, up, down), x, inter))
    operands = Operands(x, base, x_expert, experts, None, segments.perm, plan, adapters)
    constants = Constants(tower, 1.0, "sm90_large")
    needs = [x is not None, x is not None, x_expert is not None, True]
    needs += [True] * (NUM_ADAPTER_TENSORS if adapters else 0)
    with recording() as recorded:
        outputs = passes.forward(operands, constants, save=True)
        passes.backward(operands, constants, outputs[2:], d_y, d_y_expert, needs)
    names = [asked.kernel.__name__ for asked in recorded]
    assert names.count("reduce_kernel") == (0 if tower == "expert" else 2)  # down and d_x split K here
    assert len(names) - names.count("reduce_kernel") == 5


@pytest.mark.parametrize("tower", TOWERS)
def test_the_backward_pass_fills_nothing_of_the_hidden_size(tower):
    """Autograd makes zeros for outputs without a gradient, the pre-activations, unless told otherwise."""
    case = CASES["ragged, unsorted, some without"]
    with torch.profiler.profile(record_shapes=True) as profile:
        run(case, tower, "triton", torch.float32)
    made = [event.concrete_inputs[0] for event in profile.events() if event.name == "aten::zeros"]
    assert [len(case.ids), case.I] not in made and [len(case.ids), case.R] not in made
