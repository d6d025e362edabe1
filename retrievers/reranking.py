"""The nearest rows of a query in another order: what `mmr` and `dpp` share.

Both look at a list of the 256 rows nearest to the query and take them one by one, each for its relevance less what
the rows taken before have in common with it. The rows after the list follow in the order of their cosine; each is
scored as if it repeated a row that was taken, which none of the list can do worse than. So scores fall, and the
`k` best are the first of the `k + 1` best, whatever the length of the list.

A row with the query's own vector comes first, and nothing is too much like it: a query that is a row of the pool, and
is not shown to itself, finds beside it what it would find if the row were not there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.dense import Dense
from retrievers.retriever import Hits, Resources

_CANDIDATES = 256
_BLOCK = 8  # queries at once: their vectors stay in the processor's cache
_ITSELF = 1 - 1e-5  # cosine of a row that is the query, but for rounding

Pick = Callable[
    [Float32[np.ndarray, "queries rows"], Float32[np.ndarray, "queries rows width"], int],
    tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]],
]
"""Cosines of the rows of each query's list, best first, their vectors, and how many to take: places and scores."""
Repeated = Callable[[Float32[np.ndarray, "queries rows"]], Float32[np.ndarray, "queries rows"]]
"""Cosines to scores of rows that repeat a row taken before."""


class Reranked:
    """A retriever over a dense index: `pick` orders each query's list, `repeated` scores the rows after it."""

    def __init__(self, resources: Resources, *, pick: Pick, repeated: Repeated) -> None:
        self._dense = Dense(resources)
        self._pick, self._repeated = pick, repeated

    def fit(self, texts: Sequence[str]) -> None:
        """Encode and index `texts`."""
        self._dense.fit(texts)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows that are taken first; of equal ones the nearer to the query."""
        return _rerank(self._dense, texts, k, pick=self._pick, repeated=self._repeated)

    def save(self, folder: Path) -> None:
        """Write the dense index."""
        self._dense.save(folder)

    def load(self, folder: Path) -> None:
        """Read the dense index."""
        self._dense.load(folder)


def _rerank(dense: Dense, texts: Sequence[str], k: int, *, pick: Pick, repeated: Repeated) -> Hits:
    """The `k` rows that `pick` takes of each query's list, and where the list ends, the rows after it."""
    k, listed = min(k, dense.rows), min(_CANDIDATES, dense.rows)
    ids = np.empty((len(texts), k), dtype=np.int64)
    scores = np.empty((len(texts), k), dtype=np.float32)
    if not k:
        return Hits(ids, scores)
    hits = dense.search(texts, max(k, listed))
    for start in range(0, len(texts), _BLOCK):
        block = slice(start, start + _BLOCK)
        found, cosines = hits.ids[block], hits.scores[block]
        places, taken = _picked(cosines[:, :listed], dense.vectors(found[:, :listed]), min(k, listed), pick)
        ids[block] = np.concatenate([np.take_along_axis(found, places, axis=1), found[:, listed:k]], axis=1)
        scores[block] = np.concatenate([taken, repeated(cosines[:, listed:k])], axis=1)
    # They fall but for rounding.
    return Hits(ids, np.minimum.accumulate(scores, axis=1))


def _picked(
    cosines: Float32[np.ndarray, "queries rows"],
    vectors: Float32[np.ndarray, "queries rows width"],
    k: int,
    pick: Pick,
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """What `pick` takes of each list behind the rows that are the query itself."""
    itself = (cosines >= _ITSELF).sum(axis=1)
    places, scores = pick(cosines, vectors, k)
    for query in np.flatnonzero(itself).tolist():
        first = min(int(itself[query]), k)
        row, own = slice(query, query + 1), np.arange(first)
        behind, gained = pick(cosines[row, itself[query] :], vectors[row, itself[query] :], k - first)
        _, [[most]] = pick(cosines[row, :1], vectors[row, :1], 1)
        places[query] = np.concatenate([own, itself[query] + behind[0]])
        scores[query] = np.concatenate([np.full(first, most, dtype=np.float32), gained[0]])
    return places, scores
