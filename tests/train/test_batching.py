"""Batches without padding, batches of like length, and the speed comparison that rests on equal losses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks import finetune_speed, schema
from benchmarks.finetune_ways import ABLATION, PAIR, Job, Training
from qar_models.packing import PACKED_ATTENTION
from train.base_model import load_base
from train.batches import Collator, LengthGroupedSampler, PackingCollator, Windows
from train.data.encode import encode_all
from train.errors import UserError
from train.finetune import finetune
from train.layers import lower_states
from train.setup import make_trainer
from train.trained import EXPERTS, build


@pytest.fixture
def loaded(tiny_model_dir):
    return load_base(str(tiny_model_dir))


@pytest.fixture
def windows(loaded, tiny_data):
    return encode_all(tiny_data.train, loaded[1], names_in_prompt=False)


def test_packed_batch_holds_the_windows_in_order(windows):
    items = [Windows(windows)[index] for index in (0, 9, 17)]
    batch = PackingCollator()(items)
    bounds = batch["cu_seq_lens_q"].tolist()
    for item, start, end in zip(items, bounds, bounds[1:], strict=False):
        assert batch["input_ids"][0, start:end].tolist() == item["input_ids"]
        assert batch["labels"][0, start:end].tolist() == item["labels"]
        assert batch["response_mask"][0, start:end].tolist() == item["response_mask"]
    assert bounds[-1] == batch["input_ids"].shape[1] == sum(len(item["labels"]) for item in items)
    assert batch["max_length_q"] == max(len(item["labels"]) for item in items)
    assert batch["querier_ids"].tolist() == [item["querier_ids"] for item in items]


def test_cached_states_are_packed(loaded, windows, tmp_path):
    states = lower_states(loaded[0], windows, 1, tmp_path)
    batch = PackingCollator()([Windows(windows, states)[index] for index in (3, 5)])
    assert "input_ids" not in batch
    assert torch.equal(batch["inputs_embeds"], torch.cat((states[3], states[5])).unsqueeze(0))


@pytest.mark.parametrize("tower", ["residual", "replace"])
def test_packed_run_has_the_losses_of_a_padded_run(config, tower):
    """Frozen lower layers, accumulation, checkpointing, contrastive loss, Trainer: the same curve."""
    config = config.replace(
        tower=tower,
        experts="per_querier",
        contrastive_weight=0.5,
        memory_size=4,
        projection_dim=8,
        lora_dropout=0.0,
        batch_size=4,
        gradient_accumulation=2,
        gradient_checkpointing=True,
    )
    curves = {}
    for batching in ("packed", "padded"):
        run = config.replace(batching=batching, output_dir=f"{config.output_dir}_{batching}")
        log = json.loads((finetune(run).parent / "log.json").read_text())
        curves[batching] = [[row["loss"], row["contrastive_loss"]] for row in log if "loss" in row]
    torch.testing.assert_close(
        torch.tensor(curves["packed"]), torch.tensor(curves["padded"]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("batching", ["packed", "grouped", "padded"])
def test_trainer_batches_as_configured(config, loaded, windows, tiny_data, batching):
    model, tokenizer = loaded
    config = config.replace(batching=batching, trainable_layers=None, batch_size=4)
    build(model, config, tuple(tiny_data.queriers), tiny_data.num_clusters)
    loader = make_trainer(model, tokenizer, Windows(windows), config).get_train_dataloader()
    shapes = [batch["labels"].shape for batch in loader]
    assert all(shape[0] == (1 if batching == "packed" else 4) for shape in shapes)
    tokens, real = sum(rows * width for rows, width in shapes), sum(Windows(windows).lengths)
    assert (tokens == real) == (batching == "packed")
    attention = {module.config._attn_implementation for module in model.modules() if is_attention(module)}
    assert attention == {PACKED_ATTENTION if batching == "packed" else "sdpa"}


def is_attention(module):
    return hasattr(module, "o_proj") and not isinstance(module, PreTrainedModel)


def test_grouped_batches_are_alike_and_follow_from_seed_and_epoch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 200, (403,), generator=generator).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(403))
    assert first == list(LengthGroupedSampler(lengths, 8, seed=3))
    assert first != list(LengthGroupedSampler(lengths, 8, seed=4))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    batches = [[lengths[index] for index in first[start : start + 8]] for start in range(0, 403, 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.9
    maxima = [max(batch) for batch in batches]
    assert maxima not in (sorted(maxima), sorted(maxima, reverse=True))


def test_grouped_run_repeats(config):
    """The order of an epoch does not depend on how many random numbers were drawn before it."""
    config = config.replace(batching="grouped", epochs=1)
    one = json.loads((finetune(config).parent / "log.json").read_text())
    torch.manual_seed(99)
    again = config.replace(output_dir=config.output_dir + "_again")
    two = json.loads((finetune(again).parent / "log.json").read_text())
    assert [row.get("loss") for row in one] == [row.get("loss") for row in two]


@pytest.mark.parametrize("tower", ["residual", "replace"])
def test_half_precision_trains_parts_kept_in_full(config, tower):
    settings = {"contrastive_weight": 0.5, "memory_size": 4, "projection_dim": 8, "experts": "per_querier"}
    folder = finetune(config.replace(dtype="bfloat16", tower=tower, **settings))
    assert {tensor.dtype for name, tensor in load_file(folder / EXPERTS).items() if ".experts." in name} == {
        torch.float32
    }
    log = json.loads((folder.parent / "log.json").read_text())
    losses = [row["lm_loss"] for row in log if "lm_loss" in row]
    assert sum(losses[-2:]) < sum(losses[:2])


def speed_config(config):
    return config.replace(
        tower="replace",
        experts="per_querier",
        contrastive_weight=0.5,
        memory_size=2,
        projection_dim=8,
        lora_dropout=0.0,
        batch_size=3,
        max_tokens=64,
        trainable_layers=None,
    )


@pytest.mark.parametrize(("layers", "ways"), [(None, PAIR | ABLATION), (2, PAIR)])
def test_straightforward_way_and_all_others_have_equal_losses(config, layers, ways):
    job = Job(speed_config(config).replace(trainable_layers=layers), 8)
    trainings = {name: Training(job, way) for name, way in ways.items()}
    found = {
        name: finetune_speed.Measured([training.step(step) for step in range(8)], [1.0] * 7, None)
        for name, training in trainings.items()
    }
    assert finetune_speed.check_losses(found) < 1e-3
    assert trainings["qar"].model.contrast.writes.sum() == 8 * 3


def test_speed_command_writes_rows(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_speed, "peak_bytes", lambda *_: 7)
    out = tmp_path / "speed.json"
    finetune_speed.main(
        [
            "--model",
            config.model,
            "--data",
            config.data,
            "--steps",
            "4",
            "--max-tokens",
            "64",
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())
    assert not list(schema.problems(found))
    rows = {row["provider"]: row for row in found["rows"]}
    ours = rows["qar"]
    assert ours["ratio_to_base"] == ours["ms"]["p50"] / rows["straightforward"]["ms"]["p50"]
    assert rows["straightforward"]["ratio_to_base"] == 1
    assert ours["op"] == "finetune_step" and ours["peak_bytes"] == 7 and ours["E"] == 3
    assert "losses, straightforward" in capsys.readouterr().out


def test_unequal_losses_are_an_error():
    base = finetune_speed.Measured([1.0, 2.0], [1.0], None)
    other = finetune_speed.Measured([1.0, 2.01], [1.0], None)
    with pytest.raises(UserError, match=r"qar: loss 2.01000 at step 1, straightforward has 2.00000"):
        finetune_speed.check_losses({"straightforward": base, "qar": other})


def test_a_nan_loss_is_not_an_equal_loss():
    base = finetune_speed.Measured([1.0], [1.0], None)
    other = finetune_speed.Measured([float("nan")], [1.0], None)
    with pytest.raises(UserError, match="loss nan"):
        finetune_speed.check_losses({"straightforward": base, "qar": other})


def test_padding_is_what_packing_leaves_out(windows, loaded):
    items = [Windows(windows)[index] for index in range(8)]
    padded, packed = Collator(loaded[1].pad_token_id)(items), PackingCollator()(items)
    kept = padded["attention_mask"].bool()
    assert torch.equal(padded["labels"][kept], packed["labels"][0])
