"""Total variation against closed forms, enumeration of all sequences, and linear programmes."""

import itertools
import math
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import rel_entr

from evaluation import tv
from evaluation.intervals import Interval
from icl_compiler.errors import EvaluationError, NotADistributionError


class Toy(NamedTuple):
    """Two Markov chains over two tokens: first-token law and transitions of each, and the length."""

    p: tuple[tuple[float, float], list[list[float]]]
    q: tuple[tuple[float, float], list[list[float]]]
    length: int


T1 = Toy(((0.5, 0.5), [[0.5, 0.5]] * 2), ((0.4, 0.6), [[0.4, 0.6]] * 2), 8)
T2 = Toy(((0.7, 0.3), [[0.9, 0.1], [0.2, 0.8]]), ((0.6, 0.4), [[0.8, 0.2], [0.25, 0.75]]), 10)
T3 = Toy(((0.5, 0.5), [[0.6, 0.4], [0.3, 0.7]]), ((0.5, 0.5), [[0.62, 0.38], [0.3, 0.7]]), 6)
# TV, KL(P, Q), Bhattacharyya, mean of the coupling values, mean of the chain values.
PINNED = [
    pytest.param(T1, (0.23080515, 0.16328798, 0.96019999, 0.56953279, 0.8), id="T1"),
    pytest.param(T2, (0.27375775, 0.2659128, 0.93425224, 0.58352659, 0.85533137), id="T2"),
    pytest.param(T3, (0.02342929, 0.00189319, None, 0.04449556, 0.044893), id="T3"),
]


def enumerated(toy):
    """All sequences, as probabilities of each of their tokens under P and Q, and TVs of the next-token laws."""
    p_tokens, q_tokens, token_tvs = [], [], []
    for tokens in itertools.product((0, 1), repeat=toy.length):
        both = [[start, *(steps[token] for token in tokens[:-1])] for start, steps in (toy.p, toy.q)]
        p_tokens.append([law[token] for law, token in zip(both[0], tokens, strict=True)])
        q_tokens.append([law[token] for law, token in zip(both[1], tokens, strict=True)])
        token_tvs.append([abs(a[0] - b[0]) for a, b in zip(*both, strict=True)])
    return np.array(p_tokens), np.array(q_tokens), np.array(token_tvs)


def laws(outcomes, count=2):
    """Rows that sum to 1, zeros included."""

    def rows(k):
        row = st.lists(st.floats(0, 1), min_size=k, max_size=k).filter(lambda masses: sum(masses) > 0.01)
        return st.tuples(*[row.map(lambda masses: np.array([masses]) / sum(masses))] * count)

    return outcomes.flatmap(rows)


@given(p=st.floats(0, 1), q=st.floats(0, 1))
def test_two_outcomes(p, q):
    distance = tv.tv_distance(np.array([[p, 1 - p]]), np.array([[q, 1 - q]]))
    assert distance == pytest.approx([abs(p - q)], abs=1e-12)


@given(laws(st.integers(2, 8), count=3))
def test_tv_is_a_metric_in_range(rows):
    p, q, r = rows
    distance = tv.tv_distance(p, q)
    assert 0 <= distance[0] <= 1
    assert tv.tv_distance(q, p) == distance
    assert tv.tv_distance(p, p) == 0
    assert distance <= tv.tv_distance(p, r) + tv.tv_distance(r, q) + 1e-12
    assert distance == pytest.approx(1 - np.minimum(p, q).sum())


@given(laws(st.just(6)), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_merging_outcomes_never_increases_tv(rows, group):
    merge = np.eye(3)[group]
    p, q = rows
    assert tv.tv_distance(p @ merge, q @ merge) <= tv.tv_distance(p, q) + 1e-12


@given(laws(st.just(5), count=4))
def test_averaging_laws_never_increases_the_mean_tv(rows):
    *several, q = rows
    mean = np.mean([tv.tv_distance(p, q) for p in several])
    assert tv.tv_distance(np.mean(several, axis=0), q) <= mean + 1e-12


def test_tv_is_the_largest_difference_of_any_event():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(8), size=(2, 5))
    events = np.array(list(itertools.product((0, 1), repeat=8)))
    assert tv.tv_distance(p, q) == pytest.approx(np.abs((p - q) @ events.T).max(axis=1))


