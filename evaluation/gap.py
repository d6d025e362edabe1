"""The gap: total variation between two predictors' answer laws, its mean over queries, and an interval.

The outcomes are the labels and "other" (all other continuations); the total variation over them is exact for each
query, so that the only uncertainty is which queries were drawn. The mean over queries is the total variation of the
joint law of query and answer; |accuracy difference| of sampled answers is at most the gap.

Where an engine gives only its likeliest tokens, the total variation of a query is known within bounds, and so is the
mean; the interval then covers both: what was not said, and which queries were drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.formatting import counted
from evaluation.intervals import Interval, betting
from evaluation.sequential import running_interval
from evaluation.tv import Box, Sandwich, box_with_other, boxed_tv, tv_distance, with_other
from icl_compiler.errors import EvaluationError
from icl_compiler.predictor import Predictions


class Gap(NamedTuple):
    """Mean total variation over the queries, in [0, 1], with its interval.

    Attributes:
        per_query: the total variation of each query; the midpoint, where only bounds are known.
        bounds: where only bounds are known, those of the mean over these queries; `mean` is their midpoint.
    """

    mean: float
    interval: Interval
    per_query: Float[np.ndarray, " queries"]
    bounds: Interval | None = None


def distances(first: Predictions, second: Predictions) -> Sandwich:
    """Bounds on the total variation between two predictors on each text; one array twice where it is known exactly.

    Raises:
        EvaluationError: if the two speak of other labels, or of another number of texts.
    """
    if set(first.labels) != set(second.labels) or len(first.probabilities) != len(second.probabilities):
        raise EvaluationError(
            f"two predictors are compared on the same labels and texts; these have {len(first.labels)} and "
            f"{counted(len(second.labels), 'label')}, {len(first.probabilities)} and "
            f"{counted(len(second.probabilities), 'text')}"
        )
    order = [second.labels.index(label) for label in first.labels]
    second = second._replace(
        labels=first.labels,
        probabilities=second.probabilities[:, order],
        upper=None if second.upper is None else second.upper[:, order],
    )
    if _is_exact(first) and _is_exact(second):
        exact = tv_distance(with_other(first.probabilities), with_other(second.probabilities))
        return Sandwich(exact, exact)
    return boxed_tv(_box(first), _box(second))


def gap(first: Predictions, second: Predictions, *, level: float = 0.95, anytime: bool = False) -> Gap:
    """The gap between two predictors on the same texts; see `gap_of_distances`.

    Raises:
        EvaluationError: if the two speak of other labels, or of another number of texts.
    """
    return gap_of_distances(distances(first, second), level=level, anytime=anytime)


def gap_of_laws(
    p: Float[np.ndarray, "queries outcomes"], q: Float[np.ndarray, "queries outcomes"], *, level: float = 0.95
) -> Gap:
    """The gap between two laws given row by row.

    >>> round(gap_of_laws(np.array([[0.8, 0.2]]), np.array([[0.5, 0.5]])).mean, 6)
    0.3
    """
    exact = tv_distance(p, q)
    return gap_of_distances(Sandwich(exact, exact), level=level)


def gap_of_distances(found: Sandwich, *, level: float = 0.95, anytime: bool = False) -> Gap:
    """The gap from the distance of each query, or bounds on it; the interval holds for queries drawn i.i.d.

    Of bounds, the low end is that of the lowest distances, the high end that of the highest. Betting takes the queries
    one after the other; they are shuffled first (a fixed seed), since a file is often sorted by label and the interval
    is about queries in random order. With `anytime` they are taken in the order given, which has to be random, and the
    interval holds although their number was chosen by what they showed.
    """
    if anytime:
        interval = running_interval(found, level=level)
    else:
        order = np.random.default_rng(0).permutation(len(found.lower))
        low, high = (betting(ends[order], delta=1 - level) for ends in found)
        interval = Interval(low.low, high.high)
    middle = (found.lower + found.upper) / 2
    bounds = None
    if found.lower is not found.upper:
        bounds = Interval(float(found.lower.mean()), float(found.upper.mean()))
    return Gap(float(middle.mean()), interval, middle, bounds)


def _is_exact(said: Predictions) -> bool:
    return said.upper is None or not (said.upper > said.probabilities).any()


def _box(said: Predictions) -> Box:
    return box_with_other(said.probabilities, said.probabilities if said.upper is None else said.upper)


def calibration_error(
    confidences: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"], *, bins: int = 10
) -> float:
    """Expected calibration error with bins of equal width (Guo et al. 2017, eq. 3), in [0, 1].

    >>> calibration_error(np.array([0.9, 0.9]), np.array([1.0, 0.0]))
    0.4
    """
    cell = np.minimum((confidences * bins).astype(int), bins - 1)
    total = np.bincount(cell, weights=confidences - correct, minlength=bins)
    return float(np.abs(total).sum() / len(confidences))


def reliability(
    confidences: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"], *, bins: int = 10
) -> list[tuple[int, float, float]]:
    """What `calibration_error` is made of: queries, mean confidence and share of right ones of each bin that has any.

    >>> reliability(np.array([0.75, 0.75, 0.25]), np.array([1.0, 0.0, 0.0]))
    [(1, 0.25, 0.0), (2, 0.75, 0.5)]
    """
    cell = np.minimum((confidences * bins).astype(int), bins - 1)
    inside = [cell == place for place in np.unique(cell)]
    return [(int(one.sum()), float(confidences[one].mean()), float(correct[one].mean())) for one in inside]


def require_known(labels: Sequence[str], answers: Sequence[str]) -> None:
    """Check that every label of the test data is one of the program's.

    Raises:
        EvaluationError: if one is not; the message names some.

    >>> require_known(("a", "b"), ("b", "b", "a"))
    """
    unknown = sorted(set(answers) - set(labels))
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise EvaluationError(
            f"the test data has {counted(len(unknown), 'label')} that the program does not know ({shown}); "
            "evaluate on the labels it was compiled for"
        )
