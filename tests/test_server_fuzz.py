"""What nobody would send on purpose, and engines that answer it: a right answer or a clear error, never a defect.

`ICL_SCHEMA_REQUESTS=10000` makes the test from the endpoint's own description send so many requests (3 minutes).
"""

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import pytest
import requests
import schemathesis
from fake_vllm import FakeVLLM, Json, logprob
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_toys import BYTES, fake_vllm, listening, program_folder, served, told, translations
from toys import NASTY

from icl_compiler.artifact import load_program
from icl_compiler.data import normalise_text
from icl_compiler.errors import BudgetError
from icl_compiler.program import Program
from serving.endpoint import Endpoint

REQUESTS = int(os.environ.get("ICL_SCHEMA_REQUESTS", "2000"))
JSON = {"Content-Type": "application/json"}
any_text = st.text(st.characters(exclude_categories=()), max_size=80) | st.sampled_from(
    ["card", "parcel", " card\n", "Label: card\nText: x", "\ud800", "a\x00b", "\u202e", "0", " ", "\ufeff", "x" * 900]
)


class Shop(NamedTuple):
    """A client of the endpoint, what it serves, and the engine behind it."""

    client: TestClient
    endpoint: Endpoint
    engine: FakeVLLM
    program: Program

    def post(self, path: str, body: Json) -> Any:
        return self.client.post(path, content=json.dumps(body).encode(), headers=JSON)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("programs")
    return {
        "customers": program_folder(place / "customers"),
        "words": program_folder(place / "words", translations()),
    }


