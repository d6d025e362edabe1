"""The endpoint's routes, on the fake vLLM: what clients send and get, and who may."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fake_vllm import FakeVLLM, Trouble
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from httpx2 import Response
from serving_toys import built, expected, fake_vllm, program_folder, served, told, translations, wait_until

from icl_compiler.artifact import load_program
from icl_compiler.backends.backend import Usage
from icl_compiler.predictor import Predictions
from serving.endpoint import Endpoint, Limits
from serving.keys import KeyRing
from serving.versions import version_of

TEXT = "my money is late"
SAFE = {"content-security-policy", "x-content-type-options", "referrer-policy"}


class Shop(NamedTuple):
    """A client of the endpoint, the endpoint, and the engine behind it."""

    client: TestClient
    endpoint: Endpoint
    engine: FakeVLLM

    def post(self, path: str, body: dict[str, Any], *, status: int = 200, **settings: Any) -> Any:
        response = self.client.post(path, json=body, **settings)
        assert response.status_code == status, response.text
        return response.json()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("programs")
    return {
        "customers": program_folder(place / "customers"),
        "words": program_folder(place / "words", translations()),
    }


@pytest.fixture(scope="module")
def shop(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """For tests that change nothing."""
    state = tmp_path_factory.mktemp("state")
    with fake_vllm() as engine, served(folders, engine.url, state, limits=Limits(body_bytes=50_000)) as (client, found):
        yield Shop(client, found, engine)


@pytest.fixture
def own(folders: dict[str, Path], tmp_path: Path) -> Iterator[Shop]:
    """For tests that change something."""
    with fake_vllm() as engine, served(folders, engine.url, tmp_path) as (client, found):
        yield Shop(client, found, engine)


def error(response: Response, status: int) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's form and tells nothing of our code."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    assert found["type"] == {
        401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
    }.get(status, "invalid_request_error" if status < 500 else "server_error")  # fmt: skip
    assert 'File "' not in response.text
    assert "Traceback" not in response.text
    assert set(response.headers) >= SAFE
    return found


def events(response: Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as OpenAI's do."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert all(part.startswith("data: ") for part in parts[:-1])
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def best(folder: Path, text: str) -> str:
    law = expected(folder, text)
    return max(law, key=law.__getitem__)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# Classification


def test_the_laws_of_several_prompts_are_averaged(tmp_path: Path) -> None:
    folders = {name: program_folder(tmp_path / name, shots=2, ensembles=n) for name, n in (("one", 1), ("three", 3))}
    usage = {}
    with fake_vllm() as engine, served(folders, engine.url, tmp_path / "state") as (client, found):
        asked = Shop(client, found, engine)
        for name, folder in folders.items():
            answer = asked.post("/v1/classify", {"model": name, "input": TEXT})
            assert told(answer["data"][0]) == pytest.approx(expected(folder, TEXT), abs=1e-6)
            usage[name] = answer["usage"]["prompt_tokens"]
            shown = asked.post("/v1/explain", {"model": name, "input": TEXT})
            assert shown["tokens"] == usage[name]
        [top] = asked.post("/v1/classify", {"model": "three", "input": TEXT, "top": 1})["data"]
    assert usage["three"] > 2 * usage["one"]
    law = expected(folders["three"], TEXT)
    assert top["labels"][0]["probability"] <= max(law.values()) + 1e-6


def test_the_law_of_the_labels(shop: Shop, folders: dict[str, Path]) -> None:
    texts = [TEXT, "the parcel got swallowed", TEXT]
    answer = shop.post("/v1/classify", {"model": "customers", "input": texts})
    assert (answer["object"], answer["model"]) == ("list", "customers")
    assert answer["version"] == version_of(folders["customers"])
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    for row, text in zip(answer["data"], texts, strict=True):
        law = expected(folders["customers"], text)
        assert told(row) == pytest.approx(law, rel=1e-6)
        assert list(told(row).values()) == sorted(told(row).values(), reverse=True)
        assert (row["label"], row["probability"]) == tuple(row["labels"][0].values())
        assert row["other"] == pytest.approx(1 - sum(law.values()))
    prompts = load_program(folders["customers"]).prompts(texts)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(len(prompt.tokens) for prompt in prompts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    timing = answer["timing"]
    assert set(timing) == {"retrieve_s", "queue_s", "model_s", "total_s"}
    assert 0 <= max(timing["retrieve_s"], timing["queue_s"], timing["model_s"]) <= timing["total_s"]


def test_a_prompt_seen_before_is_cached(own: Shop) -> None:
    usages = [own.post("/v1/classify", {"model": "customers", "input": TEXT})["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] < 8  # blocks of 4 tokens, and the examination has asked about one token
    assert usages[1]["prompt_tokens"] - 4 <= cached[1] < usages[1]["prompt_tokens"]
    assert usages[1]["computed_tokens"] < usages[0]["computed_tokens"]


def test_the_likeliest_labels_only(shop: Shop, folders: dict[str, Path]) -> None:
    law = expected(folders["customers"], TEXT)
    for top in (1, 2, 3, 99):
        [row] = shop.post("/v1/classify", {"model": "customers", "input": TEXT, "top": top})["data"]
        likeliest = sorted(law.items(), key=lambda pair: -pair[1])[:top]
        assert list(told(row).items()) == [(label, pytest.approx(p, rel=1e-6)) for label, p in likeliest]
        least, most = row["other"], row.get("other_at_most", row["other"])
        assert least - 1e-9 <= 1 - sum(law.values()) <= most + 1e-9
        assert not any("at_most" in entry for entry in row["labels"])


def test_an_old_engine_gives_bounds(folders: dict[str, Path], tmp_path: Path) -> None:
    law = expected(folders["customers"], TEXT)
    with fake_vllm(knows_ids="ignores") as engine, served(folders, engine.url, tmp_path) as (client, _):
        [row] = client.post("/v1/classify", json={"model": "customers", "input": TEXT}).json()["data"]
    assert any("at_most" in entry for entry in row["labels"])
    for entry in row["labels"]:
        least, most = entry["probability"], entry.get("at_most", entry["probability"])
        assert least - 1e-9 <= law[entry["label"]] <= most + 1e-9
    assert row["other"] - 1e-9 <= 1 - sum(law.values()) <= row["other_at_most"] + 1e-9


def test_models(shop: Shop, folders: dict[str, Path]) -> None:
    listed = shop.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["customers", "words"]
    card = shop.client.get("/v1/models/customers").json()
    assert card == listed["data"][0]
    assert card.pop("created") > 1.7e9
    assert card == {
        "id": "customers", "object": "model", "owned_by": "icl", "task": "classification",
        "labels": ["card", "parcel", "refund"], "base_model": "echo", "version": version_of(folders["customers"]),
        "pool_rows": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classify", {"input": TEXT}),
        ("/v1/explain", {"input": TEXT}),
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/chat/completions", {"messages": user(TEXT)}),
        ("/v1/feedback", {"input": TEXT, "label": "card"}),
    ],
)
def test_a_program_that_is_not_there(path: str, body: dict[str, Any], shop: Shop) -> None:
    found = error(shop.client.post(path, json={"model": "custmers", **body}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert "'customers'" in found["message"]


@pytest.mark.parametrize("path", ["/v1/models/nobody", "/v1/feedback?model=nobody"])
def test_a_program_that_is_not_there_to_look_at(path: str, shop: Shop) -> None:
    assert error(shop.client.get(path), 404)["code"] == "model_not_found"


def test_explain_shows_the_prompt_that_is_asked(shop: Shop, folders: dict[str, Path]) -> None:
    found = shop.post("/v1/explain", {"model": "customers", "input": TEXT})
    program = load_program(folders["customers"])
    [prompt] = program.prompts([TEXT])
    assert found.pop("retrieve_s") >= 0
    shots = [shot._asdict() for shot in program.explain(TEXT).shots]
    assert found == {
        "object": "explanation", "model": "customers", "version": version_of(folders["customers"]), "query": TEXT,
        "prompt": program.template.tokenizer.decode(prompt.tokens), "tokens": len(prompt.tokens), "budget": 600,
        "shots": shots, "notes": [], "prompts": 1,
    }  # fmt: skip
    assert len(shots) == 3


def test_explaining_asks_no_engine(own: Shop) -> None:
    before = own.engine.attempts
    own.post("/v1/explain", {"model": "words", "input": "sun"})
    assert own.engine.attempts == before


# Chat


def test_chat(shop: Shop, folders: dict[str, Path]) -> None:
    body = {
        "model": "customers",
        "messages": [
            {"role": "system", "content": "be kind"}, *user("an older question"),
            {"role": "assistant", "content": None}, *user(TEXT),
        ],
        "temperature": 0.3, "max_tokens": 1, "frequency_penalty": 1, "user": "x", "stop": "a", "seed": 1,
    }  # fmt: skip
    answer = shop.post("/v1/chat/completions", body)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "customers")
    assert answer["created"] > 1.7e9
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": best(folders["customers"], TEXT), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"} <= set(answer["usage"])


def test_the_logprob_of_a_label_is_that_of_all_its_tokens(shop: Shop, folders: dict[str, Path]) -> None:
    law = sorted(expected(folders["customers"], TEXT).items(), key=lambda pair: -pair[1])
    body = {"model": "customers", "messages": user(TEXT), "logprobs": True, "top_logprobs": 2}
    [entry] = shop.post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert [(e["token"], pytest.approx(np.exp(e["logprob"]))) for e in entry["top_logprobs"]] == law[:2]
    assert entry["token"] == law[0][0]
    assert bytes(entry["bytes"]).decode() == law[0][0]
    del body["top_logprobs"]
    [entry] = shop.post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []
    body = {"model": "customers", "prompt": TEXT, "logprobs": 3}
    found = shop.post("/v1/completions", body)["choices"][0]["logprobs"]
    assert list(found["top_logprobs"][0]) == [label for label, _ in law]
    assert np.exp([*found["top_logprobs"][0].values()]) == pytest.approx([p for _, p in law])
    assert found["tokens"] == [law[0][0]]
    assert found["token_logprobs"] == [found["top_logprobs"][0][law[0][0]]]


def test_a_message_of_several_parts(shop: Shop, folders: dict[str, Path]) -> None:
    content = [{"type": "text", "text": "my money "}, {"type": "text", "text": "is late"}]
    body = {"model": "customers", "messages": [{"role": "user", "content": content}]}
    answer = shop.post("/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == best(folders["customers"], TEXT)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
REFUSED_CHATS = {
    "several answers": ({"n": 2}, "n", "has one answer"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    "functions": ({"functions": [{"name": "f"}]}, "tools", "calls no tools"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "reads text only"),
    "no user": ({"messages": [{"role": "system", "content": "x"}]}, "messages", "no message has the role 'user'"),
    "nothing said": ({"messages": user(" \n")}, "messages", "the last message is empty"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "messages", "the last message is empty"),
    "no messages": ({"messages": []}, "messages", "at least 1 item"),
    "a stranger": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "Input should be 'system'"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "should be a valid string"),
    "too hot": ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    "five stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items"),
    "half a stop": ({"stop": "\ud800"}, "stop", "holds half a character"),
}


@pytest.mark.parametrize(("more", "param", "said"), REFUSED_CHATS.values(), ids=REFUSED_CHATS)
def test_what_a_chat_may_not_be(more: dict[str, Any], param: str, said: str, shop: Shop) -> None:
    body = {"model": "customers", "messages": user(TEXT), **more}
    content = json.dumps(body).encode()
    response = shop.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    found = error(response, 400)
    assert found["param"] == param
    assert said in found["message"]


@pytest.mark.parametrize("usage", [None, False, True])
def test_a_streamed_chat(usage: bool | None, shop: Shop, folders: dict[str, Path]) -> None:
    body = {"model": "customers", "messages": user(TEXT), "stream": True, "logprobs": True}
    if usage is not None:
        body["stream_options"] = {"include_usage": usage}
    first, second, third, *rest = events(shop.client.post("/v1/chat/completions", json=body))
    heads = {
        (chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in (first, second, third, *rest)
    }
    assert len(heads) == 1
    assert heads.pop()[1] == "chat.completion.chunk"
    assert [chunk["choices"][0]["delta"] for chunk in (first, second, third)] == [
        {"role": "assistant", "content": ""}, {"content": best(folders["customers"], TEXT)}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, second, third)] == [None, None, "stop"]
    assert [bool(chunk["choices"][0]["logprobs"]) for chunk in (first, second, third)] == [False, True, False]
    assert [("usage" in chunk, chunk.get("usage")) for chunk in (first, second, third)] == [(usage is True, None)] * 3
    assert [chunk["choices"] for chunk in rest] == ([[]] if usage else [])
    assert all(chunk["usage"]["total_tokens"] > 0 for chunk in rest)


# Completions


def test_several_prompts(shop: Shop, folders: dict[str, Path]) -> None:
    prompts = [TEXT, "where is the card", "0"]
    labels = [best(folders["customers"], text) for text in prompts]
    body = {"model": "customers", "prompt": prompts}
    answer = shop.post("/v1/completions", body)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    shown = [(c["index"], c["text"], c["finish_reason"], c["logprobs"]) for c in answer["choices"]]
    assert shown == [(place, label, "stop", None) for place, label in enumerate(labels)]
    [chunk, last] = events(
        shop.client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert [c["text"] for c in chunk["choices"]] == labels
    assert (chunk["usage"], last["choices"]) == (None, [])
    assert last["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    [chunk] = events(shop.client.post("/v1/completions", json={**body, "stream": True}))
    assert "usage" not in chunk


REFUSED_COMPLETIONS = {
    "several answers": ({"n": 3}, "n", "has one answer"),
    "an echo": ({"echo": True}, "echo", "neither echoes nor fills in"),
    "a suffix": ({"suffix": "."}, "echo", "neither echoes nor fills in"),
    "no prompts": ({"prompt": []}, "prompt", "at least 1 item"),
    "tokens": ({"prompt": [1, 2]}, "prompt.0", "valid string"),
    "an empty one": ({"prompt": ["a", ""]}, "prompt.1", "prompt.1: is empty"),
    "half a character": ({"prompt": "a\ud83d"}, "prompt", "holds half a character"),
    "too many": ({"prompt": ["a"] * 257}, "prompt", "at most 256 items"),
}


@pytest.mark.parametrize(("more", "param", "said"), REFUSED_COMPLETIONS.values(), ids=REFUSED_COMPLETIONS)
def test_what_a_completion_may_not_be(more: dict[str, Any], param: str, said: str, shop: Shop) -> None:
    content = json.dumps({"model": "customers", "prompt": TEXT, **more}).encode()
    found = error(
        shop.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), 400
    )
    assert found["param"] == param
    assert said in found["message"]


def test_a_program_that_generates_has_no_labels(shop: Shop) -> None:
    found = error(shop.client.post("/v1/classify", json={"model": "words", "input": "sun"}), 400)
    assert found["param"] == "model"
    assert "use /v1/completions" in found["message"]


def test_a_text_too_long_for_the_program(shop: Shop) -> None:
    for path, body in (("classify", {"input": ["fine", "x" * 700]}), ("explain", {"input": "x" * 700})):
        found = error(shop.client.post(f"/v1/{path}", json={"model": "customers", **body}), 400)
        assert found["code"] == "context_length_exceeded"
        assert "the budget is 600" in found["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 20_000, b'{"model": "customers"}'])
def test_what_is_no_request(body: bytes, shop: Shop) -> None:
    error(shop.client.post("/v1/classify", content=body, headers={"Content-Type": "application/json"}), 400)


# Generated text


def generated(engine: FakeVLLM, folder: Path, text: str, *, answer: int = 0, **settings: Any) -> tuple[str, str]:
    """What the engine makes of the program's prompt, and why it ends."""
    program = load_program(folder)
    [prompt] = program.prompts([text])
    body = {"prompt": list(prompt.tokens), "max_tokens": 256, "stop": ["\n"], "n": answer + 1, **settings}
    choices = [event["choices"][0] for event in engine.events(body) if event["choices"]]
    mine = [choice for choice in choices if choice["index"] == answer]
    return "".join(choice["text"] for choice in mine).strip(), mine[-1]["finish_reason"]


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 5}, {"stop": ["a", "Q"]}, {"stop": ""}], ids=str)
def test_text_is_generated(settings: dict[str, Any], shop: Shop, folders: dict[str, Path]) -> None:
    stops = [*(stop for stop in settings.get("stop", []) if stop), "\n"]
    text, finish = generated(shop.engine, folders["words"], "sun", **{**settings, "stop": stops})
    answer = shop.post("/v1/completions", {"model": "words", "prompt": "sun", **settings})
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (text, finish, None)
    [prompt] = load_program(folders["words"]).prompts(["sun"])
    assert answer["usage"]["prompt_tokens"] == len(prompt.tokens)
    asked = shop.engine.bodies[-1]
    assert (asked["stop"], asked["stop_token_ids"]) == (stops, [10])
    assert (asked["temperature"], asked["top_p"], asked["n"]) == (1.0, 1.0, 1)
    said = shop.post("/v1/chat/completions", {"model": "words", "messages": user("sun"), **settings})["choices"][0]
    assert (said["message"]["content"], said["finish_reason"]) == (text, finish)


