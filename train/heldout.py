"""Held-out replies: how likely they are, and how close the generated ones come.

B windows, S tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.base_model import load_base, load_tokenizer, num_layers
from train.batches import Collator, Windows, text_key
from train.config import TrainConfig
from train.data.encode import IGNORE
from train.data.layout import Example, MQDialog
from train.data.names import split_pair
from train.dataset import window_set
from train.errors import UserError
from train.generate import generate_replies
from train.layers import upper_part
from train.metrics import Record, score_reply, tokens_for, unscored
from train.trained import Trained, first_trained_layer

BATCH_SIZE = 16
COMPARED = 8
"""Windows, all of the first batch, on which experts are compared."""
SAMPLE_SEED = 0
"""Every model answers the same windows, whatever the seed of its training."""


@torch.inference_mode()
def reply_nll(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """NLL in nats summed over each reply, and its number of tokens: ``(B,)``, ``(B,)``."""
    text = text_key(batch)
    batch = {key: batch[key].to(model.device) for key in (text, "attention_mask", "querier_ids", "labels")}
    if batch[text].is_floating_point():  # states of frozen layers, in the dtype that those ran in
        batch[text] = batch[text].to(model.dtype)
    labels, inputs = batch["labels"], {key: batch[key] for key in batch if key != "labels"}
    states = model.model(**inputs, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    kept = targets != IGNORE
    logits = model.compute_logits(states[:, :-1][kept]).float()
    losses = F.cross_entropy(logits, targets[kept], reduction="none")
    rows = kept.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add_(0, rows, losses), kept.sum(1)


class HeldOut:
    """The held-out windows of a data set, scored under any model of the same base.

    Args:
        examples: the windows' text.
        windows: the same, encoded, with their states below ``first_layer``; those of ``examples`` that did
            not fit and are not among them are left out, ``left_out`` is their number.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        windows: Windows,
        tokenizer: PreTrainedTokenizerBase,
        first_layer: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        encoded = {window.id for window in windows.windows}
        self.examples = [example for example in examples if example.id in encoded]
        self.left_out = len(examples) - len(self.examples)
        self.windows, self.tokenizer = windows.windows, tokenizer
        self.first_layer, self.batch_size = first_layer, batch_size
        collator = Collator(tokenizer.pad_token_id, label_key="reply_labels")
        self.loader = DataLoader(windows, batch_size=batch_size, collate_fn=collator)

    @property
    def querier_ids(self) -> list[int]:
        """Who really asked."""
        return [window.querier_id for window in self.windows]

    def nll(self, model: PreTrainedModel, querier_ids: Sequence[int]) -> list[tuple[float, int]]:
        """``(sum, tokens)`` of every reply as asked by ``querier_ids``."""
        scored = upper_part(model, self.first_layer)
        asked_by = torch.tensor(querier_ids).split(self.batch_size)
        results: list[tuple[float, int]] = []
        for batch, ids in zip(tqdm(self.loader, desc="scoring", leave=False), asked_by, strict=True):
            sums, counts = reply_nll(scored, batch | {"querier_ids": ids})
            results += list(zip(sums.tolist(), counts.tolist(), strict=True))
        return results

    def generate(
        self, model: PreTrainedModel, indices: Sequence[int], querier_ids: Sequence[int], max_new_tokens: int
    ) -> list[str]:
        """Greedy replies to the windows at ``indices``, asked by ``querier_ids``."""
        windows = [self.windows[index] for index in indices]
        prompts = [window.input_ids[: window.prompt_length] for window in windows]
        marks = {window.end_mark for window in self.windows} | {self.tokenizer.eos_token_id}
        stops = sorted(marks - {None})
        return generate_replies(
            model, self.tokenizer, prompts, querier_ids, max_new_tokens, stops, self.batch_size
        )

    def swapped_ids(self, queriers: Sequence[str], seed: int) -> list[int]:
        """For each window the id of somebody else who asks the same responder, drawn at random.

        Where nobody else does, of anybody else; ``queriers`` are the names of the ids, two or more.
        """
        draw = random.Random(seed)
        return [draw.choice(_others(queriers, true)) for true in self.querier_ids]

    def sample(self, count: int, seed: int) -> list[int]:
        """``count`` windows drawn at random, in order."""
        everything = range(len(self.windows))
        return sorted(random.Random(seed).sample(everything, min(count, len(everything))))

    def records(self, scores: Sequence[tuple[float, int]], replies: Mapping[int, str | None]) -> list[Record]:
        """One record per window.

        ``replies`` has for each window that was to be answered the text, or None where generation failed.
        What ROUGE and BLEU compare is chosen by all replies in the data.
        """
        tokens = tokens_for(example.reply for example in self.examples)
        return [
            {
                "id": example.id,
                "dialogue": example.dialogue,
                "querier": example.querier,
                "nll_sum": nll,
                "tokens": count,
                **(
                    score_reply(replies[index], example.reply, tokens)
                    if index in replies
                    else unscored(example.reply)
                ),
            }
            for index, (example, (nll, count)) in enumerate(zip(self.examples, scores, strict=True))
        ]

    def answer(
        self, model: PreTrainedModel, querier_ids: Sequence[int], indices: Sequence[int], max_new_tokens: int
    ) -> list[Record]:
        """Records of all windows as asked by ``querier_ids``, those at ``indices`` answered."""
        asked_by = [querier_ids[index] for index in indices]
        replies = self.generate(model, indices, asked_by, max_new_tokens)
        return self.records(self.nll(model, querier_ids), dict(zip(indices, replies, strict=True)))


