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

from train.batches import Collator, Windows
from train.data.encode import IGNORE, Encoded
from train.data.layout import Example
from train.generate import generate_replies
from train.layers import upper_part
from train.metrics import Record, Tokens, score_reply, tokens_for, unscored


@torch.inference_mode()
def reply_nll(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """NLL in nats summed over each reply, and its number of tokens: ``(B,)``, ``(B,)``."""
    text = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    batch = {key: batch[key].to(model.device) for key in (text, "attention_mask", "querier_ids", "labels")}
    labels, inputs = batch["labels"], {key: batch[key] for key in batch if key != "labels"}
    states = model.model(**inputs, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    kept = targets != IGNORE
    logits = model.lm_head(states[:, :-1][kept]).float()
    losses = F.cross_entropy(logits, targets[kept], reduction="none")
    rows = kept.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add_(0, rows, losses), kept.sum(1)


class HeldOut:
    """The held-out windows of one responder, scored under any model of the same base.

    Args:
        examples: the windows' text.
        windows: the same, encoded, with their states below ``first_layer``.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        windows: Windows,
        tokenizer: PreTrainedTokenizerBase,
        first_layer: int = 0,
        batch_size: int = 16,
    ) -> None:
        self.examples, self.windows, self.tokenizer = examples, windows.windows, tokenizer
        self.first_layer, self.batch_size = first_layer, batch_size
        collator = Collator(tokenizer.pad_token_id, label_key="reply_labels")
        self.loader = DataLoader(windows, batch_size=batch_size, collate_fn=collator)

    @property
    def querier_ids(self) -> list[int]:
        """Who really asked."""
        return [window.querier_id for window in self.windows]

    def nll(self, model: PreTrainedModel, querier_ids: Sequence[int]) -> list[tuple[float, int]]:
        """``(sum, tokens)`` of every reply as asked by ``querier_ids``."""
        scored = upper_part(model, self.first_layer) if self.first_layer else model
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
        end_marks = sorted({_end_mark(window) for window in self.windows})
        return generate_replies(
            model, self.tokenizer, prompts, querier_ids, max_new_tokens, end_marks, self.batch_size
        )

    def swapped_ids(self, num_queriers: int, seed: int) -> list[int]:
        """For each window the id of somebody else, drawn at random."""
        draw = random.Random(seed)
        return [(true + draw.randrange(1, num_queriers)) % num_queriers for true in self.querier_ids]

    def sample(self, count: int, seed: int) -> list[int]:
        """``count`` windows drawn at random, in order."""
        everything = range(len(self.windows))
        return sorted(random.Random(seed).sample(everything, min(count, len(everything))))

    def records(
        self,
        scores: Sequence[tuple[float, int]],
        replies: Mapping[int, str | None],
        tokens: Tokens | None = None,
    ) -> list[Record]:
        """One record per window.

        Args:
            replies: for each window that was to be answered the text, or None where generation failed.
            tokens: what ROUGE and BLEU compare, see :func:`train.metrics.rouge`; None chooses by all replies
                in the data.
        """
        tokens = tokens or tokens_for(example.reply for example in self.examples)
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


def _end_mark(window: Encoded) -> int:
    """The token that ends a reply: the last one that is learnt."""
    return next(label for label in reversed(window.reply_labels) if label != IGNORE)


@torch.inference_mode()
def querier_similarity(model: PreTrainedModel, held_out: HeldOut, count: int = 8) -> list[list[float]]:
    """How alike the experts are, ``(Q, Q)`` cosines between the ways they move the same states.

    Each of the Q queriers asks the same ``count`` windows; what is compared is the last hidden state minus
    its mean over queriers. (Weights themselves do not compare: each expert has a basis of its own.)
    """
    scored = upper_part(model, held_out.first_layer) if held_out.first_layer else model
    batch = next(iter(held_out.loader))
    text = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    inputs = {key: batch[key][:count].to(model.device) for key in (text, "attention_mask")}
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = []
    for querier_id in range(model.qar.num_queriers):
        ids = torch.full((len(mask),), querier_id, device=model.device)
        out = scored.model(**inputs, querier_ids=ids, use_cache=False).last_hidden_state
        states.append((out * mask).flatten())
    stacked = torch.stack(states)
    moves = F.normalize(stacked - stacked.mean(0), dim=1)
    return (moves @ moves.T).tolist()