def test_many_queries_in_single_precision_use_little_memory():
    rng = np.random.default_rng(0)
    p, q = (rng.random((100_000, 40), dtype=np.float32) for _ in range(2))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    tracemalloc.start()
    distances = tv.tv_distance(p, q)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    expected = 0.5 * np.abs(p.astype(float) - q).sum(axis=1)
    np.testing.assert_allclose(distances, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.4], r"row 1 of q sums to 0.9, expected 1 within 1e-6"),
        ([1.2, -0.2], r"q\[1, 1\] is -0.2: a probability is not negative"),
        ([math.nan, 0.5], "row 1 of q sums to nan"),
        ([math.inf, 0.5], "row 1 of q sums to inf"),
    ],
)
def test_rows_that_are_no_distributions(row, message):
    p = np.full((3, 2), 0.5)
    q = p.copy()
    q[1] = row
    with pytest.raises(NotADistributionError, match=message):
        tv.tv_distance(p, q)


def test_no_queries_have_no_distances():
    assert tv.tv_distance(np.empty((0, 3)), np.empty((0, 3))).shape == (0,)


@given(laws(st.integers(2, 6)), st.floats(0, 1))
def test_other_takes_what_is_left(rows, kept):
    labels = rows[0] * kept
    complete = tv.with_other(labels)
    np.testing.assert_allclose(complete[:, :-1], labels)
    assert complete.sum() == pytest.approx(1)
    assert complete.min() >= 0
    np.testing.assert_allclose(complete[:, -1], 1 - kept, atol=1e-12)


def boxes(rng, outcomes, known):
    """One row: a law, and a box around it; the law alone if it is known."""
    law = rng.dirichlet(np.full(outcomes, 0.5))
    if known:
        return law, tv.Box(law[None], law[None])
    widths = rng.random((2, outcomes)) * (rng.random((2, outcomes)) < 0.7)
    return law, tv.Box((law * (1 - widths[0]))[None], np.minimum(law + widths[1] * 0.5, 1)[None])


def least_tv_in_boxes(p, q):
    """A linear programme over p, q and t >= |p - q|."""
    k = p.lower.shape[1]
    one = np.eye(k)
    found = linprog(
        np.concatenate([np.zeros(2 * k), np.full(k, 0.5)]),
        A_ub=np.block([[one, -one, -one], [-one, one, -one]]),
        b_ub=np.zeros(2 * k),
        A_eq=np.array([[1] * k + [0] * 2 * k, [0] * k + [1] * k + [0] * k]),
        b_eq=[1, 1],
        bounds=[*np.stack([p.lower[0], p.upper[0]], 1), *np.stack([q.lower[0], q.upper[0]], 1), *[(0, 1)] * k],
    )
    return found.fun


def largest_tv_in_boxes(p, q):
    """The largest difference of any event, by a linear programme for each law and event."""
    k = p.lower.shape[1]

    def most(box, direction):
        limits = np.stack([box.lower[0], box.upper[0]], 1)
        return -linprog(-np.array(direction), A_eq=np.ones((1, k)), b_eq=[1], bounds=limits).fun

    return max(most(p, event) + most(q, -np.array(event)) for event in itertools.product((0, 1), repeat=k))


