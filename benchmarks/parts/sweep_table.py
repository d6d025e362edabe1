"""The tables of `docs/results.md` about a sweep, from its rows, in Markdown.

    python -m benchmarks.parts.sweep_table [ROWS]

First gap and accuracy of each series by number of examples, each the mean over the seeds that were measured; then what
more examples, and more context, change in the gap, query by query, over the seeds that both have.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.parts.kept import rows_of
from evaluation.comparison import difference_of_gaps
from evaluation.formatting import brackets, with_interval
from evaluation.measurement import Measurement
from evaluation.seeds import mean_over_seeds

ROWS = Path(__file__).parents[1] / "rows" / "sweep_five.jsonl"
NAMES = {
    "program": "prompt, {:,} tokens",
    "random shots": "random shots, {:,} tokens",
    "neighbours' vote": "neighbours' vote, no model",
    "zero shots": "no shots",
    "floor": "floor: another fine-tuning",
}


def tables(rows: list[Measurement]) -> str:
    """Both tables, of all datasets in the order of the rows."""
    lines: list[str] = []
    changes = ["| | in place of | the gap changes by |", "|---|---|---|"]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_data = [row for row in rows if row.dataset == dataset]
        sizes = sorted({row.n_examples for row in of_data if row.series == "program" and row.n_examples})
        heads = [f"{size:,}" for size in sizes]
        if not lines:
            shown = " | ".join([*heads[:-1], "all"])
            lines = [f"| | | {shown} | accuracy | reference |", "|" + "---|" * (len(heads) + 4)]
        right = {row.reference: row.reference_accuracy for row in of_data if row.reference_accuracy is not None}
        reference = float(np.mean(list(right.values())))
        for series, words in NAMES.items():
            for budget in sorted({row.max_prompt_tokens or 0 for row in of_data if row.series == series}):
                line = [row for row in of_data if row.series == series and (row.max_prompt_tokens or 0) == budget]
                by_size = {n: _mean([row for row in line if row.n_examples == n]) for n in [None, *sizes]}
                found = [by_size[n] for n in sizes] if by_size[None] is None else [by_size[None]]
                gaps = [with_interval(x.gap, x.gap_low, x.gap_high) if x else "" for x in found]
                gaps += [""] * (len(sizes) - len(gaps))
                shown = ", ".join(f"{row.accuracy:.2f}" for row in found if row and row.accuracy is not None)
                cells = [dataset or "", words.format(budget), *gaps, shown, f"{reference:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
        changes += _changes(dataset or "", [row for row in of_data if row.series == "program"], sizes)
    return "\n".join([*lines, "", *changes])


def _mean(rows: Sequence[Measurement]) -> Measurement | None:
    """The mean over seeds, of one or more; `None` of no row."""
    return (rows[0] if len(rows) == 1 else mean_over_seeds(rows)) if rows else None


def _changes(dataset: str, programs: list[Measurement], sizes: list[int]) -> list[str]:
    """What the most examples change, at each budget, and the largest budget, with the most examples."""
    cells: dict[tuple[int | None, int | None], dict[int | None, Measurement]] = {}
    for row in programs:
        cells.setdefault((row.n_examples, row.max_prompt_tokens), {})[row.seed] = row
    budgets = sorted({row.max_prompt_tokens for row in programs if row.max_prompt_tokens})
    pairs = [((sizes[0], budget), (sizes[-1], budget)) for budget in budgets]
    pairs += [((sizes[-1], budgets[0]), (sizes[-1], budget)) for budget in budgets[1:]]
    found = []
    for before, after in pairs:
        both = sorted(cells.get(before, {}).keys() & cells.get(after, {}).keys(), key=str)
        first, second = (_mean([cells[place][seed] for seed in both]) if both else None for place in (before, after))
        if first and second and (change := difference_of_gaps(first, second)):
            told = f"{change.difference:+.2f} {brackets(change.low, change.high)}"
            names = ["{:,} examples, {:,} tokens".format(*place) for place in (after, before)]
            found.append(f"| {dataset}: {names[0]} | {names[1]} | {told} |")
    return found


if __name__ == "__main__":
    given = rows_of(Path(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
    print(tables([Measurement.from_row(row, number) for number, row in enumerate(given, start=1)]))
