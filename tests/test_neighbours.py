from collections.abc import Sequence

import numpy as np
import pytest

from evaluation.neighbours import NeighboursVote
from icl_compiler.data import Dataset
from retrievers.dense import Dense
from retrievers.retriever import Resources


class Angles:
    """Texts are angles in degrees; their vectors point there."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        angles = np.deg2rad([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def vote(k: int) -> NeighboursVote:
    pool = Dataset(("0", "10", "20", "170", "180"), ("a", "a", "b", "b", "b"), "classification", "angles")
    dense = Dense(Resources(seed=0, encoder=Angles()))
    dense.fit(pool.texts)
    return NeighboursVote(pool, encoder="not used", k=k, retriever=dense)


def test_share_of_the_nearest_by_hand() -> None:
    said = vote(3).predict(["5", "175"])
    np.testing.assert_allclose(said.probabilities, [[2 / 3, 1 / 3], [0, 1]])
    assert said.usage == (0, 0, 0)


def test_a_row_has_no_vote_on_its_own_text() -> None:
    np.testing.assert_allclose(vote(1).predict(["20"]).probabilities, [[1, 0]])


def test_all_rows_vote_where_there_are_few() -> None:
    np.testing.assert_allclose(vote(50).predict(["5"]).probabilities, [[0.4, 0.6]])
    assert vote(2).predict(["90"]).probabilities.sum() == pytest.approx(1)
