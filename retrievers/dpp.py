"""A determinantal point process: sets of rows that are near to the query and span a large volume.

P(S) ∝ det L_S,  L_ij = q_i s_ij q_j,  s_ij = (1 + cos(i, j)) / 2,  q_i² = exp(r_i / λ),  r_i = (1 + cos(i, query)) / 2

- The kernel is that of CEIL (Ye et al. 2023) with an encoder as it is, λ = 0.1: log det L_S is the relevance of the
  rows, summed and divided by λ, plus the log-volume of what they say.
- The likeliest set is approached greedily: the row whose addition raises log det L_S most comes next. With the
  Cholesky factor grown row by row this costs rows x k² (Chen et al. 2018), without any determinant.
- Qualities only add to the logarithm, so the factor is that of s, and no exponential can overflow.
- A row that the rows taken span already would have the gain −∞. It counts as if a millionth of it were new: such
  rows come last, in the order of their cosine.
"""

import math
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.reranking import Reranked
from retrievers.retriever import Resources

_TRADE_OFF = 0.1
_LEAST = 1e-6


def greedy_map(
    relevance: Float32[np.ndarray, "queries rows"], vectors: Float32[np.ndarray, "queries rows width"], k: int
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Places of the `k` rows taken one by one, and what each added to log det L_S.

    Args:
        relevance: cosine of each row to the query.
        vectors: of the rows, each of length 1.

    >>> vectors = np.array([[[1, 0], [1, 0], [0, 1]]], dtype=np.float32)
    >>> places, scores = greedy_map(np.array([[0.75, 0.75, 0.5]], dtype=np.float32), vectors, 3)
    >>> places.tolist(), scores.round(2).tolist()
    ([[0, 2, 1]], [[8.75, 7.210000038146973, -5.070000171661377]])
    """
    everyone = np.arange(len(relevance))
    places = np.empty((len(relevance), k), dtype=np.int64)
    scores = np.empty((len(relevance), k), dtype=np.float32)
    left = np.ones(relevance.shape, dtype=bool)
    quality = (1 + relevance.astype(np.float64)) / (2 * _TRADE_OFF)
    points = vectors.astype(np.float64)
    factor = np.zeros((*relevance.shape, k))  # row i of a query: row i of the Cholesky factor of s
    new = (1 + np.vecdot(points, points)) / 2  # what is left of s_ii beside the rows taken
    for step in range(k):
        gain = np.where(left, quality + np.log(np.maximum(new, _LEAST)), -np.inf)
        best = gain.argmax(axis=1)
        places[:, step], scores[:, step] = best, gain[everyone, best]
        left[everyone, best] = False
        pivot = new[everyone, best]
        similarity = (1 + np.vecdot(points, points[everyone, best][:, None])) / 2
        explained = np.vecdot(factor[:, :, :step], factor[everyone, best, :step][:, None])
        # A row that is spanned already explains nothing more.
        scale = np.where(pivot > _LEAST, 1 / np.sqrt(np.maximum(pivot, _LEAST)), 0)
        factor[:, :, step] = (similarity - explained) * scale[:, None]
        new = new - factor[:, :, step] ** 2
    return places, scores


def _repeated(relevance: Float32[np.ndarray, "queries rows"]) -> Float32[np.ndarray, "queries rows"]:
    scores: Float32[np.ndarray, "queries rows"] = (1 + relevance) / (2 * _TRADE_OFF) + math.log(_LEAST)
    return scores


class DPP(Reranked):
    """Rows by what each adds to the log-determinant of those before."""

    score_meaning: ClassVar[str] = "log-determinant gained: 5 (1 + cosine) + log of the share that is new"

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources, pick=greedy_map, repeated=_repeated)
