"""An endpoint to play with: small programs on the fake vLLM, in this process."""

import time
from asyncio import Runner
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import uvicorn
from fake_vllm import FakeVLLM, logprob
from fastapi import FastAPI
from fastapi.testclient import TestClient
from toys import customers

from icl_compiler.artifact import load_program, save_program
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.feedback import FeedbackStore
from serving.endpoint import Endpoint, Limits
from serving.gate import LOCAL_NAMES, Gate
from serving.keys import KeyRing
from serving.metrics import Metrics
from serving.server import create_app
from serving.upstream import Upstream
from serving.versions import Versions

BYTES = 257  # tokens of the model `echo`


def fake_vllm(**settings: Any) -> FakeVLLM:
    """A vLLM server for programs of the model `echo`."""
    return FakeVLLM(model={"id": "echo", "root": "echo", "max_model_len": 4000}, vocabulary=BYTES, **settings)


def program_folder(folder: Path, data: Dataset | None = None, **settings: Any) -> Path:
    """A program of `data` (default: messages of customers), saved."""
    chosen = {"model": "echo", "retriever": "bm25", "shots": 3, "budget": 600} | settings
    save_program(compile_program(data or customers(), **chosen), folder)
    return folder


def translations() -> Dataset:
    """Five words with their translations."""
    pairs = {"dog": "Hund", "cat": "Katze", "house": "Haus", "tree": "Baum", "moon": "Mond"}
    return Dataset(tuple(pairs), tuple(pairs.values()), "generation", "words")


def expected(folder: Path, text: str) -> dict[str, float]:
    """The law of the labels, by the program as it stands in its folder and the law behind the fake."""
    program = load_program(folder)
    [prompts] = program.prompt_sets([text])
    return {
        label: float(np.mean([np.exp(logprob(prompt.tokens, word, BYTES)) for prompt in prompts]))
        for label, word in zip(program.labels, program.label_words, strict=True)
    }


def told(row: dict[str, Any]) -> dict[str, float]:
    """The law of the labels, as /v1/classify says it."""
    return {entry["label"]: entry["probability"] for entry in row["labels"]}


def wait_until(true: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


@contextmanager
def built(
    programs: dict[str, Path],
    upstream: str,
    state: Path,
    *,
    limits: Limits | None = None,
    ring: KeyRing | None = None,
    patience_s: float = 1.0,
    log_text: bool = False,
    **settings: Any,
) -> Iterator[tuple[FastAPI, Endpoint]]:
    """An endpoint for these programs, not yet started."""
    metrics = Metrics()
    engine = Upstream(upstream, patience_s=patience_s, observe=lambda outcome: metrics.upstream(upstream, outcome))
    with FeedbackStore(state / "corrections.sqlite") as store:
        endpoint = Endpoint(
            programs,
            [engine],
            store=store,
            versions=Versions(state / "versions"),
            limits=limits or Limits(),
            metrics=metrics,
            **settings,
        )
        gate = Gate(ring, hosts=None if ring else (*LOCAL_NAMES, "testserver"))
        yield create_app(endpoint, gate=gate, metrics=metrics, log_text=log_text), endpoint


@contextmanager
def served(*arguments: Any, **settings: Any) -> Iterator[tuple[TestClient, Endpoint]]:
    """A client of an endpoint that serves these programs; no sockets between the two."""
    with built(*arguments, **settings) as (app, endpoint), TestClient(app, raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(endpoint.start)
        yield client, endpoint


@contextmanager
def listening(*arguments: Any, **settings: Any) -> Iterator[tuple[str, Endpoint]]:
    """The URL of an endpoint that serves these programs behind uvicorn, in a thread."""
    with built(*arguments, **settings) as (app, endpoint):
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, server_header=False)
        server = uvicorn.Server(config)

        async def serve() -> None:
            await endpoint.start()
            await server.serve()

        def run() -> None:
            with Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        thread = Thread(target=run)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", endpoint
        finally:
            server.should_exit = True
            thread.join()
