"""Labelled texts: read from a file, checked on entry, then cut without surprises.

- `load_dataset` finds the columns, refuses what would spoil a measurement (missing labels, one label only,
  texts that are no text) and counts what it only drops or notices (blank texts, duplicates) in `warnings`.
- Texts are kept as they are: no stripping, no Unicode normalisation. What the user wrote is what is prompted.
- Labels are strings from here on. `0`, `0.0`, `False`, `""` and "None" are labels; a label is missing only
  where the file says nothing (see `readers.py`).
- `Dataset` is plain data, in file order. Its cuts are functions of the rows and a seed: `random.Random`,
  whose shuffle has been the same for years and which costs no import, makes them the same everywhere.
"""

import hashlib
import json
import numbers
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from icl_compiler.errors import ColumnError, DataError, DataFormatError, LabelError
from icl_compiler.readers import read_lines, read_table
from icl_compiler.row_filter import rows_where
from icl_compiler.table import Table, kind, listed

# Names of columns, best first; between bars, forms of one name, so that two of them are no ambiguity.
TEXT_NAMES = (
    "text|texts sentence|sentences utterance message question query content review|review_text tweet "
    "comment|comment_text input|inputs prompt instruction document article passage body description dialogue "
    "headline title"
)
LABEL_NAMES = (
    "label_text|label_name|label|labels intent|intent_name category class_name|class emotion sentiment topic polarity y"
)
TARGET_NAMES = (
    "target|targets|target_text output|outputs completion response|responses answer|answers summary "
    "meaning_representation reference|references"
)