def test_several_texts_of_several_prompts(shop: Shop, folders: dict[str, Path]) -> None:
    body = {"model": "words", "prompt": ["sun", "star"], "n": 2, "max_tokens": 6, "logprobs": 2, "seed": 3}
    choices = shop.post("/v1/completions", body)["choices"]
    wanted = [
        generated(shop.engine, folders["words"], text, answer=answer, max_tokens=6)
        for text in ("sun", "star")
        for answer in (0, 1)
    ]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == wanted
    assert len({text for text, _ in wanted}) == 4
    for choice in choices:
        assert "".join(choice["logprobs"]["tokens"]).strip() == choice["text"]
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"])
        assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
    assert shop.engine.bodies[-1]["seed"] == 3


@pytest.mark.parametrize("usage", [False, True])
def test_text_is_streamed(usage: bool, shop: Shop, folders: dict[str, Path]) -> None:
    text, finish = generated(shop.engine, folders["words"], "sun", max_tokens=20)
    body = {"model": "words", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": usage}}
    chunks = events(shop.client.post("/v1/completions", json={**body, "prompt": "sun"}))
    said = events(shop.client.post("/v1/chat/completions", json={**body, "messages": user("sun")}))
    if usage:
        for last in (chunks.pop(), said.pop()):
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 20
    assert all(("usage" in chunk) == usage for chunk in (*chunks, *said))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in said) == text
    assert [chunk["choices"][0]["delta"].get("role") for chunk in said] == ["assistant", *[None] * (len(said) - 1)]
    for found in (chunks, said):
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
        assert reasons == [*[None] * (len(found) - 1), finish]
        assert len({chunk["id"] for chunk in found}) == 1


