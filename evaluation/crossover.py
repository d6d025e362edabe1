"""Where two fitted curves cross: from how many examples on fine-tuning, say, has the lower error.

Searched from the largest of the two smallest sizes to four times the smaller of the two largest, and never beyond:
what the curves do there nobody measured.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.curve_fitting import values_of
from evaluation.curves import BASELESS, FittedCurve
from icl_compiler.errors import EvaluationError

_PLACES = 512


class Crossover(NamedTuple):
    """The number of examples at which two curves cross.

    Attributes:
        n: where the fitted curves do; `None` if they do not, as far as was searched.
        low: low end of the interval; `None` where no end of it is reached.
        high: high end; `None` where some resamples do not cross at all.
        first_is_lower: whether the first curve is the lower one before, or everywhere.
        warning: a sentence where the number lies beyond the sizes measured.
    """

    n: int | None
    low: int | None
    high: int | None
    first_is_lower: bool
    warning: str | None


def crossover(first: FittedCurve, second: FittedCurve) -> Crossover:
    """The smallest number of examples at which the order of two curves is another than with the fewest.

    The interval is that of the two bootstraps, resample by resample: APPROXIMATE, and the narrower of fits that were
    made with the same seed on the same queries, whose resamples are then the same draws.

    Raises:
        EvaluationError: curves of other levels or numbers of resamples, or without sizes in common.

    >>> from evaluation.curve_points import Points
    >>> from evaluation.curves import fitted_curve
    >>> sizes = np.array([1, 4, 16, 64, 256])
    >>> flat, steep = (Points.from_queries(sizes, np.full((50, 5), gaps)) for gaps in (0.2 + 0 * sizes, sizes**-0.5))
    >>> fits = [fitted_curve(each, rng=np.random.default_rng(0), resamples=10) for each in (flat, steep)]
    >>> crossover(*fits)
    Crossover(n=25, low=25, high=25, first_is_lower=True, warning=None)
    """
    if first.level != second.level or len(first.resampled) != len(second.resampled):
        raise EvaluationError(
            f"the curves have levels of {first.level:g} and {second.level:g}, {len(first.resampled)} and "
            f"{len(second.resampled)} resamples; fit both alike"
        )
    start = int(max(first.points.sizes[0], second.points.sizes[0]))
    measured = int(min(first.points.sizes[-1], second.points.sizes[-1]))
    if start >= measured:
        raise EvaluationError(f"one curve begins at {start:,} examples, where the other has ended")
    places = np.geomspace(start, BASELESS * measured, _PLACES)
    difference = _values(first, places) - _values(second, places)
    sign = 1.0 if difference[0, 0] > 0 else -1.0
    crossings = _first_changes(np.log(places), sign * difference)
    n, resampled = float(crossings[0]), np.sort(crossings[1:])
    tail = (1 - first.level) / 2 * (len(resampled) - 1)
    ends = resampled[int(np.floor(tail))], resampled[int(np.ceil(len(resampled) - 1 - tail))]
    low, high = (round(float(end)) if np.isfinite(end) else None for end in ends)
    warning = None
    if n > measured and np.isfinite(n):
        warning = f"{n:,.0f} examples are more than both curves were measured with ({measured:,}): this is a guess"
    return Crossover(round(n) if np.isfinite(n) else None, low, high, sign < 0, warning)


def _values(curve: FittedCurve, places: Float[np.ndarray, " places"]) -> Float[np.ndarray, "curves places"]:
    """Of the fit, and of each resample."""
    fit = curve.fit.curve
    own = np.array([[fit.floor, fit.scale, fit.exponent, fit.knee or 1.0]])
    values: Float[np.ndarray, "curves places"] = values_of(fit.form, np.concatenate([own, curve.resampled]), places)
    return values


def _first_changes(
    logs: Float[np.ndarray, " places"], differences: Float[np.ndarray, "curves places"]
) -> Float[np.ndarray, " curves"]:
    """Where each row, positive at first, is not any more, between two places by a straight line; infinite if never."""
    below = differences <= 0
    place = below.argmax(axis=1)
    rows = np.arange(len(differences))
    after, before = differences[rows, place], differences[rows, np.maximum(place - 1, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(place > 0, before / (before - after), 0.0)
    step = logs[1] - logs[0]
    found: Float[np.ndarray, " curves"] = np.exp(logs[np.maximum(place - 1, 0)] + np.nan_to_num(share) * step)
    return np.where(below.any(axis=1), found, np.inf)
