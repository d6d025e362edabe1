"""Maximal marginal relevance (Carbonell & Goldstein 1998): near to the query, and unlike the rows before.

MMR = argmax over the rows left of  λ cos(row, query) − (1 − λ) max over the rows taken of cos(row, taken),  λ = 1/2

- Of the rows in the list of `reranking`, a block of queries in one array.
- The second term is 0 for the first row, and never below 0: a row that is the opposite of those taken is no newer
  than one that has nothing to do with them. So scores fall.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.reranking import Reranked
from retrievers.retriever import Resources

_RELEVANCE = 0.5


def marginal_relevance(
    relevance: Float32[np.ndarray, "queries rows"], vectors: Float32[np.ndarray, "queries rows width"], k: int
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Places of the `k` rows taken one by one, and the marginal relevance of each when it was taken.

    Args:
        relevance: cosine of each row to the query.
        vectors: of the rows, each of length 1.

    >>> vectors = np.array([[[1, 0], [1, 0], [0, 1]]], dtype=np.float32)
    >>> places, scores = marginal_relevance(np.array([[0.75, 0.75, 0.5]], dtype=np.float32), vectors, 3)
    >>> places.tolist(), scores.tolist()
    ([[0, 2, 1]], [[0.375, 0.25, -0.125]])
    """
    everyone = np.arange(len(relevance))
    places = np.empty((len(relevance), k), dtype=np.int64)
    scores = np.empty((len(relevance), k), dtype=np.float32)
    left = np.ones(relevance.shape, dtype=bool)
    redundancy = np.zeros_like(relevance)
    for step in range(k):
        value = np.where(left, _RELEVANCE * relevance - (1 - _RELEVANCE) * redundancy, -np.inf)
        best = value.argmax(axis=1)
        places[:, step], scores[:, step] = best, value[everyone, best]
        left[everyone, best] = False
        similarity = np.vecdot(vectors, vectors[everyone, best][:, None])
        redundancy = np.maximum(redundancy, np.minimum(similarity, 1))
    return places, scores


def _repeated(relevance: Float32[np.ndarray, "queries rows"]) -> Float32[np.ndarray, "queries rows"]:
    return _RELEVANCE * relevance - (1 - _RELEVANCE)


class MMR(Reranked):
    """Rows by their cosine to the query, less their cosine to the most similar row before them."""

    score_meaning: ClassVar[str] = "half the cosine similarity, less half the highest one to a row ranked before"

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources, pick=marginal_relevance, repeated=_repeated)
