from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from evaluation.neighbours import NeighboursVote
from icl_compiler.calibration.vote_choice import VOTES
from icl_compiler.calibration.votes import Vote
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
    return NeighboursVote(pool, encoder="not used", vote=Vote(k), retriever=dense)


def test_share_of_the_nearest_by_hand() -> None:
    said = vote(3).predict(["5", "175"])
    np.testing.assert_allclose(said.probabilities, [[2 / 3, 1 / 3], [0, 1]])
    assert said.usage == (0, 0, 0)


def test_a_row_has_no_vote_on_its_own_text() -> None:
    np.testing.assert_allclose(vote(1).predict(["20"]).probabilities, [[1, 0]])


def test_the_vote_is_that_which_serves_rows_left_out_best() -> None:
    """Against scikit-learn, which is fitted anew without each row."""
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 90, 40))
    labels = np.where((angles > 45) ^ (rng.random(40) < 0.25), "b", "a")
    pool = Dataset(tuple(map(str, angles)), tuple(labels), "classification", "angles")
    dense = Dense(Resources(seed=0, encoder=Angles()))
    dense.fit(pool.texts)
    chosen = NeighboursVote(pool, encoder="not used", retriever=dense)
    vectors = Angles().encode(pool.texts).astype(float)

    def fitted(vote: Vote, rows: np.ndarray) -> KNeighborsClassifier:
        weights = lambda distances: np.exp(-vote.sharpness * distances)  # noqa: E731
        return KNeighborsClassifier(vote.k, weights=weights, metric="cosine").fit(vectors[rows], labels[rows])

    def risk(vote: Vote) -> float:
        laws = [fitted(vote, np.delete(np.arange(40), row)).predict_proba(vectors[[row]])[0] for row in range(40)]
        right = np.array(laws)[np.arange(40), (labels == "b").astype(int)]
        return float(-np.log(0.99 * right + 0.01 / 2).mean())

    tried = [vote for vote in VOTES if vote.k < 40]
    risks = [risk(vote) for vote in tried]
    assert risk(chosen.vote) == pytest.approx(min(risks), rel=1e-3)
    assert risk(Vote(8)) > min(risks) * 1.01, "the choice matters"
    asked = ["12.5", "44", "80"]
    expected = fitted(chosen.vote, np.arange(40)).predict_proba(Angles().encode(asked).astype(float))
    np.testing.assert_allclose(chosen.predict(asked).probabilities, expected, atol=1e-3)


def test_a_pool_of_one_row_has_a_vote() -> None:
    pool = Dataset(("0",), ("a",), "classification", "angles")
    dense = Dense(Resources(seed=0, encoder=Angles()))
    dense.fit(pool.texts)
    said = NeighboursVote(pool, encoder="not used", labels=("a", "b"), retriever=dense).predict(["5"])
    assert said.probabilities.tolist() == [[1, 0]]


def test_all_rows_vote_where_there_are_few() -> None:
    np.testing.assert_allclose(vote(50).predict(["5"]).probabilities, [[0.4, 0.6]])
    assert vote(2).predict(["90"]).probabilities.sum() == pytest.approx(1)
