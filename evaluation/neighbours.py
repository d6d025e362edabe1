"""The vote of the neighbours: a predictor without a language model, the baseline every prompt has to beat.

The law is the share of each label among the `k` rows of the pool nearest to the text, by cosine of sentence embeddings.
"""

import time
from collections.abc import Sequence

import numpy as np

from icl_compiler.backends.backend import Progress, Usage
from icl_compiler.calibration.votes import Vote, law_of_votes, voters_of
from icl_compiler.compile import new_retriever
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.predictor import Predictions
from retrievers.retriever import Retriever


class NeighboursVote:
    """The labels of the nearest rows, counted; a row with the query's own text has no vote.

    Args:
        labels: all there are, in the order of the probabilities; by default those in the pool.
        retriever: already fitted on `pool`, to spare the encoding; by default a dense one is made.
    """

    def __init__(
        self,
        pool: Dataset,
        *,
        encoder: str,
        k: int = 8,
        labels: tuple[str, ...] | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        self.labels = labels or pool.labels
        self._k = min(k, len(pool))
        self._texts = [normalise_text(text) for text in pool.texts]
        position = {label: i for i, label in enumerate(self.labels)}
        self._answers = np.array([position[answer] for answer in pool.answers], dtype=np.int64)
        if retriever is None:
            retriever = new_retriever("dense", encoder=encoder, seed=0)
            retriever.fit(pool.texts)
        self._retriever = retriever

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """The share of each label among the neighbours of each text."""
        started = time.perf_counter()
        hits = self._retriever.search(texts, self._k + 1)
        queries = [normalise_text(text) for text in texts]
        same = [
            [self._texts[row] == query for row in ids] for query, ids in zip(queries, hits.ids.tolist(), strict=True)
        ]
        is_query = np.array(same, dtype=bool).reshape(hits.ids.shape)
        laws = law_of_votes(voters_of(hits, self._answers, is_query), Vote(self._k), len(self.labels))
        if progress is not None:
            progress(len(texts))
        nothing = np.zeros(len(texts), dtype=np.int64)
        return Predictions(self.labels, laws, nothing, Usage(0, 0, 0), time.perf_counter() - started)