def test_several_texts_are_streamed(shop: Shop, folders: dict[str, Path]) -> None:
    body = {"model": "words", "max_tokens": 6, "n": 2, "stream": True, "messages": user("sun")}
    chunks = events(shop.client.post("/v1/chat/completions", json=body))
    for answer in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == answer]
        wanted = generated(shop.engine, folders["words"], "sun", answer=answer, max_tokens=6)
        assert ("".join(choice["delta"]["content"] for choice in mine), mine[-1]["finish_reason"]) == wanted
        assert [choice["delta"].get("role") for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]


def test_alternatives_of_streamed_text(shop: Shop) -> None:
    body = {"model": "words", "max_tokens": 3, "stream": True, "logprobs": True, "top_logprobs": 2}
    for chunk in events(shop.client.post("/v1/chat/completions", json={**body, "messages": user("sun")})):
        [entry] = chunk["choices"][0]["logprobs"]["content"]
        assert entry["logprob"] == max(other["logprob"] for other in entry["top_logprobs"])
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_more_tokens_than_there_is_room_for(shop: Shop, folders: dict[str, Path]) -> None:
    [prompt] = load_program(folders["words"]).prompts(["sun"])
    room = 4000 - len(prompt.tokens)
    for path, body in (("completions", {"prompt": "sun"}), ("chat/completions", {"messages": user("sun")})):
        for more in ({}, {"stream": True}):
            response = shop.client.post(
                f"/v1/{path}", json={"model": "words", "max_tokens": room + 1, "stop": ",", **body, **more}
            )
            found = error(response, 400)
            assert (found["code"], found["param"]) == ("context_length_exceeded", "max_tokens")
            assert f"no room for {room + 1} more" in found["message"]
    shop.post("/v1/completions", {"model": "words", "max_tokens": room, "stop": ",", "prompt": "sun"})


