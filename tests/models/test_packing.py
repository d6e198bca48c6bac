"""Packed rows give the padded batch's losses and gradients, in both towers."""

import pytest
import torch
from tiny_models import EXPERTS, QUERIERS, TOWERS, VOCAB, aware_model, plain_model

from qar_models.packing import PACKED_ATTENTION

LENGTHS = (5, 9, 1, 7)
IDS, CLUSTERS = torch.tensor([3, 0, 3, 1]), torch.tensor([0, 1, 1, 0])
IGNORE = -100


def batches():
    """The same four windows, right-padded and packed; all tokens from the second on are learnt."""
    torch.manual_seed(5)
    windows = [torch.randint(1, VOCAB, (length,)) for length in LENGTHS]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = pad(windows, True), pad([torch.ones_like(w) for w in windows], True)
    spoken = [torch.arange(length) >= length // 2 for length in LENGTHS]
    who = {"querier_ids": IDS, "cluster_ids": CLUSTERS}
    padded = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORE),
        "response_mask": pad(spoken, True).long(),
    }
    packed = {
        "input_ids": torch.cat(windows).unsqueeze(0),
        "labels": torch.cat(windows).unsqueeze(0),
        "response_mask": torch.cat(spoken).unsqueeze(0).long(),
        "cu_seq_lens_q": torch.tensor((0, *LENGTHS)).cumsum(0).int(),
    }
    return padded | who, packed | who


def trained(model, batch, **settings):
    model.zero_grad()
    out = model(**batch, **settings)
    out.loss.backward()
    losses = [loss for loss in (out.lm_loss, out.contrastive_loss) if loss is not None]
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(grad, got[1][name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("attention", [PACKED_ATTENTION, "sdpa", "eager"])
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_equals_padded(tower, attention):
    model = aware_model("qwen3", tower, "shared+per_querier", num_clusters=2, projection_dim=8, memory_size=3)
    model.train()
    padded, packed = batches()
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained(model, padded)  # the first step fills the memory, the second has prototypes to compare with
    expected, remembered = trained(model, padded), model.contrast.totals.clone()
    assert expected[0][1] > 0
    model.load_state_dict(start, strict=False)
    model.set_attn_implementation(attention)
    trained(model, packed)
    assert_same(trained(model, packed), expected)
    torch.testing.assert_close(model.contrast.totals.float(), remembered.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"skip_logits": True}, {"num_items_in_batch": 40, "skip_logits": True}])
@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_equals_padded_in_all_kinds_of_models(tower, experts, first_layer, settings):
    model = aware_model("llama", tower, experts, first_expert_layer=first_layer)
    model.set_attn_implementation(PACKED_ATTENTION)
    padded, packed = batches()
    assert_same(trained(model, packed, **settings), trained(model, padded, **settings))


@pytest.mark.parametrize("tower", TOWERS)
def test_ids_per_token_embeddings_and_checkpointing(tower):
    model = aware_model(tower=tower, num_clusters=2, projection_dim=8)
    model.set_attn_implementation(PACKED_ATTENTION)
    padded, packed = batches()
    expected = trained(model, padded, skip_logits=True)
    per_token = IDS.repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0)
    assert_same(trained(model, packed | {"querier_ids": per_token}, skip_logits=True), expected)
    embedded = {name: value for name, value in packed.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.model.embed_tokens(packed["input_ids"])
    assert_same(trained(model, embedded, skip_logits=True), expected)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(trained(model, packed, skip_logits=True), expected)


def test_experts_that_train_alone():
    model = aware_model()
    model.name_queriers([f"q{index}" for index in range(QUERIERS)])
    model.train_only(["q3"])
    model.set_attn_implementation(PACKED_ATTENTION)
    padded, packed = batches()
    assert_same(trained(model, packed), trained(model, padded))


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_not_packed_is_attended_as_before(tower):
    model, (padded, _) = aware_model(tower=tower), batches()
    expected = trained(model, padded)
    tokens = model.generate(padded["input_ids"][:, :4], querier_ids=IDS, max_new_tokens=4)
    model.set_attn_implementation(PACKED_ATTENTION)
    assert_same(trained(model, padded), expected)
    assert torch.equal(model.generate(padded["input_ids"][:, :4], querier_ids=IDS, max_new_tokens=4), tokens)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 20])},
            "cu_seq_lens_q: got .*expected ascending bounds from 0 to 22",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 5, 22])}, "cu_seq_lens_q: got .*ascending"),
        ({"querier_ids": IDS[:3]}, r"querier_ids: got shape \(3,\), expected \(4,\) or \(1, 22\)"),
        ({"cluster_ids": CLUSTERS[:3]}, r"cluster_ids: got shape \(3,\), expected \(4,\)"),
        ({"attention_mask": torch.ones(1, 22)}, "attention_mask"),
        ({"use_cache": True}, "use_cache"),
    ],
)
def test_mistakes_are_named(change, named):
    model = aware_model(num_clusters=2, projection_dim=8)
    with pytest.raises(ValueError, match=named):
        model(**batches()[1] | change)


def test_several_rows_are_refused():
    model, (padded, packed) = aware_model(), batches()
    with pytest.raises(ValueError, match="for 4 rows, expected"):
        model(padded["input_ids"], querier_ids=IDS, cu_seq_lens_q=packed["cu_seq_lens_q"])


SLIDING = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
}


@pytest.mark.parametrize("attention", ["sdpa", PACKED_ATTENTION])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", SLIDING)
def test_layers_with_a_sliding_window(family, tower, attention):
    model = aware_model(family, tower, base=plain_model(family, **SLIDING[family]))
    padded, packed = batches()
    expected = model(padded["input_ids"], padded["attention_mask"], querier_ids=IDS).logits
    model.set_attn_implementation(attention)
    got = model(packed["input_ids"], cu_seq_lens_q=packed["cu_seq_lens_q"], querier_ids=IDS).logits
    kept = padded["attention_mask"].bool()
    torch.testing.assert_close(got[0], expected[kept], rtol=1e-4, atol=1e-4)


def test_positions_that_run_on_are_refused_where_masks_come_from_them():
    model = aware_model()
    _, packed = batches()
    inputs = {name: packed[name] for name in ("input_ids", "cu_seq_lens_q", "querier_ids")}
    restarting = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=restarting).logits, expected)
    running = torch.arange(sum(LENGTHS)).unsqueeze(0)
    with pytest.raises(
        ValueError, match=r"position_ids: got positions that run on into the windows at \[5, "
    ):
        model(**inputs, position_ids=running)
    model.set_attn_implementation(PACKED_ATTENTION)  # reads the bounds; positions only shift
    torch.testing.assert_close(model(**inputs, position_ids=running).logits, expected, rtol=1e-3, atol=1e-3)
