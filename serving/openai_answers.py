"""Answers as OpenAI writes them, and the endpoint's own.

- A label is one token here, whatever number of them it has in the model: its log-probability is that of all of them,
  and the alternatives to it are the other labels.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import numpy as np
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from icl_compiler.backends.vllm_protocol import Json
from icl_compiler.feedback import Correction
from serving.endpoint import Labelled
from serving.live import Edition
from serving.openai_api import ChatRequest, CompletionRequest

log = logging.getLogger("icl.serve")

CHAT_CHUNK = "chat.completion.chunk"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes the same


def card(edition: Edition, loaded: float) -> Json:
    """A program as /v1/models shows it."""
    return {
        "id": edition.name,
        "object": "model",
        "created": int(loaded),
        "owned_by": "icl",
        "task": edition.program.task,
        "labels": list(edition.program.labels),
        "base_model": edition.engine.model,
        "version": edition.version,
        "pool_rows": len(edition.program.pool.data),
    }


def shown(correction: Correction) -> Json:
    """A correction as /v1/feedback shows it."""
    row = correction._asdict()
    head = {"id": row.pop("id"), "object": "feedback", "model": row.pop("program"), "input": row.pop("text")}
    return {**head, **row}


def law(edition: Edition, answer: Labelled, top: int | None) -> Json:
    """The labels of an answer, best first; where only bounds are known, by the lower ones."""
    labels = edition.program.labels
    order = np.argsort(-answer.probabilities, kind="stable")[:top].tolist()
    told = [{"label": labels[i], "probability": float(answer.probabilities[i])} for i in order]
    best = answer.best
    found = {"label": labels[best], "probability": float(answer.probabilities[best]), "labels": told}
    if answer.upper is None:
        return {**found, "other": answer.other}
    for entry, i in zip(told, order, strict=True):
        if answer.upper[i] > answer.probabilities[i]:
            entry["at_most"] = float(answer.upper[i])
    return {**found, "other": max(0.0, 1 - float(answer.upper.sum())), "other_at_most": answer.other}


def _logprob(answer: Labelled, label: int) -> float:
    return max(float(answer.scores.lower[label]), _LEAST_LOGPROB)


def chat_logprobs(edition: Edition, answer: Labelled, top: int) -> Json:
    """One entry for the whole label: its log-probability is that of all its tokens."""
    labels = edition.program.labels
    order = np.argsort(-answer.probabilities, kind="stable")[:top].tolist()
    entries = [
        {"token": labels[i], "logprob": _logprob(answer, i), "bytes": list(labels[i].encode())}
        for i in (answer.best, *order)
    ]
    return {"content": [{**entries[0], "top_logprobs": entries[1:]}], "refusal": None}


def text_logprobs(edition: Edition, answer: Labelled, top: int) -> Json:
    """The likeliest label and its alternatives, as a completion tells tokens."""
    labels = edition.program.labels
    order = np.argsort(-answer.probabilities, kind="stable")[:top].tolist()
    return {
        "tokens": [labels[answer.best]],
        "token_logprobs": [_logprob(answer, answer.best)],
        "top_logprobs": [{labels[i]: _logprob(answer, i) for i in order}],
        "text_offset": [0],
    }


def usage_of(answers: Sequence[Labelled], edition: Edition) -> Json:
    """What classified queries cost, in OpenAI's words; `computed_tokens` are all that the engine computed."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(len(edition.program.label_words[answer.best]) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.scores.cached_tokens for answer in answers)},
        "computed_tokens": sum(answer.scores.computed_tokens for answer in answers),
    }


def wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    """Whether a stream should end with what it cost."""
    return body.stream_options is not None and body.stream_options.include_usage


def unpriced(body: ChatRequest | CompletionRequest) -> Json:
    """What all other chunks of such a stream say of its cost."""
    return {"usage": None} if wants_usage(body) else {}


def chat_chunks(head: Json, body: ChatRequest, label: str, logprobs: Json | None, usage: Json) -> list[Json]:
    """A label as the parts of a streamed chat answer."""
    deltas: list[tuple[Json, Json | None, str | None]] = [
        ({"role": "assistant", "content": ""}, None, None),
        ({"content": label}, logprobs, None),
        ({}, None, "stop"),
    ]
    chunks = [chat_chunk(head | unpriced(body), 0, *part) for part in deltas]
    return [*chunks, {**head, "object": CHAT_CHUNK, "choices": [], "usage": usage}] if wants_usage(body) else chunks


def completion_chunks(whole: Json, body: CompletionRequest) -> list[Json]:
    """Labels as the parts of a streamed completion."""
    head = {name: value for name, value in whole.items() if name != "usage"}
    chunks = [{**head, **unpriced(body)}]
    return [*chunks, {**whole, "choices": []}] if wants_usage(body) else chunks


def chat_chunk(head: Json, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
    """A part of a streamed chat answer."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**head, "object": CHAT_CHUNK, "choices": [choice]}


def joined(parts: list[Json]) -> Json:
    """The log-probabilities of a text that came in parts."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part.get(name) or []] for name in names}


def choice(index: int, text: str, finish: str | None, logprobs: Json | None, *, chat: bool) -> Json:
    """One answer, as a chat or as a completion."""
    if not chat:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": as_chat(logprobs), "finish_reason": finish}


def as_chat(logprobs: Json | None) -> Json | None:
    """Log-probabilities of a completion in the shape that a chat has."""
    if logprobs is None:
        return None

    def entry(token: str, logprob: float) -> Json:
        return {"token": token, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(token.encode())}

    tops = logprobs.get("top_logprobs") or [{} for _ in logprobs["tokens"]]
    content = [
        {**entry(token, value), "top_logprobs": [entry(*pair) for pair in (top or {}).items()]}
        for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def total(costs: list[Json]) -> Json:
    """What several texts cost together."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    total: Json = {name: sum(int(cost.get(name, 0)) for cost in costs) for name in names}
    cached = sum(int((cost.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) for cost in costs)
    return {**total, "prompt_tokens_details": {"cached_tokens": cached}}


class EventStream(StreamingResponse):
    """Server-sent events: each chunk as it comes, then the end.

    However it ends, the chunks are closed, and with them what they asked of the engine: also where a client that is
    there still reads nothing for `stalled_s`.
    """

    def __init__(self, chunks: AsyncGenerator[Json, None], *, stalled_s: float) -> None:
        self._chunks = chunks
        self._stalled_s = stalled_s
        super().__init__(self._lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def stream_response(self, send: Send) -> None:
        """Send all."""

        async def sending(message: Message) -> None:
            async with asyncio.timeout(self._stalled_s):
                await send(message)

        try:
            async with aclosing(self._chunks):
                await super().stream_response(sending)
        except TimeoutError:
            log.warning("a stream was ended: its client has read nothing for %g s", self._stalled_s)

    async def _lines(self) -> AsyncIterator[str]:
        async for chunk in self._chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"


async def each(chunks: list[Json]) -> AsyncGenerator[Json, None]:
    """The chunks of an answer that is there already."""
    for chunk in chunks:
        yield chunk
