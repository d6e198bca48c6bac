"""Texts as the tokens that are compared: words, characters, or the words that jieba finds."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal, get_args

import regex
from rouge_score.tokenizers import DefaultTokenizer

from train.errors import UserError

TokenKind = Literal["word", "unicode", "character", "jieba"]
"""What a token is, see :func:`tokens_for`."""

# Chinese and Japanese; Thai, Lao, Burmese and Khmer
UNSPACED = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
LETTER = re.compile(r"[^\W\d_]")
WORD = regex.compile(r"[\w\p{M}]+")  # with their marks: vowel signs of Hindi or Arabic are not letters


def tokens_for(texts: Iterable[str]) -> TokenKind:
    """The kind of tokens that suits most letters of ``texts``.

    ``character``, the paper's choice for Chinese, for scripts without spaces; ``word`` for plain Latin
    letters; ``unicode`` for other scripts, of which rouge-score's words would leave nothing.
    """
    letters = [letter for text in texts for letter in LETTER.findall(text)]
    if 2 * sum(bool(UNSPACED.match(letter)) for letter in letters) > len(letters):
        return "character"
    return "word" if 2 * sum(map(str.isascii, letters)) >= len(letters) else "unicode"


def checked(tokens: str) -> TokenKind:
    """``tokens`` if it is one of the known kinds, else a ``UserError``."""
    if tokens not in get_args(TokenKind):
        raise UserError(f"tokens: expected {', '.join(get_args(TokenKind))}, got {tokens!r}")
    return tokens


def tokenise(text: str, tokens: TokenKind) -> list[str]:
    """``word``: lower-case runs of plain Latin letters and digits; ``unicode``: of any letters and digits.

    The other kinds: all pieces that are not white space.
    """
    text = composed(text)
    if tokens == "word":
        return DefaultTokenizer(use_stemmer=False).tokenize(text)
    if tokens == "unicode":
        return WORD.findall(composed(text.casefold()))
    split = _jieba_split() if tokens == "jieba" else list
    return [piece for piece in split(text) if not piece.isspace()]


def composed(text: str) -> str:
    """``text`` in NFC: a letter with its mark may be written as one character or as two."""
    return unicodedata.normalize("NFC", text)


@cache
def _jieba_split() -> Callable[[str], list[str]]:
    import jieba  # imported late: it loads a dictionary

    jieba.setLogLevel(logging.WARNING)
    return jieba.lcut
