"""Vote-k against the algorithm as it was published, which looks at every row and every voter at each step."""

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers import votek
from retrievers.retriever import Resources
from retrievers.votek import VoteK, vote_k


def graph(rows, k, seed):
    """Each row with `k` other rows at random."""
    rng = np.random.default_rng(seed)
    others = [rng.choice(rows - 1, size=k, replace=False) for _ in range(rows)]
    chosen = [[other + (other >= row) for other in some] for row, some in enumerate(others)]
    return np.array(chosen, dtype=np.int32).reshape(rows, k)


def votes_of(neighbours, row, taken):
    """score(u) = Σ over voters v of u that are not taken of 10^(−taken rows among v's neighbours)."""
    total = 0.0
    for voter, named in enumerate(neighbours.tolist()):
        if row in named and voter not in taken:
            total += 10.0 ** -len(taken & set(named))
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 14), st.integers(1, 5), st.integers(0, 10**6))
def test_each_row_taken_has_most_votes(rows, k, seed):
    neighbours = graph(rows, min(k, rows - 1), seed)
    order, votes = vote_k(neighbours, seed=seed)
    assert sorted(order.tolist()) == list(range(rows))
    taken = set()
    for row, had in zip(order.tolist(), votes.tolist(), strict=True):
        left = {other: votes_of(neighbours, other, taken) for other in set(range(rows)) - taken}
        assert had == pytest.approx(left[row], rel=1e-6, abs=1e-8)
        assert had >= max(left.values()) - 1e-6
        taken.add(row)
    assert (np.diff(votes) <= 0).all()


def test_where_rows_are_no_longer_taken_one_by_one(monkeypatch):
    neighbours = graph(40, 4, 0)
    order, _ = vote_k(neighbours, seed=0)
    monkeypatch.setattr(votek, "_ONE_BY_ONE", 7)
    first, fewer = vote_k(neighbours, seed=0)
    assert first[:7].tolist() == order[:7].tolist()
    assert sorted(first.tolist()) == list(range(40))
    assert (np.diff(fewer) <= 0).all()
    left = [votes_of(neighbours, row, set(first[:7].tolist())) for row in first[7:].tolist()]
    np.testing.assert_allclose(fewer[7:], left, atol=1e-6)


def test_the_seed_decides_between_equal_rows_only():
    circle = np.array([[(row + 1) % 9, (row - 1) % 9] for row in range(9)], dtype=np.int32)
    assert len({tuple(vote_k(circle, seed=seed)[0].tolist()) for seed in range(20)}) > 5
    star = np.array([[1], *[[0]] * 8], dtype=np.int32)
    assert {int(vote_k(star, seed=seed)[0][0]) for seed in range(20)} == {0}


class Places:
    """Texts are numbers of rows of an array."""

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts):
        return self.vectors[[int(text) for text in texts]]


def test_neighbours_are_the_most_similar_rows(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[50:58] = vectors[0]  # more copies than neighbours
    monkeypatch.setattr(votek, "_BLOCK", 7)
    found = votek._neighbours(vectors, seed=0)
    assert found.shape == (100, 5)
    cosines = vectors.astype(float) @ vectors.T.astype(float)
    np.fill_diagonal(cosines, -np.inf)
    for row, named in enumerate(found.tolist()):
        assert row not in named
        assert len(set(named)) == 5
        np.testing.assert_allclose(cosines[row, named], np.sort(cosines[row])[::-1][:5], atol=1e-6)


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, 0), (2, 1), (20, 1), (21, 2), (400, 20), (4000, 150)])
def test_how_many_neighbours(rows, expected):
    vectors = HashedWords().encode([f"w{number} x{number % 7}" for number in range(rows)])
    assert votek._neighbours(vectors, seed=0).shape == (rows, expected)


def test_the_first_rows_stand_for_different_regions_of_the_pool():
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16)[rng.permutation(np.repeat(np.arange(4), [100, 60, 30, 10]))]
    vectors = centres + 0.1 * rng.normal(size=centres.shape)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    retriever = VoteK(Resources(seed=0, encoder=Places(vectors)))
    retriever.fit([str(row) for row in range(200)])
    ids = retriever.search(["0", "199"], 12).ids
    assert ids[0].tolist() == ids[1].tolist()
    assert set(centres[ids[0]].argmax(axis=1).tolist()) == {0, 1, 2, 3}
    # The first one stands in the middle of many: nearer to its centre than most.
    assert (vectors * centres).sum(axis=1).argsort().argsort()[ids[0, 0]] > 100
