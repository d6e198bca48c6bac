"""LoRA on the base projections in every backend against the formula in float64, with the same masks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Case, assert_close
from test_triton import ids, use_config  # noqa: F401

from qar_kernels import Adapter, LoRA, Segments, dual_mlp, fused_mlp, lora
from qar_kernels.reference import expert_mlp
from qar_kernels.triton import lora as triton_lora
from qar_kernels.triton import ops
from qar_kernels.triton.configs import CONFIGS, Gemm

PROJECTIONS = ("gate", "up", "down")
RANKS = {"gate": 4, "up": 16, "down": 24}
SCALES = {"gate": 0.5, "up": 2.0, "down": 1.3}
WEIGHTS = ("gate", "up", "down", "expert_gate", "expert_up", "expert_down")
BACKENDS = ("triton", "torch", "reference")


def factor_names(projections):
    return [f"{name}.{factor}" for name in projections for factor in "ab"]


def with_factors(case, ranks):
    """The case's tensors and ``<projection>.a`` (r, in), ``<projection>.b`` (out, r), all float64."""
    draw = torch.Generator().manual_seed(case.seed + 1)
    tensors = dict(case.tensors)
    for name, rank in ranks.items():
        out_features, in_features = tensors[name].shape
        tensors[f"{name}.a"] = torch.randn(rank, in_features, generator=draw).double() / in_features**0.5
        tensors[f"{name}.b"] = torch.randn(out_features, rank, generator=draw).double() / rank**0.5
    return tensors


def unpack(mask, columns):
    """The bits of a mask as (rows, columns) zeros and ones."""
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(mask.shape[0], -1)[:, :columns].double()


class Masks:
    """Deterministic dropout in place of PyTorch's, and a record of what the kernels' own mask kept."""

    def __init__(self, monkeypatch, projections):
        self.kept = {}
        self.projections = [name for name in PROJECTIONS if name in projections]
        monkeypatch.setattr(lora.F, "dropout", self.dropout)
        real = triton_lora.dropout_mask

        def recorded(seed, rows, columns, probability):
            mask = real(seed, rows, columns, probability)
            self.kept["down"] = unpack(mask, columns)
            return mask

        monkeypatch.setattr(triton_lora, "dropout_mask", recorded)

    def dropout(self, x, probability):
        if not probability:
            return x
        name = next(name for name in self.projections if name not in self.kept)
        draw = torch.Generator().manual_seed(PROJECTIONS.index(name))
        self.kept[name] = (torch.rand(x.shape, generator=draw) >= probability).double()
        return x * self.kept[name].to(x.dtype) / (1 - probability)


def formula(tensors, expert_ids, tower, scale, kept, dropout):
    """What ``run`` must give, written out; ``kept`` are the masks, by projection."""

    def project(x, name):
        y = x @ tensors[name].T
        if f"{name}.a" not in tensors:
            return y
        seen = x * kept[name].to(x.dtype) / (1 - dropout) if dropout else x
        return y + SCALES[name] * (seen @ tensors[f"{name}.a"].T @ tensors[f"{name}.b"].T)

    def base(x):
        return project(torch.nn.functional.silu(project(x, "gate")) * project(x, "up"), "down")

    experts = partial(expert_mlp, segments=Segments.from_ids(expert_ids))
    weights = [tensors[name] for name in WEIGHTS[3:]]
    if tower == "fused":
        return {"y": base(tensors["x"]) + scale * experts(tensors["x"], *weights)}
    return {"y": base(tensors["x"]), "y_specific": experts(tensors["x_specific"], *weights)}


def operation(tensors, expert_ids, tower, scale, backend, dropout, **options):
    adapters = {
        name: Adapter(tensors[f"{name}.a"], tensors[f"{name}.b"], SCALES[name], dropout)
        for name in PROJECTIONS
        if f"{name}.a" in tensors
    }
    options |= {"lora": LoRA(**adapters), "backend": backend}
    weights, seg = [tensors[name] for name in WEIGHTS], Segments.from_ids(expert_ids)
    if tower == "fused":
        return {"y": fused_mlp(tensors["x"], *weights, seg, scale, **options)}
    y, specific = dual_mlp(tensors["x"], tensors["x_specific"], *weights, seg, **options)
    return {"y": y, "y_specific": specific}


