"""Verdicts against simulated queries, closed forms of Hoeffding's interval, and costs computed by hand."""

import math

import numpy as np
import pytest

from evaluation.intervals import Interval, betting, clopper_pearson, confidence_sequence, hoeffding
from evaluation.verdict import TokenCost, break_even, verdict, verdict_of_intervals
from icl_compiler.errors import EvaluationError

SIZES = np.array([16, 64, 256])


def judged(gaps, intervals, sizes=SIZES, queries=100, epsilon=0.1, floor=None):
    intervals = [Interval(low, high) for low, high in intervals]
    return verdict_of_intervals(
        sizes, np.array(gaps), intervals, queries=queries, epsilon=epsilon, floor=floor and Interval(*floor)
    )


def beta(rng, means, queries):
    means = np.array(means)
    return rng.beta(20 * means, 20 * (1 - means), (queries, len(means)))


WITHIN = judged([0.2, 0.08, 0.05], [(0.15, 0.25), (0.06, 0.1), (0.04, 0.07)])
NOT_WITHIN = judged([0.3, 0.25, 0.2], [(0.26, 0.35), (0.21, 0.3), (0.15, 0.25)])
RISING = judged([0.1, 0.09, 0.2], [(0.07, 0.12), (0.08, 0.1), (0.15, 0.25)])
UNDECIDED = judged([0.3, 0.2, 0.08], [(0.26, 0.35), (0.15, 0.25), (0.05, 0.12)])
TOO_CLOSE = "The measured gap is too close to 0.1 to say how many queries would decide."


def test_the_three_answers():
    assert (WITHIN.answer, WITHIN.n, WITHIN.advice) == ("within", 64, "prompt")
    assert (NOT_WITHIN.answer, NOT_WITHIN.n, NOT_WITHIN.advice) == ("not within", 256, "fine-tune")
    assert (UNDECIDED.answer, UNDECIDED.n, UNDECIDED.advice) == ("undecided", 256, "undecided")
    assert (RISING.answer, RISING.n) == ("not within", 256)
    assert WITHIN.further_queries is NOT_WITHIN.further_queries is None


def test_the_sentences():
    assert WITHIN.sentence == (
        "Prompt: with 64 examples and at every larger size measured, up to 256, the gap is at most 0.1; with 64 it is "
        "0.080 [0.060, 0.100]."
    )
    assert NOT_WITHIN.sentence == (
        "Fine-tune, or look for a better prompt: with 256 examples, the most measured, the gap is "
        "0.200 [0.150, 0.250], above 0.1. So it is at all 3 sizes measured."
    )
    assert RISING.sentence == (
        "Fine-tune, or look for a better prompt: with 256 examples, the most measured, the gap is "
        "0.200 [0.150, 0.250], above 0.1. With fewer examples this is not shown: "
        "16 (0.100 [0.070, 0.120]) and 64 (0.090 [0.080, 0.100]). "
        "More examples did not help here."
    )
    assert UNDECIDED.sentence == (
        "Undecided: with 256 examples, the most measured, the gap is 0.080 [0.050, 0.120] on 100 queries, and the "
        "interval holds 0.1. If the gap is as measured, about 300 further queries would decide."
    )


def test_the_sentences_of_a_single_size():
    one = np.array([1])
    said = judged([0.05], [(0.02, 0.08)], one).sentence
    assert said == "Prompt: with 1 example the gap is at most 0.1; with 1 it is 0.050 [0.020, 0.080]."
    said = judged([0.5], [(0.4, 0.6)], one).sentence
    assert said.endswith("with 1 example, the most measured, the gap is 0.500 [0.400, 0.600], above 0.1.")
    said = judged([0.1], [(0.05, 0.15)], one, queries=1).sentence
    assert said.endswith(" on 1 query, and the interval holds 0.1. " + TOO_CLOSE)
    assert judged([0.16], [(0.09, 0.23)], one, queries=3).sentence.endswith("about 2 further queries would decide.")


