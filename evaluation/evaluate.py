"""One evaluation: a program against its reference, with the baselines without which a gap says nothing.

- The reference is asked once; every series is compared with the same answers.
- Baselines are the model's own law. Where the program is calibrated, so is a series of the same answers without that.
- The floor is a second reference, trained with another seed.
- The scoring noise is the program itself scored again on some of the queries: by the same engine in batches of another
  composition, and in float32, where the engine's numbers have fewer bits. A long prompt is alone in its batch, so that
  only the second says something of it.
- Results are rows (plain dictionaries, one per series); the report is made from them and nothing else.
- Where queries were asked until a decision, every interval is one that holds whenever one stops.
"""

import os
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Bool

from evaluation.asking import Asked
from evaluation.formatting import counted
from evaluation.gap import Gap, calibration_error, gap, require_known
from evaluation.intervals import clopper_pearson
from evaluation.neighbours import NeighboursVote
from evaluation.reference.trainer import Reference, same_labels
from evaluation.sequential import running_interval
from evaluation.tv import Sandwich
from icl_compiler.backends.backend import Backend, Progress
from icl_compiler.calibration.held_out import log_loss
from icl_compiler.calibration.law import NO_CALIBRATION
from icl_compiler.compile import new_retriever, with_pool, without_rows, zero_shot_program
from icl_compiler.data import Dataset
from icl_compiler.encoders import encoder_of, without_base
from icl_compiler.errors import EvaluationError, ICLError
from icl_compiler.explanation import written
from icl_compiler.predictor import Predictions, PromptedPredictor, joined
from icl_compiler.program import Program, Prompt, encode_pool

Row = dict[str, object]
ProgressFor = Callable[[str, int], Progress | None]
"""Gives the progress callback for a series with that many texts."""

BASELINES = ("random shots", "shuffled labels", "zero shots", "neighbours' vote", "floor", "scoring noise")
NOISE_QUERIES = 32
"""Queries that are scored again: without any noise the 95 % interval ends at 0.14, with 16 of them at 0.26."""


class Evaluation(NamedTuple):
    """Rows, the queries with the largest gap, counted warnings, and the gaps of every query.

    Attributes:
        per_query: one object for each row, with its columns that say what was measured, and lists with an entry for
            each query in the order asked: `texts`, `gaps`, `correct`, and for labels `losses`, the log-loss of the
            right one in nats. Where gaps are midpoints of bounds, `gap_truncation` is how far these are apart.
    """

    rows: list[Row]
    worst: list[dict[str, object]]
    warnings: list[str]
    per_query: list[Row]


@runtime_checkable
class OfReference(Protocol):
    """What was asked of a reference, labels or texts."""

    @property
    def reference(self) -> Reference:
        """The one to approximate."""


@dataclass(frozen=True)
class Answers:
    """What the references said about the queries: computed once, compared with every program."""

    reference: Reference
    first: Predictions
    floors: tuple[tuple[Reference, Predictions], ...]


def require_comparable_references(references: Sequence[Reference]) -> None:
    """Find out before they are asked whether they can be compared with each other.

    Raises:
        EvaluationError: if their labels differ, or two of them have the same seed.
    """
    seeds = [reference.seed for reference in references]
    if len(set(seeds)) < len(seeds):
        raise EvaluationError(
            f"the references have the seeds {', '.join(map(str, seeds))}; the floor is the distance of two that were "
            "trained with different seeds: give each --reference its own (`icl finetune --seed`)"
        )
    for reference in references:
        if difference := same_labels(references[0].labels, reference.labels):
            raise EvaluationError(f"the references were trained on other labels than each other: {difference}")


def ask_references(
    references: Sequence[Reference],
    data: Dataset,
    *,
    dtype: str = "auto",
    asked: Asked | None = None,
    progress: ProgressFor | None = None,
) -> Answers:
    """The answer laws of the references on the texts of `data`; the first is the one to approximate.

    Args:
        asked: what the first of them has said to these texts already.

    Raises:
        EvaluationError: if their labels differ, or two of them have the same seed.
    """
    require_comparable_references(references)
    answers = [] if asked is None else [asked.reference]
    for reference in references[len(answers) :]:
        name = f"reference, seed {reference.seed}"
        report = progress(name, len(data)) if progress else None
        answers.append(reference.predictor(dtype=dtype).predict(data.texts, progress=report))
    return Answers(references[0], answers[0], tuple(zip(references[1:], answers[1:], strict=True)))


