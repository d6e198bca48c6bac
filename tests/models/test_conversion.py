"""Plain model <-> querier-aware model <-> disk, with and without adapters."""

import dataclasses
import json
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    EXPERTS,
    FAMILIES,
    QUERIER_IDS,
    TOWERS,
    aware_model,
    left_padded_batch,
    plain_model,
    qar_config,
    randomize_experts,
    training_batch,
)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from qar_models import QARLlamaForCausalLM, apply_qar, remove_qar

LORA = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], lora_dropout=0.0)
PEFT_PREFIX = "base_model.model."


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_through_auto_classes(family, tower, experts, tmp_path):
    model = aware_model(family, tower, experts, num_clusters=2, memory_size=3, projection_dim=8)
    model.train()
    batch = training_batch()
    model(**batch, response_mask=batch["attention_mask"], cluster_ids=torch.tensor([0, 1, 1]))
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FAMILIES[family].aware and not loaded.training
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.qar == model.qar
    for name, tensor in model.state_dict().items():
        assert (
            torch.equal(tensor, loaded.state_dict()[name]) and tensor.dtype == loaded.state_dict()[name].dtype
        )
    inputs = left_padded_batch()
    assert torch.equal(
        model(**inputs, querier_ids=QUERIER_IDS).logits, loaded(**inputs, querier_ids=QUERIER_IDS).logits
    )
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"qar_{family}"


def test_a_trained_model_is_served_without_the_contrastive_memory(tmp_path):
    model, batch = aware_model(num_clusters=2), left_padded_batch()
    model.save_pretrained(tmp_path)
    qar = {**model.config.qar, "num_clusters": 0}
    served = AutoModelForCausalLM.from_pretrained(tmp_path, qar=qar)
    assert served.contrast is None
    expected = model(**batch, querier_ids=QUERIER_IDS).logits
    assert torch.equal(served(**batch, querier_ids=QUERIER_IDS).logits, expected)


def test_from_base_takes_a_path(tmp_path):
    base, batch = plain_model(), left_padded_batch()
    base.save_pretrained(tmp_path)
    model = QARLlamaForCausalLM.from_base(tmp_path, qar_config()).eval()
    assert torch.equal(model(**batch, querier_ids=QUERIER_IDS).logits, base(**batch).logits)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_remove_qar_gives_the_base_model_back(family, tower):
    base, batch = plain_model(family), left_padded_batch()
    expected, keys, config = base(**batch).logits, list(base.state_dict()), base.config.to_dict()
    model = apply_qar(base, qar_config(tower, num_clusters=2, projection_dim=8))
    assert model is base
    remove_qar(model)
    assert type(model) is FAMILIES[family].plain
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**batch).logits, expected)
    assert {**model.config.to_dict(), "architectures": None} == {**config, "architectures": None}
    assert torch.equal(model.generate(**batch, max_new_tokens=2)[:, :10], batch["input_ids"])


@pytest.mark.parametrize("tower", TOWERS)
def test_conversion_keeps_the_parameters_themselves(tower):
    base = plain_model()
    parameters = {name: id(parameter) for name, parameter in base.named_parameters()}
    model = apply_qar(base, qar_config(tower))
    assert parameters.items() <= {name: id(p) for name, p in model.named_parameters()}.items()


