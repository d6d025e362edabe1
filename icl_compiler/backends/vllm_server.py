"""A frozen model behind a vLLM server, over its OpenAI-compatible API.

- One token is generated per question, and the log-probabilities of chosen tokens come with it (`logprob_token_ids`);
  `label_walk.py` says which questions score label words of any length. Never `prompt_logprobs` or `echo`: with those
  vLLM leaves its prefix cache aside and computes every prompt anew.
- The first question about a prompt is asked alone. Once it is answered the prompt is in the prefix cache; all others
  about it follow at once, the small ones many to a request (`group_questions`).
- Whatever the number of prompts, only those are written out that are on their way (`patient_http.py`).
- A server that does not know `logprob_token_ids` gives its 20 likeliest tokens; scores are then bounds.
- vLLM tells how many tokens came from its cache for the last prompt of a request only. The others of that request
  begin with the same tokens, and are counted alike.
"""

import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from icl_compiler.backends.label_walk import Answer, LabelWalk, Question, answer_from_top
from icl_compiler.backends.patient_http import Json, PatientClient, RefusedError, Run
from icl_compiler.errors import BackendError, ICLError, ModelError
from icl_compiler.models import locate
from icl_compiler.tokenizer import TokenIds

_COMPLETIONS = "/v1/completions"
_MOST_IDS = 128  # that vLLM takes for one question
_MOST_TOP = 20  # that vLLM gives, unless it was started to give more
_ROUNDING = 1e-3
_TOKEN = "token_id:"
# In full: a server takes what is left out from the model's generation_config.json.
_PLAIN_SAMPLING: Json = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


