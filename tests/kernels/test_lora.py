"""LoRA on the base projections in every backend against the formula in float64, with the same masks."""

from dataclasses import replace

import pytest
import torch
from helpers import Case
from lora_helpers import (
    PROJECTIONS,
    RANKS,
    SCALES,
    WEIGHTS,
    check,
    factor_names,
    formula,
    leaves,
    operation,
    run,
    unpack,
    with_factors,
    with_grads,
)
from test_triton import ids, slots_used, split_config, use_config  # noqa: F401

from qar_kernels import Adapter, LoRA, Segments
from qar_kernels.triton import lora as triton_lora
from qar_kernels.triton import passes
from qar_kernels.triton.configs import CONFIGS

BACKENDS = ("triton", "torch", "reference")
pytestmark = pytest.mark.usefixtures("fused_path")


@pytest.mark.parametrize(
    ("tower", "dropout", "dtype"),
    [
        ("fused", 0.0, torch.float16),
        ("fused", 0.3, torch.float32),
        ("dual", 0.0, torch.float32),
        ("dual", 0.3, torch.float16),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(monkeypatch, backend, tower, dropout, dtype):
    check(monkeypatch, Case(ids(21, 4)), tower, backend, dtype, dropout=dropout)


@pytest.mark.parametrize(
    ("projections", "dropout"), [(("gate",), 0.3), (("down",), 0.0), (("up", "down"), 0.3)]
)
def test_some_projections(monkeypatch, projections, dropout):
    ranks = {name: RANKS[name] for name in projections}
    check(monkeypatch, Case(ids(9, 4)), "fused", "triton", torch.float32, ranks, dropout)


@pytest.mark.parametrize(
    "case",
    [Case([-1] * 19), Case([3]), Case(ids(20, 3), E=3, I=84)],
    ids=["no row has an expert", "one row", "a mask byte that is cut"],
)
def test_shapes(monkeypatch, case):
    check(monkeypatch, case, "fused", "triton", torch.float32, dropout=0.3)


def test_ranks_of_several_steps(monkeypatch):
    ranks = {"gate": 64, "up": 1, "down": 80}
    check(monkeypatch, Case(ids(9, 4)), "fused", "triton", torch.float32, ranks, dropout=0.3)


@pytest.mark.parametrize(("tower", "tma"), [("fused", True), ("dual", False)])
def test_split_k(monkeypatch, use_config, slots_used, tower, tma):  # noqa: F811
    """The low-rank step is in one slot of ``down``; ``d_x`` has none."""
    use_config(split_config(tma=tma))
    check(
        monkeypatch, Case(ids(21, 4)), tower, "triton", torch.float16 if tma else torch.float32, dropout=0.3
    )
    assert slots_used == {"fused": [5, 5], "dual": [4, 4]}[tower]


def test_descriptors(monkeypatch, use_config):  # noqa: F811
    use_config(replace(CONFIGS["tiny"], tma=True))
    check(monkeypatch, Case(ids(21, 4)), "fused", "triton", torch.float16, dropout=0.3)


def test_recompute(monkeypatch):
    check(monkeypatch, Case(ids(9, 4)), "fused", "triton", torch.float32, dropout=0.3, recompute=True)


@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_grouped_path(monkeypatch, tower):
    monkeypatch.setenv("QAR_KERNELS_PATH", "grouped")
    check(monkeypatch, Case(ids(21, 4)), tower, "triton", torch.float32, dropout=0.3)


@pytest.mark.parametrize(
    ("frozen", "dropout"),
    [
        (WEIGHTS, 0.0),
        (("x", *WEIGHTS), 0.3),
        (("x", *WEIGHTS, "gate.a", "down.a", "up.b"), 0.0),
        (("x", *WEIGHTS, "gate.a", "down.a", "up.b"), 0.3),
        (("x", *WEIGHTS, "down.b"), 0.0),
        (("x", *WEIGHTS[:3], *factor_names(RANKS)), 0.3),
    ],
)
def test_frozen_base(monkeypatch, frozen, dropout):
    monkeypatch.setattr(passes, "_base_weight_grads", lambda *_: pytest.fail("the base is frozen"))
    check(monkeypatch, Case(ids(9, 4)), "fused", "triton", torch.float32, dropout=dropout, frozen=frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_over_half_rows(backend):
    case = Case(ids(9, 4))
    tensors = {name: t.float() if "." in name else t.half() for name, t in with_factors(case, RANKS).items()}
    wanted = ["x", *factor_names(RANKS)]
    tensors = {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}
    got = with_grads(operation(tensors, case.ids, "fused", 0.7, backend, 0.0), tensors, wanted)
    assert {name: got[name].dtype for name in ("y", "d_x", "d_down.a", "d_gate.b")} == {
        "y": torch.float16,
        "d_x": torch.float16,
        "d_down.a": torch.float32,
        "d_gate.b": torch.float32,
    }
    exact = {name: t.detach().double().requires_grad_(name in wanted) for name, t in tensors.items()}
    truth = with_grads(formula(exact, case.ids, "fused", 0.7, {}, 0.0), exact, wanted)
    for name, ref64 in truth.items():
        assert (got[name] - ref64).norm() < 2e-3 * ref64.norm(), name


def test_two_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(Case(ids(21, 4)), "fused", "triton", torch.float16, dropout=0.3)[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_isolation_with_dropout():
    """The mask belongs to the row, not to its place among the experts."""
    mine, results = [row % 3 == 1 for row in range(21)], []
    for company in (0, 3):
        others = [other + 2 for other in ids(21, company, company, none=False)] if company else [-1] * 21
        case = Case([1 if own else other for own, other in zip(mine, others, strict=True)], E=9)
        torch.manual_seed(3)
        results.append(run(case, "fused", "triton", torch.float16, dropout=0.3)[0])
    for other in results[1:]:
        for name in ("y", "d_x"):
            assert torch.equal(other[name][torch.tensor(mine)], results[0][name][torch.tensor(mine)]), name
        assert torch.equal(other["d_expert_up"][1], results[0]["d_expert_up"][1])


@pytest.mark.parametrize("probability", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(2000, 44), (44, 2000)])
def test_mask_keeps_the_right_share_independently(probability, shape):
    mask = triton_lora.dropout_mask(torch.tensor([5]), *shape, probability)
    bits = unpack(mask, shape[1])
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(bits.mean() - (1 - probability)) < 5 * deviation / bits.numel() ** 0.5
    lines = bits.T if shape[0] > shape[1] else bits
    assert torch.corrcoef(lines).fill_diagonal_(0).abs().max() < 6 / 2000**0.5
    assert torch.equal(mask, triton_lora.dropout_mask(torch.tensor([5]), *shape, probability))
    assert not torch.equal(mask, triton_lora.dropout_mask(torch.tensor([6]), *shape, probability))


def test_checkpointing_draws_the_same_masks():
    tensors = leaves(with_factors(Case(ids(9, 4)), RANKS), torch.float32, ("x", *factor_names(RANKS)))
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer = lambda x: operation({**tensors, "x": x}, ids(9, 4), "fused", 1.0, "triton", 0.3)["y"]  # noqa: E731
        x = tensors["x"]
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        grads.append(torch.autograd.grad(y.sum(), [tensors[name] for name in ("x", *factor_names(RANKS))]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compile_without_graph_breaks(backend, dropout):
    torch._dynamo.reset()
    names = ("x", *factor_names(RANKS))
    tensors = leaves(with_factors(Case(ids(7, 4), H=16, I=32), RANKS), torch.float32, names)
    expert_ids = torch.tensor(ids(7, 4))

    def step(tensors, expert_ids):
        return operation(tensors, expert_ids, "fused", 1.0, backend, dropout)["y"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(tensors, expert_ids).sum(), [tensors[name] for name in names])
    assert all(grad.isfinite().all() for grad in got)
    if not dropout:
        expected = torch.autograd.grad(step(tensors, expert_ids).sum(), [tensors[name] for name in names])
        for name, g, e in zip(names, got, expected, strict=True):
            torch.testing.assert_close(g, e, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_opcheck(tower, dropout):
    from qar_kernels.tile_plan import tile_plan
    from qar_kernels.triton.backend import plan_tensors

    case = Case([0, 1, 1, -1, 3, 0, 2], H=16, I=24)
    names = ("x", "x_specific", *WEIGHTS, *factor_names(RANKS))
    tensors = leaves(with_factors(case, RANKS), torch.float32, names)
    adapters = LoRA(*(Adapter(tensors[f"{n}.a"], tensors[f"{n}.b"], SCALES[n], dropout) for n in PROJECTIONS))
    operands = [t.detach() for t in triton_lora.prepare(adapters, tensors["x"], 24)]
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in operands]
    seg = Segments.from_ids(case.ids)
    args = (
        tensors["x"], [tensors[n] for n in WEIGHTS[:3]],
        tensors["x_specific"] if tower == "dual" else None, [tensors[n] for n in WEIGHTS[3:]], None,
        seg.perm, plan_tensors(tile_plan(seg, 16, 16)), operands, tower, 0.7, "tiny", True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.qar.swiglu_experts.default, args, test_utils=checks)
