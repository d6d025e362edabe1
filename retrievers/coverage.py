"""Rows that together cover the words of the query (after Gupta et al. 2023, "Coverage-based Example Selection").

coverage(set) = Σ over the query's words of  rarity(word) · [some row of the set holds the word]

- Rows are taken greedily, each for the coverage it adds; once nothing more can be covered, it all begins anew with
  the rows that are left, as in the paper. Of rows that add equally much, BM25 decides.
- The paper's Set-BSR measures how well each token of the query is covered by the cosine of contextual embeddings to
  the tokens of a row. That takes the embeddings of all tokens of the pool, a few hundred times the memory of the
  sentences'; here words are either held or not, and weighted by their rarity (idf in Lucene's variant), which the
  index of BM25 knows. So it finds no synonyms, and it needs no encoder.
- Rows are taken from the 256 best of BM25; those after them follow in its order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retrievers.bm25 import BM25
from retrievers.retriever import Hits, Resources

_CANDIDATES = 256


class Coverage:
    """Rows by the words of the query that they hold and the rows before them do not.

    >>> from retrievers.encoder import SentenceEncoder
    >>> retriever = Coverage(Resources(seed=0, encoder=SentenceEncoder(lambda: "not used")))
    >>> retriever.fit(["card lost", "card lost today", "parcel late"])
    >>> retriever.search(["card late"], k=3).ids.tolist()
    [[2, 0, 1]]
    """

    score_meaning: ClassVar[str] = (
        "share of the query's words, by rarity, that it adds to the rows before, less 1 for each time they covered all"
    )

    def __init__(self, resources: Resources) -> None:
        self._lexical = BM25(resources)

    def fit(self, texts: Sequence[str]) -> None:
        """Index the words of `texts`."""
        self._lexical.fit(texts)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows that are taken first."""
        ranked = self._lexical.search(texts, max(k, _CANDIDATES))
        k = min(k, ranked.ids.shape[1])
        ids, scores = ranked.ids[:, :k].copy(), np.empty((len(texts), k), dtype=np.float32)
        if not k:
            return Hits(ids, scores)
        for query, text in enumerate(texts):
            listed = int((ranked.scores[query, :_CANDIDATES] > 0).sum())
            rows = ranked.ids[query, :listed]
            rarity, held = self._lexical.words_held(text, rows)
            places, shares, rounds = cover(rarity, held, min(k, listed))
            ids[query, : len(places)] = rows[places]
            scores[query, : len(places)] = shares
            scores[query, len(places) :] = -rounds
        return Hits(ids, scores)

    def save(self, folder: Path) -> None:
        """Write the index of words."""
        self._lexical.save(folder)

    def load(self, folder: Path) -> None:
        """Read the index of words."""
        self._lexical.load(folder)


def cover(
    rarity: Float64[np.ndarray, " words"], held: Bool[np.ndarray, "words rows"], k: int
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"], int]:
    """Places of the `k` rows taken one by one, the share of coverage each added, and how many rounds were complete.

    A share is less by 1 for each complete round before it. Every row holds a word.

    >>> held = np.array([[True, True, False], [False, False, True]])
    >>> places, shares, _ = cover(np.array([0.25, 0.75]), held, 3)
    >>> places.tolist(), shares.tolist()
    ([2, 0, 1], [0.75, 0.25, -0.75])
    """
    places = np.empty(k, dtype=np.int64)
    shares = np.empty(k, dtype=np.float64)
    weights = (rarity / rarity[held.any(axis=1)].sum())[:, None] if k else rarity[:, None]
    uncovered, left = weights.copy(), np.ones(held.shape[1], dtype=bool)
    rounds = 0
    for step in range(k):
        if not (left & (uncovered * held).any(axis=0)).any():
            rounds += 1
            uncovered = weights.copy()
        # Rounded, so that the order of a sum does not decide between rows that add equally much.
        gain = np.where(left, (uncovered * held).sum(axis=0), -1).round(12)
        best = int(gain.argmax())
        places[step], shares[step] = best, min(1.0, gain[best]) - rounds
        left[best] = False
        uncovered[held[:, best]] = 0
    return places, shares, rounds
