"""Tables of Arrow: Parquet files, what Hugging Face `datasets` saved, and its hub.

- `None` means "nothing stands here": null, NaN in a column of numbers, the class -1.
- pyarrow and datasets are imported inside the functions that need them (datasets takes a second).
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from icl_compiler.errors import DataError, DataFormatError
from icl_compiler.models import without_hub_use_its_cache
from icl_compiler.table import Table, first_line, listed, or_none

HUB = "hf:"


def read_parquet(path: Path) -> Table:
    """The table of a Parquet file; class names for class numbers, where `datasets` wrote it."""
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
                raise DataFormatError(f"{path}, column {name!r}, cannot be read: {first_line(error)}") from error

        return Table(names, column, range(1, file.metadata.num_rows + 1), missing="null")
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


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
        values = [or_none(value) for value in column.to_pylist()]
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


def read_folder(path: Path, split: str | None, *, files: Collection[str]) -> Table:
    """The table of a folder that `datasets` saved; `files` are the suffixes of files that could be named instead."""
    source = str(path) if split is None else f"{path}:{split}"
    if (path / "dataset_dict.json").is_file():
        path = path / _saved_split(path, split)
    elif not (path / "state.json").is_file():
        own = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in files)
        hint = f" It has files of its own: {listed(own)}; name one of them." if own else ""
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
        raise DataFormatError(f"{source} cannot be loaded as a saved dataset: {first_line(error)}") from error
    return dataset_table(source, saved, missing="null")


def _saved_split(path: Path, split: str | None) -> str:
    try:
        splits = list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFormatError(f"{path / 'dataset_dict.json'} does not list the splits: {first_line(error)}") from error
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


def read_hub(source: str) -> Table:
    """The table of `hf:NAME[:CONFIG][:SPLIT]`."""
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
    said = first_line(error) + (f": {first_line(error.__cause__)}" if error.__cause__ else "")
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
