import pytest
import torch

from qar_models import QARConfig, apply_qar
from train import layers
from train.base_model import load_base
from train.batches import Collator, Windows
from train.data.encode import IGNORE, encode_all
from train.layers import lower_states, upper_part


@pytest.fixture
def loaded(tiny_model_dir):
    return load_base(str(tiny_model_dir))


@pytest.fixture
def windows(loaded, tiny_data):
    return encode_all(tiny_data.train, loaded[1], names_in_prompt=False)


@pytest.mark.parametrize("tower", ["residual", "replace"])
@pytest.mark.parametrize("first_layer", [1, 2])
def test_parts_compute_what_the_whole_computes(loaded, windows, tmp_path, tower, first_layer):
    model, tokenizer = loaded
    states = lower_states(model, windows, first_layer, tmp_path)
    apply_qar(model, QARConfig(3, expert_rank=4, tower=tower, first_expert_layer=first_layer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() == 3 else None
    collate = Collator(tokenizer.pad_token_id)
    whole, cut = (collate([Windows(windows, s)[i] for i in (0, 9, 17)]) for s in (None, states))
    expected = model(**whole).loss
    got = upper_part(model, first_layer)(**cut, skip_logits=True).loss
    torch.testing.assert_close(got, expected)


def test_upper_part_trains_the_model_itself(loaded, windows, tmp_path):
    model, tokenizer = loaded
    states = lower_states(model, windows, 1, tmp_path)
    apply_qar(model, QARConfig(3, expert_rank=4, first_expert_layer=1))
    part = upper_part(model, 1)
    assert part.qar.first_expert_layer == part.config.qar["first_expert_layer"] == 0
    assert model.qar.first_expert_layer == model.model.layers[1].experts.qar.first_expert_layer == 1
    batch = Collator(tokenizer.pad_token_id)([Windows(windows, states)[0]])
    part(**batch).loss.backward()
    assert model.model.layers[1].experts.down.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    assert model.config.num_hidden_layers == 3
    assert part.qar.first_expert_layer == part.config.qar["first_expert_layer"] == 0
    assert model.qar.first_expert_layer == model.model.layers[1].experts.qar.first_expert_layer == 1
    assert upper_part(model, 0) is model


def test_cache_is_used_unless_it_is_damaged_or_the_weights_have_changed(
    loaded, windows, tmp_path, monkeypatch
):
    model, _ = loaded
    ran, run_lower = [], layers._run_lower
    monkeypatch.setattr(layers, "_run_lower", lambda *args: ran.append(1) or run_lower(*args))
    first = lower_states(model, windows, 1, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    model.model.layers[2].self_attn.q_proj.weight.data.zero_()  # above the cut
    assert torch.equal(lower_states(model, windows, 1, tmp_path)[0], first[0]) and len(ran) == 1
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(lower_states(model, windows, 1, tmp_path)[0], first[0]) and len(ran) == 2
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.neg_()  # as many ones and zeros as before
    assert not torch.equal(lower_states(model, windows, 1, tmp_path)[0], first[0])
    weight.neg_()
    assert torch.equal(lower_states(model, windows, 1, tmp_path)[0], first[0]) and len(ran) == 3
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0)
    assert not torch.equal(lower_states(model, windows, 1, tmp_path)[0], first[0]) and len(ran) == 4
    lower_states(model, windows, 1, tmp_path)
    model.config.rms_norm_eps *= 2  # which no weight shows
    lower_states(model, windows, 1, tmp_path)
    assert len(ran) == 5


def test_a_place_that_cannot_be_written_costs_time_alone(loaded, windows, tmp_path, caplog):
    (tmp_path / "states").write_text("a file")
    states = lower_states(loaded[0], windows, 1, tmp_path / "states")
    assert len(states) == len(windows) and "states are not kept" in caplog.text


def test_padding_keeps_end_marks_and_masks(loaded, windows):
    _, tokenizer = loaded
    short, long = sorted(windows, key=lambda w: len(w.input_ids))[:: len(windows) - 1]
    batch = Collator(tokenizer.pad_token_id)([Windows([short])[0], Windows([long])[0]])
    size = len(short.input_ids)
    assert batch["labels"][0, :size].tolist() == short.labels
    assert (batch["labels"][0, size:] == IGNORE).all()
    assert batch["attention_mask"].sum(1).tolist() == [size, len(long.input_ids)]
    assert tokenizer.pad_token_id in short.labels  # the end mark is the padding token, and is learnt
    assert (batch["response_mask"][0, size:] == 0).all()


def test_computed_where_the_model_will_be_and_kept_on_the_cpu(loaded, windows, tmp_path, monkeypatch):
    model, _ = loaded
    card, moved, move = torch.device("cpu", 0), [], torch.nn.Module.to
    monkeypatch.setattr("train.layers.default_device", lambda: card)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, to: (moved.append(to), move(self, to))[1])
    states = lower_states(model, windows, 2, tmp_path)
    assert moved == [card, model.device]
    assert all(state.device == torch.device("cpu") for state in states)
