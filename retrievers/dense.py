"""Dense retrieval: cosine similarity of sentence embeddings, exact, by `faiss`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from retrievers.retriever import Hits, Resources


class Dense:
    """Rows by the cosine between their vector and the query's."""

    score_meaning: ClassVar[str] = "cosine similarity"

    def __init__(self, resources: Resources) -> None:
        self._encoder = resources.encoder
        self._vectors = np.empty((0, 0), dtype=np.float32)
        self._index: Any = None

    def fit(self, texts: Sequence[str]) -> None:
        """Encode and index `texts`."""
        self._set(self._encoder.encode(texts))

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows with the highest cosine, equal ones in the order of the rows."""
        k = min(k, len(self._vectors))
        if not texts or not k:
            return Hits(np.empty((len(texts), k), dtype=np.int64), np.empty((len(texts), k), dtype=np.float32))
        scores, ids = self._index.search(self._encoder.encode(texts), k)
        order = np.lexsort((ids, -scores), axis=1)
        return Hits(np.take_along_axis(ids.astype(np.int64), order, axis=1), np.take_along_axis(scores, order, axis=1))

    def save(self, folder: Path) -> None:
        """Write the vectors; the index over them is exact and is built again in no time."""
        np.save(folder / "vectors.npy", self._vectors, allow_pickle=False)

    def load(self, folder: Path) -> None:
        """Read the vectors and index them."""
        self._set(np.load(folder / "vectors.npy", allow_pickle=False))

    def _set(self, vectors: Float32[np.ndarray, "rows width"]) -> None:
        import faiss

        self._vectors = vectors
        self._index = faiss.IndexFlatIP(max(1, vectors.shape[1]))
        if len(vectors):
            self._index.add(vectors)
