"""Rows of measurements as a table for other programs: Markdown, CSV, or JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from evaluation.formatting import one_line
from evaluation.measurement import Row, measurements

Kind = Literal["md", "csv", "json"]
# What a table is read for, in this order; of these, those that any row has.
COLUMNS = (
    "dataset", "series", "noise_against", "n_examples", "max_prompt_tokens", "optimisation", "shots", "retriever",
    "calibration",
    "calibrated_by", "seed", "reference",
    "gap", "gap_low", "gap_high", "gap_truncation", "level", "n_queries", "accuracy", "accuracy_low", "accuracy_high",
    "reference_accuracy", "agreement", "ece", "label_mass", "shots_per_query", "prompt_tokens_per_query",
    "computed_tokens_per_query", "seconds_per_query", "seconds_model", "seconds_prompts", "seconds_evaluator",
    "reference_examples", "reference_seconds", "neighbours", "vote_sharpness",
    "found", "search_prompts", "seconds_search", "model", "n_labels",
    "data_sha256", "machine", "commit", "version",
    "key",
)  # fmt: skip
PER_QUERY = ("gaps", "correct", "reference_correct", "reliability")
"""Lists, most with one entry a query: in JSON only."""
_IN_MARKDOWN = COLUMNS[:28]


def as_table(rows: Sequence[Row], kind: Kind) -> str:
    """The rows as text: a Markdown table of what is read most, CSV of all columns, or JSON of everything.

    Raises:
        EvaluationError: if there are no rows, or a row is not usable.

    >>> print(as_table([{"series": "program", "n_examples": 16, "gap": 0.25}], "md"))
    | series | n_examples | gap |
    |---|---|---|
    | program | 16 | 0.250 |
    """
    measurements(rows)
    if kind == "json":
        return json.dumps(list(rows), ensure_ascii=False, indent=2)
    others = sorted({key for row in rows for key in row} - {*COLUMNS, *PER_QUERY})
    names = [*_IN_MARKDOWN] if kind == "md" else [*COLUMNS, *others]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_exact(row, name) for name in names] for row in rows)
        return text.getvalue().rstrip("\n")
    cells = [names, *([_shown(row, name) for name in names] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])


def _exact(row: Mapping[str, object], name: str) -> object:
    value = row.get(name)
    return "" if value is None else value


def _shown(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return "" if value is None else one_line(str(value)).replace("|", "\\|")
