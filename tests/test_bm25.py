"""BM25 against its formula, written out."""

import math
import re

import numpy as np
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, customers

from retrievers.bm25 import BM25
from retrievers.retriever import Resources

TEXT = st.lists(st.sampled_from(["Card", "card,", "lost", "is", "it", "7", "?", "naïve"]), max_size=6).map(" ".join)


def words(text):
    return re.findall(r"\w+", text.lower())


def formula(pool, query, k1=1.5, b=0.75):
    """Lucene's BM25 of Kamphuis et al. 2020; a word that stands twice in the query counts twice."""
    # A row without words has the length 1: in its place stands a mark.
    rows = [words(text) for text in pool]
    lengths = [len(row) or 1 for row in rows]
    mean = sum(lengths) / len(pool)
    scores = []
    for row, length in zip(rows, lengths, strict=True):
        score = 0.0
        for word in words(query):
            frequency, holding = row.count(word), sum(word in other for other in rows)
            rarity = math.log(1 + (len(pool) - holding + 0.5) / (holding + 0.5))
            score += rarity * frequency / (frequency + k1 * (1 - b + b * length / mean))
        scores.append(score)
    return scores


def searched(pool, queries, k):
    retriever = BM25(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(pool)
    return retriever.search(queries, k)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), TEXT)
def test_scores_are_those_of_the_formula(pool, query):
    [ids], [scores] = searched(pool, [query], len(pool))
    expected = np.array(formula(pool, query))
    np.testing.assert_allclose(scores, expected[ids], rtol=1e-5, atol=1e-6)


def test_ranking_of_a_pool_of_messages():
    pool = [*customers().texts, *NASTY]
    queries = ["my card is lost", "Where is the PARCEL, the parcel?", *NASTY]
    for query, ids, scores in zip(queries, *searched(pool, queries, 8), strict=True):
        expected = np.array(formula(pool, query))
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:8], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scores, expected[ids], rtol=1e-5, atol=1e-6)


def test_equal_scores_come_in_the_order_of_the_rows():
    pool = ["a b", "c", "a b", "c", "a b", "b a", "d"]
    hits = searched(pool, ["a", "nothing of it", ""], 5)
    assert hits.ids.tolist() == [[0, 2, 4, 5, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert searched(pool, ["a"], 2).ids.tolist() == [[0, 2]]


def test_stop_words_and_short_words_count():
    assert searched(["where is it", "a parcel", "i want"], ["is it a or i"], 1).ids.tolist() == [[0]]
    assert searched(["where is it", "a parcel", "i want"], ["a"], 1).ids.tolist() == [[1]]
