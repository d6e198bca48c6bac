"""BLEU-1 to BLEU-4 by sacrebleu, and distinct-1 and distinct-2.

BLEU-n is the geometric mean of the precisions of 1- to n-grams with equal weights, times the brevity penalty;
case counts. Words are sacrebleu's "13a", characters its "char". For a single reply only those orders count
that it has n-grams of. An order without a match is smoothed exponentially (sacrebleu's ``exp``), for one
reply as for all together (``corpus_bleu``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sacrebleu.metrics import BLEU

from train.metrics.text import TokenKind, checked, composed, tokenise

ORDERS = (1, 2, 3, 4)
BLEU_KEYS = tuple(f"bleu{order}" for order in ORDERS)
CORPUS_BLEU_KEYS = tuple(f"corpus_bleu{order}" for order in ORDERS)
DISTINCT_KEYS = ("distinct1", "distinct2")


def sentence_bleu(prediction: str, reference: str, tokens: TokenKind) -> dict[str, float]:
    """BLEU of one reply in [0, 1], by ``BLEU_KEYS``; an empty one scores 0."""
    texts = _prepared([prediction, reference], tokens)
    scores = [_bleu(order, tokens, True).sentence_score(texts[0], [texts[1]]).score for order in ORDERS]
    return {key: score / 100 for key, score in zip(BLEU_KEYS, scores, strict=True)}


def corpus_bleu(predictions: Sequence[str], references: Sequence[str], tokens: TokenKind) -> dict[str, float]:
    """BLEU in [0, 1] of all replies together, by ``CORPUS_BLEU_KEYS``."""
    texts, wanted = _prepared(predictions, tokens), _prepared(references, tokens)
    scores = [_bleu(order, tokens, False).corpus_score(texts, [wanted]).score for order in ORDERS]
    return {key: score / 100 for key, score in zip(CORPUS_BLEU_KEYS, scores, strict=True)}


def distinct(predictions: Sequence[str], tokens: TokenKind) -> dict[str, float]:
    """Distinct n-grams over all n-grams, of all replies together (Li et al. 2016), by ``DISTINCT_KEYS``.

    It falls with the number of tokens: compare only replies to the same windows. 0 if there are no n-grams.
    """
    replies = [tokenise(text, checked(tokens)) for text in predictions]
    return {key: _share_of_distinct(replies, n) for n, key in enumerate(DISTINCT_KEYS, start=1)}


def _share_of_distinct(replies: Sequence[Sequence[str]], n: int) -> float:
    ngrams = [tuple(words[at : at + n]) for words in replies for at in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _prepared(texts: Sequence[str], tokens: TokenKind) -> list[str]:
    """Texts for sacrebleu, which has no jieba: its words are separated by spaces here."""
    return [" ".join(tokenise(text, tokens)) if tokens == "jieba" else composed(text) for text in texts]


@cache
def _bleu(order: int, tokens: TokenKind, one_reply: bool) -> BLEU:
    tokenizer = {"word": "13a", "unicode": "intl", "character": "char", "jieba": "none"}[checked(tokens)]
    return BLEU(max_ngram_order=order, tokenize=tokenizer, smooth_method="exp", effective_order=one_reply)