def normalise_text(text: str) -> str:
    """The text with whitespace collapsed and case folded, by which two texts count as the same.

    >>> normalise_text("  Where is\\tmy CARD? ")
    'where is my card?'
    """
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Dataset:
    """Labelled texts, in file order.

    `answers` holds the labels (classification) or the targets (generation), one per text. A dataset that was
    loaded with `need_answers=False` from a file without answers has the answer "" in every row.

    Raises:
        DataError: if there are more texts than answers, or fewer.

    >>> data = Dataset(("hi", "bye"), ("greet", "part"), "classification", "example")
    >>> len(data), data.labels
    (2, ('greet', 'part'))
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    task: Literal["classification", "generation"]
    source: str
    """Where the rows come from, as the user named it."""
    warnings: tuple[str, ...] = ()
    """What was dropped or noticed when the file was read, counted, one sentence each."""

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.answers):
            raise DataError(
                f"{self.source}: a dataset needs one answer per text, "
                f"has {len(self.texts)} texts and {len(self.answers)} answers"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct answers, sorted.

        Raises:
            LabelError: if the task is generation.

        >>> Dataset(("a", "b", "c"), ("yes", "no", "yes"), "classification", "example").labels
        ('no', 'yes')
        """
        if self.task == "generation":
            raise LabelError(
                f"{self.source} has targets to generate, not labels; to read it as labelled, "
                "name its label column (--label-column)"
            )
        return tuple(sorted(set(self.answers)))

    @property
    def content_hash(self) -> str:
        """The sha256 of task, texts and answers as canonical JSON; 64 hexadecimal digits.

        Source and warnings do not enter, so the same rows have the same hash in CSV and in Parquet.

        >>> Dataset(("hi",), ("greet",), "classification", "example").content_hash[:12]
        '30d07142d714'
        """
        content = {"answers": self.answers, "task": self.task, "texts": self.texts}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def take(self, rows: Sequence[int]) -> "Dataset":
        """These rows, in this order; `rows` are indices from 0 to len - 1.

        Raises:
            DataError: if an index lies outside.

        >>> Dataset(("a", "b", "c"), ("x", "y", "z"), "classification", "example").take([2, 0]).texts
        ('c', 'a')
        """
        outside = [row for row in rows if not 0 <= row < len(self)]
        if outside:
            raise DataError(f"{self.source} has {len(self)} rows, indexed from 0; there is no row {outside[0]}")
        texts, answers = tuple(self.texts[row] for row in rows), tuple(self.answers[row] for row in rows)
        return replace(self, texts=texts, answers=answers)

    def subset(self, n: int, *, seed: int) -> "Dataset":
        """`n` rows drawn at random, as many of each label as of the others where the file has enough of them.

        With one seed the subsets are nested: `subset(n)` lies within `subset(m)` for every n <= m. Up to the
        number of labels, each row has a label of its own. `n` lies in 0 to len; rows stay in file order.

        Raises:
            DataError: if `n` lies outside.

        >>> data = Dataset(tuple("abcdef"), ("x", "x", "x", "x", "y", "z"), "classification", "example")
        >>> sorted(data.subset(4, seed=0).answers)
        ['x', 'x', 'y', 'z']
        """
        if not 0 <= n <= len(self):
            raise DataError(f"{self.source} has {len(self)} rows; the number of examples must lie in 0 to that, is {n}")
        order = self._shuffled(seed)
        # Round after round, one row of each label that still has one. Sorting is stable.
        rounds = self._occurrences(order)
        order.sort(key=rounds.__getitem__)
        return self.take(sorted(order[:n]))

    def split(self, held_out: int | float, *, seed: int) -> "tuple[Dataset, Dataset]":
        """The rows in two parts, the rest and the held-out ones, each label in both in about its share.

        `held_out` is a number of rows (an int in 1 to len - 1) or a share of them (a float between 0 and 1).
        A label loses its last row to the held-out part only when nothing else is left to give.

        Raises:
            DataError: if `held_out` lies outside, or there are fewer than two rows.

        >>> data = Dataset(tuple("abcdef"), ("x", "x", "x", "x", "y", "y"), "classification", "example")
        >>> rest, held_out = data.split(0.5, seed=0)
        >>> rest.answers, held_out.answers
        (('x', 'x', 'y'), ('x', 'x', 'y'))
        """
        if len(self) < 2:
            raise DataError(f"{self.source} has {len(self)} rows; at least 2 are needed to hold some out")
        if isinstance(held_out, float):
            if not 0 < held_out < 1:
                raise DataError(f"the share to hold out must lie between 0 and 1, is {held_out}")
            count = min(max(round(held_out * len(self)), 1), len(self) - 1)
        else:
            if not 0 < held_out < len(self):
                raise DataError(
                    f"{self.source} has {len(self)} rows; the number to hold out must lie in 1 to "
                    f"{len(self) - 1}, is {held_out}"
                )
            count = held_out
        order = self._shuffled(seed)
        rounds, strata = self._occurrences(order), self._strata()
        sizes = Counter(strata)

        def share(row: int) -> float:
            size = sizes[strata[row]]
            # Webster's rule: row j of c comes at (j + 1/2) / c. The last row of a label waits for all others.
            return (rounds[row] + 0.5) / size + (rounds[row] == size - 1)

        order.sort(key=share)
        return self.take(sorted(order[count:])), self.take(sorted(order[:count]))

    def without_texts(self, texts: Collection[str]) -> "tuple[Dataset, int]":
        """The rows whose text is none of `texts`, and how many were dropped; compared by `normalise_text`.

        >>> data = Dataset(("Hello  there", "bye"), ("greet", "part"), "classification", "example")
        >>> rest, dropped = data.without_texts(["hello there"])
        >>> rest.texts, dropped
        (('bye',), 1)
        """
        unwanted = {normalise_text(text) for text in texts}
        rows = [row for row, text in enumerate(self.texts) if normalise_text(text) not in unwanted]
        return self.take(rows), len(self) - len(rows)

    def require_like(self, task: str, labels: Collection[str], *, of: str) -> None:
        """Nothing, if these rows are for the task of the data `of`, and all their labels are among `labels`.

        Raises:
            DataError: if they are for another task.
            LabelError: if they have other labels.

        >>> data = Dataset(("a", "b"), ("yes", "maybe"), "classification", "dev.csv")
        >>> data.require_like("classification", ("no", "yes"), of="train.csv")
        Traceback (most recent call last):
        icl_compiler.errors.LabelError: dev.csv has the label 'maybe', which train.csv lacks; leave these rows out, or \
        add some to train.csv
        """
        if self.task != task:
            raise DataError(f"{self.source} is for {self.task}, and {of} for {task}")
        unknown = sorted(set(self.answers) - set(labels)) if self.task == "classification" else []
        if unknown:
            several = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise LabelError(
                f"{self.source} has the label {unknown[0]!r}{several}, which {of} lacks; leave these rows out, or add "
                f"some to {of}"
            )

    def _strata(self) -> tuple[str, ...]:
        return self.answers if self.task == "classification" else ("",) * len(self)

    def _shuffled(self, seed: int) -> list[int]:
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return order

    def _occurrences(self, order: Sequence[int]) -> list[int]:
        """For each row: how many rows of its label come before it in `order`."""
        seen: Counter[str] = Counter()
        strata = self._strata()
        occurrences = [0] * len(self)
        for row in order:
            occurrences[row] = seen[strata[row]]
            seen[strata[row]] += 1
        return occurrences


