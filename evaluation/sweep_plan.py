"""The work of a sweep: which references are needed, what is asked of the model, which rows come of it, at what cost.

- A row is known by its content: the key is a hash of the examples, the queries, the model, the prompt's settings, the
  reference and the version of this package. So a sweep that is started again, or made larger, measures what is not
  there yet, and data that changed under the same name are measured anew. Machine, commit and time are no content. The
  rows of another version are gone on with only where `rows_of` names it; what is added still tells its own.
- The pools of one seed are nested (`Dataset.subset`), and all sizes are asked the same queries.
- At a level that searches, what is not named is searched; such a cell is known by where its search starts, what it
  leaves as it is, and how many prompts it may ask.
- What does not depend on a setting is measured once, not once for each of its values: zero shots once a dataset, the
  vote once a size, random shots and shuffled labels with the most examples only. One answer of the model is compared
  with every reference.
- What cannot be measured (a budget below the longest query, a reference on too few rows) is left out with a sentence.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.evaluate import texts_learned_from
from evaluation.formatting import counted, joined
from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import make_method
from evaluation.reference.trainer import HELD_OUT, load_reference, split_for_training
from evaluation.sweep_spec import LEVELS, DatasetSpec, ReferenceSpec, SweepSpec
from icl_compiler.calibration.calibrating import QUERIES, WITH_OWN_PROMPTS
from icl_compiler.calibration.choosing import LEAST_QUERIES
from icl_compiler.compile import DEFAULT_TEMPLATES, load_tokenizer
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.errors import SpecError, TrainingError
from icl_compiler.models import EMBEDDED, locate
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, LEAST_ROWS, SEARCHES
from icl_compiler.optimise.levels import QUERIES as SEARCH_QUERIES
from icl_compiler.program import encode_pool
from icl_compiler.templates import EncodedTemplate, Template

SEARCHED = "searched"
"""In place of a retriever or a number of shots: it is for the search to find."""


class Loaded(NamedTuple):
    """A dataset as a sweep uses it: no text of `queries` is in `train`."""

    name: str
    train: Dataset
    queries: Dataset
    warnings: tuple[str, ...]


class ReferenceJob(NamedTuple):
    """A reference to train, unless it is there, and to ask.

    Attributes:
        key: of its answers to the queries.
        rows: how many it is trained on, drawn with `draw`.
        same_rows: whether these are the examples that the prompt has.
        name: of its folder.
    """

    key: str
    dataset: str
    spec: ReferenceSpec
    seed: int
    rows: int
    draw: int
    same_rows: bool
    name: str


class Ask(NamedTuple):
    """What is asked of the model: a series with its settings, `None` where it does not depend on them."""

    series: str
    dataset: str
    seed: int
    n: int | None = None
    retriever: str | None = None
    shots: int | str | None = None
    budget: int | None = None
    calibration: str | None = None
    optimisation: str | None = None

    @property
    def searches(self) -> bool:
        """Whether the model is asked which prompt is best."""
        return self.optimisation is not None and LEVELS[self.optimisation] in SEARCHES

    @property
    def fixed(self) -> frozenset[str]:
        """What a search leaves as it is, besides a template that is named."""
        named = {"retriever": self.retriever, "shots": self.shots}
        return frozenset(name for name, value in named.items() if value != SEARCHED)

    @property
    def calibrates(self) -> bool:
        """Whether held-out rows are asked, beyond those of a search."""
        return self.calibration not in (None, "none") and (not self.searches or self.calibration in WITH_OWN_PROMPTS)


class Comparison(NamedTuple):
    """One row: the answers to an ask beside those of a reference; of a floor, those of a second one."""

    key: str
    reference: ReferenceJob
    second: ReferenceJob | None = None


class Job(NamedTuple):
    """An ask with the rows that come of it."""

    ask: Ask
    rows: tuple[Comparison, ...]


class Plan(NamedTuple):
    """All of a sweep, whether it is done or not.

    Attributes:
        warnings: what is left out, and why; what was noticed in the data.
    """

    jobs: list[Job]
    warnings: list[str]

    @property
    def keys(self) -> set[str]:
        """Of all rows."""
        return {row.key for job in self.jobs for row in job.rows}

    def without(self, done: set[str]) -> list[Job]:
        """What is still to do."""
        left = [job._replace(rows=tuple(row for row in job.rows if row.key not in done)) for job in self.jobs]
        return [job for job in left if job.rows]


def load(spec: SweepSpec, dataset: DatasetSpec) -> Loaded:
    """Read train and test, draw the queries, and take their texts out of the training data.

    Raises:
        SpecError: if there are fewer rows than the sweep asks for, or other labels in the test data.
    """
    train, queries = (
        load_dataset(source, text_column=dataset.text_column, label_column=dataset.label_column)
        for source in (dataset.train, dataset.test)
    )
    warnings = [f"{dataset.name}: {warning}" for warning in (*train.warnings, *queries.warnings)]
    if train.task != "classification" or queries.task != "classification":
        raise SpecError(f"{dataset.name} has targets to generate, and a sweep is about labels; name its label_column")
    if unknown := sorted(set(queries.answers) - set(train.labels)):
        named = joined([repr(label) for label in unknown[:3]])
        raise SpecError(f"{dataset.name}: {counted(len(unknown), 'label')} of test, such as {named}, are not in train")
    if spec.queries is not None:
        if spec.queries > len(queries):
            raise SpecError(f"{dataset.name}: {spec.queries} queries exceed the {counted(len(queries), 'row')} of test")
        rows = np.random.default_rng(0).choice(len(queries), size=spec.queries, replace=False)
        queries = queries.take(sorted(rows.tolist()))
    train, dropped = train.without_texts(queries.texts)
    if dropped:
        warnings.append(f"{dataset.name}: {counted(dropped, 'row')} of train with a query's text left out")
    largest = max((n for n in spec.sizes if isinstance(n, int)), default=0)
    if largest > len(train):
        raise SpecError(f"{dataset.name}: a size of {largest} exceeds the {counted(len(train), 'row')} of train")
    return Loaded(dataset.name, train, queries, tuple(warnings))


def plan(spec: SweepSpec, data: dict[str, Loaded]) -> Plan:
    """The jobs of a sweep in the order in which they share most: dataset, seed, retriever, size.

    Raises:
        SpecError: if nothing is left to measure.
    """
    jobs: list[Job] = []
    warnings: list[str] = []
    for dataset in spec.datasets:
        planner = _Planner(spec, data[dataset.name])
        jobs += planner.jobs()
        warnings += [*data[dataset.name].warnings, *planner.warnings]
    if not jobs:
        raise SpecError(f"nothing can be measured: {' '.join(warnings)}")
    return Plan(jobs, warnings)


class _Planner:
    """Plans one dataset."""

    def __init__(self, spec: SweepSpec, data: Loaded) -> None:
        self._spec, self._data = spec, data
        self._template = Template.from_name(spec.template or DEFAULT_TEMPLATES["classification"])
        self._labels = data.train.labels
        self._sizes = sorted({len(data.train) if n == "all" else n for n in spec.sizes})
        self.warnings: list[str] = []

    def jobs(self) -> list[Job]:
        budgets = self._budgets()
        pairs = {(seed, n): self._pairs(seed, n) for seed in self._spec.seeds for n in self._sizes}
        sizes = [n for n in self._sizes if pairs[self._spec.seeds[0], n]]
        jobs: list[Job] = []
        if not sizes or not budgets:
            return jobs
        for seed in self._spec.seeds:
            for level in self._spec.levels:
                for retriever, n, budget in product(self._retrievers(level), sizes, budgets):
                    for shots, calibration in product(self._spec.shots, self._calibrations(level, n)):
                        ask = Ask("program", self._data.name, seed, n, retriever, shots, budget, calibration, level)
                        if ask.searches:
                            ask = ask._replace(shots=SEARCHED if shots == "fit" else shots)
                            if not self._can_search(ask):
                                continue
                        jobs.append(self._job(ask, pairs[seed, n]))
            jobs += self._baselines(seed, sizes, budgets, pairs)
        return jobs

    def _retrievers(self, level: str) -> tuple[str, ...]:
        own = DEFAULT_RETRIEVERS[LEVELS[level]]
        if own == "uniform":
            return (own,)
        searches = LEVELS[level] in SEARCHES
        if "static" in self._spec.retrievers and not searches:
            raise SpecError(
                f"retrievers: static is a set that a search chooses, and -{level} does not search; take -O2"
            )
        return self._spec.retrievers or (SEARCHED if searches else own,)

    def _can_search(self, ask: Ask) -> bool:
        data = self._data.train.subset(ask.n or 0, seed=ask.seed)
        rows = sum(self._needed[text] <= (ask.budget or 0) for text in data.texts)
        if rows < LEAST_ROWS:
            self._warn(
                f"{self._data.name}: not searched (-{ask.optimisation}) with {ask.n:,} examples and {ask.budget:,} "
                f"tokens: a search holds out {LEAST_ROWS} rows that can be asked within these, and there are {rows}"
            )
        return rows >= LEAST_ROWS

    @cached_property
    def _needed(self) -> dict[str, int]:
        """The tokens that a text of the training data takes as a query, as a search counts them."""
        encoded = EncodedTemplate.build(self._template, load_tokenizer(self._spec.model), self._labels)
        rest = len(encoded.head) + max(len(word) for word in encoded.label_words())
        tokens = np.diff(encode_pool(encoded, self._data.train).offsets) + rest
        return dict(zip(self._data.train.texts, tokens.tolist(), strict=True))

    def _calibrations(self, level: str, n: int) -> tuple[str, ...]:
        if LEVELS[level] in SEARCHES:
            return self._spec.calibrations or ("auto",)
        wanted = self._spec.calibrations or ("none",)
        kept = tuple(name for name in wanted if name == "none" or n >= LEAST_QUERIES)
        if kept != wanted:
            self._warn(f"{self._data.name}: not calibrated with {n:,} examples, which takes {LEAST_QUERIES}")
        return kept

    def _warn(self, text: str) -> None:
        self.warnings += [] if text in self.warnings else [text]

    def _baselines(self, seed: int, sizes: list[int], budgets: list[int], pairs: dict[Any, Any]) -> Iterator[Job]:
        name, largest = self._data.name, sizes[-1]
        if "neighbours' vote" in self._spec.baselines:
            for n in sizes:
                yield self._job(Ask("neighbours' vote", name, seed, n), pairs[seed, n])
        for series in ("random shots", "shuffled labels"):
            retriever = None if series == "random shots" else (*self._spec.retrievers, DEFAULT_RETRIEVERS[1])[0]
            for budget in budgets if series in self._spec.baselines else []:
                for shots in self._spec.shots:
                    ask = Ask(series, name, seed, largest, retriever, shots, budget)
                    yield self._job(ask, pairs[seed, largest])
        if "zero shots" in self._spec.baselines and seed == self._spec.seeds[0]:
            every = [pair for key, found in pairs.items() if key[1] == largest for pair in found]
            yield self._job(Ask("zero shots", name, seed), every)
        if "floor" in self._spec.baselines:
            floors = []
            for n in sizes if self._spec.reference_on == "n" else [largest]:
                size = n if self._spec.reference_on == "n" else None
                for first, seconds in pairs[seed, n]:
                    for second in seconds:
                        key = _hash({"floor": second.key, "of": first.key, **self._common()})
                        floors.append(Job(Ask("floor", name, seed, size), (Comparison(key, first, second),)))
            yield from floors

    def _job(self, ask: Ask, pairs: list[tuple[ReferenceJob, tuple[ReferenceJob, ...]]]) -> Job:
        pool = None if ask.n is None else subset_hash(self._data.train, ask.n, ask.seed)
        asked = {**ask._asdict(), "pool": pool, "dataset": None, **self._common()}
        asked["seed"] = None if ask.n is None else ask.seed
        if ask.series != "neighbours' vote":
            asked |= {"model": model_identity(self._spec.model), "template": self._template.source}
            asked |= {"backend": self._spec.backend, "dtype": self._spec.dtype}
        if ask.searches:
            asked |= {
                "search_queries": search_queries(self._spec, ask),
                "template_is_named": self._spec.template is not None,
            }
        firsts = dict.fromkeys(first for first, _ in pairs)
        return Job(ask, tuple(Comparison(_hash({**asked, "reference": first.key}), first) for first in firsts))

    def _common(self) -> dict[str, object]:
        queries = self._data.queries.content_hash
        measured_by = self._spec.rows_of or version("icl-compiler")
        return {"queries": queries, "level": self._spec.level, "version": measured_by}

    def _pairs(self, seed: int, n: int) -> list[tuple[ReferenceJob, tuple[ReferenceJob, ...]]]:
        """The references that a prompt of this seed and size is compared with, each with those of its floor."""
        kept = [each for each in self._spec.references if each.folder]
        found = []
        if kept:
            first, *others = (self._kept(each) for each in kept)
            found.append((first, tuple(others)))
        seeds = self._spec.seeds
        floor = "floor" in self._spec.baselines
        for each in self._spec.references:
            if each.folder:
                continue
            if self._spec.reference_on == "n":
                jobs = [self._trained(each, seed + more, n, seed, same=True) for more in range(1 + floor)]
            else:
                rows = min(each.examples or len(self._data.train), len(self._data.train))
                other = seeds[(seeds.index(seed) + 1) % len(seeds)] if len(seeds) > 1 else seed + 1
                asked = [seed, other] if floor else [seed]
                jobs = [self._trained(each, one, rows, 0, same=False) for one in asked]
            if reason := self._too_few(jobs[0]):
                on = counted(jobs[0].rows, "row")
                self._warn(f"{self._data.name}: no {each.method} reference on {on}: {reason}")
                continue
            found.append((jobs[0], tuple(jobs[1:])))
        return found

    def _trained(self, spec: ReferenceSpec, seed: int, rows: int, draw: int, *, same: bool) -> ReferenceJob:
        method = make_method(spec.method, dict(spec.settings))
        facts = {
            "method": spec.method,
            **vars(method),
            "loop": asdict(loop_of(spec, seed)),
            "held_out": HELD_OUT,
            "model": model_identity(self._spec.model),
            "template": self._template.source,
            "data": subset_hash(self._data.train, rows, draw),
        }
        trained = _hash(facts)
        name = f"{self._data.name}-{spec.method}-{rows}-seed{seed}-{trained[:8]}"
        asked = {"reference": trained, "queries": self._data.queries.content_hash, "dtype": self._spec.dtype}
        return ReferenceJob(_hash(asked), self._data.name, spec, seed, rows, draw, same, name)

    def _kept(self, spec: ReferenceSpec) -> ReferenceJob:
        folder = Path(str(spec.folder))
        known = load_reference(folder)
        if set(known.labels) != set(self._labels):
            raise SpecError(f"the reference {folder} has other labels than {self._data.name}")
        for said in texts_learned_from([known], self._data.queries):
            self._warn(f"{self._data.name}: {said}")
        facts = {"folder": (folder / "manifest.json").read_text(encoding="utf-8"), "dtype": self._spec.dtype}
        key = _hash({**facts, "queries": self._data.queries.content_hash})
        return ReferenceJob(key, self._data.name, spec, known.seed, known.examples, 0, False, folder.name)

    def _too_few(self, job: ReferenceJob) -> str | None:
        try:
            trained, _ = split_for_training(self._data.train.subset(job.rows, seed=job.draw), HELD_OUT, seed=job.seed)
        except TrainingError as error:
            return str(error)
        missing = len(self._labels) - len(set(trained.answers))
        return f"{counted(missing, 'label')} would have no example to learn from" if missing else None

    def _budgets(self) -> list[int]:
        least, text = self.least_budget()
        kept = [budget for budget in self._spec.budgets if budget >= least]
        if few := [budget for budget in self._spec.budgets if budget < least]:
            self.warnings.append(
                f"{self._data.name}: left out the budget of {joined([f'{budget:,}' for budget in few])} tokens: the "
                f"instruction, the longest query and the longest label have {least:,} ({text[:40]!r} ...)"
            )
        return sorted(kept)

    def least_budget(self) -> tuple[int, str]:
        encoded = EncodedTemplate.build(self._template, load_tokenizer(self._spec.model), self._labels)
        lengths = [len(query) for query in encoded.queries(self._data.queries.texts)]
        place = int(np.argmax(lengths))
        longest = max(len(word) for word in encoded.label_words())
        return len(encoded.head) + lengths[place] + longest, self._data.queries.texts[place]


def search_queries(spec: SweepSpec, ask: Ask) -> int:
    """Most prompts that the search of this ask may try."""
    return spec.search_queries or SEARCH_QUERIES[LEVELS[ask.optimisation or ""]]


def loop_of(spec: ReferenceSpec, seed: int) -> LoopSettings:
    """How a reference is trained, as the trainer wants it."""
    rate = spec.learning_rate or make_method(spec.method, dict(spec.settings)).learning_rate
    return LoopSettings(epochs=spec.epochs, batch_size=spec.batch_size, learning_rate=rate, seed=seed)


class Cost(NamedTuple):
    """What is still to be computed, in tokens: by the frozen model, and in training, backward passes included.

    Attributes:
        search_prompts: how many of the prompts are those of searches, at most.
    """

    prompts: float
    training: float
    search_prompts: int


def estimate(spec: SweepSpec, data: dict[str, Loaded], jobs: list[Job], trained: set[str]) -> Cost:
    """Tokens that the jobs need: of prompts as long as their settings let them, of references not yet `trained`."""
    template = Template.from_name(spec.template or DEFAULT_TEMPLATES["classification"])
    prompts = training = 0.0
    search_prompts = 0
    for name, loaded in data.items():
        encoded = EncodedTemplate.build(template, load_tokenizer(spec.model), loaded.train.labels)
        sample = loaded.train.subset(min(200, len(loaded.train)), seed=0)
        shot = float(np.diff(encode_pool(encoded, sample).offsets).mean())
        head = len(encoded.head)
        query = float(np.mean([len(each) for each in encoded.queries(loaded.queries.texts)]))
        references: dict[str, ReferenceJob] = {}
        for ask, rows in jobs:
            if ask.dataset != name:
                continue
            for row in rows:
                references |= {each.key: each for each in (row.reference, row.second) if each is not None}
            if ask.budget is not None:
                room = max(0.0, (ask.budget or 0) - head - query)
                most = ask.n if ask.shots in ("fit", SEARCHED) else min(int(ask.shots or 0), ask.n or 0)
                held_out = min(QUERIES, ask.n or 0) if ask.calibrates else 0
                searched = search_queries(spec, ask) if ask.searches else 0
                search_prompts += searched
                asked = len(loaded.queries) + held_out + searched
                prompts += asked * (head + query + min(room, (most or 0) * shot))
            elif ask.series == "zero shots":
                prompts += len(loaded.queries) * (head + query)
        for reference in references.values():
            if reference.key in trained:
                continue
            prompts += len(loaded.queries) * (head + query)
            if reference.spec.folder is None:
                training += 3 * reference.spec.epochs * reference.rows * (head + shot)
    return Cost(prompts, training, search_prompts)


@cache
def model_identity(name: str) -> str:
    """What a model is, beside its name: the version of its package, its revision, or a hash of its files."""
    if name in EMBEDDED:
        return f"{name}=={EMBEDDED[name].package_version}"
    folder = Path(name)
    if name == "echo":
        return name
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(locate(name), "config.json")
    return f"{name}@{Path(found).parent.name}" if isinstance(found, str) else name


@cache
def subset_hash(data: Dataset, n: int, seed: int) -> str:
    """The content of the nested subset of `n` rows."""
    return data.subset(n, seed=seed).content_hash


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
