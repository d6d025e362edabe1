"""Two measurements query by query: which program is closer to its reference, and is that more than chance?

- Queries are paired by their text; what only one of the two was asked does not count. Hard queries are hard for both,
  so that the difference of two gaps is known much better than either.
- Differences of gaps and of accuracies lie in [-1, 1]: their intervals and p-values are by betting, valid at every
  number of queries drawn independently. Those of the log-loss, which has no bound, are Student's: approximate.
- Where one of the two asked until a decision, the number of queries was chosen by what they showed: then all is by the
  confidence sequence, in the order asked, and the log-loss is left out.
- Rows of one sweep or evaluation that hold the gap of each query are compared likewise (`difference_of_gaps`).
- One p-value is about one comparison settled on beforehand: of many comparisons some are below 0.05 by chance.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import ttest_rel

from evaluation.formatting import counted
from evaluation.intervals import betting, betting_p_value, confidence_sequence
from evaluation.measurement import Measurement
from icl_compiler.errors import EvaluationError

Line = Mapping[str, object]
# What is compared: the list of a line, its name, and whether it lies in [0, 1].
MEASURES = {"gaps": ("gap", True), "correct": ("accuracy", True), "losses": ("log-loss", False)}


class Difference(NamedTuple):
    """Means of a measure on the same queries, and that of the second less that of the first.

    Attributes:
        low, high: the interval of the difference.
        p_value: of the two being equal.
        exact: whether both hold at every number of queries, or for many only.
    """

    measure: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    exact: bool


class Comparison(NamedTuple):
    """What two lines say of the queries that are in both.

    Attributes:
        queries: how many are in both, in the first, and in the second.
        sentences: the verdict, then what has to be known beside it.
    """

    queries: tuple[int, int, int]
    level: float
    differences: list[Difference]
    sentences: list[str]


def compare_lines(first: Line, second: Line, *, level: float = 0.95) -> Comparison:
    """Compare two lines that `icl evaluate --per-query` wrote; see the module.

    Raises:
        EvaluationError: fewer than two queries in both; lines without texts; asked until a decision in other orders;
            `level` outside (0, 1).

    >>> texts = [f"query {i}" for i in range(200)]
    >>> worse, better = ({"series": "program", "texts": texts, "gaps": [gap, 0.4] * 100} for gap in (0.3, 0.2))
    >>> compare_lines(worse, better).sentences[0]
    'B is closer: its gap is smaller by 0.050 [0.024, 0.075].'
    """
    pairs = _pairs(_texts(first), _texts(second))
    sizes = (len(pairs), len(_texts(first)), len(_texts(second)))
    if len(pairs) < 2:
        raise EvaluationError(
            f"{counted(len(pairs), 'query is', 'queries are')} in both, of {sizes[1]:,} and {sizes[2]:,}, and a "
            "comparison needs two: measure both programs on the same test data (--queries and --seed alike)"
        )
    stopped = any(line.get("queries_max") is not None for line in (first, second))
    if stopped and [place for _, place in pairs] != sorted(place for _, place in pairs):
        raise EvaluationError(
            "the queries were asked until a decision, in another order in each file, so that no interval holds for "
            "those in both; measure both with the same --seed"
        )
    found = []
    for name, (measure, bounded) in MEASURES.items():
        if first.get(name) is None or second.get(name) is None or (stopped and not bounded):
            continue
        a, b = (_numbers(line, name)[[pair[side] for pair in pairs]] for side, line in enumerate((first, second)))
        if bounded and not stopped:  # files are often sorted by label
            order = np.random.default_rng(0).permutation(len(pairs))
            a, b = a[order], b[order]
        found.append((bounded_difference if bounded else unbounded_difference)(measure, a, b, level, anytime=stopped))
    return Comparison(sizes, level, found, [_verdict(found[0]), *_remarks(first, second, stopped)])


def bounded_difference(
    measure: str, a: Float[np.ndarray, " queries"], b: Float[np.ndarray, " queries"], level: float, *, anytime: bool
) -> Difference:
    """Of a measure in [0, 1] on the same queries, in random order.

    >>> found = bounded_difference("gap", np.zeros(100), np.full(100, 0.1), 0.95, anytime=False)
    >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3)
    (0.1, 0.047, 0.144)
    """
    values = (b - a + 1) / 2
    if anytime:
        sequence = confidence_sequence(values, delta=1 - level)
        low, high = float(sequence.lows[-1]), float(sequence.highs[-1])
    else:
        low, high = betting(values, delta=1 - level)
    p_value = betting_p_value(values, mean=0.5, delta=1 - level, anytime=anytime)
    means = float(a.mean()), float(b.mean())
    return Difference(measure, *means, means[1] - means[0], 2 * low - 1, 2 * high - 1, p_value, exact=True)


def difference_of_gaps(first: Measurement, second: Measurement) -> Difference | None:
    """The gap of the second row less that of the first; `None` if they do not say the gaps of the same queries.

    >>> prompt, floor = (Measurement("program", gap=gap, gaps=(gap, 0.4) * 100, level=0.95) for gap in (0.3, 0.2))
    >>> found = difference_of_gaps(prompt, floor)
    >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3)
    (-0.05, -0.075, -0.024)
    """
    a, b = first.gaps, second.gaps
    alike = ("dataset", "data_sha256", "level")
    if not a or not b or len(a) != len(b) or any(getattr(first, x) != getattr(second, x) for x in alike):
        return None
    anytime = first.queries_max is not None
    if first.level is None or first.gap_truncation or second.gap_truncation or anytime != bool(second.queries_max):
        return None
    order = np.arange(len(a)) if anytime else np.random.default_rng(0).permutation(len(a))
    return bounded_difference("gap", np.array(a)[order], np.array(b)[order], first.level, anytime=anytime)


def unbounded_difference(
    measure: str, a: Float[np.ndarray, " queries"], b: Float[np.ndarray, " queries"], level: float, *, anytime: bool
) -> Difference:
    """Of any measure on the same queries: Student's paired test, for a fixed number of many queries."""
    assert not anytime
    means = float(a.mean()), float(b.mean())
    if np.ptp(b - a) == 0:
        low = high = means[1] - means[0]
        p_value = 1.0 if low == 0 else 0.0
    else:
        test = ttest_rel(b, a)
        (low, high), p_value = map(float, test.confidence_interval(level)), float(test.pvalue)
    return Difference(measure, *means, means[1] - means[0], low, high, p_value, exact=False)


