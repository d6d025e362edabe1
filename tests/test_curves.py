"""Curves against their own parameters, scipy, numpy, closed forms, and simulated queries."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import least_squares

from evaluation import curves
from evaluation.curve_points import Points, resampled_means
from evaluation.curves import FORMS, Curve, Fit, Range, best_fit, fit, fitted_curve, slope
from icl_compiler.errors import EvaluationError

MANY = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000])
DOUBLING = 2 ** np.arange(2, 11)
TRUE = [
    Curve("power", 0.1, 0.5, 0.5),
    Curve("power", 0.0, 0.6, 0.3),
    Curve("power", 0.4, -0.3, 0.8),
    Curve("bounded power", 0.1, 0.5, 0.7, 30.0),
    Curve("bounded power", 0.05, 0.6, 1.5, 100.0),
    Curve("logistic", 0.1, 0.6, 1.3, 50.0),
    Curve("logistic", 0.02, 0.5, 2.0, 20.0),
]


def points_on(curve, sizes, error=0.01):
    return Points(sizes, curve.at(sizes.astype(float)), np.full(len(sizes), error))


def points_at(sizes, gaps, error=0.01):
    return Points(np.array(sizes), np.array(gaps, dtype=float), np.full(len(sizes), error))


def drawn(rng, curve, sizes, queries):
    """Gaps of queries that are easy or hard at all sizes alike, and a little more or less so at each."""
    hardness = rng.uniform(0.5, 1.5, (queries, 1)) * rng.uniform(0.5, 1.5, (queries, len(sizes)))
    return Points.from_queries(sizes, hardness * curve.at(sizes.astype(float)))


def bootstrapped(points, *, seed=0, resamples=200, form=None, level=0.95):
    return fitted_curve(points, rng=np.random.default_rng(seed), form=form, level=level, resamples=resamples)


def least_coverage(runs, nominal=0.95):
    return nominal - 3 * math.sqrt(nominal * (1 - nominal) / runs)


@pytest.mark.parametrize("curve", TRUE, ids=lambda curve: f"{curve.form} {curve.floor}")
def test_noiseless_curves_are_recovered(curve):
    found = fit(points_on(curve, MANY), curve.form)
    parameters = (found.curve.floor, found.curve.scale, found.curve.exponent)
    assert parameters == pytest.approx((curve.floor, curve.scale, curve.exponent), rel=1e-5, abs=1e-6)
    assert found.curve.knee == (None if curve.knee is None else pytest.approx(curve.knee, rel=1e-4))
    assert found.chi2 < 1e-10
    assert found.left_out < 1e-6
    assert best_fit(points_on(curve, MANY)).curve.form == curve.form


def test_the_forms_are_their_formulas():
    n = np.array([1.0, 7.0, 300.0])
    np.testing.assert_allclose(Curve("power", 0.1, 0.4, 0.7).at(n), 0.1 + 0.4 * n**-0.7)
    np.testing.assert_allclose(Curve("bounded power", 0.1, 0.4, 0.7, 9.0).at(n), 0.1 + 0.4 * (1 + n / 9) ** -0.7)
    np.testing.assert_allclose(Curve("logistic", 0.1, 0.4, 0.7, 9.0).at(n), 0.1 + 0.4 / (1 + (n / 9) ** 0.7))


@pytest.mark.parametrize("curve", TRUE, ids=lambda curve: f"{curve.form} {curve.floor}")
@pytest.mark.parametrize("n", [1.0, 30.0, 4000.0])
def test_slopes_are_derivatives(curve, n):
    low, high = curve.at(np.array([n * math.exp(-1e-5), n * math.exp(1e-5)]))
    assert curve.slope_at(n) == pytest.approx(math.log(high / low) / 2e-5, abs=1e-6)


NOISY = {
    "falls": [0.61, 0.55, 0.47, 0.33, 0.28, 0.19, 0.21, 0.14],
    "falls, then rises": [0.5, 0.42, 0.3, 0.22, 0.2, 0.24, 0.3, 0.33],
    "up and down": [0.3, 0.2, 0.35, 0.1, 0.25, 0.12, 0.3, 0.2],
    "rises": [0.1, 0.12, 0.11, 0.16, 0.2, 0.27, 0.3, 0.31],
    "drops to nothing": [0.9, 0.88, 0.5, 0.1, 0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NOISY)
def test_no_search_of_scipy_finds_a_better_curve(form, name):
    sizes = np.array([1, 4, 16, 32, 64, 128, 512, 1024])
    errors = np.array([0.03, 0.02, 0.02, 0.01, 0.02, 0.01, 0.03, 0.01])
    gaps = np.array(NOISY[name])
    found = fit(Points(sizes, gaps, errors), form)

    def shape(c, knee):
        return {
            "power": lambda: sizes ** -float(c),
            "bounded power": lambda: (1 + sizes / knee) ** -c,
            "logistic": lambda: 1 / (1 + (sizes / knee) ** c),
        }[form]()

    def residuals(parameters):
        first, floor, log_c, log_knee = parameters
        falls = shape(math.exp(log_c), math.exp(log_knee))
        falls = falls / falls[0]
        return (floor + (first - floor) * falls - gaps) / errors

    rng = np.random.default_rng(0)
    low = np.array([0, 0, math.log(0.05), math.log(0.1)])
    high = np.array([1, 1, math.log(5), math.log(10240)])
    least = min(2 * least_squares(residuals, rng.uniform(low, high), bounds=(low, high)).cost for _ in range(12))
    assert found.chi2 <= least * (1 + 1e-5) + 1e-9
    assert found.chi2 == pytest.approx(float((((found.curve.at(sizes.astype(float)) - gaps) / errors) ** 2).sum()))
    assert 0.05 * (1 - 1e-9) <= found.curve.exponent <= 5 * (1 + 1e-9)


@given(data=st.data(), count=st.integers(2, 8))
@settings(max_examples=12, deadline=None)
def test_values_stay_between_0_and_1(data, count):
    gaps = data.draw(arrays(np.float64, count, elements=st.floats(0, 1)))
    steps = data.draw(arrays(np.int64, count, elements=st.integers(1, 500)))
    sizes = steps.cumsum()
    found = fit(Points(sizes, gaps, np.full(count, 0.02)))
    curve = found.curve
    assert 0 <= curve.floor <= 1
    inside = sizes[0] * np.array([1.0, 1.5, 3, 10, 1e3, 1e9])
    unclipped = curve.floor + curve.scale * inside**-curve.exponent
    if curve.form == "bounded power":
        unclipped = curve.floor + curve.scale * (1 + inside / curve.knee) ** -curve.exponent
    assert unclipped.min() >= -1e-9
    assert unclipped.max() <= 1 + 1e-9
    low, high = (0.1, 2) if count < 6 else (0.05, 5)
    assert low * (1 - 1e-9) <= curve.exponent <= high * (1 + 1e-9)


def test_weights_are_those_of_the_errors():
    sizes, gaps = np.array([1, 4, 16, 64, 256]), np.array([0.5, 0.3, 0.6, 0.15, 0.125])
    curve = Curve("power", 0.1, 0.4, 0.5)
    found = fit(Points(sizes, gaps, np.array([0.01, 0.01, 1e4, 0.01, 0.01]))).curve
    assert (found.floor, found.scale, found.exponent) == pytest.approx((0.1, 0.4, 0.5), abs=1e-4)
    equal = fit(Points(sizes, gaps, np.full(5, 0.01))).curve
    assert equal.at(np.array([16.0]))[0] > curve.at(np.array([16.0]))[0] + 0.05
    close = fit(Points(sizes, gaps, np.array([0.01, 0.01, 1e-6, 0.01, 0.01]))).curve
    assert close.at(np.array([16.0]))[0] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_sizes_get_a_power_curve(count):
    points = points_on(Curve("power", 0.0, 0.4, 0.5), 4 ** np.arange(count))
    found = fit(points)
    assert found.curve.form == best_fit(points).curve.form == "power"
    assert found.chi2 < 1e-10
    if count > 2:
        assert (found.curve.floor, found.curve.exponent) == pytest.approx((0.0, 0.5), abs=1e-4)
    assert (found.left_out is None) == (count < 4)
    assert (found.aicc == math.inf) == (count < 5)
    assert bootstrapped(points).floor_is_unidentified or count >= 4
    for form in ("bounded power", "logistic"):
        with pytest.raises(EvaluationError, match=f"a {form} curve needs at least 6 sizes, there are {count}"):
            fit(points, form)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", [[10**9, 10**9 + 1], [10**6 + step for step in range(7)], [1, 10**12]])
def test_sizes_close_together_and_far_apart(sizes):
    points = points_at(sizes, np.linspace(0.5, 0.3, len(sizes)))
    found = bootstrapped(points, resamples=10)
    assert 0 <= found.fit.curve.floor <= 0.5
    assert found.fit.curve.at(np.array([float(sizes[0])]))[0] == pytest.approx(0.4, abs=0.11)


def test_exponents_of_few_sizes_stay_within_their_range():
    steep = points_at([1, 2, 4, 8, 16], [0.9, 0.11, 0.05, 0.04, 0.04])
    assert fit(steep).curve.exponent == pytest.approx(2)
    slow = points_at([1, 10, 100, 1000, 10000], [0.50, 0.49, 0.48, 0.47, 0.46])
    assert fit(slow).curve.exponent * (1 + 1e-9) >= 0.1
    assert fit(slow).curve.exponent < 0.15


def test_aicc_is_its_formula():
    points = points_at(MANY, np.linspace(0.5, 0.1, 11))
    for form, k in (("power", 3), ("logistic", 4)):
        found = fit(points, form)
        assert found.aicc == pytest.approx(found.chi2 + 2 * k + 2 * k * (k + 1) / (11 - k - 1))
    two_left = fit(points_at(MANY[:10], np.linspace(0.5, 0.1, 11)[:10]), "logistic").curve
    expected = abs(two_left.at(np.array([2000.0]))[0] - 0.1)
    assert fit(points, "logistic").left_out == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("power", "logistic", "expected"),
    [
        ((9, 0.02), (11, 0.02), "bounded power"),
        ((9, 0.005), (11, 0.02), "power"),
        ((11, 0.005), (11, 0.005), "bounded power"),
        ((9, 0.005), (8, 0.009), "logistic"),
        ((9, 0.005), (8, 0.02), "power"),
    ],
)
def test_another_form_needs_both_criteria(monkeypatch, power, logistic, expected):
    said = {"bounded power": (10.0, 0.01), "power": power, "logistic": logistic}

    def known(points, form="bounded power"):
        aicc, left_out = said[form]
        return Fit(Curve(form, 0.1, 0.1, 1.0), 1.0, float(aicc), left_out)

    monkeypatch.setattr(curves, "fit", known)
    assert best_fit(points_on(TRUE[0], MANY)).curve.form == expected


def test_curves_that_start_flat_are_not_fitted_by_powers():
    points = drawn(np.random.default_rng(0), Curve("bounded power", 0.05, 0.38, 1.2, 60.0), MANY, 300)
    assert fit(points, "power").chi2 > 10 * fit(points).chi2
    assert best_fit(points).curve.form != "power"


def test_the_same_seed_gives_the_same_numbers():
    points = drawn(np.random.default_rng(0), TRUE[0], DOUBLING, 50)
    first, second = (bootstrapped(points, seed=3, resamples=20) for _ in range(2))
    np.testing.assert_array_equal(first.resampled, second.resampled)
    assert fit(points) == fit(points)
    assert not np.array_equal(bootstrapped(points, seed=4, resamples=20).resampled, first.resampled)


def test_a_fit_does_not_depend_on_the_others_of_its_batch():
    points = drawn(np.random.default_rng(0), TRUE[0], DOUBLING, 50)
    few, many = bootstrapped(points, resamples=5, form="power"), bootstrapped(points, resamples=300, form="power")
    means = resampled_means(points, 300, np.random.default_rng(0))
    alone = fit(Points(DOUBLING, means[299], points.errors), many.fit.curve.form).curve
    n = np.array([50.0])
    there = Curve(many.fit.curve.form, *map(float, many.resampled[299])).at(n)
    assert there == pytest.approx(alone.at(n), abs=1e-5)
    assert few.fit == many.fit


def test_queries_are_resampled_jointly():
    # Only the difficulty of queries varies: whichever are drawn, the curve is the same one times a number.
    sizes = 4 ** np.arange(5)
    hardness = np.random.default_rng(0).uniform(0.2, 1.8, (100, 1))
    points = Points.from_queries(sizes, hardness * 0.5 / np.sqrt(sizes))
    found = bootstrapped(points)
    for value, (low, high) in (
        (0.5, found.interval("exponent")),
        (-0.5, found.slope_at(16).interval),
        (-0.5, slope(points).interval),
    ):
        assert low == pytest.approx(value, abs=1e-3)
        assert high == pytest.approx(value, abs=1e-3)
    low, high = found.predict(16).interval
    assert high - low > 0.01
    # The means alone do not tell.
    apart = bootstrapped(Points(points.sizes, points.gaps, points.errors))
    low, high = apart.interval("exponent")
    assert high - low > 0.05


def test_bootstrap_intervals_cover():
    truth, runs = Curve("power", 0.05, 0.6, 0.5), 100
    rng = np.random.default_rng(1)
    found = [
        bootstrapped(drawn(rng, truth, DOUBLING, 200), seed=run, form="power", resamples=150) for run in range(runs)
    ]
    # Each quantity: its true value, the estimates, and their intervals.
    cases = {
        "floor": (0.05, [(each.fit.curve.floor, each.interval("floor")) for each in found]),
        "exponent": (0.5, [(each.fit.curve.exponent, each.interval("exponent")) for each in found]),
        "slope": (truth.slope_at(1024.0), [each.slope_at(1024) for each in found]),
        "gap": (float(truth.at(np.array([2048.0]))[0]), [each.predict(2048)[:2] for each in found]),
        "examples": (144, [(each.examples_until(0.1).n, each.examples_until(0.1)[1:3]) for each in found]),
    }
    for name, (value, estimates) in cases.items():
        ends = np.array([interval for _, interval in estimates], dtype=float)
        covered = (ends[:, 0] <= value) & (value <= ends[:, 1])
        assert covered.mean() >= least_coverage(runs), name
        # Nor are they wide: as wide as the estimates scatter.
        scatter = 2 * 1.96 * np.std([estimate for estimate, _ in estimates])
        assert 0.75 < np.median(ends[:, 1] - ends[:, 0]) / scatter < 1.3, name


def test_an_unidentified_floor_is_flagged():
    rng = np.random.default_rng(2)
    falling = Curve("power", 0.05, 0.39, 0.2)
    flags = [bootstrapped(drawn(rng, falling, 2 ** np.arange(7), 80), seed=run, resamples=100) for run in range(10)]
    assert np.mean([each.floor_is_unidentified for each in flags]) >= 0.8
    level = Curve("bounded power", 0.1, 0.34, 1.5, 8.0)
    flags = [bootstrapped(drawn(rng, level, MANY, 300), seed=run, resamples=100) for run in range(10)]
    assert np.mean([each.floor_is_unidentified for each in flags]) <= 0.1


@pytest.mark.parametrize("level", [0.3, 0.0, 1.0])
@pytest.mark.parametrize("sizes", [MANY, MANY[:2], MANY[:5]])
def test_flat_curves(level, sizes):
    points = Points.from_queries(sizes, np.full((20, len(sizes)), level))
    for form in FORMS if len(sizes) > 5 else ["power"]:
        found = bootstrapped(points, form=form, resamples=20)
        there = found.predict(10 * int(sizes[-1]))
        assert (there.gap, *there.interval) == pytest.approx((level,) * 3, abs=1e-6)
        assert found.slope_at(int(sizes[-1])).value == pytest.approx(0, abs=1e-5)
        if level > 0:
            assert found.examples_until(level / 2)[:3] == (None, None, None)
        if level < 1:
            assert found.examples_until(level + 0.01)[:3] == (1, 1, 1)


def test_noisy_flat_curves_have_no_slope():
    points = drawn(np.random.default_rng(5), Curve("power", 0.3, 0.0, 0.5), DOUBLING, 300)
    found = slope(points)
    assert found.interval.low < 0 < found.interval.high
    assert found.interval.high - found.interval.low < 0.05
    assert bootstrapped(points, resamples=20).predict(64).gap == pytest.approx(0.3, abs=0.03)


def test_gaps_of_zero_are_fitted_but_have_no_logarithm():
    rng = np.random.default_rng(0)
    per_query = rng.uniform(0, 0.5, (100, 6)) * np.array([1.0, 0.5, 0.2, 0.0, 0.0, 0.0])
    points = Points.from_queries(4 ** np.arange(6), per_query)
    assert (points.errors > 0).all()
    found = bootstrapped(points)
    assert found.fit.curve.floor < 0.01
    assert not found.floor_is_unidentified
    assert found.predict(1024).gap < 0.01
    assert found.examples_until(0.05).n <= 64
    with pytest.raises(EvaluationError, match="the gap with 64 examples is 0, which has no logarithm"):
        slope(points)


@pytest.mark.parametrize("name", ["falls, then rises", "up and down", "rises"])
def test_nothing_forces_a_curve_to_fall(name):
    gaps = np.array(NOISY[name])
    points = points_at(4 ** np.arange(8), gaps)
    found = bootstrapped(points, resamples=50)
    assert found.fit.chi2 == pytest.approx(
        float((((found.fit.curve.at(points.sizes.astype(float)) - gaps) / points.errors) ** 2).sum())
    )
    if name == "rises":
        assert found.fit.curve.scale < 0
        assert found.slope_at(64).interval.low > 0
        assert found.examples_until(0.05).n is None
        assert found.examples_until(0.15).n == 1


@pytest.mark.parametrize("curve", [each for each in TRUE if each.scale > 0], ids=lambda curve: curve.form)
@pytest.mark.parametrize("epsilon", [0.12, 0.2, 0.3])
def test_examples_until_is_the_smallest_number(curve, epsilon):
    n = bootstrapped(points_on(curve, MANY), form=curve.form, resamples=1).examples_until(epsilon).n
    before, there = curve.at(np.array([n - 1.0, float(n)]))
    assert there <= epsilon + 1e-6
    assert before > epsilon - 1e-6


def test_examples_until_in_closed_form():
    found = bootstrapped(points_on(TRUE[0], MANY), form="power", resamples=1)
    assert found.examples_until(0.3).n == math.ceil((0.5 / 0.2) ** 2)
    assert found.examples_until(0.11).n == 2500
    assert found.examples_until(0.11).warning is None
    assert found.examples_until(0.105).warning == (
        "10,000 examples are 5.0 times the largest size measured (2,000): no measurement supports this"
    )
    assert found.examples_until(0.0999).n is None
    assert found.examples_until(0.05)[::3] == (None, None)
    assert found.examples_until(0.6).n == 1
    later = bootstrapped(points_on(TRUE[0], MANY[4:]), form="power", resamples=1)
    assert later.examples_until(0.5).n == 20


def test_the_interval_of_examples_is_open_where_the_floor_may_be_above():
    points = drawn(np.random.default_rng(3), Curve("power", 0.05, 0.6, 0.5), DOUBLING, 200)
    found = bootstrapped(points, form="power")
    floors = found.interval("floor")
    inside = (floors.low + floors.high) / 2
    low, high = found.examples_until(inside)[1:3]
    assert high is None
    assert low is not None
    n, low, high, _ = found.examples_until(0.1)
    assert low <= n <= high
    # What the curve needs to come within epsilon is what it predicts to be within.
    assert found.predict(high).interval.high == pytest.approx(0.1, abs=0.005)


def test_predictions_warn_outside_of_the_sizes():
    found = bootstrapped(points_on(TRUE[0], MANY[2:]), form="power", resamples=5)
    assert found.predict(5).warning is None
    assert found.predict(4000).warning is None
    assert found.predict(4001).warning.endswith("the largest size measured (2,000): this is a guess")
    assert found.predict(8001).warning.endswith("(2,000): no measurement supports this")
    assert found.predict(4).warning == "4 examples are fewer than the smallest size measured (5): this is a guess"
    assert found.predict(1).gap == pytest.approx(0.6)


def test_intervals_follow_the_level():
    points = drawn(np.random.default_rng(0), Curve("power", 0.05, 0.6, 0.5), DOUBLING, 100)
    narrow, wide = (bootstrapped(points, form="power", level=level).interval("exponent") for level in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(EvaluationError, match="a power curve has no knee"):
        bootstrapped(points, form="power", resamples=1).interval("knee")
    assert bootstrapped(points, form="logistic", resamples=1).interval("knee").low > 0


def test_percentiles_take_infinite_values():
    values = np.array([math.inf, 3.0, 1.0, math.inf, 2.0])
    assert curves._percentiles(values, 0.95) == Range(1.0, math.inf)
    assert curves._percentiles(values, 0.5) == Range(2.0, math.inf)
    assert curves._percentiles(np.arange(1001.0), 0.95) == Range(25.0, 975.0)


def test_errors_count_one_query_more():
    per_query = np.random.default_rng(0).random((50, 3))
    points = Points.from_queries(np.array([1, 2, 3]), per_query)
    for column, error in zip(per_query.T, points.errors, strict=True):
        squares = (np.concatenate([column, [column.mean() + 0.5]]) - column.mean()) ** 2
        assert error == pytest.approx(math.sqrt(squares.mean() / 50))
    single = Points.from_queries(np.array([1, 2, 3]), per_query.astype(np.float32))
    np.testing.assert_allclose(single.gaps, points.gaps, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_slope_of_a_power_is_its_exponent(exponent):
    points = points_on(Curve("power", 0.0, 0.8, exponent), MANY)
    assert slope(points).value == pytest.approx(-exponent)
    with_floor = points_on(Curve("power", 0.1, 0.8, exponent), MANY)
    assert -exponent < slope(with_floor).value < 0


def test_the_slope_against_polyfit():
    sizes, gaps = np.array([1, 4, 16, 64, 300]), np.array([0.5, 0.31, 0.22, 0.08, 0.07])
    errors = np.array([0.03, 0.02, 0.01, 0.02, 0.01])
    (value, _), covariance = np.polyfit(np.log(sizes), np.log(gaps), 1, w=gaps / errors, cov="unscaled")
    found = slope(Points(sizes, gaps, errors))
    assert found.value == pytest.approx(value)
    radius = 1.959964 * math.sqrt(covariance[0, 0])
    assert found.interval == pytest.approx((value - radius, value + radius))
    narrow = slope(Points(sizes, gaps, errors), level=0.5).interval
    assert found.interval.low < narrow.low < narrow.high < found.interval.high


def test_intervals_of_slopes_cover():
    truth, runs = Curve("power", 0.0, 0.8, 0.5), 400
    rng = np.random.default_rng(4)
    found = [slope(drawn(rng, truth, DOUBLING, 100)) for _ in range(runs)]
    covered = np.mean([each.interval.low <= -0.5 <= each.interval.high for each in found])
    assert least_coverage(runs) <= covered <= 0.985
    # Means alone know nothing of what sizes share, and are too careful.
    points = drawn(rng, truth, DOUBLING, 100)
    apart = slope(Points(points.sizes, points.gaps, points.errors)).interval
    together = slope(points).interval
    assert apart.high - apart.low > 1.2 * (together.high - together.low)


def test_points_from_intervals_are_points_from_their_errors():
    gaps, errors = np.array([0.4, 0.2, 0.1]), np.array([0.03, 0.02, 0.01])
    sizes = np.array([1, 8, 64])
    for level, width in ((0.95, 1.959964), (0.8, 1.281552)):
        points = Points.from_intervals(sizes, gaps, gaps - width * errors, gaps + width * errors, level=level)
        np.testing.assert_allclose(points.errors, errors, rtol=1e-6)
    assert fit(points).curve.at(np.array([8.0])) == pytest.approx(
        fit(Points(sizes, gaps, errors)).curve.at(np.array([8.0]))
    )
    low, high = bootstrapped(points, resamples=600).predict(64).interval
    assert high - low == pytest.approx(2 * 1.96 * 0.01, rel=0.2)


@pytest.mark.parametrize("sizes", [[], [4], [4, 4], [16, 4], [0, 4], [1, 4, 2]])
def test_sizes_that_are_refused(sizes):
    match = r"sizes should be at least two, at least 1 and strictly increasing, are \["
    with pytest.raises(EvaluationError, match=match):
        Points(np.array(sizes, dtype=int), np.full(len(sizes), 0.5), np.full(len(sizes), 0.1))
    with pytest.raises(EvaluationError, match=match):
        Points.from_queries(np.array(sizes, dtype=int), np.full((9, len(sizes)), 0.5))


@pytest.mark.parametrize("gap", [-0.1, 1.1, math.nan, math.inf])
def test_gaps_that_are_refused(gap):
    with pytest.raises(EvaluationError, match=rf"gaps should be in \[0, 1\], one is {gap}"):
        points_at([1, 2], [0.5, gap])
    with pytest.raises(EvaluationError, match=rf"gaps should be in \[0, 1\], one is {gap}"):
        Points.from_queries(np.array([1, 2]), np.array([[0.1, 0.2], [0.3, gap]]))


@pytest.mark.parametrize("error", [0.0, -0.1, math.nan, math.inf])
def test_errors_that_are_refused(error):
    with pytest.raises(EvaluationError, match="standard errors should be above 0 and finite"):
        Points(np.array([1, 2]), np.array([0.5, 0.4]), np.array([0.1, error]))


def test_arguments_that_are_refused():
    points = points_on(TRUE[0], MANY)
    rng = np.random.default_rng(0)
    with pytest.raises(EvaluationError, match="a curve needs at least two queries, there are 1"):
        Points.from_queries(np.array([1, 2]), np.array([[0.5, 0.4]]))
    with pytest.raises(EvaluationError, match="resamples should be >= 1, is 0"):
        fitted_curve(points, rng=rng, resamples=0)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(EvaluationError, match="level should be between 0 and 1, both excluded"):
            fitted_curve(points, rng=rng, level=level)
        with pytest.raises(EvaluationError, match="level should be between 0 and 1, both excluded"):
            slope(points, level=level)
    found = bootstrapped(points, resamples=1)
    with pytest.raises(EvaluationError, match="epsilon should be between 0 and 1, both excluded, is 0"):
        found.examples_until(0.0)
    for ask in (found.predict, found.slope_at):
        with pytest.raises(EvaluationError, match="n should be >= 1 examples, is 0"):
            ask(0)


def test_seeds_are_a_level_of_the_bootstrap():
    """The spread of resampled means against that of the means of a design with two crossed factors."""
    rng = np.random.default_rng(0)
    queries, seeds = 200, 4
    of_query, of_seed = rng.normal(0, 0.1, (1, queries, 1)), rng.normal(0, 0.03, (seeds, 1, 1))
    gaps = np.clip(0.5 + of_query + of_seed + rng.normal(0, 0.02, (seeds, queries, 3)), 0, 1)
    points = Points.from_seeds(np.array([1, 4, 16]), gaps)
    np.testing.assert_allclose(points.gaps, gaps.mean(axis=(0, 1)))
    between = gaps.mean(axis=1).var(axis=0, ddof=1) / seeds
    within = gaps.mean(axis=0).var(axis=0, ddof=1) / queries
    drawn = resampled_means(points, 4000, np.random.default_rng(1))
    np.testing.assert_allclose(drawn.var(axis=0), between + within, rtol=0.1)
    np.testing.assert_allclose(points.errors**2, between + within, rtol=0.1)
    alone = resampled_means(Points.from_queries(points.sizes, gaps.mean(axis=0)), 4000, np.random.default_rng(1))
    assert (drawn.var(axis=0) > 2 * alone.var(axis=0)).all()
    assert np.corrcoef(drawn.T).min() > 0.9, "what seeds and queries have in common across sizes stays"
    one = Points.from_seeds(points.sizes, gaps[:1])
    np.testing.assert_array_equal(one.errors, Points.from_queries(points.sizes, gaps[0]).errors)
    assert one.per_seed is None


def test_a_curve_that_fits_is_seldom_called_a_misfit() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([16, 64, 256, 1024])
    gaps = 0.05 + 1.2 / np.sqrt(sizes)
    found = [
        fitted_curve(Points(sizes, rng.normal(gaps, 0.02).clip(0, 1), np.full(4, 0.02)), rng=rng, resamples=5).misfit
        for _ in range(200)
    ]
    assert np.mean([each is not None for each in found]) <= 0.03


def test_a_misfit_is_named_where_it_is_worst() -> None:
    points = Points(np.array([16, 128, 1024, 9992]), np.array([0.9, 0.9, 0.2, 0.2]), np.full(4, 0.02))
    said = fitted_curve(points, rng=np.random.default_rng(0), resamples=5).misfit
    assert said is not None
    assert re.fullmatch(r"with 1,?\d+ examples it says 0\.\d\d, and 0\.[29]0 was measured", said)
    wide = Points(points.sizes, points.gaps, np.full(4, 0.5))
    assert fitted_curve(wide, rng=np.random.default_rng(0), resamples=5).misfit is None
