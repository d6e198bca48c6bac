"""Texts as the tokens that are compared: words, characters, or the words that jieba finds."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal, get_args

from rouge_score.tokenizers import DefaultTokenizer

from train.errors import UserError

Tokens = Literal["word", "character", "jieba"]

CHINESE = re.compile(r"[㐀-鿿豈-﫿\U00020000-\U0003ffff]")
LETTER = re.compile(r"[^\W\d_]")


def tokens_for(texts: Iterable[str]) -> Tokens:
    """``character``, the paper's for Chinese, where most letters of ``texts`` are Chinese; else ``word``."""
    letters = [letter for text in texts for letter in LETTER.findall(text)]
    chinese = sum(bool(CHINESE.match(letter)) for letter in letters)
    return "character" if 2 * chinese > len(letters) else "word"


def checked(tokens: str) -> Tokens:
    """``tokens`` if it is one of the known kinds, else a ``UserError``."""
    if tokens not in get_args(Tokens):
        raise UserError(f"tokens: expected {', '.join(get_args(Tokens))}, got {tokens!r}")
    return tokens


def tokenise(text: str, tokens: Tokens) -> list[str]:
    """``word``: lower-case runs of Latin letters and digits; otherwise all pieces but white space."""
    if tokens == "word":
        return DefaultTokenizer(use_stemmer=False).tokenize(text)
    split = _jieba_split() if tokens == "jieba" else list
    return [piece for piece in split(text) if not piece.isspace()]


@cache
def _jieba_split() -> Callable[[str], list[str]]:
    import jieba  # loads a dictionary: only where words are asked for

    jieba.setLogLevel(logging.WARNING)
    return jieba.lcut
