"""One record per held-out window: a method's reply there, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from train.metrics.bleu import BLEU_KEYS, sentence_bleu
from train.metrics.chrf import CHRF_KEY, chrf
from train.metrics.rouge import ROUGE_KEYS, Compat, rouge
from train.metrics.text import TokenKind, checked, tokens_for

SCORE_KEYS = (*ROUGE_KEYS, *BLEU_KEYS, CHRF_KEY)
"""Scores of a single reply; a method's score is their mean over replies."""


class Record(TypedDict):
    """One held-out example: NLL in nats, summed over the reply; scores are None if no reply was asked for.

    ``failed``: a reply was to be generated and never came; ``empty``: it has no text. Both score 0.
    """

    id: str
    dialogue: str
    querier: str
    nll_sum: float
    tokens: int
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    bleu1: NotRequired[float | None]
    bleu2: NotRequired[float | None]
    bleu3: NotRequired[float | None]
    bleu4: NotRequired[float | None]
    chrf: NotRequired[float | None]
    empty: bool
    failed: NotRequired[bool]
    reply: NotRequired[str | None]
    reference: NotRequired[str]


def score_reply(
    reply: str | None, reference: str, tokens: TokenKind | None = None, compat: Compat | None = None
) -> dict[str, Any]:
    """The fields of a record that depend on the generated ``reply``; None is a failed generation.

    See :func:`train.metrics.rouge.rouge` for ``tokens`` and ``compat``, which affects ROUGE only.
    """
    tokens = tokens_for([reference]) if tokens is None else checked(tokens)
    text = reply or ""
    scores = {**rouge(text, reference, tokens, compat), **sentence_bleu(text, reference, tokens)}
    scores[CHRF_KEY] = chrf(text, reference)
    empty = reply is not None and not reply.strip()
    return {**scores, "reply": reply, "reference": reference, "empty": empty, "failed": reply is None}


def unscored(reference: str) -> dict[str, Any]:
    """The same fields for a window that was not to be answered."""
    nothing = dict.fromkeys((*SCORE_KEYS, "reply"))
    return {**nothing, "reference": reference, "empty": False, "failed": False}


def rescore(
    records: Sequence[Record], tokens: TokenKind | None = None, compat: Compat | None = None
) -> list[Record]:
    """Score the same replies with other ``tokens`` or as another package counts; other fields stay.

    With None, all references together choose ``tokens``. Raises ``ValueError`` if a record lacks its
    reference.
    """
    missing = [record["id"] for record in records if "reference" not in record]
    if missing:
        raise ValueError(
            f"records without their 'reference' cannot be scored again: {', '.join(missing[:3])}"
        )
    tokens = tokens or tokens_for(record["reference"] for record in records)
    return [
        {**record, **score_reply(record["reply"], record["reference"], tokens, compat)}
        if record["rougeL"] is not None
        else record
        for record in records
    ]


def with_all_scores(records: Sequence[Record]) -> list[Record]:
    """``records`` with the scores that they lack, of metrics added since they were written; others stay.

    Records without their texts are returned as they are.
    """
    generated = [record for record in records if record["rougeL"] is not None]
    is_complete = all(key in record for record in generated for key in SCORE_KEYS)
    if is_complete or any("reference" not in record for record in records):
        return list(records)
    return [{**scored, **record} for scored, record in zip(rescore(records), records, strict=True)]
