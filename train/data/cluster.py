"""Cluster ids of windows by what is asked: similar queries share a cluster, whoever asks."""

import logging
from collections.abc import Sequence

from sklearn.cluster import KMeans

from train.data.embed import fit_encoder
from train.errors import UserError

logger = logging.getLogger(__name__)


def cluster_queries(
    train: Sequence[str], dev: Sequence[str], num_clusters: int, *, seed: int = 0, encoder: str | None = None
) -> tuple[list[int], list[int]]:
    """Cluster ids of ``train`` and ``dev`` queries; everything is fitted on ``train`` alone.

    ``encoder`` makes the vectors, see :mod:`train.data.embed`. Fewer different queries than clusters reduce
    ``num_clusters`` with a logged warning.
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
