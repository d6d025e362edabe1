"""The vote of the neighbours: which labels the rows nearest to a query have.

- A voter is a row of the pool with a score; how it is heard is a `Vote`: so many voters, equally or by their scores.
- A row that is the query itself, and a place without a row, have the label -1 and no vote.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from retrievers.retriever import Hits


class Voters(NamedTuple):
    """Rows that may vote on each query, nearest first.

    Attributes:
        labels: number of the label of each; -1 where there is none.
        scores: how near it is, for instance a cosine; higher is nearer.
    """

    labels: Int64[np.ndarray, "queries voters"]
    scores: Float[np.ndarray, "queries voters"]

    @staticmethod
    def joined(parts: "Sequence[Voters]") -> "Voters":
        """Those of all queries, of which `parts` have some each."""
        return Voters(np.concatenate([part.labels for part in parts]), np.concatenate([part.scores for part in parts]))

    def take(self, queries: Int64[np.ndarray, " some"]) -> "Voters":
        """Those of some of the queries."""
        return Voters(self.labels[queries], self.scores[queries])


class Vote(NamedTuple):
    """How voters are heard.

    Attributes:
        k: how many, the nearest.
        sharpness: a vote weighs exp(sharpness * score); 0 counts all alike.
        smoothing: share of the law that is spread evenly over all labels, in [0, 1].
    """

    k: int
    sharpness: float = 0.0
    smoothing: float = 0.0


def voters_of(hits: Hits, answers: Int64[np.ndarray, " rows"], is_query: Bool[np.ndarray, "queries voters"]) -> Voters:
    """The labels of the rows that a retriever found, without those that are the query.

    >>> hits = Hits(np.array([[2, 0]]), np.array([[0.75, 0.5]], dtype=np.float32))
    >>> voters_of(hits, np.array([1, 1, 0]), np.array([[False, True]])).labels.tolist()
    [[0, -1]]
    """
    return Voters(np.where(is_query, -1, answers[hits.ids]), hits.scores)


def law_of_votes(voters: Voters, vote: Vote, labels: int) -> Float[np.ndarray, "queries labels"]:
    """The share of each label among the votes; a row of zeros where nobody votes.

    >>> voters = Voters(np.array([[0, 1, -1, 1]]), np.array([[0.9, 0.8, 0.8, 0.7]]))
    >>> law_of_votes(voters, Vote(2), 3).tolist(), law_of_votes(voters, Vote(3, smoothing=0.3), 3).round(2).tolist()
    ([[0.5, 0.5, 0.0]], [[0.33, 0.57, 0.1]])
    """
    queries = len(voters.labels)
    law = np.zeros((queries, labels))
    if not voters.labels.shape[1]:
        return law
    votes = voters.labels >= 0
    votes &= np.cumsum(votes, axis=1) <= vote.k
    scores = vote.sharpness * np.where(votes, voters.scores, 0.0).astype(np.float64)
    nearest = np.max(scores, axis=1, keepdims=True, where=votes, initial=-np.inf)
    weights = np.exp(np.where(votes, scores, -np.inf) - np.where(votes.any(axis=1, keepdims=True), nearest, 0.0))
    places = np.arange(queries)[:, None] * labels + np.maximum(voters.labels, 0)
    law += np.bincount(places.ravel(), weights.ravel(), queries * labels).reshape(law.shape)
    total = law.sum(axis=1, keepdims=True)
    return smoothed(law / np.where(total > 0, total, 1.0), vote.smoothing)


def smoothed(law: Float[np.ndarray, "queries labels"], share: float) -> Float[np.ndarray, "queries labels"]:
    """A `share` of each row spread evenly; rows of zeros stay as they are.

    >>> smoothed(np.array([[1.0, 0.0], [0.0, 0.0]]), 0.5).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return np.where(law.any(axis=1, keepdims=True), (1 - share) * law + share / law.shape[1], 0.0)
