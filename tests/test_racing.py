"""Racing: by simulation, against the exhaustive search and against known means."""

import math

import numpy as np
import pytest

from icl_compiler.optimise.racing import LEAST, OutOfTime, race


class Table:
    """Losses of candidates (rows) on queries (columns), and what was asked of it."""

    def __init__(self, values, *, patience=math.inf):
        self.values = values
        self.patience = patience
        self.seen = [0] * len(values)

    def __call__(self, candidate, n):
        if sum(self.seen) >= self.patience:
            raise OutOfTime
        self.seen[candidate] = max(self.seen[candidate], n)
        return self.values[candidate, :n]


def drawn(means, *, queries=600, rng, spread=1.0):
    """Losses like log-losses: skewed, never below 0, and hard queries are hard for all candidates."""
    hard = rng.gamma(1.0, 1.0, size=queries)
    own = rng.gamma(1.0, spread, size=(len(means), queries))
    return np.array(means)[:, None] * (hard + own) / (1 + spread)


def run(values, budget, **settings):
    return race(Table(values), len(values), queries=values.shape[1], budget=budget, **settings)


@pytest.mark.parametrize("candidates", [2, 9, 30])
def test_the_winner_is_within_epsilon_of_the_best_at_a_fraction_of_the_cost(candidates):
    rng = np.random.default_rng(candidates)
    near, calls, runs = 0, 0, 200
    for _ in range(runs):
        means = rng.uniform(0.6, 1.6, size=candidates)
        values = drawn(means, rng=rng)
        found = run(values, budget=50 * candidates)
        near += means[found.winner] <= means.min() + 0.1
        calls += found.calls
    assert near / runs >= 0.95
    assert calls / runs <= 50 * candidates <= values.size / 10


def test_the_tests_hardly_ever_drop_the_best_however_skewed_the_losses():
    # 8 candidates with the same law: whichever is called the best, a test that drops it is wrong.
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        found = run(drawn([1.0] * 8, rng=rng), budget=800)
        wrong += "paired test" in found.standings[0].why
    assert wrong / 400 <= 0.05


def test_what_the_tests_save_is_not_spent():
    rng = np.random.default_rng(1)
    clear = run(drawn([0.2] + [2.0] * 7, rng=rng), budget=800)
    assert clear.winner == 0
    assert clear.calls < 400
    assert {standing.why for standing in clear.standings[1:]} == {"worse than 0 by a paired test"}


@pytest.mark.parametrize("budget", [1, 7, 40, 100, 1000, 10**6])
@pytest.mark.parametrize("candidates", [1, 2, 3, 9, 17])
def test_the_budget_is_kept_and_somebody_wins(budget, candidates):
    values = np.random.default_rng(5).uniform(size=(candidates, 50))
    table = Table(values)
    found = race(table, candidates, queries=50, budget=budget)
    assert found.calls == sum(table.seen)
    assert found.calls <= budget
    assert [standing.candidate for standing in found.standings] == list(range(candidates))
    assert [standing.candidate for standing in found.standings if standing.out is None] == [found.winner]
    assert [standing.queries for standing in found.standings] == table.seen
    assert {standing.queries for standing in found.standings if "not tried" in standing.why} <= {0}
    if budget == 10**6:
        assert found.winner == values.mean(axis=1).round(4).argmin()


def test_queries_that_were_paid_for_before_are_free():
    values = np.random.default_rng(2).uniform(size=(2, 40))
    assert run(values, budget=40, seen=[40, 0]).standings[1].queries == 40
    assert run(values, budget=40).standings[1].queries == 20
    assert run(values, budget=0, seen=[40, 40]).winner == values.mean(axis=1).argmin()


def test_of_equals_the_first_wins_and_a_constant_difference_is_no_test():
    assert run(np.ones((5, 40)), budget=200).winner == 0
    found = run(np.array([[1.0] * 40, [0.5] * 40]), budget=80)
    assert (found.winner, found.standings[0].why) == (1, "in the worse half")


def test_candidates_beyond_the_budget_are_not_tried():
    found = run(np.arange(5.0)[::-1, None] + np.zeros((5, 40)), budget=3 * LEAST)
    assert found.winner == 2
    assert [standing.why for standing in found.standings[3:]] == ["not tried: no queries were left for it"] * 2


def test_when_the_time_is_up_the_best_so_far_wins():
    values = np.array([[3.0], [1.0], [2.0], [0.0]]) + np.random.default_rng(3).uniform(size=(4, 100))
    first = race(Table(values, patience=0), 4, queries=100, budget=160)
    assert (first.winner, first.calls, first.standings[1].why) == (0, 0, "not tried: the time was up")
    assert (first.standings[0].out, first.standings[0].why) == (None, "the winner")
    assert math.isnan(first.standings[0].mean)
    some = race(Table(values, patience=50), 4, queries=100, budget=160)
    assert some.winner == 1  # the fourth, which would be better, was not asked any more
    assert [standing.why for standing in some.standings] == [
        "worse when the time was up", "the winner", "worse when the time was up", "not tried: the time was up",
    ]  # fmt: skip


def test_an_interval_is_students():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(4).uniform(size=(2, 30))
    low, high = ttest_1samp(values[1], 0).confidence_interval()
    standing = run(values, budget=60).standings[1]
    assert (standing.low, standing.high) == pytest.approx((low, high))
