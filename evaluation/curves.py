"""How the gap falls with the number of examples: fitted curves, their intervals, the examples until epsilon.

- n counts examples, from 1 on; a gap is a mean over queries, in [0, 1]. Three forms, each with a floor a: "bounded
  power" a + b (1 + n / n_c)^-c, flat first and then falling, the default; "power" a + b n^-c; and "logistic"
  a + b / (1 + (n / n_c)^c), logistic in log n. With fewer than 6 sizes only the power form, with c in [0.1, 2].
- A curve leads from its value at the smallest size to its floor. Both are in [0, 1], and so is all between. Either may
  be the larger one: nothing forces a curve to fall, and gaps that go up and down are fitted as they are.
- Weighted least squares without randomness (`curve_fitting`): c and n_c are searched, the two ends are then exact.
- Intervals are APPROXIMATE: percentiles of a bootstrap that draws whole queries, since all sizes are asked the same
  ones (Efron 1979), and seeds where there are several (`curve_points`).
  They take the form for granted, and the weights as they are. For plans and plots; claims rest on `evaluation.verdict`.
- What a curve says beyond the sizes measured is a guess, and comes with a warning.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import chdtrc, stdtrit

from evaluation.curve_fitting import Form, fitted_parameters, sizes_within, slopes_of, values_of
from evaluation.curve_points import Points, check_part, normal_quantile, resampled_means
from evaluation.formatting import counted
from evaluation.intervals import Interval
from icl_compiler.errors import EvaluationError

Parameter = Literal["floor", "scale", "exponent", "knee"]

# The default first.
FORMS: tuple[Form, ...] = ("bounded power", "power", "logistic")
PARAMETERS: tuple[Parameter, ...] = ("floor", "scale", "exponent", "knee")
# With fewer sizes only the power form is fitted, within narrower exponents.
ENOUGH_SIZES = 6
FEW_EXPONENTS = (0.1, 2.0)
EXPONENTS = (0.05, 5.0)
# A prediction is doubtful beyond the first multiple of the largest size, baseless beyond the second.
DOUBTFUL, BASELESS = 2, 4
# A floor whose interval is wider than this part of the smallest gap is not identified.
WIDE_FLOOR = 0.5
# A curve whose distance from the points would be as large by chance more seldom than this does not fit.
MISFIT = 0.01
# More examples than this are no answer.
MOST_EXAMPLES = 1e15


class Range(NamedTuple):
    """An interval of any numbers, both ends included."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    interval: Range


class Prediction(NamedTuple):
    """A predicted gap in [0, 1] with its interval, and a sentence where it is an extrapolation."""

    gap: float
    interval: Interval
    warning: str | None


class ExamplesUntil(NamedTuple):
    """The smallest number of examples with which a curve is within epsilon; `None` is never.

    Attributes:
        low: low end of the interval; `None` where no end of it is reached.
        high: high end of the interval; `None` where it is not known to be reached at all.
        warning: a sentence where the number is an extrapolation.
    """

    n: int | None
    low: int | None
    high: int | None
    warning: str | None


@dataclass(frozen=True)
class Curve:
    """A gap as a function of the number of examples n: a, b, c and n_c of the module's three forms.

    Attributes:
        floor: a, what is left for ever, in [0, 1].
        scale: b; negative for a curve that rises.
        exponent: c.
        knee: n_c, in examples; `None` for the power form.
    """

    form: Form
    floor: float
    scale: float
    exponent: float
    knee: float | None = None

    def at(self, sizes: Float[np.ndarray, " sizes"]) -> Float[np.ndarray, " sizes"]:
        """The gap at each number of examples (above 0), cut to [0, 1].

        >>> Curve("power", 0.1, 0.4, 0.5).at(np.array([1.0, 4.0, 16.0]))
        array([0.5, 0.3, 0.2])
        """
        gaps: Float[np.ndarray, " sizes"] = np.clip(values_of(self.form, self._row(), sizes)[0], 0.0, 1.0)
        return gaps

    def slope_at(self, n: float) -> float:
        """d log gap / d log n at n examples; 0 where the curve is flat.

        >>> round(Curve("power", 0.0, 0.4, 0.5).slope_at(64.0), 3)
        -0.5
        """
        return float(slopes_of(self.form, self._row(), float(n))[0])

    def _row(self) -> Float[np.ndarray, "1 4"]:
        return np.array([[self.floor, self.scale, self.exponent, 1.0 if self.knee is None else self.knee]])


class Fit(NamedTuple):
    """A fitted curve, and how good it is.

    Attributes:
        chi2: sum over sizes of (residual / standard error)^2.
        aicc: chi2 + 2k + 2k (k + 1) / (sizes - k - 1) for k parameters; infinite with too few sizes. To compare
            forms on the same points (Hurvich and Tsai 1989).
        left_out: how far the curve fitted without the largest size misses the gap there; `None` with too few sizes.
    """

    curve: Curve
    chi2: float
    aicc: float
    left_out: float | None


