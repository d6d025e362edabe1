"""Vote-k (Su et al. 2022): one set of shots for every query, representative of the pool and diverse.

Each row votes for its neighbours, the rows most similar to it. The row with most votes is taken first; then, again
and again, the row with most votes of rows that are not taken themselves, where a vote counts a tenth for each row
taken among the voter's neighbours. So a row is taken for a region of the pool, and the region then has its say.

- This is the paper's "fast vote-k", the part that needs no language model and no labels. The paper has 150
  neighbours in pools of 3,000; here it is a twentieth of the pool, and at most 150.
- Votes are whole numbers (billionths), so that neither their order nor rounding can change who wins; from the tenth
  row taken among its neighbours on, a voter counts nothing. Equal rows stand in an order drawn by the seed.
- The first 4,096 rows are taken one by one; the others follow by the votes that are left to them.
- The neighbours come from an index of `faiss_index`, in blocks; no step compares all rows with all rows in a pool
  beyond 50,000.
- One order serves all queries, so all prompts begin alike and an engine computes that beginning once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int32, Int64

from retrievers.encoder import unit
from retrievers.faiss_index import nearest, new_index
from retrievers.retriever import Hits, Resources

_NEIGHBOURS, _SHARE = 150, 20
_ONE_BY_ONE = 4096
_BLOCK = 8192  # rows whose neighbours are sought at once
_VOTE = 10**9
_VOTES = np.array([_VOTE // 10**taken for taken in range(10)] + [0], dtype=np.int64)
_TAKEN = 1 << 62  # more than all votes together


class VoteK:
    """Rows in the order of vote-k, the same for every query."""

    score_meaning: ClassVar[str] = "votes of rows like it, when it was taken"

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._order = np.empty(0, dtype=np.int64)
        self._votes = np.empty(0, dtype=np.float32)

    def fit(self, texts: Sequence[str]) -> None:
        """Encode `texts` and put them in order."""
        vectors, seed = unit(self._resources.encoder.encode(texts)), self._resources.seed
        self._order, self._votes = vote_k(_neighbours(vectors, seed=seed), seed=seed)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The first `k` rows of the order, for every query."""
        return Hits(np.tile(self._order[:k], (len(texts), 1)), np.tile(self._votes[:k], (len(texts), 1)))

    def save(self, folder: Path) -> None:
        """Write the order and the votes."""
        np.save(folder / "order.npy", self._order, allow_pickle=False)
        np.save(folder / "votes.npy", self._votes, allow_pickle=False)

    def load(self, folder: Path) -> None:
        """Read the order and the votes."""
        self._order = np.load(folder / "order.npy", allow_pickle=False)
        self._votes = np.load(folder / "votes.npy", allow_pickle=False)


def vote_k(
    neighbours: Int32[np.ndarray, "rows k"], *, seed: int
) -> tuple[Int64[np.ndarray, " rows"], Float32[np.ndarray, " rows"]]:
    """All rows in the order of vote-k, and the votes each had when it was taken.

    Args:
        neighbours: for each row the rows it votes for: different ones, and not itself.

    >>> order, votes = vote_k(np.array([[1], [0], [1], [4], [3]], dtype=np.int32), seed=0)
    >>> order[:1].tolist(), votes.tolist()
    ([1], [2.0, 1.0, 0.0, 0.0, 0.0])
    """
    from scipy.sparse import csr_array

    rows, k = neighbours.shape
    # From here on, rows go by their place in an order drawn by the seed; the first of equal ones is taken.
    drawn = np.random.default_rng(seed).permutation(rows)
    place = np.empty(rows, dtype=np.int32)
    place[drawn] = np.arange(rows, dtype=np.int32)
    graph = place[neighbours[drawn]]
    edges = csr_array((np.ones(graph.size, dtype=bool), graph.ravel(), k * np.arange(rows + 1)), shape=(rows, rows))
    by_voted = edges.tocsc()
    votes = np.bincount(graph.ravel(), minlength=rows).astype(np.int64) * _VOTE
    weight = np.full(rows, _VOTE, dtype=np.int64)
    near = np.zeros(rows, dtype=np.int64)  # rows taken among the neighbours of each
    taken = min(rows, _ONE_BY_ONE)
    order = np.empty(rows, dtype=np.int64)
    had = np.empty(rows, dtype=np.int64)
    for step in range(taken):
        best = int(votes.argmax())
        order[step], had[step] = best, votes[best]
        votes[best] -= _TAKEN
        voters = by_voted.indices[by_voted.indptr[best] : by_voted.indptr[best + 1]]
        near[voters] += 1
        changed = np.append(voters[weight[voters] > 0], best)
        less = _VOTES[np.minimum(near[changed], len(_VOTES) - 1)]
        less[-1] = 0  # who is taken has no vote
        lost, weight[changed] = weight[changed] - less, less
        np.subtract.at(votes, graph[changed].ravel(), np.repeat(lost, k))
    order[taken:] = np.argsort(-votes, kind="stable")[: rows - taken]
    had[taken:] = votes[order[taken:]]
    return drawn[order].astype(np.int64), (had / _VOTE).astype(np.float32)


def _neighbours(vectors: Float32[np.ndarray, "rows width"], *, seed: int) -> Int32[np.ndarray, "rows k"]:
    rows = len(vectors)
    k = max(0, min(_NEIGHBOURS, -(-rows // _SHARE), rows - 1))
    neighbours = np.empty((rows, k), dtype=np.int32)
    if not k:
        return neighbours
    index = new_index(vectors, seed=seed)
    for start in range(0, rows, _BLOCK):
        ids = nearest(index, vectors[start : start + _BLOCK], k + 1).ids
        itself = ids == np.arange(start, start + len(ids))[:, None]
        itself[~itself.any(axis=1), -1] = True  # it stands behind more copies of itself than were asked for
        neighbours[start : start + _BLOCK] = ids[~itself].reshape(-1, k)
    return neighbours
