"""Intervals for the mean of values in [0, 1], and the claim that rests on them.

- The values are one per query (gaps, or paired estimates averaged inside the query first). `delta` is the
  probability of error that is allowed: 0.05 gives 95 % intervals. `side` says where it goes: "both" splits
  it, "lower" and "upper" spend it on one end, the other end is then 0 or 1.
- Rigorous at every sample size: `hoeffding`, `empirical_bernstein`, `clopper_pearson` (for values 0 and 1),
  `betting` (for the rest), and `confidence_sequence`, which may be looked at after every query.
  `bootstrap_mean` is approximate: for display, never for a claim.
- Betting needs i.i.d. values in the order in which they were drawn. A file sorted by label, or all samples of
  one model before all samples of the other, is no such order: shuffle the queries first.
- Ends are rounded outward, so rounding never costs coverage.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta

from icl_compiler.errors import EvaluationError

Side = Literal["both", "lower", "upper"]

# A bet risks at most this part of the wealth. Any constant below 1 is valid; Waudby-Smith and Ramdas name 1/2
# and 3/4. With 1/2 intervals of small gaps are a third wider; above 3/4 single large values among zeros hurt.
LARGEST_BET = 0.75
# The further bettors of a confidence sequence: they risk fixed parts of the wealth.
FIXED_BETS = (0.9, 0.45, 0.225, 0.1125, 0.05625)
# The means that a confidence sequence tries: its ends are multiples of 1 / GRID.
GRID = 2000
# Values per step of its search, to bound memory.
CHUNK = 1024


class Interval(NamedTuple):
    """An interval of [0, 1] that holds the quantity of interest, both ends included."""

    low: float
    high: float


class ConfidenceSequence(NamedTuple):
    """Ends after 1, 2, ... values; the intervals are nested."""

    lows: Float[np.ndarray, " values"]
    highs: Float[np.ndarray, " values"]


def hoeffding(values: Float[np.ndarray, " values"], *, delta: float = 0.05, side: Side = "both") -> Interval:
    """Hoeffding's interval for the mean: the sample mean plus and minus sqrt(ln(2/delta) / 2n).

    Holds for independent values in [0, 1], also with different laws (a fixed set of queries, several draws of
    each: the interval is then for the average over this set) and for draws without replacement.
    Source: Hoeffding 1963, theorem 2 and section 6.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` outside (0, 1).

    >>> low, high = hoeffding(np.array([0.2, 0.4] * 100))
    >>> round(low, 3), round(high, 3)
    (0.204, 0.396)
    """
    sample = _checked(values)
    radius = math.sqrt(-math.log(_per_end(delta, side)) / (2 * len(sample)))
    return _clipped(float(sample.mean()), radius, side)


def empirical_bernstein(values: Float[np.ndarray, " values"], *, delta: float = 0.05, side: Side = "both") -> Interval:
    """Interval for the mean that shrinks with the sample variance V.

    An end at level a lies sqrt(2 V ln(2/a) / n) + 7 ln(2/a) / (3 (n - 1)) from the mean; a is delta, or
    delta/2 for two ends. One value alone gives [0, 1]. For i.i.d. values.
    Source: Maurer and Pontil 2009 (arXiv 0907.3740), theorem 4.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` outside (0, 1).

    >>> low, high = empirical_bernstein(np.array([0.2, 0.4] * 100))
    >>> round(low, 3), round(high, 3)
    (0.228, 0.372)
    """
    sample = _checked(values)
    n, log_term = len(sample), math.log(2 / _per_end(delta, side))
    if n == 1:
        return Interval(0.0, 1.0)
    radius = math.sqrt(2 * float(sample.var(ddof=1)) * log_term / n) + 7 * log_term / (3 * (n - 1))
    return _clipped(float(sample.mean()), radius, side)


def clopper_pearson(successes: int, trials: int, *, delta: float = 0.05, side: Side = "both") -> Interval:
    """Exact interval for the probability of a success.

    For i.i.d. 0/1 outcomes: agreement, accuracy, or coins drawn with the values as probabilities
    (`rng.random(n) < values`, which is exact but wider than `betting`). Source: Clopper and Pearson 1934.

    Raises:
        EvaluationError: unless 0 <= successes <= trials and trials >= 1; `delta` outside (0, 1).

    >>> low, high = clopper_pearson(46, 200)
    >>> round(low, 4), round(high, 4)
    (0.1736, 0.2946)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise EvaluationError(
            f"{successes} successes in {trials} trials: give 0 <= successes <= trials, and at least one trial"
        )
    level = _per_end(delta, side)
    low, high = 0.0, 1.0
    if side != "upper" and successes > 0:
        low = float(beta.ppf(level, successes, trials - successes + 1))
    if side != "lower" and successes < trials:
        high = float(beta.isf(level, successes + 1, trials - successes))
    return Interval(low, high)