def test_one_prompt_is_streamed_at_a_time(shop: Shop) -> None:
    body = {"model": "words", "prompt": ["sun", "star"], "stream": True}
    assert error(shop.client.post("/v1/completions", json=body), 400)["param"] == "prompt"


# Corrections


def test_a_correction_counts_from_now_on(own: Shop) -> None:
    body = {"model": "customers", "input": "the dog ate it", "label": "parcel"}
    given = own.post("/v1/feedback", body, status=201)
    assert (given["id"], given["object"], given["undone"], given["pool_rows"]) == (1, "feedback", None, 13)
    assert (given["model"], given["input"], given["label"]) == tuple(body.values())
    assert (given["by"], given["version"]) == (
        "everybody on this machine",
        own.endpoint.live["customers"].edition.version,
    )

    def shots() -> list[tuple[str, str]]:
        found = own.post("/v1/explain", {"model": "customers", "input": "the dog ate it"})["shots"]
        return [(shot["text"], shot["label"]) for shot in found]

    assert ("the dog ate it", "parcel") in shots()
    assert own.client.get("/v1/models/customers").json()["pool_rows"] == 13
    undone = own.client.delete("/v1/feedback/1").json()
    assert undone["undone"] is not None
    assert ("the dog ate it", "parcel") not in shots()
    assert own.client.delete("/v1/feedback/1").json() == undone
    assert own.client.get("/v1/models/customers").json()["pool_rows"] == 12
    error(own.client.delete("/v1/feedback/2"), 404)