@dataclass(frozen=True, eq=False)
class FittedCurve:
    """A fit with what the bootstrap made of it: made by `fitted_curve`.

    Attributes:
        resampled: the parameters of the curve fitted to each resample, in the order of `PARAMETERS`.
    """

    points: Points
    fit: Fit
    level: float
    resampled: Float[np.ndarray, "resamples 4"]

    @property
    def floor_is_unidentified(self) -> bool:
        """Whether the data leave the floor open, so that nothing should be built on its value.

        So it is if its interval is wider than half of the smallest gap (of two standard errors, if that gap is
        smaller): typically from about 0 to most of that gap. And if there are fewer than 4 sizes, one more than the
        power form has parameters. Where a form is identified by its shape alone, the flag believes the shape.

        >>> sizes = np.array([1, 16, 256])
        >>> points = Points.from_queries(sizes, np.full((50, 3), 0.1 + 0.4 / np.sqrt(sizes)))
        >>> fitted_curve(points, rng=np.random.default_rng(0), resamples=10).floor_is_unidentified
        True
        """
        place = int(self.points.gaps.argmin())
        least = max(float(self.points.gaps[place]), 2 * float(self.points.errors[place]))
        low, high = self.interval("floor")
        return len(self.points.sizes) < 4 or high - low > WIDE_FLOOR * least

    @property
    def misfit(self) -> str | None:
        """Where the curve misses the points by most, if by more than their errors allow; `None` where it fits.

        By the chi-square test at 0.01, with a degree of freedom for each size beyond the parameters that are not at a
        bound. Points that share their queries differ less from each other than their errors say, so that a curve that
        fits is called so more often than in 99 % of cases. Then no interval of the curve means anything.

        >>> points = Points(np.array([16, 128, 1024, 9992]), np.array([0.91, 0.84, 0.46, 0.35]), np.full(4, 0.03))
        >>> fitted_curve(points, rng=np.random.default_rng(0), resamples=10).misfit
        'with 128 examples it says 0.71, and 0.84 was measured'
        """
        curve, points = self.fit.curve, self.points
        low, high = _exponents(points)
        bound = (curve.floor <= 0) + (curve.exponent <= low) + (curve.exponent >= high)
        spare = len(points.sizes) - (3 if curve.form == "power" else 4) + bound
        if spare < 1 or chdtrc(spare, self.fit.chi2) >= MISFIT:
            return None
        said = curve.at(points.sizes.astype(np.float64))
        worst = int(np.abs((said - points.gaps) / points.errors).argmax())
        n = int(points.sizes[worst])
        return f"with {counted(n, 'example')} it says {said[worst]:.2f}, and {points.gaps[worst]:.2f} was measured"

    def interval(self, parameter: Parameter) -> Range:
        """The interval of one of the parameters of the curve; of the knee only where the form has one.

        Raises:
            EvaluationError: the knee of a power curve.
        """
        if parameter == "knee" and self.fit.curve.knee is None:
            raise EvaluationError(f"a {self.fit.curve.form} curve has no knee")
        return _percentiles(self.resampled[:, PARAMETERS.index(parameter)], self.level)

    def slope_at(self, n: int) -> Estimate:
        """d log gap / d log n of the fitted curve at n examples, with its interval.

        Raises:
            EvaluationError: n below 1.
        """
        _check_n(n)
        slopes = slopes_of(self.fit.curve.form, self.resampled, float(n))
        return Estimate(self.fit.curve.slope_at(float(n)), _percentiles(slopes, self.level))

    def predict(self, n: int) -> Prediction:
        """The gap with n examples, with the interval of the curve there and a warning outside the sizes measured.

        The interval knows the noise of the fit, not whether the form goes on: beyond 2 times the largest size the
        warning calls it a guess, beyond 4 times baseless.

        Raises:
            EvaluationError: n below 1.

        >>> sizes = np.array([1, 4, 16, 64])
        >>> points = Points.from_queries(sizes, np.full((50, 4), 0.1 + 0.4 / np.sqrt(sizes)))
        >>> there = fitted_curve(points, rng=np.random.default_rng(0), resamples=10).predict(256)
        >>> round(there.gap, 3)
        0.125
        >>> there.warning
        '256 examples are 4.0 times the largest size measured (64): this is a guess'
        """
        _check_n(n)
        form, sizes = self.fit.curve.form, np.array([float(n)])
        low, high = _percentiles(np.clip(values_of(form, self.resampled, sizes)[:, 0], 0.0, 1.0), self.level)
        return Prediction(float(self.fit.curve.at(sizes)[0]), Interval(low, high), self._warning(n))

    def examples_until(self, epsilon: float) -> ExamplesUntil:
        """The smallest n, from the smallest size on, at which the fitted curve is at most `epsilon`.

        `None` where its floor is at `epsilon` or above, and beyond 1e15 examples. A resample that never gets there
        counts as infinite, so that the high end of the interval is `None` as soon as more than (1 - level) / 2 of
        them do.

        Raises:
            EvaluationError: `epsilon` outside (0, 1).

        >>> sizes = np.array([1, 4, 16, 64])
        >>> points = Points.from_queries(sizes, np.full((50, 4), 0.1 + 0.4 / np.sqrt(sizes)))
        >>> curve = fitted_curve(points, rng=np.random.default_rng(0), resamples=10)
        >>> curve.examples_until(0.2), curve.examples_until(0.1).n
        (ExamplesUntil(n=16, low=16, high=16, warning=None), None)
        """
        check_part("epsilon", epsilon)
        form, least = self.fit.curve.form, float(self.points.sizes[0])
        n = _whole(float(sizes_within(form, self.fit.curve._row(), epsilon, least)[0]))
        low, high = _percentiles(sizes_within(form, self.resampled, epsilon, least), self.level)
        return ExamplesUntil(n, _whole(low), _whole(high), None if n is None else self._warning(n))

    def _warning(self, n: int) -> str | None:
        least, most = int(self.points.sizes[0]), int(self.points.sizes[-1])
        if n < least:
            return f"{n:,} examples are fewer than the smallest size measured ({least:,}): this is a guess"
        if n <= DOUBTFUL * most:
            return None
        doubt = "this is a guess" if n <= BASELESS * most else "no measurement supports this"
        return f"{n:,} examples are {_times(n / most)} times the largest size measured ({most:,}): {doubt}"


