"""``model.qar``: one value that the decoder, the configuration and all experts agree on."""

import copy
import dataclasses
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import QUERIER_IDS, aware_model, left_padded_batch, plain_model, qar_config
from transformers import AutoModelForCausalLM

from qar_models import remove_qar
from qar_models.experts import Experts


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def places(model):
    banks = [module.qar for module in model.modules() if isinstance(module, Experts)]
    assert len(banks) >= 2
    return [model.qar, model.model.qar, *banks]


def logits(model):
    return model(**left_padded_batch(), querier_ids=QUERIER_IDS).logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_setting_it_changes_every_place_and_what_is_computed(wrapped):
    model, halved = aware_model(), qar_config(expert_scale=0.5)
    expected = logits(aware_model(expert_scale=0.5))
    assert not torch.equal(logits(model), expected)
    if wrapped:
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    model.qar = halved
    assert all(qar is halved for qar in places(model))
    assert model.config.qar == model.model.config.qar == halved.to_dict()
    assert torch.equal(logits(model), expected)


def test_it_is_saved_as_it_was_set(tmp_path):
    model = aware_model()
    model.qar = dataclasses.replace(model.qar, unknown_querier="mean")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.qar == model.qar and all(qar == model.qar for qar in places(loaded))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_settings_of_its_own(duplicate):
    model = aware_model(num_clusters=2, memory_size=3, projection_dim=8)
    before, expected = model.qar, logits(model)
    twin = duplicate(model)
    assert all(qar == before for qar in places(twin)) and torch.equal(logits(twin), expected)
    twin.qar = dataclasses.replace(before, expert_scale=0.5)
    assert all(qar == before for qar in places(model)) and model.config.qar == before.to_dict()
    assert torch.equal(logits(model), expected)


def test_anything_else_is_refused_and_a_plain_model_has_none():
    model = aware_model()
    with pytest.raises(TypeError, match="qar: got a dict, expected a QARConfig"):
        model.qar = model.config.qar
    assert not hasattr(remove_qar(model), "qar") and not hasattr(plain_model(), "qar")
    assert not hasattr(model.model, "qar") and not hasattr(model.config, "qar")