def load_dataset(
    source: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    need_answers: bool = True,
    where: Sequence[str] = (),
) -> Dataset:
    """The labelled texts of a source: CSV, TSV, JSONL, JSON, Parquet, a saved `datasets` folder, `hf:NAME`.

    A folder of several splits is named `FOLDER:SPLIT`, a dataset of the hub `hf:NAME[:SPLIT]` or
    `hf:NAME:CONFIG:SPLIT` (split `train` where none is named; NAME may be a local folder of data files).

    Columns that are not named are guessed from their names (`text`, `sentence` ...; `label`, `intent` ...;
    `target`, `output` ...). A label column means classification and wins over a target column; a target
    column means generation. Of a target that is a list of references, the first element counts. Numbers and
    booleans become strings. With `need_answers=False` an answer that is not there is "", and that all labels
    are the same is no error.

    Of the rows only those count that fulfil every condition of `where`, such as `lang=de` or `lang!=de`, on any column
    (see `row_filter`). Blank texts and exact duplicates of rows are dropped. `warnings` of the result count them, and
    what is kept: texts with several labels, labels that differ only in case or surrounding blanks.

    Raises:
        DataError: if the source does not exist, or holds no rows, or labels are missing.
        DataFormatError: if it cannot be read in the format of its name; names the row.
        ColumnError: if a column is not there or not to be guessed, or label and target are both named.
        LabelError: if all rows have the same label.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "messages.csv")
    ...     _ = path.write_text(chr(10).join(["text,intent", "hi,greet", "bye,part", "hi,greet"]))
    ...     data = load_dataset(path)
    >>> data.texts, data.answers, data.task
    (('hi', 'bye'), ('greet', 'part'), 'classification')
    >>> data.warnings
    ('1 duplicate row was dropped (row 4).',)
    """
    return labelled(read_table(source), str(source), text_column, label_column, target_column, need_answers, where)


