import numpy as np
import pytest

from evaluation.gap import calibration_error, gap, require_known
from evaluation.intervals import betting
from icl_compiler.backends.backend import Usage
from icl_compiler.errors import EvaluationError
from icl_compiler.predictor import Predictions


def said(labels: tuple[str, ...], *laws: tuple[float, ...]) -> Predictions:
    return Predictions(labels, np.array(laws), np.ones(len(laws), dtype=np.int64), Usage(0, 0, 0), 0.0)


def test_gap_by_hand_with_other_and_labels_in_another_order() -> None:
    first = said(("a", "b"), (0.5, 0.3), (1.0, 0.0))
    second = said(("b", "a"), (0.3, 0.1), (0.5, 0.5))
    # query 1: |.5-.1| + |.3-.3| + |.2-.6| = .8, halved .4; query 2: |1-.5| + |0-.5| + 0 = 1, halved .5
    found = gap(first, second)
    np.testing.assert_allclose(found.per_query, [0.4, 0.5])
    assert found.mean == pytest.approx(0.45)
    assert found.interval.low <= 0.45 <= found.interval.high


def test_gap_to_itself_is_zero_and_to_the_opposite_one() -> None:
    first = said(("a", "b"), *[(1.0, 0.0)] * 300)
    opposite = said(("a", "b"), *[(0.0, 1.0)] * 300)
    assert gap(first, first).mean == 0
    assert gap(first, opposite).mean == 1
    assert gap(first, first).interval.high < 0.02


def test_wider_level_wider_interval() -> None:
    rng = np.random.default_rng(0)
    laws = rng.dirichlet([1, 1, 1], 100)[:, :2]
    first, second = said(("a", "b"), *laws), said(("a", "b"), *laws[::-1])
    wide, narrow = gap(first, second, level=0.99).interval, gap(first, second, level=0.8).interval
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_file_sorted_by_label_has_the_interval_of_a_shuffled_one() -> None:
    laws = [(1.0, 0.0)] * 150 + [(0.0, 1.0)] * 150
    found = gap(said(("a", "b"), *laws), said(("a", "b"), *[(1.0, 0.0)] * 300)).interval
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.2


def bounded(said: Predictions, rng: np.random.Generator) -> Predictions:
    """Bounds around the probabilities: those below .2 are not given."""
    given = said.probabilities >= 0.2
    upper = np.where(given, said.probabilities, 0.2 + 0.1 * rng.random(given.shape))
    return said._replace(probabilities=np.where(given, said.probabilities, 0.0), upper=upper)


def test_gap_of_bounds_by_hand() -> None:
    # b of the first query is between 0 and .2, "other" between .3 and .5: |.5-.3| + |b-.1| + |.5-b-.6|, halved.
    first = said(("a", "b"), (0.5, 0.0), (1.0, 0.0))._replace(upper=np.array([[0.5, 0.2], [1.0, 0.0]]))
    second = said(("b", "a"), (0.1, 0.3), (0.5, 0.5))
    for found in (gap(first, second), gap(second, first)):
        assert found.bounds == pytest.approx(((0.2 + 0.5) / 2, (0.3 + 0.5) / 2))
        np.testing.assert_allclose(found.per_query, [0.25, 0.5])
        assert found.mean == pytest.approx(0.375)


def test_bounds_hold_the_exact_gap_and_their_interval_its_interval() -> None:
    rng = np.random.default_rng(0)
    first, second = (said(("a", "b", "c"), *rng.dirichlet(np.ones(4), 200)[:, :3]) for _ in range(2))
    exact, wide = gap(first, second), gap(bounded(first, rng), second)
    assert wide.bounds is not None
    assert wide.bounds.low < exact.mean < wide.bounds.high
    assert wide.interval.low < exact.interval.low < exact.interval.high < wide.interval.high
    assert wide.interval.low < wide.bounds.low < wide.mean < wide.bounds.high < wide.interval.high
    both = gap(bounded(first, rng), bounded(second, rng))
    assert both.bounds is not None
    assert both.bounds.low < wide.bounds.low
    assert wide.bounds.high < both.bounds.high


def test_the_ends_are_those_of_the_lowest_and_of_the_highest_at_the_whole_level() -> None:
    # Against a law of "other" alone, the gap is what the labels have: b is between 0 and .2.
    rng = np.random.default_rng(1)
    a = rng.random(300) / 2
    first = said(("a", "b"), *np.stack([a, 0 * a], axis=1))._replace(upper=np.stack([a, 0 * a + 0.2], axis=1))
    found = gap(first, said(("a", "b"), *[(0.0, 0.0)] * 300), level=0.9)
    order = np.random.default_rng(0).permutation(300)
    low, high = betting(a[order], delta=0.1).low, betting(a[order] + 0.2, delta=0.1).high
    assert found.interval == pytest.approx((low, high), abs=1e-5)


def test_upper_bounds_that_are_the_probabilities_change_nothing() -> None:
    first, second = said(("a", "b"), (0.5, 0.3), (1.0, 0.0)), said(("a", "b"), (0.3, 0.1), (0.5, 0.5))
    exact, same = gap(first, second), gap(first._replace(upper=first.probabilities), second)
    assert same.bounds is exact.bounds is None
    assert (same.mean, same.interval) == (exact.mean, exact.interval)


def test_other_labels_are_no_gap() -> None:
    with pytest.raises(EvaluationError, match="same labels and texts"):
        gap(said(("a", "b"), (0.5, 0.5)), said(("a", "c"), (0.5, 0.5)))


def test_calibration_error_of_a_calibrated_predictor_is_small() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = (rng.random(20_000) < confidence).astype(float)
    assert calibration_error(confidence, right) < 0.01
    assert calibration_error(confidence, np.zeros(20_000)) == pytest.approx(0.5, abs=0.01)
    assert calibration_error(np.array([1.0]), np.array([1.0])) == 0


def test_unknown_test_label_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"has 1 label that the program does not know \('c'\)"):
        require_known(("a", "b"), ("a", "c"))
    with pytest.raises(EvaluationError, match="has 2 labels that the program does not know"):
        require_known(("a", "b"), ("d", "c"))
