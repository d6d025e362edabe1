"""What `icl evaluate` does with a program that generates texts."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache

from evaluation.asking import write_until_decided
from evaluation.evaluate import Evaluation, ProgressFor, with_examples, without_test_rows
from evaluation.generation import ask_for_texts, evaluate_texts
from evaluation.reference.trainer import Reference
from evaluation.texts import Lengths, Written, write
from icl_compiler.backends.backend import Backend
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
    epsilon: float | None,
    dataset_name: str,
    level: float,
    series: Collection[str],
    dtype: str,
    seed: int,
    progress: ProgressFor,
) -> Iterator[Evaluation]:
    """Evaluate the program with pools of several sizes; all baselines with the largest, the vote with every one.

    With `epsilon`, each size is asked about the first rows of `data`, which are in random order, until it is decided.
    """
    answers = None
    if epsilon is None:
        answers = ask_for_texts(references, data, lengths, seed=seed, dtype=dtype, progress=progress)
    engine = open_engine()
    writer = None if answers else references[0].writer(dtype=dtype)

    @cache
    def written(texts: tuple[str, ...], seed: int) -> Written:
        assert writer is not None
        return write(writer, texts, lengths, seed=seed)

    for size in sizes:
        largest = size == max(sizes)
        cut, warnings = without_test_rows(with_examples(program, size), data)
        asked, compared = None, answers
        if epsilon is not None:
            asked = write_until_decided(
                cut,
                engine,
                written,
                data,
                lengths,
                epsilon=epsilon,
                seed=seed,
                level=level,
                progress=progress(f"at most {len(data):,} queries", len(data)),
            )
            of_size = references if largest else references[:1]
            compared = ask_for_texts(
                of_size, asked.data, lengths, seed=seed, dtype=dtype, asked=asked, progress=progress
            )
        assert compared is not None
        found = evaluate_texts(
            cut,
            engine,
            compared,
            data if asked is None else asked.data,
            lengths,
            dataset_name=dataset_name,
            seed=seed,
            level=level,
            series=series if largest else [name for name in series if name == "neighbours' vote"],
            asked=asked,
            progress=progress,
        )
        yield found._replace(warnings=[*warnings, *found.warnings])