def evaluate(
    program: Program,
    backend: Backend,
    answers: Answers,
    data: Dataset,
    *,
    dataset_name: str,
    level: float = 0.95,
    worst: int = 10,
    series: Collection[str] = BASELINES,
    asked: Asked | None = None,
    float32_backend: Callable[[], Backend] | None = None,
    progress: ProgressFor | None = None,
) -> Evaluation:
    """Measure `program` on `backend` against the references' answers to `data`.

    Args:
        series: what is measured beside the program, of `BASELINES`.
        asked: what the program has said to `data` already, query after query until a decision.
        float32_backend: opens the program's model in float32, for the scoring noise; called last, and only for it. If
            that fails, a warning says so.

    Raises:
        EvaluationError: if the labels of program, references and data differ.
    """
    if difference := same_labels(program.labels, answers.reference.labels):
        raise EvaluationError(
            f"the program and the reference have other labels ({difference}, the first being the program); "
            "compile and fine-tune on the same labels"
        )
    require_known(program.labels, data.answers)
    program, warnings = without_test_rows(program, data)
    common = common_columns(program, backend, answers, data, dataset_name, level)
    anytime = asked is not None
    if asked is not None:
        common |= {"data_sha256": asked.drawn.content_hash, "queries_max": len(asked.drawn)}
    per_query: list[Row] = []

    def ask(name: str, asked: PromptedPredictor | NeighboursVote | _OneByOne, texts: Sequence[str]) -> Predictions:
        return asked.predict(texts, progress=progress(name, len(texts)) if progress else None)

    def row(series: str, said: Predictions, **more: object) -> Row:
        compared = gap(said, answers.first, level=level, anytime=anytime)
        what = {"series": series, **common, **more}
        of_queries = query_columns(compared, _same(_labels(said), data.answers), data)
        if said.upper is None:
            right = [said.labels.index(answer) for answer in data.answers]
            of_queries["losses"] = log_loss(said.probabilities, np.eye(len(said.labels))[right]).tolist()
        per_query.append(what | of_queries)
        return what | measured_columns(said, compared, answers, data, level, anytime=anytime)

    reference_accuracy = float(np.mean(_same(_labels(answers.first), data.answers)))
    prompts = program.prompt_sets(data.texts)
    shots = shots_per_query(prompts)
    of_program: Row = {"shots_per_query": shots, "reference_accuracy": reference_accuracy}
    if asked is None:
        said = ask("program", PromptedPredictor(program, backend), data.texts)
    else:
        said = asked.said
        of_program |= {"epsilon": asked.epsilon, "decision": asked.stopped.answer, "queries_asked": len(data)}
    rows = [row("program", said, calibration=program.calibration.method, **of_program)]
    if said.uncalibrated is not None:
        rows.append(row("uncalibrated", said.uncalibrated))
    for name in series:
        if name in _ASKED:
            predictor = predictor_of(name, program, backend)
            rows.append(row(name, ask(name, predictor, data.texts), **vote_columns(predictor)))
    if "floor" in series:
        for reference, second in answers.floors:
            rows.append(row("floor", second, reference_seed=reference.seed))
    if "scoring noise" in series:

        def noise_row(against: str, scoring: PromptedPredictor | _OneByOne) -> Row:
            again = ask(f"scoring noise, {against}", scoring, data.texts[:NOISE_QUERIES])
            count = len(again.probabilities)
            return {
                "series": "scoring noise",
                "noise_against": against,
                **common,
                **gap_columns(gap(_first(said, count), again, level=level, anytime=anytime), count),
                **_cost_columns(again),
            }

        rows.append(noise_row("other batches", _OneByOne(PromptedPredictor(program, backend))))
        if float32_backend is not None:
            try:
                rows.append(noise_row("float32", PromptedPredictor(program, float32_backend())))
            except (ICLError, OSError, MemoryError, RuntimeError) as error:  # torch out of memory is a RuntimeError
                reason = (str(error) or type(error).__name__).splitlines()[0]
                warnings.append(f"the scoring noise against float32 was not measured: {reason}")
    if truncated := [row for row in rows if "gap_truncation" in row]:
        warnings.append(_truncation_warning(truncated))
    compared = gap(said, answers.first, level=level, anytime=anytime)
    shown = worst_queries(program, said, answers.first, compared, data, prompts, worst)
    return Evaluation(rows, shown, warnings, per_query)


def with_examples(program: Program, size: int) -> Program:
    """The program with a pool of so many rows, a nested draw, and of all where there are no more."""
    if size >= len(program.pool.data):
        return program
    return with_pool(program, program.pool.data.subset(size, seed=program.settings.seed))


