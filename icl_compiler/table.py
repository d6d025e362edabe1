"""The columns of a file, before any of them is chosen, and words for what stands in them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


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


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def or_none(value: object) -> object:
    """`None` for NaN, which is how columns of numbers say that nothing stands there."""
    return None if isinstance(value, float) and math.isnan(value) else value
