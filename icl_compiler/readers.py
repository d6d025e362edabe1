"""From a source, as the user names it, to a table of columns: CSV, TSV, JSONL, JSON, and those of `arrow_readers`.

- One function per format, each around the library that knows it (csv, json). What they share is only that they end in
  a `Table`; what the columns mean is decided in `data.py`.
- A column becomes a list when it is asked for, so that a Parquet file with embeddings costs nothing.
- `None` means "nothing stands here": an empty CSV cell, null, an absent key, NaN.
  The strings "nan", "None", "NA" are strings: no reader here guesses missing values from them.
- Text files are decoded as a whole, strictly, before they are parsed; rows end at line ends only, not at
  U+2028 and its kin (as `str.splitlines` would have it), which stand inside real texts.
- Rows carry the number that a person sees in the file: the header of a CSV is row 1.
"""

import csv
import difflib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icl_compiler.arrow_readers import HUB, read_folder, read_hub, read_parquet
from icl_compiler.errors import ColumnError, DataError, DataFormatError
from icl_compiler.table import Table, kind, listed, or_none


def read_table(source: str | Path) -> Table:
    """The table that a source names: a file, a saved folder (`FOLDER:SPLIT`), or `hf:NAME[:CONFIG][:SPLIT]`.

    The table has at least one row.

    Raises:
        DataError: if there is no such file, folder, split or dataset, or no row in it.
        DataFormatError: if it cannot be read in the format that its name announces; names the row.
        ColumnError: if two columns share a name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"text": "a", "label": 0}' + chr(10) + '{"text": "b", "label": null}')
    ...     table = read_table(path)
    >>> table.names, table.column("label"), table.place(1)
    (('text', 'label'), [0, None], 'row 2')
    """
    name = str(source)
    if name.startswith(HUB):
        table = read_hub(name)
    else:
        path, split = _locate(name)
        if path.is_dir():
            table = read_folder(path, split, files=READERS)
        else:
            reader = READERS.get(path.suffix.lower())
            if reader is None:
                raise DataFormatError(_unknown_suffix(path))
            table = reader(path)
    named = [column for column in table.names if column]
    if len(set(named)) < len(named):
        twice = next(column for column in named if named.count(column) > 1)
        raise ColumnError(f"{name} has {named.count(twice)} columns named {twice!r}; rename all but one")
    if not table.rows:
        raise DataError(f"{name} holds no rows{' below its header' if table.names else ''}")
    return table


def read_lines(source: str | Path) -> tuple[str, ...]:
    """The lines of a text file in UTF-8, one text a line, without blank lines.

    Raises:
        DataError: if there is no such file, or nothing in it.
        DataFormatError: if it is not UTF-8; names the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "texts.txt")
    ...     _ = path.write_text("where is my card?" + 2 * chr(10) + "thanks")
    ...     read_lines(path)
    ('where is my card?', 'thanks')
    """
    path, _ = _locate(str(source))
    lines = tuple(line.removesuffix("\r") for line in _decoded(path).split("\n") if line.strip())
    if not lines:
        raise DataError(f"{path} holds blank lines only")
    return lines


# Finding the file, and its characters


def _locate(name: str) -> tuple[Path, str | None]:
    path = Path(name)
    if not name:
        raise DataError(f"no data file is named; expected a file ({', '.join(READERS)}), a folder or hf:NAME")
    if os.path.exists(name):  # noqa: PTH110 - Path.exists raises on names that are too long
        return path, None
    folder, colon, split = name.rpartition(":")
    if colon and Path(folder).is_dir():
        return Path(folder), split
    if not path.parent.is_dir():
        raise DataError(f"there is no file {name}: the folder {path.parent} does not exist")
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=3)  # noqa: PTH208 - names
    hint = f"; did you mean {' or '.join(str(path.parent / other) for other in near)}?" if near else ""
    raise DataError(f"there is no file {name}{hint}")


def _unknown_suffix(path: Path) -> str:
    known = ", ".join(READERS)
    if path.suffix.lower() == ".txt":
        return f"{path} is a text file, which has no labels; expected one of {known}, a folder or hf:NAME"
    if path.suffix.lower() in {".xlsx", ".xls", ".ods"}:
        return f"{path} is a spreadsheet; save it as CSV (UTF-8) and name that file"
    if path.suffix.lower() in {".gz", ".zip", ".bz2", ".xz", ".zst"}:
        return f"{path} is compressed; unpack it and name the file that comes out"
    return f"{path} ends in {path.suffix or 'no suffix'}; expected one of {known}, a folder or hf:NAME"


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise DataError(f"{path} is empty (0 bytes)")
    return data


