"""A sweep: the gap over datasets, numbers of examples, context lengths, retrievers, shots, seeds and references.

    rows.jsonl     the rows, each on the disk before the next is measured
    worst.jsonl    the queries with the largest gaps, with their texts
    references/    what was trained
    answers/       what the references said to the queries
    searches/      what the model said to the prompts that searches tried

- Killed at any moment and started again, a sweep goes on: rows are known by their keys (`sweep_plan`), a training by
  its checkpoint, a search by what the model said, the answers of a reference by their file, which is there complete
  or not at all.
- A `Worker` does jobs one after the other and keeps what they share: the engine, the encoder's vectors, the compiled
  pool, the references' answers. In one process there is one, on a cluster one in each process (`sweep_ray`).
- Only `run` writes rows, wherever they were measured.
- A row says where its seconds went: the search's, the model's, those that made the prompts, and the evaluator's own.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.evaluate import (
    Answers,
    Row,
    common_columns,
    measured_columns,
    predictor_of,
    shots_per_query,
    vote_columns,
    worst_queries,
)
from evaluation.gap import gap, reliability
from evaluation.reference.method import make_method
from evaluation.reference.trainer import Reference, finetune, load_reference
from evaluation.row_file import RowFile
from evaluation.sweep_plan import SEARCHED, Ask, Job, Loaded, Plan, ReferenceJob, load, loop_of, search_queries
from evaluation.sweep_spec import LEVELS, SweepSpec
from icl_compiler.artifact import require_replaceable
from icl_compiler.backends.backend import Backend, LabelScores, Usage
from icl_compiler.calibration.calibrating import WITH_OWN_PROMPTS, calibrate
from icl_compiler.compile import compile_program, with_calibration, zero_shot_program
from icl_compiler.errors import ArtifactError
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, SEARCHES
from icl_compiler.optimise.variants import Variants
from icl_compiler.predictor import Predictions, open_backend
from icl_compiler.program import Program
from icl_compiler.templates import Template

WORST = 5
"""Queries kept of each prompt that was measured."""


class Measured(NamedTuple):
    """Rows of one job, and the worst queries of each."""

    rows: list[Row]
    worst: list[Row]


Report = Callable[[int, int, float, float | None], object]
Engine = Callable[[SweepSpec, Path, Sequence[ReferenceJob], Sequence[Job]], Iterator[Measured | ReferenceJob]]
"""Does the jobs, each after the references it needs, and yields what is done."""


@dataclass
class Worker:
    """Does the jobs of a sweep, and keeps what they share."""

    spec: SweepSpec
    folder: Path
    _data: dict[str, Loaded] = field(default_factory=dict)
    _programs: dict[tuple[object, ...], Program] = field(default_factory=dict)
    _answers: dict[str, tuple[Reference, Predictions, float]] = field(default_factory=dict)

    def data(self, name: str) -> Loaded:
        """A dataset of the sweep, read once."""
        if name not in self._data:
            [dataset] = [each for each in self.spec.datasets if each.name == name]
            self._data[name] = load(self.spec, dataset)
        return self._data[name]

    def reference(self, job: ReferenceJob, report: Report | None = None) -> None:
        """Train a reference, unless it is there, and keep what it says to the queries."""
        path = answers_path(self.folder, job)
        if path.exists():
            return
        trained = self._trained(job, report)
        said = trained.predictor(dtype=self.spec.dtype).predict(self.data(job.dataset).queries.texts)
        facts = {
            "labels": said.labels,
            "method": trained.method,
            "base_model": trained.base_model,
            "seed": trained.seed,
            "examples": trained.examples,
            "data": trained.data_hash,
            "training_seconds": trained.curve[-1].seconds if trained.curve else 0.0,
            "seconds": said.seconds,
            "usage": said.usage,
        }
        draft = path.with_name(f".{path.name}.unfinished")
        path.parent.mkdir(exist_ok=True)
        with draft.open("wb") as file:
            np.savez(
                file,
                facts=np.array(json.dumps(facts)),
                probabilities=said.probabilities,
                prompt_tokens=said.prompt_tokens,
            )
        draft.replace(path)

    def rows(self, job: Job) -> Measured:
        """Ask, and compare the answers with those of each reference."""
        ask, data = job.ask, self.data(job.ask.dataset)
        started = time.perf_counter()
        backend = Stopwatch(self._engine)
        program = self._program(ask)
        more: Row = {}
        searching = time.perf_counter()
        if ask.searches:
            program, more = self._searched(ask, program)
        searching = time.perf_counter() - searching
        if ask.calibration and ask.calibrates:
            names = None if ask.calibration == "auto" else ("none", ask.calibration)
            program, choice = calibrate(program, backend, candidates=names, seed=ask.seed)
            if names is not None:
                program = with_calibration(program, choice.forced(names[1]).calibration)
        found, worst = [], []
        said = None
        if ask.series != "floor":
            predictor = predictor_of(ask.series, program, backend)
            more |= vote_columns(predictor)
            said = predictor.predict(data.queries.texts)
        asked = time.perf_counter()
        prompts = program.prompt_sets(data.queries.texts) if ask.budget is not None else []
        for key, first, second in job.rows:
            reference, answers, training_s = self._read(first)
            told = said or self._read(second or first)[1]
            compared = gap(told, answers, level=self.spec.level)
            beside = Answers(reference, answers, ())
            row = {
                "key": key,
                "series": ask.series,
                **common_columns(program, backend, beside, data.queries, ask.dataset, self.spec.level),
                **measured_columns(told, compared, beside, data.queries, self.spec.level),
                "n_examples": ask.n,
                "max_prompt_tokens": ask.budget,
                "retriever": ask.retriever,
                "shots": None if ask.shots is None else str(ask.shots),
                "calibration": ask.calibration,
                "calibrated_by": program.calibration.method if ask.calibration else None,
                "optimisation": ask.optimisation,
                **more,
                "seed": ask.seed,
                "reference_examples": reference.examples,
                "reference_seconds": training_s,
                "correct": _bits(told, data),
            }
            if first.same_rows:
                row["reference"] = f"{reference.method}, seed {reference.seed}, the prompt's examples"
            if second is not None:
                row["reference_seed"] = second.seed
            if prompts:
                row["shots_per_query"] = shots_per_query(prompts)
            if ask.series == "program":
                correct = _bits(answers, data)
                row["reference_accuracy"] = correct.count("1") / len(correct)
                row["reference_correct"] = correct
                right = np.array([bit == "1" for bit in _bits(told, data)], dtype=float)
                row["reliability"] = reliability(told.probabilities.max(axis=1), right)
                found_worst = worst_queries(program, told, answers, compared, data.queries, prompts, WORST)
                worst += [{"key": f"{key}-{place}", **each} for place, each in enumerate(found_worst)]
            found.append(row)
        done = time.perf_counter()
        for row in found:  # of what the rows share, each has its part
            if ask.searches:
                row["seconds_search"] = searching / len(found)
            row["seconds_model"] = backend.seconds / len(found)
            row["seconds_prompts"] = (asked - started - searching - backend.seconds) / len(found)
            row["seconds_evaluator"] = (done - asked) / len(found)
        return Measured(found, worst)

    @cached_property
    def _engine(self) -> Backend:
        spec = self.spec
        return open_backend(spec.backend, spec.model, dtype=spec.dtype, server=spec.server, in_flight=spec.in_flight)

    def _program(self, ask: Ask) -> Program:
        train = self.data(ask.dataset).train
        if ask.n is None or ask.series == "floor":
            template = Template.from_name(self.spec.template or "classify")
            return zero_shot_program(train.labels, template, model=self.spec.model)
        retriever = ask.retriever or ("dense" if ask.series == "neighbours' vote" else "uniform")
        if retriever == SEARCHED:
            retriever = DEFAULT_RETRIEVERS[LEVELS[ask.optimisation or ""]]
        key = (ask.dataset, ask.seed, retriever, ask.n)
        if key not in self._programs:
            self._programs.clear()  # jobs come in the order in which they share
            self._programs[key] = compile_program(
                train,
                model=self.spec.model,
                template=self.spec.template,
                retriever=retriever,
                shots=1,
                examples=ask.n,
                budget=max(self.spec.budgets),
                seed=ask.seed,
            )
        program = self._programs[key]
        if ask.budget is None:
            return program
        fit = ask.shots in ("fit", SEARCHED)
        shots = shots_that_fit(program, ask.budget) if fit else int(ask.shots or 0)
        return replace(program, settings=replace(program.settings, budget=ask.budget, shots=shots))

    def _searched(self, ask: Ask, start: Program) -> tuple[Program, Row]:
        """The program that the search of this level finds, and what a row says of that."""
        log = self.folder / "searches" / f"{hashlib.sha256(repr(ask).encode()).hexdigest()[:16]}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        later = ask.calibration in WITH_OWN_PROMPTS
        program, [how, *_] = SEARCHES[LEVELS[ask.optimisation or ""]](
            start,
            self._engine,
            fixed=ask.fixed | ({"template"} if self.spec.template else set()),
            queries=search_queries(self.spec, ask),
            calibrations=None if ask.calibration == "auto" else ["none" if later else ask.calibration],
            log=log,
        )
        return program, {"found": str(Variants(program).own), "search_prompts": how["prompts_asked"]}

    def _trained(self, job: ReferenceJob, report: Report | None) -> Reference:
        if job.spec.folder is not None:
            return load_reference(Path(job.spec.folder))
        folder = self.folder / "references" / job.name
        if folder.exists():
            try:
                return load_reference(folder)
            except ArtifactError:
                require_replaceable(folder, kind="reference")
        folder.parent.mkdir(exist_ok=True)
        return finetune(
            self.data(job.dataset).train.subset(job.rows, seed=job.draw),
            folder,
            model=self.spec.model,
            method=make_method(job.spec.method, dict(job.spec.settings)),
            template=self.spec.template,
            settings=loop_of(job.spec, job.seed),
            report=report,
            checkpoint_every_s=30.0,
        )

    def _read(self, job: ReferenceJob) -> tuple[Reference, Predictions, float]:
        if job.key not in self._answers:
            with np.load(answers_path(self.folder, job), allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                probabilities, prompt_tokens = file["probabilities"], file["prompt_tokens"]
            labels = tuple(facts["labels"])
            reference = Reference(
                self.folder / "references" / job.name,
                labels,
                Template.from_name(self.spec.template or "classify"),
                facts["method"],
                facts["base_model"],
                facts["seed"],
                facts["examples"],
                facts["data"],
                (),
                job.spec.method,
            )
            said = Predictions(labels, probabilities, prompt_tokens, Usage(*facts["usage"]), facts["seconds"])
            self._answers[job.key] = reference, said, facts["training_seconds"]
        return self._answers[job.key]


class Stopwatch:
    """A backend with the seconds that it scored."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def label_logprobs(self, *arguments: Any, **named: Any) -> LabelScores:
        """As the backend's, timed."""
        started = time.perf_counter()
        try:
            return self._backend.label_logprobs(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - started


def run(
    spec: SweepSpec,
    folder: Path,
    planned: Plan,
    *,
    engine: Engine,
    notify: Callable[[str, int, int], object] = lambda what, done, of: None,
) -> list[Row]:
    """Measure what is not measured yet, and give all rows of the plan, in its order.

    Args:
        engine: `in_process`, or that of a cluster.
        notify: is told what was done, how many rows there are now, and of how many.

    Raises:
        DataError: if another process writes to the rows, or they are damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with RowFile(folder / "rows.jsonl") as file, RowFile(folder / "worst.jsonl") as worst:
        wanted = planned.keys
        jobs = planned.without(set(file.rows))
        for done in engine(spec, folder, references_of(jobs), jobs):
            if isinstance(done, Measured):
                worst.add(done.worst)
                file.add(done.rows)
                what = f"{done.rows[0]['dataset']}, {done.rows[0]['series']}"
            else:
                what = f"reference {done.name}"
            notify(what, len(wanted & file.rows.keys()), len(wanted))
        return [file.rows[row.key] for job in planned.jobs for row in job.rows]


def in_process(
    report_of: Callable[[ReferenceJob], Any] | None = None,
) -> Engine:
    """The engine of one process; `report_of` gives a context with the `Report` of a training."""

    def engine(
        spec: SweepSpec, folder: Path, references: Sequence[ReferenceJob], jobs: Sequence[Job]
    ) -> Iterator[Measured | ReferenceJob]:
        worker = Worker(spec, folder)
        there: set[str] = set()
        for job in jobs:
            for reference in references_of([job]):
                if reference.key not in there and not answers_path(folder, reference).exists():
                    if report_of is None or reference.spec.folder is not None:
                        worker.reference(reference)
                    else:
                        with report_of(reference) as report:
                            worker.reference(reference, report)
                    yield reference
                there.add(reference.key)
            yield worker.rows(job)

    return engine


def references_of(jobs: Sequence[Job]) -> list[ReferenceJob]:
    """The references that jobs need, each once, in their order."""
    needed = [each for job in jobs for row in job.rows for each in (row.reference, row.second) if each is not None]
    return list({each.key: each for each in needed}.values())


def answers_path(folder: Path, job: ReferenceJob) -> Path:
    """Where the answers of a reference lie."""
    return folder / "answers" / f"{job.key}.npz"


def shots_that_fit(program: Program, budget: int) -> int:
    """The most shots of the pool that a budget can take, were all of them the shortest, and the query empty."""
    shortest = int(np.diff(program.pool.offsets).min())
    return min(len(program.pool.data), max(0, budget - len(program.template.head)) // shortest)


def _bits(said: Predictions, data: Loaded) -> str:
    """For each query whether the likeliest label is the true one, as 1 and 0."""
    best = [said.labels[place] for place in said.best]
    return "".join("01"[a == b] for a, b in zip(best, data.queries.answers, strict=True))


def worst_of(folder: Path, row: Mapping[str, object]) -> list[Row]:
    """The worst queries of a row, as far as they are in the folder."""
    from evaluation.row_file import read_rows

    return [each for each in read_rows(folder / "worst.jsonl") if str(each["key"]).startswith(f"{row['key']}-")]
