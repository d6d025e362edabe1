"""`--where COLUMN=VALUE`: which rows of a file are used at all, by what stands in any of its columns.

- `=` or `!=`, and nothing else: no expressions, nothing is evaluated. Several conditions hold together.
- Values are compared as text, blanks around them aside: `lang=de`, `stars=5`, `checked=True`. Where nothing stands
  (an empty cell, null), the text is empty: `note=` takes those rows, `note!=` the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from icl_compiler.errors import ColumnError, DataError
from icl_compiler.table import Table, listed


class Condition(NamedTuple):
    """A column, the value that stands there, and whether it does or does not."""

    column: str
    value: str
    equal: bool

    @classmethod
    def parse(cls, given: str) -> "Condition":
        """A condition as it is typed.

        Raises:
            DataError: if it holds no `=`, or no column before it.

        >>> Condition.parse("lang!=de")
        Condition(column='lang', value='de', equal=False)
        """
        column, equals, value = given.partition("=")
        different = column.endswith("!")
        column = column.removesuffix("!").strip()
        if not equals or not column:
            raise DataError(f"{given!r} is no condition on rows; expected COLUMN=VALUE or COLUMN!=VALUE, as in lang=de")
        return cls(column, value.strip(), not different)


def rows_where(table: Table, conditions: Sequence[str], *, name: str) -> list[int]:
    """The indices of the rows that fulfil all `conditions`.

    Raises:
        DataError: if a condition is none, or no row fulfils them.
        ColumnError: if there is no such column.
    """
    rows = list(range(len(table.rows)))
    for condition in map(Condition.parse, conditions):
        if condition.column not in table.names:
            raise ColumnError(f"{name} has no column {condition.column!r}; it has {listed(table.names)} (--where)")
        values = table.column(condition.column)
        texts = ["" if value is None else str(value).strip() for value in values]
        rows = [row for row in rows if (texts[row] == condition.value) == condition.equal]
        if not rows:
            seen = listed(list(dict.fromkeys(texts)))
            raise DataError(
                f"no row of {name} is left where {' and '.join(conditions)}; {condition.column!r} holds {seen}"
            )
    return rows