def test_ends_that_touch_epsilon():
    assert judged([0.2, 0.1, 0.05], [(0.15, 0.25), (0.05, 0.12), (0.0, 0.1)]).n == 256
    assert judged([0.3, 0.3, 0.2], [(0.2, 0.4), (0.2, 0.4), (0.1, 0.3)]).answer == "undecided"


@pytest.mark.parametrize(
    ("floor", "expected"),
    [((0.01, 0.05), "above"), ((0.03, 0.06), "at"), ((0.08, 0.2), "at"), ((0.11, 0.2), "below"), (None, None)],
)
def test_the_floor(floor, expected):
    found = judged([0.2, 0.08, 0.05], [(0.15, 0.25), (0.06, 0.1), (0.04, 0.07)], floor=floor)
    assert found.against_floor == expected
    said = found.sentence.removeprefix(WITHIN.sentence)
    if floor is None:
        assert said == ""
    else:
        assert said.startswith(f" With 64 examples the gap is {expected} the floor, [{floor[0]:.3f}, {floor[1]:.3f}]")
    assert said.endswith("A second fine-tuning is itself not within 0.1: epsilon is below the floor.") == (
        expected == "below"
    )


@pytest.mark.parametrize("mean", [0.02, 0.08, 0.13, 0.2])
@pytest.mark.parametrize("queries", [150, 200, 400])
def test_further_queries_of_hoeffding_in_closed_form(mean, queries):
    # Its radius is sqrt(ln(2 / delta) / 2n): the total does not depend on how many have been asked.
    total = math.log(40) / (2 * (mean - 0.1) ** 2)
    interval = hoeffding(np.full(queries, mean))
    found = verdict_of_intervals(np.array([8]), np.array([mean]), [interval], queries=queries, epsilon=0.1)
    assert (found.answer == "undecided") == (queries < total)
    assert found.further_queries == (math.ceil(total) - queries if queries < total else None)


