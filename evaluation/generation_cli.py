"""What `icl evaluate` does with a program that generates texts."""

from collections.abc import Callable, Collection, Sequence

from evaluation.evaluate import Evaluation, ProgressFor
from evaluation.generation import ask_for_texts, evaluate_texts
from evaluation.reference.trainer import Reference
from evaluation.texts import Lengths
from icl_compiler.backends.backend import Backend
from icl_compiler.compile import with_pool
from icl_compiler.data import Dataset
from icl_compiler.program import Program


def measure_texts(
    program: Program,
    open_engine: Callable[[], Backend],
    references: Sequence[Reference],
    data: Dataset,
    sizes: Sequence[int],
    *,
    lengths: Lengths,
    dataset_name: str,
    level: float,
    series: Collection[str],
    dtype: str,
    seed: int,
    progress: ProgressFor,
) -> list[Evaluation]:
    """Evaluate the program with pools of several sizes; all baselines with the largest, the vote with every one."""
    answers = ask_for_texts(references, data, lengths, seed=seed, dtype=dtype, progress=progress)
    engine = open_engine()
    results = []
    for size in sizes:
        cut = program
        if size < len(program.pool.data):
            cut = with_pool(program, program.pool.data.subset(size, seed=program.settings.seed))
        results.append(
            evaluate_texts(
                cut,
                engine,
                answers,
                data,
                lengths,
                dataset_name=dataset_name,
                seed=seed,
                level=level,
                series=series if size == max(sizes) else [name for name in series if name == "neighbours' vote"],
                progress=progress,
            )
        )
    return results