def held_out_windows(config: TrainConfig, data: MQDialog, batch_size: int = BATCH_SIZE) -> HeldOut:
    """The held-out windows of ``data`` as the runs of ``config`` read them.

    Raises ``UserError`` if there are none.
    """
    tokenizer = load_tokenizer(config.model)
    first = first_trained_layer(config, num_layers(config.model))
    # beside the trained model a plain one is needed only where frozen layers have run by themselves
    plain = load_base(config.model)[0] if first else None
    windows = window_set(data.dev, plain, tokenizer, config, first)
    held_out = HeldOut(data.dev, windows, tokenizer, first, batch_size)
    if not held_out.examples:
        raise UserError(
            f"{config.data}: no held-out window fits into max_tokens={config.max_tokens} (of {len(data.dev)})"
        )
    return held_out


def score(
    trained: Trained, held_out: HeldOut, generated: int, max_new_tokens: int
) -> tuple[list[Record], list[Record] | None]:
    """Records of all windows, ``generated`` of them answered; and of the same, asked under others' ids.

    The second is None where the model has no experts of one's own. Which windows are answered, and who
    else asks, is the same for every model.
    """
    chosen = held_out.sample(generated, SAMPLE_SEED)
    records = held_out.answer(trained.model, held_out.querier_ids, chosen, max_new_tokens)
    if not _knows_who_asks(trained):
        return records, None
    others = held_out.swapped_ids(trained.queriers, SAMPLE_SEED)
    return records, held_out.answer(trained.model, others, chosen, max_new_tokens)


def _knows_who_asks(trained: Trained) -> bool:
    qar = trained.model.qar
    has_experts = qar.first_expert_layer < trained.model.config.num_hidden_layers
    return has_experts and qar.experts != "shared" and len(trained.queriers) > 1


def _others(queriers: Sequence[str], true: int) -> list[int]:
    """Who could have asked instead, counted on from who did."""
    behind = [(true + step) % len(queriers) for step in range(1, len(queriers))]
    responder = split_pair(queriers[true])[1]
    return [other for other in behind if split_pair(queriers[other])[1] == responder] or behind


@torch.inference_mode()
def querier_similarity(model: PreTrainedModel, held_out: HeldOut) -> list[list[float]]:
    """How alike the experts are, ``(Q, Q)`` cosines between the ways they move the same states.

    Each of the Q queriers asks the first ``COMPARED`` windows; what is compared is the last hidden state
    minus its mean over queriers. (Weights themselves do not compare: each expert has a basis of its own.)
    """
    scored = upper_part(model, held_out.first_layer)
    batch = next(iter(held_out.loader))
    text = text_key(batch)
    inputs = {key: batch[key][:COMPARED].to(model.device) for key in (text, "attention_mask")}
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = []
    for querier_id in range(model.qar.num_queriers):
        ids = torch.full((len(mask),), querier_id, device=model.device)
        out = scored.model(**inputs, querier_ids=ids, use_cache=False).last_hidden_state
        states.append((out * mask).flatten())
    stacked = torch.stack(states)
    moves = F.normalize(stacked - stacked.mean(0), dim=1)
    return (moves @ moves.T).tolist()
