"""Every mistake is refused, and the message names the argument and what was expected."""

import json

import numpy as np
import pytest
import torch
from tiny_models import QUERIER_IDS, aware_model, left_padded_batch, plain_model, qar_config, training_batch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from qar_models import QARConfig, QARLlamaForCausalLM, QARQwen2ForCausalLM, apply_qar, remove_qar
from qar_models.families import QARLlamaConfig


@pytest.fixture(scope="module")
def model():
    return aware_model(num_clusters=2, memory_size=2, projection_dim=8)


@pytest.mark.parametrize(
    ("querier_ids", "error", "message"),
    [
        (None, ValueError, r"querier_ids: missing.*shape \(3,\) with ids 0\.\.4 or -1"),
        (torch.tensor([0, 1]), ValueError, r"querier_ids: got shape \(2,\), expected \(3,\) or \(3, 10\)"),
        (torch.zeros(3, 4, dtype=torch.long), ValueError, r"querier_ids: got shape \(3, 4\)"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "querier_ids: got dtype torch.float32, expected integers"),
        (["anna", "bo", "cy"], TypeError, r"querier_ids: got \['anna', 'bo', 'cy'\], expected integers"),
        (torch.tensor([0, 5, 2]), ValueError, "querier_ids: got 5, expected ids from -1 to 4"),
        (torch.tensor([0, -2, 2]), ValueError, "querier_ids: got -2, expected ids from -1 to 4"),
        (torch.zeros(3, dtype=torch.long, device="meta"), ValueError, "querier_ids: got device meta"),
    ],
)
def test_querier_ids(model, querier_ids, error, message):
    with pytest.raises(error, match=message):
        model(**left_padded_batch(), querier_ids=querier_ids)


def test_unknown_querier_under_the_error_policy():
    model = aware_model(tower="replace")
    with pytest.raises(ValueError, match=r"got -1, expected ids from 0 to 4.*unknown_querier='error'"):
        model(**left_padded_batch(), querier_ids=torch.tensor([0, -1, 2]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.zeros(3, 9, dtype=torch.long)}, ValueError, r"labels: got shape \(3, 9\)"),
        ({"labels": torch.zeros(3, 10)}, TypeError, "labels: got dtype torch.float32, expected integers"),
        ({"response_mask": None}, ValueError, r"response_mask: missing.*\(3, 10\)"),
        ({"response_mask": torch.ones(3, 9)}, ValueError, r"response_mask: got shape \(3, 9\)"),
        ({"response_mask": torch.zeros(3, 10)}, ValueError, "response_mask: got no responder token"),
        ({"cluster_ids": None}, ValueError, "cluster_ids: missing"),
        ({"cluster_ids": torch.tensor([0, 1])}, ValueError, r"cluster_ids: got shape \(2,\)"),
        (
            {"cluster_ids": torch.tensor([0, 2, 1])},
            ValueError,
            r"cluster_ids: got \[0, 2, 1\], expected ids from 0 to 1",
        ),
        ({"cluster_ids": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "cluster_ids: got dtype torch.float32"),
        ({"shift_labels": torch.zeros(3, 10, dtype=torch.long)}, TypeError, "shift_labels: got shifted"),
        ({"logits_to_keep": 2}, ValueError, "logits_to_keep: got 2 positions"),
        ({"input_ids": None}, ValueError, "input_ids, inputs_embeds: expected exactly one"),
    ],
)
def test_training_arguments(model, changes, error, message):
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    with pytest.raises(error, match=message):
        model(**{**batch, **changes})


def test_per_token_ids_with_the_contrastive_loss(model):
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    batch["querier_ids"] = QUERIER_IDS.unsqueeze(1).expand(-1, 10)
    with pytest.raises(ValueError, match=r"querier_ids: got shape \(3, 10\), expected \(3,\)"):
        model(**batch)


def test_unknown_family():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TypeError, match="got GPT2LMHeadModel, expected one of LlamaForCausalLM, "):
        apply_qar(gpt2, qar_config())