def betting(values: Float[np.ndarray, " values"], *, delta: float = 0.05, side: Side = "both") -> Interval:
    """Hedged-capital interval for the mean, within [0, 1]: rigorous, and narrow where the values vary little.

    For each candidate mean m a gambler bets against it, fairly if m is true. m is refused once the wealth
    has reached 1/delta (2/delta when two hedge on both sides). Wealth is monotone in m, so each end is found
    by bisection, to 1e-6 and outward.

    Holds for i.i.d. values (a common mean given the past is enough), in the order drawn. Should the two ends
    cross (the values drift, or with probability at most delta), nothing is claimed: [0, 1] is returned.
    Source: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), theorem 3, with predictable plug-in bets for a
    fixed sample size and the running intersection.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` outside (0, 1).

    >>> low, high = betting(np.array([0.2, 0.4] * 100))
    >>> round(low, 3), round(high, 3)
    (0.281, 0.322)
    >>> betting(np.zeros(200), side="upper").high < 0.03
    True
    """
    sample = _checked(values)
    log_target = -math.log(_per_end(delta, side))
    low = 0.0 if side == "upper" else _lowest_unrefused(sample, log_target)
    high = 1.0 if side == "lower" else 1.0 - _lowest_unrefused(1.0 - sample, log_target)
    return Interval(low, high) if low <= high else Interval(0.0, 1.0)


def confidence_sequence(
    values: Float[np.ndarray, " values"], *, delta: float = 0.05, side: Side = "both"
) -> ConfidenceSequence:
    """Betting intervals after each value that hold at all times at once: stop whenever you like.

    With probability at least 1 - delta every one of the nested intervals holds the mean. The first t
    intervals depend on the first t values only. Ends are multiples of 1/2000, rounded outward. Should the
    intersection become empty (probability at most delta, or values that drift), the last one stays.

    Holds for i.i.d. values in the order drawn. Half of the wealth follows predictable plug-in bets, half is
    spread over five fixed ones: the sum still cannot grow against the true mean, and no size of gap is
    learned slowly. Source: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), theorem 3; Ville's inequality.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` outside (0, 1).

    >>> lows, highs = confidence_sequence(np.array([0.2, 0.4] * 100))
    >>> round(float(highs[49]), 2), round(float(highs[199]), 2)
    (0.37, 0.32)
    """
    sample = _checked(values)
    log_target = -math.log(_per_end(delta, side))
    lows, highs = np.zeros(len(sample)), np.ones(len(sample))
    if side != "upper":
        lows = _running_lows(sample, log_target)
    if side != "lower":
        highs = 1.0 - _running_lows(1.0 - sample, log_target)
    crossed = lows > highs
    if crossed.any():
        first = int(crossed.argmax())
        lows[first:], highs[first:] = (0.0, 1.0) if first == 0 else (lows[first - 1], highs[first - 1])
    return ConfidenceSequence(lows, highs)


