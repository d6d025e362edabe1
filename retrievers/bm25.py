"""Lexical retrieval: BM25 (Robertson et al. 1994, in Lucene's variant) by the package `bm25s`.

Words are lower-cased; stop words stay, since short texts often consist of little else ("where is it").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retrievers.retriever import Hits, Resources


class BM25:
    """Rows by the BM25 score of the query's words.

    >>> from retrievers.encoder import SentenceEncoder
    >>> retriever = BM25(Resources(seed=0, encoder=SentenceEncoder(lambda: "not used")))
    >>> retriever.fit(["card was stolen", "parcel is late", "lost my card"])
    >>> retriever.search(["the parcel"], k=1).ids.tolist()
    [[1]]
    """

    score_meaning: ClassVar[str] = "BM25 score"

    def __init__(self, resources: Resources) -> None:
        self._index: Any = None
        self._rows = 0

    def fit(self, texts: Sequence[str]) -> None:
        """Index the words of `texts`."""
        import bm25s

        self._rows = len(texts)
        self._index = bm25s.BM25()
        # A row without words would leave the index without a vocabulary; the mark is no word anybody asks for.
        self._index.index([words or ["\0"] for words in _words(texts)], show_progress=False)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows with the highest score; equal scores in the order of the rows."""
        k = min(k, self._rows)
        if not texts:
            return Hits(np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32))
        found = self._index.retrieve(_words(texts), k=k, show_progress=False, n_threads=0)
        ids, scores = found.documents.astype(np.int64), found.scores.astype(np.float32)
        order = np.lexsort((ids, -scores), axis=1)
        return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def save(self, folder: Path) -> None:
        """Write the index."""
        self._index.save(folder, show_progress=False)

    def load(self, folder: Path) -> None:
        """Read the index."""
        import bm25s

        self._index = bm25s.BM25.load(folder, show_progress=False)
        self._rows = int(self._index.scores["num_docs"])


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    words: list[list[str]] = bm25s.tokenize(
        list(texts), stopwords=None, token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
    )
    return words
