"""Rows of measurements as a table for the terminal."""

from collections.abc import Callable, Sequence

from evaluation.formatting import NOT_MEASURED, amount, one_line, share, with_interval
from evaluation.measurement import Measurement, Row, measurements


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """The rows as a table for the terminal, aligned, one line each under a line of headings.

    Columns for dataset, budget, level and retriever appear where they vary. A dash means not measured.

    Raises:
        EvaluationError: if there are no rows, or a row is not usable.

    >>> row = {"series": "program", "n_examples": 512, "gap": 0.21, "gap_low": 0.18, "gap_high": 0.25,
    ...        "accuracy": 0.83, "seconds_per_query": 0.5}
    >>> print("\\n".join(summary_lines([row])))
    series     n  gap                   accuracy  agreement  ECE  tokens/query  s/query
    program  512  0.210 [0.180, 0.250]     0.830          -    -             -      0.5
    (- not measured)
    """
    measured = measurements(rows)
    columns: list[tuple[str, bool, Callable[[Measurement], str]]] = [
        ("series", False, lambda row: row.title),
        ("n", True, lambda row: amount(row.n_examples)),
        ("gap", False, lambda row: with_interval(row.gap, row.gap_low, row.gap_high, 3)),
        ("accuracy", True, lambda row: share(row.accuracy, 3)),
        ("agreement", True, lambda row: share(row.agreement, 3)),
        ("ECE", True, lambda row: share(row.ece, 3)),
        ("tokens/query", True, lambda row: amount(row.prompt_tokens_per_query)),
        ("s/query", True, lambda row: amount(row.seconds_per_query)),
    ]
    if any(row.token_gap is not None for row in measured):
        token = ("token gap", False, lambda row: with_interval(row.token_gap, row.token_gap_low, row.token_gap_high, 3))
        columns.insert(3, token)
    if len({row.retriever for row in measured if row.series == "program"}) > 1:
        columns.insert(1, ("retriever", False, lambda row: row.retriever or NOT_MEASURED))
    if len({row.optimisation for row in measured if row.series == "program"}) > 1:
        columns.insert(1, ("level", False, lambda row: row.optimisation or NOT_MEASURED))
    if len({row.max_prompt_tokens for row in measured if row.series == "program"}) > 1:
        columns.insert(1, ("budget", True, lambda row: amount(row.max_prompt_tokens)))
    if len({row.dataset for row in measured}) > 1:
        columns.insert(0, ("dataset", False, lambda row: row.dataset or NOT_MEASURED))
    cells = [[name for name, _, _ in columns]]
    cells += [[one_line(text(row)).replace(NOT_MEASURED, "-") for _, _, text in columns] for row in measured]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, (_, right, _) in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    return lines + ["(- not measured)"] * any("-" in line for line in cells[1:])
