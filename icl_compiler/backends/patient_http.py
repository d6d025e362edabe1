"""Many JSON requests to one server, some of them at once, through everything that passes.

- A server that is busy (429, 503, and the like), gone, or starting again is asked again after a pause that doubles each
  time, or that the server names (`Retry-After`); until it has answered nothing for `patience` seconds. Every other
  refusal is an error at once, in the server's own words.
- At most `in_flight` requests are under way, and no more jobs than that are drawn from their iterator.
- Threads, not asyncio: the library is synchronous. They are daemons, so that Ctrl-C does not wait for an answer.
"""

import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from queue import SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

import httpx2

from icl_compiler.backends.vllm_protocol import Json, RefusedError
from icl_compiler.errors import BackendError

T = TypeVar("T")

BUSY = frozenset({429, 502, 503, 504})
BROKEN = 500  # a defect, or an engine that is about to end
MOST_BROKEN = 4
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_CONNECT_S = 10.0
# Shorter than the 5 seconds after which vLLM closes an idle connection: no request meets a closing door.
_KEEP_ALIVE_S = 2.0
_MOST_SAID = 500


class PatientClient:
    """A client of one server; threads may share it.

    Args:
        server: its URL, with or without `/v1` at the end.
        key: sent as a bearer token.
        in_flight: most requests under way at once.
        timeout: seconds to wait for one answer.
        patience: seconds without any answer after which a run is given up.
        remedy: what to do if no server is there, for the error message.

    Raises:
        BackendError: if `server` is no URL, or `in_flight` is less than 1.
    """

    def __init__(
        self, server: str, *, key: str | None, in_flight: int, timeout: float, patience: float, remedy: str
    ) -> None:
        if in_flight < 1:
            raise BackendError(f"in_flight should be >= 1, is now {in_flight}")
        self.server = server.rstrip("/").removesuffix("/v1")
        self.in_flight = in_flight
        self.patience = patience
        self.remedy = remedy
        with suppress(httpx2.InvalidURL):
            url = httpx2.URL(self.server)
            if url.scheme in ("http", "https") and url.host:
                self._client = httpx2.Client(
                    base_url=url,
                    headers={"Authorization": f"Bearer {key}"} if key else {},
                    timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_S), pool=None),
                    limits=httpx2.Limits(
                        max_connections=in_flight, max_keepalive_connections=in_flight, keepalive_expiry=_KEEP_ALIVE_S
                    ),
                    trust_env=not is_this_machine(url.host),  # no proxy between two programs on one machine
                )
                return
        raise BackendError(f"{server!r} is no URL of a server; expected one like http://127.0.0.1:8000")

    def get(self, path: str) -> Json:
        """What stands at `path`; asked for once.

        Raises:
            BackendError: if nothing answers, or not in JSON.
            RefusedError: if the server will not tell.
        """
        try:
            response = self._client.get(path)
        except httpx2.RequestError as error:
            raise BackendError(f"no server answers at {self.server} ({said_by(error)}); {self.remedy}") from error
        if not response.is_success:
            raise refusal(response)
        return read_json(response)

    def post(self, path: str, body: Json) -> httpx2.Response:
        """One attempt."""
        return self._client.post(path, json=body)


def refusal(response: httpx2.Response) -> RefusedError:
    """The error that says what the server said."""
    code = response.status_code
    if code in (401, 403):
        where = f"{response.url.scheme}://{response.url.netloc.decode()}"
        return RefusedError(f"the server at {where} wants another key ({code}): set VLLM_API_KEY to its key")
    return RefusedError(f"{response.url} answered {code}: {said_in(response)}")


def read_json(response: httpx2.Response) -> Json:
    """The JSON object of an answer.

    Raises:
        BackendError: if it is none.
    """
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BackendError(
            f"{response.url} answered {response.text[:_MOST_SAID]!r}, expected a JSON object; is it a vLLM server?"
        )
    return found


class Run(Generic[T]):
    """Requests that belong together: jobs, some of them at once, and what is known about their progress.

    Args:
        total: how many things (prompts) are to be finished, for the error message.
    """

    def __init__(self, client: PatientClient, total: int) -> None:
        self.finished = 0
        self._client = client
        self._total = total
        self._ended = Event()
        self._heard = time.monotonic()

    def post(self, path: str, body: Json) -> Json:
        """The answer to `body`, asked for until it comes.

        Raises:
            RefusedError: if the server will not answer this.
            BackendError: if the server answers nothing for too long, or no JSON.
        """
        broken = 0
        pause = _FIRST_PAUSE_S
        while True:
            least = 0.0
            try:
                response = self._client.post(path, body)
            except httpx2.RequestError as error:
                problem = said_by(error)
            else:
                if response.is_success:
                    self._heard = time.monotonic()
                    return read_json(response)
                problem = f"{response.status_code}: {said_in(response)}"
                broken += response.status_code == BROKEN
                if response.status_code not in {*BUSY, BROKEN} or broken == MOST_BROKEN:
                    raise refusal(response)
                named = response.headers.get("Retry-After", "")
                least = float(named) if named.isdecimal() else 0.0
            left = self._heard + self._client.patience - time.monotonic()
            if left <= 0:
                raise BackendError(
                    f"the server at {self._client.server} answered no request for {self._client.patience:g} s; "
                    f"the last attempt at {path}: {problem}. {self.finished} of {self._total} prompts were finished; "
                    f"{self._client.remedy}"
                )
            # A random part, so that requests that failed together do not come back together.
            if self._ended.wait(min(left, max(least, pause * random.uniform(0.5, 1)))):
                raise BackendError("the run has ended")
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def results(self, jobs: Iterator[Callable[[], T]], urgent: deque[Callable[[], T]]) -> Iterator[T]:
        """The results of all jobs, as they come; `urgent` ones, which the caller may add meanwhile, go first.

        The first error ends the run.
        """
        waiting: SimpleQueue[Callable[[], T] | None] = SimpleQueue()
        done: SimpleQueue[T | _Failure] = SimpleQueue()
        busy = threads = 0
        try:
            while True:
                while busy < self._client.in_flight:
                    job = urgent.popleft() if urgent else next(jobs, None)
                    if job is None:
                        break
                    busy += 1
                    waiting.put(job)
                    if threads < busy:
                        Thread(target=_work, args=(waiting, done), daemon=True).start()
                        threads += 1
                if not busy:
                    return
                result = done.get()
                busy -= 1
                if isinstance(result, _Failure):
                    raise result.error
                yield result
        finally:
            self._ended.set()
            for _ in range(threads):
                waiting.put(None)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _work(waiting: "SimpleQueue[Callable[[], T] | None]", done: "SimpleQueue[T | _Failure]") -> None:
    while (job := waiting.get()) is not None:
        try:
            done.put(job())
        except BaseException as error:
            done.put(_Failure(error))


def is_this_machine(host: str) -> bool:
    """Whether no other machine can be meant by `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def said_by(error: Exception) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def said_in(response: httpx2.Response) -> str:
    """The message of an error of an OpenAI-compatible server, which stands elsewhere in each version."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        body = response.json()
        found = body.get("error", body)
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or json.dumps(found)
        return str(found)[:_MOST_SAID]
    return response.text[:_MOST_SAID] or response.reason_phrase