def test_a_doubtful_correction_is_taken_with_a_flag(own: Shop) -> None:
    body = {"model": "customers", "input": "My card was  stolen", "label": "refund"}
    flags = own.post("/v1/feedback", body, status=201)["flags"]
    assert flags == [{"kind": "contradiction", "text": "my card was stolen", "label": "card", "similarity": 1.0}]
    flags = own.post("/v1/feedback", body, status=201)["flags"]
    assert flags == [{"kind": "duplicate", "text": "my card was stolen", "label": "refund", "similarity": 1.0}]


def test_corrections_are_listed(own: Shop) -> None:
    for place in range(5):
        name, label = (("customers", "card"), ("words", "Sonne"))[place % 2]
        own.post("/v1/feedback", {"model": name, "input": f"text {place}", "label": label}, status=201)

    def ids(query: str) -> list[int]:
        return [row["id"] for row in own.client.get(f"/v1/feedback{query}").json()["data"]]

    assert ids("") == [1, 2, 3, 4, 5]
    assert ids("?model=words") == [2, 4]
    assert ids("?after=2&limit=2") == [3, 4]
    for query in ("?limit=0", "?limit=1001", "?after=-1", "?after=x", f"?after={2**62}"):
        error(own.client.get(f"/v1/feedback{query}"), 400)
    events = own.client.get("/v1/audit?limit=2").json()["data"]
    assert [(event["what"], event["correction"]) for event in events] == [("added", 1), ("added", 2)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model": "customers", "input": TEXT, "label": "cart"}, "'cart' is no label of this program"),
        ({"model": "customers", "input": TEXT, "label": ""}, "label: is empty"),
        ({"model": "customers", "input": " ", "label": "card"}, "input: is empty"),
        ({"model": "customers", "input": "x" * 700, "label": "card"}, "the budget is 600"),
        ({"model": "customers", "input": "a\ud83d", "label": "card"}, "holds half a character"),
        ({"model": "customers", "input": [TEXT], "label": "card"}, "valid string"),
    ],
    ids=["unknown", "none", "blank", "too long", "half a character", "several"],
)  # fmt: skip
def test_a_correction_that_cannot_be(body: dict[str, str], said: str, shop: Shop) -> None:
    response = shop.client.post(
        "/v1/feedback", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert said in error(response, 400)["message"]
    assert shop.client.get("/v1/feedback").json()["data"] == []


# Versions


def test_reload_and_rollback(tmp_path: Path) -> None:
    folder = program_folder(tmp_path / "shop")
    with fake_vllm() as engine, served({"shop": folder}, engine.url, tmp_path) as (client, _):
        [program] = client.get("/v1/programs").json()["data"]
        old = program["version"]
        assert [kept["version"] for kept in program["versions"]] == [old]
        program_folder(folder, shots=1)
        new = version_of(folder)
        changed = client.post("/v1/programs/shop/reload").json()
        assert (changed["version"], [kept["version"] for kept in changed["versions"]]) == (new, [new, old])
        assert client.post("/v1/classify", json={"model": "shop", "input": TEXT}).json()["version"] == new
        back = client.post("/v1/programs/shop/rollback").json()
        assert (back["version"], back["note"]) == (old, f"a rollback from {new}")
        assert client.post("/v1/classify", json={"model": "shop", "input": TEXT}).json()["version"] == old
        found = error(client.post("/v1/programs/shop/rollback"), 409)
        assert (found["code"], "so there is none to go back to" in found["message"]) == ("version_not_served", True)
        error(client.post("/v1/programs/shop/rollback", json={"version": "0" * 12}), 409)
        error(client.post("/v1/programs/shop/rollback", json={"version": "../.."}), 400)
        assert client.post("/v1/programs/shop/rollback", json={"version": new}).json()["version"] == new
        program_folder(folder, budget=4001)
        assert "takes 4,000" in error(client.post("/v1/programs/shop/reload"), 409)["message"]
        error(client.post("/v1/programs/nobody/reload"), 404)
        what = [event["what"] for event in client.get("/v1/audit").json()["data"]]
        assert what == ["reloaded", "rolled back", "rolled back"]


# Who may


OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/"), ("GET", "/page/{file}")}
NEEDS = {
    ("GET", "/v1/models"): "query", ("GET", "/v1/models/{name}"): "query", ("POST", "/v1/classify"): "query",
    ("POST", "/v1/explain"): "query", ("POST", "/v1/chat/completions"): "query", ("POST", "/v1/completions"): "query",
    ("POST", "/v1/feedback"): "feedback", ("GET", "/v1/feedback"): "feedback",
    ("DELETE", "/v1/feedback/{number}"): "feedback", ("GET", "/v1/audit"): "admin", ("GET", "/v1/programs"): "admin",
    ("POST", "/v1/programs/{name}/reload"): "admin", ("POST", "/v1/programs/{name}/rollback"): "admin",
    ("GET", "/metrics"): "query", ("GET", "/openapi.json"): "query",
}  # fmt: skip


@pytest.fixture(scope="module")
def keyed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, KeyRing]]:
    state = tmp_path_factory.mktemp("keyed")
    ring = KeyRing(state / "keys.json")
    with fake_vllm() as engine, served(folders, engine.url, state, ring=ring) as (client, _):
        ring.add("nobody", ["query"])
        yield client, ring


