"""What `icl evaluate --epsilon` does: ask in turn until decided, then measure the baselines on what was asked."""

from collections.abc import Collection, Iterator, Sequence

from evaluation.asking import Remembering, ask_until_decided
from evaluation.evaluate import (
    Evaluation,
    ProgressFor,
    ask_references,
    evaluate,
    require_comparable_references,
    with_examples,
    without_test_rows,
)
from evaluation.float32 import float32_opener
from evaluation.reference.trainer import Reference
from icl_compiler.backends.backend import Backend
from icl_compiler.data import Dataset
from icl_compiler.program import Program


def measure_until_decided(
    program: Program,
    engine: Backend,
    references: Sequence[Reference],
    data: Dataset,
    sizes: Sequence[int],
    *,
    epsilon: float,
    dataset_name: str,
    level: float,
    series: Collection[str],
    dtype: str,
    progress: ProgressFor,
) -> Iterator[Evaluation]:
    """Evaluate the program with pools of several sizes, each on the first rows of `data`, which are in random order.

    Each size asks as many as it takes to decide about it. All baselines with the largest, the vote with every one.

    Raises:
        EvaluationError: if the references cannot be compared with each other, or with the program.
    """
    require_comparable_references(references)
    first = Remembering(references[0].predictor(dtype=dtype))
    for size in sizes:
        largest = size == max(sizes)
        cut, warnings = without_test_rows(with_examples(program, size), data)
        asked = ask_until_decided(
            cut,
            engine,
            first,
            data,
            epsilon=epsilon,
            level=level,
            progress=progress(f"at most {len(data):,} queries", len(data)),
        )
        compared = references if largest else references[:1]
        found = evaluate(
            cut,
            engine,
            ask_references(compared, asked.data, dtype=dtype, asked=asked, progress=progress),
            asked.data,
            dataset_name=dataset_name,
            level=level,
            series=series if largest else [name for name in series if name == "neighbours' vote"],
            asked=asked,
            float32_backend=float32_opener(engine, program.settings.model),
            progress=progress,
        )
        yield found._replace(warnings=[*warnings, *found.warnings])
