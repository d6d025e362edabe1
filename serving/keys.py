"""Keys that callers of the endpoint show, what each may do, and how often.

- A key is 256 random bits, and the file holds its SHA-256. Slow, salted hashes are for passwords, which can be
  guessed; nobody finds 256 random bits by trying, and a plain hash costs each request a microsecond.
- Looking a hash up in a dictionary takes a time that depends on the hash. Nobody can choose the hash of what
  they send, bit by bit, so the time tells nothing about the keys.
- Others may read the file, as with secrets that Kubernetes mounts: it helps nobody in. Who may write it can make
  himself a key, so a file that its group or others may write is refused. Ours are written with mode 0600.
- A key that was revoked stops working without a restart: `refresh` reads the file again when it changed.
"""

import json
import os
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fcntl import LOCK_EX, flock
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from icl_compiler.errors import ServingError
from icl_compiler.registry import did_you_mean
from serving.versions import require_name, write_whole

RIGHTS = ("query", "feedback", "admin")
_AT_ONCE_S = 10  # the requests of so many seconds may come together


class Key(NamedTuple):
    """What the file holds of a key: not the key itself."""

    name: str
    hash: str
    """SHA-256 of the key, 64 hexadecimal digits."""
    rights: tuple[str, ...]
    """Some of `RIGHTS`, in their order."""
    per_minute: int | None
    """Most requests a minute; None sets no limit."""
    created: str
    """UTC in ISO 8601."""

    def may(self, right: str) -> bool:
        """Whether the key has this right; "admin" has all.

        >>> key = Key("ann", "0" * 64, ("query",), None, "2026-01-01T00:00:00+00:00")
        >>> key.may("query"), key.may("feedback"), key._replace(rights=("admin",)).may("feedback")
        (True, False, True)
        """
        return right in self.rights or "admin" in self.rights


class KeyRing:
    """The keys in the file `path`; empty until `refresh`. Threads may share it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ring = KeyRing(Path(folder, "keys.json"))
    ...     secret = ring.add("ann", ["query"])
    ...     ring.find(secret).name, ring.find("icl-guessed")
    ('ann', None)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] = ()
        self._keys: dict[str, Key] = {}

    @classmethod
    def load(cls, path: Path) -> "KeyRing":
        """The keys of a file that is there.

        Raises:
            ServingError: as `refresh` does.
        """
        ring = cls(path)
        ring.refresh()
        return ring

    def refresh(self) -> None:
        """Read the file again if it changed; if not, that costs one look at its date.

        Raises:
            ServingError: if it is not there, holds no keys, or others may write it. The keys stay as they were,
                and the next call tries again.
        """
        try:
            if _stamp(self._path.stat()) == self._stamp:
                return
            with self._path.open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                content = file.read()
        except FileNotFoundError as error:
            raise ServingError(
                f"there is no file {self._path}; `icl keys add NAME --file {self._path}` makes one"
            ) from error
        except (OSError, ValueError) as error:
            raise ServingError(f"the keys in {self._path} cannot be read: {error}") from error
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ServingError(
                f"{self._path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could make "
                f"themselves keys; run: chmod 600 {self._path}"
            )
        try:
            keys = [Key(**{**entry, "rights": _ordered(entry["rights"])}) for entry in json.loads(content)["keys"]]
            for key in keys:
                _require_sound(key)
        except (KeyError, TypeError, ValueError, ServingError) as error:
            raise ServingError(
                f"{self._path} does not hold keys as `icl keys` writes them ({error!r}); put a copy in its place, "
                "or remove it and make new keys"
            ) from error
        self._keys, self._stamp = {key.hash: key for key in keys}, _stamp(status)

    @property
    def keys(self) -> list[Key]:
        """All keys, oldest first."""
        return list(self._keys.values())

    def find(self, secret: str) -> Key | None:
        """The key that a caller shows, if it is one."""
        return self._keys.get(_hash(secret))

    def add(self, name: str, rights: Collection[str], per_minute: int | None = None) -> str:
        """Make a key and return it; nothing else ever shows it again. A file that is not there is made.

        Raises:
            ServingError: if the name is none or is taken, a right is unknown, or `per_minute` is less than 1.
        """
        secret = f"icl-{secrets.token_urlsafe(32)}"
        created = datetime.now(UTC).isoformat(timespec="seconds")
        key = Key(name, _hash(secret), _ordered(rights), per_minute, created)
        _require_sound(key)
        with _alone(self._path):
            if self._path.exists():
                self.refresh()
            if any(name == other.name for other in self.keys):
                raise ServingError(f"there is a key {name!r} already; revoke it first, or choose another name")
            self._save([*self.keys, key])
        return secret

    def revoke(self, name: str) -> None:
        """Take a key out of the file.

        Raises:
            ServingError: if there is none of this name.
        """
        with _alone(self._path):
            self.refresh()
            names = [key.name for key in self.keys]
            if name not in names:
                raise ServingError(f"there is no key {name!r}. {did_you_mean(name, names)}")
            self._save([key for key in self.keys if key.name != name])

    def _save(self, keys: list[Key]) -> None:
        content = {"keys": [key._asdict() for key in keys]}
        write_whole(self._path, json.dumps(content, indent=1) + "\n")
        self.refresh()


class RateLimiter:
    """Holds each key to its requests per minute. Threads may share it.

    A sixth of them may come at once (at least one), the others evenly: in no minute come more than 7/6. What is
    remembered of a key is the time at which all that it did would have been in order (the generic cell rate
    algorithm, a token bucket in one number).

    >>> limiter, key = RateLimiter(), Key("ann", "0" * 64, ("query",), 12, "2026-01-01T00:00:00+00:00")
    >>> [limiter.allow(key, now) for now in (100.0, 100.0, 100.0, 105.0)]
    [0.0, 0.0, 5.0, 0.0]
    """

    def __init__(self) -> None:
        self._in_order: dict[str, float] = {}
        self._alone = Lock()

    def allow(self, key: Key, now: float) -> float:
        """0.0 if a request may go at `now`, seconds of a clock that never goes back; else the seconds to wait."""
        if key.per_minute is None:
            return 0.0
        pause_s = 60 / key.per_minute
        with self._alone:
            in_order = max(now, self._in_order.get(key.hash, now))
            earliest = in_order - max(0.0, _AT_ONCE_S - pause_s)
            if now < earliest:
                return earliest - now
            self._in_order[key.hash] = in_order + pause_s
        return 0.0


def _ordered(rights: Collection[str]) -> tuple[str, ...]:
    if isinstance(rights, str) or not rights or not {*rights} <= {*RIGHTS}:
        raise ServingError(f"the rights of a key are one or more of {', '.join(RIGHTS)}; found {rights!r}")
    return tuple(right for right in RIGHTS if right in rights)


def _require_sound(key: Key) -> None:
    require_name(key.name)
    if len(bytes.fromhex(key.hash)) != 32:
        raise ServingError(f"the hash of the key {key.name!r} has {len(key.hash)} digits, expected 64")
    if key.per_minute is not None and not (type(key.per_minute) is int and key.per_minute >= 1):
        raise ServingError(f"a key may send 1 or more requests a minute, or any number; found {key.per_minute!r}")


def _hash(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for others who change this file: a key revoked by one must not come back with what the other writes."""
    try:
        handle = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ServingError(f"{path} cannot be written: {error.strerror}") from error
    try:
        flock(handle, LOCK_EX)
        yield
    finally:
        os.close(handle)
