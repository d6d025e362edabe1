"""What a calibration does: label log-probabilities, and votes where it wants them, to probabilities.

All methods end in one form, whose numbers they choose differently (`methods.py`). With P the model's law of the label
words, v the law of the votes, over labels y of a query x:

    p(y | x) = softmax over y of  scale * log P(y | x) + offset(y)

and with votes of weight w, linearly or in logarithms

    (1 - w) p(y | x) + w v(y | x)      or      softmax over y of  scale * log P(y | x) + offset(y) + w log v(y | x)

- `none` is the model's law as it is, the mass of "other" included. Every other one leaves nothing to "other", unless it
  approximates a reference that does: "other" is then one more outcome of the softmax, with the same score everywhere,
  so that it gets most where no label stands out.
- Voters are rows of the pool near in meaning or, for kNN prompting, rows whose answer by the model is near ("anchors").
- A query's answer depends on no other query. Where nobody votes, p alone answers.
- Where an engine gives bounds on P, what comes out are bounds: p(y | x) rises with P(y | x) and falls with the others.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from icl_compiler.calibration.votes import Vote, Voters, law_of_votes

LEAST = -100.0
"""Log-probabilities count as no lower than this: an engine may say -inf."""

Pooling = Literal["linear", "log"]


class Evidence(NamedTuple):
    """What is known of each query.

    Attributes:
        logprobs: of the label words, in nats; lower bounds where `upper` is given.
        upper: upper bounds, of an engine that gives only its likeliest tokens.
        voters: for a calibration with votes; for one with anchors, these in their order, with any scores.
    """

    logprobs: Float[np.ndarray, "queries labels"]
    upper: Float[np.ndarray, "queries labels"] | None = None
    voters: Voters | None = None

    @property
    def middle(self) -> Float[np.ndarray, "queries labels"]:
        """Finite log-probabilities: of the middle of the bounds, where there are bounds."""
        known = self.logprobs.astype(np.float64)
        if self.upper is not None:
            known = np.logaddexp(known, np.maximum(self.upper, known)) - np.log(2)
        return np.maximum(known, LEAST)

    def take(self, queries: Int64[np.ndarray, " some"]) -> "Evidence":
        """That of some of the queries."""
        upper = None if self.upper is None else self.upper[queries]
        return Evidence(self.logprobs[queries], upper, None if self.voters is None else self.voters.take(queries))


class Law(NamedTuple):
    """Probabilities of the labels, the rest being "other"; lower bounds where `upper` is given."""

    probabilities: Float[np.ndarray, "queries labels"]
    upper: Float[np.ndarray, "queries labels"] | None = None


class Anchors(NamedTuple):
    """Rows of the pool with the model's answer to them."""

    rows: Int64[np.ndarray, " anchors"]
    logprobs: Float[np.ndarray, "anchors labels"]


