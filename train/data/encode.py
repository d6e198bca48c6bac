"""Windows to token ids and labels, for training (``encode``) and generation (``encode_prompt``).

Truncation drops the oldest turns, then the end of the context, never the reply or its header. A leading turn
of the responder is dropped as well: nothing comes before the querier.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.chat_template import render_chat
from train.data.layout import Example
from train.data.rendering import MARKS, Rendered, has_marks, render_marked, structure_tokens
from train.data.transcript import Turn
from train.errors import UserError

logger = logging.getLogger(__name__)

IGNORE = -100
MAX_TOKENS = 592
TRIED_AT_ONCE = 32
"""Of more queries than this, the newest are tried first; windows of prepared data have no more."""
Style = Literal["auto", "chat", "llama3", "qwen", "plain"]
Render = Callable[[Sequence[Turn], str], Rendered]


class TooLongError(UserError):
    """A reply that does not fit into the token limit; it is never cut."""


@dataclass(frozen=True)
class Encoded:
    """One window as lists of the same length, plus who asked.

    ``labels`` are -100 where nothing is learnt; ``response_mask`` is 1 on all the responder's values and end
    marks; ``input_ids[:prompt_length]``, which ends with the header of the reply, is the prompt.
    """

    input_ids: list[int]
    labels: list[int]
    response_mask: list[int]
    querier_id: int
    cluster_id: int
    prompt_length: int
    id: str = ""
    dropped_turns: int = 0
    dropped_context: int = 0
    """Characters at the end of the context that did not fit."""

    @property
    def reply_labels(self) -> list[int]:
        """Labels of the last reply alone, for evaluation."""
        return _labels(self.input_ids, self.response_mask, self.prompt_length)

    @property
    def end_mark(self) -> int:
        """The token that ends the reply: the last one that is learnt."""
        return next(label for label in reversed(self.labels) if label != IGNORE)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = MAX_TOKENS,
    max_turns: int | None = None,
    names_in_prompt: bool = True,
    style: Style = "auto",
) -> Encoded:
    """Token ids and labels of ``example``.

    ``style`` "auto" is the tokenizer's chat template if it has one, else the reference's format whose special
    tokens it has, else plain "Name: text" lines. ``max_turns`` of 2 leaves the query and the reply. Every
    reply in the window is learnt. Raises ``TooLongError`` if the last reply alone (in a chat: with its query)
    exceeds ``max_tokens``, ``UserError`` if the tokenizer lacks the style's marks, or would read a mark in
    the text.
    """
    _check_plain(example.turns, example.context, tokenizer, f"example '{example.id}'")
    style = resolve_style(tokenizer, style)
    render = _renderer(tokenizer, style, example.responder, names_in_prompt)
    room = _Room(example.responder, render, lambda rendered: len(rendered.ids), max_tokens, max_turns)
    fitted = room.fit(example.turns, example.context, _least_turns(style))
    if fitted is None:
        raise TooLongError(f"example '{example.id}': the reply does not fit into {max_tokens} tokens")
    found = fitted.rendered
    return Encoded(
        found.ids,
        _labels(found.ids, found.mask, 0),
        found.mask,
        example.querier_id,
        example.cluster_id,
        found.prompt_length,
        example.id,
        fitted.dropped_turns,
        fitted.dropped_context,
    )


def encode_all(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[Encoded]:
    """Every example through ``encode`` with ``options``; those too long are left out.

    The numbers of examples left out and of contexts cut are logged.
    """
    encoded, skipped = [], 0
    for example in examples:
        try:
            encoded.append(encode(example, tokenizer, **options))
        except TooLongError:
            skipped += 1
    if skipped:
        logger.warning("left out %d examples whose reply does not fit the token limit", skipped)
    cut = sum(window.dropped_context > 0 for window in encoded)
    if cut:
        logger.warning("cut the context of %d of %d examples to fit the token limit", cut, len(encoded))
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    responder: str,
    max_tokens: int = MAX_TOKENS,
    max_turns: int | None = None,
    names_in_prompt: bool = True,
    style: Style = "auto",
    context: str = "",
) -> list[int]:
    """Token ids to generate from: ``turns``, the last of them the querier's, and the header of the reply.

    ``context`` comes before the turns; a warning is logged if its end had to be cut.
    """
    if not turns or turns[-1].speaker == responder:
        raise UserError(f"a prompt must end with a turn of somebody who asks {responder}")
    _check_plain(turns, context, tokenizer, "the prompt")
    style = resolve_style(tokenizer, style)
    render = _renderer(tokenizer, style, responder, names_in_prompt)
    with_reply = (*turns, Turn(responder, "."))
    room = _Room(responder, render, lambda rendered: rendered.prompt_length, max_tokens, max_turns)
    fitted = room.fit(with_reply, context, least=2)
    if fitted is None:
        raise TooLongError(f"the last query does not fit into {max_tokens} tokens")
    if fitted.dropped_context:
        logger.warning("cut the context to fit the token limit")
    return fitted.rendered.ids[: fitted.rendered.prompt_length]


def end_mark(tokenizer: PreTrainedTokenizerBase, style: Style = "auto") -> int:
    """The token that ends a reply."""
    turns = (Turn("user", "?"), Turn("assistant", "."))
    window = encode(Example("", turns, "assistant", "user", 0, 0), tokenizer, style=style)
    return window.end_mark


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


def _check_plain(turns: Sequence[Turn], context: str, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse text that spells out a special token: it would be read as a real one, and end a turn early."""
    texts = [context, *(text for turn in turns for text in (turn.speaker, turn.text))]
    for token in sorted(structure_tokens(tokenizer)):
        if any(token in text for text in texts):
            raise UserError(f"{where}: its text holds '{token}', which the tokenizer reads as a mark")