def texts_learned_from(references: Sequence[Reference], data: Dataset) -> list[str]:
    """A warning for each reference that was fine-tuned on some of the texts it is now asked about."""
    found = []
    for reference in references:
        if seen := reference.learned_from(data.texts):
            stand, their = ("stands", "its answer") if seen == 1 else ("stand", "their answers")
            found.append(
                f"{seen:,} of the {counted(len(data), 'test text')} {stand} among the rows that the reference "
                f"{reference.folder} was fine-tuned on, so that it may know {their} by heart; fine-tune it again "
                "without these: icl finetune --test"
            )
    return found


def without_test_rows(program: Program, data: Dataset) -> tuple[Program, list[str]]:
    """The program without the rows of its pool that stand in `data` too, and a warning that counts them."""
    program, dropped = without_rows(program, data.texts)
    stand, were = ("stands", "was") if dropped == 1 else ("stand", "were")
    said = (
        f"{counted(dropped, 'row')} of the pool {stand} in the test data too and {were} removed from the pool for "
        "this evaluation"
    )
    return program, [said] if dropped else []


@dataclass(frozen=True)
class _OneByOne:
    """A program asked one query at a time, last query first: other batches, other rounding."""

    predictor: PromptedPredictor

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        return joined([self.predictor.predict([text], progress=progress) for text in reversed(texts)][::-1])


def _first(said: Predictions, count: int) -> Predictions:
    upper = None if said.upper is None else said.upper[:count]
    return said._replace(
        probabilities=said.probabilities[:count], prompt_tokens=said.prompt_tokens[:count], upper=upper
    )


def _truncation_warning(rows: Sequence[Row]) -> str:
    """What it means that the gaps of `rows` are midpoints of bounds, with their figures."""
    found = []
    for row in rows:
        middle, half = cast(float, row["gap"]), cast(float, row["gap_truncation"]) / 2
        name = f"{row['series']}, {row['noise_against']}" if "noise_against" in row else row["series"]
        found.append(f"{name} {max(middle - half, 0.0):.3f} to {middle + half:.3f}")
    return (
        f"with {counted(cast(int, rows[0]['n_examples']), 'example')}, the engine gave only its likeliest tokens, so "
        f"that gaps are known within bounds ({'; '.join(found)}): each figure is a midpoint, each interval covers the "
        "bounds, and label probabilities that were not given count as 0 in accuracy, agreement, ECE and label mass"
    )


def common_columns(
    program: Program, backend: Backend, answers: OfReference, data: Dataset, dataset_name: str, level: float
) -> Row:
    """What a row says of where it comes from, whatever series it is of."""
    return {
        "dataset": dataset_name,
        "n_examples": len(program.pool.data),
        "n_labels": len(program.labels) or None,
        "max_prompt_tokens": program.settings.budget,
        "retriever": program.settings.retriever,
        "level": level,
        "model": program.settings.model,
        "reference": answers.reference.description,
        "seed": program.settings.seed,
        "data_sha256": data.content_hash,
        "machine": f"{machine()}; {backend.device}",
        "commit": commit(),
        "version": version("icl-compiler"),
    }


def query_columns(compared: Gap, correct: Bool[np.ndarray, " texts"], data: Dataset) -> Row:
    """What is known of each query."""
    columns: Row = {"texts": list(data.texts), "gaps": compared.per_query.tolist(), "correct": correct.tolist()}
    if compared.bounds is not None:
        columns["gap_truncation"] = compared.bounds.high - compared.bounds.low
    return columns


def measured_columns(
    said: Predictions, compared: Gap, answers: Answers, data: Dataset, level: float, *, anytime: bool = False
) -> Row:
    """What a row says of answers to `data`, and of their gap to those of the reference."""
    return {
        **gap_columns(compared, len(said.probabilities)),
        **_answer_columns(said, _same(_labels(said), data.answers), level, anytime=anytime),
        "agreement": float(np.mean(_same(_labels(said), _labels(answers.first)))),
    }


def gap_columns(compared: Gap, queries: int) -> Row:
    """A gap as it stands in a row."""
    low, high = compared.interval
    columns: Row = {"gap": compared.mean, "gap_low": low, "gap_high": high, "n_queries": queries}
    columns["gaps"] = [round(each, 5) for each in compared.per_query.tolist()]
    if compared.bounds is not None:
        columns["gap_truncation"] = compared.bounds.high - compared.bounds.low
    return columns


