"""Cluster ids of windows by what is asked: similar queries share a cluster, whoever asks."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from train.errors import UserError

logger = logging.getLogger(__name__)

COMPONENTS = 64


def cluster_queries(
    train: Sequence[str], dev: Sequence[str], num_clusters: int, *, seed: int = 0, encoder: str | None = None
) -> tuple[list[int], list[int]]:
    """Cluster ids of ``train`` and ``dev`` queries; everything is fitted on ``train`` alone.

    ``encoder`` is the path of a sentence-transformers model; without it a query is its TF-IDF vector (of
    letter groups, which suits languages without spaces too) reduced by a truncated SVD. Fewer different
    queries than clusters reduce ``num_clusters`` with a logged warning.
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
    train_vectors, dev_vectors = _embed(train, dev, seed, encoder)
    kmeans = KMeans(num_clusters, n_init=10, random_state=seed).fit(train_vectors)
    dev_ids = kmeans.predict(dev_vectors).tolist() if dev else []
    return kmeans.labels_.tolist(), dev_ids


def _embed(
    train: Sequence[str], dev: Sequence[str], seed: int, encoder: str | None
) -> tuple[np.ndarray, np.ndarray]:
    if encoder is not None:
        model = _sentence_transformer(encoder)
        return tuple(model.encode(list(texts), normalize_embeddings=True) for texts in (train, dev))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    rank = min(COMPONENTS, len(vectorizer.fit(train).vocabulary_) - 1)
    if rank < 1:
        raise UserError("the training queries hold no text to cluster by")
    pipeline = make_pipeline(vectorizer, TruncatedSVD(rank, random_state=seed), Normalizer())
    train_vectors = pipeline.fit_transform(train)
    return train_vectors, pipeline.transform(dev) if dev else np.empty((0, rank))


def _sentence_transformer(path: str) -> object:
    if find_spec("sentence_transformers") is None:
        raise UserError(f"clustering with '{path}' needs the package sentence-transformers")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path)