def leaves(tensors, dtype, wanted, rounded=None):
    cast = {name: t.to(rounded or dtype).to(dtype) for name, t in tensors.items()}
    return {name: t.requires_grad_(name in wanted) for name, t in cast.items()}


def with_grads(outputs, tensors, wanted):
    loss = sum((y * tensors[f"d_{name}"]).sum() for name, y in outputs.items())
    grads = torch.autograd.grad(loss, [tensors[name] for name in wanted], materialize_grads=True)
    got = {name: y.detach() for name, y in outputs.items()}
    return got | {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def run(case, tower, backend, dtype, ranks=RANKS, dropout=0.0, frozen=(), **options):
    """Outputs and gradients by name of everything that trains: all, except what ``frozen`` names."""
    wanted = [n for n in ("x", "x_specific", *WEIGHTS, *factor_names(ranks)) if n not in frozen]
    wanted = [n for n in wanted if n != "x_specific" or tower == "dual"]
    tensors = leaves(with_factors(case, ranks), dtype, wanted)
    outputs = operation(tensors, case.ids, tower, case.scale, backend, dropout, **options)
    return with_grads(outputs, tensors, wanted), wanted


def check(monkeypatch, case, tower, backend, dtype, ranks=RANKS, dropout=0.0, **options):
    with monkeypatch.context() as patch:
        masks = Masks(patch, ranks)
        got, wanted = run(case, tower, backend, dtype, ranks, dropout, **options)
    assert set(masks.kept) == (set(ranks) if dropout else set())
    expected = []
    for precision in (torch.float64, dtype):
        tensors = leaves(with_factors(case, ranks), precision, wanted, rounded=dtype)
        outputs = formula(tensors, case.ids, tower, case.scale, masks.kept, dropout)
        expected.append(with_grads(outputs, tensors, wanted))
    truth, eager = expected
    for name, ref64 in truth.items():
        assert got[name].dtype == dtype
        assert_close(name, got[name], ref64, eager[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tower", ["fused", "dual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(monkeypatch, backend, tower, dropout, dtype):
    check(monkeypatch, Case(ids(21, 4)), tower, backend, dtype, dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("projections", [("gate",), ("down",), ("up", "down")])
def test_some_projections(monkeypatch, projections, dropout):
    ranks = {name: RANKS[name] for name in projections}
    check(monkeypatch, Case(ids(21, 4)), "fused", "triton", torch.float32, ranks, dropout)


@pytest.mark.parametrize(
    "case",
    [
        Case([-1] * 19),
        Case([3]),
        Case(ids(35, 4), H=112, I=144),
        Case(ids(20, 3), E=3, I=84),
    ],
    ids=["no row has an expert", "one row", "odd multiples of 16", "a mask byte that is cut"],
)
def test_shapes(monkeypatch, case):
    check(monkeypatch, case, "fused", "triton", torch.float32, dropout=0.3)


def test_ranks_of_several_steps(monkeypatch):
    ranks = {"gate": 64, "up": 1, "down": 80}
    check(monkeypatch, Case(ids(18, 4)), "fused", "triton", torch.float32, ranks, dropout=0.3)


@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_split_k(monkeypatch, use_config, tower):  # noqa: F811
    use_config(replace(CONFIGS["tiny"], block_rows=64, down=Gemm(64, 16, warps=4, stages=1), max_splits=4))
    check(monkeypatch, Case(ids(21, 4)), tower, "triton", torch.float32)


def test_descriptors(monkeypatch, use_config):  # noqa: F811
    use_config(replace(CONFIGS["tiny"], tma=True))
    check(monkeypatch, Case(ids(21, 4)), "fused", "triton", torch.float16, dropout=0.3)


def test_recompute(monkeypatch):
    check(monkeypatch, Case(ids(21, 4)), "fused", "triton", torch.float32, dropout=0.3, recompute=True)


def test_grouped_path(monkeypatch):
    monkeypatch.setenv("QAR_KERNELS_PATH", "grouped")
    check(monkeypatch, Case(ids(21, 4)), "fused", "triton", torch.float32, dropout=0.3)


@pytest.mark.parametrize("frozen", [WEIGHTS, ("x", *WEIGHTS), ("x", *WEIGHTS, "gate.a", "down.a", "up.b")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_base(monkeypatch, frozen, dropout):
    monkeypatch.setattr(ops, "_base_weight_grads", lambda *_: pytest.fail("the base is frozen"))
    check(monkeypatch, Case(ids(18, 4)), "fused", "triton", torch.float32, dropout=dropout, frozen=frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_adapters_over_half_rows(backend):
    case = Case(ids(18, 4))
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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_are_bitwise_equal(dropout):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(Case(ids(21, 4)), "fused", "triton", torch.float16, dropout=dropout)[0])
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
    tensors = leaves(with_factors(Case(ids(18, 4)), RANKS), torch.float32, ("x", *factor_names(RANKS)))
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer = lambda x: operation({**tensors, "x": x}, ids(18, 4), "fused", 1.0, "triton", 0.3)["y"]  # noqa: E731
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
    from qar_kernels.triton.backend import plan_tensors

    case = Case([0, 1, 1, -1, 3, 0, 2], H=16, I=24)
    names = ("x", "x_specific", *WEIGHTS, *factor_names(RANKS))
    tensors = leaves(with_factors(case, RANKS), torch.float32, names)
    adapters = LoRA(*(Adapter(tensors[f"{n}.a"], tensors[f"{n}.b"], SCALES[n], dropout) for n in PROJECTIONS))
    operands = [t.detach() for t in triton_lora.prepare(adapters, tensors["x"], 24)]
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in operands]
    seg = Segments.from_ids(case.ids)
    args = (
        tower, tensors["x"], *(tensors[n] for n in WEIGHTS[:3]),
        tensors["x_specific"] if tower == "dual" else None, *(tensors[n] for n in WEIGHTS[3:]), None,
        seg.perm, plan_tensors(seg.tile_plan(16, 16)), operands, 0.7, "tiny", True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.qar.swiglu_experts.default, args, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(4, 47)}, ValueError, r"lora\.down\.a: got shape \(4, 47\), expected \(4, 80\)"),
        ({"b": torch.zeros(48, 5)}, ValueError, r"lora\.down\.b: got shape \(48, 5\), expected \(48, 4\)"),
        ({"b": torch.zeros(48, 4).half()}, TypeError, r"lora\.down\.b: got dtype torch\.float16, expected"),
        ({"a": torch.zeros(4, 80).int()}, TypeError, r"lora\.down\.a: got dtype torch\.int32"),
        ({"a": torch.zeros(4, 80, device="meta")}, ValueError, r"lora\.down\.b: got device cpu"),
        ({"dropout": 1.0}, ValueError, r"lora\.down\.dropout: got 1\.0, expected at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_bad_adapters(tower, change, error, message):
    case = Case([0, 1])
    adapter = replace(Adapter(torch.zeros(4, 80), torch.zeros(48, 4)), **change)
    weights, seg = [case.tensors[name].float() for name in WEIGHTS], Segments.from_ids(case.ids)
    x = case.tensors["x"].float()
    with pytest.raises(error, match=message):
        if tower == "fused":
            fused_mlp(x, *weights, seg, lora=LoRA(down=adapter))
        else:
            dual_mlp(x, x, *weights, seg, lora=LoRA(down=adapter))
    with pytest.raises(TypeError, match="lora: got dict, expected LoRA"):
        fused_mlp(x, *weights, seg, lora={"down": adapter})