def accuracy_columns(correct: Bool[np.ndarray, " texts"], level: float, *, anytime: bool) -> Row:
    """The share that is right with its interval, which with `anytime` holds whenever one stopped asking."""
    if anytime:
        shares = correct.astype(float)
        low, high = running_interval(Sandwich(shares, shares), level=level)
    else:
        low, high = clopper_pearson(int(correct.sum()), len(correct), delta=1 - level)
    return {"accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}


def _answer_columns(said: Predictions, correct: Bool[np.ndarray, " texts"], level: float, *, anytime: bool) -> Row:
    return {
        **accuracy_columns(correct, level, anytime=anytime),
        "ece": calibration_error(said.probabilities.max(axis=1), correct.astype(float)),
        "label_mass": float(1 - said.other.mean()),
        **_cost_columns(said),
    }


def _cost_columns(said: Predictions) -> Row:
    count = len(said.prompt_tokens)
    return {
        "prompt_tokens_per_query": float(said.prompt_tokens.mean()),
        "computed_tokens_per_query": said.usage.computed_tokens / count,
        "seconds_per_query": said.seconds / count,
    }


def _same(first: Sequence[str], second: Sequence[str]) -> Bool[np.ndarray, " texts"]:
    return np.array([a == b for a, b in zip(first, second, strict=True)], dtype=bool)


def _labels(said: Predictions) -> list[str]:
    """The likeliest label of each text."""
    return [said.labels[i] for i in said.best]


def predictor_of(series: str, program: Program, backend: Backend) -> PromptedPredictor | NeighboursVote:
    """What is asked for a series: the program, or the baseline of that name, made of its parts."""
    return _ASKED[series](program, backend)


def vote_columns(predictor: PromptedPredictor | NeighboursVote) -> Row:
    """How the vote was counted, if it is one."""
    if not isinstance(predictor, NeighboursVote):
        return {}
    return {"neighbours": predictor.vote.k, "vote_sharpness": float(predictor.vote.sharpness)}


def _with_random_shots(program: Program) -> Program:
    index = new_retriever("uniform", encoder=encoder_of(program), seed=program.settings.seed)
    index.fit(program.pool.data.texts)
    settings = replace(program.settings, retriever="uniform", order="best-first", layout="per-query")
    return replace(program, settings=settings, retriever=index, blocks=None, calibration=NO_CALIBRATION, reranker=None)


def _with_shuffled_labels(program: Program) -> Program:
    """The same texts as shots, and the labels of the pool dealt out among them at random."""
    data = program.pool.data
    order = np.random.default_rng(program.settings.seed).permutation(len(data)).tolist()
    shuffled = replace(data, answers=tuple(data.answers[row] for row in order))
    return replace(program, pool=encode_pool(program.template, shuffled), calibration=NO_CALIBRATION)


def _without_shots(program: Program) -> Program:
    return zero_shot_program(program.labels, program.template.template, model=program.settings.model)


def _vote(program: Program) -> NeighboursVote:
    """By sentence embeddings alone, whatever the program compares texts by: without the language model."""
    encoder, fitted = without_base(program.settings.encoder), program.dense if program.reading is None else None
    return NeighboursVote(program.pool.data, encoder=encoder, labels=program.labels, retriever=fitted)


_ASKED: Mapping[str, Callable[[Program, Backend], PromptedPredictor | NeighboursVote]] = {
    "program": PromptedPredictor,
    "random shots": lambda program, backend: PromptedPredictor(_with_random_shots(program), backend),
    "shuffled labels": lambda program, backend: PromptedPredictor(_with_shuffled_labels(program), backend),
    "zero shots": lambda program, backend: PromptedPredictor(_without_shots(program), backend),
    "neighbours' vote": lambda program, _: _vote(program),
}


def shots_per_query(prompts: Sequence[Sequence[Prompt]]) -> float:
    """How many shots a query has, on average, in all its prompts."""
    return float(np.mean([sum(len(prompt.selection.rows) for prompt in of_query) for of_query in prompts]))


def worst_queries(
    program: Program,
    said: Predictions,
    reference: Predictions,
    compared: Gap,
    data: Dataset,
    prompts: Sequence[Sequence[Prompt]],
    count: int,
) -> list[dict[str, object]]:
    """The `count` queries with the largest gap: the texts, what either model says, and the prompt."""
    rows = []
    for i in np.argsort(-compared.per_query, kind="stable")[:count].tolist():
        rows.append(
            {
                "text": data.texts[i],
                "label": data.answers[i],
                "program_label": said.labels[said.best[i]],
                "program_probability": float(said.probabilities[i].max()),
                "reference_label": reference.labels[reference.best[i]],
                "reference_probability": float(reference.probabilities[i].max()),
                "tv": float(compared.per_query[i]),
                "prompt": written(program, prompts[i]),
            }
        )
    return rows


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of this source tree, `+` behind it if files were changed; `None` outside a repository."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def machine() -> str:
    """Processor and cores, in words."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"
