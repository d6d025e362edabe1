"""Texts to vectors by `sentence-transformers`; the model loads on first use.

- Vectors are always of length 1, so that an inner product is a cosine.
- A text is encoded once in a process.
- Where a folder is named (`vector_cache`), many texts at once, as in a compilation, are encoded once on a machine. A
  few are not kept there: they are quickly encoded, and the queries of a server are nobody's to keep.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from retrievers.vector_cache import VectorCache

_REMEMBERED = 200_000
_FEW = 100  # texts; more take over two seconds on a slow processor


class SentenceEncoder:
    """An encoder of `sentence-transformers`.

    Args:
        locate: gives the folder, or the name on the model hub; called when the first text is encoded.
        cache: folder that keeps the vectors of more than 100 texts at once between processes; by default they are kept
            in memory only. A text that stands there is not encoded again, so its vector may differ in the last bit
            from one that is encoded in other company.
    """

    def __init__(self, locate: Callable[[], str], *, cache: Path | None = None) -> None:
        self._locate = locate
        self.remembered = _REMEMBERED
        """Most vectors kept in memory; beyond that those of the latest call are."""
        self._folder = cache
        self._known: dict[str, Float32[np.ndarray, " width"]] = {}

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """One vector of length 1 per text, float32; a text is encoded once and remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = self._vectors(new)
            if len(self._known) + len(new) > self.remembered:
                self._known = {text: self._known[text] for text in texts if text in self._known}
            self._known.update(vectors)
        if not len(texts):
            return np.empty((0, 0), dtype=np.float32)
        return np.stack([self._known[text] for text in texts])

    def _vectors(self, texts: list[str]) -> dict[str, Float32[np.ndarray, " width"]]:
        cache = self._cache if len(texts) > _FEW else None
        found = {} if cache is None else cache.get(texts)
        missing = [text for text in texts if text not in found]
        if missing:
            vectors = self._encoder.encode(
                missing,
                batch_size=64,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=len(missing) > _FEW and sys.stderr.isatty(),
            )
            made = dict(zip(missing, np.asarray(vectors, dtype=np.float32), strict=True))
            if cache is not None:
                cache.add(made)
            found |= made
        return found

    @cached_property
    def _cache(self) -> VectorCache | None:
        if self._folder is None:
            return None
        folder: Path | None = Path(self._name)
        if not Path(self._name).is_dir():
            from huggingface_hub import try_to_load_from_cache

            _ = self._encoder  # the hub's newest version of the model is fetched first
            file = try_to_load_from_cache(self._name, "config.json")
            folder = Path(file).parent if isinstance(file, str) else None
        return None if folder is None else VectorCache(self._folder, model_identity(folder))

    @cached_property
    def _name(self) -> str:
        return self._locate()

    @cached_property
    def _encoder(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            return SentenceTransformer(self._name)
        except Exception as error:  # whatever a folder of another kind makes the library raise
            said = str(error).partition("\n")[0]
            raise OSError(f"no encoder could be loaded from {self._name!r}: {said}") from error


def model_identity(folder: Path) -> str:
    """What differs when another model is put into `folder`: its files with size and time, and the library."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    facts = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr([version("sentence-transformers"), folder.resolve().name, *facts])


def unit(vectors: Float32[np.ndarray, "rows width"]) -> Float32[np.ndarray, "rows width"]:
    """Each row divided by its length, so that an inner product is a cosine; a row of zeros stays as it is.

    >>> unit(np.array([[3, 4], [0, 0]], dtype=np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    lengths = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    scaled: Float32[np.ndarray, "rows width"] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled
