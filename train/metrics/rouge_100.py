"""ROUGE as the PyPI package ``rouge`` 1.0.0 counts it; the paper's scores come from that package.

Peculiarities that are kept:

- Sentences end at every full stop ("." only); words are what white space separates, case and punctuation
  included. A stretch of white space between two full stops is a sentence of one empty word, which can match.
- ROUGE-1 and ROUGE-2 count repetitions (version 1.0.1 does not); their n-grams span sentences.
- ROUGE-L is over whole texts: the distinct words in the longest common subsequence of any sentence of the
  reference and any of the prediction, over the distinct words of the prediction (P) or of the reference (R).
- F = 2PR / (P + R + 1e-8), so a perfect match is a little less than 1.

Not kept: a text without any sentence ("", "...") raises an error there but scores 0 here, as it did in the
paper's evaluation; sentences so long that the package exceeds Python's recursion limit are scored like any
other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SMALL = 1e-8


def f_measures(prediction: str, reference: str) -> tuple[float, float, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L of two texts whose words are separated by white space."""
    predicted, wanted = _sentences(prediction), _sentences(reference)
    if not predicted or not wanted:
        return 0.0, 0.0, 0.0
    return _rouge_n(predicted, wanted, 1), _rouge_n(predicted, wanted, 2), _rouge_l(predicted, wanted)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _f_measure(common: int, predicted: int, wanted: int) -> float:
    precision = common / predicted if predicted else 0.0
    recall = common / wanted if wanted else 0.0
    return 2 * precision * recall / (precision + recall + SMALL)


def _rouge_n(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], n: int) -> float:
    counts = [_ngrams([word for sentence in text for word in sentence], n) for text in (predicted, wanted)]
    return _f_measure((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _rouge_l(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    common = {word for ours in wanted for theirs in predicted for word in _common_subsequence(ours, theirs)}
    vocabularies = [{word for sentence in text for word in sentence} for text in (predicted, wanted)]
    return _f_measure(len(common), len(vocabularies[0]), len(vocabularies[1]))


def _common_subsequence(wanted: Sequence[str], predicted: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence; of several, the one that takes words late in ``wanted``."""
    lengths = [[0] * (len(predicted) + 1) for _ in range(len(wanted) + 1)]
    for i, word in enumerate(wanted):
        for j, other in enumerate(predicted):
            both = lengths[i][j] + 1
            lengths[i + 1][j + 1] = both if word == other else max(lengths[i][j + 1], lengths[i + 1][j])
    i, j, found = len(wanted), len(predicted), set()
    while i and j:
        if wanted[i - 1] == predicted[j - 1]:
            found.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
