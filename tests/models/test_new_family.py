"""A family that is not in FAMILIES, made by the recipe of docs/models.md: Qwen3's mixture of experts."""

import logging
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, QUERIER_IDS, VOCAB, left_padded_batch, qar_config, training_batch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm
from transformers.utils import logging as hf_logging

from qar_models import apply_qar, families
from qar_models.causal_lm import QARForCausalLMMixin
from qar_models.config import QARConfigMixin
from qar_models.families import Classes, Family
from qar_models.modeling import DeferredNormMixin, QARDecoderLayerMixin, QARModelMixin


class QARMoeConfig(QARConfigMixin, Qwen3MoeConfig):
    model_type = "qar_moe"
    qar: dict[str, Any] | None = None


class QARMoeRMSNorm(DeferredNormMixin, Qwen3MoeRMSNorm): ...


class QARMoeDecoderLayer(QARDecoderLayerMixin, Qwen3MoeDecoderLayer): ...


class QARMoeModel(QARModelMixin, Qwen3MoeModel):
    config_class = QARMoeConfig


class QARMoeForCausalLM(QARForCausalLMMixin, Qwen3MoeForCausalLM):
    config_class = QARMoeConfig


MOE = Family(
    Classes(Qwen3MoeConfig, Qwen3MoeRMSNorm, Qwen3MoeDecoderLayer, Qwen3MoeModel, Qwen3MoeForCausalLM),
    Classes(QARMoeConfig, QARMoeRMSNorm, QARMoeDecoderLayer, QARMoeModel, QARMoeForCausalLM),
    None,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, MOE))


def moe(**settings):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **settings)).eval()


def test_a_fresh_model_equals_its_base():
    base, batch = moe(), left_padded_batch()
    expected = base(**batch).logits
    got = apply_qar(base, qar_config())(**batch, querier_ids=QUERIER_IDS).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_both_towers_run_a_block_without_the_three_projections(caplog):
    hf_logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    base, batch = moe(), left_padded_batch()
    expected = base.model(**batch).last_hidden_state
    decoder = apply_qar(base, qar_config("replace")).model
    out = decoder(**batch, querier_ids=QUERIER_IDS)
    general = 2 * out.last_hidden_state - decoder.norm_specific(out.querier_states)
    torch.testing.assert_close(general, expected, rtol=1e-4, atol=1e-4)
    (reason,) = [r.getMessage() for r in caplog.records if r.name == "qar_models.base_mlp"]
    assert "Qwen3MoeSparseMoeBlock has no gate_proj, up_proj, down_proj" in reason


def test_a_routers_loss_is_refused_and_the_model_stays_plain():
    base, batch = moe(output_router_logits=True), left_padded_batch()
    message = "output_router_logits: got True, expected False; .* auxiliary loss"
    with pytest.raises(ValueError, match=message):
        apply_qar(base, qar_config())
    assert type(base) is Qwen3MoeForCausalLM and base(**batch).router_logits is not None


@pytest.mark.parametrize("where", ["configuration", "call", "loaded"])
def test_a_routers_loss_that_is_asked_for_later_is_refused(where, tmp_path):
    model, batch = apply_qar(moe(), qar_config()), training_batch()
    assert model(**batch, output_router_logits=False).loss.isfinite()
    asked = {"output_router_logits": True} if where == "call" else {}
    if where == "configuration":
        model.config.output_router_logits = True
    elif where == "loaded":
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="output_router_logits: got True, expected False"):
        if where == "loaded":
            QARMoeForCausalLM.from_pretrained(tmp_path, output_router_logits=True)
        model(**batch, **asked)
