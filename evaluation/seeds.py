"""Rows of several seeds as rows of their mean.

A seed draws the examples, and trains the reference that the prompt is compared with. Where the rows of several seeds
hold the gap of each query (`icl sweep` writes them), and all asked the same queries, the mean of a query's gaps over
the seeds is again a number in [0, 1], and independent between queries: the interval of `betting` holds for the mean gap
over these seeds. It says nothing about seeds that were not measured; the spread of two or three would hardly tell.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np

from evaluation.formatting import counted
from evaluation.intervals import betting
from evaluation.measurement import Measurement

# What is averaged beside the gap; all else stays as the first seed has it, or is left out.
_MEANS = (
    "accuracy", "reference_accuracy", "agreement", "ece", "label_mass", "shots_per_query", "prompt_tokens_per_query",
    "output_tokens_per_query", "computed_tokens_per_query", "seconds_per_query",
)  # fmt: skip


class Pooled(NamedTuple):
    """Rows of the mean over `seeds`, made of `lines`: of one program, and of what stands beside it."""

    seeds: tuple[int, ...]
    lines: Sequence[Sequence[Measurement]]
    line: list[Measurement]
    beside: list[Measurement]


def without_seed(reference: str | None) -> str:
    """What a row calls its reference, without its seed.

    >>> without_seed("RSR, 2.00% of the parameters, seed 1, 922 examples")
    'RSR, 2.00% of the parameters, 922 examples'
    """
    return re.sub(r", seed \d+", "", reference or "")


def pooled(lines: Sequence[Sequence[Measurement]], rows: Sequence[Measurement]) -> Pooled | None:
    """One program's rows of the mean over seeds; `None` where they cannot be taken together.

    Args:
        lines: its rows, one line for each seed, which differ in nothing else.
        rows: all rows; of these, baselines of the same seeds are pooled too.

    >>> lines = [[Measurement("program", n_examples=16, gap=gap, level=0.95, n_queries=4, seed=seed,
    ...                       gaps=(gap, gap, 0.0, 2 * gap))] for seed, gap in ((0, 0.2), (1, 0.4))]
    >>> row = pooled(lines, []).line[0]
    >>> round(row.gap, 3), row.seed, [round(gap, 3) for gap in row.gaps]
    (0.3, None, [0.3, 0.3, 0.0, 0.6])
    """
    lines = [list(dict.fromkeys(line)) for line in lines]
    by_seed = {line[0].seed: line for line in lines}
    seeds = [seed for seed in by_seed if seed is not None]
    sizes = [{row.n_examples for row in line} for line in by_seed.values()]
    if not len(seeds) == len(lines) > 1 or any(each != sizes[0] for each in sizes[1:]):
        return None
    line = _means([row for each in lines for row in each], tuple(seeds))
    if line is None or len(line) != len(sizes[0]):
        return None
    head, beside = lines[0][0], []
    for series in dict.fromkeys(row.series for row in rows if row.series != "program"):
        alike = [row for row in dict.fromkeys(rows) if row.series == series and _same_queries(row, head)]
        beside += _means(alike, tuple(seeds)) or []
    return Pooled(tuple(sorted(seeds)), lines, line, beside)


def _same_queries(row: Measurement, head: Measurement) -> bool:
    alike = ("dataset", "data_sha256", "level", "model")
    same = all(getattr(row, field) == getattr(head, field) for field in alike)
    return same and without_seed(row.reference) == without_seed(head.reference)


def _means(rows: Sequence[Measurement], seeds: tuple[int, ...]) -> list[Measurement] | None:
    """The means of rows that differ in their seed only; of those that every seed has once."""
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.n_examples, row.max_prompt_tokens, row.shots, row.retriever), []).append(row)
    found = []
    for group in groups.values():
        if sorted(row.seed for row in group if row.seed is not None) == sorted(seeds):
            mean = mean_over_seeds(group)
            if mean is None:
                return None
            found.append(mean)
    return found


def mean_over_seeds(rows: Sequence[Measurement]) -> Measurement | None:
    """The row of the mean over rows that differ in their seed only; `None` where they do not say each query's gap.

    >>> seeds = ((0, 0.2), (1, 0.4))
    >>> mean = mean_over_seeds([Measurement("floor", gap=g, level=0.95, gaps=(g, 0.0), seed=s) for s, g in seeds])
    >>> round(mean.gap, 3), [round(gap, 3) for gap in mean.gaps]
    (0.15, [0.3, 0.0])
    """
    first, each = rows[0], [row.gaps for row in rows]
    if any(gaps is None or not gaps for gaps in each) or len({len(gaps or ()) for gaps in each}) > 1:
        return None
    if any(row.gap_truncation or row.queries_max or row.level is None or row.level != first.level for row in rows):
        return None  # their intervals hold more than which queries were drawn
    gaps = np.array(each, dtype=np.float64).mean(axis=0)
    low, high = betting(gaps[np.random.default_rng(0).permutation(len(gaps))], delta=1 - cast(float, first.level))
    means: dict[str, float | None] = {}
    for name in _MEANS:
        numbers = [getattr(row, name) for row in rows]
        means[name] = None if None in numbers else float(np.mean(numbers))
    return replace(
        first,
        gap=float(gaps.mean()),
        gap_low=low,
        gap_high=high,
        gaps=tuple(gaps.tolist()),
        accuracy_low=None,
        accuracy_high=None,
        seed=None,
        reference=f"{without_seed(first.reference)}, mean of {counted(len(rows), 'seed')}",
        **means,  # type: ignore[arg-type]  # all are floats or None
    )
