"""Ask a program and its reference query after query, until it is decided whether the gap is within epsilon.

- Queries are drawn in random order by a seed, and the first 100 of 200 are the 100 that the same seed draws alone:
  whoever comes back with a larger --queries goes on in the same order.
- Both models stand in memory at once, since each batch goes to both.
- Programs with pools of several sizes ask the same queries in the same batches: the reference answers each once.
- Of programs that write, each batch has seeds of its own: queries must not share what is drawn at random.
- The baselines are measured afterwards, on the queries that were asked, with confidence sequences too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.gap import distances
from evaluation.sequential import Stopped, until_decided
from evaluation.texts import Lengths, Ratios, Written, ratios_of, write
from evaluation.tv import Sandwich
from icl_compiler.backends.backend import Backend, Progress
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError
from icl_compiler.predictor import Predictions, Predictor, PromptedPredictor, joined
from icl_compiler.program import Program

BATCH = 16
"""Queries between two looks: few, as the rest of a batch is asked for nothing; a server still has its hands full."""


@dataclass(frozen=True)
class Asked:
    """What was asked and answered until the decision.

    Attributes:
        data: the rows asked, in the order of asking.
        drawn: all rows that might have been asked.
    """

    data: Dataset
    drawn: Dataset
    said: Predictions
    reference: Predictions
    stopped: Stopped
    epsilon: float


@dataclass(frozen=True)
class AskedTexts:
    """What two models wrote until the decision; `ratios` are those of the program and the reference, in this order."""

    data: Dataset
    drawn: Dataset
    ours: Written
    reference: Written
    ratios: Ratios
    stopped: Stopped
    epsilon: float


class Remembering:
    """A predictor that answers the same texts once, however often it is asked about them."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._said: dict[tuple[str, ...], Predictions] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of the predictor."""
        return self._predictor.labels

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """The law of the answer to each text."""
        if tuple(texts) not in self._said:
            self._said[tuple(texts)] = self._predictor.predict(texts, progress=progress)
        return self._said[tuple(texts)]


Writer = Callable[[Sequence[str], int], Written]
"""Writes answers to texts; the number is a seed."""


def in_random_order(data: Dataset, queries: int | None, *, seed: int) -> Dataset:
    """`queries` rows of `data`, all by default, in random order.

    Raises:
        DataError: if there are fewer rows.

    >>> data = Dataset(tuple("abcdef"), ("x", "y") * 3, "classification", "example")
    >>> in_random_order(data, 2, seed=0).texts == in_random_order(data, None, seed=0).texts[:2]
    True
    """
    most = len(data) if queries is None else queries
    if most > len(data):
        raise DataError(f"--queries {most} exceeds the {len(data):,} rows of the test data")
    return data.take(np.random.default_rng(seed).permutation(len(data))[:most].tolist())


def ask_until_decided(
    program: Program,
    backend: Backend,
    reference: Predictor,
    data: Dataset,
    *,
    epsilon: float,
    level: float = 0.95,
    progress: Progress | None = None,
) -> Asked:
    """Ask the rows of `data`, which are in random order, from the first on, until the gap is decided.

    The program must not hold rows of `data` (`compile.without_rows`): it is the same one for every query.

    Raises:
        EvaluationError: if program and reference have other labels; `epsilon` or `level` outside (0, 1).
    """
    prompted = PromptedPredictor(program, backend)
    said: list[Predictions] = []
    answers: list[Predictions] = []

    def batches() -> Iterator[Sandwich]:
        for first in range(0, len(data), BATCH):
            texts = data.texts[first : first + BATCH]
            said.append(prompted.predict(texts, progress=progress))
            answers.append(reference.predict(texts))
            yield distances(said[-1], answers[-1])

    stopped = until_decided(batches(), epsilon=epsilon, level=level)
    asked = data.take(range(stopped.queries))
    return Asked(asked, data, joined(said), joined(answers), stopped, epsilon)


def write_until_decided(
    program: Program,
    backend: Backend,
    reference: Writer,
    data: Dataset,
    lengths: Lengths,
    *,
    epsilon: float,
    seed: int,
    level: float = 0.95,
    progress: Progress | None = None,
) -> AskedTexts:
    """As `ask_until_decided`, of a program that writes.

    Args:
        reference: is asked with seeds that are made from `seed`, the program with others.

    Raises:
        EvaluationError: `epsilon` or `level` outside (0, 1).
    """
    ours: list[Written] = []
    theirs: list[Written] = []
    ratios: list[Ratios] = []

    def batches() -> Iterator[Sandwich]:
        for first in range(0, len(data), BATCH):
            texts = data.texts[first : first + BATCH]
            own, other = np.random.SeedSequence([seed, first]).generate_state(2).tolist()
            writer = PromptedPredictor(program, backend)
            ours.append(write(writer, texts, lengths, seed=own, progress=progress))
            theirs.append(reference(texts, other))
            ratios.append(ratios_of(ours[-1], theirs[-1], lengths))
            yield Sandwich(ratios[-1].per_query, ratios[-1].per_query)

    stopped = until_decided(batches(), epsilon=epsilon, level=level)
    asked = data.take(range(stopped.queries))
    return AskedTexts(
        asked, data, Written.joined(ours), Written.joined(theirs), Ratios.joined(ratios), stopped, epsilon
    )
