import numpy as np
import pytest

from evaluation.gap import calibration_error, gap, require_known
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
    with pytest.raises(EvaluationError, match=r"1 labels that the program does not know \('c'\)"):
        require_known(("a", "b"), ("a", "c"))