def labelled(
    table: Table,
    name: str,
    text_column: str | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    need_answers: bool = True,
    where: Sequence[str] = (),
) -> Dataset:
    """The labelled texts of a table that stands in memory already, read as `load_dataset` reads; `name` is its source.

    Raises:
        DataError, DataFormatError, ColumnError, LabelError: as `load_dataset`.
    """
    if label_column is not None and target_column is not None:
        raise ColumnError(
            f"both a label column ({label_column!r}) and a target column ({target_column!r}) are named; "
            "name the label to classify, or the target to generate"
        )
    warnings = list(table.warnings)
    text_name, answer_name, task = _choose(
        name, table, text_column, label_column, target_column, need_answers, warnings
    )
    texts = _texts(name, table, text_name)
    answers = [None] * len(texts) if answer_name is None else _answers(name, table, answer_name, task)

    asked = rows_where(table, where, name=name)
    rows = [row for row in asked if texts[row].strip()]
    if not rows:
        raise DataError(f"{name} has no text in column {text_name!r}; all {len(asked)} rows are blank there")
    if len(rows) < len(asked):
        blank = [row for row in asked if not texts[row].strip()]
        what = _number(len(blank), "row with a blank text was", "rows with a blank text were")
        warnings.append(f"{what} dropped ({table.places(blank)}).")

    missing = [row for row in rows if answers[row] is None]
    if missing and need_answers:
        raise DataError(
            f"{name} has no {'label' if task == 'classification' else 'target'} in {len(missing)} of "
            f"{len(rows)} rows, column {answer_name!r} ({table.places(missing)}: {table.missing}). "
            "Fill them in, or remove these rows"
        )
    if missing and answer_name is not None:
        warnings.append(f"{_number(len(missing), 'row has', 'rows have')} no answer ({table.places(missing)}).")

    first: dict[tuple[str, str], int] = {}
    duplicates = [row for row in rows if first.setdefault((texts[row], answers[row] or ""), row) != row]
    if duplicates:
        what = _number(len(duplicates), "duplicate row was", "duplicate rows were")
        warnings.append(f"{what} dropped ({table.places(duplicates)}).")
    dataset = Dataset(tuple(text for text, _ in first), tuple(answer for _, answer in first), task, name)

    if task == "classification" and answer_name is not None:
        warnings += _label_warnings(dataset, table, list(first.values()))
        if need_answers and len(dataset.labels) == 1:
            raise LabelError(
                f"{name} has one label only, {dataset.labels[0]!r}, in column {answer_name!r}; expected two "
                f"or more. Its columns are {listed(table.names)} (--label-column)"
            )
    distinct = len(set(dataset.answers))
    if task == "generation" and target_column is None and distinct * 20 <= len(dataset):
        warnings.append(
            f"{distinct} distinct targets in {len(dataset)} rows look like labels "
            f"(--label-column {answer_name} reads them as such)."
        )
    return replace(dataset, warnings=tuple(warnings))


def load_texts(source: str | Path, *, text_column: str | None = None) -> tuple[str, ...]:
    """The texts of a source that need have no labels, every row in file order.

    Reads what `load_dataset` reads, and `.txt` files in UTF-8, one text a line, without their blank lines.
    Nothing else is left out, so that predictions stand beside the rows they belong to.

    Raises:
        DataError: if the source does not exist, holds no texts, or has a row whose text is blank.
        DataFormatError: if it cannot be read in the format of its name; names the row.
        ColumnError: if the text column is not there, or not to be guessed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "texts.jsonl")
    ...     _ = path.write_text('{"text": "where is my card?"}')
    ...     load_texts(path)
    ('where is my card?',)
    """
    name = str(source)
    if name.lower().endswith(".txt"):
        if text_column is not None:
            raise ColumnError(f"{name} is a text file, one text a line, without a column {text_column!r}")
        return read_lines(source)
    table = read_table(source)
    text_name = _named(name, table, text_column, "--text-column") or _guess(table, TEXT_NAMES, set(), "text", [])
    if text_name is None:
        raise _no_column(name, table, "text", "--text-column")
    texts = _texts(name, table, text_name)
    blank = [row for row, text in enumerate(texts) if not text.strip()]
    if blank:
        raise DataError(
            f"{name} has a blank text in {len(blank)} of {len(texts)} rows ({table.places(blank)}), column "
            f"{text_name!r}; nothing can be predicted for it. Remove these rows"
        )
    return tuple(texts)


# Which column is which


def _choose(
    name: str,
    table: Table,
    text_column: str | None,
    label_column: str | None,
    target_column: str | None,
    need_answers: bool,
    warnings: list[str],
) -> tuple[str, str | None, Literal["classification", "generation"]]:
    text_name = _named(name, table, text_column, "--text-column")
    label_name = _named(name, table, label_column, "--label-column")
    target_name = _named(name, table, target_column, "--target-column")
    taken = {column for column in (text_name, label_name, target_name) if column is not None}
    if len(taken) < sum(column is not None for column in (text_name, label_name, target_name)):
        raise ColumnError(f"column {text_name!r} of {name} is named twice, as the text and as its answer")
    if text_name is None:
        text_name = _guess(table, TEXT_NAMES, taken, "text", warnings)
        if text_name is None:
            raise _no_column(name, table, "text", "--text-column")
    if label_name is None and target_name is None:
        label_name = _guess(table, LABEL_NAMES, taken, "label", warnings)
    if label_name is None and target_name is None:
        target_name = _guess(table, TARGET_NAMES, taken, "target", warnings)
    if label_name is None and target_name is None and need_answers:
        raise _no_column(name, table, "label or target", "--label-column or --target-column")
    return text_name, label_name or target_name, "generation" if target_name else "classification"