@pytest.mark.parametrize("known", [(False, True), (True, False), (False, False)])
def test_bounds_of_boxes_are_those_of_linear_programmes(known):
    rng = np.random.default_rng(7)
    slack = []
    for _ in range(25):
        (_, p), (_, q) = (boxes(rng, 4, each) for each in known)
        [low], [high] = tv.boxed_tv(p, q)
        assert low == pytest.approx(least_tv_in_boxes(p, q), abs=1e-8)
        slack.append(high - largest_tv_in_boxes(p, q))
        if any(known):
            assert slack[-1] < max((box.upper - box.lower).max() for box in (p, q)) / 4 + 1e-8
    assert min(slack) > -1e-8
    assert np.median(slack) < 0.01 if any(known) else 0.3


@given(laws(st.integers(2, 6), count=4), st.floats(0, 1), st.floats(0, 1))
def test_every_law_in_the_box_is_within_the_bounds(rows, least, more):
    p, q, below, above = rows
    lower = (p * np.maximum(below, least))[:, :-1]
    upper = np.minimum(p + more * above, 1)[:, :-1]
    [low], [high] = tv.boxed_tv(tv.box_with_other(lower, upper), tv.Box(q, q))
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= tv.tv_distance(p, q)[0] <= high + 1e-12


@given(laws(st.integers(2, 6)), st.floats(0, 1.0005))
def test_bounds_that_are_equal_give_the_distance_itself(rows, kept):
    p, q = rows[0] * kept, rows[1]
    box = tv.box_with_other(p, p)
    known = np.append(q, [[0.0]], axis=1)
    np.testing.assert_allclose(box.lower, tv.with_other(p))
    for bound in tv.boxed_tv(box, tv.Box(known, known)):
        assert bound == pytest.approx(tv.tv_distance(tv.with_other(p), known), abs=1e-12)


def test_bounds_widen_to_everything_when_nothing_is_given():
    nothing = tv.box_with_other(np.zeros((1, 2)), np.ones((1, 2)))
    known = np.array([[0.5, 0.3, 0.2]])
    assert tv.boxed_tv(nothing, tv.Box(known, known)) == (pytest.approx([0.0]), pytest.approx([0.8]))
    assert tv.boxed_tv(nothing, nothing) == ([0.0], [1.0])


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ([0.5, 0.2], [0.5, 0.1], r"upper\[0, 1\] is 0.1, expected at least the lower bound 0.2"),
        ([0.5, 0.2], [0.5, math.nan], r"upper\[0, 1\] is nan"),
        ([0.9, 0.2], [0.9, 0.2], "row 0 of label_probs sums to 1.1"),
        ([-0.1, 0.2], [0.9, 0.2], "not negative"),
    ],
)
def test_bounds_that_hold_no_law(lower, upper, message):
    with pytest.raises(NotADistributionError, match=message):
        tv.box_with_other(np.array([lower]), np.array([upper]))


def test_a_box_without_a_law_is_refused():
    known = np.array([[0.5, 0.5]])
    for box in (tv.Box(known, known / 2), tv.Box(known / 4, known / 2), tv.Box(known * 1.5, known * 2)):
        with pytest.raises(NotADistributionError, match=r"row 0 of q\.lower sums to .*, expected a law between"):
            tv.boxed_tv(tv.Box(known, known), box)


def test_rounding_of_bfloat16_is_tolerated_and_more_is_not():
    complete = tv.with_other(np.array([[0.8, 0.2008], [0.25, 0.25]]))
    np.testing.assert_allclose(complete, [[0.8 / 1.0008, 0.2008 / 1.0008, 0], [0.25, 0.25, 0.5]])
    assert tv.tv_distance(complete, complete).tolist() == [0, 0]
    for row, message in [
        ([0.8, 0.21], "row 0 of label_probs sums to 1.01, expected at most 1.001"),
        ([0.8, -0.1], "not negative"),
        ([0.8, math.nan], "nan"),
    ]:
        with pytest.raises(NotADistributionError, match=message):
            tv.with_other(np.array([row]))