def fit(points: Points, form: Form | None = None) -> Fit:
    """The curve of one form that is nearest to the points; by default bounded power, or power with few sizes.

    The exponent is within [0.05, 5], with fewer than 6 sizes within [0.1, 2]; n_c between a tenth of the smallest size
    and ten times the largest. Two sizes do not determine a curve: one of those through both is taken.

    Source: the forms are those that Arora et al. 2024 compare (arXiv 2410.16531). Curves of in-context learning often
    start flat, where the power form fits badly and the other two do not: our fits to the errors published by Bertsch et
    al. 2024 (arXiv 2405.00200).

    Raises:
        EvaluationError: another form than power with fewer than 6 sizes.

    >>> sizes = np.array([1, 4, 16, 64])
    >>> found = fit(Points.from_queries(sizes, np.full((50, 4), 0.1 + 0.4 / np.sqrt(sizes)))).curve
    >>> found.form, round(found.floor, 4), round(found.scale, 4), round(found.exponent, 4)
    ('power', 0.1, 0.4, 0.5)
    """
    count = len(points.sizes)
    if form is None:
        form = "power" if count < ENOUGH_SIZES else FORMS[0]
    if form != "power" and count < ENOUGH_SIZES:
        raise EvaluationError(
            f"a {form} curve needs at least {ENOUGH_SIZES} sizes, there are {count}: fit the power curve"
        )
    sizes, gaps = points.sizes.astype(np.float64), points.gaps[None]
    parameters, chi2s = fitted_parameters(form, sizes, gaps, points.errors, _exponents(points))
    free, chi2 = 3 if form == "power" else 4, float(chi2s[0])
    left_out = None
    if count > free:
        earlier, _ = fitted_parameters(form, sizes[:-1], gaps[:, :-1], points.errors[:-1], _exponents(points))
        left_out = abs(float(values_of(form, earlier, sizes[-1:])[0, 0] - gaps[0, -1]))
    spare = count - free - 1
    aicc = chi2 + 2 * free + 2 * free * (free + 1) / spare if spare > 0 else math.inf
    floor, scale, exponent, knee = map(float, parameters[0])
    return Fit(Curve(form, floor, scale, exponent, None if form == "power" else knee), chi2, aicc, left_out)


def best_fit(points: Points) -> Fit:
    """The fit of the form to use: bounded power, unless another is better by AICc and at the size left out.

    Both criteria have to agree: AICc alone takes the sizes for independent and the errors for exact, and prefers few
    parameters where sizes are few. With fewer than 6 sizes the power form.

    >>> sizes = 2 ** np.arange(8)
    >>> best_fit(Points.from_queries(sizes, np.full((50, 8), 0.1 + 0.4 / (1 + (sizes / 16) ** 2)))).curve.form
    'logistic'
    """
    default = fit(points)
    if len(points.sizes) < ENOUGH_SIZES:
        return default
    others = [fit(points, form) for form in FORMS[1:]]
    better = [
        other for other in others if other.aicc < default.aicc and (other.left_out or 0.0) < (default.left_out or 0.0)
    ]
    return min(better or [default], key=lambda found: found.aicc)