def _named(name: str, table: Table, column: str | None, option: str) -> str | None:
    if column is None or column in table.names:
        return column
    near = [other for other in table.names if _folded(other) == _folded(column)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ColumnError(f"{name} has no column {column!r} ({option}); it has {listed(table.names) or 'none'}{hint}")


def _guess(table: Table, names: str, taken: set[str], role: str, warnings: list[str]) -> str | None:
    free = {_folded(column): column for column in reversed(table.names) if column not in taken}
    fitting = [[free[form] for form in forms.split("|") if form in free] for forms in names.split()]
    found = [columns[0] for columns in fitting if columns]
    if len(found) > 1:
        warnings.append(
            f"{len(found)} columns could be the {role} ({listed(found)}); {found[0]!r} was taken "
            f"(--{role}-column names another)."
        )
    return found[0] if found else None


def _folded(column: str) -> str:
    return column.strip().casefold().replace(" ", "_").replace("-", "_")


def _no_column(name: str, table: Table, role: str, option: str) -> ColumnError:
    return ColumnError(
        f"{name} has no column that is {role} by its name; it has {listed(table.names) or 'none'}. "
        f"Name the column with {option}; if the first row is data, add a row with names above it"
    )


# What stands in the columns


def _texts(name: str, table: Table, column: str) -> list[str]:
    texts: list[str] = []
    for index, value in enumerate(table.column(column)):
        if value is not None and not isinstance(value, str):
            raise DataFormatError(
                f"{name}, {table.place(index)}, column {column!r}, is {kind(value)}, expected a text; "
                "name another column with --text-column"
            )
        texts.append(_encodable(name, table, index, column, value or ""))
    return texts


def _answers(name: str, table: Table, column: str, task: str) -> list[str | None]:
    answers: list[str | None] = []
    for index, value in enumerate(table.column(column)):
        if task == "generation" and isinstance(value, list):
            value = value[0] if value else None
        if value is not None and not isinstance(value, str | numbers.Number):
            several = "; several labels a row are not supported" if isinstance(value, list) else ""
            raise DataFormatError(
                f"{name}, {table.place(index)}, column {column!r}, is {kind(value)}, "
                f"expected a string, a number or a boolean{several}"
            )
        answers.append(None if value is None else _encodable(name, table, index, column, str(value)))
    return answers


def _encodable(name: str, table: Table, index: int, column: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataFormatError(
            f"{name}, {table.place(index)}, column {column!r}, holds half a character "
            f"({text[error.start]!a}, a surrogate without its partner), which no tokenizer takes; repair it"
        ) from error
    return text


def _label_warnings(dataset: Dataset, table: Table, rows: Sequence[int]) -> list[str]:
    """`rows` are the indices in the table of the rows of `dataset`."""
    warnings = []
    rows_of: dict[str, list[int]] = {}
    for row, text in zip(rows, dataset.texts, strict=True):
        rows_of.setdefault(text, []).append(row)
    contested = [of_text for of_text in rows_of.values() if len(of_text) > 1]
    if contested:
        warnings.append(
            f"{_number(len(contested), 'text has', 'texts have')} more than one label; all of them were kept "
            f"(first: {table.places(contested[0])})."
        )
    forms: dict[str, list[str]] = {}
    for label in dataset.labels:
        forms.setdefault(label.strip().casefold(), []).append(label)
    alike = [labels for labels in forms.values() if len(labels) > 1]
    if alike:
        warnings.append(
            f"{sum(map(len, alike))} labels differ from another one only in case or surrounding blanks "
            f"({listed([label for labels in alike for label in labels])}); they were kept apart."
        )
    return warnings


def _number(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
