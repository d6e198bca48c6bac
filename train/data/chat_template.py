"""A window of turns as token ids through the tokenizer's own chat template.

The responder is the assistant, the querier the user. To find the replies in the rendered text, the same
conversation is rendered with placeholders for the messages: whatever stands between them is the template's.
This works even if a template treats the last reply differently (Qwen3 puts an empty thought before it).
"""

import re
from collections.abc import Sequence
from itertools import groupby

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from train.data.rendering import Rendered, special_tokens
from train.data.transcript import Turn
from train.errors import UserError

Message = dict[str, str]

SYSTEM = "You are {responder}."
FIXED = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""Template variables held fixed: no thoughts, and not today's date, which some Llama templates print."""


def render_chat(
    turns: Sequence[Turn],
    responder: str,
    tokenizer: PreTrainedTokenizerBase,
    names_in_prompt: bool,
    context: str = "",
) -> Rendered:
    """``turns`` (the last is the reply) in the chat template; with names, "NAME: " stands before a query.

    The system message says who answers; ``context`` follows there on a line of its own.

    Raises ``UserError`` if the template refuses the conversation, changes its text, does not close a reply
    with a special token, or lets a token cross the border of a reply.
    """
    messages = _messages(turns, responder, names_in_prompt, context)
    text, spans = _locate_replies(messages, tokenizer)
    ids = _tokenize(text, tokenizer)
    mask = [0] * len(ids)
    start = 0
    for first, last in spans:
        start, stop = (_tokens_before(text, at, ids, tokenizer) for at in (first, last))
        mask[start:stop] = [1] * (stop - start)
    return Rendered(ids, mask, start)


def _messages(turns: Sequence[Turn], responder: str, names_in_prompt: bool, context: str) -> list[Message]:
    system = "\n".join(filter(None, [SYSTEM.format(responder=responder), context.strip()]))
    messages = [{"role": "system", "content": system}]
    for speaker, group in groupby(turns, key=lambda turn: turn.speaker):
        text = "\n".join(turn.text.strip() for turn in group)
        is_query = speaker != responder
        content = f"{speaker}: {text}" if is_query and names_in_prompt else text
        messages.append({"role": "user" if is_query else "assistant", "content": content})
    return messages


def _locate_replies(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and (start of value, end of its end mark) of every assistant message in it."""
    messages, outline = _render_outline(messages, tokenizer)
    text, spans = outline[0], []
    for message, after in zip(messages, outline[1:], strict=True):
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            spans.append((start, len(text) + _end_of_mark(after, tokenizer)))
        text += after
    if text != _apply(messages, tokenizer):
        raise UserError("the chat template changes the text of a message; use the style 'plain' instead")
    return text, spans


def _render_outline(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Message], list[str]]:
    """The messages as the template takes them, and the template's text before, between and after them."""
    try:
        return messages, _outline(messages, tokenizer)
    except UserError:
        system, first, *rest = messages  # Gemma's template, for one, has no system role
        folded = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
        return [folded, *rest], _outline([folded, *rest], tokenizer)


def _outline(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    placeholders = [f"<<{index}>>" for index in range(len(messages))]
    text = _apply(
        [message | {"content": name} for message, name in zip(messages, placeholders, strict=True)], tokenizer
    )
    outline = re.split("|".join(map(re.escape, placeholders)), text)
    if len(outline) != len(messages) + 1 or re.findall(r"<<\d+>>", text) != placeholders:
        raise UserError("the chat template drops, repeats or moves a message; use the style 'plain' instead")
    return outline


def _apply(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **FIXED)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error


def _end_of_mark(after: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of the end mark at the start of ``after``, the template's text that follows a reply."""
    found = [
        (after.index(token), after.index(token) + len(token))
        for token in special_tokens(tokenizer)
        if token in after
    ]
    if not found:
        raise UserError(
            "the chat template closes a reply with no special token; use the style 'plain' instead"
        )
    return min(found)[1]


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _tokens_before(text: str, at: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of ``text[:at]``, which must be the first tokens of the whole text."""
    prefix = _tokenize(text[:at], tokenizer)
    if ids[: len(prefix)] != prefix:
        raise UserError(
            f"the tokenizer joins {text[max(0, at - 8) : at]!r} with {text[at : at + 8]!r}, so the chat "
            "template does not separate a reply from what is around it; use the style 'plain' instead"
        )
    return len(prefix)
