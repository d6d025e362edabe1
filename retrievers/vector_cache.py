"""Vectors of texts in a file, so that no process encodes again what another has encoded.

One file per model: a header (a mark, and the width of a vector), then records of one size, each the SHA-256 of
model and text, the vector, and a checksum of both.

- Records are added at the end, under a lock: any number of processes may share a file.
- A file that would grow beyond 2 GB (1.3 million vectors of 384 numbers) gives way to one with its newer half; whoever
  reads the old one notices. The folder may be removed at any time.
- A write that was torn (the disk was full, the machine went down) leaves a part of a record at the end, which the
  next writer cuts off. A record whose checksum is wrong is as if it were not there.
- Where the file cannot be read, locked or written, nothing fails: the vectors are computed again.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import LOCK_EX, flock
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
from jaxtyping import Float32

_HEADER = struct.Struct("<12sI")
_MARK = b"icl-vectors1"
_KEY, _CHECKSUM = 32, 4
_MOST_BYTES = 2 * 10**9
_BLOCK = 4096  # records


class VectorCache:
    """The vectors that one model gave.

    Args:
        folder: where the file lies; made when the first vector is added.
        identity: what tells the model from any other, or from itself after training.

    >>> import tempfile
    >>> cache = VectorCache(Path(tempfile.mkdtemp()), "a model")
    >>> cache.add({"a text": np.array([0.6, 0.8], dtype=np.float32)})
    >>> cache.get(["a text", "another"])
    {'a text': array([0.6, 0.8], dtype=float32)}
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._identity = sha256(identity.encode()).hexdigest()
        self._path = folder / f"{self._identity[:32]}.vectors"
        self._places: dict[bytes, int] = {}
        self._width = 0
        self._seen = 0
        self._inode = 0

    def get(self, texts: Sequence[str]) -> dict[str, Float32[np.ndarray, " width"]]:
        """The vectors of those of `texts` that have one here."""
        found = {}
        with suppress(OSError), self._path.open("rb") as file:
            self._look_over(file)
            for text in dict.fromkeys(texts):
                key = self._key(text)
                if key in self._places and (vector := self._read(file, key)) is not None:
                    found[text] = vector
        return found

    def add(self, vectors: Mapping[str, Float32[np.ndarray, " width"]]) -> None:
        """Keep the vectors of these texts, all of one width; if that is not possible, do nothing."""
        if vectors:
            with suppress(OSError):
                self._append(vectors)

    def _append(self, vectors: Mapping[str, Float32[np.ndarray, " width"]]) -> None:
        items = list(vectors.items())
        header = _HEADER.pack(_MARK, len(items[0][1]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = self._locked()
        try:
            if os.pread(handle, len(header), 0) != header:  # new, or damaged
                os.ftruncate(handle, 0)
                _write(handle, header)
            past_whole = (os.fstat(handle).st_size - len(header)) % _record_size(len(items[0][1]))
            os.ftruncate(handle, os.fstat(handle).st_size - past_whole)
            if os.fstat(handle).st_size + len(items) * _record_size(len(items[0][1])) > _MOST_BYTES:
                handle = self._newer_half(handle, header, _record_size(len(items[0][1])))
            for start in range(0, len(items), _BLOCK):
                _write(handle, b"".join(self._record(*item) for item in items[start : start + _BLOCK]))
        finally:
            os.close(handle)

    def _locked(self) -> int:
        """A handle of the file, locked; of the one that has the name now, should it have given way meanwhile."""
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            with suppress(FileNotFoundError):
                flock(handle, LOCK_EX)
                if os.fstat(handle).st_ino == self._path.stat().st_ino:
                    return handle
            os.close(handle)

    def _newer_half(self, handle: int, header: bytes, size: int) -> int:
        """Put a file with the newest records in the place of this one, whose handle is closed; its handle, locked."""
        scratch = self._path.with_suffix(".new")  # nobody else is here: the file is locked
        new = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
        try:
            flock(new, LOCK_EX)
            _write(new, header)
            end = os.fstat(handle).st_size
            place = max(len(header), end - _MOST_BYTES // 2 // size * size)
            while place < end:
                _write(new, block := os.pread(handle, _BLOCK * size, place))
                place += len(block)
            scratch.replace(self._path)
        except BaseException:
            os.close(new)
            scratch.unlink(missing_ok=True)
            raise
        os.close(handle)
        return new

    def _look_over(self, file: BinaryIO) -> None:
        """Note where each record stands that was added since the last time."""
        header = file.read(_HEADER.size)
        mark, width = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0)
        now = os.fstat(file.fileno())
        if mark != _MARK or width != self._width or now.st_size < self._seen or now.st_ino != self._inode:
            self._places, self._width, self._seen, self._inode = {}, width, _HEADER.size, now.st_ino
        if mark != _MARK:
            return
        size = _record_size(width)
        while True:
            file.seek(self._seen)
            block = file.read(_BLOCK * size)
            whole = len(block) // size
            if not whole:
                return
            keys = np.frombuffer(block, dtype=np.uint8, count=whole * size).reshape(whole, size)[:, :_KEY]
            self._places |= {key.tobytes(): self._seen + i * size for i, key in enumerate(keys)}
            self._seen += whole * size

    def _read(self, file: BinaryIO, key: bytes) -> Float32[np.ndarray, " width"] | None:
        record = os.pread(file.fileno(), _record_size(self._width), self._places[key])
        body, checksum = record[:-_CHECKSUM], record[-_CHECKSUM:]
        if not record.startswith(key) or checksum != crc32(body).to_bytes(_CHECKSUM, "little"):
            return None
        return np.frombuffer(body[_KEY:], dtype="<f4").astype(np.float32)

    def _record(self, text: str, vector: Float32[np.ndarray, " width"]) -> bytes:
        body = self._key(text) + vector.astype("<f4").tobytes()
        return body + crc32(body).to_bytes(_CHECKSUM, "little")

    def _key(self, text: str) -> bytes:
        return sha256(f"{self._identity}\0{text}".encode("utf-8", "surrogatepass")).digest()


def _record_size(width: int) -> int:
    return _KEY + 4 * width + _CHECKSUM


def _write(handle: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
