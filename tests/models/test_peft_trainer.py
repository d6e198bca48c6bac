"""PEFT's checkpoints, which transformers' Trainer writes, hold the experts if modules_to_save names them."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import TOWERS, left_padded_batch, plain_model, qar_config, training_batch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from qar_models import apply_qar

CONTRAST = {"num_clusters": 2, "memory_size": 4, "projection_dim": 8}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def aware(tower):
    torch.manual_seed(0)
    return apply_qar(plain_model(), qar_config(tower, **CONTRAST))


def adapted(tower):
    model, added = aware(tower), ["experts", "contrast"]
    if tower == "replace":
        added.append("norm_specific")
    return get_peft_model(model, LoraConfig(**LORA, modules_to_save=added))


def rows():
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    return [{name: values[index] for name, values in batch.items()} for index in range(3)]


def trainer(model, folder, **settings):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=3,
        remove_unused_columns=False,
        label_names=["labels"],
        learning_rate=2e-2,
        report_to="none",
        use_cpu=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize("tower", TOWERS)
def test_a_resumed_run_equals_the_uninterrupted_one(tower, tmp_path):
    whole = trainer(adapted(tower), tmp_path)
    whole.train()
    resumed = trainer(adapted(tower), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert any("contrast.modules_to_save.default.memory" in name for name in expected)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


@pytest.mark.parametrize("tower", TOWERS)
def test_the_best_model_is_loaded_and_saved_whole(tower, tmp_path):
    run = trainer(adapted(tower), tmp_path / "run", load_best_model_at_end=True, greater_is_better=True)
    run.train()  # losses fall, and the greatest counts as best: the first of two checkpoints
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best, last = evaluated
    assert run.evaluate()["eval_loss"] == best > last
    run.model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(aware(tower), tmp_path / "saved")
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    expected = run.model.eval()(**batch)
    assert torch.equal(loaded.eval()(**batch).loss, expected.loss)
    run.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = type(aware(tower)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**batch).logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_folder_finds_its_base_model(tmp_path):
    aware("residual").save_pretrained(tmp_path / "base")
    model = get_peft_model(
        type(aware("residual")).from_pretrained(tmp_path / "base"),
        LoraConfig(**LORA, modules_to_save=["experts"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    batch = left_padded_batch() | {"querier_ids": torch.tensor([0, 1, 2])}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("tower", TOWERS)
def test_all_linear_adapts_the_base_model_alone(tower):
    expected = {name for name, _ in get_peft_model(plain_model(), LoraConfig(**LORA)).named_modules()}
    got = get_peft_model(aware(tower), LoraConfig(**LORA))
    assert {name for name, _ in got.named_modules() if "lora_" in name} == {
        name for name in expected if "lora_" in name
    }


@pytest.mark.parametrize("tower", TOWERS)
def test_converting_an_adapted_model_warns_once(tower, caplog):
    hf_logging.warning_once.cache_clear()
    for model in (plain_model(), get_peft_model(plain_model(), LoraConfig(**LORA)).merge_and_unload()):
        apply_qar(model, qar_config(tower, **CONTRAST))
    assert not caplog.records
    for _ in range(2):
        apply_qar(get_peft_model(plain_model(), LoraConfig(**LORA)), qar_config(tower, **CONTRAST))
    added = "['experts', 'norm_specific', 'contrast']" if tower == "replace" else "['experts', 'contrast']"
    assert [r.getMessage() for r in caplog.records if r.name == "qar_models.conversion"] == [
        "apply_qar: the model already has PEFT adapters. PEFT's checkpoints (Trainer's too) will "
        f"not hold the experts. Call apply_qar first, then get_peft_model with modules_to_save={added}"
    ]