def test_further_queries_mostly_decide_and_a_quarter_of_them_less_often():
    rng = np.random.default_rng(0)
    all_of_them, a_quarter = [], []
    for _ in range(60):
        gaps = beta(rng, [0.085], 60)
        found = verdict(np.array([8]), gaps, epsilon=0.1)
        if found.answer == "undecided" and gaps.mean() < 0.095:
            more = np.concatenate([gaps, beta(rng, [gaps.mean()], found.further_queries)])
            fewer = more[: 60 + found.further_queries // 4]
            all_of_them.append(verdict(np.array([8]), more, epsilon=0.1).answer == "within")
            a_quarter.append(verdict(np.array([8]), fewer, epsilon=0.1).answer == "within")
    assert len(all_of_them) > 20
    assert np.mean(all_of_them) > 0.5
    assert np.mean(all_of_them) > np.mean(a_quarter) + 0.1


def test_few_verdicts_are_wrong_with_exact_bounds():
    # Intervals that are nearly exact, of gaps next to epsilon: only the rule keeps errors below delta = 0.1.
    rng = np.random.default_rng(0)
    runs, queries = 1500, 400
    exact = [clopper_pearson(k, queries, delta=0.1) for k in range(queries + 1)]

    def answers(means):
        for counts in rng.binomial(queries, means, size=(runs, 3)):
            yield verdict_of_intervals(
                SIZES, counts / queries, [exact[k] for k in counts], queries=queries, epsilon=0.1, level=0.9
            )

    def most(rate):
        return rate + 3 * math.sqrt(rate * (1 - rate) / runs)

    outside = np.mean([each.answer == "within" for each in answers([0.1001, 0.1001, 0.1001])])
    assert 0.01 < outside <= most(0.05)
    inside = np.mean([each.answer == "not within" for each in answers([0.1, 0.1, 0.1])])
    assert 0.01 < inside <= most(0.05)
    # Both errors can happen: the gap is within only at the largest size.
    both = [
        each.answer == "not within" or (each.answer == "within" and each.n < 256)
        for each in answers([0.101, 0.101, 0.1])
    ]
    assert 0.01 < np.mean(both) <= most(0.1)


def test_few_verdicts_are_wrong_from_queries():
    rng = np.random.default_rng(1)
    runs = 150
    for means in ([0.13, 0.12, 0.101], [0.12, 0.1, 0.099], [0.2, 0.101, 0.05]):
        found = [verdict(SIZES, beta(rng, means, 80), epsilon=0.1) for _ in range(runs)]
        first = next((n for n, mean in zip(SIZES, means, strict=True) if mean <= 0.1), math.inf)
        wrong = [each.answer == "within" and each.n < first for each in found]
        wrong += [each.answer == "not within" and means[-1] <= 0.1 for each in found]
        assert 2 * np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize(
    ("means", "answer", "n"),
    [([0.3, 0.06, 0.03], "within", 64), ([0.4, 0.3, 0.2], "not within", 256), ([0.3, 0.2, 0.1], "undecided", 256)],
)
def test_verdicts_are_reached(means, answer, n):
    rng = np.random.default_rng(2)
    found = [verdict(SIZES, beta(rng, means, 200), epsilon=0.1) for _ in range(30)]
    assert np.mean([(each.answer, each.n) == (answer, n) for each in found]) >= 0.9


def test_intervals_are_those_beside_the_gaps():
    gaps = beta(np.random.default_rng(3), [0.2, 0.1, 0.05], 150)
    found = verdict(SIZES, gaps, epsilon=0.1, level=0.9)
    shuffled = [np.random.default_rng(0).permutation(column) for column in gaps.T]
    assert list(found.intervals) == [betting(column, delta=1 - 0.9) for column in shuffled]
    assert found.gaps == pytest.approx(gaps.mean(axis=0))
    assert (found.queries, found.sizes, found.level) == (150, (16, 64, 256), 0.9)


def test_anytime_verdicts_stay_valid_when_queries_are_added():
    # After each number of queries the interval is that of one sequence, which holds at all times at once.
    gaps = beta(np.random.default_rng(4), [0.2, 0.05], 300)
    sequences = [confidence_sequence(column, delta=1 - 0.95) for column in gaps.T]
    for queries in (10, 100, 300):
        found = verdict(SIZES[:2], gaps[:queries], epsilon=0.1, anytime=True)
        ends = [(lows[queries - 1], highs[queries - 1]) for lows, highs in sequences]
        assert [tuple(interval) for interval in found.intervals] == ends
    assert (found.answer, found.n) == ("within", 64)


def test_verdicts_of_single_precision():
    gaps = beta(np.random.default_rng(5), [0.2, 0.05], 100)
    single, double = (verdict(SIZES[:2], gaps.astype(kind), epsilon=0.1) for kind in (np.float32, np.float64))
    assert (single.answer, single.n) == (double.answer, double.n)


def test_break_even_by_hand():
    prompt = TokenCost(input_tokens=3000.0, output_tokens=2.0, input_price=1.0, output_price=5.0)
    tuned = TokenCost(input_tokens=50.0, output_tokens=2.0, input_price=3.0, output_price=30.0)
    # 3,010 against 210 for a query: 2,800 saved each time.
    found = break_even(prompt=prompt, tuned=tuned, tuning=28_000.0)
    assert (found.prompt_per_query, found.tuned_per_query) == (3010, 210)
    assert found.queries == 11  # after 10 both have cost 30,100
    assert break_even(prompt=prompt, tuned=tuned, tuning=27_999.0).queries == 10
    assert break_even(prompt=prompt, tuned=tuned, tuning=28_001.0).queries == 11
    assert break_even(prompt=prompt, tuned=tuned, tuning=0.0).queries == 1
    assert found.sentence == (
        "Fine-tuning is cheaper from 11 queries on: a query costs 3.01e+03 with the prompt, 210 with the tuned model, "
        "and tuning costs 2.8e+04 once."
    )


def test_break_even_is_the_first_number_of_queries():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt = TokenCost(*map(float, rng.uniform(1, 100, 4)))
        tuned = TokenCost(*map(float, rng.uniform(1, 60, 4)))
        tuning = float(rng.uniform(0, 1e5))
        found = break_even(prompt=prompt, tuned=tuned, tuning=tuning).queries
        if found is None:
            assert prompt.per_query <= tuned.per_query
        else:
            assert tuning + found * tuned.per_query < found * prompt.per_query
            assert tuning + (found - 1) * tuned.per_query >= (found - 1) * prompt.per_query


def test_break_even_does_not_hang_on_the_last_digit():
    prompt = TokenCost(1.0, 0.0, 0.3, 0.0)
    tuned = TokenCost(1.0, 0.0, 0.2, 0.0)
    assert break_even(prompt=prompt, tuned=tuned, tuning=0.3).queries == 4
    assert break_even(prompt=TokenCost(3.0, 0.0, 0.1, 0.0), tuned=prompt, tuning=0.0).queries is None


def test_fine_tuning_that_never_pays():
    cheap, dear = TokenCost(10.0, 1.0, 0.001, 0.002), TokenCost(10.0, 1.0, 0.003, 0.002)
    found = break_even(prompt=cheap, tuned=dear, tuning=0.0)
    assert found.queries is None
    assert found.sentence == (
        "Fine-tuning never pays: a query costs 0.012 with the prompt, 0.032 with the tuned model."
    )


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_costs_that_are_refused(wrong):
    right = TokenCost(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(EvaluationError, match=f"tuning should be a number >= 0, is {wrong}"):
        break_even(prompt=right, tuned=right, tuning=wrong)
    for field in right._fields:
        with pytest.raises(EvaluationError, match=f"tuned.{field} should be a number >= 0, is {wrong}"):
            break_even(prompt=right, tuned=right._replace(**{field: wrong}), tuning=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon should be between 0 and 1, both excluded, is 0"),
        ({"epsilon": math.nan}, "epsilon should be between 0 and 1"),
        ({"level": 1.0}, "level should be between 0 and 1, both excluded, is 1"),
        ({"queries": 0}, "queries should be >= 1, is 0"),
        ({"sizes": np.array([64, 16])}, "strictly increasing"),
        ({"sizes": np.array([16, 16])}, "strictly increasing"),
        ({"intervals": [Interval(0.1, 0.2), Interval(0.2, 0.1)]}, "low end first"),
        ({"intervals": [Interval(0.1, 0.2), Interval(0.2, math.nan)]}, "an interval of gaps should be within"),
        ({"floor": Interval(-0.1, 0.1)}, r"within \[0, 1\], low end first, is \[-0.1, 0.1\]"),
    ],
)
def test_arguments_that_are_refused(change, message):
    usual = {"sizes": np.array([16, 64]), "gaps": np.array([0.2, 0.15]), "intervals": [Interval(0.1, 0.2)] * 2}
    with pytest.raises(EvaluationError, match=message):
        verdict_of_intervals(**usual | {"queries": 100, "epsilon": 0.1} | change)


@pytest.mark.parametrize(
    ("sizes", "gaps", "message"),
    [
        ([16, 8], [[0.1, 0.2]], "strictly increasing"),
        ([], np.empty((3, 0)), "at least one"),
        ([8, 16], np.empty((0, 2)), "no values: an interval needs at least one"),
        ([8, 16], [[0.1, 1.2]], r"expected a number in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("anytime", [False, True])
def test_gaps_that_are_refused(sizes, gaps, message, anytime):
    with pytest.raises(EvaluationError, match=message):
        verdict(np.array(sizes, dtype=int), np.array(gaps, dtype=float), epsilon=0.1, anytime=anytime)
