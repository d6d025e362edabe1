"""A learned order of the candidates for shots: first those behind which the frozen model is likely to be right.

The model itself was asked, on held-out rows, how likely the right answer is behind one candidate alone, and a linear
model of cheap features of (query, candidate) predicts that (`optimise/shot_utility.py` learns it).

- Source: EPR, Rubin, Herzig and Berant 2022 (arXiv 2112.08633), which trains a dense retriever on such scores, and UDR,
  Li et al. 2023 (arXiv 2305.04320), one for many tasks. Here seven numbers are learned in place of 110 million: some
  hundred answers of the model are enough for them, a user can read them, and no pickle stands in a program.
- Only differences between the candidates of one query count, so that there is no intercept.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

FEATURES = ("score", "log_rank", "cosine", "bm25", "label_share", "log_tokens", "helpful")
"""Of a candidate: the retriever's score and the logarithm of its rank; cosine and BM25 score with the query; which
share of the candidates has its label; the logarithm of its tokens; how much better than others it was for others.
"""


@dataclass(frozen=True, eq=False)
class Reranker:
    """The numbers of a linear model.

    Attributes:
        candidates: how many of the retriever's are put into a new order.
        weights: of the `FEATURES`, in nats of the right answer's log-probability.
        helpful: of each row of the pool, how many nats more it gave than other candidates, shrunk towards 0; rows that
            were added later have 0.
    """

    candidates: int
    weights: Float[np.ndarray, " features"]
    helpful: Float[np.ndarray, " rows"]

    def order(
        self,
        rows: Int64[np.ndarray, "queries candidates"],
        seen: Float[np.ndarray, "queries candidates seen"],
        itself: Bool[np.ndarray, "queries candidates"],
    ) -> Int64[np.ndarray, "queries candidates"]:
        """The places of the candidates, the most useful first; those behind the first `candidates` stay behind.

        Args:
            seen: all features but the last.
            itself: candidates that are the query, as a correction may be: they stay in front of all others.

        >>> ranker = Reranker(2, np.array([1.0, 0, 0, 0, 0, 0, 9.0]), np.array([0.0, 1.0, 5.0]))
        >>> ranker.order(np.array([[0, 1, 2]]), np.zeros((1, 3, 6)), np.zeros((1, 3), dtype=bool)).tolist()
        [[1, 0, 2]]
        """
        helpful = np.zeros(max(len(self.helpful), int(rows.max(initial=-1)) + 1))
        helpful[: len(self.helpful)] = self.helpful
        worth = seen @ self.weights[:-1] + helpful[rows] * self.weights[-1]
        worth[:, self.candidates :] = -np.inf
        worth[itself] = np.inf
        order: Int64[np.ndarray, "queries candidates"] = np.argsort(-worth, axis=1, kind="stable")
        return order

    def describe(self) -> str:
        """The numbers in words."""
        told = ", ".join(f"{name} {weight:+.3g}" for name, weight in zip(FEATURES, self.weights, strict=True) if weight)
        return f"the first {self.candidates} candidates by {told or 'nothing'}"

    def moved(self, places: Int64[np.ndarray, " rows"], rows: int) -> "Reranker":
        """For a pool of so many rows in which row i stands at `places[i]`, or nowhere (-1)."""
        helpful = np.zeros(rows)
        known = places[: len(self.helpful)]
        helpful[known[known >= 0]] = self.helpful[: len(known)][known >= 0]
        return replace(self, helpful=helpful)


def features(
    *,
    scores: Float32[np.ndarray, "queries candidates"],
    cosines: Float32[np.ndarray, "queries candidates"],
    word_scores: Float32[np.ndarray, "queries candidates"],
    labels: Int64[np.ndarray, "queries candidates"] | None,
    tokens: Int64[np.ndarray, "queries candidates"],
    barred: Bool[np.ndarray, "queries candidates"],
) -> Float[np.ndarray, "queries candidates seen"]:
    """The `FEATURES` but the last of candidates in the retriever's order; those `barred` have no say about labels.

    >>> ones = np.ones((1, 3), dtype=np.float32)
    >>> labels, free = np.array([[4, 4, 9]]), np.zeros((1, 3), dtype=bool)
    >>> seen = features(scores=ones, cosines=ones, word_scores=ones, labels=labels, tokens=labels, barred=free)
    >>> seen[0, :, 4].round(2).tolist()
    [0.67, 0.67, 0.33]
    """
    ranks = np.maximum(1, np.cumsum(~barred, axis=1))
    share = np.zeros(scores.shape)
    if labels is not None and labels.size:
        group = np.arange(len(labels))[:, None] * (int(labels.max()) + 1) + labels
        share = np.bincount(group[~barred], minlength=int(group.max()) + 1)[group] / np.maximum(
            1, (~barred).sum(axis=1, keepdims=True)
        )
    parts = (scores, np.log(ranks), cosines, word_scores, share, np.log(np.maximum(1, tokens)))
    return np.stack([part.astype(np.float64) for part in parts], axis=2)
