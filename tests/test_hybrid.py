"""Reciprocal rank fusion against the sum written out, over the two rankings asked one by one."""

from fractions import Fraction

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import NASTY, customers

from retrievers.bm25 import BM25
from retrievers.dense import Dense
from retrievers.hybrid import Hybrid, fused
from retrievers.retriever import Resources

POOL = [*customers().texts, *NASTY, "unlike all others"]
QUERIES = ["my card is lost", "the refund", "zzz", "", *NASTY]


def fitted(kind, pool=POOL):
    retriever = kind(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(pool)
    return retriever


def by_hand(query, depth=1000):
    """Exact sums of 1 / (60 + rank) by row."""
    sums = {}
    dense, lexical = (fitted(kind).search([query], len(POOL)) for kind in (Dense, BM25))
    ranked = [row for row, score in zip(lexical.ids[0].tolist(), lexical.scores[0].tolist(), strict=True) if score > 0]
    for ranking in (dense.ids[0].tolist()[:depth], ranked[:depth]):
        for rank, row in enumerate(ranking, start=1):
            sums[row] = sums.get(row, 0) + Fraction(1, 60 + rank)
    return sums


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_sums_and_order(query):
    [ids], [scores] = fitted(Hybrid).search([query], len(POOL))
    sums = by_hand(query)
    assert ids.tolist() == sorted(sums, key=lambda row: (-sums[row], row))
    np.testing.assert_allclose(scores, [float(sums[row]) for row in ids.tolist()], rtol=1e-6)


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_rows_deeper_than_both_rankings_follow_by_cosine(query, monkeypatch):
    monkeypatch.setattr("retrievers.hybrid._DEPTH", 4)
    [ids], [scores] = fitted(Hybrid).search([query], len(POOL))
    sums = by_hand(query, depth=4)
    ranked = sorted(sums, key=lambda row: (-sums[row], row))
    nearest = fitted(Dense).search([query], len(POOL)).ids[0].tolist()
    assert ids.tolist() == ranked + [row for row in nearest if row not in sums]
    assert (scores[len(ranked) :] == 0).all()
    for k in range(1, len(POOL)):
        assert fitted(Hybrid).search([query], k).ids[0].tolist() == ids.tolist()[:k]


def test_a_query_without_known_words_is_dense_retrieval():
    dense, hybrid = fitted(Dense), fitted(Hybrid)
    assert hybrid.search(["zzz"], 5).ids.tolist() == dense.search(["zzz"], 5).ids.tolist()


def test_by_hand_in_numbers():
    rows, sums = fused([np.array([7, 8, 9]), np.array([9, 5])])
    assert rows.tolist() == [9, 7, 5, 8]
    np.testing.assert_allclose(sums, [1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
