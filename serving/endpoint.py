"""The endpoint without HTTP: programs by name, queries answered, corrections taken.

A query goes through three stages, and each answer says how long they took:

- *retrieve*: its prompt is made, in batches, on one thread (`preparing.py`);
- *queue*: it waits for its turn (`line.py`), which is refused at once if too many do already;
- *model*: the engine answers (`upstream.py`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from icl_compiler.backends.vllm_protocol import Json, sense
from icl_compiler.corrections import Flag, require_label
from icl_compiler.errors import BackendError, ICLError, ModelError
from icl_compiler.explanation import Explanation
from icl_compiler.feedback import Correction, FeedbackStore
from icl_compiler.predictor import Predictor
from icl_compiler.program import Prompt
from icl_compiler.registry import did_you_mean
from serving.drift import Baseline, DriftMonitor, Shadow
from serving.line import Line
from serving.live import Edition, LiveProgram
from serving.metrics import Metrics, Stage
from serving.openai_api import RequestError
from serving.preparing import Preparer
from serving.upstream import Engine, Scores, UnreachableError, Upstream, averaged, together
from serving.versions import Versions

_NEW_TOKENS = 256
_MOST = 1e9  # beyond it no number in an engine's answer makes sense
_STAGES: tuple[Stage, ...] = ("retrieve", "queue", "model")


@dataclass(frozen=True)
class Limits:
    """How much the endpoint takes on.

    Attributes:
        in_flight: most queries that the engine is asked about at once.
        waiting: most queries that wait for that.
        deadline_s: longest time for a request.
        body_bytes: longest request.
    """

    in_flight: int = 32
    waiting: int = 256
    deadline_s: float = 60.0
    body_bytes: int = 1 << 20


class Timing(NamedTuple):
    """Seconds in each stage."""

    retrieve_s: float
    queue_s: float
    model_s: float


class Labelled(NamedTuple):
    """The law of the answer to one query, and what it cost.

    Attributes:
        probabilities: of the labels of the edition; lower bounds where `upper` is given.
        prompts: one, or those whose laws were averaged.
        sampled: whether the query is in the sample that a reference is asked too.
    """

    probabilities: Float[np.ndarray, " labels"]
    upper: Float[np.ndarray, " labels"] | None
    prompts: tuple[Prompt, ...]
    scores: Scores
    timing: Timing
    sampled: bool

    @property
    def best(self) -> int:
        """The number of the likeliest label."""
        return int(self.probabilities.argmax())

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def other(self) -> float:
        """The probability of everything that is no label."""
        return float(np.clip(1 - self.probabilities.sum(), 0, 1))


class Piece(NamedTuple):
    """A part of a generated text; the last one has the cost and no text."""

    choice: int
    text: str
    finish: str | None
    logprobs: Json | None
    usage: Json | None


class _Watch(NamedTuple):
    """What looks at the queries of one version of a program."""

    version: str
    monitor: DriftMonitor
    shadow: Shadow | None

    def observe(self, edition: Edition, prompt: Prompt, probabilities: Float[np.ndarray, " labels"]) -> None:
        """Look for drift; `probabilities` of none where a text is generated."""
        if edition.version == self.version:  # else the request began before the version changed
            self.monitor.observe(max(prompt.selection.scores[prompt.selection.fixed :], default=None), probabilities)

    def compare(self, edition: Edition, text: str, answer: Labelled) -> None:
        """Ask the reference too, if the query is in its sample."""
        shadowed = edition.version == self.version and answer.sampled and answer.upper is None
        if self.shadow is not None and shadowed:
            self.shadow.offer(text, answer.probabilities)

    def close(self) -> None:
        if self.shadow is not None:
            self.shadow.close()


class Endpoint:
    """Programs by name, in front of engines.

    Args:
        programs: the folder of each.
        upstreams: vLLM servers, each with base models of its own.
        references: of some programs, fine-tuned models whose gap to what is served is measured on `shadow_rate` of
            the queries.
    """

    def __init__(
        self,
        programs: Mapping[str, Path],
        upstreams: Sequence[Upstream],
        *,
        store: FeedbackStore,
        versions: Versions,
        limits: Limits,
        metrics: Metrics,
        references: Mapping[str, Predictor] | None = None,
        shadow_rate: float = 0.01,
    ) -> None:
        self.limits = limits
        self.line = Line(in_flight=limits.in_flight, waiting=limits.waiting)
        self.live: dict[str, LiveProgram] = {}
        self.store = store
        self._folders = dict(programs)
        self._upstreams = tuple(upstreams)
        self._versions = versions
        self._preparer = Preparer()
        self._engines: dict[str, Engine] = {}
        self._metrics = metrics
        self._references = dict(references or {})
        self._shadow_rate = shadow_rate
        self._watches: dict[str, _Watch] = {}

    async def start(self) -> None:
        """Find the engines, and load all programs.

        Raises:
            ICLError: if a program cannot be served.
        """
        for name, folder in self._folders.items():
            self.live[name] = await LiveProgram.open(
                name, folder, versions=self._versions, store=self.store, engine=self._engine
            )
            await self._watch(name)

    async def stop(self) -> None:
        """Close what is open."""
        self._preparer.close()
        for watch in self._watches.values():
            await asyncio.to_thread(watch.close)
        for upstream in self._upstreams:
            await upstream.close()

    async def ready(self) -> bool:
        """Whether every engine in use says that it can answer."""
        used = {engine.upstream.url: engine.upstream for engine in self._engines.values()}
        return all([await upstream.alive() for upstream in used.values()])

    def program(self, name: str) -> LiveProgram:
        """The program of this name.

        Raises:
            RequestError: if there is none.
        """
        if name not in self.live:
            raise RequestError(
                f"there is no program {name[:60]!r}. {did_you_mean(name, self.live)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self.live[name]

    async def classify(self, edition: Edition, texts: Sequence[str], top: int | None = None) -> list[Labelled]:
        """The law of the labels for each text; of the `top` likeliest ones only, if so many are enough.

        Raises:
            RequestError: if the program generates text, or there are more texts than places in the line.
            BusyError: if the line is full.
            BudgetError: if a text is too long.
            BackendError: if the engine fails.
        """
        if edition.program.task != "classification":
            raise RequestError(
                f"{edition.name!r} generates text, it has no labels; use /v1/completions or /v1/chat/completions",
                param="model",
            )
        if len(texts) > self.line.places:
            raise RequestError(f"{len(texts)} texts are too many for one request; send at most {self.line.places}")
        with self.line.admission(len(texts)):
            return await together([self._label(edition, text, top) for text in texts])

    async def _label(self, edition: Edition, text: str, top: int | None) -> Labelled:
        started = time.perf_counter()
        shadow = self._watches[edition.name].shadow
        sampled = shadow is not None and shadow.draw()
        prompts = await self._preparer.prompts(edition.program, text)
        prepared = time.perf_counter()
        some = None if sampled or edition.program.calibration.method != "none" else top  # calibration wants all
        turns: list[float] = []

        async def ask(prompt: Prompt) -> Scores:
            async with self.line.turn(prompt.tokens):
                turns.append(time.perf_counter())
                return await edition.engine.label_logprobs(list(prompt.tokens), edition.walk, edition.groups, top=some)

        scores = averaged(await together([ask(prompt) for prompt in prompts]))
        timing = Timing(prepared - started, turns[0] - prepared, time.perf_counter() - turns[0])
        upper = None if scores.upper is None else scores.upper[None, :]
        law = edition.program.law(prompts[:1], scores.lower[None, :], upper)
        most = None if law.upper is None else law.upper[0]
        return Labelled(law.probabilities[0], most, tuple(prompts), scores, timing, sampled)

    async def explain(self, edition: Edition, text: str) -> Explanation:
        """The prompt for a text, taken apart; no engine is asked.

        Raises:
            BudgetError: if the text is too long.
        """
        with self.line.admission():
            return await asyncio.to_thread(edition.program.explain, text)

    async def generate(self, edition: Edition, text: str, settings: Json) -> AsyncGenerator[Piece, None]:
        """The text that the program makes of `text`, as it grows; the blanks before and after it are cut.

        Args:
            settings: of vLLM's completions: `max_tokens` (None: up to 256), `temperature`, `stop` and so on.

        Raises:
            RequestError: if the answer cannot be as long as asked.
            BusyError, BudgetError, BackendError: as `classify`.
        """
        with self.line.admission():
            [prompt] = await self._preparer.prompts(edition.program, text)
            self._watches[edition.name].observe(edition, prompt, np.empty(0))
            room = edition.engine.max_prompt_tokens - len(prompt.tokens)
            most = settings.get("max_tokens") or min(_NEW_TOKENS, room)
            if most > room or room < 1:
                raise RequestError(
                    f"the prompt has {len(prompt.tokens)} tokens, and the model's context "
                    f"{edition.engine.max_prompt_tokens}; that leaves no room for {most} more",
                    param="max_tokens", code="context_length_exceeded",
                )  # fmt: skip
            template = edition.program.template
            end = template.terminator_ids
            stops = [*settings.get("stop", []), template.tokenizer.decode(end)]
            ends = {"stop": list(dict.fromkeys(stops)), "stop_token_ids": end if len(end) == 1 else []}
            async with self.line.turn(prompt.tokens):
                events = edition.engine.generate(list(prompt.tokens), {**settings, **ends, "max_tokens": most})
                url = edition.engine.upstream.url
                async with aclosing(_pieces(events, url, answers=settings.get("n", 1))) as pieces:
                    async for piece in pieces:
                        yield piece

    async def correct(self, name: str, text: str, answer: str, *, by: str) -> tuple[Correction, list[Flag], Edition]:
        """Take a correction: on the disk and in the index when this returns.

        Raises:
            LabelError, TemplateError: if `answer` cannot be an answer of the program.
            BudgetError: if `text` is too long for any prompt.
            ServingError: if the disk does not take it.
        """
        live = self.program(name)
        edition = live.edition
        require_label(edition.program, answer)
        await self._preparer.prompts(edition.program, text)  # before it is kept for good
        flags = await asyncio.to_thread(edition.corrector.flags, edition.program, text, answer)
        correction = await asyncio.to_thread(self.store.add, name, text, answer, by=by, version=edition.version)
        edition = await live.refresh()
        self._metrics.feedback(name, "given")
        if flags:
            self._metrics.feedback(name, "flagged")
        self._metrics.pool_rows(name, len(edition.program.pool.data))
        return correction, flags, edition

    async def reload(self, name: str, *, by: str) -> LiveProgram:
        """Serve what the program's folder holds now.

        Raises:
            ArtifactError, ModelError: if it cannot be served; the old version stays.
        """
        live = self.program(name)
        await self._counted(name, live.reload(by=by))
        return live

    async def rollback(self, name: str, *, to: str | None, by: str) -> LiveProgram:
        """Serve version `to`, by default the one before.

        Raises:
            RequestError: if it was not kept.
            ArtifactError, ModelError: if it cannot be served; the present version stays.
        """
        live = self.program(name)
        await self._counted(name, live.rollback(to=to, by=by))
        return live

    async def undo(self, number: int, *, by: str) -> Correction:
        """Take a correction back.

        Raises:
            NoSuchCorrectionError: if there is none of this number.
            ServingError: if the disk does not take it.
        """
        correction = await asyncio.to_thread(self.store.undo, number, by=by)
        if correction.program in self.live:
            edition = await self.live[correction.program].refresh()
            self._metrics.feedback(edition.name, "undone")
            self._metrics.pool_rows(edition.name, len(edition.program.pool.data))
        return correction

    def observe(self, edition: Edition, text: str, answer: Labelled) -> None:
        """Count a classified query, and look for drift."""
        name = edition.name
        for stage, seconds in zip(_STAGES, answer.timing, strict=True):
            self._metrics.stage(name, stage, seconds)
        best = answer.best
        self._metrics.tokens(
            name,
            prompt=answer.prompt_tokens,
            cached=answer.scores.cached_tokens,
            completion=len(edition.program.label_words[best]),
        )
        self._metrics.answer(name, edition.program.labels[best])
        self._watches[name].observe(edition, answer.prompts[0], answer.probabilities)
        self._watches[name].compare(edition, text, answer)

    def generated(self, edition: Edition, usage: Json) -> None:
        """Count a generated text by what it cost."""
        self._metrics.tokens(
            edition.name,
            prompt=usage["prompt_tokens"],
            cached=usage["prompt_tokens_details"]["cached_tokens"],
            completion=usage["completion_tokens"],
        )
        self._metrics.answer(edition.name, None)

    def metrics_text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        self._metrics.waiting(self.line.waiting)
        for name, watch in self._watches.items():
            self._metrics.drift(name, watch.monitor.state())
            if watch.shadow is not None:
                self._metrics.shadow(name, watch.shadow.gap.interval(), watch.shadow.dropped)
        return self._metrics.text()

    async def _counted(self, name: str, change: Awaitable[Edition]) -> None:
        try:
            await change
        except ICLError:
            self._metrics.reload(name, "failed")
            raise
        self._metrics.reload(name, "ok")
        await self._watch(name)

    async def _watch(self, name: str) -> None:
        """Count what is served now, and look for drift from it."""
        edition = self.live[name].edition
        old = self._watches.get(name)
        if old is not None and old.version == edition.version:
            return
        baseline = await asyncio.to_thread(Baseline.of, edition.corrector.program)
        program, shadow = edition.program, None
        if (reference := self._references.get(name)) is not None:
            shadow = Shadow(program.labels, reference, rate=self._shadow_rate)
        self._watches[name] = _Watch(edition.version, DriftMonitor(program.labels, baseline), shadow)
        self._metrics.serve(
            name,
            version=edition.version,
            base_model=edition.engine.model,
            pool_rows=len(program.pool.data),
            labels=program.labels,
        )
        if old is not None:
            await asyncio.to_thread(old.close)

    async def _engine(self, model: str) -> Engine:
        """The engine of a base model, looked for once."""
        if model in self._engines:
            return self._engines[model]
        found, problems = [], []
        for upstream in self._upstreams:
            try:
                found.append(await upstream.engine(model))
            except UnreachableError:
                raise
            except (ModelError, BackendError) as error:
                problems.append(str(error))
        if not found:
            raise ModelError("; ".join(problems))
        if len(found) > 1:
            where = " and ".join(engine.upstream.url for engine in found)
            raise BackendError(
                f"{model!r} is at {where}; name one of them, or put a router (vLLM's, or your platform's) before both"
            )
        self._engines[model] = found[0]
        return found[0]


async def _pieces(events: AsyncGenerator[Json, None], url: str, *, answers: int) -> AsyncGenerator[Piece, None]:
    """What vLLM's events say, without the blanks before the text and after it."""
    begun: set[int] = set()
    held: dict[int, str] = {}
    async with aclosing(events):
        async for event in events:
            with sense(url):
                parts = [_part(choice, answers) for choice in event["choices"]]
                usage = None if event.get("usage") is None else _cost(event["usage"])
            for index, said, finish, logprobs, _ in parts:
                text = held.pop(index, "") + said
                if index not in begun:
                    text = text.lstrip()
                if text.strip():
                    begun.add(index)
                kept = text.rstrip()
                if finish is None and len(kept) < len(text):
                    held[index] = text[len(kept) :]
                if kept or finish is not None or logprobs:
                    yield Piece(index, kept, finish, logprobs, None)
            if usage is not None and not parts:
                yield Piece(0, "", None, None, usage)


