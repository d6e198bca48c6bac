"""The shared expert inside the base MLP: the same answers, fewer calls, an ordinary checkpoint."""

import pytest
import torch
from tiny_models import FAMILIES, QUERIER_IDS, aware_model, left_padded_batch, plain_model

from qar_models import merge_shared

SHARED = "shared+per_querier"


def answers(model, ids=QUERIER_IDS):
    with torch.no_grad():
        return model(**left_padded_batch(), querier_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1])
def test_answers_stay(family, first, tmp_path):
    model = aware_model(family, experts=SHARED, expert_scale=0.7, first_expert_layer=first).double()
    asked = torch.tensor([3, -1, 0])
    expected = answers(model, asked)
    merge_shared(model)
    torch.testing.assert_close(answers(model, asked), expected)
    assert not any("shared" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = FAMILIES[family].aware.from_pretrained(tmp_path, dtype=torch.float64)
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    torch.testing.assert_close(answers(loaded, asked), expected, rtol=1e-5, atol=1e-5)  # rotary in float32


@pytest.mark.parametrize(("intermediate", "expected"), [(160, 176), (256, 272), (100, 108)])
def test_rows_stay_aligned(intermediate, expected):
    base = plain_model(intermediate_size=intermediate)
    model = aware_model(base=base, experts=SHARED)
    merge_shared(model)
    sizes = {tuple(layer.mlp.gate_proj.weight.shape) for layer in model.model.layers}
    assert sizes == {(expected, 64)}
    assert model.config.intermediate_size == expected
    for mlp in (layer.mlp for layer in model.model.layers):
        assert mlp.intermediate_size == mlp.up_proj.out_features == mlp.down_proj.in_features == expected


def test_whom_only_the_shared_expert_answered_it_still_answers():
    model = aware_model(experts=SHARED, unknown_querier="shared")
    nobody = torch.full_like(QUERIER_IDS, -1)
    expected = answers(model, nobody)
    merge_shared(model)
    torch.testing.assert_close(answers(model, nobody), expected)


def test_experts_of_ones_own_still_train():
    model = aware_model(experts=SHARED)
    merge_shared(model)
    model(**left_padded_batch(), querier_ids=QUERIER_IDS).logits.square().mean().backward()
    assert model.model.layers[0].experts.gate.grad[3].abs().sum() > 0


def test_a_frozen_base_stays_frozen():
    model = aware_model(experts=SHARED)
    model.model.layers[0].mlp.requires_grad_(False)
    merge_shared(model)
    trains = [{weight.requires_grad for weight in layer.mlp.parameters()} for layer in model.model.layers]
    assert trains == [{False}, {True}]


@pytest.mark.parametrize("settings", [{"experts": "per_querier"}, {"experts": SHARED, "tower": "replace"}])
def test_where_there_is_nothing_to_merge(settings):
    with pytest.raises(ValueError, match="expected tower='residual', experts='shared\\+per_querier'"):
        merge_shared(aware_model(**settings))


def test_refused_as_long_as_the_base_is_not_plain():
    peft = pytest.importorskip("peft")
    model = aware_model(experts=SHARED)
    before = model.model.layers[0].mlp.gate_proj.weight
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="merge them first"):
        merge_shared(model)
    assert model.model.layers[0].mlp.gate_proj.weight is before
    assert model.qar.experts == SHARED


def test_refused_while_one_trains():
    model = aware_model(experts=SHARED, querier_names=("a", "b", "c", "d", "e"))
    model.train_only("b")
    with pytest.raises(ValueError, match="train_only"):
        merge_shared(model)


def test_inside_a_peft_model_whose_adapters_leave_the_mlp_alone():
    peft = pytest.importorskip("peft")
    model = aware_model(experts=SHARED)
    expected = answers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    merge_shared(wrapped)
    torch.testing.assert_close(answers(wrapped), expected, rtol=1e-4, atol=1e-4)
    assert model.qar.experts == "per_querier"