def fitted_curve(
    points: Points,
    *,
    rng: np.random.Generator,
    form: Form | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> FittedCurve:
    """The fitted curve (of `best_fit`, or of a given form) with bootstrap intervals at `level`: APPROXIMATE.

    Draws whole queries with replacement, and whole seeds where there are several, and fits the form again, to the means
    of all sizes at once: what queries or seeds have in common across sizes stays. Without gaps per query, draws each
    mean from a normal law by itself.

    Raises:
        EvaluationError: a form that `fit` refuses, `level` outside (0, 1), no `resamples`.

    >>> sizes = np.array([1, 4, 16, 64])
    >>> gaps = np.random.default_rng(0).uniform(0.5, 1.5, (200, 1)) * (0.1 + 0.4 / np.sqrt(sizes))
    >>> curve = fitted_curve(Points.from_queries(sizes, gaps), rng=np.random.default_rng(1))
    >>> low, high = curve.interval("exponent")
    >>> bool(low < 0.51 and high > 0.49)
    True
    """
    check_part("level", level)
    if resamples < 1:
        raise EvaluationError(f"resamples should be >= 1, is {resamples}")
    found = best_fit(points) if form is None else fit(points, form)
    means = resampled_means(points, resamples, rng)
    sizes = points.sizes.astype(np.float64)
    parameters, _ = fitted_parameters(found.curve.form, sizes, means, points.errors, _exponents(points))
    return FittedCurve(points, found, level, parameters)


def slope(points: Points, *, level: float = 0.95) -> Estimate:
    """The slope of log gap against log n over all sizes, by weighted least squares, with its interval.

    An order n = O(1 / eps^2), as three of arXiv 2506.08060, means -1/2; n = O(1 / eps) means -1. A straight line has
    no floor: a gap that levels off has a slope nearer to 0. The weights are those of log gaps, (gap / error)^2.

    The interval is the delta method's: the slope is nearly a sum over queries, and its variance that of the terms, so
    that what queries have in common across sizes counts. Without gaps per query the sizes count as independent.
    APPROXIMATE: for many queries, and gaps well above their errors.

    Raises:
        EvaluationError: a mean gap of 0, which has no logarithm; `level` outside (0, 1).

    >>> sizes = np.array([1, 4, 16, 64])
    >>> gaps = np.random.default_rng(0).uniform(0.5, 1.5, (200, 1)) * 0.4 / np.sqrt(sizes)
    >>> round(slope(Points.from_queries(sizes, gaps)).value, 6)
    -0.5
    """
    check_part("level", level)
    if not bool((points.gaps > 0).all()):
        size = points.sizes[int(points.gaps.argmin())]
        raise EvaluationError(f"the gap with {size:,} examples is 0, which has no logarithm: leave that size out")
    logs, relative = np.log(points.sizes), points.errors / points.gaps
    weights = relative**-2.0
    centred = logs - (weights * logs).sum() / weights.sum()
    shares = weights * centred / (weights * centred**2).sum()
    value = float((shares * np.log(points.gaps)).sum())
    if points.per_query is None:
        radius = normal_quantile(level) * math.sqrt(float(((shares * relative) ** 2).sum()))
    else:
        queries = len(points.per_query)
        terms = ((points.per_query - points.gaps) / points.gaps) @ shares
        radius = float(stdtrit(queries - 1, 0.5 + level / 2)) * math.sqrt(float(terms.var(ddof=1)) / queries)
    return Estimate(value, Range(value - radius, value + radius))


def _exponents(points: Points) -> tuple[float, float]:
    return EXPONENTS if len(points.sizes) >= ENOUGH_SIZES else FEW_EXPONENTS


def _whole(n: float) -> int | None:
    # 4 / 0.1 is 40, whatever the last digit says.
    return math.ceil(n * (1 - 1e-6)) if n <= MOST_EXAMPLES else None


def _percentiles(values: Float[np.ndarray, " resamples"], level: float) -> Range:
    # Ranks rounded outward, without arithmetic between values: some may be infinite.
    ordered, tail = np.sort(values), (1 - level) / 2 * (len(values) - 1)
    return Range(float(ordered[math.floor(tail)]), float(ordered[math.ceil(len(values) - 1 - tail)]))


def _times(factor: float) -> str:
    return f"{factor:,.1f}" if factor < 100 else f"{factor:,.0f}"


def _check_n(n: int) -> None:
    if n < 1:
        raise EvaluationError(f"n should be >= 1 examples, is {n}")
