"""Numbers and names as text, the same in sentences, tables and plots.

A value that was not measured is called so. Intervals are rounded outwards: the text never says less than was
covered.
"""

import math
from collections.abc import Iterable, Sequence

from evaluation.measurement import Measurement

NOT_MEASURED = "not measured"


def share(value: float | int | None, digits: int = 2) -> str:
    """A proportion; three digits where it is below 0.0095.

    >>> share(0.5), share(0.004), share(None)
    ('0.50', '0.004', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:.{digits if value >= 0.0095 or value == 0 else 3}f}"


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """A proportion and its interval, with a digit more where two would hide the interval.

    >>> with_interval(0.21, 0.18, 0.25), with_interval(0.212, 0.209, 0.214), with_interval(0.21, None, None)
    ('0.21 [0.18, 0.25]', '0.212 [0.209, 0.214]', '0.21')
    """
    if low is not None and high is not None and high - low < 0.02:
        digits = max(digits, 3)
    return f"{share(value, digits)} {brackets(low, high, digits)}".rstrip()


def brackets(low: float | None, high: float | None, digits: int = 2) -> str:
    """The interval, rounded outwards. Empty if not measured.

    >>> brackets(0.189, 0.241), brackets(None, None)
    ('[0.18, 0.25]', '')
    """
    if low is None or high is None:
        return ""
    unit = 10**digits
    low, high = math.floor(low * unit + 1e-6) / unit, math.ceil(high * unit - 1e-6) / unit
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def amount(value: float | int | None) -> str:
    """A count or a time: whole above 100, three digits that matter below.

    >>> amount(1024), amount(731.4), amount(0.5134), amount(None)
    ('1,024', '731', '0.513', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def counted(count: int, one: str, more: str | None = None) -> str:
    """A count with its noun; `more` is the plural that is not made by an s.

    >>> counted(1, "example"), counted(1200, "example"), counted(2, "query", "queries")
    ('1 example', '1,200 examples', '2 queries')
    """
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def levels_in_words(rows: Iterable[Measurement]) -> str:
    """The confidence levels of the rows, to stand before "intervals".

    >>> levels_in_words([Measurement("program", level=0.95), Measurement("floor", level=0.9)])
    '90 % and 95 %'
    """
    levels = sorted({row.level for row in rows if row.level is not None})
    return joined([f"{100 * level:g} %" for level in levels]) if levels else "the"


def joined(parts: Sequence[str]) -> str:
    """A list in words.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def one_line(text: str) -> str:
    """Without line breaks and terminal escapes, which a name read from a file may hold.

    >>> one_line("two\\nlines")
    'two?lines'
    """
    return "".join(character if character.isprintable() else "?" for character in text)
