"""Which calibration: every candidate is fitted, and compared by its risk on queries that it was not fitted to.

- The risk is the log-loss of the right labels; where a reference was asked, the total variation to its law.
- Five folds: what a candidate says of a query is fitted without this query. Of a candidate's variants that with the
  lowest risk counts.
- The candidate with the lowest risk is chosen. Taking a simpler one within a standard error (Breiman et al. 1984) has
  cost risk on new queries with 25, 50 and 100 held-out ones (`docs/calibration.md`), and a query costs no less then.
- Intervals are normal ones for one candidate at a time: they compare, they promise nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from icl_compiler.backends.backend import Usage
from icl_compiler.calibration.held_out import HeldOut
from icl_compiler.calibration.law import Calibration, Evidence, Measured
from icl_compiler.calibration.votes import Voters
from icl_compiler.errors import CalibrationError
from icl_compiler.registry import CALIBRATIONS, resolve

LEAST_QUERIES = 10
"""Fewer held-out queries say nothing."""
_FOLDS = 5
_ROUNDING = 1e-9  # of two that are the same, the simpler one: the table of calibrations is in that order
_NORMAL_95 = 1.96


class Candidate(NamedTuple):
    """A calibration and its cross-validated risk.

    Attributes:
        calibration: fitted to all queries.
        risk: mean, with the ends of its 95 % interval.
        saved: mean by which the risk is lower than without calibration, with the ends of its 95 % interval.
        accuracy: share of the queries whose likeliest label is right, in [0, 1].
    """

    calibration: Calibration
    risk: float
    risk_low: float
    risk_high: float
    saved: float
    saved_low: float
    saved_high: float
    accuracy: float

    @property
    def name(self) -> str:
        """Of the method."""
        return self.calibration.method


class Choice(NamedTuple):
    """What was chosen, why, from what, and what the answers cost that it rests on."""

    calibration: Calibration
    why: str
    candidates: tuple[Candidate, ...]
    queries: int
    risk: str
    usage: Usage

    def forced(self, name: str) -> "Choice":
        """The candidate `name` instead, whatever its risk.

        Raises:
            CalibrationError: if it is none of the candidates.
        """
        for candidate in self.candidates:
            if candidate.name == name:
                return self._replace(calibration=candidate.calibration, why=f"{name} was asked for")
        raise CalibrationError(f"the calibration {name!r} could not be fitted: the held-out queries lack what it needs")


def fit_and_choose(held_out: HeldOut, candidates: Sequence[str] | None = None) -> Choice:
    """Fit the `candidates` (default: all whose needs it meets) and choose by cross-validated risk.

    `none` always stands among them. Pure, and the same for the same held-out queries.

    Raises:
        CalibrationError: if there are fewer than 10 queries.
        RegistryError: if a candidate stands in no table.
    """
    queries = len(held_out.rows)
    if queries < LEAST_QUERIES:
        raise CalibrationError(
            f"{queries} held-out queries are too few to calibrate with, expected {LEAST_QUERIES} or more; "
            "take more rows, or leave the calibration out"
        )
    names = CALIBRATIONS if candidates is None else dict.fromkeys(["none", *candidates])
    order = [*(name for name in CALIBRATIONS if name in names), *(name for name in names if name not in CALIBRATIONS)]
    found: list[Candidate] = []
    plain: Float[np.ndarray, " queries"] | None = None  # the risks of `none`, which is the first
    for name in order:
        validated = cross_validated(held_out, name)
        if validated is None:
            continue
        fitted, own, right = validated
        plain = own if plain is None else plain
        risk, saved = _with_interval(own), _with_interval(plain - own)
        measured = Measured(queries, held_out.risk, float(plain.mean()), risk[0])
        calibration = fitted if name == "none" else replace(fitted, measured=measured)
        found.append(Candidate(calibration, *risk, *saved, float(right.mean())))
    lowest = min(candidate.risk for candidate in found)
    chosen = next(candidate for candidate in found if candidate.risk <= lowest + _ROUNDING)
    why = f"{chosen.name} has the lowest risk"
    return Choice(chosen.calibration, why, tuple(found), queries, held_out.risk, held_out.usage)


class CrossValidated(NamedTuple):
    """A calibration, fitted to all queries; the risks, and whether it is right, are of fits without the query."""

    calibration: Calibration
    risks: Float[np.ndarray, " queries"]
    right: Bool[np.ndarray, " queries"]


def cross_validated(held_out: HeldOut, name: str) -> CrossValidated | None:
    """The calibration `name` on held-out queries, in five folds; `None` if they lack what it needs."""
    queries = len(held_out.rows)
    method = resolve("calibration", CALIBRATIONS, name)
    fitted: list[Calibration] = method(held_out)
    if not fitted:
        return None
    fold = np.random.default_rng(0).permutation(queries) % _FOLDS
    said = np.empty((len(fitted), queries))
    right = np.empty((len(fitted), queries), dtype=bool)
    for number in range(min(_FOLDS, queries)):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        for variant, calibration in enumerate(method(held_out.take(train))):
            asked = held_out.take(test)
            law = calibration.law(evidence_for(calibration, asked, held_out))
            said[variant, test] = asked.risks(law)
            right[variant, test] = law.probabilities.argmax(axis=1) == asked.labels
    best = int(said.mean(axis=1).argmin())
    return CrossValidated(fitted[best], said[best], right[best])


def evidence_for(calibration: Calibration, asked: HeldOut, everyone: HeldOut) -> Evidence:
    """The evidence of some of the queries, with the anchors, which are among `everyone`, as voters if it has some."""
    if calibration.anchors is None:
        return asked.evidence
    label_of = dict(zip(everyone.rows.tolist(), everyone.labels.tolist(), strict=True))
    rows = calibration.anchors.rows
    labels = np.array([label_of[row] for row in rows.tolist()], dtype=np.int64)
    voters = np.where(asked.rows[:, None] == rows[None, :], -1, labels[None, :])
    return asked.evidence._replace(voters=Voters(voters, np.zeros(voters.shape)))


def _with_interval(values: Float[np.ndarray, " queries"]) -> tuple[float, float, float]:
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - _NORMAL_95 * error, mean + _NORMAL_95 * error
