"""A window of turns as token ids, with a mask of what the responder says: the marked styles.

``llama3`` and ``qwen`` are the reference's formats, ``plain`` is for a tokenizer without marks. A turn is
header, value, end mark, newline; each is tokenised alone, so that the mask never falls inside a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from train.data.transcript import Turn
from train.errors import UserError

ANONYMOUS = "user"
NARRATOR = "system"
"""Who speaks a context in the marked styles."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a window.

    ``mask`` is 1 on the responder's values and their end marks; ``prompt_length`` is where the value of the
    last reply starts.
    """

    ids: list[int]
    mask: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Marks:
    """What stands before a name, after it, and after a value; ``end`` None is the tokenizer's eos token."""

    start: str
    after_name: str
    before_value: str
    end: str | None


MARKS = {
    "llama3": Marks("<|begin_of_text|>", "\n", "", "<|eot_id|>"),
    "qwen": Marks("<|im_start|>", "\n", "", "<|im_end|>"),
    "plain": Marks("", ":", " ", None),
}


def has_marks(style: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the special marks of ``style`` are single tokens of ``tokenizer``."""
    marks = MARKS[style]
    end = marks.end or tokenizer.eos_token
    return end is not None and all(_is_token(mark, tokenizer) for mark in (marks.start, end) if mark)


def _is_token(mark: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Looks the one token up: ``get_vocab`` copies the vocabulary, 35 ms for 49,000 tokens."""
    found = tokenizer.convert_tokens_to_ids(mark)
    return found is not None and (found != tokenizer.unk_token_id or mark == tokenizer.unk_token)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that the tokenizer reads as marks wherever they occur."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def structure_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """:func:`special_tokens` without those that only pad or stand for unknown text, which may be words."""
    idle = {tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
    return special_tokens(tokenizer) - idle


def render_marked(
    turns: Sequence[Turn],
    responder: str,
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    names_in_prompt: bool,
    context: str = "",
) -> Rendered:
    """``turns`` (the last is the reply) in a marked ``style``; without names the querier is ``user``.

    ``context`` leads as a turn of ``system``.
    """
    if not has_marks(style, tokenizer):
        marks = [MARKS[style].start, MARKS[style].end or "an eos token"]
        raise UserError(
            f"style '{style}' needs {' and '.join(filter(None, marks))}, which the tokenizer lacks"
        )
    blocks = [(NARRATOR, context.strip(), False)] if context.strip() else []
    for turn in turns:
        is_reply = turn.speaker == responder
        blocks.append((turn.speaker if is_reply or names_in_prompt else ANONYMOUS, turn.text, is_reply))
    ids: list[int] = []
    mask: list[int] = []
    prompt_length = 0
    for name, text, is_reply in blocks:
        header, body, newline = _pieces(name, text, tokenizer, MARKS[style])
        prompt_length = len(ids) + len(header)
        ids += header + body + newline
        mask += [0] * len(header) + [int(is_reply)] * len(body) + [0] * len(newline)
    return Rendered(ids, mask, prompt_length)


def _pieces(
    name: str, text: str, tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of header, value with end mark, and newline."""

    def encode(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids if piece else []

    end = tokenizer.convert_tokens_to_ids(marks.end or tokenizer.eos_token)
    if marks.start:
        header = [tokenizer.convert_tokens_to_ids(marks.start), *encode(name), *encode(marks.after_name)]
    else:
        header = encode(name + marks.after_name)
    return header, [*encode(marks.before_value + text), end], encode("\n")
