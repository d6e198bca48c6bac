"""A tiny model with its tokenizer, and a few planted dialogues, so that whole runs take seconds."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train.base_model import load_tokenizer
from train.config import TrainConfig
from train.data.mqdialog import write_mqdialog
from train.data.planted import HABITS, planted

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<unk>", "<|im_start|>", "<|im_end|>")


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    words = sorted({word for word, _ in split.pre_tokenize_str(text + "\n:.'system user assistant You are")})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*MARKS, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_data():
    """Three queriers, eight training and two held-out questions each."""
    full, kept = planted(), range(3)
    examples = {
        split: [
            example
            for querier in kept
            for example in [e for e in getattr(full, split) if e.querier_id == querier][:count]
        ]
        for split, count in (("train", 8), ("dev", 2))
    }
    return dataclasses.replace(full, queriers=[HABITS[index].querier for index in kept], **examples)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_data) -> Path:
    """Three layers of random weights that write every word of the data."""
    everything = " ".join(turn.text for e in tiny_data.train + tiny_data.dev for turn in e.turns)
    tokenizer = _tokenizer(f"{everything} {' '.join(tiny_data.queriers)} {tiny_data.responder}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, tiny_data, tiny_model_dir) -> TrainConfig:
    """A run of six steps on the tiny model, the last two of three layers trained."""
    write_mqdialog(tiny_data, tmp_path / "data", "planted")
    return TrainConfig(
        data=str(tmp_path / "data"),
        output_dir=str(tmp_path / "runs" / "qar"),
        model=str(tiny_model_dir),
        expert_rank=4,
        lora_rank=4,
        learning_rate=1e-2,
        expert_learning_rate=1e-2,
        trainable_layers=2,
        epochs=2,
        save_steps=2,
        names_in_prompt=False,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer."""
    return load_tokenizer(str(tiny_model_dir))
