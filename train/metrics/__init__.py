"""Scores of held-out replies: NLL, ROUGE, BLEU, chrF, distinct-n; per method and querier, over several seeds.

There is one record per window (``records``); ``summary`` aggregates them, ``seeds`` over several runs.
Intervals and p-values resample whole dialogues (``bootstrap``).
"""

from train.metrics.bleu import BLEU_KEYS, corpus_bleu, distinct, sentence_bleu
from train.metrics.bootstrap import bootstrap_ci, nll_summary, paired_bootstrap, paired_nll
from train.metrics.chrf import chrf
from train.metrics.records import SCORE_KEYS, Record, rescore, score_reply, unscored, with_all_scores
from train.metrics.rouge import ROUGE_KEYS, rouge
from train.metrics.seeds import compare_seeds, pool, summarise_seeds
from train.metrics.summary import CORPUS_KEYS, compare, summarise, swap_summary
from train.metrics.text import TokenKind, tokens_for

__all__ = [
    "BLEU_KEYS",
    "CORPUS_KEYS",
    "ROUGE_KEYS",
    "SCORE_KEYS",
    "Record",
    "TokenKind",
    "bootstrap_ci",
    "chrf",
    "compare",
    "compare_seeds",
    "corpus_bleu",
    "distinct",
    "nll_summary",
    "paired_bootstrap",
    "paired_nll",
    "pool",
    "rescore",
    "rouge",
    "score_reply",
    "sentence_bleu",
    "summarise",
    "summarise_seeds",
    "swap_summary",
    "tokens_for",
    "unscored",
    "with_all_scores",
]