@pytest.mark.parametrize("tower", TOWERS)
def test_lora_before_and_after_conversion_agree(tower):
    before = apply_qar(get_peft_model(plain_model(), LORA), qar_config(tower))
    keys = set(get_peft_model(plain_model(), LORA).state_dict())
    assert keys <= set(before.state_dict())
    after = get_peft_model(apply_qar(plain_model(), qar_config(tower)), LORA)
    assert keys <= set(after.state_dict())
    after.load_state_dict(before.state_dict())
    for model in (before, after):
        randomize_lora(model)
        randomize_experts(model)
    batch = left_padded_batch()
    assert torch.equal(
        before.eval()(**batch, querier_ids=QUERIER_IDS).logits,
        after.eval()(**batch, querier_ids=QUERIER_IDS).logits,
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_adapters_of_the_mlp_take_part_and_merge(tower, tmp_path):
    adapted = apply_qar(get_peft_model(plain_model(), LORA), qar_config(tower)).eval()
    randomize_experts(adapted)
    batch = left_padded_batch()
    untrained = adapted(**batch, querier_ids=QUERIER_IDS).logits
    randomize_lora(adapted)
    trained = adapted(**batch, querier_ids=QUERIER_IDS).logits
    assert (trained - untrained).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert type(merged) is QARLlamaForCausalLM
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        loaded(**batch, querier_ids=QUERIER_IDS).logits, merged(**batch, querier_ids=QUERIER_IDS).logits
    )
    torch.testing.assert_close(merged(**batch, querier_ids=QUERIER_IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_peft_model_generates_and_gives_its_base_back():
    base, batch = get_peft_model(plain_model(), LORA).eval(), left_padded_batch()
    expected = base(**batch).logits
    model = apply_qar(base, qar_config())
    assert model is base
    model.generate(**batch, querier_ids=QUERIER_IDS, max_new_tokens=2)
    assert torch.equal(remove_qar(model)(**batch).logits, expected)


def test_conversion_in_the_middle_of_training_keeps_mode_and_frozen_parameters():
    base = plain_model().train().requires_grad_(False)
    model = apply_qar(base, qar_config())
    assert model.training and model.model.layers[0].experts.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"model.layers.{i}.experts.{n}" for i in (0, 1) for n in ("gate", "up", "down")}


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_added_trains_whether_lora_comes_before_or_after(tower):
    settings = qar_config(tower, num_clusters=2, projection_dim=8)
    bare = set(dict(plain_model().named_parameters()))
    frozen = apply_qar(plain_model().requires_grad_(False), settings)
    added = {name for name, _ in frozen.named_parameters()} - bare
    assert {"contrast.norm_role_proj.weight", "contrast.head_weight"} < added
    assert ("model.norm_specific.weight" in added) == (tower == "replace")
    assert set(trainable(frozen)) == added
    before = apply_qar(get_peft_model(plain_model(), LORA), settings)
    assert {name for name in trainable(before) if "lora_" not in name} == {PEFT_PREFIX + n for n in added}
    after = get_peft_model(apply_qar(plain_model(), settings), LORA)
    assert all("lora_" in name for name in trainable(after))  # PEFT freezes what it finds
    for name in added:
        after.get_parameter(PEFT_PREFIX + name).requires_grad_(True)
    assert trainable(after) == trainable(before)  # in the same order, on which optimizer states depend


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_llama_config_of_another_size_is_untouched_by_the_registration(tmp_path):
    plain_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig


def randomize_lora(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)


@pytest.mark.parametrize("tower", TOWERS)
def test_no_layer_with_experts_is_the_base_model_for_everybody(tower):
    base, batch = plain_model(), left_padded_batch()
    expected = base(**batch).logits
    generated = base.generate(**batch, max_new_tokens=3, do_sample=False)
    layers = base.config.num_hidden_layers
    model = apply_qar(base, qar_config(tower, experts="shared", first_expert_layer=layers))
    assert all(layer.experts is None for layer in model.model.layers)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), generated)


@pytest.fixture
def poisoned():
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_a_configuration_alone_is_initialised(family, tower, poisoned, tmp_path):
    config = aware_model(family, tower, "shared+per_querier", num_clusters=2).config
    for model in (AutoModelForCausalLM.from_config(config), FAMILIES[family].aware(config)):
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        experts = model.model.layers[1].experts
        assert experts.gate.std().item() == pytest.approx(config.initializer_range, rel=0.1)
        assert (experts.down == 0).all() == (tower == "residual")
    model.save_pretrained(tmp_path)
    more = {**config.qar, "num_queriers": 7}
    grown = FAMILIES[family].aware.from_pretrained(tmp_path, qar=more, ignore_mismatched_sizes=True)
    assert all(parameter.isfinite().all() for parameter in grown.parameters())


def test_mode_and_classes_that_must_not_be_split_follow():
    base = plain_model().eval()
    before = base._no_split_modules, base.model._no_split_modules
    model = apply_qar(base, qar_config(num_clusters=2))
    assert not any(module.training for module in model.modules())
    assert set(model._no_split_modules) == set(model.model._no_split_modules) == {"QARLlamaDecoderLayer"}
    remove_qar(model)
    assert (set(model._no_split_modules), set(model.model._no_split_modules)) == tuple(map(set, before))


