"""From a source, as the user names it, to a table of columns: CSV, TSV, JSONL, JSON, Parquet, Hugging Face.

- One function per format, each around the library that knows it (csv, json, pyarrow, datasets). What they
  share is only that they end in a `Table`; what the columns mean is decided in `data.py`.
- A column becomes a list when it is asked for, so that a Parquet file with embeddings costs nothing.
- `None` means "nothing stands here": an empty CSV cell, null, an absent key, NaN in a column of numbers.
  The strings "nan", "None", "NA" are strings: no reader here guesses missing values from them.
- Text files are decoded as a whole, strictly, before they are parsed; rows end at line ends only, not at
  U+2028 and its kin (as `str.splitlines` would have it), which stand inside real texts.
- Rows carry the number that a person sees in the file: the header of a CSV is row 1.
- pyarrow and datasets are imported inside the functions that need them (datasets takes a second).
"""

import csv
import difflib
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_compiler.errors import ColumnError, DataError, DataFormatError
from icl_compiler.models import without_hub_use_its_cache

HUB = "hf:"


@dataclass(frozen=True)
class Table:
    """The columns of a file, before any of them is chosen."""

    names: tuple[str, ...]
    column: Callable[[str], list[object]]
    """The values of a column, one per row, `None` where nothing stands."""
    rows: Sequence[int]
    """The number of each row in the file."""
    missing: str
    """How a missing value looks in this format, to end a sentence."""
    unit: str = "row"
    """What `rows` counts: "row", or "line" where cells run over several lines."""
    warnings: tuple[str, ...] = ()

    def place(self, index: int) -> str:
        """Where the row with this index stands in the file: "row 7"."""
        return f"{self.unit} {self.rows[index]}"

    def places(self, indices: Sequence[int]) -> str:
        """Where the first three of these rows stand: "row 7", or "rows 3, 9, 12 and 4 more"."""
        if len(indices) == 1:
            return self.place(indices[0])
        first = ", ".join(str(self.rows[index]) for index in indices[:3])
        return f"{self.unit}s {first}" + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")


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
        table = _read_hub(name)
    else:
        path, split = _locate(name)
        if path.is_dir():
            table = _read_folder(path, split)
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
        column=lambda name: [_or_none(row.get(name)) for row in objects],
        rows=numbers,
        missing="null or no such key",
    )


