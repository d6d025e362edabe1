"""What a variant costs on held-out queries: rows of the pool, each asked without itself, or of validation data.

- The queries are the same for all variants, in one random order, so that differences between variants are paired.
- Labels: log-loss of the right label, or the total variation to a reference; after a calibration that is fitted
  without the query. By default that is the mixture of model and votes, so that a prompt is judged by what it adds to
  the neighbours (after the product, which comes nearer, prompts hardly differ). Below ten queries nothing is fitted,
  the law is renormalised only.
- Targets: negative log-likelihood of the target, or whether greedy decoding misses it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from icl_compiler.backends.backend import Backend, LabelScores, Progress, Usage
from icl_compiler.calibration.calibrating import WITH_VOTERS, held_out_data, require_same_labels, with_voters
from icl_compiler.calibration.choosing import LEAST_QUERIES, cross_validated
from icl_compiler.calibration.held_out import HeldOut
from icl_compiler.calibration.law import Evidence, softmax
from icl_compiler.calibration.votes import Voters
from icl_compiler.data import Dataset
from icl_compiler.optimise.racing import OutOfTime
from icl_compiler.optimise.score_log import Answer, ScoreLog
from icl_compiler.optimise.variants import Variant
from icl_compiler.predictor import Predictor
from icl_compiler.program import Program
from icl_compiler.tokenizer import TokenIds

CHUNK = 32
"""Prompts that are asked about, and kept, at once."""
_THEN = -1  # between a prompt and its target, in the log: no token

Metric = Literal["likelihood", "exact-match"]
METRICS: dict[Metric, str] = {
    "likelihood": "negative log-likelihood of the target, nats per token",
    "exact-match": "share of targets missed",
}


@runtime_checkable
class Judge(Protocol):
    """Gives the losses of variants on held-out queries."""

    @property
    def risk(self) -> str:
        """What the mean of the losses is, in words."""

    @property
    def rows(self) -> Int64[np.ndarray, " queries"]:
        """The queries: rows of the pool, or of the validation data, in the order in which they are asked."""

    def losses(self, variant: Variant, program: Program, queries: int) -> Float[np.ndarray, " queries"]:
        """The loss of each of the first `queries` queries.

        Raises:
            OutOfTime: if the time is up before all of them were asked.
        """

    def likelihoods(
        self, program: Program, prompts: Sequence[TokenIds], rows: Int64[np.ndarray, " prompts"]
    ) -> Float[np.ndarray, " prompts"]:
        """The log-probability of the right answer of these rows of the pool, in nats, behind these prompts.

        Raises:
            OutOfTime: if the time is up before all of them were asked.
        """


class Asker:
    """Asks the model, through a log, until a deadline.

    Args:
        deadline: of `time.monotonic`, in seconds; an attribute too, which may be moved.
        progress: called with the number of prompts that are new to this search.
    """

    def __init__(
        self, backend: Backend, log: ScoreLog, *, deadline: float = float("inf"), progress: Progress | None = None
    ) -> None:
        self.backend = backend
        self.log = log
        self.deadline = deadline
        self._progress = progress

    def ask(
        self, about: str, prompts: Sequence[TokenIds], ask: Callable[[list[TokenIds]], list[Answer]]
    ) -> list[Answer]:
        """The answers of the log, and of the model where it has none.

        Raises:
            OutOfTime: if the deadline passed; what was asked before it is in the log.
        """
        found: list[Answer] = []
        for first in range(0, len(prompts), CHUNK):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            before = self.log.asked
            identity = f"{self.backend.model}, {self.backend.device}, {about}"
            found += self.log.answers(identity, prompts[first : first + CHUNK], ask)
            if self._progress is not None:
                self._progress(self.log.asked - before)
        return found


class LabelJudge:
    """Log-loss of the right labels, or total variation to a reference.

    Args:
        calibration: name of the calibration after which a variant is judged.
        reference: whose law is to be approximated, in place of the right labels.
        validation: data whose rows are asked, in place of the pool's.
    """

    def __init__(
        self,
        asker: Asker,
        program: Program,
        rows: Int64[np.ndarray, " queries"],
        *,
        calibration: str = "mixture",
        reference: Predictor | None = None,
        validation: Dataset | None = None,
    ) -> None:
        require_same_labels(program, reference)
        data = held_out_data(program, validation)
        self.rows = rows
        self.risk = "log-loss" if reference is None else "TV to the reference"
        self._asker = asker
        self._calibration = calibration
        self._reference = reference
        self._program = with_voters(_without_shots(program)) if calibration in WITH_VOTERS else None
        self._labels = program.labels
        self._texts = [data.texts[row] for row in rows.tolist()]
        number = {label: i for i, label in enumerate(program.labels)}
        self._right = np.array([number[data.answers[row]] for row in rows.tolist()], dtype=np.int64)
        self._of_pool = validation is None
        self._answers: dict[Variant, list[Answer]] = {}
        self._voters: list[Voters] = []
        self._targets: list[Float[np.ndarray, "some labels"]] = []

    def asked(self, variant: Variant) -> int:
        """How many of the queries the variant was asked."""
        return len(self._answers.get(variant, []))

    def losses(self, variant: Variant, program: Program, queries: int) -> Float[np.ndarray, " queries"]:
        """See `Judge`."""
        held_out = self.held_out(variant, program, queries)
        name = self._calibration if queries >= LEAST_QUERIES or self._calibration == "none" else "normalise"
        validated = cross_validated(held_out, name) or cross_validated(held_out, "normalise")
        assert validated is not None, "normalise needs nothing"
        return validated.risks

    def held_out(self, variant: Variant, program: Program, queries: int) -> HeldOut:
        """What the model, the other rows and the reference say of the first `queries` queries.

        Raises:
            OutOfTime: if the time is up before all of them were asked.
        """
        answers = self._answered(variant, program, queries)
        logprobs, upper = _bounds(answers)
        self._complete(queries)
        voters = Voters.joined(self._voters).take(np.arange(queries)) if self._voters else None
        reference = np.concatenate(self._targets)[:queries] if self._targets else None
        evidence = Evidence(logprobs, upper, voters)
        return HeldOut(self.rows[:queries], self._right[:queries], evidence, reference=reference, of_pool=self._of_pool)

    def _complete(self, queries: int) -> None:
        """Ask neighbours and reference about the first `queries` queries: that is the same for all variants."""
        known = sum(len(part.labels) for part in self._voters)
        if self._program is not None and known < queries:
            prompts = self._program.prompts(self._texts[known:queries])
            self._voters += [prompt.voters for prompt in prompts if prompt.voters is not None]
        known = sum(len(part) for part in self._targets)
        if self._reference is not None and known < queries:
            said = self._reference.predict(self._texts[known:queries])
            order = [said.labels.index(label) for label in self._labels]
            self._targets.append(said.probabilities[:, order])

    def likelihoods(
        self, program: Program, prompts: Sequence[TokenIds], rows: Int64[np.ndarray, " prompts"]
    ) -> Float[np.ndarray, " prompts"]:
        """See `Judge`; among the labels, as every calibration takes it."""
        logprobs, upper = _bounds(self._ask(program, prompts))
        right = [program.labels.index(program.pool.data.answers[row]) for row in rows.tolist()]
        likelihoods: Float[np.ndarray, " prompts"] = np.log(softmax(Evidence(logprobs, upper).middle))[
            range(len(right)), right
        ]
        return likelihoods

    def _ask(self, program: Program, prompts: Sequence[TokenIds]) -> list[Answer]:
        words = program.label_words

        def ask(new: list[TokenIds]) -> list[Answer]:
            scores = self._asker.backend.label_logprobs(new, words)
            if scores.upper is None:
                return [[row] for row in scores.logprobs.tolist()]
            return [list(bounds) for bounds in zip(scores.logprobs.tolist(), scores.upper.tolist(), strict=True)]

        return self._asker.ask(f"labels {words}", prompts, ask)

    def _answered(self, variant: Variant, program: Program, queries: int) -> list[Answer]:
        known = self._answers.setdefault(variant, [])
        while len(known) < queries:
            texts = self._texts[len(known) : min(queries, len(known) + CHUNK)]
            sets, count = program.prompt_sets(texts), program.settings.ensembles
            answers = self._ask(program, [prompt.tokens for prompts in sets for prompt in prompts])
            known += _averaged(answers, count)
        return known[:queries]


class TargetJudge:
    """How likely the right targets are, or how often greedy decoding misses them."""

    def __init__(
        self,
        asker: Asker,
        program: Program,
        rows: Int64[np.ndarray, " queries"],
        metric: Metric = "likelihood",
        *,
        validation: Dataset | None = None,
    ) -> None:
        self.rows = rows
        self.risk = METRICS[metric]
        self._asker = asker
        self._score = self._likelihoods if metric == "likelihood" else self._misses
        data = held_out_data(program, validation)
        self._texts = [data.texts[row] for row in rows.tolist()]
        self._targets = [data.answers[row] for row in rows.tolist()]
        self._losses: dict[Variant, list[float]] = {}

    def losses(self, variant: Variant, program: Program, queries: int) -> Float[np.ndarray, " queries"]:
        """See `Judge`."""
        known = self._losses.setdefault(variant, [])
        while len(known) < queries:
            part = slice(len(known), min(queries, len(known) + CHUNK))
            prompts = [prompt.tokens for prompt in program.prompts(self._texts[part])]
            words = program.template.answers(self._targets[part])
            pairs = [[*prompt, _THEN, *word] for prompt, word in zip(prompts, words, strict=True)]
            known += [answer[0][0] for answer in self._score(program, pairs)]
        return np.array(known[:queries])

    def likelihoods(
        self, program: Program, prompts: Sequence[TokenIds], rows: Int64[np.ndarray, " prompts"]
    ) -> Float[np.ndarray, " prompts"]:
        """See `Judge`; per token of the target."""
        words = program.template.answers([program.pool.data.answers[row] for row in rows.tolist()])
        pairs = [[*prompt, _THEN, *word] for prompt, word in zip(prompts, words, strict=True)]
        return -np.array([answer[0][0] for answer in self._likelihoods(program, pairs)])

    def _likelihoods(self, program: Program, pairs: list[list[int]]) -> list[Answer]:
        def ask(new: list[TokenIds]) -> list[Answer]:
            prompts, words = _parted(new)
            scores = self._asker.backend.sequence_logprobs(prompts, words)
            return [[[-float(logprobs.mean())]] for logprobs in scores.logprobs]

        return self._asker.ask("targets", pairs, ask)

    def _misses(self, program: Program, pairs: list[list[int]]) -> list[Answer]:
        end = program.template.terminator_ids

        def ask(new: list[TokenIds]) -> list[Answer]:
            prompts, words = _parted(new)
            longest = max(len(word) for word in words)  # who says more has missed
            found = self._asker.backend.generate(prompts, end, max_new_tokens=longest, temperature=0.0)
            decode = program.template.tokenizer.decode
            return [
                [[float(not item.finished or decode(item.tokens).strip() != decode(word).strip())]]
                for item, word in zip(found.items, words, strict=True)
            ]

        return self._asker.ask(f"greedy, to {end}", pairs, ask)


def _averaged(answers: list[Answer], prompts: int) -> list[Answer]:
    """Of each `prompts` answers that follow one another, the answer of their mean law."""
    if prompts == 1:
        return answers
    logprobs, upper = _bounds(answers)
    mean = LabelScores(logprobs, Usage(0, 0, 0), upper).averaged(prompts)
    parts = [mean.logprobs] if mean.upper is None else [mean.logprobs, mean.upper]
    return [[part[query].tolist() for part in parts] for query in range(len(mean.logprobs))]


def _bounds(
    answers: Sequence[Answer],
) -> tuple[Float[np.ndarray, "queries labels"], Float[np.ndarray, "queries labels"] | None]:
    """Log-probabilities and, of an engine that gives bounds, upper ones."""
    upper = np.array([answer[1] for answer in answers]) if len(answers[0]) > 1 else None
    return np.array([answer[0] for answer in answers]), upper


def _parted(pairs: Sequence[TokenIds]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and targets."""
    found = [(list(pair), list(pair).index(_THEN)) for pair in pairs]
    return [pair[:at] for pair, at in found], [pair[at + 1 :] for pair, at in found]


def _without_shots(program: Program) -> Program:
    return replace(program, settings=replace(program.settings, shots=0, ensembles=1), blocks=None)