def _renderer(
    tokenizer: PreTrainedTokenizerBase, style: str, responder: str, names_in_prompt: bool
) -> Render:
    if style == "chat":
        return lambda turns, context: render_chat(turns, responder, tokenizer, names_in_prompt, context)
    return lambda turns, context: render_marked(turns, responder, tokenizer, style, names_in_prompt, context)


def _least_turns(style: str) -> int:
    """A chat template needs the query before the reply; the marked styles can do with the reply alone."""
    return 2 if style == "chat" else 1


@dataclass(frozen=True)
class _Fitted:
    rendered: Rendered
    dropped_turns: int
    dropped_context: int = 0


@dataclass(frozen=True)
class _Room:
    """Windows of ``responder``, as ``render`` writes them, in at most ``max_tokens`` tokens by ``length``.

    ``max_turns`` with the reply among them; None for all.
    """

    responder: str
    render: Render
    length: Callable[[Rendered], int]
    max_tokens: int
    max_turns: int | None

    def fit(self, turns: Sequence[Turn], context: str, least: int) -> _Fitted | None:
        """The longest end of ``turns`` that fits and does not begin with a reply; at least ``least`` turns.

        Older turns are dropped before any of the context; the query only after all of it.
        """
        fitted = None
        first = 0 if self.max_turns is None else max(0, len(turns) - self.max_turns)
        if context:
            with_query = range(first, len(turns) - 1)
            fitted = self._longest(turns, with_query, context) or self._cut_context(turns, context)
        return fitted or self._longest(turns, range(first, len(turns) - least + 1), "", len(context))

    def _longest(
        self, turns: Sequence[Turn], starts: Iterable[int], context: str, dropped: int = 0
    ) -> _Fitted | None:
        """``turns`` from the earliest of ``starts`` that fits, by bisection: fewer turns have fewer tokens.

        Rendering takes time quadratic in the number of turns, so the newest are tried first.
        """

        @cache
        def since(start: int) -> _Fitted | None:
            rendered = self.render(turns[start:], context)
            return _Fitted(rendered, start, dropped) if self.length(rendered) <= self.max_tokens else None

        last = len(turns) - 1
        starts = [start for start in starts if turns[start].speaker != self.responder or start == last]
        count = TRIED_AT_ONCE
        while count < len(starts) and since(starts[-count]):
            count *= 2
        starts = starts[-count:]
        if starts and since(starts[0]):  # nearly always
            return since(starts[0])
        first = bisect_left(starts, True, key=lambda start: since(start) is not None)
        return since(starts[first]) if first < len(starts) else None

    def _cut_context(self, turns: Sequence[Turn], context: str) -> _Fitted | None:
        """As much of the start of ``context`` as fits beside the query and the reply."""

        def beside(kept: int) -> _Fitted | None:
            return self._longest(turns, [len(turns) - 2], context[:kept], len(context) - kept)

        kept = bisect_left(range(1, len(context)), True, key=lambda length: beside(length) is None)
        return beside(kept)


def _labels(ids: list[int], mask: list[int], first: int) -> list[int]:
    return [
        token if said and position >= first else IGNORE
        for position, (token, said) in enumerate(zip(ids, mask, strict=True))
    ]
