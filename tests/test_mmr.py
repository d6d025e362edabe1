"""Maximal marginal relevance against its definition, computed row by row in Python."""

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers import reranking
from retrievers.dense import Dense
from retrievers.dpp import DPP
from retrievers.mmr import MMR, marginal_relevance
from retrievers.retriever import Resources


def problem(queries, rows, width, seed):
    """Random queries with rows of length 1, some of them copies of others, the nearest first."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(queries, rows, width))
    vectors[:, rows // 2 :: 3] = vectors[:, :1]
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    asked = rng.normal(size=(queries, width))
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    relevance = np.einsum("qrw,qw->qr", vectors, asked)
    order = np.argsort(-relevance, axis=1)
    vectors = np.take_along_axis(vectors, order[:, :, None], axis=1).astype(np.float32)
    return np.take_along_axis(relevance, order, axis=1).astype(np.float32), vectors


def value(relevance, vectors, row, taken):
    redundancy = max([0.0, *(float(vectors[row] @ vectors[other]) for other in taken)])
    return 0.5 * float(relevance[row]) - 0.5 * redundancy


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_each_row_taken_is_the_best_there_is(queries, rows, width, seed):
    relevance, vectors = problem(queries, rows, width, seed)
    places, scores = marginal_relevance(relevance, vectors, rows)
    assert np.sort(places, axis=1).tolist() == [list(range(rows))] * queries
    for query in range(queries):
        taken = []
        for place, score in zip(places[query].tolist(), scores[query].tolist(), strict=True):
            values = {
                row: value(relevance[query], vectors[query], row, taken) for row in range(rows) if row not in taken
            }
            assert score == pytest.approx(values[place], abs=1e-6)
            assert score >= max(values.values()) - 1e-6
            taken.append(place)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_copy_waits_for_what_is_new():
    retriever = MMR(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(["card lost", "card lost", "lost card", "card today", "refund"])
    [ids], [scores] = retriever.search(["card lost today"], 5)
    assert ids.tolist() == [0, 3, 4, 1, 2]
    near = 6**-0.5  # half the cosine of two words of two to three
    np.testing.assert_allclose(scores, [near, near - 0.25, 0, near - 0.5, near - 0.5], atol=1e-6)


# The list of candidates, which dpp shares

POOL = [f"{first} {second} {third}" for first in "abcdef" for second in "uvwxyz" for third in "klm"]


def of_list(patch, candidates, kind=MMR):
    patch.setattr(reranking, "_CANDIDATES", candidates)
    retriever = kind(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(POOL)
    return retriever


@pytest.mark.parametrize("kind", [MMR, DPP])
def test_a_query_that_is_a_row_finds_what_it_would_without_it(kind):
    rng = np.random.default_rng(4)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, size=6).tolist()) for _ in range(60)]
    resources = Resources(seed=0, encoder=HashedWords())
    everyone = kind(resources)
    everyone.fit([*texts, texts[3]])  # twice
    for row in (3, 17):
        others = [i for i in range(60) if i != row]
        alone = kind(resources)
        alone.fit([texts[i] for i in others])
        hits = everyone.search([texts[row]], 12)
        found = [i for i in hits.ids[0].tolist() if i not in (row, 60)]
        copies = 12 - len(found)
        assert copies == (2 if row == 3 else 1)
        assert set(hits.ids[0, :copies].tolist()) <= {row, 60}
        assert found == [others[i] for i in alone.search([texts[row]], 12 - copies).ids[0].tolist()]
        assert (np.diff(hits.scores[0]) <= 0).all()


@pytest.mark.parametrize("kind", ["MMR", "DPP"])
def test_rows_after_the_list_follow_by_cosine(kind, monkeypatch):
    from retrievers.dpp import DPP

    retriever = of_list(monkeypatch, 10, {"MMR": MMR, "DPP": DPP}[kind])
    dense = Dense(Resources(seed=0, encoder=HashedWords()))
    dense.fit(POOL)
    queries = ["a u k", "f z", "nothing of it", ""]
    ids, scores = retriever.search(queries, len(POOL))
    nearest = dense.search(queries, len(POOL)).ids
    assert np.sort(ids[:, :10], axis=1).tolist() == np.sort(nearest[:, :10], axis=1).tolist()
    assert ids[:, 10:].tolist() == nearest[:, 10:].tolist()
    assert (np.diff(scores, axis=1) <= 0).all()
    for k in (1, 9, 10, 11, 50):
        fewer = retriever.search(queries, k)
        assert fewer.ids.tolist() == ids[:, :k].tolist()
        assert fewer.scores.tolist() == scores[:, :k].tolist()


def test_blocks_of_queries_change_nothing(monkeypatch):
    retriever = of_list(monkeypatch, 30)
    queries = [f"{first} {second}" for first in "abc" for second in "uvw"]
    whole = retriever.search(queries, 12)
    monkeypatch.setattr(reranking, "_BLOCK", 2)
    parts = retriever.search(queries, 12)
    assert (parts.ids.tolist(), parts.scores.tolist()) == (whole.ids.tolist(), whole.scores.tolist())
