"""A vLLM server without a model: a known law of the next token behind vLLM's API, which misbehaves when told to."""

import json
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, Literal

import numpy as np

VOCABULARY = 60
CONTEXT = 100
BLOCK = 4
Json = dict[str, Any]


@lru_cache(100_000)
def law(tokens: tuple[int, ...], vocabulary: int = VOCABULARY) -> np.ndarray[Any, Any]:
    """Log-probabilities of the token after `tokens`."""
    logits = 2 * np.random.default_rng([len(tokens), *tokens]).normal(size=vocabulary)
    return logits - np.log(np.exp(logits).sum())


def logprob(prompt: Sequence[int], word: Sequence[int], vocabulary: int = VOCABULARY) -> float:
    return float(sum(law((*prompt, *word[:i]), vocabulary)[token] for i, token in enumerate(word)))


class Trouble(Exception):
    """What a server answers in place of an answer."""

    def __init__(self, status: int, body: bytes | Json = b"", **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = headers


DROP = Trouble(0)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the five of the library a busy machine resets connections


class FakeVLLM:
    """A server on a port of this machine.

    Attributes:
        trouble: what happens to the next requests for completions, one each, in place of an answer.
        spoil: changes every answer, or event of a stream, before it is sent; a trouble that it raises ends the stream.
        bodies: the requests for completions that were answered.
        between: seconds between the events of a stream.
        gateway: the status with which something in front of it answers every GET in its place; 0 if nothing is there.
        streamed, broken_off: events that were sent, and requests that the client left.
    """

    def __init__(
        self,
        *,
        knows_ids: Literal["yes", "ignores", "rejects"] = "yes",
        max_logprobs: int = 20,
        tells_cached: bool = True,
        key: str | None = None,
        model: Json | None = None,
        delay: float = 0.0,
        port: int = 0,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.vocabulary = vocabulary
        self.knows_ids = knows_ids
        self.max_logprobs = max_logprobs
        self.tells_cached = tells_cached
        self.key = key
        self.model = {"id": "fake", "root": "fake", "max_model_len": CONTEXT} | (model or {})
        self.delay = delay
        self.trouble: deque[Trouble] = deque()
        self.spoil: Callable[[Json], Json] = lambda answer: answer
        self.bodies: list[Json] = []
        self.attempts = self.in_flight = self.most_in_flight = self.streamed = self.broken_off = 0
        self.streams = 0  # that have not ended
        self.between = 0.0
        self.gateway = 0
        self._stopped = False
        self._blocks: set[tuple[int, ...]] = set()
        self._lock = Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if outer._stopped:
                    return self._drop()
                if outer.gateway:
                    return self._send(outer.gateway, b"<html>Bad Gateway</html>")
                if outer.key and self.headers["Authorization"] != f"Bearer {outer.key}":
                    return self._send(401, b'{"error":"Unauthorized"}')
                answers = {
                    "/v1/models": {"object": "list", "data": [outer.model]},
                    "/version": {"version": "0.0.0"},
                    "/health": {},
                }
                if self.path not in answers:
                    return self._send(404, b'{"detail":"Not Found"}')
                return self._send(200, json.dumps(answers[self.path]).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.attempts += 1
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                    trouble = DROP if outer._stopped else outer.trouble.popleft() if outer.trouble else None
                try:
                    if self._left_within(outer.delay):
                        outer.broken_off += 1
                        raise DROP
                    if trouble is not None:
                        raise trouble
                    if body.get("stream"):
                        with outer._lock:
                            outer.bodies.append(body)
                            outer.in_flight -= 1
                            outer.streams += 1
                        try:
                            self._stream(body)
                        finally:
                            with outer._lock:
                                outer.streams -= 1
                        return
                    with outer._lock:
                        answer = outer.spoil(outer._complete(body))
                        outer.bodies.append(body)
                    status, sent, headers = 200, json.dumps(answer).encode(), {}
                except Trouble as found:
                    status, sent, headers = found.status, found.body, found.headers
                with outer._lock:
                    outer.in_flight -= 1
                if status:
                    self._send(status, sent, headers)
                else:
                    self._drop()

            def _left_within(self, seconds: float) -> bool:
                """Wait, and say whether the client has closed the connection meanwhile."""
                if seconds and select.select([self.connection], [], [], seconds)[0]:
                    return not self.connection.recv(1, socket.MSG_PEEK)
                return False

            def _drop(self) -> None:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            def _stream(self, body: Json) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.close_connection = True
                try:
                    for event in outer.events(body):
                        self.wfile.write(f"data: {json.dumps(outer.spoil(event))}\n\n".encode())
                        self.wfile.flush()
                        outer.streamed += 1
                        if self._left_within(outer.between):
                            raise ConnectionResetError
                    self.wfile.write(b"data: [DONE]\n\n")
                except Trouble:
                    self._drop()
                except OSError:
                    outer.broken_off += 1

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                try:
                    self.send_response(status)
                    for name, value in (headers or {}).items():
                        self.send_header(name.replace("_", "-"), value)
                    if "Content_Length" not in (headers or {}):
                        self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "FakeVLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening, and break off what is under way."""
        self._stopped = True
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self) -> Counter[tuple[int, ...]]:
        """All prompts that were answered, with their number."""
        return Counter(tuple(prompt) for body in self.bodies for prompt in _listed(body["prompt"]))

    def _complete(self, body: Json) -> Json:
        prompts = _listed(body["prompt"])
        refused = self._refused(body, prompts)
        if refused:
            raise Trouble(400, {"error": {"message": refused, "code": 400}})
        choices = []
        cached = 0
        for prompt in prompts:
            full = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]
            cached = BLOCK * sum(block in self._blocks for block in full)
            self._blocks.update(full)
            for sample in range(body.get("n", 1)):
                choices.append(self._choice(len(choices), prompt, body, sample))
        details = {"cached_tokens": cached} if self.tells_cached else None
        generated = sum(len(choice["logprobs"]["tokens"]) for choice in choices)
        usage = {
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": generated,
            "prompt_tokens_details": details,
        }
        return {"choices": choices[::-1], "usage": usage}  # their index counts, not their order

    def events(self, body: Json) -> Iterator[Json]:
        """Texts as they grow, a letter an event: up to one of the stops or `max_tokens`.

        The first text takes the likeliest letter each time, the second one the second likeliest, and so on.
        """
        [prompt] = _listed(body["prompt"])
        drawn = 0
        for index in range(body.get("n", 1)):
            tokens: list[int] = []
            finish = None
            while finish is None:
                now = law((*prompt, *tokens), self.vocabulary)[:128]
                order = now.argsort()[::-1].tolist()
                token = order[index]
                tokens.append(token)
                letter = chr(token)
                if len(tokens) == body["max_tokens"]:
                    finish = "length"
                if letter in body.get("stop", []) or token in body.get("stop_token_ids", []):
                    letter, finish = "", "stop"
                logprobs = None
                if "logprobs" in body:
                    tops = {chr(t): float(now[t]) for t in {token, *order[: body["logprobs"]]}}
                    logprobs = {
                        "tokens": [chr(token)],
                        "token_logprobs": [float(now[token])],
                        "top_logprobs": [tops],
                        "text_offset": [len(tokens) - 1],
                    }
                yield {"choices": [{"index": index, "text": letter, "logprobs": logprobs, "finish_reason": finish}]}
            drawn += len(tokens)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": drawn, "prompt_tokens_details": None}
        yield {"choices": [], "usage": usage | {"total_tokens": len(prompt) + drawn}}

    def _refused(self, body: Json, prompts: list[list[int]]) -> str | None:
        ids = body.get("logprob_token_ids")
        if any(not 0 <= token < self.vocabulary for prompt in prompts for token in prompt):
            return "Token id 1000 is out of vocabulary"
        if ids and self.knows_ids == "rejects":
            return "Extra inputs are not permitted: logprob_token_ids"
        if ids and self.knows_ids == "yes":
            return "too many logprob_token_ids" if len(ids) > 128 or len(ids) != body["logprobs"] else None
        if body["logprobs"] > self.max_logprobs:
            return f"Requested sample logprobs of {body['logprobs']}, greater than max allowed: {self.max_logprobs}"
        return None

    def _choice(self, index: int, prompt: list[int], body: Json, sample: int) -> Json:
        stream = np.random.default_rng(body.get("seed", 0) + sample)
        tokens: list[int] = []
        while len(tokens) < body["max_tokens"] and not set(tokens) & set(body.get("stop_token_ids") or []):
            now = law((*prompt, *tokens), self.vocabulary)
            weights = np.exp(now / (body["temperature"] or 1))
            greedy = body["temperature"] == 0
            tokens.append(int(now.argmax() if greedy else stream.choice(self.vocabulary, p=weights / weights.sum())))
        tops = []
        for i, token in enumerate(tokens):
            now = law((*prompt, *tokens[:i]), self.vocabulary)
            asked = body.get("logprob_token_ids") if self.knows_ids == "yes" else None
            told = asked or now.argsort()[::-1][: body["logprobs"]].tolist()
            tops.append({f"token_id:{t}": float(now[t]) for t in [token, *told]})
        logprobs = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [
                float(law((*prompt, *tokens[:i]), self.vocabulary)[token]) for i, token in enumerate(tokens)
            ],
            "top_logprobs": tops,
        }
        return {"index": index, "logprobs": logprobs}


def _listed(prompt: list[int] | list[list[int]]) -> list[list[int]]:
    return prompt if isinstance(prompt[0], list) else [prompt]  # type: ignore[list-item,return-value]
