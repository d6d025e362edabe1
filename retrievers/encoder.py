"""Texts to vectors: by `sentence-transformers`, whose model loads on first use, or by several encoders side by side.

- Where a retriever compares vectors they are of length 1, so that an inner product is a cosine.
- A text is encoded once in a process.
- Where a folder is named (`vector_cache`), many texts at once, as in a compilation, are encoded once on a machine. A
  few are not kept there: they are quickly encoded, and the queries of a server are nobody's to keep.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from retrievers.retriever import Encoder
from retrievers.vector_cache import VectorCache

_REMEMBERED = 200_000
_FEW = 100  # texts; more take over two seconds on a slow processor


class CachedEncoder(ABC):
    """What all encoders share: a text is encoded once.

    Args:
        cache: folder that keeps the vectors of more than 100 texts at once between processes; by default they are kept
            in memory only. A text that stands there is not encoded again, so its vector may differ in the last bit
            from one that is encoded in other company.
    """

    block = 2**31
    """Texts that are encoded together, and then kept: what is lost where a process is killed."""

    def __init__(self, *, cache: Path | None = None) -> None:
        self.remembered = _REMEMBERED
        """Most vectors kept in memory; beyond that those of the latest call are."""
        self._folder = cache
        self._known: dict[str, Float32[np.ndarray, " width"]] = {}

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """One vector per text, float32; a text is encoded once and remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = self._vectors(new)
            if len(self._known) + len(new) > self.remembered:
                self._known = {text: self._known[text] for text in texts if text in self._known}
            self._known.update(vectors)
        if not len(texts):
            return np.empty((0, 0), dtype=np.float32)
        return np.stack([self._known[text] for text in texts])

    @abstractmethod
    def _computed(self, texts: list[str]) -> Float32[np.ndarray, "texts width"]:
        """The vectors of texts that were not encoded before."""

    @abstractmethod
    def _identity(self) -> str | None:
        """What tells the model from any other, or from itself after training; `None` keeps nothing on disk."""

    def _vectors(self, texts: list[str]) -> dict[str, Float32[np.ndarray, " width"]]:
        cache = self._cache if len(texts) > _FEW else None
        found = {} if cache is None else cache.get(texts)
        missing = [text for text in texts if text not in found]
        for start in range(0, len(missing), self.block):
            block = missing[start : start + self.block]
            made = dict(zip(block, np.asarray(self._computed(block), dtype=np.float32), strict=True))
            if cache is not None:
                cache.add(made)
            found |= made
        return found

    @cached_property
    def _cache(self) -> VectorCache | None:
        if self._folder is None:
            return None
        identity = self._identity()
        return None if identity is None else VectorCache(self._folder, identity)


class SentenceEncoder(CachedEncoder):
    """An encoder of `sentence-transformers`; its vectors have length 1.

    Args:
        locate: gives the folder, or the name on the model hub; called when the first text is encoded.
        cache: see `CachedEncoder`.
    """

    def __init__(self, locate: Callable[[], str], *, cache: Path | None = None) -> None:
        super().__init__(cache=cache)
        self._locate = locate

    def _computed(self, texts: list[str]) -> Float32[np.ndarray, "texts width"]:
        vectors: Float32[np.ndarray, "texts width"] = self._encoder.encode(
            texts,
            batch_size=64,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=len(texts) > _FEW and sys.stderr.isatty(),
        )
        return vectors

    def _identity(self) -> str | None:
        if not Path(self._name).is_dir():
            _ = self._encoder  # the hub's newest version of the model is fetched first
        folder = folder_of(self._name)
        return None if folder is None else model_identity(folder, "sentence-transformers")

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


class Concatenated:
    """Several encoders as one, whose cosine is the weighted mean of theirs: their vectors side by side.

    Args:
        weights: of their cosines; by default all alike.

    >>> class Fixed:
    ...     def __init__(self, *vector: float) -> None:
    ...         self.vector = np.array([vector], dtype=np.float32)
    ...     def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
    ...         return np.repeat(self.vector, len(texts), axis=0)
    >>> Concatenated([Fixed(1, 0), Fixed(0.6, 0.8)]).encode(["a"]).round(2).tolist()
    [[0.7099999785423279, 0.0, 0.41999998688697815, 0.5699999928474426]]
    """

    def __init__(self, parts: Sequence[Encoder], weights: Sequence[float] | None = None) -> None:
        self._parts = parts
        shares = np.ones(len(parts)) if weights is None else np.array(weights, dtype=np.float64)
        self._lengths = np.sqrt(shares / shares.sum()).astype(np.float32)

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """The vectors of all parts of each text, scaled to length 1 together."""
        parts = zip(self._parts, self._lengths, strict=True)
        return np.hstack([unit(part.encode(texts)) * length for part, length in parts])


def folder_of(name: str) -> Path | None:
    """Where a model lies: a folder itself, or the hub's copy on this machine, if there is one."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def model_identity(folder: Path, library: str) -> str:
    """What differs when another model is put into `folder`: its files with size and time, and the library's version."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    facts = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr([version(library), folder.resolve().name, *facts])


def unit(vectors: Float32[np.ndarray, "rows width"]) -> Float32[np.ndarray, "rows width"]:
    """Each row divided by its length, so that an inner product is a cosine; a row of zeros stays as it is.

    >>> unit(np.array([[3, 4], [0, 0]], dtype=np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    lengths = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    scaled: Float32[np.ndarray, "rows width"] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled
