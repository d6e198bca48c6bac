"""ROUGE-1, ROUGE-2 and ROUGE-L of one reply, by the package rouge-score or as the paper's package counts."""

from __future__ import annotations

from functools import cache
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from train.errors import UserError
from train.metrics import rouge_100
from train.metrics.text import TokenKind, checked, composed, tokenise, tokens_for

ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
Compat = Literal["rouge-1.0.0"]


def rouge(
    prediction: str, reference: str, tokens: TokenKind | None = None, compat: Compat | None = None
) -> dict[str, float]:
    """F-measures in [0, 1] of one reply; an empty one scores 0.

    Args:
        tokens: ``word`` (lower-case, stemmed), ``unicode`` (lower-case words of any script), ``character``
            (the paper's, for Chinese) or ``jieba`` (words of Chinese); None chooses by the letters of
            ``reference``, see :func:`tokens_for`.
        compat: ``rouge-1.0.0`` counts as that package does (see :mod:`train.metrics.rouge_100`): the paper's
            numbers come from it.

    Raises:
        UserError: for other ``tokens`` or ``compat``.
    """
    tokens = tokens_for([reference]) if tokens is None else checked(tokens)
    if compat is not None:
        if compat != "rouge-1.0.0":
            raise UserError(f"compat: expected 'rouge-1.0.0' or none, got {compat!r}")
        spaced = (prediction, reference)
        if tokens in ("character", "jieba"):
            spaced = tuple(" ".join(tokenise(text, tokens)) for text in spaced)
        return dict(zip(ROUGE_KEYS, rouge_100.f_measures(*spaced), strict=True))
    scores = _scorer(tokens).score(composed(reference), composed(prediction))
    return {key: float(scores[key].fmeasure) for key in ROUGE_KEYS}


class _Pieces(Tokenizer):
    def __init__(self, tokens: TokenKind) -> None:
        self._tokens = tokens

    def tokenize(self, text: str) -> list[str]:
        return tokenise(text, self._tokens)


@cache
def _scorer(tokens: TokenKind) -> RougeScorer:
    if tokens == "word":
        # named, or rouge-score logs that it takes it
        return RougeScorer(ROUGE_KEYS, tokenizer=DefaultTokenizer(use_stemmer=True))
    return RougeScorer(ROUGE_KEYS, tokenizer=_Pieces(tokens))