def test_wrong_family_of_from_base():
    with pytest.raises(TypeError, match="got LlamaForCausalLM, expected Qwen2ForCausalLM"):
        QARQwen2ForCausalLM.from_base(plain_model("llama"), qar_config())


def test_double_conversion_and_removal():
    model = apply_qar(plain_model(), qar_config())
    with pytest.raises(ValueError, match="querier-aware already; call remove_qar first"):
        apply_qar(model, qar_config())
    with pytest.raises(ValueError, match="LlamaForCausalLM is not querier-aware"):
        remove_qar(remove_qar(model))


def test_config_without_qar():
    with pytest.raises(ValueError, match=r"config.qar: missing; a plain model loads with .*from_base"):
        QARLlamaForCausalLM(QARLlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def test_first_expert_layer_beyond_the_model_leaves_the_model_plain():
    base = plain_model()
    with pytest.raises(ValueError, match="first_expert_layer: got 3, expected at most 2"):
        apply_qar(base, qar_config(first_expert_layer=3))
    base(**left_padded_batch())


def test_tower_mismatch_on_load(tmp_path):
    aware_model(tower="residual").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing tensors \(1, first model.norm_specific.*tower='replace'"):
        QARLlamaForCausalLM.from_pretrained(tmp_path, qar=qar_config("replace").to_dict())


def test_plain_checkpoint_on_load(tmp_path):
    plain_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing tensors \(6, first model.layers.0.experts.*from_base"):
        QARLlamaForCausalLM.from_pretrained(tmp_path, qar=qar_config().to_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_queriers": 0}, "num_queriers: got 0, expected at least 1"),
        ({"expert_rank": 0}, "expert_rank: got 0"),
        ({"memory_size": 0}, "memory_size: got 0"),
        ({"projection_dim": -1}, "projection_dim: got -1"),
        ({"num_clusters": -1}, "num_clusters: got -1, expected at least 0"),
        ({"first_expert_layer": -1}, "first_expert_layer: got -1"),
        ({"contrastive_weight": -0.5}, "contrastive_weight: got -0.5"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a positive number"),
        ({"tower": "both"}, "tower: got 'both', expected one of residual, replace"),
        ({"experts": "none"}, "experts: got 'none', expected one of per_querier, shared"),
        ({"unknown_querier": "guess"}, "unknown_querier: got 'guess'"),
        ({"unknown_querier": "none", "tower": "replace"}, "unknown_querier: got 'none' with tower='replace'"),
        ({"unknown_querier": "shared"}, "expected experts='shared\\+per_querier'"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
        ({"querier_names": ("a", "b")}, "querier_names: got 2 names .*expected 3 different"),
        ({"querier_names": ("a", "b", "a")}, r"querier_names: got 3 names \(2 different\)"),
        ({"num_queriers": 2.5}, "num_queriers: got 2.5, expected an integer"),
        ({"num_queriers": "3"}, "num_queriers: got '3', expected an integer"),
        ({"num_queriers": True}, "num_queriers: got True, expected an integer"),
        ({"temperature": float("nan")}, "temperature: got nan, expected a finite number"),
        ({"expert_scale": float("inf")}, "expert_scale: got inf, expected a finite number"),
        ({"contrastive_weight": True}, "contrastive_weight: got True, expected a number"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
    ],
)
def test_config_values(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        QARConfig(**{"num_queriers": 3, **values})


def test_numpys_numbers_are_numbers():
    config = QARConfig(num_queriers=np.int64(3), expert_scale=np.float32(0.5))
    assert json.loads(json.dumps(config.to_dict()))["num_queriers"] == 3 and config.expert_scale == 0.5


def test_config_round_trip_and_unknown_keys():
    config = qar_config("replace", "shared+per_querier", querier_names=["a", "b", "c", "d", "e"])
    assert QARConfig.from_dict(config.to_dict()) == config
    assert config.unknown_querier == "error" and qar_config().unknown_querier == "none"
    with pytest.raises(ValueError, match=r"got unknown keys \['rank'\], expected keys of \['backend'"):
        QARConfig.from_dict({**config.to_dict(), "rank": 4})
    with pytest.raises(ValueError, match=r"got only \['tower'\], expected at least num_queriers"):
        QARConfig.from_dict({"tower": "replace"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_ids_of_short_types_are_ids(dtype):
    model = apply_qar(plain_model(), QARConfig(num_queriers=200, expert_rank=8))
    ids = torch.tensor([100, 0, 3])
    batch = left_padded_batch()
    expected = model(**batch, querier_ids=ids).logits
    assert torch.equal(model(**batch, querier_ids=ids.to(dtype)).logits, expected)


def test_short_ids_in_the_contrastive_loss(model):
    batch = training_batch() | {"response_mask": torch.ones(3, 10), "cluster_ids": torch.tensor([0, 1, 0])}
    short = batch | {name: batch[name].to(torch.int8) for name in ("querier_ids", "cluster_ids")}
    torch.testing.assert_close(model(**short).loss, model(**batch).loss)


@pytest.mark.parametrize("names", ["abc", (1, 2, 3), ("a", "b", None)])
def test_names_are_strings(names):
    with pytest.raises(TypeError, match=r"querier_names: got .* expected a sequence of strings"):
        QARConfig(num_queriers=3, querier_names=names)


def test_what_is_no_config_and_no_tensor_is_named(model):
    with pytest.raises(TypeError, match="qar: got a dict, expected a QARConfig"):
        apply_qar(plain_model(), {"num_queriers": 3})
    batch = training_batch() | {"response_mask": torch.ones(3, 10), "cluster_ids": torch.tensor([0, 1, 0])}
    for name in ("labels", "response_mask", "cluster_ids"):
        with pytest.raises(TypeError, match=f"{name}: got a list, expected"):
            model(**batch | {name: batch[name].tolist()})
    with pytest.raises(TypeError, match="cu_seq_lens_q: got a list, expected a tensor"):
        model(batch["input_ids"][:1], cu_seq_lens_q=[0, 10], querier_ids=QUERIER_IDS[:1])
    with pytest.raises(TypeError, match=r"cluster_ids: got dtype torch\.bool"):
        model(**batch | {"cluster_ids": batch["cluster_ids"].bool()})


@pytest.mark.parametrize("where", ["argument", "configuration", "positional", "model", "both"])
def test_guidance_calls_the_model_without_queriers(where):
    model, batch = aware_model(), left_padded_batch() | {"querier_ids": QUERIER_IDS, "max_new_tokens": 2}
    guided = GenerationConfig(guidance_scale=1.5)
    settings = {
        "argument": {"guidance_scale": 1.5},
        "configuration": {"generation_config": guided},
        "both": {"generation_config": GenerationConfig(max_new_tokens=2)},
    }.get(where, {})
    positional = [batch.pop("input_ids"), guided] if where == "positional" else []
    if where in ("model", "both"):
        model.generation_config.guidance_scale = 1.5
    with pytest.raises(NotImplementedError, match=r"guidance_scale: got 1\.5, expected 1; .*querier_ids"):
        model.generate(*positional, **batch, **settings)


def test_guidance_of_one_or_without_ids_is_fine():
    batch = left_padded_batch() | {"max_new_tokens": 2}
    aware_model().generate(**batch, querier_ids=QUERIER_IDS, guidance_scale=1.0)
    aware_model(experts="shared").generate(**batch, guidance_scale=1.5)


def test_flex_attention_is_for_the_residual_tower():
    model = aware_model(tower="replace")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(TypeError, match=r"got BlockMask, which tower='replace' .* not 'flex_attention'"):
        model(**left_padded_batch(), querier_ids=QUERIER_IDS)


def test_a_model_that_torch_jit_traces():
    model, batch = aware_model(), left_padded_batch()
    inputs = {**batch, "querier_ids": QUERIER_IDS}
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace: .* use torch\.export"):
        torch.jit.trace(model, example_kwarg_inputs=inputs)