def test_every_route_demands_a_right(keyed: tuple[TestClient, KeyRing]) -> None:
    client, ring = keyed
    keys = {None: {}} | {
        right: {"Authorization": f"Bearer {ring.add(f'{right}-only', [right])}"}
        for right in ("query", "feedback", "admin")
    }
    routes = {
        (method, route.path) for route in client.app.routes if isinstance(route, APIRoute) for method in route.methods
    }
    assert routes == OPEN | set(NEEDS)
    for method, path in OPEN:
        assert client.request(method, path.format(file="page.js")).status_code == 200
    for (method, path), right in NEEDS.items():
        for has, headers in keys.items():
            response = client.request(method, path.format(name="x", number=0), headers=headers)
            if has is None:
                assert error(response, 401)["code"] == "invalid_api_key"
            elif has in (right, "admin"):
                assert response.status_code in (200, 400, 404)
            else:
                error(response, 403)


def test_a_key_is_held_to_its_rate(keyed: tuple[TestClient, KeyRing]) -> None:
    client, ring = keyed
    headers = {"Authorization": f"Bearer {ring.add('slow', ['query'], 1)}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    response = client.get("/v1/models", headers=headers)
    assert error(response, 429)["code"] == "rate_limit_exceeded"
    assert 50 <= int(response.headers["Retry-After"]) <= 60
    assert client.get("/v1/models").status_code == 401
    every = {"Authorization": f"Bearer {ring.add('monitor', ['query'])}"}
    counted = dict(line.rsplit(" ", 1) for line in client.get("/metrics", headers=every).text.splitlines())
    for reason in ("rate_limit", "unauthorised"):
        assert float(counted[f'icl_rejected_total{{reason="{reason}"}}']) >= 1


def test_a_correction_is_by_its_key(keyed: tuple[TestClient, KeyRing]) -> None:
    client, ring = keyed
    headers = {"Authorization": f"Bearer {ring.add('ann', ['feedback'])}", "Host": "any.example.org"}
    body = {"model": "customers", "input": "whose is it", "label": "card"}
    assert client.post("/v1/feedback", json=body, headers=headers).json()["by"] == "ann"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/"), ("POST", "/v1/programs/customers/reload"), ("DELETE", "/v1/feedback/1")],
)
def test_no_page_of_another_site_may_ask(method: str, path: str, headers: dict[str, str], shop: Shop) -> None:
    """What a browser sends without asking first, too: a POST without a body."""
    loaded = shop.endpoint.live["customers"].loaded
    error(shop.client.request(method, path, headers=headers), 403)
    assert shop.endpoint.live["customers"].loaded == loaded