def _part(choice: Json, answers: int) -> Piece:
    """What an event says about one of the `answers`; within `sense`."""
    index, text, finish = choice["index"], choice["text"], choice.get("finish_reason")
    if type(index) is not int or index not in range(answers):
        raise ValueError(f"a text numbered {index!r} of {answers}")
    if not isinstance(text, str) or not isinstance(finish, str | None):
        raise TypeError(f"a text of type {type(text).__name__}, with an end of type {type(finish).__name__}")
    (text + (finish or "")).encode()
    return Piece(index, text, finish, _logprobs(choice.get("logprobs")), None)


def _logprobs(told: Json | None) -> Json | None:
    """Tokens with their log-probabilities and those of their alternatives; within `sense`."""
    if told is None:
        return None
    tokens, values = list(told["tokens"]), [_number(value) for value in told["token_logprobs"]]
    others = told.get("top_logprobs") or [{}] * len(tokens)
    tops = [{token: _number(value) for token, value in (top or {}).items()} for top in others]
    if not len(tokens) == len(values) == len(tops):
        raise ValueError(f"{len(tokens)} tokens with {len(values)} log-probabilities and {len(tops)} lists of others")
    for token in (*tokens, *(token for top in tops for token in top)):
        token.encode()
    offsets = [int(_number(offset)) for offset in told.get("text_offset") or []]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not -_MOST < value < _MOST:
        raise ValueError(f"a number {value!r}")
    return float(value)


def _cost(usage: Json) -> Json:
    """What a text cost, in OpenAI's words; within `sense`."""
    details = usage.get("prompt_tokens_details") or {}
    counts = usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens") or 0
    if any(type(count) is not int or not 0 <= count < _MOST for count in counts):
        raise ValueError(f"a cost of {counts}")
    prompt, completion, cached = counts
    spent = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**spent, "prompt_tokens_details": {"cached_tokens": cached}}