def test_foreign_classes_are_named_and_nothing_changes():
    class FasterNorm(torch.nn.Module):
        pass

    base = plain_model()
    base.model.norm = FasterNorm()
    with pytest.raises(TypeError, match="got a FasterNorm in it"):
        apply_qar(base, qar_config())
    assert type(base) is FAMILIES["llama"].plain
    assert type(base.config) is LlamaConfig


@pytest.mark.parametrize("where", ["model", "model.layers.1", "model.norm"])
def test_a_forward_method_of_ones_own_is_named_and_nothing_changes(where):
    base, model = plain_model(), aware_model()
    for whole, convert in ((base, lambda: apply_qar(base, qar_config())), (model, lambda: remove_qar(model))):
        module, kind = whole.get_submodule(where), type(whole)
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
        with pytest.raises(TypeError, match=f"got a {type(module).__name__} with a patched forward"):
            convert()
        assert type(whole) is kind


def test_a_forward_method_without_its_decorators_is_its_classs():
    """What accelerate leaves when it takes off mixed precision."""
    base, batch = plain_model(), left_padded_batch()
    expected = base(**batch).logits
    bare = type(base).forward.__wrapped__
    base.forward = MethodType(bare, base)
    apply_qar(base, qar_config())
    assert torch.equal(base(**batch, querier_ids=QUERIER_IDS).logits, expected)
    base.forward = MethodType(type(base).forward, base)
    assert torch.equal(remove_qar(base)(**batch).logits, expected)


def test_an_mlp_of_another_class_runs_by_itself():
    class FasterMLP(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x)

    model = aware_model()
    batch = left_padded_batch()
    expected = model(**batch, querier_ids=QUERIER_IDS).logits
    for layer in model.model.layers:
        layer.mlp = FasterMLP(layer.mlp)
    torch.testing.assert_close(model(**batch, querier_ids=QUERIER_IDS).logits, expected)


@pytest.mark.parametrize("change", ["subclass", "patch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_that_computes_something_else_runs_by_itself(family, change, monkeypatch):
    def doubled(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model, batch = plain_model(family), left_padded_batch()
    kind = type(model.model.layers[0].mlp)
    if change == "patch":
        monkeypatch.setattr(kind, "forward", doubled)
    else:
        for layer in model.model.layers:
            layer.mlp.__class__ = type("DoubledMLP", (kind,), {"forward": doubled})
    expected = model(**batch).logits
    torch.testing.assert_close(
        apply_qar(model, qar_config())(**batch, querier_ids=QUERIER_IDS).logits, expected
    )


def test_a_model_of_the_same_config_stays_plain():
    first = plain_model()
    second = FAMILIES["llama"].plain(first.config)
    apply_qar(first, qar_config())
    assert type(second.config) is LlamaConfig
    assert first.config is first.model.config is first.model.layers[0].self_attn.config is not second.config
    apply_qar(second, qar_config())


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_may_be_given_anew_when_a_model_is_loaded(family, tmp_path):
    model = aware_model(family)
    model.save_pretrained(tmp_path)
    other = dataclasses.replace(model.qar, expert_scale=0.5)
    for kind in (type(model), AutoModelForCausalLM):
        assert kind.from_pretrained(tmp_path, qar=other).qar == other


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_takes_the_settings_themselves(family):
    model = aware_model(family)
    kind, qar = type(model.config), dataclasses.replace(model.qar, num_queriers=2)
    config = kind(**{**plain_model(family).config.to_dict(), "qar": qar})
    assert json.loads(config.to_json_string(use_diff=False))["qar"] == qar.to_dict()
    assert type(model)(config).qar == qar


def test_a_contrastive_loss_that_is_turned_on_later_starts_as_after_apply_qar(tmp_path):
    base = plain_model()
    with torch.no_grad():
        base.model.norm.weight.normal_(1, 0.5)
    aware_model(base=base).save_pretrained(tmp_path)
    settings = qar_config(num_clusters=2, memory_size=3, projection_dim=8)
    model = QARLlamaForCausalLM.from_pretrained(tmp_path, qar=settings)
    assert torch.equal(model.contrast.norm_role_proj.weight, base.model.norm.weight)
    assert model.contrast.norm_role_proj.weight is not model.model.norm.weight
    assert not model.contrast.memory.any() and not model.contrast.writes.any()