@pytest.mark.parametrize(("toy", "pinned"), PINNED)
def test_sequence_estimators_by_enumeration(toy, pinned):
    p_tokens, q_tokens, token_tv = enumerated(toy)
    p, q = p_tokens.prod(axis=1), q_tokens.prod(axis=1)
    ratio = np.log(p_tokens) - np.log(q_tokens)
    delta = ratio.sum(axis=1)
    total = 0.5 * np.abs(p - q).sum()

    exact, kl, bhattacharyya, coupling, chain = pinned
    assert total == pytest.approx(exact, abs=5e-9)
    assert p @ tv.one_sided(delta) == pytest.approx(exact, abs=5e-9)
    assert q @ tv.one_sided(-delta) == pytest.approx(exact, abs=5e-9)
    pairs = tv.paired_mixture(*np.broadcast_arrays(delta[:, None], delta))
    assert p @ pairs @ q == pytest.approx(exact, abs=5e-9)
    assert p @ tv.coupling_upper(ratio) == pytest.approx(coupling, abs=5e-9)
    assert p @ tv.chain_upper(token_tv) == pytest.approx(chain, abs=5e-9)
    lengths = np.full(len(p), toy.length)
    assert q @ tv.mean_token_tv(token_tv, lengths) == pytest.approx(q @ token_tv.mean(axis=1))

    assert rel_entr(p, q).sum() == pytest.approx(kl, abs=5e-9)
    assert exact <= min(tv.pinsker(np.array([kl]))[0], tv.bretagnolle_huber(np.array([kl]))[0])
    lower, upper = tv.hellinger_sandwich(np.array([np.sqrt(p * q).sum()]))
    assert lower <= exact <= upper
    if bhattacharyya is not None:
        assert np.sqrt(p * q).sum() == pytest.approx(bhattacharyya, abs=5e-9)


@pytest.mark.parametrize(("toy", "mixture", "one_sided"), [(T1, 0.150, 0.238), (T2, 0.214, 0.283), (T3, 0.020, 0.030)])
def test_the_mixture_varies_less(toy, mixture, one_sided):
    p_tokens, q_tokens, _ = enumerated(toy)
    p, q = p_tokens.prod(axis=1), q_tokens.prod(axis=1)
    delta = np.log(p) - np.log(q)
    total = 0.5 * np.abs(p - q).sum()
    values = np.abs(p - q) / (p + q)
    assert math.sqrt((p + q) / 2 @ values**2 - total**2) == pytest.approx(mixture, abs=5e-4)
    assert math.sqrt(p @ tv.one_sided(delta) ** 2 - total**2) == pytest.approx(one_sided, abs=5e-4)
    pairs = tv.paired_mixture(*np.broadcast_arrays(delta[:, None], delta))
    assert p @ pairs**2 @ q - total**2 <= mixture**2 / 2 + 1e-4 <= total * (1 - total)


@settings(max_examples=50)
@given(laws(st.just(4), count=2), laws(st.just(4), count=8))
def test_order_of_the_sequence_bounds(first, second):
    # Two tokens of four, any laws, zeros included: TV <= coupling <= chain.
    (p1, q1), p2, q2 = first, np.concatenate(second[:4]), np.concatenate(second[4:])
    p, q = p1.T * p2, q1.T * q2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.stack(np.broadcast_arrays(np.log(p1.T) - np.log(q1.T), np.log(p2) - np.log(q2)), axis=-1)
    token_tv = np.stack(np.broadcast_arrays(tv.tv_distance(p1, q1), tv.tv_distance(p2, q2)[:, None]), axis=-1)
    possible = p > 0
    total = 0.5 * np.abs(p - q).sum()
    coupling = p[possible] @ tv.coupling_upper(ratio[possible])
    chain = p[possible] @ tv.chain_upper(np.broadcast_to(token_tv, (4, 4, 2))[possible])
    assert total <= coupling + 1e-9
    assert coupling <= chain + 1e-9
    assert p[possible] @ tv.one_sided(ratio[possible].sum(axis=-1)) == pytest.approx(total)


