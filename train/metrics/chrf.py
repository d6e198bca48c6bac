"""chrF2 by sacrebleu: the F-score, with recall weighed twice, of character n-grams of the orders 1 to 6.

White space does not count, case does. Only those orders count of which both texts have n-grams.
"""

from __future__ import annotations

from sacrebleu.metrics import CHRF

from train.metrics.text import composed

CHRF_KEY = "chrf"
_CHRF = CHRF()


def chrf(prediction: str, reference: str) -> float:
    """chrF2 of one reply in [0, 1]; an empty one scores 0. It needs no words, so none have to be found."""
    return _CHRF.sentence_score(composed(prediction), [composed(reference)]).score / 100
