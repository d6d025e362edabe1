"""One set of shots for every query that was chosen as a whole: rows that are told, then the others in a random order.

What chooses is not here: `icl compile -O2 --retriever static` tries sets on held-out rows with the language model
(`icl_compiler/optimise/static_sets.py`). Until rows are chosen this is a random draw.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from retrievers.retriever import Hits, Resources

_CHOSEN, _ORDER = "chosen.json", "order.npy"


class Static:
    """The chosen rows in their order, the same for every query.

    >>> from retrievers.encoder import SentenceEncoder
    >>> retriever = Static(Resources(seed=0, encoder=SentenceEncoder(lambda: "not used")))
    >>> retriever.choose(["c", "a"])
    >>> retriever.fit(["a", "b", "c"])
    >>> retriever.search(["x", "y"], k=3).ids.tolist()
    [[2, 0, 1], [2, 0, 1]]
    """

    score_meaning: ClassVar[str] = "1 for a row of the chosen set"

    def __init__(self, resources: Resources) -> None:
        self._seed = resources.seed
        self._order = np.empty(0, dtype=np.int64)
        self.chosen: tuple[str, ...] = ()
        """Texts of the set."""
        self._known = 0

    def choose(self, texts: Sequence[str]) -> None:
        """Let rows with these texts come first in what is fitted next, as far as it has them."""
        self.chosen = tuple(texts)

    def fit(self, texts: Sequence[str]) -> None:
        """Put the chosen rows first, and draw the order of the others."""
        place = {text: row for row, text in reversed(list(enumerate(texts)))}
        first = list(dict.fromkeys(place[text] for text in self.chosen if text in place))
        drawn = np.random.default_rng(self._seed).permutation(len(texts)).astype(np.int64)
        self._order = np.concatenate([np.array(first, dtype=np.int64), drawn[~np.isin(drawn, first)]])
        self._known = len(first)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The first `k` rows of the order, for every query."""
        ids = np.tile(self._order[:k], (len(texts), 1))
        return Hits(ids, np.tile((np.arange(ids.shape[1]) < self._known).astype(np.float32), (len(texts), 1)))

    def save(self, folder: Path) -> None:
        """Write the order, and the chosen texts."""
        np.save(folder / _ORDER, self._order, allow_pickle=False)
        told = json.dumps({"texts": self.chosen, "rows": self._known}, ensure_ascii=True)
        (folder / _CHOSEN).write_text(told + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read them."""
        self._order = np.load(folder / _ORDER, allow_pickle=False)
        told = json.loads((folder / _CHOSEN).read_text(encoding="utf-8"))
        self.chosen, self._known = tuple(map(str, told["texts"])), int(told["rows"])
