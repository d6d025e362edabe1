"""What benchmarks share: where the datasets are, and rows, of which what is measured once is kept."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def data_folder(names: Iterable[str]) -> Path:
    """The folder that holds the datasets of these names; without it the benchmark ends, and says what is wanted."""
    data = Path(os.environ.get("ICL_DATASETS", Path(__file__).parents[3] / "shared" / "data"))
    if not data.is_dir():
        sys.exit(f"there are no datasets at {data}; set ICL_DATASETS to the folder that holds {', '.join(names)}")
    return data


def rows_of(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def keep(path: Path, *rows: Row) -> None:
    """Append rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
