"""The draw: nested, the same for all queries, and uniform by a chi-squared test with a fixed seed."""

from collections import Counter
from itertools import permutations

import pytest
from hashed_words import HashedWords
from scipy.stats import chisquare

from retrievers.retriever import Resources
from retrievers.uniform import Uniform


def drawn(rows, k, seed, queries=("x",)):
    retriever = Uniform(Resources(seed=seed, encoder=HashedWords()))
    retriever.fit(["text"] * rows)
    return retriever.search(queries, k)


def test_all_queries_get_the_same_rows_with_score_zero():
    ids, scores = drawn(10, 4, seed=3, queries=["a", "", "b"])
    assert ids[0].tolist() == ids[1].tolist() == ids[2].tolist()
    assert scores.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_nested(seed):
    order = drawn(20, 20, seed).ids[0].tolist()
    assert sorted(order) == list(range(20))
    assert all(drawn(20, k, seed).ids[0].tolist() == order[:k] for k in range(1, 20))


def test_every_order_is_equally_likely():
    counts = Counter(tuple(drawn(4, 4, seed).ids[0].tolist()) for seed in range(4800))
    assert set(counts) == set(permutations(range(4)))
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_zero_is_a_seed():
    assert drawn(50, 50, seed=0).ids.tolist() == drawn(50, 50, seed=0).ids.tolist()
    assert drawn(50, 50, seed=0).ids.tolist() != drawn(50, 50, seed=1).ids.tolist()
