"""The vote of the neighbours: a predictor without a language model, the baseline every prompt has to beat.

- The law is the share of each label among the rows of the pool nearest to the text, by cosine of sentence embeddings.
- So that the baseline is as strong as it honestly can be, how many rows vote and whether the nearer ones weigh more is
  chosen on the pool: by the log-loss of its rows, each left out. No query and no reference is looked at.
"""

import time
from collections.abc import Sequence

import numpy as np

from icl_compiler.backends.backend import Progress, Usage
from icl_compiler.calibration.vote_choice import MOST, best_vote, drawn_rows, voters_among
from icl_compiler.calibration.votes import Vote, Voters, law_of_votes
from icl_compiler.compile import new_retriever
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.encoders import joint_encoder
from icl_compiler.predictor import Predictions
from retrievers.retriever import Retriever


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
            retriever = new_retriever("dense", encoder=joint_encoder(encoder, None), seed=0)
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
        return voters_among(self._retriever, self._texts, self._answers, texts, k)

    def _chosen(self, pool: Dataset) -> Vote:
        rows = drawn_rows(len(pool))
        voters = self._voters([pool.texts[row] for row in rows.tolist()], MOST)
        return best_vote(voters, self._answers[rows], len(self.labels))
