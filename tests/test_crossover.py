"""Where curves cross, against roots of scipy and simulated coverage; and curves that were published."""

import numpy as np
import pytest
from scipy.optimize import brentq

from benchmarks.extrapolation import extrapolate, published
from evaluation.crossover import crossover
from evaluation.curve_points import Points
from evaluation.curves import Curve, fitted_curve
from icl_compiler.errors import EvaluationError

SIZES = np.array([8, 32, 128, 512, 2048])
PROMPT, TUNED = Curve("power", 0.25, 0.6, 0.8), Curve("power", 0.05, 1.2, 0.3)


def fitted(points, **more):
    return fitted_curve(points, **({"rng": np.random.default_rng(0), "resamples": 200} | more))


def exact(curve, sizes=SIZES):
    """Points without noise between queries."""
    return fitted(Points.from_queries(sizes, np.tile(curve.at(sizes.astype(float)), (50, 1))))


def root():
    return brentq(lambda n: float(np.diff([c.at(np.array([n]))[0] for c in (PROMPT, TUNED)])[0]), 8, 1e5)


def test_it_is_the_root_of_the_difference():
    found = crossover(exact(PROMPT), exact(TUNED))
    assert found.n == pytest.approx(root(), rel=0.01)
    assert found.first_is_lower
    assert found.low == found.high == found.n
    assert not crossover(exact(TUNED), exact(PROMPT)).first_is_lower


def test_curves_that_do_not_cross():
    found = crossover(exact(Curve("power", 0.1, 0.3, 0.5)), exact(Curve("power", 0.3, 0.5, 0.5)))
    assert found == (None, None, None, True, None)


def test_beyond_the_sizes_measured_it_is_a_guess_and_far_beyond_nothing():
    few = SIZES[:3]
    found = crossover(exact(PROMPT, few), exact(TUNED, few))
    assert 128 < root() < 4 * 128
    assert found.n == pytest.approx(root(), rel=0.02)
    assert found.warning.endswith("more than both curves were measured with (128): this is a guess")
    fewer = SIZES[:3] // 4
    assert crossover(exact(PROMPT, fewer), exact(TUNED, fewer)).n is None


def test_its_interval_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        curves = []
        for curve in (PROMPT, TUNED):
            means = curve.at(SIZES.astype(float))
            curves.append(fitted(Points.from_queries(SIZES, (rng.random((400, 1)) < means).astype(float))))
        found = crossover(*curves)
        low, high = (np.inf if end is None else end for end in (found.low, found.high))
        covered += low <= root() <= high
    assert covered >= 88, "of 100 intervals of 95 %, four standard errors below 95"


def test_curves_that_are_not_alike_are_refused():
    with pytest.raises(EvaluationError, match="fit both alike"):
        crossover(exact(PROMPT), fitted(Points.from_queries(SIZES, np.full((9, 5), 0.5)), level=0.9))
    with pytest.raises(EvaluationError, match="one curve begins at 512 examples, where the other has ended"):
        crossover(exact(PROMPT, SIZES[:3]), exact(TUNED, SIZES[3:]))


def test_published_curves(shared_data):
    """Fitted on the smaller half of the sizes; the numbers of docs/sweeps.md. A fit that became worse shows here."""
    found = [extrapolate(name, points) for name, points in published(shared_data).items()]
    assert len(found) == 9
    assert sum(each.covered_with_noise for each in found) >= 45
    assert sum(each.sizes for each in found) == 56
    assert np.median([each.mean_error for each in found]) <= 0.04
