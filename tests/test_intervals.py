"""Intervals against plain loops, exact binomials, scipy, and simulated coverage."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, binomtest, bootstrap

from benchmarks.coverage import LAWS, paired
from evaluation.intervals import (
    Interval,
    betting,
    bootstrap_mean,
    clopper_pearson,
    confidence_sequence,
    empirical_bernstein,
    hoeffding,
    n_star,
)
from icl_compiler.errors import EvaluationError

RIGOROUS = (hoeffding, empirical_bernstein, betting)
samples = arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1))


def least_coverage(runs, nominal=0.95):
    return nominal - 3 * math.sqrt(nominal * (1 - nominal) / runs)


def loop_wealth(values, m, bets):
    """Largest wealth of the one who bets, with these stakes, on values above m."""
    wealth, largest = 1.0, 1.0
    for value, bet in zip(values, bets, strict=True):
        wealth *= 1 + min(bet, 0.75 / m) * (value - m)
        largest = max(largest, wealth)
    return largest


def loop_bets(values, level, horizon):
    """Predictable plug-in bets, equation by equation."""
    bets, total, spread = [], 0.5, 0.25
    for t, value in enumerate(values, start=1):
        bets.append(math.sqrt(2 * math.log(1 / level) / (spread / t * horizon(t))))
        total += value
        spread += (value - total / (t + 1)) ** 2
    return bets


@pytest.mark.parametrize("law", LAWS)
def test_betting_against_plain_loops(law):
    values = LAWS[law][0](np.random.default_rng(3), 40)
    low, high = betting(values, delta=0.1)
    bets = loop_bets(values, 0.05, lambda t: 40)
    for m in np.arange(1, 200) / 200:
        wealth = loop_wealth(values, m, bets), loop_wealth(1 - values, 1 - m, bets)
        assert (max(wealth) < 20) == (low < m < high)


@pytest.mark.parametrize("law", ["bernoulli .5", "beta .05", "two points"])
def test_confidence_sequence_against_plain_loops(law):
    values = LAWS[law][0](np.random.default_rng(4), 150)
    lows, _ = confidence_sequence(values, side="lower")
    bets = loop_bets(values, 0.05, lambda t: t * math.log(1 + t))
    fixed = [0.9 / 2**k for k in range(5)]
    highest = 0.0
    for t in range(1, 151):
        for m in np.arange(1, 2000) / 2000:
            if m <= highest:
                continue
            seen = values[:t] - m
            wealth = 0.5 * np.prod(1 + np.minimum(bets[:t], 0.75 / m) * seen)
            wealth += sum(0.1 * np.prod(1 + bet / m * seen) for bet in fixed)
            if wealth < 20:
                break
            highest = m
        assert lows[t - 1] == pytest.approx(highest)


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("law", LAWS)
def test_betting_covers(law, n):
    draw, mean = LAWS[law]
    runs = 500
    intervals = [betting(values) for values in draw(np.random.default_rng(n), (runs, n))]
    assert np.mean([low <= mean <= high for low, high in intervals]) >= least_coverage(runs)


@pytest.mark.parametrize("law", LAWS)
def test_one_sided_betting_covers(law):
    draw, mean = LAWS[law]
    runs = 500
    values = draw(np.random.default_rng(5), (runs, 100))
    assert np.mean([mean <= betting(row, side="upper").high for row in values]) >= least_coverage(runs)
    assert np.mean([betting(row, side="lower").low <= mean for row in values]) >= least_coverage(runs)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", [hoeffding, empirical_bernstein])
def test_closed_forms_cover(method, law):
    draw, mean = LAWS[law]
    runs = 300
    intervals = [method(values) for values in draw(np.random.default_rng(6), (runs, 100))]
    assert np.mean([low <= mean <= high for low, high in intervals]) >= least_coverage(runs)


@pytest.mark.parametrize("law", ["bernoulli .05", "bernoulli .5", "beta .05", "two points", "near 0", "toy markov"])
def test_confidence_sequence_covers_at_every_stopping_time(law):
    draw, mean = LAWS[law]
    runs = 200
    covered = []
    for values in draw(np.random.default_rng(7), (runs, 300)):
        lows, highs = confidence_sequence(values)
        covered.append(((lows <= mean) & (mean <= highs)).all())
    assert np.mean(covered) >= least_coverage(runs)


@pytest.mark.parametrize(("toy", "width"), [("bern", 0.06), ("markov", 0.076), ("close", 0.044)])
def test_betting_is_at_most_half_as_wide_as_hoeffding(toy, width):
    rng = np.random.default_rng(8)
    rows = paired(rng, (50, 200), toy)
    widths = np.mean([np.subtract(*betting(values)[::-1]) for values in rows])
    ceiling = np.mean([np.subtract(*hoeffding(values)[::-1]) for values in rows])
    assert widths <= ceiling / 2
    assert widths <= width


def test_sequential_decisions_save_queries():
    # Fixed size: the one that Hoeffding's bound needs for a distance of 0.05, 600 queries.
    rng = np.random.default_rng(9)
    for mean in (0.05, 0.15):
        stops = []
        for values in rng.beta(20 * mean, 20 * (1 - mean), (50, 600)):
            lows, highs = confidence_sequence(values)
            decided = (highs <= 0.1) | (lows > 0.1)
            stops.append(int(decided.argmax()) + 1 if decided.any() else 600)
            assert (highs[-1] <= 0.1) == (mean < 0.1)
        assert np.mean(stops) < 300


def test_hoeffding_is_its_formula():
    values = np.random.default_rng(0).random(200)
    low, high = hoeffding(values)
    assert high - low == pytest.approx(2 * math.sqrt(math.log(40) / 400))
    assert round(high - low, 3) == 0.192
    assert hoeffding(values, side="upper") == (
        0,
        pytest.approx(values.mean() + math.sqrt(math.log(20) / 400)),
    )
    assert hoeffding(values, side="lower").high == 1


def test_empirical_bernstein_is_its_formula():
    values = np.random.default_rng(0).beta(1, 9, 200)
    radius = math.sqrt(2 * values.var(ddof=1) * math.log(80) / 200) + 7 * math.log(80) / (3 * 199)
    assert empirical_bernstein(values).high == pytest.approx(values.mean() + radius)
    radius = math.sqrt(2 * values.var(ddof=1) * math.log(40) / 200) + 7 * math.log(40) / (3 * 199)
    assert empirical_bernstein(values, side="upper").high == pytest.approx(values.mean() + radius)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 30), (7, 30), (30, 30), (46, 200)])
def test_clopper_pearson_against_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, "exact")
    assert clopper_pearson(k, n) == pytest.approx((expected.low, expected.high))
    upper = binomtest(k, n, alternative="less").proportion_ci(0.95, "exact")
    assert clopper_pearson(k, n, side="upper") == pytest.approx((upper.low, upper.high))
    lower = binomtest(k, n, alternative="greater").proportion_ci(0.95, "exact")
    assert clopper_pearson(k, n, side="lower") == pytest.approx((lower.low, lower.high))


@pytest.mark.parametrize("n", [1, 5, 50])
def test_clopper_pearson_covers_exactly(n):
    ends = np.array([clopper_pearson(k, n) for k in range(n + 1)])
    for p in np.linspace(0, 1, 101):
        covers = (ends[:, 0] <= p) & (p <= ends[:, 1])
        assert binom.pmf(np.arange(n + 1), n, p)[covers].sum() >= 0.95 - 1e-12


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).beta(1, 4, 150)
    ours = bootstrap_mean(values, rng=np.random.default_rng(1), resamples=5000)
    theirs = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert ours == bootstrap_mean(values, rng=np.random.default_rng(1), resamples=5000)


@pytest.mark.parametrize("method", RIGOROUS)
@given(values=samples, delta=st.floats(0.001, 0.5))
@settings(max_examples=50, deadline=None)
def test_intervals_are_symmetric_and_in_range(method, values, delta):
    low, high = method(values, delta=delta)
    assert 0 <= low <= high <= 1
    mirrored = method(1 - values, delta=delta)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=3e-6)
    one_sided = method(values, delta=delta / 2, side="upper")
    assert one_sided.low == 0
    if (low, high) != (0, 1):
        assert one_sided.high == pytest.approx(high, abs=3e-6)


@given(values=samples)
@settings(max_examples=30, deadline=None)
def test_confidence_sequences_are_nested_and_know_no_future(values):
    lows, highs = confidence_sequence(values)
    assert (np.diff(lows) >= 0).all()
    assert (np.diff(highs) <= 0).all()
    assert ((lows >= 0) & (lows <= highs) & (highs <= 1)).all()
    half = (len(values) + 1) // 2
    early = confidence_sequence(values[:half])
    np.testing.assert_array_equal(early.lows, lows[:half])
    np.testing.assert_array_equal(early.highs, highs[:half])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("method", RIGOROUS)
def test_constant_values(method, value):
    assert method(np.array([value])) == Interval(0, 1)
    low, high = method(np.full(500, value))
    assert low <= value <= high
    assert high - low < 0.13
    if method is betting:
        assert high - low < 0.03


def test_one_value_and_no_variance_in_a_confidence_sequence():
    assert confidence_sequence(np.array([0.5]))[0].shape == (1,)
    lows, highs = confidence_sequence(np.zeros(500))
    assert (lows == 0).all()
    assert highs[-1] < 0.02
    lows, highs = confidence_sequence(np.ones(500))
    assert (highs == 1).all()
    assert lows[-1] > 0.98


def test_values_that_drift_claim_nothing():
    drifting = np.repeat([0.0, 1.0], 500)
    assert betting(drifting) == Interval(0, 1)
    lows, highs = confidence_sequence(drifting)
    assert (lows <= highs).all()
    assert (np.diff(lows) >= 0).all()


def test_single_precision_values_are_taken():
    values = np.random.default_rng(0).random(100)
    assert betting(values.astype(np.float32)) == pytest.approx(betting(values), abs=3e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no values: an interval needs at least one"),
        ([0.5, math.nan], r"value 1 is nan, expected a number in \[0, 1\]"),
        ([0.5, 0.2, 1.5], "value 2 is 1.5, expected"),
        ([-0.1], "value 0 is -0.1, expected"),
        ([math.inf], "value 0 is inf, expected"),
    ],
)
@pytest.mark.parametrize("method", [*RIGOROUS, confidence_sequence, bootstrap_mean])
def test_values_that_are_refused(method, values, message):
    extra = {"rng": np.random.default_rng(0)} if method is bootstrap_mean else {}
    with pytest.raises(EvaluationError, match=message):
        method(np.array(values, dtype=float), **extra)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_that_is_refused(delta):
    for method in (*RIGOROUS, confidence_sequence):
        with pytest.raises(EvaluationError, match="delta should be between 0 and 1"):
            method(np.array([0.5]), delta=delta)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_counts_that_are_refused(k, n):
    with pytest.raises(EvaluationError, match=f"{k} successes in {n} trials"):
        clopper_pearson(k, n)


def test_bootstrap_wants_resamples():
    with pytest.raises(EvaluationError, match="resamples should be >= 1, is 0"):
        bootstrap_mean(np.array([0.5]), rng=np.random.default_rng(0), resamples=0)


@pytest.mark.parametrize(
    ("uppers", "expected"),
    [
        ([0.3, 0.09, 0.08], 64),
        ([0.05, 0.11, 0.08], 256),
        ([0.05, 0.05, 0.11], None),
        ([0.1, 0.1, 0.1], 16),
    ],
)
def test_n_star_stops_at_the_first_failure_from_above(uppers, expected):
    assert n_star(np.array([16, 64, 256]), np.array(uppers), epsilon=0.1) == expected


def test_n_star_is_seldom_wrong():
    # Every size is just outside; its bound is nearly exact, so nothing but the order protects the claim.
    rng = np.random.default_rng(0)
    sizes, runs, queries = np.array([16, 64, 256, 1024]), 3000, 400
    upper = np.array([clopper_pearson(k, queries, side="upper").high for k in range(queries + 1)])
    wrong = 0
    for misses in rng.binomial(queries, 0.1001, size=(runs, len(sizes))):
        wrong += n_star(sizes, upper[misses], epsilon=0.1) is not None
    assert 0.01 < wrong / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize(
    ("sizes", "uppers", "message"),
    [
        ([], [], "at least one"),
        ([4, 4], [0.1, 0.1], "strictly increasing"),
        ([4, 8], [0.1, math.nan], "NaN"),
    ],
)
def test_n_star_refuses(sizes, uppers, message):
    with pytest.raises(EvaluationError, match=message):
        n_star(np.array(sizes, dtype=int), np.array(uppers, dtype=float), epsilon=0.1)


@pytest.mark.parametrize("law", ["bernoulli .05", "beta .71", "near 0"])
def test_a_hundred_thousand_values(law):
    values = LAWS[law][0](np.random.default_rng(0), 100_000)
    for method in (betting, confidence_sequence):
        tracemalloc.start()
        started = time.process_time()
        method(values)
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 3
        assert peak < 50e6
