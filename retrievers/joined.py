"""Two indices of one kind searched as one: rows that came later stand beside those that were indexed before.

Right only where the score of a row depends on the row and the query alone, as a cosine does: the rows of both are then
in the order that one index over all of them would give.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.dense import Dense
from retrievers.retriever import Hits, Retriever


class Joined:
    """The rows of `first`, then those of `more`, numbered from `rows` on.

    Args:
        rows: how many `first` has.
    """

    def __init__(self, first: Retriever, more: Retriever, *, rows: int) -> None:
        self._first, self._more, self._rows = first, more, rows

    @property
    def score_meaning(self) -> str:
        """What a score is."""
        return self._first.score_meaning

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` best rows of both, equal ones in the order of the rows."""
        first, more = self._first.search(texts, k), self._more.search(texts, k)
        ids = np.concatenate([first.ids, more.ids + self._rows], axis=1)
        scores = np.concatenate([first.scores, more.scores], axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def cosines(self, texts: Sequence[str], ids: Int64[np.ndarray, "queries k"]) -> Float32[np.ndarray, "queries k"]:
        """As `Dense.cosines`, of rows of both."""
        found = np.zeros(ids.shape, dtype=np.float32)
        for index, less, mine in ((self._first, 0, ids < self._rows), (self._more, self._rows, ids >= self._rows)):
            if mine.any() and isinstance(index, Dense | Joined):
                found[mine] = index.cosines(texts, np.where(mine, ids - less, 0))[mine]
        return found

    def fit(self, texts: Sequence[str]) -> None:
        """Not for this: both indices are there already."""
        raise TypeError("a joined index is made of two that are there; fit one of them")

    def save(self, folder: Path) -> None:
        """Not for this: a program that is kept has one index."""
        raise TypeError("a joined index is not kept; make one index of all rows")

    def load(self, folder: Path) -> None:
        """Not for this, as `save`."""
        raise TypeError("a joined index is not kept; make one index of all rows")
