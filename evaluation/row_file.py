"""A file of rows that only grows, one JSON object a line: what is in it is done, whatever happens to the process.

- A row is written with one call, flushed, and on the disk before the next begins. What a kill can leave is half a
  line at the end: it is cut off when the file is opened again. A line of another kind is an error, and stays.
- Each row has a `key`, and a key comes in once.
- One writer at a time: a second one is told so.
"""

import json
import os
from collections.abc import Iterable, Mapping
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from types import TracebackType

from icl_compiler.errors import DataError

Row = dict[str, object]


class RowFile:
    """The rows of a file by their keys, and the way to add more; a context manager.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RowFile(Path(folder, "rows.jsonl")) as file:
    ...         file.add([{"key": "a", "gap": 0.5}, {"key": "a", "gap": 0.5}])
    ...     read_rows(Path(folder, "rows.jsonl"))
    [{'key': 'a', 'gap': 0.5}]

    Raises:
        DataError: if another process writes to the file, or a line is no row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab+")
        try:
            flock(self._file, LOCK_EX | LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(f"another process writes to {path}; wait for it, or end it") from None
        self._repair()
        self.rows: dict[str, Row] = {str(row["key"]): row for row in read_rows(path)}

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append those whose key is new, each on the disk before the next."""
        for row in rows:
            key = str(row["key"])
            if key in self.rows:
                continue
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows[key] = json.loads(line)  # as it will be read again

    def _repair(self) -> None:
        """A last line without its end is cut off, unless it is a whole row that lacks the line break only."""
        self._file.seek(0)
        content = self._file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        try:
            whole = isinstance(json.loads(content[start:]), dict)
        except ValueError:
            whole = False
        if whole:
            self._file.write(b"\n")
        else:
            self._file.truncate(start)
        self._file.flush()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file with keys, in its order, each key once; half a line at its end is left out.

    Raises:
        DataError: if another line is no row.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if row is None or (not isinstance(row, dict) and number == len(lines)):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise DataError(f"{path}, line {number}: expected a row of a sweep, a JSON object with a `key`")
        found.setdefault(row["key"], row)
    return list(found.values())
