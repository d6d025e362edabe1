"""Held-out queries: rows of a program's own pool, each asked without itself, so that no row is lost to calibration.

- A program leaves out the rows with the query's own text, in the prompt and among the voters; its pool then differs
  from the one that new queries meet by a row.
- Validation data may stand in their place: where labels come as often as in use, and not as in the pool.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int64

from icl_compiler.backends.backend import Usage
from icl_compiler.calibration.law import Evidence, Law

LEAST_PROBABILITY = 1e-9
"""Log-loss counts no probability as smaller than this."""

_NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Queries with their right labels, and what the model and the other rows say of them.

    Attributes:
        rows: of the pool, or of the validation data, each once.
        labels: number of the right label of each.
        evidence: log-probabilities, and the votes of the other rows where they were asked for.
        priors: laws of the labels without a query, each a row that sums to 1, by the method that wants them.
        reference: probabilities of the labels by a reference, which are approximated then in place of the right labels.
        usage: what the answers cost.
        of_pool: whether the rows are the pool's.
    """

    rows: Int64[np.ndarray, " queries"]
    labels: Int64[np.ndarray, " queries"]
    evidence: Evidence
    priors: Mapping[str, Float[np.ndarray, " labels"]] = field(default_factory=dict)
    reference: Float[np.ndarray, "queries labels"] | None = None
    usage: Usage = _NOTHING
    of_pool: bool = True

    @property
    def targets(self) -> Float[np.ndarray, "queries labels"]:
        """The law to approximate: the reference's, or 1 for the right label."""
        if self.reference is not None:
            return self.reference
        targets: Float[np.ndarray, "queries labels"] = np.eye(self.evidence.logprobs.shape[1])[self.labels]
        return targets

    @property
    def risk(self) -> str:
        """What `risks` measures, in words."""
        return "log-loss" if self.reference is None else "TV to the reference"

    def risks(self, law: Law) -> Float[np.ndarray, " queries"]:
        """The log-loss of each query in nats, or its total variation to the reference, "other" included, in [0, 1].

        Of bounds, that of the middle between them.
        """
        said = law.probabilities if law.upper is None else (law.probabilities + law.upper) / 2
        if self.reference is None:
            return log_loss(said, self.targets)
        other = np.abs(said.sum(axis=1) - self.reference.sum(axis=1))
        distance: Float[np.ndarray, " queries"] = (np.abs(said - self.reference).sum(axis=1) + other) / 2
        return distance

    def take(self, queries: Int64[np.ndarray, " some"]) -> "HeldOut":
        """Some of the queries."""
        reference = None if self.reference is None else self.reference[queries]
        evidence = self.evidence.take(queries)
        rows, labels = self.rows[queries], self.labels[queries]
        return replace(self, rows=rows, labels=labels, evidence=evidence, reference=reference)


def log_loss(
    law: Float[np.ndarray, "queries labels"], targets: Float[np.ndarray, "queries labels"]
) -> Float[np.ndarray, " queries"]:
    """- sum of target times log probability, in nats.

    >>> log_loss(np.array([[0.5, 0.25]]), np.array([[0.0, 1.0]])).round(3)
    array([1.386])
    """
    loss: Float[np.ndarray, " queries"] = -(targets * np.log(np.maximum(law, LEAST_PROBABILITY))).sum(axis=1)
    return loss
