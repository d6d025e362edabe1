"""Dense and lexical retrieval together: reciprocal rank fusion (Cormack et al. 2009).

score(row) = Σ over the rankings that hold it of 1 / (60 + its rank),  ranks from 1

- Only ranks count, so cosines and BM25 scores need no common scale.
- A ranking has 1,000 rows, as in the paper's experiments; BM25's ends where no word of the query is left, since the
  order of the others says nothing. Rows in neither ranking come last, by their cosine, with the score 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from retrievers.bm25 import BM25
from retrievers.dense import Dense
from retrievers.retriever import Hits, Resources

_DEPTH = 1000
_CONSTANT = 60


class Hybrid:
    """Rows by their ranks in dense retrieval and in BM25."""

    score_meaning: ClassVar[str] = "sum of 1 / (60 + rank) over dense and bm25 retrieval"

    def __init__(self, resources: Resources) -> None:
        self._dense, self._lexical = Dense(resources), BM25(resources)

    def fit(self, texts: Sequence[str]) -> None:
        """Make both indices of `texts`."""
        self._dense.fit(texts)
        self._lexical.fit(texts)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows with the highest sum; equal ones in the order of the rows."""
        k = min(k, self._dense.rows)
        ids = np.empty((len(texts), k), dtype=np.int64)
        scores = np.zeros((len(texts), k), dtype=np.float32)
        if not k:
            return Hits(ids, scores)
        dense, lexical = self._dense.search(texts, max(k, _DEPTH)), self._lexical.search(texts, _DEPTH)
        for query in range(len(texts)):
            words = lexical.ids[query][lexical.scores[query] > 0]
            rows, sums = fused([dense.ids[query, :_DEPTH], words])
            others = dense.ids[query, _DEPTH:]
            ids[query] = np.concatenate([rows, others[~np.isin(others, rows)]])[:k]
            scores[query, : len(rows)] = sums[:k]
        return Hits(ids, scores)

    def save(self, folder: Path) -> None:
        """Write both indices, each into its own folder."""
        for name, part in (("dense", self._dense), ("bm25", self._lexical)):
            (folder / name).mkdir()
            part.save(folder / name)

    def load(self, folder: Path) -> None:
        """Read both indices."""
        self._dense.load(folder / "dense")
        self._lexical.load(folder / "bm25")


def fused(
    rankings: Sequence[Int64[np.ndarray, " _"]],
) -> tuple[Int64[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """The rows of all `rankings`, each of which is best first, and the sum of each over them; best first.

    >>> rows, sums = fused([np.array([3, 1]), np.array([1, 2])])
    >>> rows.tolist(), (1 / sums).round(2).tolist()
    ([1, 3, 2], [30.75, 61.0, 62.0])
    """
    shares = np.concatenate([1 / (_CONSTANT + 1 + np.arange(len(ranking))) for ranking in rankings])
    rows, where = np.unique(np.concatenate(rankings), return_inverse=True)
    sums = np.bincount(where, weights=shares, minlength=len(rows))
    order = np.lexsort((rows, -sums))
    return rows[order], sums[order]
