"""The rows of the query's cluster, nearest first, then those of the next cluster.

The vectors are put into √rows clusters by spherical k-means (`faiss.Kmeans`, seeded, on one thread, so that the same
pool gives the same clusters). A query's cluster is that with the nearest centre. Beside dense retrieval this keeps
to one theme: a row of a neighbouring cluster waits until the query's own is used up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.encoder import unit
from retrievers.faiss_index import one_thread
from retrievers.retriever import Hits, Resources

_ITERATIONS = 20


class Cluster:
    """Rows by their cluster, and in it by the cosine to the query."""

    score_meaning: ClassVar[str] = "cosine similarity, less 2 for each cluster that is nearer to the query"

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._vectors = np.empty((0, 0), dtype=np.float32)
        self._centres = np.empty((0, 0), dtype=np.float32)
        self._clusters = np.empty(0, dtype=np.int64)

    def fit(self, texts: Sequence[str]) -> None:
        """Encode `texts` and find their clusters."""
        self._vectors = unit(self._resources.encoder.encode(texts))
        self._centres, self._clusters = k_means(self._vectors, seed=self._resources.seed)
        self._collect()

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The first `k` rows; equal ones of a cluster in the order of the rows."""
        k = min(k, len(self._vectors))
        ids = np.empty((len(texts), k), dtype=np.int64)
        scores = np.empty((len(texts), k), dtype=np.float32)
        if not texts or not k:
            return Hits(ids, scores)
        for i, query in enumerate(unit(self._resources.encoder.encode(texts))):
            nearest_first = np.argsort(-np.vecdot(self._centres, query), kind="stable")
            sizes = self._sizes[nearest_first]
            enough = int(np.searchsorted(np.cumsum(sizes), k)) + 1
            rows = np.concatenate([self._members[cluster] for cluster in nearest_first[:enough]])
            rank = np.repeat(np.arange(enough), sizes[:enough])
            cosines = np.clip(np.vecdot(self._vectors[rows], query), -1, 1)
            order = np.lexsort((rows, -cosines, rank))[:k]
            ids[i], scores[i] = rows[order], cosines[order] - 2 * rank[order]
        return Hits(ids, scores)

    def save(self, folder: Path) -> None:
        """Write the vectors, the centres, and the cluster of each row."""
        for name, array in (("vectors", self._vectors), ("centres", self._centres), ("clusters", self._clusters)):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    def load(self, folder: Path) -> None:
        """Read the vectors, the centres, and the cluster of each row."""
        self._vectors, self._centres, self._clusters = (
            np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("vectors", "centres", "clusters")
        )
        self._collect()

    def _collect(self) -> None:
        self._sizes = np.bincount(self._clusters, minlength=len(self._centres))
        self._members = np.split(np.argsort(self._clusters, kind="stable"), np.cumsum(self._sizes)[:-1])


def k_means(
    vectors: Float32[np.ndarray, "rows width"], *, seed: int, clusters: int | None = None
) -> tuple[Float32[np.ndarray, "clusters width"], Int64[np.ndarray, " rows"]]:
    """The centres of `clusters`, by default √rows, each of length 1, and for each row that whose centre is nearest."""
    import faiss

    rows, width = vectors.shape
    if not rows:
        return np.empty((0, width), dtype=np.float32), np.empty(0, dtype=np.int64)
    clustering: Any = faiss.Kmeans(
        width,
        max(1, round(rows**0.5)) if clusters is None else clusters,
        niter=_ITERATIONS,
        spherical=True,
        seed=seed % 2**31,
        min_points_per_centroid=1,
    )
    with one_thread():
        clustering.train(vectors)
        assigned = clustering.assign(vectors)[1]
    centres: Float32[np.ndarray, "clusters width"] = clustering.centroids
    return centres, assigned
