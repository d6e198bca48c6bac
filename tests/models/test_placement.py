"""Where a model lies: offloaded weights, layers on several devices, masks of other attention code."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from tiny_models import (
    EXPERTS,
    QUERIER_IDS,
    TOWERS,
    VOCAB,
    aware_model,
    left_padded_batch,
    plain_model,
    qar_config,
    randomize_experts,
    training_batch,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qar_kernels import Segments
from qar_models import QARLlamaForCausalLM, apply_qar, remove_qar
from qar_models.towers import TowerBatch, general_rows


@pytest.mark.parametrize("tower", TOWERS)
def test_offloaded_weights(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    with torch.no_grad():
        expected = model(**batch, querier_ids=QUERIER_IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.norm.weight.is_meta and model.model.layers[0].experts.gate.is_meta
        torch.testing.assert_close(model(**batch, querier_ids=QUERIER_IDS).logits, expected)


HEAD_ELSEWHERE = {"model": "cpu", "lm_head": "disk"}
EACH_ITS_OWN = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", [HEAD_ELSEWHERE, EACH_ITS_OWN])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_base_model_that_is_dispatched_when_it_loads(tower, device_map, tmp_path):
    base, batch = plain_model(), left_padded_batch()
    base.save_pretrained(tmp_path)
    plain_answer, asked = base(**batch).logits, {**batch, "querier_ids": QUERIER_IDS}
    expected = aware_model(tower=tower, base=base)
    model = QARLlamaForCausalLM.from_base(
        tmp_path, qar_config(tower), device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    state = expected.state_dict()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = state[name]
    with torch.no_grad():
        torch.testing.assert_close(model(**asked).logits, expected(**asked).logits)
        generated = model.generate(**asked, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, expected.generate(**asked, max_new_tokens=3, do_sample=False))
        torch.testing.assert_close(remove_qar(model)(**batch).logits, plain_answer)


@pytest.mark.parametrize("hooks", ["are on", "were taken off"])
@pytest.mark.parametrize("where", ["model", "layers", "norm"])
def test_conversion_under_hooks(where, hooks):
    base, batch = plain_model(), training_batch()
    found = {"model": [base], "layers": base.model.layers, "norm": [base.model.norm]}[where]
    for module in found:
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
        if hooks == "were taken off":
            remove_hook_from_module(module)
    model = apply_qar(base, qar_config())
    randomize_experts(model)
    out, expected = model(**batch), aware_model()(**batch)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.lm_loss, expected.lm_loss)


def test_a_hook_that_comes_after_conversion_outlives_it():
    model, batch, calls = aware_model(), left_padded_batch(), []
    expected = plain_model()(**batch).logits

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for module in (model, model.model.norm, *model.model.layers):
        add_hook_to_module(module, Counting())
    torch.testing.assert_close(remove_qar(model)(**batch).logits, expected)
    assert len(calls) == 4


@pytest.mark.parametrize("device_map", [{"": "disk"}, {**EACH_ITS_OWN, "model.layers.1": "disk"}])
def test_offloaded_layers_are_refused_where_experts_are_made(device_map, tmp_path):
    plain_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got offloaded decoder layers .* load the saved folder"):
        QARLlamaForCausalLM.from_base(
            tmp_path, qar_config(), device_map=device_map, offload_folder=tmp_path / "offloaded"
        )


@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_model_may_be_offloaded_when_it_loads(tower, tmp_path):
    model, batch = aware_model(tower=tower), left_padded_batch() | {"querier_ids": QUERIER_IDS}
    model.save_pretrained(tmp_path)
    loaded = QARLlamaForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def without_mask():  # whose values transformers reads
    return {name: tensor for name, tensor in training_batch().items() if name != "attention_mask"}


@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_model_without_data_has_shapes(tower, experts, where):
    model = aware_model(tower=tower, experts=experts, unknown_querier="mean").to("meta").train()
    batch = {name: tensor.to("meta") for name, tensor in without_mask().items()}
    out = model(**{**batch, "querier_ids": QUERIER_IDS.to(where)})
    out.loss.backward()
    assert out.logits.is_meta and out.logits.shape == (3, 10, VOCAB)
    bank = model.model.layers[1].experts.bank
    assert [weight.grad.shape for weight in bank] == [weight.shape for weight in bank]


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_fake_tensors_have_shapes(tower, experts):
    model = aware_model(tower=tower, experts=experts, unknown_querier="mean")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(**{name: mode.from_tensor(tensor) for name, tensor in without_mask().items()})
    assert isinstance(out.logits, FakeTensor) and out.logits.shape == (3, 10, VOCAB)


def test_layers_on_another_device_share_one_copy_of_the_segments():
    towers = TowerBatch(Segments.from_sequences([1, 0], 3), 2, Segments.from_sequences([-1, 1], 3))
    assert towers.to("cpu") is towers
    moved = towers.to("meta")
    assert moved is towers.to(torch.device("meta"), non_blocking=True)
    assert moved.segments.device == moved.trained.device == torch.device("meta")
    assert moved.segments.max_id == 1
    assert moved.batch_size == 2


def test_a_mask_that_is_no_tensor_is_refused_where_the_towers_share_it():
    assert general_rows(None, 2) is None
    with pytest.raises(TypeError, match="attention_mask: got object, which tower='replace' cannot share"):
        general_rows(object(), 2)