def group_questions(
    questions: Sequence[Question], *, most_ids: int = 16, most_prompts: int = 32
) -> list[tuple[int, ...]]:
    """Which questions about one prompt go into one request, by their number.

    The prompts of a request share one list of ids. The first question stands alone, and so does each that asks for
    more than `most_ids`; the others are put together as long as they ask for `most_ids` different tokens at most.

    >>> walk = LabelWalk.build([[5, 7, 1], [6, 8, 1], [9, 1]], ids_per_question=128)
    >>> [question.ids for question in walk.questions]
    [(5, 6, 9), (7,), (1,), (8,), (1,), (1,)]
    >>> group_questions(walk.questions)
    [(0,), (2, 4, 5, 1, 3)]
    >>> group_questions(walk.questions, most_ids=1)
    [(0,), (2, 4, 5), (1,), (3,)]
    """
    alone = [n for n, question in enumerate(questions) if n == 0 or len(question.ids) > most_ids]
    often = Counter(question.ids for question in questions)
    rest = sorted(set(range(len(questions))) - set(alone), key=lambda n: (-often[questions[n].ids], questions[n].ids))
    groups: list[tuple[list[int], set[int]]] = []
    for n in rest:
        for members, ids in groups:
            if len(members) < most_prompts and len(ids.union(questions[n].ids)) <= most_ids:
                members.append(n)
                ids.update(questions[n].ids)
                break
        else:
            groups.append(([n], set(questions[n].ids)))
    return [*((n,) for n in alone), *(tuple(members) for members, _ in groups)]


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
        self._served, self.max_prompt_tokens = self._choose_model()
        self.device = f"{self._software()} at {self._client.server}"
        self._ability: _Ability | None = None
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
        walk = LabelWalk.build(label_words, ids_per_question=_MOST_IDS)
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
            lower[row], upper[row] = walk.scores(answers)
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
        drawn = samples if temperature > 0 else 1  # the likeliest token is always the same
        settings = {
            "max_tokens": max_new_tokens, "n": drawn, "temperature": temperature, "logprobs": 0,
            "ignore_eos": True, "stop_token_ids": end if len(end) == 1 else [],
        }  # fmt: skip
        run: Run[tuple[int, Json]] = Run(self._client, len(prompts))

        def draw(row: int) -> tuple[int, Json]:
            return row, self._complete(run, {**settings, "prompt": _plain(prompts[row]), "seed": seed_of(seed, row)})

        items: list[list[Generation]] = [[] for _ in prompts]
        computed = 0
        for row, reply in run.results((partial(draw, row) for row in range(len(prompts))), deque()):
            with self._sense():
                found = [until(end, *_drawn(choice)) for choice in _choices(reply, drawn)]
                # The last token of each sample is drawn, but never read.
                computed += _computed(reply, [len(prompts[row])]) + reply["usage"]["completion_tokens"] - drawn
            items[row] = found * (samples // drawn)
            run.finished += 1
            if progress is not None:
                progress(1)
        usage = Usage(sum(len(prompt) for prompt in prompts), computed, len(prompts) * drawn)
        return Generations([item for found in items for item in found], usage)

    def _answers(
        self, queries: "Iterable[_Query]", ability: "_Ability", run: "Run[_Told]"
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

    def _ask(
        self, run: "Run[_Told]", ability: "_Ability", row: int, query: "_Query", group: tuple[int, ...]
    ) -> "_Told":
        """One request: the questions of a group about one prompt."""
        questions = [query.walk.questions[n] for n in group]
        prompts = [[*query.prompt, *question.suffix] for question in questions]
        ids = sorted({token for question in questions for token in question.ids})
        wanted = {"logprobs": len(ids), "logprob_token_ids": ids} if ability.exact else {"logprobs": ability.top}
        reply = self._complete(run, {"prompt": prompts, "max_tokens": 1, "temperature": 0, **wanted})
        with self._sense():
            tops = [_top(choice) for choice in _choices(reply, len(prompts))]
            answers = {n: ability.answer(query.walk.questions[n], top) for n, top in zip(group, tops, strict=True)}
            computed = _computed(reply, [len(prompt) for prompt in prompts])
        return _Told(row, answers, Usage(0, computed, len(prompts)))

    def _probe(self, run: "Run[_Told]", prompts: Sequence[TokenIds]) -> "tuple[_Ability, Usage]":
        """What the server can answer, and what it cost to find out the first time."""
        usage = Usage(0, 0, 0)
        with self._probing:
            if self._ability is None and len(prompts):
                self._ability, requests = self._examine(run, _plain(prompts[0][:1]))
                usage = Usage(0, requests, requests)
            return self._ability or _Ability(0), usage

    def _examine(self, run: "Run[_Told]", prompt: list[int]) -> "tuple[_Ability, int]":
        """Whether the server tells what it is asked for, and how many requests that took.

        A server that ignores the ids tells one token, the likeliest. One that heeds them tells the asked one too; of
        two tokens at least one is not the likeliest.
        """
        requests = 0
        ask = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        with suppress(RefusedError):
            for token in (0, 1):
                requests += 1
                top = self._only_top(run, {**ask, "logprobs": 1, "logprob_token_ids": [token]})
                if token not in top:
                    break
                if len(top) > 1:
                    return _Ability(0), requests
        count = _MOST_TOP
        while True:
            requests += 1
            try:
                return _Ability(min(count, len(self._only_top(run, {**ask, "logprobs": count})))), requests
            except RefusedError as refusal:
                smaller = [int(number) for number in re.findall(r"\d+", str(refusal)) if 0 < int(number) < count]
                if not smaller:
                    raise
                count = smaller[-1]

    def _only_top(self, run: "Run[_Told]", body: Json) -> dict[int, float]:
        reply = self._complete(run, body)
        with self._sense():
            return _top(_choices(reply, 1)[0])

    def _complete(self, run: "Run[_Told] | Run[tuple[int, Json]]", body: Json) -> Json:
        common = {"model": self._served, "add_special_tokens": False, "return_tokens_as_token_ids": True}
        return run.post(_COMPLETIONS, {**common, **_PLAIN_SAMPLING, **body})

    def _require_fit(self, prompts: Sequence[TokenIds], more: int) -> None:
        require_fit(prompts, more, model=self.model, max_prompt_tokens=self.max_prompt_tokens)

    def _choose_model(self) -> tuple[str, int]:
        """The server's own name of the model, and the length of its context."""
        reply = self._client.get("/v1/models")
        with self._sense():
            served = [(card["id"], card.get("root"), card.get("max_model_len")) for card in reply["data"]]
        wanted = [self.model]
        if self.model not in {name for card in served for name in card[:2]}:
            with suppress(ICLError):  # a name that means something to the server only
                wanted.append(locate(self.model))
        for name, root, length in served:
            if name in wanted or root in wanted:
                if not isinstance(length, int):
                    raise BackendError(
                        f"the server at {self._client.server} does not tell the context of {name!r} (max_model_len); "
                        "expected a vLLM server"
                    )
                return name, length
        raise ModelError(
            f"the server at {self._client.server} has {', '.join(repr(name) for name, _, _ in served) or 'no model'}, "
            f"expected {self.model!r}; name what it has, or start another one: icl vllm {self.model} --port 8001"
        )

    def _software(self) -> str:
        with suppress(BackendError):
            return f"vLLM {self._client.get('/version').get('version', 'of unknown version')}"
        return "a server"

    @contextmanager
    def _sense(self) -> Iterator[None]:
        """While an answer is read: what is not as vLLM answers becomes an error with the server's address."""
        try:
            yield
        except _NoLogprobError as error:
            raise BackendError(
                f"the server at {self._client.server} gave log-probabilities that are none ({error}); check that the "
                "model's weights are complete, and that the server was started without --logprobs-mode"
            ) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BackendError(
                f"the server at {self._client.server} answered what no vLLM answers ({type(error).__name__}: {error})"
            ) from error


class _NoLogprobError(Exception):
    pass


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


class _Ability(NamedTuple):
    """What a server answers for: any token (`top` is 0), or its `top` likeliest ones."""

    top: int

    @property
    def exact(self) -> bool:
        return self.top == 0

    def groups(self, walk: LabelWalk) -> list[tuple[int, ...]]:
        return group_questions(walk.questions) if self.exact else group_questions(walk.questions, most_ids=1 << 30)

    def answer(self, question: Question, top: dict[int, float]) -> Answer:
        if not self.exact:
            return answer_from_top(question.ids, top, self.top)
        found = np.array([top[token] for token in question.ids])
        return Answer(found, found)


def _plain(ids: TokenIds) -> list[int]:
    return [int(token) for token in ids]


def _from_key(key: bytes) -> list[int]:
    found: list[int] = np.frombuffer(key, dtype=">u4").tolist()
    return found


def _choices(reply: Json, count: int) -> list[Json]:
    found: list[Json] = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
    if len(found) != count:
        raise ValueError(f"{len(found)} choices, expected {count}")
    return found


def _top(choice: Json) -> dict[int, float]:
    """Log-probability by token, of the first token generated."""
    found: Json = choice["logprobs"]["top_logprobs"][0]
    if not found:
        raise ValueError("no log-probabilities")
    return {_token(name): _logprob(value) for name, value in found.items()}


def _drawn(choice: Json) -> tuple[list[int], list[float]]:
    """The tokens generated, and their log-probabilities."""
    found: Json = choice["logprobs"]
    return [_token(name) for name in found["tokens"]], [_logprob(value) for value in found["token_logprobs"]]


def _token(name: str) -> int:
    """The number in `token_id:198`."""
    if not name.startswith(_TOKEN):
        raise ValueError(f"{name!r} is not written like {_TOKEN}198")
    return int(name.removeprefix(_TOKEN))


def _logprob(value: float | None) -> float:
    if value is None or not math.isfinite(value) or value > _ROUNDING:
        raise _NoLogprobError(f"{value}")
    return float(value)


def _computed(reply: Json, lengths: Sequence[int]) -> int:
    """Tokens of the prompts that did not come from the cache, of which the last one is always computed."""
    details: Json = reply["usage"].get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return sum(length - min(cached, length - 1) for length in lengths)
