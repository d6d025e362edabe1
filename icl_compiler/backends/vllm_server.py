"""A frozen model behind a vLLM server, over its OpenAI-compatible API.

- `vllm_protocol.py` says what is asked, and reads the answers; `patient_http.py` carries them.
- Whatever the number of prompts, only those are written out that are on their way.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import NamedTuple

import numpy as np

from icl_compiler.backends.backend import (
    Generation,
    Generations,
    LabelScores,
    Progress,
    SequenceScores,
    Usage,
    require_fit,
    require_pairs,
)
from icl_compiler.backends.continuations import seed_of, until
from icl_compiler.backends.label_walk import Answer, LabelWalk
from icl_compiler.backends.patient_http import PatientClient, Run
from icl_compiler.backends.vllm_protocol import (
    COMPLETIONS,
    Ability,
    Json,
    RefusedError,
    choices,
    choose_model,
    complete,
    computed,
    drawn,
    examination,
    label_walk,
    sense,
)
from icl_compiler.errors import BackendError, ModelError
from icl_compiler.tokenizer import TokenIds


class VLLMServerBackend:
    """A causal language model on a vLLM server that runs elsewhere; `icl vllm MODEL` starts one.

    Args:
        model: a name that the server uses, or what it loaded: an embedded model, a folder, a hub name.
        dtype: `auto` only; what the server computes in is settled when it starts.
        server: its URL.
        in_flight: most requests under way at once.
        timeout: seconds to wait for one answer.
        patience: seconds without any answer after which a run is given up.
        api_key: if not given, `VLLM_API_KEY` or `OPENAI_API_KEY` of the environment.

    Raises:
        ModelError: if the server does not have the model.
        BackendError: if no server answers, or it wants another key.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        *,
        server: str = "http://127.0.0.1:8000",
        in_flight: int = 16,
        timeout: float = 120.0,
        patience: float = 180.0,
        api_key: str | None = None,
    ) -> None:
        if dtype != "auto":
            raise ModelError(
                f"dtype {dtype!r} comes too late: a server computes in what it was started with. Leave it at 'auto' "
                f"here, and tell the server: icl vllm {model} --dtype {dtype}"
            )
        self.model = model
        self._client = PatientClient(
            server,
            key=api_key or os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY"),
            in_flight=in_flight,
            timeout=timeout,
            patience=patience,
            remedy=f"start one with `icl vllm {model}`, or give the URL of one that runs",
        )
        reply = self._client.get("/v1/models")
        with sense(self._client.server):
            self._served, self.max_prompt_tokens = choose_model(reply, model, server=self._client.server)
        self.device = f"{self._software()} at {self._client.server}"
        self._ability: Ability | None = None
        self._probing = Lock()

    def label_logprobs(
        self,
        prompts: Sequence[TokenIds],
        label_words: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> LabelScores:
        """Exact log-probability of every label word after every prompt, in nats; bounds where the server is old.

        Where a token has no probability at all, vLLM says -9999.

        Raises:
            ContextLengthError: if a prompt with its longest label word does not fit the model's context.
            BackendError: if the server is gone for too long, refuses, or answers nonsense.
        """
        walk = label_walk(label_words)
        self._require_fit(prompts, max(len(word) for word in label_words))
        keys = [np.asarray(prompt).astype(">u4").tobytes() for prompt in prompts]
        counts = Counter(keys)
        distinct = sorted(counts)  # big-endian bytes sort like the numbers: what is alike stands together
        run: Run[_Told] = Run(self._client, len(prompts))
        ability, usage = self._probe(run, prompts)
        groups = ability.groups(walk)
        queries = (_Query(_from_key(key), walk, groups) for key in distinct)
        lower, upper = np.empty((2, len(distinct), len(label_words)))
        for row, answers, cost in self._answers(queries, ability, run):
            lower[row], upper[row] = walk.scores(dict(enumerate(answers)))
            usage = usage.plus(cost)
            count = counts[distinct[row]]
            run.finished += count
            if progress is not None:
                progress(count)
        place = {key: row for row, key in enumerate(distinct)}
        rows = np.array([place[key] for key in keys], dtype=np.int64)
        usage = usage._replace(prompt_tokens=sum(len(prompt) for prompt in prompts))
        return LabelScores(lower[rows], usage, None if ability.exact else upper[rows])

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> SequenceScores:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, in nats: a question per token.

        Raises:
            ContextLengthError: if a prompt with its continuation does not fit the model's context.
            BackendError: as `label_logprobs`; and if a continuation is empty, or the server is too old to answer for
                every token.
        """
        require_pairs(prompts, continuations)
        for prompt, continuation in zip(prompts, continuations, strict=True):
            self._require_fit([prompt], len(continuation))
        run: Run[_Told] = Run(self._client, len(prompts))
        ability, usage = self._probe(run, prompts)
        queries = (
            _Query(_plain(prompt), walk, ability.groups(walk))
            for prompt, continuation in zip(prompts, continuations, strict=True)
            for walk in [LabelWalk.build([continuation], ids_per_question=1)]
        )
        scores = [np.empty(0)] * len(prompts)
        for row, answers, cost in self._answers(queries, ability, run):
            lower, upper = (np.concatenate(side) for side in zip(*answers, strict=True))
            if not np.array_equal(lower, upper):
                raise BackendError(
                    f"the server at {self._client.server} tells its {ability.top} likeliest tokens only, and a text to "
                    "score holds others; that takes a newer vLLM, one that knows logprob_token_ids"
                )
            scores[row] = lower
            usage = usage.plus(cost)
            run.finished += 1
            if progress is not None:
                progress(1)
        return SequenceScores(scores, usage._replace(prompt_tokens=sum(len(prompt) for prompt in prompts)))

    def generate(
        self,
        prompts: Sequence[TokenIds],
        terminator: TokenIds,
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """`samples` continuations of every prompt, up to `terminator`; temperature 0 takes the likeliest token.

        Each prompt has a seed of its own, so that its samples do not depend on its neighbours. The server stops at a
        terminator of one token; one of several tokens is found here, after `max_new_tokens`.

        Raises:
            ContextLengthError: if a prompt with `max_new_tokens` more does not fit the model's context.
            BackendError: as `label_logprobs`.
        """
        self._require_fit(prompts, max_new_tokens)
        end = _plain(terminator)
        distinct = samples if temperature > 0 else 1  # the likeliest token is always the same
        settings = {
            "max_tokens": max_new_tokens, "n": distinct, "temperature": temperature, "logprobs": 0,
            "ignore_eos": True, "stop_token_ids": end if len(end) == 1 else [],
        }  # fmt: skip
        run: Run[tuple[int, Json]] = Run(self._client, len(prompts))

        def draw(row: int) -> tuple[int, Json]:
            own = {"prompt": _plain(prompts[row]), "seed": seed_of(seed, row)}
            return row, run.post(COMPLETIONS, complete(self._served, {**settings, **own}))

        items: list[list[Generation]] = [[] for _ in prompts]
        tokens = 0
        for row, reply in run.results((partial(draw, row) for row in range(len(prompts))), deque()):
            with sense(self._client.server):
                found = [until(end, *drawn(choice)) for choice in choices(reply, distinct)]
                # The last token of each sample is drawn, but never read.
                tokens += computed(reply, [len(prompts[row])]) + reply["usage"]["completion_tokens"] - distinct
            items[row] = found * (samples // distinct)
            run.finished += 1
            if progress is not None:
                progress(1)
        usage = Usage(sum(len(prompt) for prompt in prompts), tokens, len(prompts) * distinct)
        return Generations([item for found in items for item in found], usage)

    def _answers(
        self, queries: "Iterable[_Query]", ability: Ability, run: "Run[_Told]"
    ) -> "Iterator[tuple[int, list[Answer], Usage]]":
        """The number of each query, the answers to all its questions and what they cost, as they come."""
        under_way: dict[int, _Progress] = {}
        urgent: deque[Callable[[], _Told]] = deque()

        def first_requests() -> Iterator[Callable[[], _Told]]:
            for row, query in enumerate(queries):
                under_way[row] = _Progress(query)
                yield partial(self._ask, run, ability, row, query, query.groups[0])

        for told in run.results(first_requests(), urgent):
            state = under_way[told.row]
            groups = state.query.groups
            if not state.answers:
                urgent.extend(partial(self._ask, run, ability, told.row, state.query, group) for group in groups[1:])
            state.answers |= told.answers
            state.usage = state.usage.plus(told.usage)
            if len(state.answers) == len(state.query.walk.questions):
                del under_way[told.row]
                yield told.row, [state.answers[n] for n in range(len(state.answers))], state.usage

    def _ask(self, run: "Run[_Told]", ability: Ability, row: int, query: "_Query", group: tuple[int, ...]) -> "_Told":
        """One request: the questions of a group about one prompt."""
        reply = run.post(COMPLETIONS, ability.ask(self._served, query.prompt, query.walk, group))
        with sense(self._client.server):
            told = ability.told(reply, query.prompt, query.walk, group)
        return _Told(row, told.answers, Usage(0, told.computed, told.prompts))

    def _probe(self, run: "Run[_Told]", prompts: Sequence[TokenIds]) -> tuple[Ability, Usage]:
        """What the server can answer, and what it cost to find out the first time."""
        usage = Usage(0, 0, 0)
        with self._probing:
            if self._ability is None and len(prompts):
                self._ability, requests = self._examine(run, _plain(prompts[0][:1]))
                usage = Usage(0, requests, requests)
            return self._ability or Ability(0), usage

    def _examine(self, run: "Run[_Told]", prompt: list[int]) -> tuple[Ability, int]:
        """What the server answers for, and how many requests it took to find out."""
        steps = examination(self._served, prompt)
        requests = 0
        body = next(steps)
        while True:
            requests += 1
            reply: Json | RefusedError
            try:
                reply = run.post(COMPLETIONS, body)
            except RefusedError as refusal:
                reply = refusal
            try:
                with sense(self._client.server):
                    body = steps.send(reply)
            except StopIteration as found:
                ability: Ability = found.value
                return ability, requests

    def _require_fit(self, prompts: Sequence[TokenIds], more: int) -> None:
        require_fit(prompts, more, model=self.model, max_prompt_tokens=self.max_prompt_tokens)

    def _software(self) -> str:
        with suppress(BackendError):
            return f"vLLM {self._client.get('/version').get('version', 'of unknown version')}"
        return "a server"


class _Query(NamedTuple):
    """A prompt, the questions about it, and which of them go together."""

    prompt: list[int]
    walk: LabelWalk
    groups: list[tuple[int, ...]]


class _Told(NamedTuple):
    """The answer to one request: to some of the questions of query `row`, by their numbers."""

    row: int
    answers: dict[int, Answer]
    usage: Usage


@dataclass
class _Progress:
    """What is known about a query of which some questions are answered."""

    query: _Query
    answers: dict[int, Answer] = field(default_factory=dict)
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))


def _from_key(key: bytes) -> list[int]:
    found: list[int] = np.frombuffer(key, dtype=">u4").tolist()
    return found


def _plain(ids: TokenIds) -> list[int]:
    return [int(token) for token in ids]
