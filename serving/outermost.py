"""Around all routes: what is refused unread, how errors look, what is counted.

- Every error has OpenAI's form, whatever went wrong; a defect of ours is one sentence, and the traceback is in the log.
"""

import logging
import math
import time
from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icl_compiler.backends.vllm_protocol import Json
from icl_compiler.errors import (
    ArtifactError,
    BackendError,
    BudgetError,
    ICLError,
    LabelError,
    ModelError,
    ServingError,
    TemplateError,
)
from icl_compiler.feedback import NoSuchCorrectionError
from serving.gate import Gate
from serving.line import BusyError
from serving.live import NoSuchVersionError
from serving.metrics import Metrics
from serving.openai_api import RequestError, error_body
from serving.upstream import UnreachableError

log = logging.getLogger("icl.serve")

CLIENT_GONE = 499  # as nginx writes it; nobody reads it but the metrics
_MOST_SAID = 500
_TOO_LONG = "a request has at most {:,} bytes"
_SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class GoneError(Exception):
    """The client has closed the connection."""


def as_error(error: Exception) -> tuple[int, Json, dict[str, str]]:
    """Status, body and headers that say what went wrong."""
    param = code = None
    wait: float | None = None
    if isinstance(error, RequestError):
        status, param, code, wait = error.status, error.param, error.code, error.retry_after_s
    elif isinstance(error, BusyError):
        status, code, wait = 429, "busy", error.retry_after_s
    elif isinstance(error, UnreachableError):
        status, code, wait = 503, "engine_unreachable", 5
    elif isinstance(error, BackendError):
        status, code = 502, "engine_failed"
    elif isinstance(error, BudgetError):
        status, code = 400, "context_length_exceeded"
    elif isinstance(error, LabelError | TemplateError):
        status, param = 400, "label"
    elif isinstance(error, NoSuchCorrectionError):
        status = 404
    elif isinstance(error, ArtifactError | ModelError | NoSuchVersionError):
        status, code = 409, "version_not_served"
    elif isinstance(error, ServingError):
        status, code = 503, "not_kept"
    else:
        status = 400
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    return status, error_body(str(error), kind=kind, param=param, code=code), headers


def add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Let every error of the application have OpenAI's form."""

    @app.exception_handler(ICLError)
    async def ours(_: Request, error: ICLError) -> JSONResponse:
        status, body, headers = as_error(error)
        if isinstance(error, BusyError):
            metrics.rejected("queue_full")
        elif status == 504:
            metrics.rejected("deadline")
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the alternatives of a type, the one that came farthest.
        first = max(error.errors(), key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
        where, said = _place(first["loc"][1:]), str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            where, said = None, f"{said}: {first['ctx']['error']}"
        said = f"{where}: {said}" if where else said
        return JSONResponse(error_body(said[:_MOST_SAID], kind="invalid_request_error", param=where), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = _KINDS.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
        headers = dict(error.headers or {})
        return JSONResponse(error_body(str(error.detail), kind=kind), error.status_code, headers)

    @app.exception_handler(GoneError)
    async def gone(_: Request, error: GoneError) -> Response:
        return Response(status_code=CLIENT_GONE)


def _place(parts: Sequence[str | int]) -> str | None:
    """Such as `messages.0.content`; pydantic names the alternatives of a type too, `str` or `list[...]`."""
    return ".".join(str(part) for part in parts if part != "str" and "[" not in str(part)) or None


class Outermost:
    """Around everything: what may not even be read, what is counted, what must not get out."""

    def __init__(self, app: ASGIApp, *, body_bytes: int, gate: Gate, metrics: Metrics) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._gate = gate
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            with self._metrics.in_flight():
                await self._checked(scope, receive, sending)
        except Exception:
            log.exception("a defect of ours, in %s %s", scope["method"], scope["path"])
            if status:
                raise
            body = error_body("a defect of the endpoint; its log says more", kind="server_error")
            await JSONResponse(body, 500)(scope, receive, sending)
        finally:
            if status == 413:
                self._metrics.rejected("too_large")
            route = getattr(scope.get("route"), "path", "none")
            program = scope["state"].get("program", "none")
            self._metrics.request(program, route, status or CLIENT_GONE, time.perf_counter() - started)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        most = self._body_bytes
        problem: RequestError | None = None
        if not self._gate.knows_host(headers.get("Host", "")):
            problem = RequestError("this host is not known here; call the endpoint by its own address", status=403)
        elif not self._gate.knows_origin(headers.get("Origin")):
            problem = RequestError("no page of another site may ask this endpoint", status=403)
        elif scope["method"] == "POST" and not _is_json(headers) and _has_body(headers):
            problem = RequestError("send JSON, with Content-Type: application/json", status=415)
        elif headers.get("Content-Length", "0").isdecimal() and int(headers.get("Content-Length", "0")) > most:
            problem = RequestError(_TOO_LONG.format(most), status=413, code="too_large")
        if problem is None:
            await self._app(scope, _at_most(receive, most), send)
            return
        status, body, _ = as_error(problem)
        await JSONResponse(body, status, {"Connection": "close"})(scope, receive, send)


def _at_most(receive: Receive, most: int) -> Receive:
    """`receive`, which stops at a body that is too long, whatever length it claimed."""
    read = 0

    async def receiving() -> Message:
        nonlocal read
        message = await receive()
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, _TOO_LONG.format(most))
        return message

    return receiving


def _is_json(headers: Headers) -> bool:
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind == "application/json"


def _has_body(headers: Headers) -> bool:
    return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers
