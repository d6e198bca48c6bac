"""PEFT's LoRA on the base MLP stays in the fused operation and computes what PEFT's own modules do."""

from contextlib import contextmanager

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_packing import assert_same, batches, trained
from tiny_models import (
    QUERIER_IDS,
    TOWERS,
    aware_model,
    left_padded_batch,
    plain_model,
    qar_config,
    randomize_experts,
    reasons,
    training_batch,
)
from torch import nn

from qar_models import apply_qar, base_mlp, experts, modeling
from qar_models.packing import PACKED_ATTENTION

MLP = ["gate_proj", "up_proj", "down_proj"]
OPERATION = {"residual": "fused_mlp", "replace": "dual_mlp"}


pytestmark = pytest.mark.usefixtures("log")


def adapted(tower="residual", dtype=torch.float32, config=None, expert_gradients="dense", **lora):
    """A model with random adapters, all of which (and the experts) train."""
    config = config or LoraConfig(**{"r": 4, "target_modules": MLP, **lora})
    qar = qar_config(tower, expert_gradients=expert_gradients)
    model = apply_qar(get_peft_model(plain_model().to(dtype), config), qar)
    randomize_adapters(model)
    randomize_experts(model)
    return model


def randomize_adapters(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)


@contextmanager
def module_path():
    """The base MLP in PEFT's own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "fusable", lambda _: None)
        yield


@contextmanager
def fused_calls(tower):
    """Whether each call of the fused operation had adapters."""
    calls, name = [], OPERATION[tower]
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(experts, name)

        def spy(*args, **options):
            calls.append(any(vars(options["lora"]).values()))
            return real(*args, **options)

        patch.setattr(experts, name, spy)
        yield calls


def step(model, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**training_batch()).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, tower, rtol=1e-5, adapters=True):
    with fused_calls(tower) as calls:
        loss, grads = step(model)
    assert calls == [adapters] * 2
    with module_path(), fused_calls(tower) as calls:
        expected_loss, expected = step(model)
    assert calls == []
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grads[name].dtype == grad.dtype, name
        assert (grads[name] - grad).norm() <= rtol * 10 * grad.norm(), name
    return grads


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["gate_proj"]},
        {"target_modules": ["up_proj", "down_proj"], "r": 7},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"down_proj": 16}, "alpha_pattern": {"up_proj": 5}},
    ],
    ids=["all three", "gate", "up and down", "rsLoRA", "ranks differ"],
)
def test_a_training_step_equals_the_module_path(tower, lora, log):
    grads = assert_same_step(adapted(tower, **lora).train(), tower)
    assert any("lora_A" in name for name in grads) and any("lora_B" in name for name in grads)
    assert not any("base_layer" in name for name in grads)
    assert reasons(log) == []


@pytest.mark.parametrize("tower", TOWERS)
def test_dropout_takes_part_in_training_only(tower):
    """The torch backend draws masks in the order that PEFT's modules do: one seed, the same numbers."""
    model = adapted(tower, lora_dropout=0.3)
    assert_same_step(model.train(), tower)
    assert (step(model, seed=0)[0] - step(model, seed=1)[0]).abs() > 1e-5
    model.eval()
    assert_same_step(model, tower)
    assert torch.equal(step(model, seed=0)[0], step(model, seed=1)[0])


@pytest.mark.parametrize("tower", TOWERS)
def test_row_sparse_expert_gradients(tower):
    """Adapters and the experts present train as with dense gradients, of the same masks."""
    dense, sparse = (
        adapted(tower, expert_gradients=layout, lora_dropout=0.3).train() for layout in ("dense", "sparse")
    )
    (loss, expected), got = step(dense), assert_same_step(sparse, tower)
    assert torch.equal(step(sparse)[0], loss)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert grad.is_sparse == (".experts." in name)
        assert torch.equal(grad.to_dense(), expected[name]), name


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_rows(tower, layout):
    model = adapted(tower, expert_gradients=layout, target_modules=[*MLP, "q_proj", "v_proj"]).train()
    padded, packed = batches()
    expected = trained(model, padded)
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    with fused_calls(tower) as calls:
        assert_same(trained(model, packed), expected)
    assert calls == [True] * 2


@pytest.mark.parametrize("tower", TOWERS)
def test_float32_adapters_over_a_bf16_base(tower):
    model = adapted(tower, torch.bfloat16).train()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert_same_step(model, tower, rtol=1e-2)


def test_autocast():
    model = adapted().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(model, "residual", rtol=1e-2)


@pytest.mark.parametrize("tower", TOWERS)
def test_disabled_merged_and_several_adapters(tower, log):
    model = adapted(tower).eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules=MLP, init_lora_weights=False, lora_dropout=0.3))
    model.eval()
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    with model.disable_adapter():
        assert_same_step(model, tower, adapters=False)
    for names in ("other", ["default", "other"]):
        model.base_model.set_adapter(names)
        assert_same_step(model, tower)
    model.base_model.merge_adapter()
    assert layer.merged
    merged = logits(model)
    assert_same_step(model, tower, adapters=False)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(model), merged, rtol=1e-4, atol=1e-4)
    assert reasons(log) == []


