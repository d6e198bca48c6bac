"""Answer queriers, many of them in one batch.

    python -m train.generate --model runs/demo/cells/qar-seed0/trained --query "Where hast thou been?" \\
        [--as NAME ...]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from train.cli import positive_int, run
from train.config import TrainConfig
from train.data.encode import encode_prompt, end_mark
from train.data.layout import Example, MQDialog
from train.data.transcript import Turn
from train.dataset import with_context
from train.errors import UserError
from train.trained import Trained, load_trained


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    querier_ids: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    batch_size: int = 16,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Greedy replies, one per prompt and querier; prompts of similar length share a left-padded batch.

    ``streamer`` receives the tokens of a single reply as they come, in place of a progress bar.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, str] = {}
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="generating", unit="batch", leave=False, disable=streamer is not None):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[index]) for index in chosen]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ids = torch.tensor([querier_ids[index] for index in chosen], device=model.device)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            querier_ids=ids,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_tokens),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
        )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        replies |= dict(zip(chosen, (text.strip() for text in texts), strict=True))
    return [replies[index] for index in range(len(prompts))]


def answer(
    trained: Trained, history: Sequence[Turn], queriers: Sequence[str], max_new_tokens: int = 48
) -> dict[str, str]:
    """The same query, the last turn of ``history``, asked by each of ``queriers`` in one batch.

    ``history`` is rewritten as spoken by each querier in turn, so that nothing but who asks differs. In a
    model of several responders, each querier's own responder answers.
    """
    ids = [trained.querier_id(name) for name in queriers]
    prompts = [prompt_as(trained, history, name) for name in queriers]
    replies = generate_replies(
        trained.model, trained.tokenizer, prompts, ids, max_new_tokens, end_marks(trained)
    )
    return dict(zip(queriers, replies, strict=True))


def prompt_as(trained: Trained, history: Sequence[Turn], querier: str) -> list[int]:
    """The prompt for ``history`` as if ``querier`` had said all of it that ``trained.responder`` did not."""
    config = trained.config
    asker, responder = trained.roles(querier)
    turns = [Turn(responder if turn.speaker == trained.responder else asker, turn.text) for turn in history]
    return encode_prompt(
        turns,
        trained.tokenizer,
        responder=responder,
        **config.encoding,
        context=_context(config, turns, responder),
    )


def _context(config: TrainConfig, turns: Sequence[Turn], responder: str) -> str:
    """The context that such turns had in training."""
    if config.context == "few_shot":
        raise UserError(
            "context: got 'few_shot', which needs the training dialogues, expected a profile or none"
        )
    window = Example("", tuple(turns), responder, "", 0, 0)
    return with_context(MQDialog(responder, [""], 1, [], [window]), config).dev[0].context


def end_marks(trained: Trained) -> list[int]:
    """Tokens that end a reply: the end mark that was learnt, and the tokenizer's end of sequence."""
    mark = end_mark(trained.tokenizer, trained.config.style)
    return sorted({mark, trained.tokenizer.eos_token_id} - {None})


def answer_table(trained: Trained, replies: Mapping[str, str]) -> Table:
    """One row per querier; replies are shown verbatim, whatever brackets they hold, and in full."""
    columns = (Column(heading, overflow="fold") for heading in ("asked by", "answered by", "reply"))
    table = Table(*columns, show_lines=True)
    for name, reply in replies.items():
        table.add_row(*map(Text, (*trained.roles(name), reply)))
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that train.finetune wrote")
    parser.add_argument("--query", required=True, help="what is asked")
    parser.add_argument(
        "--as", dest="queriers", nargs="+", metavar="NAME", help="who asks (default: everybody)"
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=48)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if not arguments.query.strip():
        raise UserError("--query: is empty, expected what is asked")
    trained = load_trained(arguments.model)
    queriers = arguments.queriers or list(trained.queriers)
    replies = answer(trained, [Turn(queriers[0], arguments.query)], queriers, arguments.max_new_tokens)
    Console().print(answer_table(trained, replies))


if __name__ == "__main__":
    run(main)
