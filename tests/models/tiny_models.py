"""Tiny random models and batches that the tests of this folder share."""

from typing import Any, NamedTuple

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qar_models import (
    QARConfig,
    QARLlamaForCausalLM,
    QARMistralForCausalLM,
    QARQwen2ForCausalLM,
    QARQwen3ForCausalLM,
)


class TinyFamily(NamedTuple):
    """A family under test.

    Attributes:
        config, plain, aware: its classes.
        sizes: what a tiny model needs beside SIZES: a ``head_dim``, if its default does not follow from them.
        details: settings of its own that must survive a conversion (biases, a window of less than 10 tokens).
    """

    config: type[PreTrainedConfig]
    plain: type[PreTrainedModel]
    aware: type[PreTrainedModel]
    sizes: dict[str, Any]
    details: dict[str, Any]


_SOME_LAYERS_SLIDE = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES = {
    "llama": TinyFamily(
        LlamaConfig, LlamaForCausalLM, QARLlamaForCausalLM, {}, {"attention_bias": True, "mlp_bias": True}
    ),
    "mistral": TinyFamily(
        MistralConfig, MistralForCausalLM, QARMistralForCausalLM, {}, {"sliding_window": 4}
    ),
    "qwen2": TinyFamily(Qwen2Config, Qwen2ForCausalLM, QARQwen2ForCausalLM, {}, _SOME_LAYERS_SLIDE),
    "qwen3": TinyFamily(
        Qwen3Config, Qwen3ForCausalLM, QARQwen3ForCausalLM, {"head_dim": 16}, _SOME_LAYERS_SLIDE
    ),
}
TOWERS = ("residual", "replace")
EXPERTS = ("per_querier", "shared", "shared+per_querier")
VOCAB, HIDDEN, QUERIERS = 96, 64, 5
QUERIER_IDS = torch.tensor([3, 0, 3])
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def plain_model(family="llama", seed=0, **overrides):
    """A random base model whose logits differ clearly from token to token."""
    torch.manual_seed(seed)
    tiny = FAMILIES[family]
    return tiny.plain(tiny.config(**{**SIZES, **tiny.sizes, **overrides})).eval()


def qar_config(tower="residual", experts="per_querier", **settings):
    return QARConfig(
        **{"num_queriers": QUERIERS, "expert_rank": 8, "tower": tower, "experts": experts, **settings}
    )


def aware_model(family="llama", tower="residual", experts="per_querier", base=None, **settings):
    """A querier-aware model whose experts differ from each other and from zero."""
    base = plain_model(family) if base is None else base
    model = FAMILIES[family].aware.from_base(base, qar_config(tower, experts, **settings))
    randomize_experts(model)
    return model.eval()


def randomize_experts(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and name.endswith("down"):
                parameter.normal_(0, 0.2)


def left_padded_batch(batch_size=3, seq_len=10, padding=3):
    """``input_ids`` and ``attention_mask``; the first row starts with padding."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, VOCAB, (batch_size, seq_len), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :padding] = 0
    attention_mask[0, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def training_batch():
    """A batch with labels for the language model loss."""
    batch = left_padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    return {**batch, "labels": labels, "querier_ids": QUERIER_IDS}


NAMES = ("Amy", "Bernadette", "Howard", "小雪", "a/b")
ASKING = ("Howard", "Amy", "小雪")


def named_model(**settings):
    """Whose queriers have names."""
    return aware_model(querier_names=NAMES, **settings)


def answers(model, asking=ASKING):
    """Logits for the left-padded batch, asked by these names."""
    ids = torch.tensor([model.queriers[name] for name in asking])
    with torch.no_grad():
        return model(**left_padded_batch(), querier_ids=ids).logits


def train(model, steps=5, asking=("Howard",) * 3):
    """A few steps on one batch; its losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02, weight_decay=0.1)
    batch = training_batch() | {"querier_ids": torch.tensor([model.queriers[name] for name in asking])}
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batch_of(*queriers, seed=0):
    """A batch of three sequences of different tokens per seed."""
    batch = training_batch()
    draw = torch.Generator().manual_seed(seed)
    batch["input_ids"] = torch.randint(1, 90, batch["input_ids"].shape, generator=draw)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
    return batch | {"querier_ids": torch.tensor(queriers)}


def reasons(caplog):
    """Why base MLPs ran in their own modules, as the log says."""
    return [r.getMessage() for r in caplog.records if r.name == "qar_models.base_mlp"]