def _decoded(path: Path) -> str:
    data = _bytes(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataFormatError(
            f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8{path.suffix}"
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    if (start := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, start) + 1
        raise DataFormatError(
            f"{path} has a NUL byte in line {line}, so it is no text file, is UTF-16, or is damaged; "
            f"expected text in UTF-8"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        line_start = data.rfind(b"\n", 0, error.start) + 1
        before = data[max(line_start, error.start - 20) : error.start].decode("utf-8", errors="ignore")
        raise DataFormatError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02X} in line {line}"
            f"{f', after {before!r}' if before else ''}. "
            f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8{path.suffix}"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty (blank lines only)")
    return text


# Text formats


@dataclass(frozen=True)
class _Records:
    header: list[str]
    cells: list[list[str]]
    lines: list[int]
    multiline: bool


def _read_csv(path: Path) -> Table:
    return _cells_table(_records(path, _decoded(path), ",", csv.QUOTE_MINIMAL))


def _read_tsv(path: Path) -> Table:
    # Some programs quote cells of a TSV (Excel, pandas), others write quotes as characters (GLUE, Kaggle).
    # The second kind betrays itself where the quotes do not pair.
    text = _decoded(path)
    try:
        return _cells_table(_records(path, text, "\t", csv.QUOTE_MINIMAL))
    except DataFormatError:
        if '"' not in text:
            raise
        try:
            records = _records(path, text, "\t", csv.QUOTE_NONE)
        except DataFormatError:
            records = None
        if records is None:
            raise
    count = sum(cell.startswith('"') for cells in records.cells for cell in cells)
    begin = "1 cell begins" if count == 1 else f"{count} cells begin"
    note = f"quotes do not pair ({begin} with one), so all were read as characters."
    return _cells_table(records, warnings=(note,))


def _records(path: Path, text: str, separator: str, quoting: int) -> _Records:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)  # type: ignore[arg-type]  # typeshed wants the literals of quoting
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    multiline = False
    start = 1
    limit = csv.field_size_limit(2**31 - 1)  # the library's own is 131,072 characters a cell, for the process
    try:
        for cells in reader:
            multiline |= reader.line_num > start
            blank = not cells or (len(header) > 1 and len(cells) == 1 and not cells[0].strip())
            if not header and not blank:
                header = cells
                _check_separator(path, header, separator)
            elif not blank:
                if len(cells) != len(header):
                    where = f"{'line' if multiline else 'row'} {start}"
                    raise DataFormatError(
                        f"{path}, {where}, has {_cells(len(cells))} where the header has {len(header)}; "
                        f"a cell with a {_SEPARATORS[separator]} or a line end in it needs double quotes"
                    )
                rows.append(cells)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataFormatError(
            f"{path} cannot be read from line {start} on: {error}. A cell that begins with a double quote "
            f'must end with one, and quotes inside it are doubled: "she said ""hi"""'
        ) from error
    finally:
        csv.field_size_limit(limit)
    return _Records(header, rows, lines, multiline)


_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}


def _check_separator(path: Path, header: list[str], separator: str) -> None:
    others = [other for other in _SEPARATORS if other != separator and other in header[0]]
    if len(header) == 1 and others:
        raise DataFormatError(
            f"{path} has one column, {header[0]!r}: its separator looks like a {_SEPARATORS[others[0]]}, "
            f"expected a {_SEPARATORS[separator]}. Save it with that separator"
            + (", or rename it to .tsv" if others[0] == "\t" else "")
            + (", or rename it to .csv" if others[0] == "," else "")
        )


def _cells(number: int) -> str:
    return "1 cell" if number == 1 else f"{number} cells"


def _cells_table(records: _Records, warnings: tuple[str, ...] = ()) -> Table:
    def column(name: str) -> list[object]:
        position = records.header.index(name)
        return [cells[position] if cells[position].strip() else None for cells in records.cells]

    return Table(
        names=tuple(records.header),
        column=column,
        rows=records.lines,
        missing="an empty cell",
        unit="line" if records.multiline else "row",
        warnings=warnings,
    )


def _read_jsonl(path: Path) -> Table:
    objects: list[dict[str, object]] = []
    numbers: list[int] = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        hint = "; a file that is one array ends in .json" if line.lstrip().startswith("[") else ""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataFormatError(f"{path}, row {number}, is no JSON object: {where}{hint}") from error
        objects.append(_object(path, number, value, hint))
        numbers.append(number)
    return _objects_table(objects, numbers)


def _read_json(path: Path) -> Table:
    try:
        values = json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        hint = "; a file with one object a line ends in .jsonl" if extra else ""
        raise DataFormatError(f"{path} is no JSON: {error}{hint}") from error
    if not isinstance(values, list):
        keys = f" with the keys {listed(values)}" if isinstance(values, dict) else ""
        raise DataFormatError(f"{path} holds {kind(values)}{keys}; expected an array of objects, one per row")
    objects = [_object(path, number, value) for number, value in enumerate(values, start=1)]
    return _objects_table(objects, range(1, len(objects) + 1))


def _object(path: Path, number: int, value: object, hint: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataFormatError(f'{path}, row {number}, is {kind(value)}, not an object like {{"text": ...}}{hint}')
    return value


def _objects_table(objects: list[dict[str, object]], numbers: Sequence[int]) -> Table:
    return Table(
        names=tuple(dict.fromkeys(name for row in objects for name in row)),
        column=lambda name: [or_none(row.get(name)) for row in objects],
        rows=numbers,
        missing="null or no such key",
    )


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": read_parquet,
}
