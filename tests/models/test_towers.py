"""What the two towers compute: exact base parity, and an independent plain implementation."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    QUERIER_IDS,
    TOWERS,
    aware_model,
    left_padded_batch,
    plain_model,
    qar_config,
)

from qar_models.experts import Experts


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_residual_model_equals_its_base_exactly(family, experts):
    base, batch = plain_model(family), left_padded_batch()
    expected = base(**batch).logits
    keys = set(base.state_dict())
    model = FAMILIES[family].aware.from_base(base, qar_config("residual", experts))
    assert_is_its_base(family, model(**batch, querier_ids=QUERIER_IDS).logits, expected)
    assert keys <= set(model.state_dict())


def assert_is_its_base(family, got, expected):
    torch.testing.assert_close(
        got,
        expected,
        rtol=0,
        atol=0,
        msg=lambda found: (
            f"{family}: with fresh experts it does not answer as its base. Does its layer compute something "
            f"else than QARDecoderLayerMixin, or its MLP something else than the kernels?\n{found}"
        ),
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_trained_experts_change_the_answer_of_their_querier_only(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    before = model(**batch, querier_ids=QUERIER_IDS).logits
    with torch.no_grad():
        model.model.layers[0].experts.down[0] += 1
    after = model(**batch, querier_ids=QUERIER_IDS).logits
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def assert_matches_plain_towers(model, batch):
    got = model(**batch, querier_ids=QUERIER_IDS).logits
    expected = PlainTowers(model).logits(**batch, querier_ids=QUERIER_IDS)
    real = batch["attention_mask"].bool()
    assert_equal_formulas(got[real], expected[real])


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_plain_implementation(family, tower, experts):
    model = aware_model(family, tower, experts, expert_scale=0.5).double()
    if tower == "replace":
        with torch.no_grad():
            model.model.norm_specific.weight.uniform_(0.5, 1.5)
    batch = left_padded_batch()
    assert_matches_plain_towers(model, batch)


@pytest.mark.parametrize("tower", TOWERS)
def test_heads_that_are_wider_than_the_hidden_size(tower):
    model = aware_model("qwen3", tower, base=plain_model("qwen3", head_dim=32)).double()
    assert_matches_plain_towers(model, left_padded_batch())


@pytest.mark.parametrize("tower", TOWERS)
def test_first_expert_layer_leaves_the_layers_below_plain(tower):
    model, batch = aware_model(tower=tower, first_expert_layer=1).double(), left_padded_batch()
    assert model.model.layers[0].experts is None
    assert_matches_plain_towers(model, batch)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("first", "replicated", "wrong"),
    [
        (0, [[0, 1], [0, 2]], 1),
        (0, [[0, 2], [1, 2]], None),
        (1, [[0, 1], [0, 2]], None),
        (1, [[0, 2], [0, 1]], 2),
        (1, [[0, 2], [1, 2]], 2),
        (2, [[0, 2], [0, 1]], None),
    ],
)
def test_layers_that_peft_replicates(first, replicated, wrong, tower):
    model, batch = aware_model(tower=tower, first_expert_layer=first).double(), left_padded_batch()
    lora = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=replicated)
    model = get_peft_model(model, lora).unload()
    assert len(model.model.layers) == 3
    if tower == "replace" and wrong is not None:
        message = f"layers: got layer {wrong} with towers_coincide=True, expected False"
        with pytest.raises(ValueError, match=message):
            model(**batch, querier_ids=QUERIER_IDS)
        model.model.layers[wrong].towers_coincide = False
    assert_matches_plain_towers(model, batch)


@pytest.mark.parametrize("tower", TOWERS)
def test_first_layers_that_are_pruned(tower):
    model, batch = aware_model(tower=tower).double(), left_padded_batch()
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    assert_matches_plain_towers(model, batch)


@pytest.mark.parametrize("tower", TOWERS)
def test_per_token_ids_equal_per_sequence_ids(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    per_token = QUERIER_IDS.unsqueeze(1).expand(-1, batch["input_ids"].shape[1])
    assert torch.equal(
        model(**batch, querier_ids=per_token).logits, model(**batch, querier_ids=QUERIER_IDS).logits
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_a_row_does_not_depend_on_who_shares_the_batch(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    one = model(**batch, querier_ids=torch.tensor([3, 0, 3])).logits
    other = model(**batch, querier_ids=torch.tensor([1, 0, 4])).logits
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])


UNKNOWN = torch.tensor([3, -1, 3])


def test_unknown_querier_gets_the_base_answer():
    base, batch = plain_model(), left_padded_batch()
    expected = base(**batch).logits
    model = aware_model(base=base)
    torch.testing.assert_close(model(**batch, querier_ids=UNKNOWN).logits[1], expected[1])


@pytest.mark.parametrize("tower", TOWERS)
def test_unknown_querier_gets_the_mean_expert(tower):
    model, batch = aware_model(tower=tower, unknown_querier="mean"), left_padded_batch()
    got = model(**batch, querier_ids=UNKNOWN).logits
    for layer in model.model.layers:
        for weight in (layer.experts.gate, layer.experts.up, layer.experts.down):
            weight.data[0] = weight.data.mean(0)
    torch.testing.assert_close(got[1], model(**batch, querier_ids=QUERIER_IDS).logits[1])


@pytest.mark.parametrize("tower", TOWERS)
def test_unknown_querier_gets_the_shared_expert_alone(tower):
    model = aware_model(tower=tower, experts="shared+per_querier", unknown_querier="shared")
    batch = left_padded_batch()
    got = model(**batch, querier_ids=UNKNOWN).logits
    for layer in model.model.layers:
        layer.experts.down.data[0] = 0
    torch.testing.assert_close(got[1], model(**batch, querier_ids=QUERIER_IDS).logits[1])


@pytest.mark.parametrize("tower", TOWERS)
def test_hidden_states_and_attentions(tower):
    base = plain_model(attn_implementation="eager")
    model, batch = aware_model(tower=tower, base=base), left_padded_batch()
    out = model(**batch, querier_ids=QUERIER_IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert out.hidden_states[-1].shape == (3, 10, HIDDEN)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    rows = 6 if tower == "replace" else 3
    assert out.attentions[-1].shape == (rows, 4, 10, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_normalises_when_told_to(family):
    base, states = plain_model(family), 5 * torch.randn(2, 3, HIDDEN)
    expected = base.model.norm(states)
    assert torch.equal(aware_model(family, base=base).model.norm(states, now=True), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_inherited_details_survive(family):
    overrides = {"num_key_value_heads": 1, "tie_word_embeddings": True, **FAMILIES[family].details}
    base, batch = plain_model(family, **overrides), left_padded_batch()
    expected = base(**batch).logits
    model = FAMILIES[family].aware.from_base(base, qar_config("residual"))
    assert_is_its_base(family, model(**batch, querier_ids=QUERIER_IDS).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if "sliding_window" in FAMILIES[name].details])
def test_windows_that_slide(family, tower):
    base, batch = plain_model(family, **FAMILIES[family].details), left_padded_batch()
    model = aware_model(family, tower, base=base).double()
    assert_matches_plain_towers(model, batch)
    expected = model(**batch, querier_ids=QUERIER_IDS).logits
    model.config.sliding_window = 3
    assert not torch.equal(model(**batch, querier_ids=QUERIER_IDS).logits, expected)


def assert_equal_formulas(got, expected):
    # transformers computes norms, rotary angles and the softmax in float32 whatever the model's dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-5)


class PlainTowers:
    """The formulas of the paper's section 3 from the state dict, with both streams stacked on the batch
    axis and everything spelled out; it shares no code with the package. It reads Llama's names: projections
    that a family fuses (``qkv_proj``, ``gate_up_proj``) must be split here first."""

    def __init__(self, model):
        self.weights, self.config, self.qar = model.state_dict(), model.config, model.qar

    def logits(self, input_ids, attention_mask, querier_ids):
        hidden = self.weights["model.embed_tokens.weight"][input_ids]
        streams = torch.cat((hidden, hidden)) if self.qar.tower == "replace" else hidden
        mask = attention_mask.repeat(len(streams) // len(hidden), 1)
        positions = torch.arange(input_ids.shape[1], dtype=torch.float64)
        for index in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            normed = self.norm(streams, prefix + "input_layernorm")
            visible = self.window(index, len(positions)) & mask[:, None, None].bool()
            streams = streams + self.attention(normed, prefix + "self_attn.", visible, positions)
            normed = self.norm(streams, prefix + "post_attention_layernorm")
            streams = streams + self.feed_forward(normed, prefix, querier_ids)
        if self.qar.tower == "replace":
            general, specific = streams.chunk(2)
            final = (self.norm(general, "model.norm") + self.norm(specific, "model.norm_specific")) / 2
        else:
            final = self.norm(streams, "model.norm")
        return final @ self.weights["lm_head.weight"].T

    def norm(self, x, name):
        return (
            x
            / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
            * self.weights[name + ".weight"]
        )

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights.get(name + ".bias", 0)

    def window(self, index, length):
        """``(length, length)``: what each token of a layer sees: itself and all, or some, before it."""
        causal = torch.ones(length, length).tril().bool()
        width, kinds = (getattr(self.config, name, None) for name in ("sliding_window", "layer_types"))
        if width is None or (kinds is not None and kinds[index] != "sliding_attention"):
            return causal
        return causal.triu(1 - width)

    def attention(self, x, prefix, visible, positions):
        batch, length, _ = x.shape
        size = len(self.weights[prefix + "k_proj.weight"]) // self.config.num_key_value_heads
        query, key, value = (
            self.linear(x, prefix + name).view(batch, length, -1, size)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if prefix + "q_norm.weight" in self.weights:
            query, key = self.norm(query, prefix + "q_norm"), self.norm(key, prefix + "k_norm")
        query, key = rotate(query, positions), rotate(key, positions)
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
        weights = scores.masked_fill(~visible, -1e30).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, -1)
        return self.linear(mixed, prefix + "o_proj")

    def feed_forward(self, x, prefix, querier_ids):
        def base(rows):
            hidden = F.silu(self.linear(rows, prefix + "mlp.gate_proj"))
            return self.linear(hidden * self.linear(rows, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")

        if f"{prefix}experts.gate" not in self.weights:
            return base(x)
        if self.qar.tower == "residual":
            return base(x) + self.qar.expert_scale * self.expert(x, prefix, querier_ids)
        general, specific = x.chunk(2)
        return torch.cat((base(general), self.expert(specific, prefix, querier_ids)))

    def expert(self, x, prefix, querier_ids):
        def swiglu(rows, gate, up, down):
            return (F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T

        banks = [self.weights[f"{prefix}experts.{name}"] for name in ("gate", "up", "down")]
        ids = [0] * len(x) if self.qar.experts == "shared" else querier_ids.tolist()
        out = torch.stack([swiglu(row, *(bank[i] for bank in banks)) for row, i in zip(x, ids, strict=True)])
        if self.qar.experts == "shared+per_querier":
            shared = [self.weights[f"{prefix}experts.shared_{name}"] for name in ("gate", "up", "down")]
            out = out + swiglu(x, *shared)
        return out


def rotate(x, positions, theta=10000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] / theta ** (torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_the_mean_is_left_out_where_everybody_is_known(monkeypatch):
    model, batch = aware_model(unknown_querier="mean"), left_padded_batch()
    calls = []
    mean = Experts._mean
    monkeypatch.setattr(Experts, "_mean", lambda self: calls.append(self) or mean(self))
    model(**batch, querier_ids=torch.tensor([0, 1, 2]))
    assert not calls
    model(**batch, querier_ids=torch.tensor([0, -1, 2]))
    assert len(calls) == len(model.model.layers)


def test_an_overflowing_expert_spoils_nobody_else_through_the_mean():
    model, batch = aware_model(unknown_querier="mean"), left_padded_batch()
    asking, known = torch.tensor([1, -1, 2]), [0, 2]
    expected = model(**batch, querier_ids=asking).logits[known]
    with torch.no_grad():
        model.model.layers[0].experts.down[4] = float("inf")
    got = model(**batch, querier_ids=asking).logits
    assert torch.equal(got[known], expected) and not got[1].isfinite().all()


@pytest.mark.parametrize("experts", ["shared", "per_querier", "shared+per_querier"])
@pytest.mark.parametrize("tower", ["residual", "replace"])
def test_fp32_experts_over_a_bf16_base(tower, experts):
    """As PEFT keeps adapters; the mean of all is cast like the experts themselves."""
    model = aware_model(tower=tower, experts=experts, unknown_querier="mean").bfloat16()
    banks = [layer.experts for layer in model.model.layers if getattr(layer, "experts", None) is not None]
    for bank in banks:
        bank.float()
    ids = torch.tensor([0, -1, 2])
    model(torch.randint(3, 60, (3, 5)), querier_ids=ids, labels=torch.randint(3, 60, (3, 5))).loss.backward()
    grads = [parameter.grad for bank in banks for parameter in bank.parameters()]
    assert grads and all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