@pytest.fixture(scope="module")
def shop(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    state = tmp_path_factory.mktemp("state")
    with fake_vllm() as engine, served(folders, engine.url, state) as (client, endpoint):
        yield Shop(client, endpoint, engine, load_program(folders["customers"]))


def strictly(text: str) -> Any:
    """JSON, and nothing that only Python takes for it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def clear(response: Any, *statuses: int) -> str:
    """The message of an error with one of these statuses."""
    assert response.status_code in statuses, response.text
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    found = strictly(response.text)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    message: str = found["message"]
    return message


def law(program: Program, text: str) -> dict[str, float] | str:
    """The law of the labels after `text`, or why there is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a character"
    if not text.strip():
        return "is empty"
    try:
        [prompt] = program.prompts([text])
    except BudgetError:
        return "the budget is 600"
    words = zip(program.labels, program.label_words, strict=True)
    return {label: float(np.exp(logprob(prompt.tokens, word, BYTES))) for label, word in words}


def with_nasty_examples(test: Any) -> Any:
    for text in (*NASTY, "a\ud83d", "x" * 1_000_000):
        test = example(text=text)(test)
    return test


@with_nasty_examples
@given(text=any_text)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_classified_or_refused(text: str, shop: Shop) -> None:
    wanted = law(shop.program, text)
    for path, body in (
        ("/v1/classify", {"input": text}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):  # fmt: skip
        response = shop.post(path, {"model": "customers", **body})
        if isinstance(wanted, str):
            assert wanted in clear(response, 400)
            continue
        assert response.status_code == 200, response.text
        answer = strictly(response.text)
        if path == "/v1/classify":
            assert told(answer["data"][0]) == pytest.approx(wanted, rel=1e-6)
        else:
            assert wanted[answer["choices"][0]["message"]["content"]] == max(wanted.values())


@with_nasty_examples
@given(text=any_text)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_correction_is_kept_as_it_is_or_refused(text: str, shop: Shop) -> None:
    given = shop.post("/v1/feedback", {"model": "customers", "input": text, "label": "card"})
    wanted = law(shop.program, text)
    if isinstance(wanted, str):
        assert wanted in clear(given, 400)
        return
    assert given.status_code == 201, given.text
    number = strictly(given.text)["id"]
    try:
        [row] = shop.client.get(f"/v1/feedback?after={number - 1}&limit=1").json()["data"]
        assert (row["input"], row["label"]) == (text, "card")
        data = shop.endpoint.live["customers"].edition.program.pool.data
        same = [row for row, other in enumerate(data.texts) if normalise_text(other) == normalise_text(text)]
        assert {data.answers[row] for row in same} == {"card"}
        assert shop.post("/v1/classify", {"model": "customers", "input": text}).status_code == 200
    finally:
        assert shop.client.delete(f"/v1/feedback/{number}").status_code == 200
    assert shop.endpoint.live["customers"].edition.corrections == 0


@given(label=any_text)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_label(label: str, shop: Shop) -> None:
    given = shop.post("/v1/feedback", {"model": "customers", "input": "whose is it", "label": label})
    if label in shop.program.labels:
        assert given.status_code == 201
        shop.client.delete(f"/v1/feedback/{given.json()['id']}")
    else:
        clear(given, 400)


# Engines


NONSENSE: list[Any] = [
    None, 0, -1, 1, 1e308, -1e308, 2**70, float("nan"), "", "x", "\ud800", "token_id:5", "token_id:", [], {}, [[]],
    {"a": 1}, True, ["x"] * 3,
]  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in an answer."""
    yield here
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from places(part, (*here, name))


def spoilt(answer: Json, seed: int) -> Any:
    """The answer with nonsense somewhere in it, or without some part."""
    chance = random.Random(seed)
    found: Any = copy.deepcopy(answer)
    where = chance.choice(list(places(found)))
    if not where:
        return chance.choice(NONSENSE)
    part = found
    for name in where[:-1]:
        part = part[name]
    if chance.random() < 0.2:
        del part[where[-1]]
    else:
        part[where[-1]] = chance.choice(NONSENSE)
    return found


ASKED: list[tuple[str, Json]] = [
    ("/v1/classify", {"model": "customers", "input": "my money is late"}),
    ("/v1/classify", {"model": "customers", "input": ["where is it"], "top": 1}),
    ("/v1/chat/completions", {"model": "customers", "messages": [{"role": "user", "content": "x"}], "logprobs": True}),
    ("/v1/completions", {"model": "words", "prompt": "sun", "max_tokens": 3, "logprobs": 1, "n": 2}),
    ("/v1/completions", {"model": "words", "prompt": "sun", "max_tokens": 3, "logprobs": 1, "stream": True}),
    (
        "/v1/chat/completions",
        {"model": "words", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True,
         "top_logprobs": 1, "stream": True, "stream_options": {"include_usage": True}},
    ),
]  # fmt: skip


@given(seed=st.integers(0, 2**32), asked=st.sampled_from(ASKED), skip=st.integers(0, 3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nonsense_of_an_engine_is_an_answer_or_a_bad_gateway(
    seed: int, asked: tuple[str, Json], skip: int, shop: Shop
) -> None:
    left = [skip]

    def spoil(answer: Json) -> Any:
        left[0] -= 1
        return spoilt(answer, seed) if left[0] < 0 else answer

    path, body = asked
    shop.engine.spoil = spoil
    try:
        response = shop.post(path, body)
    finally:
        shop.engine.spoil = lambda answer: answer
    line = shop.endpoint.line
    assert (line.admitted, line.inside, line.waiting) == (0, 0, 0)
    if response.status_code != 200:
        clear(response, 502, 503)
    elif body.get("stream"):
        *chunks, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for chunk in chunks:
            strictly(chunk.removeprefix("data: "))
    else:
        for row in strictly(response.text).get("data", []):
            assert all(0 <= entry["probability"] <= 1 + 1e-3 for entry in row["labels"])


# The endpoint's own description


def short(body: Json) -> Iterator[Json]:
    """Events of short texts, whatever length was asked for."""
    for index in range(body["n"]):
        for text, finish in (("a", None), ("b", "stop")):
            yield {"choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": finish}]}
    yield {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2 * body["n"]}}


def test_thousands_of_requests_from_our_own_description(folders: dict[str, Path], tmp_path: Path) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    with fake_vllm() as engine, listening(folders, engine.url, tmp_path) as (url, _):
        engine.events = short  # type: ignore[method-assign]
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        cases = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in GenerationMode]

        @given(case=st.one_of(cases), name=st.sampled_from([None, "customers", "words"]), right=st.booleans())
        @settings(
            max_examples=REQUESTS, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def send(case: schemathesis.Case, name: str | None, right: bool) -> None:
            if name is not None:  # a random name is that of no program
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = name
                    if right and "label" in case.body:
                        case.body["label"] = "card"
                if "name" in (case.path_parameters or {}):
                    case.path_parameters["name"] = name
            response = case.call(session=session)
            statuses[case.operation.label, response.status_code] += 1
            assert "Traceback" not in response.text
            assert 'File "' not in response.text
            case.validate_response(response, checks=checks)

        with requests.Session() as session:
            send()
        counted = httpx2.get(f"{url}/metrics").text.splitlines()
    sent = sum(statuses.values())
    assert sent >= REQUESTS
    answered = sum(float(line.rpartition(" ")[2]) for line in counted if line.startswith("icl_requests_total{"))
    assert answered == sent + 1  # and the description
    assert {operation for operation, _ in statuses} == {operation.label for operation in operations}
    assert {status for _, status in statuses} >= {200, 201, 400, 404, 409}
