"""A vLLM server, asked by many tasks at once: the law of the labels, or a text as it grows.

- What is asked is `backends/vllm_protocol.py`'s; here is only how it travels without a thread per question.
- A question about labels may be asked twice without harm, so it is asked again when the server is busy, gone or
  starting. A text is asked for again only as long as nothing of it has come.
- A task that is cancelled closes its connection, and vLLM then drops the request.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import httpx2
import numpy as np
from jaxtyping import Float

from icl_compiler.backends.backend import LabelScores, Usage
from icl_compiler.backends.label_walk import Answer, LabelWalk
from icl_compiler.backends.patient_http import BUSY, is_this_machine, read_json, refusal, said_by, said_in
from icl_compiler.backends.vllm_protocol import (
    COMPLETIONS,
    Ability,
    Json,
    RefusedError,
    choose_model,
    complete,
    examination,
    sense,
)
from icl_compiler.errors import BackendError

_CONNECT_S = 5.0
_KEEP_ALIVE_S = 2.0  # vLLM closes an idle connection after 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_MOST_ERRORS = 3  # 500s, of which one may be an engine about to end

T = TypeVar("T")
Observe = Callable[[Literal["ok", "retried", "failed"]], object]
"""Called with what became of a request."""


class UnreachableError(BackendError):
    """No vLLM server answers; it may again."""


class Scores(NamedTuple):
    """Log-probabilities of the label words after one prompt, in nats, and their cost."""

    lower: Float[np.ndarray, " labels"]
    upper: Float[np.ndarray, " labels"] | None
    """Where not all is known (only the likeliest labels were asked for, or the server tells only its likeliest tokens),
    upper bounds; `lower` are lower ones then, and equal where a label is known."""
    cached_tokens: int
    """Tokens of the prompt that the server had computed before."""
    computed_tokens: int
    """Tokens that it computed, for all questions."""


def averaged(parts: Sequence[Scores]) -> Scores:
    """The mean law of several prompts for one text, and what all of them cost; of bounds, bounds."""
    if len(parts) == 1:
        return parts[0]
    lower = np.array([part.lower for part in parts])
    upper = np.array([part.lower if part.upper is None else part.upper for part in parts])
    bounded = any(part.upper is not None for part in parts)
    mean = LabelScores(lower, Usage(0, 0, 0), upper if bounded else None).averaged(len(parts))
    return Scores(
        mean.logprobs[0],
        None if mean.upper is None else mean.upper[0],
        sum(part.cached_tokens for part in parts),
        sum(part.computed_tokens for part in parts),
    )


class Upstream:
    """One vLLM server.

    Args:
        url: with or without `/v1` at the end.
        key: sent as a bearer token.
        connections: most requests under way at once.
        timeout_s: longest wait for an answer, or for the next part of a text.
        patience_s: how long a request is tried again before the server counts as gone.
        observe: told what becomes of each request.

    Raises:
        BackendError: if `url` is no URL.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connections: int = 64,
        timeout_s: float = 120.0,
        patience_s: float = 10.0,
        observe: Observe = lambda _: None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience_s = patience_s
        self._observe = observe
        with suppress(httpx2.InvalidURL):
            parsed = httpx2.URL(self.url)
            if parsed.scheme in ("http", "https") and parsed.host:
                self._client = httpx2.AsyncClient(
                    base_url=parsed,
                    headers={"Authorization": f"Bearer {key}"} if key else {},
                    timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_S, pool=None),
                    limits=httpx2.Limits(
                        max_connections=connections,
                        max_keepalive_connections=connections,
                        keepalive_expiry=_KEEP_ALIVE_S,
                    ),
                    trust_env=not is_this_machine(parsed.host),
                )
                return
        raise BackendError(f"{url!r} is no URL of a server; expected one like http://127.0.0.1:8000")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def alive(self) -> bool:
        """Whether the server says that it can answer."""
        with suppress(httpx2.RequestError):
            return (await self._client.get("/health", timeout=_CONNECT_S)).is_success
        return False

    async def engine(self, model: str) -> "Engine":
        """The base model `model` on this server.

        Raises:
            ModelError: if the server does not have it.
            UnreachableError: if it does not answer, or is not ready.
            BackendError: if the server does not answer as vLLM does.
        """
        try:
            response = await self._client.get("/v1/models", timeout=_CONNECT_S)
        except httpx2.RequestError as error:
            raise UnreachableError(f"no server answers at {self.url} ({said_by(error)})") from error
        if response.status_code in BUSY:
            raise UnreachableError(str(refusal(response)))
        if not response.is_success:
            raise refusal(response)
        with sense(self.url):
            served, most = choose_model(read_json(response), model, server=self.url)
        return Engine(self, model, served, most, await self._examine(served))

    async def _examine(self, served: str) -> Ability:
        steps = examination(served, [0])
        body = next(steps)
        while True:
            reply: Json | RefusedError
            try:
                reply = await self.ask(body)
            except RefusedError as refused:
                reply = refused
            try:
                with sense(self.url):
                    body = steps.send(reply)
            except StopIteration as found:
                ability: Ability = found.value
                return ability

    async def ask(self, body: Json) -> Json:
        """The answer to `body`, which must be harmless to ask twice.

        Raises:
            RefusedError: if the server will not answer this.
            UnreachableError: if it answers nothing for too long.
        """
        async with self._patiently(body, stream=False) as response:
            return read_json(response)

    async def stream(self, body: Json) -> AsyncGenerator[Json, None]:
        """The events of a text as it grows; errors as `ask`.

        Raises:
            UnreachableError: also if the server vanishes in the middle.
        """
        async with self._patiently({**body, "stream": True}, stream=True) as response:
            kind = response.headers.get("Content-Type", "")
            if not kind.startswith("text/event-stream"):
                raise BackendError(
                    f"the server at {self.url} answered {kind or 'no type'}, expected events; is it a vLLM server?"
                )
            ended = False
            try:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        data = line.removeprefix("data:").strip()
                        if data == "[DONE]":
                            ended = True
                            break
                        with sense(self.url):
                            event = json.loads(data)
                            if "error" in event:
                                raise BackendError(f"the server at {self.url} broke off: {event['error']}")
                        yield event
            except httpx2.RequestError as error:
                raise UnreachableError(f"the server at {self.url} vanished ({said_by(error)})") from error
            if not ended:
                raise UnreachableError(f"the server at {self.url} ended in the middle of a text")

    @asynccontextmanager
    async def _patiently(self, body: Json, *, stream: bool) -> AsyncIterator[httpx2.Response]:
        """An answer that is a success, read to its end unless it is a stream."""
        until = time.monotonic() + self._patience_s
        pause, errors = _FIRST_PAUSE_S, 0
        while True:
            request = self._client.build_request("POST", COMPLETIONS, json=body)
            try:
                response = await self._client.send(request, stream=stream)
                if not response.is_success:
                    await response.aread()
            except httpx2.RequestError as error:
                problem, least = said_by(error), 0.0
            else:
                try:
                    if response.is_success:
                        self._observe("ok")
                        yield response
                        return
                    errors += response.status_code >= 500 and response.status_code not in BUSY
                    if (response.status_code < 500 and response.status_code not in BUSY) or errors == _MOST_ERRORS:
                        self._observe("failed")
                        raise refusal(response)
                    problem = f"{response.status_code}: {said_in(response)}"
                    named = response.headers.get("Retry-After", "")
                    least = float(named) if named.isdecimal() else 0.0
                finally:
                    await response.aclose()
            wait = max(least, pause * random.uniform(0.5, 1))
            if time.monotonic() + wait > until:
                self._observe("failed")
                raise UnreachableError(f"the server at {self.url} does not answer ({problem})")
            self._observe("retried")
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class Engine:
    """A base model on a vLLM server.

    Attributes:
        model: its name as programs say it.
        served: its name as the server says it.
        max_prompt_tokens: the length of its context.
        ability: what the server answers for.
    """

    upstream: Upstream
    model: str
    served: str
    max_prompt_tokens: int
    ability: Ability

    async def label_logprobs(
        self, prompt: list[int], walk: LabelWalk, groups: Sequence[tuple[int, ...]], *, top: int | None = None
    ) -> Scores:
        """The log-probability of every label word after `prompt`; `groups` are the requests, from `Ability.groups`.

        The first request is answered before the others are made, since it puts the prompt into the server's cache.

        Args:
            top: how many of the likeliest labels have to be exact; `None` for all. The others then have bounds, and
                most of the questions about them are never asked.
        """
        answers: dict[int, Answer] = {}
        computed = 0

        async def ask(group: tuple[int, ...]) -> int:
            nonlocal computed
            reply = await self.upstream.ask(self.ability.ask(self.served, prompt, walk, group))
            with sense(self.upstream.url):
                told = self.ability.told(reply, prompt, walk, group)
                most = sum(len(prompt) + len(walk.questions[n].suffix) for n in group)
                if told.computed not in range(most + 1):
                    raise ValueError(f"{told.computed} tokens were computed, expected up to {most}")
            answers.update(told.answers)
            computed += told.computed
            return told.computed

        first = await ask(groups[0])
        if top is None:
            await together([ask(group) for group in groups[1:]])
        else:
            while numbers := walk.open(answers, top):
                await together([ask(group) for group in self.ability.groups_of(walk, numbers)])
        lower, upper = walk.scores(answers)
        whole = self.ability.exact and len(answers) == len(walk.questions)
        return Scores(lower, None if whole else upper, len(prompt) - first, computed)

    def generate(self, prompt: list[int], settings: Json) -> AsyncGenerator[Json, None]:
        """The events of one or several texts after `prompt`, at temperature 1 unless `settings` say otherwise."""
        told = {"return_tokens_as_token_ids": False, "stream_options": {"include_usage": True}}
        return self.upstream.stream(complete(self.served, {"prompt": prompt, **told, **settings}))


async def together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once; what each returns, in order. The first error cancels the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
