"""The same rows for every query, drawn uniformly without replacement: the baseline of every retriever.

One draw serves all queries, so all prompts begin alike and an engine computes that beginning once. The draw
for `k` rows begins the draw for `k + 1`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from retrievers.retriever import Hits, Resources


class Uniform:
    """Rows in one random order.

    >>> from retrievers.encoder import SentenceEncoder
    >>> retriever = Uniform(Resources(seed=0, encoder=SentenceEncoder(lambda: "not used")))
    >>> retriever.fit(["a", "b", "c"])
    >>> retriever.search(["x", "y"], k=2).ids.tolist()
    [[2, 0], [2, 0]]
    """

    score_meaning: ClassVar[str] = "none: drawn at random"

    def __init__(self, resources: Resources) -> None:
        self._seed = resources.seed
        self._order = np.empty(0, dtype=np.int64)

    def fit(self, texts: Sequence[str]) -> None:
        """Draw the order of the rows."""
        self._order = np.random.default_rng(self._seed).permutation(len(texts)).astype(np.int64)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The first `k` rows of the order, for every query; the scores are 0."""
        ids = np.tile(self._order[:k], (len(texts), 1))
        return Hits(ids, np.zeros(ids.shape, dtype=np.float32))

    def save(self, folder: Path) -> None:
        """Write the order."""
        np.save(folder / "order.npy", self._order, allow_pickle=False)

    def load(self, folder: Path) -> None:
        """Read the order."""
        self._order = np.load(folder / "order.npy", allow_pickle=False)
