"""Lexical retrieval: BM25 (Robertson et al. 1994, in Lucene's variant) by the package `bm25s`.

Words are lower-cased; stop words stay, since short texts often consist of little else ("where is it").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

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

    def __init__(self, resources: Resources | None = None) -> None:
        self._index: Any = None
        self._rows = 0

    def fit(self, texts: Sequence[str]) -> None:
        """Index the words of `texts`."""
        import bm25s

        self._rows = len(texts)
        if not texts:
            return
        # Rows without words may leave the index without a vocabulary; the mark is no word anybody asks for.
        words = [words or ["\0"] for words in _words(texts)]
        # Sorted: left to itself the package numbers words in the order of their hashes, which changes.
        numbers = {word: i for i, word in enumerate(sorted({word for row in words for word in row}))}
        self._index = bm25s.BM25()
        self._index.index(([[numbers[word] for word in row] for row in words], numbers), show_progress=False)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` rows with the highest score; equal scores in the order of the rows."""
        k = min(k, self._rows)
        ids = np.empty((len(texts), k), dtype=np.int64)
        scores = np.empty((len(texts), k), dtype=np.float32)
        if not k:
            return Hits(ids, scores)
        for query, words in enumerate(_words(texts)):
            # The package's own selection takes any of equal scores.
            score = self._index.get_scores(words) if words else np.zeros(self._rows, dtype=np.float32)
            enough = np.flatnonzero(score >= np.partition(score, -k)[-k])
            ids[query] = enough[np.argsort(-score[enough], kind="stable")[:k]]
            scores[query] = score[ids[query]]
        return Hits(ids, scores)

    def scores_of(self, texts: Sequence[str], ids: Int64[np.ndarray, "queries k"]) -> Float32[np.ndarray, "queries k"]:
        """The score of each of `texts` with these rows of its own."""
        found = np.zeros(ids.shape, dtype=np.float32)
        for query, words in enumerate(_words(texts)):
            if words and self._rows:
                found[query] = self._index.get_scores(words)[ids[query]]
        return found

    def words_held(
        self, text: str, rows: Int64[np.ndarray, " rows"]
    ) -> tuple[Float64[np.ndarray, " words"], Bool[np.ndarray, "words rows"]]:
        """The rarity (idf) of each word of `text` that any row of the index holds, and which of `rows` hold it."""
        known = self._index.vocab_dict
        numbers = [known[word] for word in dict.fromkeys(_words([text])[0]) if word in known]
        starts, holders = self._index.scores["indptr"], self._index.scores["indices"]
        holding = [holders[starts[number] : starts[number + 1]] for number in numbers]
        counts = np.array([len(each) for each in holding], dtype=np.float64)
        held = np.array([np.isin(rows, each) for each in holding], dtype=bool).reshape(len(holding), len(rows))
        return np.log(1 + (self._rows - counts + 0.5) / (counts + 0.5)), held

    def save(self, folder: Path) -> None:
        """Write the index; one of no rows has no files."""
        if self._rows:
            self._index.save(folder, show_progress=False)

    def load(self, folder: Path) -> None:
        """Read the index."""
        import bm25s

        self._rows = 0
        if not any(folder.glob("*")):
            return
        self._index = bm25s.BM25.load(folder, show_progress=False)
        self._rows = int(self._index.scores["num_docs"])


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    words: list[list[str]] = bm25s.tokenize(
        list(texts), stopwords=None, token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
    )
    return words
