"""Greedy search of a determinantal point process against determinants, computed anew for every set."""

import math
from itertools import combinations

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mmr import problem

from retrievers.dpp import DPP, greedy_map
from retrievers.retriever import Resources


def kernel(relevance, vectors):
    """L of CEIL, in double precision."""
    quality = np.exp((1 + relevance.astype(float)) / 2 / (2 * 0.1))
    points = vectors.astype(float)
    return quality[:, None] * (1 + points @ points.T) / 2 * quality


def log_determinant(matrix, rows):
    sign, value = np.linalg.slogdet(matrix[np.ix_(rows, rows)])
    return value if sign > 0 else -math.inf


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 10), st.integers(2, 8), st.integers(0, 10**6))
def test_each_row_taken_raises_the_determinant_most(queries, rows, width, seed):
    relevance, vectors = problem(queries, rows, width, seed)
    places, scores = greedy_map(relevance, vectors, rows)
    assert np.sort(places, axis=1).tolist() == [list(range(rows))] * queries
    for query in range(queries):
        matrix = kernel(relevance[query], vectors[query])
        taken, independent = set(), []
        for place, score in zip(places[query].tolist(), scores[query].tolist(), strict=True):
            before = log_determinant(matrix, independent) if independent else 0.0
            least = 5 * (1 + relevance[query].astype(float)) + math.log(1e-6)
            left = sorted(set(range(rows)) - taken)
            gains = {row: max(log_determinant(matrix, [*independent, row]) - before, least[row]) for row in left}
            assert score == pytest.approx(gains[place], abs=1e-3)
            assert score >= max(gains.values()) - 1e-3
            taken.add(place)
            if gains[place] > least[place]:
                independent.append(place)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_the_greedy_set_is_near_the_best_of_all_sets():
    ratios = []
    for seed in range(20):
        relevance, vectors = problem(1, 9, 6, seed)
        matrix = kernel(relevance[0], vectors[0])
        places, scores = greedy_map(relevance, vectors, 3)
        greedy = log_determinant(matrix, places[0].tolist())
        assert greedy == pytest.approx(float(scores.sum()), abs=1e-3)
        best = max(log_determinant(matrix, list(rows)) for rows in combinations(range(9), 3))
        assert greedy <= best + 1e-9
        ratios.append(best - greedy)
    # The bound of a submodular function is loose; that is what is found.
    assert np.mean(ratios) < 0.1


def test_rows_that_are_spanned_come_last_by_relevance():
    angles = np.deg2rad([0, 30, 0, 30, 60])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)[None].astype(np.float32)
    relevance = vectors[:, :, 0].copy()
    places, scores = greedy_map(relevance, vectors, 5)
    # Two dimensions and the constant of the kernel: three rows say all there is to say.
    assert sorted(places[0, :3].tolist()) in ([0, 1, 4], [0, 3, 4], [1, 2, 4], [2, 3, 4])
    np.testing.assert_allclose(
        np.sort(scores[0, 3:])[::-1], 5 * (1 + np.cos(np.deg2rad([0, 30]))) + math.log(1e-6), rtol=1e-5
    )


def test_a_copy_waits_for_what_is_new():
    retriever = DPP(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(["card lost", "card lost", "lost card", "card stolen", "refund"])
    ids = retriever.search(["card lost today"], 5).ids[0].tolist()
    assert ids[0] == 0
    assert set(ids[1:3]) == {3, 4}
