"""What `icl evaluate --epsilon` does: ask in turn until decided, then measure the baselines on what was asked."""

from collections.abc import Collection, Sequence

from evaluation.asking import ask_until_decided
from evaluation.evaluate import (
    Evaluation,
    ProgressFor,
    ask_references,
    evaluate,
    require_comparable_references,
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
    *,
    epsilon: float,
    dataset_name: str,
    level: float,
    series: Collection[str],
    dtype: str,
    progress: ProgressFor,
) -> Evaluation:
    """The evaluation on the first rows of `data`, which are in random order: as many as it takes to decide.

    Raises:
        EvaluationError: if the references cannot be compared with each other, or with the program.
    """
    require_comparable_references(references)
    program, warnings = without_test_rows(program, data)
    asked = ask_until_decided(
        program,
        engine,
        references[0].predictor(dtype=dtype),
        data,
        epsilon=epsilon,
        level=level,
        progress=progress(f"at most {len(data):,} queries", len(data)),
    )
    found = evaluate(
        program,
        engine,
        ask_references(references, asked.data, dtype=dtype, asked=asked, progress=progress),
        asked.data,
        dataset_name=dataset_name,
        level=level,
        series=series,
        asked=asked,
        float32_backend=float32_opener(engine, program.settings.model),
        progress=progress,
    )
    return found._replace(warnings=[*warnings, *found.warnings])
