"""Texts to vectors by `sentence-transformers`; the model loads on first use.

Vectors are always of length 1, so that an inner product is a cosine.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32

_REMEMBERED = 200_000
_FAST = 100  # texts; more take over two seconds on a slow processor


class SentenceEncoder:
    """An encoder of `sentence-transformers`.

    Args:
        locate: gives the folder, or the name on the model hub; called when the first text is encoded.
    """

    def __init__(self, locate: Callable[[], str]) -> None:
        self._locate = locate
        self._known: dict[str, Float32[np.ndarray, " width"]] = {}

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """One vector of length 1 per text, float32; a text is encoded once and remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = self._encoder.encode(
                new,
                batch_size=64,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=len(new) > _FAST and sys.stderr.isatty(),
            )
            if len(self._known) + len(new) > _REMEMBERED:
                self._known = {text: self._known[text] for text in texts if text in self._known}
            self._known.update(zip(new, np.asarray(vectors, dtype=np.float32), strict=True))
        if not len(texts):
            return np.empty((0, 0), dtype=np.float32)
        return np.stack([self._known[text] for text in texts])

    @cached_property
    def _encoder(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        name = self._locate()
        try:
            return SentenceTransformer(name)
        except Exception as error:  # whatever a folder of another kind makes the library raise
            said = str(error).partition("\n")[0]
            raise OSError(f"no encoder could be loaded from {name!r}: {said}") from error