def test_pages_of_other_sites_are_told_nothing(shop: Shop) -> None:
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    for response in (
        shop.client.options("/v1/classify", headers=headers),
        shop.client.get("/v1/models", headers=headers),
    ):
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    error(shop.client.options("/v1/classify", headers=headers), 405)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"]
)
def test_what_is_not_said_to_be_json_is_not_read(kind: str, shop: Shop) -> None:
    body = json.dumps({"model": "customers", "input": TEXT}).encode()
    error(shop.client.post("/v1/classify", content=body, headers={"Content-Type": kind}), 415)
    error(shop.client.post("/v1/classify", content=iter([body]), headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;"])
def test_what_is_said_to_be_json(kind: str, shop: Shop) -> None:
    body = json.dumps({"model": "customers", "input": TEXT}).encode()
    assert shop.client.post("/v1/classify", content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_body_that_is_too_long(shop: Shop) -> None:
    """By what it says of itself, and by what comes."""
    body = {"model": "customers", "input": "x" * 50_000}
    found = error(shop.client.post("/v1/classify", json=body), 413)
    assert "at most 50,000 bytes" in found["message"]
    parts = iter([json.dumps(body).encode()])
    error(shop.client.post("/v1/classify", content=parts, headers={"Content-Type": "application/json"}), 413)
    body["input"] = "x" * 600
    spaces = 50_000 - len(json.dumps(body))
    longest = json.dumps(body).encode() + b" " * spaces
    assert len(longest) == 50_000
    error(shop.client.post("/v1/classify", content=longest, headers={"Content-Type": "application/json"}), 400)
    error(shop.client.post("/v1/classify", content=longest + b" ", headers={"Content-Type": "application/json"}), 413)


@pytest.mark.parametrize(
    "path",
    ["../server.py", "%2e%2e/server.py", "..%2fserver.py", "%2e%2e%2fserver.py", "....//server.py", "..%5cserver.py",
     "/etc/passwd", "%2fetc%2fpasswd", "page.js%00", "page.js/../../server.py", "__init__.py", "PAGE.JS", "%2e", ""],
)  # fmt: skip
def test_the_page_leads_nowhere_else(path: str, shop: Shop) -> None:
    error(shop.client.get(f"/page/{path}"), 404)


def test_the_page(shop: Shop) -> None:
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        response = shop.client.get(path)
        assert (response.status_code, response.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


def test_every_answer_has_the_headers_that_keep_browsers_careful(own: Shop) -> None:
    """Of the errors see `error`."""
    ok = {"model": "customers", "input": TEXT}
    stream = {"model": "words", "prompt": "sun", "max_tokens": 2, "stream": True}
    for response in (
        own.client.get("/healthz"), own.client.get("/v1/models"), own.client.post("/v1/classify", json=ok),
        own.client.post("/v1/feedback", json={**ok, "label": "card"}), own.client.post("/v1/completions", json=stream),
        own.client.get("/metrics"),
    ):  # fmt: skip
        assert response.status_code in (200, 201)
        assert set(response.headers) >= SAFE
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_a_defect_of_ours_is_one_sentence_and_in_the_log(
    own: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(own.endpoint, "explain", broken)
    response = own.client.post("/v1/explain", json={"model": "customers", "input": TEXT})
    assert "secret" not in error(response, 500)["message"]
    assert "RuntimeError: the secret of the house" in caplog.text
    own.post("/v1/classify", {"model": "customers", "input": TEXT})


@pytest.mark.parametrize("log_text", [False, True])
def test_what_users_write_is_in_the_log_only_if_wanted(
    log_text: bool, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "sesame 4711"
    with (
        fake_vllm() as engine,
        built(folders, engine.url, tmp_path, log_text=log_text) as (app, endpoint),
        TestClient(app, raise_server_exceptions=False) as client,
    ):
        assert client.portal is not None
        client.portal.call(endpoint.start)
        for body in ({"input": secret}, {"input": secret + "x" * 700}, {"input": [secret, secret + "y" * 700]}):
            client.post("/v1/classify", json={"model": "customers", **body})
            client.post("/v1/explain", json={"model": "customers", **body})
        client.post("/v1/feedback", json={"model": "customers", "input": secret, "label": secret})
        client.post("/v1/feedback", json={"model": "customers", "input": secret, "label": "card"})
        client.post("/v1/chat/completions", json={"model": "words", "messages": user(secret), "stream": True})
        client.post(f"/v1/{secret}", json={"model": secret})
        engine.trouble.append(Trouble(400, {"error": {"message": "no"}}))
        client.post("/v1/completions", json={"model": "words", "prompt": secret})
        engine.trouble.append(Trouble(200, b"<html>"))
        client.post("/v1/completions", json={"model": "customers", "prompt": secret})
    said = [record.getMessage() for record in caplog.records if record.name == "icl.serve"]
    assert any(secret in line for line in said) == log_text
    assert log_text or secret not in caplog.text


def test_text_is_never_a_template(shop: Shop) -> None:
    text = "{{ 7*7 }} {% for x in y %} ${7*7} {{ ''.__class__ }}"
    assert text in shop.post("/v1/explain", {"model": "customers", "input": text})["prompt"]


# What it says about itself


def test_health(own: Shop) -> None:
    assert own.client.get("/healthz").json() == {"status": "alive"}
    assert own.client.get("/readyz").json() == {"status": "ready"}
    own.engine.stop()
    assert own.client.get("/healthz").status_code == 200
    assert own.client.get("/readyz").status_code == 503


def test_metrics(own: Shop) -> None:
    own.post("/v1/classify", {"model": "customers", "input": [TEXT, TEXT]})
    own.post("/v1/feedback", {"model": "customers", "input": TEXT, "label": "card"}, status=201)
    own.client.get("/v1/models/nobody")
    own.client.get("/nowhere/at/all")
    own.client.post("/v1/classify", json={"model": "customers", "input": "x" * (1 << 20)})
    own.client.post("/v1/completions", json={"model": "words", "prompt": "sun", "max_tokens": 4})
    lines = own.client.get("/metrics").text.splitlines()
    for line in (
        'icl_requests_total{program="customers",route="/v1/classify",status="200"} 1.0',
        'icl_requests_total{program="customers",route="/v1/feedback",status="201"} 1.0',
        'icl_requests_total{program="unknown",route="/v1/models/{name}",status="404"} 1.0',
        'icl_requests_total{program="unknown",route="none",status="404"} 1.0',
        'icl_rejected_total{reason="too_large"} 1.0',
        'icl_pool_rows{program="customers"} 13.0',
        'icl_completion_tokens_total{program="words"} 4.0',
        "icl_queue_waiting 0.0",
        "icl_in_flight 1.0",  # this request
    ):
        assert line in lines
    answered = [line for line in lines if line.startswith('icl_answers_total{label="')]
    assert sum(float(line.rpartition(" ")[2]) for line in answered) == 3


def test_the_description_declares_what_can_come(shop: Shop) -> None:
    described = shop.client.get("/openapi.json").json()
    assert set(described["paths"]) == {path for _, path in NEEDS if path.startswith("/v1/")}
    for operations in described["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            schema = operation["responses"]["429"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert set(described["components"]["schemas"]["ErrorDetail"]["properties"]) == {"message", "type", "param", "code"}


def test_drift_is_looked_for_whatever_the_task(own: Shop) -> None:
    client = own.client
    client.post("/v1/completions", json={"model": "words", "prompt": "sun", "max_tokens": 2})
    client.post("/v1/classify", json={"model": "customers", "input": "the parcel is late"})
    said = client.get("/metrics").text
    for program in ("words", "customers"):
        assert f'icl_drift_alarm{{kind="unlike",program="{program}"}} 0.0' in said
    assert 'icl_answers_total{label="other",program="words"} 1.0' in said
    assert 'icl_drift_entropy_nats{program="customers"}' in said
    assert 'icl_drift_entropy_nats{program="words"}' not in said


def test_a_reference_is_asked_beside_the_program(folders: dict[str, Path], tmp_path: Path) -> None:
    labels = load_program(folders["customers"]).labels[::-1]

    class Reference:
        def __init__(self) -> None:
            self.labels = labels

        def predict(self, texts: Sequence[str], *, progress: object = None) -> Predictions:
            law = np.tile([0.5, 0.25, 0.25], (len(texts), 1))
            return Predictions(self.labels, law, np.zeros(len(texts), dtype=np.int64), Usage(0, 0, 0), 0.0)

    asked = {"customers": folders["customers"]}
    references = {"customers": Reference()}
    settings: dict[str, Any] = {"references": references, "shadow_rate": 1.0}
    with fake_vllm() as engine, served(asked, engine.url, tmp_path, **settings) as (client, _):
        body = {"model": "customers", "messages": [{"role": "user", "content": "my money is late"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        law = expected(folders["customers"], "my money is late")
        ours = np.array([law[label] for label in labels])
        other = 1 - ours.sum()
        tv = 0.5 * (np.abs(ours - [0.5, 0.25, 0.25]).sum() + other)

        def gap() -> list[float]:
            said = client.get("/metrics").text
            return [float(n) for n in re.findall(r'^icl_shadow_gap{program="customers"} (\S+)$', said, re.MULTILINE)]

        wait_until(gap)
        assert gap() == pytest.approx([tv])
