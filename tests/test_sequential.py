"""Stopping early: against the whole confidence sequence, by simulation, and on the echo backend."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import binom
from test_evaluate import TEST, zero_shot_answers
from toys import TopEcho, customers

from benchmarks.coverage import LAWS, interval_rows, least_of_any_test, sequence_rows, sequences, stopping_rows
from evaluation.asking import BATCH, Remembering, ask_until_decided, in_random_order
from evaluation.evaluate import evaluate, with_examples
from evaluation.gap import gap
from evaluation.intervals import betting, confidence_sequence
from evaluation.sequential import until_decided
from evaluation.tv import Sandwich
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.errors import DataError, EvaluationError
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program

RUNS = 150


def exact(gaps: np.ndarray) -> Sandwich:
    return Sandwich(gaps, gaps)


@pytest.mark.parametrize("epsilon", [0.1, 0.15, 0.25, 0.3])
def test_it_stops_after_the_first_batch_that_decides(epsilon: float) -> None:
    gaps = np.random.default_rng(2).beta(2, 8, 600)
    taken = []

    def batches() -> Iterator[Sandwich]:
        for first in range(0, 600, 20):
            taken.append(first)
            yield exact(gaps[first : first + 20])

    found = until_decided(batches(), epsilon=epsilon)
    lows, highs = confidence_sequence(gaps)
    looks = [t for t in range(20, 601, 20) if highs[t - 1] <= epsilon or lows[t - 1] > epsilon]
    assert found.queries == looks[0] == 20 * len(taken) < 600
    assert found.interval == (lows[looks[0] - 1], highs[looks[0] - 1])
    assert found.answer == ("within" if epsilon > 0.2 else "not within")


def test_what_is_not_decided_says_so_and_bounds_count_at_their_ends() -> None:
    gaps = np.full(100, 0.1)
    assert until_decided([exact(gaps)], epsilon=0.1).answer == "undecided"
    wide = Sandwich(gaps, gaps + 0.1)
    assert until_decided([exact(gaps)], epsilon=0.15).answer == "within"
    found = until_decided([wide] * 9, epsilon=0.15)
    assert (found.answer, found.queries) == ("undecided", 900)
    low, high = (confidence_sequence(np.tile(ends, 9)) for ends in wide)
    assert found.interval == (low.lows[-1], high.highs[-1])


def test_what_is_refused() -> None:
    with pytest.raises(EvaluationError, match="epsilon should be between 0 and 1, both excluded, is 0"):
        until_decided([exact(np.zeros(3))], epsilon=0.0)
    with pytest.raises(EvaluationError, match="level should be between 0 and 1, both excluded, is 95"):
        until_decided([exact(np.zeros(3))], epsilon=0.1, level=95.0)
    with pytest.raises(EvaluationError, match="no queries"):
        until_decided([], epsilon=0.1)


@pytest.mark.parametrize("law", LAWS)
def test_simulated_coverage_and_decisions(law: str) -> None:
    """What `benchmarks/coverage.py` shows with 1,000 runs, with fewer: as many misses as chance allows."""
    misses = binom.ppf(0.999, RUNS, 0.05)
    lows, highs = sequences(law, runs=RUNS, most=200)
    rows = [*interval_rows(law, runs=RUNS, sizes=(50, 200)), *sequence_rows(law, lows, highs)]
    for row in rows:
        assert round((1 - row["coverage"]) * RUNS) <= misses
        assert row.get("false_within", 0.0) * RUNS <= binom.ppf(0.999, RUNS, 0.025)
        if law.startswith("toy") and row["what"] == "interval" and row["n"] == 200:
            assert row["width"] <= row["hoeffding_width"] / 2
    for row in stopping_rows(law, lows, highs, known=False):
        assert row["queries"] <= 200
        if row["distance"] == 0.2:
            assert row["right"] >= 0.95


@pytest.mark.parametrize(("law", "p", "epsilon"), [("bernoulli .5", 0.5, 0.55), ("bernoulli .05", 0.05, 0.15)])
def test_the_least_of_any_test_is_walds_for_a_coin(law: str, p: float, epsilon: float) -> None:
    divergence = p * np.log(p / epsilon) + (1 - p) * np.log((1 - p) / (1 - epsilon))
    expected = (0.95 * np.log(19) + 0.05 * np.log(1 / 19)) / divergence
    assert least_of_any_test(LAWS[law], epsilon) == pytest.approx(expected, rel=0.05)  # of drawn values
    if p == 0.5:
        assert 500 < expected < 550, "two times fewer than 738 are beyond any test"


@pytest.fixture
def program() -> Program:
    return compile_program(customers(), model="echo", retriever="bm25", shots=3, budget=10_000)


def reference_of(program: Program) -> PromptedPredictor:
    return PromptedPredictor(compile_program(customers(), model="echo", retriever="uniform", shots=0), EchoBackend())


def test_queries_come_in_an_order_that_goes_on() -> None:
    few, many = in_random_order(TEST, 10, seed=3), in_random_order(TEST, 40, seed=3)
    assert many.texts[:10] == few.texts
    assert many.texts != TEST.texts[:40]
    assert sorted(in_random_order(TEST, None, seed=3).texts) == sorted(TEST.texts)
    with pytest.raises(DataError, match="--queries 46 exceeds the 45 rows"):
        in_random_order(TEST, 46, seed=3)


def test_both_models_are_asked_until_it_is_decided_and_no_longer(program: Program) -> None:
    data = in_random_order(TEST, None, seed=0)
    reference, bar = reference_of(program), []
    found = ask_until_decided(program, EchoBackend(), reference, data, epsilon=0.9, progress=bar.append)
    whole = gap(PromptedPredictor(program, EchoBackend()).predict(data.texts), reference.predict(data.texts))
    assert (found.stopped.answer, found.stopped.queries, sum(bar)) == ("within", BATCH, BATCH)
    assert found.data.texts == data.texts[:BATCH]
    np.testing.assert_allclose(gap(found.said, found.reference).per_query, whole.per_query[:BATCH])
    # An engine that gives its likeliest tokens only is believed as far as its bounds go.
    bounded = ask_until_decided(program, TopEcho(1), reference, data, epsilon=0.9)
    assert bounded.stopped.interval.high >= found.stopped.interval.high
    with pytest.raises(EvaluationError, match="epsilon should be"):
        ask_until_decided(program, EchoBackend(), reference, data, epsilon=1.5)


def test_programs_of_several_sizes_ask_the_reference_once(program: Program) -> None:
    data, asked = in_random_order(TEST, None, seed=0), []

    class Counting:
        labels = program.labels

        def predict(self, texts, *, progress=None):
            asked.append(tuple(texts))
            return reference_of(program).predict(texts)

    smaller = with_examples(program, 6)
    assert len(smaller.pool.data) == 6
    whole = gap(
        PromptedPredictor(smaller, EchoBackend()).predict(data.texts), reference_of(program).predict(data.texts)
    )
    remembering = Remembering(Counting())
    first, second = (
        ask_until_decided(one, EchoBackend(), remembering, data, epsilon=epsilon)
        for one, epsilon in ((program, 0.9), (smaller, whole.mean))
    )
    assert (len(first.data), len(second.data)) == (BATCH, len(data))
    assert asked == [data.texts[i : i + BATCH] for i in range(0, len(data), BATCH)]
    np.testing.assert_array_equal(first.reference.probabilities, second.reference.probabilities[:BATCH])


def test_rows_say_that_they_were_asked_in_turn_and_all_intervals_hold_at_any_time(program: Program) -> None:
    data = in_random_order(TEST, None, seed=0)
    asked = ask_until_decided(program, EchoBackend(), reference_of(program), data, epsilon=0.9)
    found = evaluate(
        program, EchoBackend(), zero_shot_answers(asked.data), asked.data,
        dataset_name="toy", series=("zero shots", "shuffled labels"), asked=asked,
    )  # fmt: skip
    first, *others = found.rows
    assert (first["epsilon"], first["decision"], first["queries_asked"]) == (0.9, "within", BATCH)
    assert (first["gap_low"], first["gap_high"]) == asked.stopped.interval
    for row, each in zip(found.rows, found.per_query, strict=True):
        assert (row["queries_max"], row["n_queries"], row["data_sha256"]) == (45, BATCH, data.content_hash)
        lows, highs = confidence_sequence(np.array(each["gaps"]))
        assert (row["gap_low"], row["gap_high"]) == (lows[-1], highs[-1])
        assert row["gap"] == pytest.approx(np.mean(each["gaps"]))
        lows, highs = confidence_sequence(np.array(each["correct"], dtype=float))
        assert (row["accuracy_low"], row["accuracy_high"]) == (lows[-1], highs[-1])
    assert all("decision" not in row for row in others)
    assert betting(np.array(found.per_query[0]["gaps"])).high < first["gap_high"], "a fixed number would be narrower"
    assert json.loads(json.dumps(found.per_query)) == found.per_query