def logits(model):
    with torch.no_grad():
        return model(**left_padded_batch(), querier_ids=QUERIER_IDS).logits


def test_disabling_a_merged_adapter_unmerges_it():
    model = adapted().eval()
    with model.disable_adapter():
        base = logits(model)
    model.base_model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
        assert not model.get_base_model().model.layers[0].mlp.gate_proj.merged


def with_bias(model):
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.bias = nn.Parameter(torch.ones(160))


class Quantised(nn.Linear):
    """Stands for a quantised layer: a Linear whose weight is not what it multiplies with."""


def quantised(model):
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.base_layer.__class__ = Quantised


def hooked(model):
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate_proj.lora_A["default"].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("change", "lora", "reason"),
    [
        (None, {"use_dora": True}, "its adapter is a DoraLinearVariant, not LoRA"),
        (None, {"config": IA3Config(target_modules=MLP, feedforward_modules=MLP)}, "peft.tuners.ia3"),
        (quantised, {}, "Quantised, not a torch Linear"),
        (with_bias, {}, "a projection has a bias"),
        (hooked, {}, "its Linear has hooks"),
    ],
    ids=["DoRA", "IA3", "quantised", "bias", "hook"],
)
def test_what_cannot_be_fused_runs_in_its_modules_and_says_so_once(tower, change, lora, reason, log):
    model = adapted(tower, **lora).eval()
    if change:
        change(model)
    with fused_calls(tower) as calls:
        got = logits(model)
        assert torch.equal(logits(model), got)
    assert calls == ([True] * 2 if change is with_bias else [])
    with module_path():
        torch.testing.assert_close(logits(model), got, rtol=1e-4, atol=1e-4)
    assert len(reasons(log)) == 1 and reason in reasons(log)[0]


def test_mixed_batches_and_several_adapters_with_dropout_run_in_their_modules(log):
    model = adapted(lora_dropout=0.3).eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules=MLP, init_lora_weights=False))
    batch = {**left_padded_batch(), "querier_ids": QUERIER_IDS}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["default", "other", "__base__"]).logits
        model.set_adapter("other")
        torch.testing.assert_close(model(**batch).logits[1], mixed[1], rtol=1e-4, atol=1e-4)
        model.base_model.set_adapter(["default", "other"])
        with fused_calls("residual") as calls:
            model.train()(**batch)
    assert calls == []
    assert [any(word in reason for reason in reasons(log)) for word in ("hooks", "dropout of its own")]
    assert len(reasons(log)) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_training_step(fused):
    torch._dynamo.reset()
    model = adapted().train()
    if not fused:
        with_bias(model)
    loss, expected = step(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**training_batch(), use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, loss)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_gradient_checkpointing_draws_the_same_masks(tower):
    model = adapted(tower, lora_dropout=0.3).train()
    _, expected = step(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    _, grads = step(model)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6)


def test_plain_models_are_read_without_peft():
    model = aware_model()
    read = base_mlp.fusable(model.model.layers[0].mlp)
    assert read.weights[0] is model.model.layers[0].mlp.gate_proj.weight and read.lora is base_mlp.NO_LORA


@pytest.mark.parametrize("experts", ["per_querier", "shared+per_querier"])
@pytest.mark.parametrize("tower", TOWERS)
def test_lora_on_the_experts_themselves(tower, experts):
    targets = [f"experts.{name}" for name in ("gate", "up", "down")]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, lora_dropout=0.0)
    model, batch = get_peft_model(aware_model(tower=tower, experts=experts), lora), training_batch()
    untrained = model(**batch).logits
    randomize_adapters(model)
    trained = model(**batch)
    assert (trained.logits - untrained).abs().max() > 0.01
    trained.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, trained.logits, rtol=1e-4, atol=1e-4)


def test_prompt_tuning_lengthens_the_masks():
    """Its virtual tokens come first; nobody responds in them, and they are the querier's too."""
    prompt, batch = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), training_batch()
    model = get_peft_model(aware_model(num_clusters=2, projection_dim=8), prompt)
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match=r"response_mask: got .*, expected \(3, 14\); .*zeros in front"):
        model(**batch)
    batch["response_mask"] = nn.functional.pad(batch["response_mask"], (4, 0))
    assert model(**batch).contrastive_loss.isfinite()
    plain = get_peft_model(aware_model(), prompt)
    per_token = QUERIER_IDS[:, None].expand(3, 14)
    inputs = left_padded_batch()
    got = plain(**inputs, querier_ids=per_token).logits
    torch.testing.assert_close(got, plain(**inputs, querier_ids=QUERIER_IDS).logits)


def test_prefix_tuning_is_for_the_residual_tower():
    prefix, batch = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), training_batch()
    get_peft_model(aware_model(), prefix)(**batch).loss.backward()
    with pytest.raises(ValueError, match=r"cache: got 2 heads in layer 1, expected 4, .*\(prefix tuning\)"):
        get_peft_model(aware_model(tower="replace"), prefix)(**batch)