class Measured(NamedTuple):
    """How much a calibration gained on held-out queries.

    Attributes:
        risk: what was measured, `log-loss` or `TV to the reference`.
        before: without calibration.
        after: with it, cross-validated.
    """

    queries: int
    risk: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """The numbers of the form above.

    Attributes:
        method: name in the table of calibrations.
        scale: one over the temperature.
        offsets: of each label; none is 0.
        vote: how voters are heard; `None` without votes.
        weight: of the votes, in [0, 1] if `pooling` is linear, else at least 0.
        anchors: the voters, if they are near by the model's answers instead of by meaning.
        other: score of "other" in the softmax; `None` leaves it nothing.

    >>> half = Evidence(np.log([[0.25, 0.25], [0.3, 0.1]]))
    >>> Calibration().law(half).probabilities.round(2).tolist()
    [[0.25, 0.25], [0.3, 0.1]]
    >>> Calibration("normalise").law(half).probabilities.round(2).tolist()
    [[0.5, 0.5], [0.75, 0.25]]
    """

    method: str = "none"
    scale: float = 1.0
    offsets: Float[np.ndarray, " labels"] | None = None
    vote: Vote | None = None
    pooling: Pooling = "linear"
    weight: float = 0.0
    anchors: Anchors | None = None
    measured: Measured | None = None
    other: float | None = None

    @property
    def neighbours(self) -> int:
        """How many rows near in meaning vote; 0 where none do."""
        return self.vote.k if self.vote is not None and self.anchors is None else 0

    def moved(self, places: Int64[np.ndarray, " rows"]) -> "Calibration":
        """For a pool in which row i stands at `places[i]`, or nowhere (-1)."""
        if self.anchors is None:
            return self
        new = places[self.anchors.rows]
        return replace(self, anchors=Anchors(new[new >= 0], self.anchors.logprobs[new >= 0]))

    def law(self, evidence: Evidence) -> Law:
        """The probabilities of the labels of each query.

        Raises:
            ValueError: if there are votes to count, and no voters.
        """
        if self.method == "none":
            upper = None if evidence.upper is None else np.minimum(np.exp(evidence.upper), 1.0)
            return Law(np.exp(evidence.logprobs), upper)
        votes = self._votes(evidence)
        if evidence.upper is None:
            return Law(self.combined(evidence.middle, votes))
        highest = np.maximum(evidence.upper, evidence.logprobs)
        lowest = self._with_other(self.scores(evidence.logprobs, votes))
        least, most = _bounds(lowest, self._with_other(self.scores(highest, votes)))
        labels = highest.shape[1]
        least, most = least[:, :labels], most[:, :labels]
        if self.anchors is None:
            return Law(self._pooled(least, votes), self._pooled(most, votes))
        return Law((1 - self.weight) * least, (1 - self.weight) * most + self.weight)  # which anchors are near is open

    def combined(
        self, logprobs: Float[np.ndarray, "queries labels"], votes: Float[np.ndarray, "queries labels"] | None
    ) -> Float[np.ndarray, "queries labels"]:
        """The probabilities of finite log-probabilities and the law of the votes."""
        law = softmax(self._with_other(self.scores(logprobs, votes)))
        return self._pooled(law[:, : logprobs.shape[1]], votes)

    def describe(self) -> str:
        """The numbers in words."""
        parts = [] if self.scale == 1 else [f"temperature {1 / self.scale:.2f}" if self.scale else "model not used"]
        if self.offsets is not None:
            parts.append("an offset for each label")
        if self.other is not None:
            parts.append("a share for what is no label")
        if self.vote is not None:
            by = "answers of the model" if self.anchors is not None else "meaning"
            how = f"weighted by exp({self.vote.sharpness:g} cosine)" if self.vote.sharpness else "counted"
            parts.append(f"votes of {self.vote.k} neighbours by {by}, {how}, of weight {self.weight:.2f}")
        told = f"{self.method} ({'; '.join(parts)})" if parts else self.method
        if self.measured is not None:
            queries, risk, before, after = self.measured
            told += f": {risk} {after:.3f} in place of {before:.3f} on {queries} held-out queries"
        return told

    def scores(
        self, logprobs: Float[np.ndarray, "queries labels"], votes: Float[np.ndarray, "queries labels"] | None
    ) -> Float[np.ndarray, "queries labels"]:
        """What the softmax is of, for each label."""
        scores = self.scale * logprobs if self.scale else np.zeros_like(logprobs)
        if self.offsets is not None:
            scores = scores + self.offsets
        if votes is not None and self.pooling == "log":
            scores = scores + self.weight * np.log(np.where(_nobody(votes), 1.0, np.maximum(votes, np.exp(LEAST))))
        return scores

    def _with_other(self, scores: Float[np.ndarray, "queries labels"]) -> Float[np.ndarray, "queries outcomes"]:
        return scores if self.other is None else np.pad(scores, ((0, 0), (0, 1)), constant_values=self.other)

    def _pooled(
        self, law: Float[np.ndarray, "queries labels"], votes: Float[np.ndarray, "queries labels"] | None
    ) -> Float[np.ndarray, "queries labels"]:
        if votes is None or self.pooling == "log":
            return law
        weight = np.where(_nobody(votes), 0.0, self.weight)
        pooled: Float[np.ndarray, "queries labels"] = (1 - weight) * law + weight * votes
        return pooled

    def _votes(self, evidence: Evidence) -> Float[np.ndarray, "queries labels"] | None:
        if self.vote is None:
            return None
        if evidence.voters is None:
            raise ValueError(f"the calibration {self.method!r} counts votes, and the evidence has no voters")
        voters = evidence.voters
        if self.anchors is not None:
            voters = nearest_answers(evidence.middle, self.anchors.logprobs, voters.labels)
        return law_of_votes(voters, self.vote, evidence.logprobs.shape[1])


NO_CALIBRATION = Calibration()
"""The model's law as it is."""


def softmax(scores: Float[np.ndarray, "queries labels"]) -> Float[np.ndarray, "queries labels"]:
    """exp(scores), each row divided by its sum."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    law: Float[np.ndarray, "queries labels"] = powers / powers.sum(axis=1, keepdims=True)
    return law


def nearest_answers(
    logprobs: Float[np.ndarray, "queries labels"],
    anchors: Float[np.ndarray, "anchors labels"],
    labels: Int64[np.ndarray, "queries anchors"],
) -> Voters:
    """The anchors by - KL(query || anchor) of the laws over the labels, nearest first.

    Source: Xu et al. 2023 (arXiv 2303.13824), there over the whole vocabulary.
    """
    law = softmax(logprobs)
    of_anchors = np.log(softmax(np.maximum(anchors, LEAST)) + 1e-12)
    divergence = (law * np.log(law + 1e-12)).sum(axis=1, keepdims=True) - law @ of_anchors.T
    order = np.argsort(divergence, axis=1, kind="stable")
    return Voters(np.take_along_axis(labels, order, axis=1), -np.take_along_axis(divergence, order, axis=1))


def _nobody(votes: Float[np.ndarray, "queries labels"]) -> Bool[np.ndarray, "queries 1"]:
    silent: Bool[np.ndarray, "queries 1"] = votes.sum(axis=1, keepdims=True) <= 0
    return silent


def _bounds(
    low: Float[np.ndarray, "queries labels"], high: Float[np.ndarray, "queries labels"]
) -> tuple[Float[np.ndarray, "queries labels"], Float[np.ndarray, "queries labels"]]:
    """The least and the largest softmax of each entry, for scores between these bounds."""
    top = np.maximum(high.max(axis=1, keepdims=True), LEAST)
    least, most = np.exp(low - top), np.exp(high - top)

    def share(
        own: Float[np.ndarray, "queries labels"], all_of: Float[np.ndarray, "queries labels"]
    ) -> Float[np.ndarray, "queries labels"]:
        others = np.maximum(all_of.sum(axis=1, keepdims=True) - all_of, 0.0)
        total = own + others
        return np.where(own > 0, own / np.where(total > 0, total, 1.0), 0.0)

    return share(least, most), np.minimum(share(most, least), 1.0)
