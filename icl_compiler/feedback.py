"""Corrections of users, in one SQLite file, with a record of who did what.

- What `add` has returned is on the disk: write-ahead log, synchronous = FULL. One thread writes; what comes while it
  waits for the disk goes into its next transaction together.
- Nothing is changed or removed. To undo a correction is to write an event, and the file itself refuses to alter
  the events: triggers abort it.
- One process writes, and a lock on PATH.lock says which; the system lets go of it when the process dies. Any
  process may read meanwhile (`read_corrections`).
"""

import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from icl_compiler.data import normalise_text
from icl_compiler.errors import ServingError

SCHEMA = 1
_APPLICATION = 0x49434C31  # "ICL1"; tells our files from other databases
_MOST = 2**63 - 1
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS corrections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, program TEXT NOT NULL, text TEXT NOT NULL, label TEXT NOT NULL,
    created TEXT NOT NULL, who TEXT NOT NULL, version TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS of_program ON corrections (program);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL,
    program TEXT NOT NULL, correction INTEGER REFERENCES corrections, detail TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS of_correction ON events (correction, what);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are kept'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are kept'); END;
-- INSERT OR REPLACE deletes without asking the trigger above.
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON events WHEN EXISTS (SELECT 1 FROM events WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'events are kept'); END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {SCHEMA};
COMMIT;
"""
_CORRECTIONS = """
SELECT c.id, c.program, c.text, c.label, c.created, c.who, c.version, e.time, e.who
FROM corrections c LEFT JOIN events e ON e.correction = c.id AND e.what = 'undone'
"""
_NO_ROOM = "the disk is full or failing, or the file may not grow; make room, and send it again"
_REMEDIES = {
    sqlite3.SQLITE_FULL: _NO_ROOM,
    sqlite3.SQLITE_IOERR: _NO_ROOM,
    sqlite3.SQLITE_READONLY: "expected a file that may be written; change its permissions, or choose another place",
    sqlite3.SQLITE_CANTOPEN: "expected a file in a folder that may be written",
    sqlite3.SQLITE_NOTADB: "expected a file that `icl serve` made; choose another name",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; put a copy in its place",
    sqlite3.SQLITE_BUSY: "another program holds the file locked; end it, and send it again",
}
_Result = TypeVar("_Result")


class NoSuchCorrectionError(ServingError, LookupError):
    """A number that no correction has."""


class Correction(NamedTuple):
    """A text and its right label, as a user gave them; times are UTC in ISO 8601."""

    id: int
    program: str
    text: str
    label: str
    created: str
    by: str
    version: str
    """Of the program that had answered."""
    undone: str | None
    undone_by: str | None


class Event(NamedTuple):
    """One line of the record: `what` is "added", "undone", or what `record` was told."""

    id: int
    time: str
    by: str
    what: str
    program: str
    correction: int | None
    detail: str


class FeedbackStore:
    """The corrections in the file `path`, which is made if it is not there. Threads may share it.

    Every method raises ServingError if the file cannot be read or written; a call that failed has written
    nothing, and the next one may succeed.

    Raises:
        ServingError: if another process writes this file, or it is something else, newer, or read-only.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, FeedbackStore(Path(folder, "corrections.db")) as store:
    ...     made = store.add("support", "where is my card?", "card", by="ann", version="0123456789ab")
    ...     store.undo(made.id, by="bob").undone_by, store.active("support")
    ('bob', [])
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alone = Lock()
        self._writer = ThreadPoolExecutor(1, "corrections")
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        with ExitStack() as opened, _in_words(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            opened.callback(os.close, _lock(path))
            self._db = opened.enter_context(closing(_connect(path, "rwc")))
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                _require_ours(self._db, path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_TABLES)  # also where they are there: it shows that the file may be written
            self._opened = opened.pop_all()

    def __enter__(self) -> "FeedbackStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and let go of the file; what comes later is refused."""
        self._writer.shutdown()
        with self._alone:
            self._opened.close()

    def add(self, program: str, text: str, label: str, *, by: str, version: str) -> Correction:
        """Keep a correction; it is on the disk when this returns.

        Raises:
            ServingError: if a string holds half a surrogate pair, which no file in UTF-8 holds.
        """
        _require_whole(program, text, label, by, version)

        def insert() -> Correction:
            values = (program, text, label, _now(), by, version)
            sql = "INSERT INTO corrections (program, text, label, created, who, version) VALUES (?, ?, ?, ?, ?, ?)"
            number = self._db.execute(sql, values).lastrowid
            assert number is not None
            self._log("added", program, by, number)
            return Correction(number, *values, None, None)

        return self._write(insert)

    def undo(self, number: int, *, by: str) -> Correction:
        """Take the correction with this id back. Done twice, it stays as it was the first time.

        What an undone correction had replaced is active again.

        Raises:
            NoSuchCorrectionError: if there is none.
        """
        _require_whole(by)

        def insert() -> Correction | None:
            found = self._find(number)
            if found is None or found.undone is not None:
                return found
            self._log("undone", found.program, by, found.id)
            return self._find(number)

        undone = self._write(insert)
        if undone is None:
            raise NoSuchCorrectionError(f"there is no correction {number}; GET /v1/feedback lists those that are")
        return undone

    def active(self, program: str) -> list[Correction]:
        """The corrections to learn from, oldest first: not undone, and of texts that count as the same the newest."""
        with self._alone, _in_words(self._path):
            return _active(self._db, program)

    def page(self, program: str | None, *, after: int = 0, limit: int = 100) -> list[Correction]:
        """At most `limit` corrections, undone ones too, with ids above `after`, by id; None means of all programs."""
        sql = f"{_CORRECTIONS} WHERE c.id > ? AND (c.program = ? OR ? IS NULL) ORDER BY c.id LIMIT ?"
        return [Correction(*row) for row in self._rows(sql, _bounded(after), program, program, _bounded(limit))]

    def events(self, *, after: int = 0, limit: int = 100) -> list[Event]:
        """At most `limit` events with ids above `after`, by id."""
        sql = "SELECT id, time, who, what, program, correction, detail FROM events WHERE id > ? ORDER BY id LIMIT ?"
        return [Event(*row) for row in self._rows(sql, _bounded(after), _bounded(limit))]

    def record(self, what: str, program: str, *, by: str, detail: str = "") -> None:
        """Keep a further event, such as "reloaded"."""
        _require_whole(what, program, by, detail)
        self._write(lambda: self._log(what, program, by, None, detail))

    def _find(self, number: int) -> Correction | None:
        row = self._db.execute(f"{_CORRECTIONS} WHERE c.id = ?", (_bounded(number),)).fetchone()
        return None if row is None else Correction(*row)

    def _log(self, what: str, program: str, by: str, correction: int | None, detail: str = "") -> None:
        sql = "INSERT INTO events (time, who, what, program, correction, detail) VALUES (?, ?, ?, ?, ?, ?)"
        self._db.execute(sql, (_now(), by, what, program, correction, detail))

    def _rows(self, sql: str, *values: object) -> list[Any]:
        with self._alone, _in_words(self._path):
            return self._db.execute(sql, values).fetchall()

    def _write(self, job: Callable[[], _Result]) -> _Result:
        """Run `job` in a transaction, which it may share with others."""
        done: Future[_Result] = Future()
        self._waiting.append((done, job))
        try:
            self._writer.submit(self._write_waiting)
        except RuntimeError as error:
            if done.cancel():  # or the last transaction has it already
                raise ServingError(f"the corrections in {self._path} are closed: the endpoint is ending") from error
        return done.result()

    def _write_waiting(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        batch = [(future, job) for future, job in taken if future.set_running_or_notify_cancel()]
        if not batch:
            return  # an earlier transaction took all
        try:
            with self._alone, _in_words(self._path), _transaction(self._db):
                results = [job() for _, job in batch]
        except BaseException as error:
            for future, _ in batch:
                future.set_exception(error)
        else:
            for (future, _), result in zip(batch, results, strict=True):
                future.set_result(result)


def read_corrections(path: Path, program: str) -> list[Correction]:
    """What `FeedbackStore.active` gives, also while another process writes to the file.

    Raises:
        ServingError: if there is no such file, or it is something else or newer.
    """
    if not path.is_file():
        raise ServingError(f"there is no file {path}: expected one that `icl serve` keeps corrections in")
    with _in_words(path), closing(_connect(path, "ro")) as db:
        _require_ours(db, path)
        return _active(db, program)


def _active(db: sqlite3.Connection, program: str) -> list[Correction]:
    newest: dict[str, Correction] = {}
    for row in db.execute(f"{_CORRECTIONS} WHERE c.program = ? AND e.id IS NULL ORDER BY c.id", (program,)):
        correction = Correction(*row)
        newest[normalise_text(correction.text)] = correction
    return sorted(newest.values())


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def _lock(path: Path) -> int:
    """A handle that holds the lock until it is closed."""
    handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        flock(handle, LOCK_EX | LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ServingError(f"{path} is in use by another `icl serve`; stop that one, or name another file") from error
    except OSError:
        os.close(handle)
        raise
    return handle


def _require_ours(db: sqlite3.Connection, path: Path) -> None:
    [application] = db.execute("PRAGMA application_id").fetchone()
    [schema] = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise ServingError(f"{path} is a database of something else, expected one of `icl serve`; choose another name")
    if schema > SCHEMA:
        raise ServingError(
            f"{path} has format {schema}, and this version of icl-compiler reads up to {SCHEMA}; upgrade icl-compiler"
        )


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
        remedy = _REMEDIES.get(code, "open it again")
        raise ServingError(f"the corrections in {path} cannot be read or written ({error}): {remedy}") from error
    except OSError as error:
        raise ServingError(f"the corrections in {path} cannot be opened: {error.strerror or error}") from error


def _require_whole(*texts: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ServingError(
                f"the text holds half a character ({half!a}, a surrogate without its partner), which cannot be kept; "
                "repair it"
            ) from error


def _bounded(number: int) -> int:
    return min(max(number, 0), _MOST)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
