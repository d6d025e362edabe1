"""The vote of the neighbours: a predictor without a language model, the baseline every prompt has to beat.

- The law is the share of each label among the rows of the pool nearest to the text, by cosine of sentence embeddings.
- So that the baseline is as strong as it honestly can be, how many rows vote and whether the nearer ones weigh more is
  chosen on the pool: by the log-loss of its rows, each left out. No query and no reference is looked at.
"""

import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from icl_compiler.backends.backend import Progress, Usage
from icl_compiler.calibration.held_out import log_loss
from icl_compiler.calibration.votes import Vote, Voters, law_of_votes, smoothed, voters_of
from icl_compiler.compile import new_retriever
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.predictor import Predictions
from retrievers.retriever import Retriever

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
VOTES = tuple(Vote(k, sharpness) for k in _COUNTS for sharpness in (0.0, 10.0, 20.0, 40.0, 80.0))
"""What is tried: so many rows, alike or by exp(sharpness * cosine)."""
LEFT_OUT = 1000
"""Rows of the pool that are left out, each in turn; of a larger pool that many at random."""
_SURE = 0.01  # of a law is spread over all labels before its log-loss is taken: nobody is sure after a few votes
_SPARE = 8  # rows more than vote, of which some may have the query's own text


class NeighboursVote:
    """The labels of the nearest rows, counted; a row with the query's own text has no vote.

    Args:
        vote: how they are counted; by default that of lowest log-loss on rows of the pool, each left out.
        labels: all there are, in the order of the probabilities; by default those in the pool.
        retriever: already fitted on `pool`, to spare the encoding; by default a dense one is made.
    """

    def __init__(
        self,
        pool: Dataset,
        *,
        encoder: str,
        vote: Vote | None = None,
        labels: tuple[str, ...] | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        self.labels = labels or pool.labels
        self._texts = [normalise_text(text) for text in pool.texts]
        position = {label: i for i, label in enumerate(self.labels)}
        self._answers = np.array([position[answer] for answer in pool.answers], dtype=np.int64)
        if retriever is None:
            retriever = new_retriever("dense", encoder=encoder, seed=0)
            retriever.fit(pool.texts)
        self._retriever = retriever
        self.vote = self._chosen(pool) if vote is None else vote

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """The share of each label among the neighbours of each text."""
        started = time.perf_counter()
        laws = law_of_votes(self._voters(texts, self.vote.k), self.vote, len(self.labels))
        if progress is not None:
            progress(len(texts))
        nothing = np.zeros(len(texts), dtype=np.int64)
        return Predictions(self.labels, laws, nothing, Usage(0, 0, 0), time.perf_counter() - started)

    def _voters(self, texts: Sequence[str], k: int) -> Voters:
        hits = self._retriever.search(texts, min(k + _SPARE, len(self._texts)))
        queries = [normalise_text(text) for text in texts]
        same = [
            [self._texts[row] == query for row in ids] for query, ids in zip(queries, hits.ids.tolist(), strict=True)
        ]
        return voters_of(hits, self._answers, np.array(same, dtype=bool).reshape(hits.ids.shape))

    def _chosen(self, pool: Dataset) -> Vote:
        rows = np.arange(len(pool))
        if len(pool) > LEFT_OUT:
            rows = np.random.default_rng(0).permutation(rows)[:LEFT_OUT]
        voters = self._voters([pool.texts[row] for row in rows.tolist()], VOTES[-1].k)
        return best_vote(voters, self._answers[rows], len(self.labels))


def best_vote(voters: Voters, answers: Int64[np.ndarray, " queries"], labels: int) -> Vote:
    """The vote of lowest log-loss, of equal ones the first of `VOTES`; a single row votes where there are no others.

    >>> voters = Voters(np.array([[0, 1, 1], [1, 0, 0]] * 4), np.array([[0.9, 0.5, 0.5]] * 8))
    >>> best_vote(voters, np.array([0, 1] * 4), 2), best_vote(voters, np.array([1, 0] * 4), 2)
    (Vote(k=1, sharpness=0.0, smoothing=0.0), Vote(k=3, sharpness=0.0, smoothing=0.0))
    """
    targets = np.eye(labels)[answers]
    tried = [vote for vote in VOTES if vote.k <= voters.labels.shape[1]] or [VOTES[0]]
    return min(tried, key=lambda vote: log_loss(smoothed(law_of_votes(voters, vote, labels), _SURE), targets).mean())
