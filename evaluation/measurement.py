"""What a row of measurements is, checked, and which rows one verdict is about.

- A row is a plain dictionary, read from JSONL: one measurement of one series (the prompt, a baseline, the
  floor ...).
- A value that was not measured is `None`, and never NaN: what is not finite becomes `None` on entry.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

from icl_compiler.errors import EvaluationError

Row = Mapping[str, object]

# Series in the order of the tables: name in words, marker in the plots.
SERIES = {
    "program": ("the prompt", "circle"),
    "uncalibrated": ("the prompt without its calibration", "circle-open"),
    "random shots": ("the prompt with random shots", "square"),
    "zero shots": ("the prompt with zero shots", "diamond"),
    "shuffled labels": ("the prompt with shuffled labels", "x"),
    "neighbours' vote": ("the vote of the neighbours without a language model", "triangle-up"),
    "floor": ("a second fine-tuning with another seed", "line-ns"),
    "scoring noise": ("the same model scored twice", "cross"),
}


@dataclass(frozen=True)
class Measurement:
    """A row, checked: numbers are numbers or None, proportions lie in [0, 1].

    Attributes:
        calibration: of the program, as it was asked for; "auto" is that of lowest held-out risk.
        optimisation: how hard a prompt was looked for, such as "O2". Where a search found them, `retriever` and `shots`
            are "searched", and `found` says what it found, after `search_prompts` model calls.
        shots: most that were allowed: a number, or "fit".
        gap_truncation: by how much the bounds of a mean gap differ, whose midpoint is `gap`: of an engine that gives
            only its likeliest tokens. The interval covers it. `None` where the gap is exact.
        gaps: of each query, in the order in which all rows of the same queries have them.
        n_labels: how many labels there are, without "other".
        queries_max: where queries were asked until a decision, how many might have been; the intervals then hold
            whenever one stopped. `epsilon`, `decision` (within, not within, undecided) and `queries_asked` are of the
            program.
        samples: answers that each model drew to a query, where texts are generated, of `max_new_tokens` at most. The
            gap is then that of whole answers; `gap_coupling` and `gap_chain` are upper bounds on it, `token_gap` is the
            mean total variation of the next token along the reference's own texts; `accuracy` is the share of greedy
            outputs that are the target, and `finished` that of samples that came to their end.
        calibration: the method by which the program's probabilities are calibrated; "none" where they are the model's.
        neighbours: how many rows vote; by exp(`vote_sharpness` * cosine), so that at 0 all count alike.
        noise_against: of scoring noise, what the program was compared with: itself in "other batches", or in "float32".
    """

    series: str
    dataset: str | None = None
    n_labels: int | None = None
    n_examples: int | None = None
    max_prompt_tokens: int | None = None
    optimisation: str | None = None
    found: str | None = None
    search_prompts: int | None = None
    retriever: str | None = None
    shots: str | None = None
    calibration: str | None = None
    shots_per_query: float | None = None
    neighbours: int | None = None
    vote_sharpness: float | None = None
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    gap_truncation: float | None = None
    gaps: tuple[float, ...] | None = None
    gap_coupling: float | None = None
    gap_chain: float | None = None
    token_gap: float | None = None
    token_gap_low: float | None = None
    token_gap_high: float | None = None
    samples: int | None = None
    max_new_tokens: int | None = None
    finished: float | None = None
    level: float | None = None
    n_queries: int | None = None
    epsilon: float | None = None
    decision: str | None = None
    queries_asked: int | None = None
    queries_max: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    reference_accuracy: float | None = None
    agreement: float | None = None
    ece: float | None = None
    label_mass: float | None = None
    prompt_tokens_per_query: float | None = None
    output_tokens_per_query: float | None = None
    computed_tokens_per_query: float | None = None
    seconds_per_query: float | None = None
    noise_against: str | None = None
    model: str | None = None
    reference: str | None = None
    reference_examples: int | None = None
    reference_seconds: float | None = None
    seed: int | None = None
    data_sha256: str | None = None
    machine: str | None = None
    commit: str | None = None
    version: str | None = None

    @property
    def title(self) -> str:
        """The series, and of scoring noise what it is against.

        >>> Measurement("scoring noise", noise_against="float32").title
        'scoring noise, float32'
        """
        return f"{self.series}, {self.noise_against}" if self.noise_against else self.series

    @classmethod
    def from_row(cls, row: Row, number: int = 1) -> "Measurement":
        """Check one row; `number` is its place in the file, for the messages. Unknown keys are left out.

        Raises:
            EvaluationError: if the series is unknown, or a value is not of its kind.

        >>> Measurement.from_row({"series": "floor", "gap": 0.09, "n_examples": 512.0}).n_examples
        512
        """
        where = f"row {number}"
        if row.get("series") not in tuple(SERIES):
            raise EvaluationError(
                f"{where}: series should be one of {', '.join(map(repr, SERIES))}, is {row.get('series')!r}"
            )
        kinds = {field.name: str(field.type) for field in fields(cls)}
        return cls(**{name: checked(row.get(name), name, kind, where) for name, kind in kinds.items()})  # type: ignore[arg-type]  # checked returns the kind of the field


def checked(value: object, name: str, kind: str, where: str) -> object:
    """`value` as a str, an int, a float in its range or several, as `kind` says; `None` if it was not measured.

    Raises:
        EvaluationError: if it is not of its kind; the message begins with `where`.

    >>> checked(0.5, "gap", "float", "row 1"), checked(float("nan"), "gap", "float", "row 1")
    (0.5, None)
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if "str" in kind:
        return str(value)
    if "tuple" in kind:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise EvaluationError(f"{where}: {name} should be a list of numbers, is {value!r}")
        return tuple(checked(each, name, "float", where) for each in value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EvaluationError(f"{where}: {name} should be a number or null, is {value!r}")
    number = float(value)
    if "int" in kind:
        if not isinstance(value, Integral) and not number.is_integer():
            raise EvaluationError(f"{where}: {name} should be a whole number, is {value!r}")
        if name != "seed" and number < 0:
            raise EvaluationError(f"{where}: {name} should be >= 0, is {value!r}")
        return int(value) if isinstance(value, Integral) else int(number)
    largest = math.inf if name.endswith(("_per_query", "_seconds", "_sharpness")) else 1 + 1e-6
    if not -1e-6 <= number <= largest:
        wanted = ">= 0" if largest == math.inf else "in [0, 1]"
        raise EvaluationError(f"{where}: {name} should be {wanted}, is {value!r}")
    return number


def measurements(rows: Sequence[Row]) -> list[Measurement]:
    """All rows, checked.

    Raises:
        EvaluationError: if there are no rows, or a row is not usable.

    >>> [row.series for row in measurements([{"series": "program"}, {"series": "floor"}])]
    ['program', 'floor']
    """
    if not rows:
        raise EvaluationError("there are no rows to report on: expected at least one measurement, found none")
    return [Measurement.from_row(row, number) for number, row in enumerate(rows, start=1)]


class Group(NamedTuple):
    """The measurements that one verdict is about: one dataset, one model."""

    name: str
    rows: list[Measurement]

    @property
    def head(self) -> Measurement | None:
        """The program the verdict speaks of: most examples, largest budget, highest level, first in the file.

        Never the one with the smallest gap: its interval would be too good to be true.
        """
        measured = [row for row in self.rows if row.series == "program" and row.gap is not None]
        return max(
            measured,
            key=lambda row: (row.n_examples or 0, row.max_prompt_tokens or 0, row.optimisation or ""),
            default=None,
        )

    def beside(self, series: str, *, noise_against: str | None = None) -> Measurement | None:
        """The measured row of a series that is most like the head."""
        wanted = (series, noise_against)
        found = [row for row in self.rows if (row.series, row.noise_against) == wanted and row.gap is not None]
        alike = ("reference", "n_examples", "max_prompt_tokens", "optimisation", "retriever", "seed")
        return min(
            found,
            key=lambda row: [getattr(row, name) != getattr(self.head, name, None) for name in alike],
            default=None,
        )


def grouped(rows: Sequence[Measurement]) -> list[Group]:
    """By dataset; where programs of several models are measured on it, by model too.

    Rows that name no model, votes and floors belong to all models of their dataset.

    >>> [group.name for group in grouped([Measurement("program", dataset="mr"), Measurement("floor")])]
    ['mr', 'the data']
    """
    groups = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        members = [row for row in rows if row.dataset == dataset]
        models = list(dict.fromkeys(row.model for row in members if row.series == "program" and row.model))
        if len(models) < 2:
            groups.append(Group(dataset or "the data", members))
            continue
        for model in models:
            own = [row for row in members if row.model in (None, model) or row.series in ("floor", "neighbours' vote")]
            groups.append(Group(f"{dataset or 'the data'}, {model}", own))
    return groups