def test_samples_are_unbiased():
    p_tokens, q_tokens, _ = enumerated(T2)
    p, q = p_tokens.prod(axis=1), q_tokens.prod(axis=1)
    delta = np.log(p) - np.log(q)
    rng = np.random.default_rng(0)
    at_p, at_q = (delta[rng.choice(len(p), (40, 500), p=law / law.sum())] for law in (p, q))
    for values in (tv.paired_mixture(at_p, at_q), tv.one_sided(at_p), tv.one_sided(-at_q)):
        assert values.shape == (40, 500)
        assert abs(values.mean() - 0.27375775) < 5 * values.std() / math.sqrt(values.size)


def test_single_chain_values_must_not_be_capped():
    # P: a or b, then x. Q: a, then y. No answer in common, so TV = 1; token TVs 1/2, then 1 after a and 0 after b.
    values = tv.chain_upper(np.array([[0.5, 1.0], [0.5, 0.0]]))
    assert values.mean() == 1
    assert np.minimum(values, 1).mean() == 0.75


def test_padding_does_not_count():
    ratio = np.array([[0.3, 0.2, 0.0, 0.0]])
    assert tv.coupling_upper(ratio) == pytest.approx(tv.coupling_upper(ratio[:, :2]))
    token_tv = np.array([[[0.3, 0.1, 0.9]], [[0.3, 0.1, 0.8]]])
    assert tv.mean_token_tv(token_tv, np.array([[2], [3]])) == pytest.approx(np.array([[0.2], [0.4]]))


