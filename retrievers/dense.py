"""Dense retrieval: cosine similarity of sentence embeddings, by `faiss`.

Exact up to 50,000 rows; `faiss_index` says what happens beyond.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.encoder import unit
from retrievers.faiss_index import load_index, nearest, new_index, save_index, vectors_of
from retrievers.retriever import Hits, Resources


class Dense:
    """Rows by the cosine between their vector and the query's."""

    score_meaning: ClassVar[str] = "cosine similarity"

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._index: Any = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return 0 if self._index is None else int(self._index.ntotal)

    def fit(self, texts: Sequence[str]) -> None:
        """Encode and index `texts`."""
        self._index = new_index(unit(self._resources.encoder.encode(texts)), seed=self._resources.seed)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows with the highest cosine, equal ones in the order of the rows."""
        k = min(k, self.rows)
        if not texts or not k:
            return Hits(np.empty((len(texts), k), dtype=np.int64), np.empty((len(texts), k), dtype=np.float32))
        return nearest(self._index, unit(self._resources.encoder.encode(texts)), k)

    def vectors(self, ids: Int64[np.ndarray, "queries k"]) -> Float32[np.ndarray, "queries k width"]:
        """The vectors of these rows, each of length 1."""
        return vectors_of(self._index, ids)

    def cosines(self, texts: Sequence[str], ids: Int64[np.ndarray, "queries k"]) -> Float32[np.ndarray, "queries k"]:
        """The cosine of each of `texts` with these rows of its own."""
        queries = unit(self._resources.encoder.encode(texts))
        found = np.empty(ids.shape, dtype=np.float32)
        for query, rows in enumerate(ids):
            found[query] = self.vectors(rows[None, :])[0] @ queries[query]
        return found

    def save(self, folder: Path) -> None:
        """Write the index, or the vectors where it is exact and is built again in no time."""
        save_index(self._index, folder)

    def load(self, folder: Path) -> None:
        """Read the index."""
        self._index = load_index(folder)