def betting_p_value(
    values: Float[np.ndarray, " values"], *, mean: float, delta: float = 0.05, anytime: bool = False
) -> float:
    """How well the values go with that mean: a p-value, valid at every sample size, two-sided.

    The gamblers are those of `betting`, or with `anytime` those of `confidence_sequence`, tuned to `delta`: the mean
    lies outside of their interval where the p-value is at most `delta`, but for the rounding of the ends. 2 over the
    largest wealth of the two sides. Source: Ville's inequality; as `betting`.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` or `mean` outside (0, 1).

    >>> round(betting_p_value(np.array([0.2, 0.4] * 100), mean=0.3), 2), betting_p_value(np.ones(20), mean=0.5) < 1e-4
    (1.0, True)
    """
    sample = _checked(values)
    log_target = -math.log(_per_end(delta, "both"))
    if not 0 < mean < 1:
        raise EvaluationError(f"mean should be between 0 and 1, both excluded, is {mean}")
    largest = max(
        _largest_log_wealth(sample, mean, log_target, anytime=anytime),
        _largest_log_wealth(1.0 - sample, 1.0 - mean, log_target, anytime=anytime),
    )
    return min(1.0, 2 * math.exp(-largest))


def bootstrap_mean(
    values: Float[np.ndarray, " values"],
    *,
    rng: np.random.Generator,
    delta: float = 0.05,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval for the mean: APPROXIMATE, for display.

    Its coverage is below nominal for few values and for rare large ones (all zeros give [0, 0]). Resamples
    the values as if i.i.d.: give one value per query. Source: Efron 1979.

    Raises:
        EvaluationError: no values, a value outside [0, 1] or NaN, `delta` outside (0, 1), no `resamples`.

    >>> low, high = bootstrap_mean(np.array([0.2, 0.4] * 100), rng=np.random.default_rng(0))
    >>> round(low, 2), round(high, 2)
    (0.29, 0.31)
    """
    sample = _checked(values)
    level = _per_end(delta, "both")
    if resamples < 1:
        raise EvaluationError(f"resamples should be >= 1, is {resamples}")
    means = np.empty(resamples)
    rows = max(1, 2**20 // len(sample))
    for start in range(0, resamples, rows):
        chunk = min(rows, resamples - start)
        means[start : start + chunk] = sample[rng.integers(len(sample), size=(chunk, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, [level, 1 - level])
    return Interval(float(low), float(high))


def n_star(sizes: Int[np.ndarray, " sizes"], uppers: Float[np.ndarray, " sizes"], *, epsilon: float) -> int | None:
    """The smallest size from which on the gap is claimed to be at most `epsilon`, or None.

    Fixed-sequence test: from the largest size downward, claim a size while its upper bound is at most
    epsilon, stop at the first that is not. If each upper bound holds with probability 1 - delta
    (`betting(..., side="upper")`), any false claim among all sizes has probability at most delta, without a
    price for their number, and the sizes may share queries. Shots must not have been chosen on these queries.
    Source: Maurer, Hothorn and Lehmacher 1995 (tests ordered beforehand).

    Raises:
        EvaluationError: no sizes, sizes that do not strictly increase, an upper bound that is NaN.

    >>> n_star(np.array([16, 64, 256, 1024]), np.array([0.09, 0.12, 0.08, 0.05]), epsilon=0.1)
    256
    """
    if len(sizes) == 0 or bool((np.diff(sizes) <= 0).any()):
        raise EvaluationError(f"sizes should be at least one and strictly increasing, are {sizes.tolist()}")
    if bool(np.isnan(uppers).any()):
        raise EvaluationError(f"an upper bound is NaN: {uppers.tolist()}; give 1.0 where nothing was measured")
    claimed: int | None = None
    for size, upper in zip(sizes[::-1].tolist(), uppers[::-1].tolist(), strict=True):
        if upper > epsilon:
            break
        claimed = size
    return claimed


def _checked(values: Float[np.ndarray, " values"]) -> Float[np.ndarray, " values"]:
    if len(values) == 0:
        raise EvaluationError("no values: an interval needs at least one")
    sample = values.astype(np.float64)
    if not (sample.min() >= 0 and sample.max() <= 1):
        place = int(np.argmin((sample >= 0) & (sample <= 1)))
        raise EvaluationError(
            f"value {place} is {sample[place]}, expected a number in [0, 1]: divide by the largest possible"
        )
    return sample


def _per_end(delta: float, side: Side) -> float:
    if not 0 < delta < 1:
        raise EvaluationError(f"delta should be between 0 and 1 (0.05 for 95 %), is {delta}")
    return delta / 2 if side == "both" else delta


def _clipped(mean: float, radius: float, side: Side) -> Interval:
    low = 0.0 if side == "upper" else max(0.0, mean - radius)
    return Interval(low, 1.0 if side == "lower" else min(1.0, mean + radius))


def _plugin_bets(
    sample: Float[np.ndarray, " values"], log_target: float, *, fixed: bool
) -> Float[np.ndarray, " values"]:
    # The bet on value t knows the t - 1 values before it, through their variance (prior: 1/4, at mean 1/2).
    t = np.arange(1, len(sample) + 1)
    means = (0.5 + np.cumsum(sample)) / (t + 1)
    variances = (0.25 + np.cumsum((sample - means) ** 2)) / (t + 1)
    before = np.concatenate(([0.25], variances[:-1]))
    horizon = np.full(len(sample), float(len(sample))) if fixed else t * np.log1p(t)
    bets: Float[np.ndarray, " values"] = np.sqrt(2 * log_target / (before * horizon))
    return bets


def _lowest_unrefused(sample: Float[np.ndarray, " values"], log_target: float) -> float:
    bets = _plugin_bets(sample, log_target, fixed=True)
    # Wealth never rises with m, and m = 1 cannot be refused: no bet against it ever wins.
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        m = (low + high) / 2
        log_wealth = np.log1p(np.minimum(bets, LARGEST_BET / m) * (sample - m)).cumsum()
        low, high = (m, high) if log_wealth.max() >= log_target else (low, m)
    return low


def _largest_log_wealth(
    sample: Float[np.ndarray, " values"], mean: float, log_target: float, *, anytime: bool
) -> float:
    bets = np.minimum(_plugin_bets(sample, log_target, fixed=not anytime), LARGEST_BET / mean)
    wealth = np.log1p(bets * (sample - mean)).cumsum()
    if anytime:
        fixed = [np.log1p(bet / mean * (sample - mean)).cumsum() - math.log(2 * len(FIXED_BETS)) for bet in FIXED_BETS]
        wealth = np.logaddexp.reduce([wealth - math.log(2), *fixed])
    return float(wealth.max())


def _running_lows(sample: Float[np.ndarray, " values"], log_target: float) -> Float[np.ndarray, " values"]:
    bets = _plugin_bets(sample, log_target, fixed=False)
    lows = np.zeros(len(sample))
    # Means in rising order; their times of refusal rise too, so the first one never refused ends the search.
    for block in np.array_split(np.arange(1, GRID) / GRID, GRID // 50):
        refusal = _refusal_times(sample, bets, block, log_target)
        refused = refusal < len(sample)
        np.maximum.at(lows, refusal[refused], block[refused])
        if not refused.all():
            break
    running: Float[np.ndarray, " values"] = np.maximum.accumulate(lows)
    return running


def _refusal_times(
    sample: Float[np.ndarray, " values"],
    bets: Float[np.ndarray, " values"],
    means: Float[np.ndarray, " means"],
    log_target: float,
) -> Int[np.ndarray, " means"]:
    # Half of the wealth follows the plug-in bets, half is spread over fixed bets; each bettor's wealth never
    # rises with the mean, so neither does their sum. Plain products: an underflow to 0 only keeps a mean that
    # is unrefused.
    wealth = np.full((1 + len(FIXED_BETS), len(means)), 0.5 / len(FIXED_BETS))
    wealth[0] = 0.5
    target = math.exp(log_target)
    times = np.full(len(means), len(sample))
    largest = 1 / means[:, None]
    start, stop = 0, 64
    while start < len(sample) and (times == len(sample)).any():
        surplus = sample[start:stop] - means[:, None]
        stakes = [np.minimum(bets[start:stop], LARGEST_BET * largest), *(bet * largest for bet in FIXED_BETS)]
        factors = np.stack([1 + stake * surplus for stake in stakes])
        with np.errstate(over="ignore", under="ignore"):
            factors[..., 0] *= wealth
            paths = factors.cumprod(axis=-1)
            reached = paths.sum(axis=0) >= target
        new = (times == len(sample)) & reached.any(axis=1)
        times[new] = start + reached[new].argmax(axis=1)
        wealth = np.where(paths[..., -1] < 1e-200, 0.0, paths[..., -1])
        start, stop = stop, stop + min(2 * (stop - start), CHUNK)
    return times