def test_disjoint_and_equal_laws():
    assert tv.one_sided(np.array([np.inf, 0.0])).tolist() == [1, 0]
    assert tv.paired_mixture(np.array([np.inf, 0.0]), np.array([-np.inf, 0.0])).tolist() == [1, 0]
    assert tv.coupling_upper(np.array([[0.1, np.inf], [0.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tv.one_sided(np.array([-np.inf])), "log_ratio has -inf, impossible .* swapped"),
        (lambda: tv.one_sided(np.array([np.nan])), "log_ratio has NaN"),
        (lambda: tv.paired_mixture(np.array([-np.inf]), np.array([0.0])), "log_ratio_at_p has -inf"),
        (lambda: tv.paired_mixture(np.array([0.0]), np.array([np.inf])), "log_ratio_at_q has inf"),
        (lambda: tv.coupling_upper(np.array([[0.0, np.nan]])), "token_log_ratio has NaN"),
        (lambda: tv.chain_upper(np.array([[0.5, 1.5]])), r"token_tv should be in \[0, 1.0\], has 1.5"),
        (lambda: tv.mean_token_tv(np.array([[0.5]]), np.array([0])), "between 1 and 1 tokens, are 0 to 0"),
        (lambda: tv.mean_token_tv(np.array([[0.5]]), np.array([2])), "between 1 and 1 tokens, are 2 to 2"),
        (lambda: tv.pinsker(np.array([-0.1])), "kl should be in"),
        (lambda: tv.bretagnolle_huber(np.array([np.nan])), "kl should be in .* has nan"),
        (lambda: tv.hellinger_sandwich(np.array([1.1])), "bc should be in"),
        (lambda: tv.plugin_tv(np.array([3]), np.array([3])), "p_counts should count at least two outcomes"),
        (lambda: tv.plugin_tv(np.array([3, 0]), np.array([0, 0])), "q_counts should count"),
        (lambda: tv.plugin_tv(np.array([3, -1]), np.array([1, 1])), "none negative"),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()


@given(laws(st.integers(2, 6)))
def test_information_bounds_hold(rows):
    p, q = rows
    distance = tv.tv_distance(p, q)
    kl = rel_entr(p, q).sum(axis=1)
    kl = np.maximum(kl, 0)
    assert distance <= tv.pinsker(kl) + 1e-7
    assert distance <= tv.bretagnolle_huber(kl) + 1e-7
    lower, upper = tv.hellinger_sandwich(np.minimum(np.sqrt(p * q).sum(axis=1), 1))
    assert lower - 1e-7 <= distance <= upper + 1e-7


def test_information_bounds_are_closed_forms():
    assert tv.pinsker(np.array([0.0, 0.02, 100.0])) == pytest.approx([0, 0.1, 1])
    assert tv.bretagnolle_huber(np.array([0.0, math.log(2), np.inf])) == pytest.approx([0, math.sqrt(0.5), 1])
    assert tv.pinsker(np.array([1.593]))[0] < tv.bretagnolle_huber(np.array([1.593]))[0]
    assert tv.pinsker(np.array([1.594]))[0] > tv.bretagnolle_huber(np.array([1.594]))[0]


@pytest.mark.parametrize(
    ("q", "expected"),
    [({0: 0.4, 1: 0.3, 3: 0.12}, (0.12, 0.40)), ({0: 0.4, 1: 0.3, 2: 0.12}, (0.12, 0.30))],
)
def test_topk_values(q, expected):
    assert tv.topk_bounds({0: 0.5, 1: 0.2, 2: 0.1}, q) == pytest.approx(expected)


def topk(law, k):
    return {int(token): float(law[token]) for token in np.argsort(-law)[:k]}


def smallest_tv(p, q, vocabulary, p_ceiling, q_ceiling):
    """The linear programme: free tails below the ceilings, overlap o <= p, o <= q, its sum as large as possible."""
    n = vocabulary
    limits = []
    for law, ceiling in ((p, p_ceiling), (q, q_ceiling)):
        limits += [(law[t], law[t]) if t in law else (0, ceiling) for t in range(n)]
    limits += [(0, 1)] * n
    below = np.block([[-np.eye(n), np.zeros((n, n)), np.eye(n)], [np.zeros((n, n)), -np.eye(n), np.eye(n)]])
    sums = np.block([[np.ones(n), np.zeros(2 * n)], [np.zeros(n), np.ones(n), np.zeros(n)]])
    gain = np.concatenate([np.zeros(2 * n), -np.ones(n)])
    solved = linprog(gain, A_ub=below, b_ub=np.zeros(2 * n), A_eq=sums, b_eq=[1, 1], bounds=limits)
    assert solved.success
    return 1 + solved.fun


@pytest.mark.parametrize("seed", range(80))
def test_topk_low_end_is_the_optimum_of_a_linear_programme(seed):
    rng = np.random.default_rng(seed)
    further = seed % 2 == 1
    vocabulary = int(rng.integers(6, 13)) + 10 * further
    p, q = (rng.dirichlet(np.full(vocabulary, rng.uniform(0.2, 5))) for _ in range(2))
    listed = topk(p, int(rng.integers(1, 6))), topk(q, int(rng.integers(1, 6)))
    ceilings = {name: min(law.values()) for name, law in zip(("p_ceiling", "q_ceiling"), listed, strict=True)}
    if further:
        # Some tokens below the top k are known too, as a server adds the sampled one.
        for law, known in ((p, listed[0]), (q, listed[1])):
            known.update({int(t): float(law[t]) for t in rng.choice(vocabulary, 3)})
    else:
        assert tv.topk_bounds(*listed) == tv.topk_bounds(*listed, **ceilings)
    bounds = tv.topk_bounds(*listed, **ceilings)
    assert bounds.low == pytest.approx(smallest_tv(*listed, vocabulary, **ceilings), abs=1e-7)
    assert bounds.low - 1e-9 <= tv.tv_distance(p[None], q[None])[0] <= bounds.high + 1e-9
    assert bounds.high - bounds.low <= 2 - sum(listed[0].values()) - sum(listed[1].values()) + 1e-9


def test_topk_low_end_holds_where_a_tiny_vocabulary_limits_the_tails():
    # Further tokens known, four tokens in all: the only case where the low end is not attained.
    listed, ceilings = ({0: 0.36, 1: 0.0}, {2: 0.3}), {"p_ceiling": 0.36, "q_ceiling": 0.3}
    bounds = tv.topk_bounds(*listed, **ceilings)
    assert bounds.low == pytest.approx(0.06)
    assert smallest_tv(*listed, 4, **ceilings) == pytest.approx(0.1)
    assert smallest_tv(*listed, 20, **ceilings) == pytest.approx(0.06)


def test_topk_high_end_is_attained_by_separate_tails():
    p, q = {0: 0.5, 1: 0.3}, {0: 0.6, 2: 0.2}
    full_p, full_q = np.zeros(40), np.zeros(40)
    full_p[[0, 1]], full_q[[0, 2]] = (0.5, 0.3), (0.6, 0.2)
    full_p[3:13], full_q[20:30] = 0.02, 0.02
    assert tv.tv_distance(full_p[None], full_q[None])[0] == pytest.approx(tv.topk_bounds(p, q).high)


def test_topk_of_whole_laws_is_exact():
    p, q = np.random.default_rng(0).dirichlet(np.ones(9), size=2)
    exact = tv.tv_distance(p[None], q[None])[0]
    assert tv.topk_bounds(topk(p, 9), topk(q, 9)) == pytest.approx((exact, exact))
    assert tv.topk_bounds({1: 1.0}, {2: 1.0}) == Interval(1, 1)
    assert tv.topk_bounds({1: 1.0005}, {1: 1.0}) == pytest.approx((0, 0))


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ({}, "p lists 0 probabilities"),
        ({0: 0.9, 1: 0.2}, "with sum 1.1"),
        ({0: 0.9, 1: -0.2}, "none negative"),
        ({0: 0.9, 1: math.nan}, "sum nan"),
    ],
)
def test_topk_refuses(p, message):
    with pytest.raises(NotADistributionError, match=message):
        tv.topk_bounds(p, {0: 1.0})


def test_topk_refuses_a_ceiling_that_is_no_probability():
    with pytest.raises(EvaluationError, match="q_ceiling should be a probability, is nan"):
        tv.topk_bounds({0: 1.0}, {0: 1.0}, q_ceiling=math.nan)


def test_plugin_is_biased_and_its_interval_is_not():
    rng = np.random.default_rng(0)
    uniform = np.full(77, 1 / 77)
    estimates = [tv.plugin_tv(*rng.multinomial(250, uniform, size=2)) for _ in range(400)]
    assert np.mean([e.value for e in estimates]) == pytest.approx(0.305, abs=0.005)
    assert math.sqrt(76 / (math.pi * 250)) == pytest.approx(0.311, abs=0.001)
    assert all(e.interval.low == 0 for e in estimates)


def test_plugin_radius_is_that_of_both_laws():
    value, interval = tv.plugin_tv(np.array([500, 300, 200]), np.array([70, 20, 10]), delta=0.1)
    events = math.log((2**3 - 2) / 0.05)
    radius = math.sqrt(events / 2000) + math.sqrt(events / 200)
    assert value == pytest.approx(0.2)
    assert interval == pytest.approx((max(0, 0.2 - radius), 0.2 + radius))


@pytest.mark.parametrize("outcomes", [2, 3, 10])
def test_plugin_interval_covers(outcomes):
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(outcomes), size=2)
    exact = tv.tv_distance(p[None], q[None])[0]
    covered = []
    for n, m in [(50, 50), (1000, 30)]:
        for _ in range(200):
            value, (low, high) = tv.plugin_tv(rng.multinomial(n, p), rng.multinomial(m, q), delta=0.2)
            covered.append(low <= exact <= high)
            assert low <= value <= high
    assert np.mean(covered) >= 0.8