# Arrow formats


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if not path.stat().st_size:
            raise DataError(f"{path} is empty (0 bytes)")
        file = parquet.ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        class_names = _class_names(file.schema_arrow.metadata or {})

        def column(name: str) -> list[object]:
            try:
                return _arrow_values(path, file.read(columns=[name]).column(name), class_names.get(name))
            except (pa.ArrowException, OSError) as error:
                raise DataFormatError(f"{path}, column {name!r}, cannot be read: {_first_line(error)}") from error

        return Table(names, column, range(1, file.metadata.num_rows + 1), missing="null")
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    # `datasets` writes label numbers into Parquet, and their names into the metadata of the file.
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _arrow_values(source: object, column: Any, class_names: Sequence[str] | None) -> list[object]:
    try:
        values = [_or_none(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        for number, value in enumerate(column, start=1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataFormatError(f"{source}, row {number}, is not UTF-8: {error}") from error
        raise
    if class_names is None:
        return values
    # -1 is how `datasets` writes "no label" for such a column.
    known: dict[object, str | None] = {-1: None, **dict(enumerate(class_names))}
    return [known.get(value, value) for value in values]


# Hugging Face datasets


def _read_folder(path: Path, split: str | None) -> Table:
    source = str(path) if split is None else f"{path}:{split}"
    if (path / "dataset_dict.json").is_file():
        path = path / _saved_split(path, split)
    elif not (path / "state.json").is_file():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        hint = f" It has files of its own: {listed(files)}; name one of them." if files else ""
        raise DataError(
            f"{path} is a folder, and none that Hugging Face datasets saved (save_to_disk).{hint}"
            f" A folder of CSV or JSONL files is read with hf:{path}"
        )
    elif split is not None:
        raise DataError(f"{path} holds one dataset without splits, so there is no split {split!r}; name the folder")
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise DataFormatError(f"{source} cannot be loaded as a saved dataset: {_first_line(error)}") from error
    return dataset_table(source, saved, missing="null")


def _saved_split(path: Path, split: str | None) -> str:
    try:
        splits = list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFormatError(f"{path / 'dataset_dict.json'} does not list the splits: {_first_line(error)}") from error
    if split is None and "train" in splits:
        return "train"
    if split is None and len(splits) == 1:
        return str(splits[0])
    if split not in splits:
        found = "has several splits and none named 'train'" if split is None else f"has no split {split!r}"
        raise DataError(
            f"{path} {found}; name one of {listed(splits)}, as in {path}:{splits[0] if splits else 'SPLIT'}"
        )
    return str(split)


def _read_hub(source: str) -> Table:
    # A colon inside brackets belongs to a slice: hf:NAME:train[:100].
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))
    if not name or len(rest) > 2 or (rest and not rest[-1]):
        raise DataError(f"{source!r} is not understood; expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    path = Path(name)
    if path.is_file() or any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        raise DataError(f"{source} is on this machine; name it without {HUB!r}, as {source.removeprefix(HUB)}")
    import datasets

    if not path.exists():
        without_hub_use_its_cache()
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises what its many parts raise
        raise DataError(_hub_failure(source, name, error)) from error
    missing = "null, and in a CSV read through hf: also NA, None, nan or null; name a CSV file itself to keep these"
    return dataset_table(source, loaded, missing)


def _hub_failure(source: str, name: str, error: Exception) -> str:
    said = _first_line(error) + (f": {_first_line(error.__cause__)}" if error.__cause__ else "")
    if any(words in said for words in ("Unknown split", "BuilderConfig", "Config name")):
        advice = "expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT with a split (and configuration) that it has"
    elif "any data files" in said:
        advice = f"there are no data files in {name}"
    elif Path(name).is_dir():
        advice = f"name one of the files in {name} instead, to learn which row of it is at fault"
    elif name.startswith((".", "/", "~")):
        advice = "there is no such folder"
    elif "OfflineMode" in said and os.environ.get("HF_HUB_OFFLINE"):
        advice = f"there is no folder {name}, and offline mode forbids to ask the hub; unset HF_HUB_OFFLINE"
    elif "reach" in said:
        advice = f"there is no folder {name}, and the hub cannot be reached; check the network, or name a file"
    elif "gated" in said:
        advice = "accept its terms on the hub, then run: hf auth login"
    else:
        advice = f"check that https://huggingface.co/datasets/{name} exists, or name a file"
    return f"{source} cannot be loaded: {advice} (datasets says: {said})"


def dataset_table(source: str, dataset: Any, missing: str) -> Table:
    """The table of a `datasets.Dataset`: class names for class numbers, rows counted from 1."""
    from datasets import ClassLabel

    def column(name: str) -> list[object]:
        feature = dataset.features[name]
        class_names = feature.names if isinstance(feature, ClassLabel) else None
        values = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        return _arrow_values(source, values, class_names)

    return Table(tuple(dataset.column_names), column, range(1, len(dataset) + 1), missing)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# Words for messages


def kind(value: object) -> str:
    """A value in the words of JSON, with its beginning: "a number (42)".

    >>> kind(True), kind([1, 2])
    ('a boolean (True)', 'a list ([1, 2])')
    """
    words = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else f"{words.get(type(value), f'a {type(value).__name__}')} ({_short(value)})"


def listed(values: Sequence[object] | dict[str, object]) -> str:
    """The first 20 values for a message, each shortened to 40 characters.

    >>> listed(["text", "label"])
    "'text', 'label'"
    """
    items = list(values)
    return ", ".join(_short(item) for item in items[:20]) + (f" and {len(items) - 20} more" if len(items) > 20 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _cells(number: int) -> str:
    return "1 cell" if number == 1 else f"{number} cells"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _or_none(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
