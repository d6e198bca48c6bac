"""Windows to token ids and labels, for training (``encode``) and generation (``encode_prompt``).

Truncation drops the oldest turns, never the reply or its header. A leading turn of the responder is dropped
as well: nothing comes before the querier.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.chat import render_chat
from train.data.layout import Example
from train.data.rendering import MARKS, Rendered, has_marks, render_marked
from train.data.transcript import Turn
from train.errors import UserError

logger = logging.getLogger(__name__)

IGNORE = -100
MAX_TOKENS = 592
Style = Literal["auto", "chat", "llama3", "qwen", "plain"]
Supervise = Literal["all", "last"]
Render = Callable[[Sequence[Turn]], Rendered]


class TooLongError(UserError):
    """A reply that does not fit into the token limit; it is never cut."""


@dataclass(frozen=True)
class Encoded:
    """One window as lists of the same length, plus who asked.

    ``labels`` are -100 where nothing is learnt; ``response_mask`` is 1 on all the responder's values and end
    marks; ``input_ids[:prompt_length]``, which ends with the header of the reply, is given at generation.
    """

    input_ids: list[int]
    labels: list[int]
    response_mask: list[int]
    querier_id: int
    cluster_id: int
    prompt_length: int
    id: str = ""
    dropped_turns: int = 0

    @property
    def reply_labels(self) -> list[int]:
        """Labels of the last reply alone, for evaluation."""
        return _labels(self.input_ids, self.response_mask, self.prompt_length)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = MAX_TOKENS,
    names_in_prompt: bool = True,
    style: Style = "auto",
    supervise: Supervise = "all",
) -> Encoded:
    """Token ids and labels of ``example``.

    ``style`` "auto" is the tokenizer's chat template if it has one, else the reference's format that its
    special tokens belong to, else plain "Name: text" lines. ``supervise`` "all" learns every reply in the
    window, "last" only the last one. Raises ``TooLongError`` if the reply alone (in a chat: and its query)
    exceeds ``max_tokens``, ``UserError`` for a tokenizer that cannot write the style.
    """
    if supervise not in ("all", "last"):
        raise UserError(f"supervise is '{supervise}', expected 'all' or 'last'")
    style = resolve_style(tokenizer, style)
    render = _renderer(tokenizer, style, example.responder, names_in_prompt)
    fitted = _fit(
        example.turns, example.responder, render, _least_turns(style), lambda r: len(r.ids), max_tokens
    )
    if fitted is None:
        raise TooLongError(f"example '{example.id}': the reply does not fit into {max_tokens} tokens")
    dropped, found = fitted
    first = found.prompt_length if supervise == "last" else 0
    return Encoded(
        found.ids,
        _labels(found.ids, found.mask, first),
        found.mask,
        example.querier_id,
        example.cluster_id,
        found.prompt_length,
        example.id,
        dropped,
    )


def encode_all(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[Encoded]:
    """``encode`` with its ``options`` for every example; too long ones are left out, their number logged."""
    encoded, skipped = [], 0
    for example in examples:
        try:
            encoded.append(encode(example, tokenizer, **options))
        except TooLongError:
            skipped += 1
    if skipped:
        logger.warning("left out %d examples whose reply does not fit the token limit", skipped)
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    responder: str,
    max_tokens: int = MAX_TOKENS,
    names_in_prompt: bool = True,
    style: Style = "auto",
) -> list[int]:
    """Token ids to generate from: ``turns``, the last of them the querier's, and the header of the reply."""
    if not turns or turns[-1].speaker == responder:
        raise UserError(f"a prompt must end with a turn of somebody who asks {responder}")
    style = resolve_style(tokenizer, style)
    render = _renderer(tokenizer, style, responder, names_in_prompt)
    with_reply = (*turns, Turn(responder, "."))
    fitted = _fit(with_reply, responder, render, 2, lambda r: r.prompt_length, max_tokens)
    if fitted is None:
        raise TooLongError(f"the last query does not fit into {max_tokens} tokens")
    _, found = fitted
    return found.ids[: found.prompt_length]


def resolve_style(tokenizer: PreTrainedTokenizerBase, style: Style) -> str:
    """The style that "auto" stands for with this tokenizer; any other known style is returned as it is."""
    if style != "auto":
        if style != "chat" and style not in MARKS:
            raise UserError(f"style '{style}' is unknown, expected auto, chat, {', '.join(MARKS)}")
        if style == "chat" and not tokenizer.chat_template:
            raise UserError("style 'chat' needs a chat template, which the tokenizer lacks")
        return style
    if tokenizer.chat_template:
        return "chat"
    return next((name for name in ("llama3", "qwen") if has_marks(name, tokenizer)), "plain")


def _renderer(
    tokenizer: PreTrainedTokenizerBase, style: str, responder: str, names_in_prompt: bool
) -> Render:
    if style == "chat":
        return lambda turns: render_chat(turns, responder, tokenizer, names_in_prompt)
    return lambda turns: render_marked(turns, responder, tokenizer, style, names_in_prompt)


def _least_turns(style: str) -> int:
    """A chat template needs the query before the reply; the marked styles can do with the reply alone."""
    return 2 if style == "chat" else 1


def _fit(
    turns: Sequence[Turn],
    responder: str,
    render: Render,
    least: int,
    length: Callable[[Rendered], int],
    max_tokens: int,
) -> tuple[int, Rendered] | None:
    """Where the longest end of ``turns`` starts that fits and does not lead with a reply, and its tokens.

    It has at least ``least`` turns.
    """
    for start in range(len(turns) - least + 1):
        if turns[start].speaker == responder and start < len(turns) - 1:
            continue
        rendered = render(turns[start:])
        if length(rendered) <= max_tokens:
            return start, rendered
    return None


def _labels(ids: list[int], mask: list[int], first: int) -> list[int]:
    return [
        token if said and position >= first else IGNORE
        for position, (token, said) in enumerate(zip(ids, mask, strict=True))
    ]