def choose_line(lines: Sequence[Line], series: str, n: int | None, where: str) -> Line:
    """The one line of a series, with so many examples if that is said.

    Raises:
        EvaluationError: if there is none, or there are several.
    """
    of_series = [line for line in lines if line.get("series") == series]
    found = [line for line in of_series if n is None or line.get("n_examples") == n]
    if len(found) == 1:
        return found[0]
    if found and n is None and len({line.get("n_examples") for line in found}) == len(found):
        sizes = ", ".join(str(line.get("n_examples")) for line in found)
        raise EvaluationError(f"{where} has {series} with {sizes} examples; choose one of these (--examples N)")
    if found:
        raise EvaluationError(
            f"{where} has {len(found)} lines of {series} with the same number of examples; an evaluation that is "
            "repeated wants a new file (icl evaluate --per-query)"
        )
    there = ", ".join(dict.fromkeys(str(line.get("series")) for line in lines))
    sized = f" with {counted(n, 'example')}" if of_series and n is not None else ""
    raise EvaluationError(f"{where} has no line of {series}{sized}; there are {there or 'none'}")


def _texts(line: Line) -> list[str]:
    texts = line.get("texts")
    if not isinstance(texts, list):
        raise EvaluationError(
            f"the line of {line.get('series')} has no texts, by which queries are paired; `icl evaluate --per-query` "
            "of this version writes them: measure again"
        )
    return texts


def _pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the same text, in the order of the first; a text that stands several times is paired as often."""
    places = {text: place for place, text in enumerate(_told_apart(second))}
    return [(here, places[text]) for here, text in enumerate(_told_apart(first)) if text in places]


def _told_apart(texts: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for text in texts:
        found.append((text, seen[text]))
        seen[text] += 1
    return found


def _numbers(line: Line, name: str) -> Float[np.ndarray, " queries"]:
    try:
        values = np.array(line[name], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (len(_texts(line)),) or not np.isfinite(values).all():
        raise EvaluationError(
            f"the line of {line.get('series')} should have a number in `{name}` for each of its texts"
        )
    return values


def _verdict(gap: Difference) -> str:
    if gap.high < 0:
        return f"B is closer: its gap is smaller by {_size(-gap.difference, -gap.high, -gap.low)}."
    if gap.low > 0:
        return f"A is closer: the gap of B is larger by {_size(gap.difference, gap.low, gap.high)}."
    most = max(-gap.low, gap.high)
    return (
        f"Undecided: the gap of B less that of A is {_size(gap.difference, gap.low, gap.high)}; that they differ by "
        f"more than {most:.3f} is excluded."
    )


def _size(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _remarks(first: Line, second: Line, stopped: bool) -> list[str]:
    said = []
    for field, words in (("reference", "references"), ("dataset", "datasets"), ("n_examples", "numbers of examples")):
        if first.get(field) != second.get(field):
            said.append(f"They are of other {words}: A {first.get(field)}, B {second.get(field)}.")
    for name, line in (("A", first), ("B", second)):
        if line.get("gap_truncation"):
            apart = float(str(line["gap_truncation"]))
            said.append(
                f"The gaps of {name} are midpoints of bounds that are {apart:.3f} apart on average, which the interval "
                "does not cover."
            )
    if stopped:
        said.append("Queries were asked until a decision: the intervals hold whenever one stops.")
    return said
