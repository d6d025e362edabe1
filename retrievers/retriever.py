"""What a retriever is: `fit` on texts, `search` for the rows most useful to a query, `save` and `load`.

- Results are row numbers and scores, higher is better, best first; the scores are shown to the user, so each
  retriever says what they mean.
- A retriever of the table is made with its `Resources`: a seed and an encoder, which loads its model on first use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64


class Hits(NamedTuple):
    """Rows found for each query, best first; `min(k, rows)` of them."""

    ids: Int64[np.ndarray, "queries k"]
    scores: Float32[np.ndarray, "queries k"]

    def best(self, k: int) -> "Hits":
        """The first `k` of each query."""
        return Hits(self.ids[:, :k], self.scores[:, :k])


@runtime_checkable
class Encoder(Protocol):
    """Texts to vectors."""

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """One vector of length 1 per text."""


@dataclass(frozen=True)
class Resources:
    """What a retriever may use besides the texts."""

    seed: int
    encoder: Encoder


@runtime_checkable
class Retriever(Protocol):
    """Finds rows of a fixed set of texts."""

    @property
    def score_meaning(self) -> str:
        """What a score is, in a few words: `cosine similarity`."""

    def fit(self, texts: Sequence[str]) -> None:
        """Index `texts`; row `i` of the results is `texts[i]`."""

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` best rows for each of `texts`, best first; all rows where there are fewer than `k`."""

    def save(self, folder: Path) -> None:
        """Write the index into an existing, empty folder; the same index gives the same bytes."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
