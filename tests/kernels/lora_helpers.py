"""Runs with adapters on the base projections against the formula in float64, with the same masks."""

from functools import partial

import torch
from helpers import assert_close

from qar_kernels import Adapter, LoRA, Segments, dual_mlp, fused_mlp, lora
from qar_kernels.reference import expert_mlp
from qar_kernels.triton import lora as triton_lora

PROJECTIONS = ("gate", "up", "down")
RANKS = {"gate": 4, "up": 16, "down": 24}
SCALES = {"gate": 0.5, "up": 2.0, "down": 1.3}
WEIGHTS = ("gate", "up", "down", "expert_gate", "expert_up", "expert_down")


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
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
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
        self.kept[name] = (torch.rand(x.shape, generator=draw) >= probability).double().to(x.device)
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

    experts = partial(expert_mlp, segments=segments_of(expert_ids, tensors))
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
    weights, seg = [tensors[name] for name in WEIGHTS], segments_of(expert_ids, tensors)
    if tower == "fused":
        return {"y": fused_mlp(tensors["x"], *weights, seg, scale, **options)}
    y, specific = dual_mlp(tensors["x"], tensors["x_specific"], *weights, seg, **options)
    return {"y": y, "y_specific": specific}


def segments_of(expert_ids, tensors):
    return Segments.from_ids(torch.as_tensor(expert_ids, device=tensors["x"].device))


def leaves(tensors, dtype, wanted, rounded=None, device="cpu"):
    cast = {name: t.to(rounded or dtype).to(device, dtype) for name, t in tensors.items()}
    return {name: t.requires_grad_(name in wanted) for name, t in cast.items()}


def with_grads(outputs, tensors, wanted):
    loss = sum((y * tensors[f"d_{name}"]).sum() for name, y in outputs.items())
    grads = torch.autograd.grad(loss, [tensors[name] for name in wanted], materialize_grads=True)
    got = {name: y.detach() for name, y in outputs.items()}
    return got | {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def run(case, tower, backend, dtype, ranks=RANKS, dropout=0.0, frozen=(), device="cpu", **options):
    """Outputs and gradients by name of everything that trains: all, except what ``frozen`` names."""
    wanted = [n for n in ("x", "x_specific", *WEIGHTS, *factor_names(ranks)) if n not in frozen]
    wanted = [n for n in wanted if n != "x_specific" or tower == "dual"]
    tensors = leaves(with_factors(case, ranks), dtype, wanted, device=device)
    outputs = operation(tensors, case.ids, tower, case.scale, backend, dropout, **options)
    return with_grads(outputs, tensors, wanted), wanted


def check(monkeypatch, case, tower, backend, dtype, ranks=RANKS, dropout=0.0, device="cpu", **options):
    with monkeypatch.context() as patch:
        masks = Masks(patch, ranks)
        got, wanted = run(case, tower, backend, dtype, ranks, dropout, device=device, **options)
    assert set(masks.kept) == (set(ranks) if dropout else set())
    expected = []
    for precision in (torch.float64, dtype):
        tensors = leaves(with_factors(case, ranks), precision, wanted, rounded=dtype, device=device)
        outputs = formula(tensors, case.ids, tower, case.scale, masks.kept, dropout)
        expected.append(with_grads(outputs, tensors, wanted))
    truth, eager = expected
    for name, ref64 in truth.items():
        assert got[name].dtype == dtype
        assert_close(name, got[name], ref64, eager[name])
