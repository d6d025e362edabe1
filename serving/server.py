"""The routes: OpenAI's API, and beside it what only programs have.

A request whose client is gone is dropped, and with it all that it asked of the engine; but never a correction.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, TypeVar
from uuid import uuid4

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from icl_compiler.backends.vllm_protocol import Json
from icl_compiler.errors import ICLError
from serving.endpoint import Endpoint, Labelled, Piece
from serving.gate import Gate, Right
from serving.live import Edition
from serving.metrics import Metrics
from serving.openai_answers import (
    CHAT_CHUNK,
    EventStream,
    as_chat,
    card,
    chat_chunk,
    chat_chunks,
    chat_logprobs,
    choice,
    completion_chunks,
    each,
    joined,
    law,
    shown,
    text_logprobs,
    total,
    unpriced,
    usage_of,
    wants_usage,
)
from serving.openai_api import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    ErrorAnswer,
    ExplainRequest,
    FeedbackRequest,
    RequestError,
    RollbackRequest,
)
from serving.outermost import GoneError, Outermost, add_errors, as_error
from serving.upstream import together

T = TypeVar("T")
log = logging.getLogger("icl.serve")

_PAGE_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def create_app(endpoint: Endpoint, *, gate: Gate, metrics: Metrics, log_text: bool = False) -> FastAPI:
    """The application around a started or yet unstarted `endpoint`.

    Args:
        gate: who may do what, how often, and under which host names.
        log_text: whether the log may hold what users write.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await endpoint.stop()

    app = FastAPI(
        title="icl serve",
        description="Programs (compiled prompts for a frozen language model) behind an OpenAI-compatible API.",
        version=version("icl-compiler"),
        lifespan=lifespan,
        responses={code: {"description": what, "model": ErrorAnswer} for code, what in _ERRORS.items()},
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Outermost, body_bytes=endpoint.limits.body_bytes, gate=gate, metrics=metrics)
    add_errors(app, metrics)
    may_query, may_correct, may_change = (Depends(_require(gate, metrics, right)) for right in _RIGHTS)

    def stream(chunks: AsyncGenerator[Json, None]) -> EventStream:
        return EventStream(chunks, stalled_s=endpoint.limits.deadline_s)

    def edition_of(name: str, request: Request) -> Edition:
        edition = endpoint.program(name).edition
        request.state.program = name
        return edition

    async def labelled(request: Request, edition: Edition, texts: list[str], top: int | None = None) -> list[Labelled]:
        answers = await _while_wanted(request, endpoint.limits.deadline_s, endpoint.classify(edition, texts, top))
        for text, answer in zip(texts, answers, strict=True):
            endpoint.observe(edition, text, answer)
            if log_text:
                log.info("%s %r -> %r", edition.name, text, edition.program.labels[answer.best])
        return answers

    @app.get("/v1/models", dependencies=[may_query])
    async def models() -> Json:
        """The programs."""
        return {"object": "list", "data": [card(live.edition, live.loaded) for live in endpoint.live.values()]}

    @app.get("/v1/models/{name}", dependencies=[may_query])
    async def model(name: str) -> Json:
        """One program."""
        live = endpoint.program(name)
        return card(live.edition, live.loaded)

    @app.post("/v1/classify", dependencies=[may_query])
    async def classify(body: ClassifyRequest, request: Request) -> Json:
        """The probability of every label for one or many texts."""
        started = time.perf_counter()
        edition = edition_of(body.model, request)
        texts = [body.input] if isinstance(body.input, str) else body.input
        answers = await labelled(request, edition, texts, body.top)
        longest = (max(part) for part in zip(*(answer.timing for answer in answers), strict=True))
        timing = dict(zip(("retrieve_s", "queue_s", "model_s"), longest, strict=True))
        return {
            "object": "list",
            "model": edition.name,
            "version": edition.version,
            "data": [{"index": index, **law(edition, answer, body.top)} for index, answer in enumerate(answers)],
            "usage": usage_of(answers, edition),
            "timing": {**timing, "total_s": time.perf_counter() - started},
        }

    @app.post("/v1/explain", dependencies=[may_query])
    async def explain(body: ExplainRequest, request: Request) -> Json:
        """The prompt for a text: its shots, their scores, why each was chosen. No model is asked."""
        started = time.perf_counter()
        edition = edition_of(body.model, request)
        work = endpoint.explain(edition, body.input)
        found = (await _while_wanted(request, endpoint.limits.deadline_s, work))._asdict()
        shots = [shot._asdict() for shot in found.pop("shots")]
        head = {"object": "explanation", "model": edition.name, "version": edition.version}
        return {**head, **found, "shots": shots, "retrieve_s": time.perf_counter() - started}

    @app.post("/v1/chat/completions", dependencies=[may_query], response_model=None, responses=_STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Json | Response:
        """The answer to the last message by the user."""
        edition = edition_of(body.model, request)
        query = body.query()
        head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": edition.name}
        if edition.program.task == "generation":
            most = body.max_completion_tokens or body.max_tokens
            settings = _sampling(body, most, (body.top_logprobs or 0) if body.logprobs else None)
            return await _generated(request, endpoint, edition, [query], settings, body, head, chat=True)
        _require_one_answer(body)
        [answer] = await labelled(request, edition, [query], max(1, body.top_logprobs or 0))
        label = edition.program.labels[answer.best]
        logprobs = chat_logprobs(edition, answer, body.top_logprobs or 0) if body.logprobs else None
        usage = usage_of([answer], edition)
        if body.stream:
            return stream(each(chat_chunks(head, body, label, logprobs, usage)))
        message = {"role": "assistant", "content": label, "refusal": None}
        answer_choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
        return {**head, "object": "chat.completion", "choices": [answer_choice], "usage": usage}

    @app.post("/v1/completions", dependencies=[may_query], response_model=None, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Json | Response:
        """The answer to each prompt."""
        edition = edition_of(body.model, request)
        if body.echo or body.suffix:
            raise RequestError("a program neither echoes nor fills in; leave `echo` and `suffix` out", param="echo")
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        head = {"id": f"cmpl-{uuid4().hex}", "created": int(time.time()), "model": edition.name}
        if edition.program.task == "generation":
            settings = _sampling(body, body.max_tokens, body.logprobs)
            return await _generated(request, endpoint, edition, texts, settings, body, head, chat=False)
        _require_one_answer(body)
        answers = await labelled(request, edition, texts, max(1, body.logprobs or 0))
        choices = [
            {
                "index": index,
                "text": edition.program.labels[answer.best],
                "logprobs": None if body.logprobs is None else text_logprobs(edition, answer, body.logprobs),
                "finish_reason": "stop",
            }
            for index, answer in enumerate(answers)
        ]
        whole = {**head, "object": "text_completion", "choices": choices, "usage": usage_of(answers, edition)}
        return stream(each(completion_chunks(whole, body))) if body.stream else whole

    @app.post("/v1/feedback", dependencies=[may_correct], status_code=201)
    async def feedback(body: FeedbackRequest, request: Request) -> Json:
        """A correction: kept on the disk and used from now on when this answers."""
        edition_of(body.model, request)
        correction, flags, edition = await endpoint.correct(
            body.model, body.input, body.label, by=request.state.key.name
        )
        doubts = [flag._asdict() for flag in flags]
        return {**shown(correction), "flags": doubts, "pool_rows": len(edition.program.pool.data)}

    @app.get("/v1/feedback", dependencies=[may_correct])
    async def corrections(
        model: str | None = None,
        after: Annotated[int, Query(ge=0, lt=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Json:
        """Corrections, oldest first."""
        if model is not None:
            endpoint.program(model)
        page = await asyncio.to_thread(endpoint.store.page, model, after=after, limit=limit)
        return {"object": "list", "data": [shown(correction) for correction in page]}

    @app.delete("/v1/feedback/{number}", dependencies=[may_correct])
    async def undo(number: int, request: Request) -> Json:
        """Take a correction back."""
        return shown(await endpoint.undo(number, by=request.state.key.name))

    @app.get("/v1/audit", dependencies=[may_change])
    async def audit(
        after: Annotated[int, Query(ge=0, lt=2**62)] = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Json:
        """Who did what to corrections and versions, oldest first."""
        events = await asyncio.to_thread(endpoint.store.events, after=after, limit=limit)
        return {"object": "list", "data": [event._asdict() for event in events]}

    @app.get("/v1/programs", dependencies=[may_change])
    async def programs() -> Json:
        """The programs with the versions that are kept of each."""
        return {"object": "list", "data": [await live.description() for live in endpoint.live.values()]}

    @app.post("/v1/programs/{name}/reload", dependencies=[may_change])
    async def reload(name: str, request: Request) -> Json:
        """Serve what the program's folder holds now."""
        live = await endpoint.reload(name, by=request.state.key.name)
        return await live.description()

    @app.post("/v1/programs/{name}/rollback", dependencies=[may_change])
    async def rollback(name: str, request: Request, body: RollbackRequest | None = None) -> Json:
        """Serve an older version: the one named, or the one before."""
        live = await endpoint.rollback(name, to=body.version if body else None, by=request.state.key.name)
        return await live.description()

    @app.get("/openapi.json", include_in_schema=False, dependencies=[may_query])
    async def description() -> Json:
        described = app.openapi()
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's, which is 400 here
        return described

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Json:
        return {"status": "alive"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        ready = await endpoint.ready()
        return JSONResponse({"status": "ready" if ready else "the engine does not answer"}, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False, dependencies=[may_query])
    async def metrics_text() -> Response:
        return Response(endpoint.metrics_text(), media_type=Metrics.CONTENT_TYPE)

    page = files("serving") / "page"

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response((page / "index.html").read_bytes(), media_type="text/html")

    @app.get("/page/{file}", include_in_schema=False)
    async def page_file(file: str) -> Response:
        known = {entry.name: entry for entry in page.iterdir()}
        if file not in known:
            raise HTTPException(404, f"there is no file {file[:60]!r}")
        return Response(known[file].read_bytes(), media_type=_PAGE_TYPES[file.rpartition(".")[2]])

    return app


_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
_RIGHTS: tuple[Right, ...] = ("query", "feedback", "admin")
_ERRORS = {
    400: "the request cannot be answered as it is",
    401: "no key, or none that is known",
    403: "the key has not the right for this",
    404: "there is no such program, correction or path",
    409: "the version cannot be served; the old one stays",
    413: "the request is too long",
    415: "the request is no JSON",
    429: "too many requests; Retry-After says when to come again",
    502: "the engine answered nonsense, or refused",
    503: "the engine does not answer, or the disk is full",
    504: "the deadline has passed",
}


async def _while_wanted(request: Request, deadline_s: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends when the client is gone or the deadline has passed."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise GoneError
        raise RequestError(f"not answered within {deadline_s:g} s", status=504, code="deadline")
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _require_one_answer(body: ChatRequest | CompletionRequest) -> None:
    if body.n > 1:
        raise RequestError(
            "a classification has one answer, the likeliest label; for the others ask for logprobs, or /v1/classify",
            param="n",
        )


def _sampling(body: ChatRequest | CompletionRequest, most: int | None, logprobs: int | None) -> Json:
    """The settings of a generated text, as vLLM has them."""
    settings: Json = {
        "max_tokens": most, "temperature": body.temperature, "top_p": body.top_p, "n": body.n, "stop": body.stops,
    }  # fmt: skip
    optional = {"seed": body.seed, "logprobs": logprobs}
    return settings | {name: value for name, value in optional.items() if value is not None}


async def _generated(
    request: Request,
    endpoint: Endpoint,
    edition: Edition,
    texts: list[str],
    settings: Json,
    body: ChatRequest | CompletionRequest,
    head: Json,
    *,
    chat: bool,
) -> Json | Response:
    """Texts as they are generated, or all of them at their end."""
    if len(texts) > endpoint.line.places:
        raise RequestError(f"{len(texts)} prompts are too many for one request; send at most {endpoint.line.places}")
    if body.stream:
        if len(texts) > 1:
            raise RequestError("one prompt at a time can be streamed", param="prompt")
        pieces = endpoint.generate(edition, texts[0], settings)
        first = await _while_wanted(request, endpoint.limits.deadline_s, _next(pieces))
        chunks = _grown(endpoint, edition, first, pieces, head, body, chat=chat)
        return EventStream(chunks, stalled_s=endpoint.limits.deadline_s)
    wanted = [_whole(endpoint, edition, text, settings, body.n) for text in texts]
    found = await _while_wanted(request, endpoint.limits.deadline_s, together(wanted))
    choices = [
        choice(place * body.n + index, text, finish, logprobs, chat=chat)
        for place, (answers, _) in enumerate(found)
        for index, (text, finish, logprobs) in enumerate(answers)
    ]
    usage = total([cost for _, cost in found])
    return {**head, "object": "chat.completion" if chat else "text_completion", "choices": choices, "usage": usage}


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(pieces, None)


async def _whole(
    endpoint: Endpoint, edition: Edition, text: str, settings: Json, n: int
) -> tuple[list[tuple[str, str | None, Json | None]], Json]:
    said: list[list[str]] = [[] for _ in range(n)]
    finish: list[str | None] = [None] * n
    logprobs: list[list[Json]] = [[] for _ in range(n)]
    usage: Json = {}
    async with aclosing(endpoint.generate(edition, text, settings)) as pieces:
        async for piece in pieces:
            if piece.usage is not None:
                usage = piece.usage
                continue
            said[piece.choice].append(piece.text)
            finish[piece.choice] = piece.finish or finish[piece.choice]
            if piece.logprobs:
                logprobs[piece.choice].append(piece.logprobs)
    if usage:
        endpoint.generated(edition, usage)
    answers = [("".join(said[i]), finish[i], joined(logprobs[i]) if "logprobs" in settings else None) for i in range(n)]
    return answers, usage


async def _grown(
    endpoint: Endpoint,
    edition: Edition,
    first: Piece | None,
    pieces: AsyncGenerator[Piece, None],
    head: Json,
    body: ChatRequest | CompletionRequest,
    *,
    chat: bool,
) -> AsyncGenerator[Json, None]:
    """The chunks of a text that is being generated; an error in its middle is the last of them."""
    begun: set[int] = set()
    usage: Json | None = None
    head = head | unpriced(body)

    def chunk(piece: Piece) -> Json:
        if not chat:
            grown = choice(piece.choice, piece.text, piece.finish, piece.logprobs, chat=False)
            return {**head, "object": "text_completion", "choices": [grown]}
        delta: Json = {"content": piece.text}
        if piece.choice not in begun:
            begun.add(piece.choice)
            delta = {"role": "assistant", **delta}
        return chat_chunk(head, piece.choice, delta, as_chat(piece.logprobs), piece.finish)

    piece = first
    try:
        while piece is not None:
            if piece.usage is None:
                yield chunk(piece)
            else:
                usage = piece.usage
            piece = await _next(pieces)
        if usage is not None:
            endpoint.generated(edition, usage)
            if wants_usage(body):
                kind = CHAT_CHUNK if chat else "text_completion"
                yield {**head, "object": kind, "choices": [], "usage": usage}
    except ICLError as error:
        status, body_of_error, _ = as_error(error)
        log.warning("a stream of %s ended with %d: %s", edition.name, status, error)
        yield body_of_error
    finally:
        await pieces.aclose()


def _require(gate: Gate, metrics: Metrics, right: Right) -> Callable[[Request], None]:
    def require(request: Request) -> None:
        try:
            request.state.key = gate.key(request.headers.get("Authorization"), right)
        except RequestError as error:
            metrics.rejected("rate_limit" if error.status == 429 else "unauthorised")
            raise

    return require
