"""Which base MLPs the fused operations take over: those whose arithmetic is known; the others say why not."""

import pytest
import torch
from tiny_models import QUERIER_IDS, left_padded_batch, plain_model, qar_config, reasons
from transformers import BitNetConfig, FalconH1Config, SeedOssConfig
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from qar_models import apply_qar, base_mlp
from qar_models.base_mlp import fusable

SIZES = {"hidden_size": 64, "intermediate_size": 160}
# with SiLU and the three projections, but dropout, multipliers or a norm beside them
OTHERS = {
    "dropout": (SeedOssMLP, SeedOssConfig(**SIZES, residual_dropout=1.0)),
    "multipliers": (FalconH1MLP, FalconH1Config(**SIZES, mlp_multipliers=[0.5, 3.0])),
    "norm": (BitNetMLP, BitNetConfig(**SIZES, hidden_act="silu")),
}


pytestmark = pytest.mark.usefixtures("log")


def with_mlps(kind, config):
    """A plain model whose MLPs are of another class, with the weights that they had."""
    model = plain_model()
    for layer in model.model.layers:
        weights, layer.mlp = layer.mlp.state_dict(), kind(config)
        layer.mlp.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("other", OTHERS)
def test_mlps_that_compute_something_else_run_by_themselves(other, log):
    kind, config = OTHERS[other]
    model, batch = with_mlps(kind, config).train(), left_padded_batch()
    expected = model(**batch).logits
    got = apply_qar(model, qar_config()).train()(**batch, querier_ids=QUERIER_IDS).logits
    torch.testing.assert_close(got, expected)
    (reason,) = reasons(log)
    assert f"the forward method of {kind.__name__} is none of those of LlamaMLP, " in reason


def test_a_forward_that_was_patched_before_it_is_declared_is_not_trusted(log, monkeypatch):
    monkeypatch.setattr(base_mlp, "_SWIGLU", {})
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * x)
    base_mlp.declare_swiglu(LlamaMLP)
    assert fusable(plain_model().model.layers[0].mlp) is None
    assert f"the forward method of LlamaMLP comes from {__name__}" in reasons(log)[0]


def test_mlps_that_inherit_a_known_forward_are_fused(log):
    class CountingMLP(LlamaMLP):
        uses = 0

    model = with_mlps(CountingMLP, plain_model().config)
    assert fusable(model.model.layers[0].mlp) is not None
    assert fusable(with_mlps(Qwen3MLP, plain_model("qwen3").config).model.layers[0].mlp) is not None
    assert not reasons(log)


class Int8Weight(torch.Tensor):
    """Like torchao's: a plain Linear's weight that holds other tensors and knows only some operators."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.values * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_quantised_in_place_of_plain_ones_stay_in_their_own_modules(backend, log):
    model, batch = apply_qar(plain_model(), qar_config(backend=backend)), left_padded_batch()
    for layer in model.model.layers:
        linear = layer.mlp.gate_proj
        scale = linear.weight.detach().abs().max() / 127
        values = (linear.weight.detach() / scale).round()
        linear.weight.requires_grad_(False).copy_(values * scale)
    expected = model(**batch, querier_ids=QUERIER_IDS).logits
    for layer in model.model.layers:
        linear = layer.mlp.gate_proj
        scale = linear.weight.abs().max() / 127
        linear.weight = torch.nn.Parameter(Int8Weight((linear.weight / scale).round(), scale), False)
        assert fusable(layer.mlp) is None
    got = model(**batch, querier_ids=QUERIER_IDS).logits
    torch.testing.assert_close(got, expected)
    assert "a projection's weight is a " in reasons(log)[0] and "Int8Weight" in reasons(log)[0]
