"""Coverage of the query's words against sets of words in Python."""

import math
import re

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, customers

from retrievers import coverage
from retrievers.bm25 import BM25
from retrievers.coverage import Coverage
from retrievers.retriever import Resources

TEXT = st.lists(st.sampled_from(["card", "lost", "is", "it", "late", "parcel", "?"]), max_size=6).map(" ".join)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def fitted(kind, pool):
    retriever = kind(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(pool)
    return retriever


def require_greedy(pool, query, ids, scores, candidates):
    """Each row adds most of what can be added, as sets of words say it, and is scored by that."""

    def rarity(word):
        holding = sum(word in words(text) for text in pool)
        return math.log(1 + (len(pool) - holding + 0.5) / (holding + 0.5))

    bm25 = dict(zip(*(part[0].tolist() for part in fitted(BM25, pool).search([query], len(pool))), strict=True))
    listed = [row for row in list(bm25)[:candidates] if bm25[row] > 0]
    wanted = words(query) & set().union(*(words(pool[row]) for row in listed))
    whole = sum(map(rarity, wanted))
    covered, rounds, taken = set(), 0, []
    for row, score in zip(ids, scores, strict=True):
        left = [other for other in listed if other not in taken]
        if not left:
            break

        def added(other, covered=covered):
            return sum(rarity(word) for word in (words(pool[other]) & wanted) - covered) / whole

        if max(map(added, left)) == 0:
            covered, rounds = set(), rounds + 1

            def added(other):
                return sum(rarity(word) for word in words(pool[other]) & wanted) / whole

        best = max(map(added, left))
        assert row in left
        assert added(row) == pytest.approx(best, abs=1e-9)
        # Of rows that add as much, none has a higher score of BM25.
        assert bm25[row] >= max(bm25[other] for other in left if added(other) > best - 1e-9) - 1e-5
        assert score == pytest.approx(best - rounds, abs=1e-6)
        covered = covered | words(pool[row])
        taken.append(row)
    rest = [row for row in bm25 if row not in taken]
    assert ids[len(taken) :] == rest[: len(ids) - len(taken)]
    assert scores[len(taken) :] == [-rounds] * (len(ids) - len(taken))


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=1, max_size=9), TEXT)
def test_rows_cover_the_query_greedily(pool, query):
    [ids], [scores] = fitted(Coverage, pool).search([query], len(pool))
    require_greedy(pool, query, ids.tolist(), scores.tolist(), 256)


@pytest.mark.parametrize("candidates", [3, 256])
def test_a_pool_of_messages(candidates, monkeypatch):
    monkeypatch.setattr(coverage, "_CANDIDATES", candidates)
    pool = [*customers().texts, *NASTY]
    queries = ["where is my stolen card", "a refund is late", "zzz", *NASTY]
    hits = fitted(Coverage, pool).search(queries, len(pool))
    for query, ids, scores in zip(queries, hits.ids.tolist(), hits.scores.tolist(), strict=True):
        require_greedy(pool, query, ids, scores, candidates)
    assert (np.diff(hits.scores, axis=1) <= 0).all()
    for k in (1, 3, 4, 10):
        assert fitted(Coverage, pool).search(queries, k).ids.tolist() == hits.ids[:, :k].tolist()


def test_two_rows_cover_what_the_two_best_of_bm25_do_not():
    pool = ["lost card card", "lost card", "my late parcel", "some refund", "nothing", "other"]
    query = "lost card and late parcel"
    assert fitted(BM25, pool).search([query], 3).ids[0].tolist()[0] in (0, 1, 2)
    assert set(fitted(Coverage, pool).search([query], 2).ids[0].tolist()) in ({0, 2}, {1, 2})


def test_a_word_counts_once_however_often_the_query_says_it():
    pool = ["card", "parcel", "late", "x"]
    [scores] = fitted(Coverage, pool).search(["card card card parcel late"], 3).scores
    np.testing.assert_allclose(scores, [1 / 3] * 3, rtol=1e-6)
