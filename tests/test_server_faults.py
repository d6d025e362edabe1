"""What goes wrong around the endpoint, and how much may come at once: nobody waits for ever, nothing kept is lost."""

import asyncio
import gc
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import httpx2
import pytest
from fake_vllm import DROP, FakeVLLM, Json, Trouble
from fastapi.testclient import TestClient
from serving_toys import expected, fake_vllm, listening, program_folder, served, told, translations, wait_until
from starlette.requests import Request
from toys import TESTS

from icl_compiler.errors import ArtifactError, BudgetError
from icl_compiler.vllm_launch import free_port
from serving import line
from serving.endpoint import Endpoint, Limits
from serving.openai_api import RequestError
from serving.server import _while_wanted
from serving.versions import version_of

TEXT = "my money is late"
ASK = {"model": "customers", "input": TEXT}
SAY = {"model": "words", "prompt": "sun", "max_tokens": 200, "stop": "~"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("programs")
    return {
        "customers": program_folder(place / "customers"),
        "words": program_folder(place / "words", translations()),
    }


@pytest.fixture
def engine() -> Iterator[FakeVLLM]:
    with fake_vllm() as server:
        yield server


@pytest.fixture(scope="module")
def started(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestClient, Endpoint, FakeVLLM]]:
    with fake_vllm() as server, served(folders, server.url, tmp_path_factory.mktemp("state")) as (client, endpoint):
        yield client, endpoint, server


@pytest.fixture
def shop(started: tuple[TestClient, Endpoint, FakeVLLM]) -> Iterator[tuple[TestClient, Endpoint, FakeVLLM]]:
    """For tests that change nothing but the engine."""
    yield started
    wait_until(lambda: not started[2].streams)  # one that was broken off would spoil its events as the next test says
    started[2].spoil = lambda answer: answer
    started[2].trouble.clear()


def is_right(response: Any, folders: dict[str, Path], text: str = TEXT) -> bool:
    assert response.status_code == 200, response.text
    [row] = response.json()["data"]
    return told(row) == pytest.approx(expected(folders["customers"], text), rel=1e-6)


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = response.json()["error"]
    return found


def is_empty(endpoint: Endpoint) -> bool:
    return (endpoint.line.admitted, endpoint.line.inside, endpoint.line.waiting) == (0, 0, 0)


# The engine is gone, slow, or talks nonsense


def test_an_outage_within_our_patience_is_not_noticed(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    with served(folders, engine.url, tmp_path, patience_s=10.0) as (client, endpoint):
        assert is_right(client.post("/v1/classify", json=ASK), folders)
        engine.stop()
        again: list[FakeVLLM] = []
        Timer(0.5, lambda: again.append(fake_vllm(port=engine.port))).start()
        assert is_right(client.post("/v1/classify", json=ASK), folders)
        assert is_empty(endpoint)
        again[0].stop()


def test_after_an_outage_all_is_well(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    with served(folders, engine.url, tmp_path, patience_s=0.2) as (client, endpoint):
        engine.stop()
        for path, body in (("classify", ASK), ("completions", SAY), ("completions", {**SAY, "stream": True})):
            response = client.post(f"/v1/{path}", json=body)
            assert error(response, 503)["code"] == "engine_unreachable"
            assert int(response.headers["Retry-After"]) >= 1
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/explain", json=ASK).status_code == 200
        assert client.post("/v1/feedback", json={**ASK, "label": "refund"}).status_code == 201
        with fake_vllm(port=engine.port):
            assert client.get("/readyz").status_code == 200
            assert client.post("/v1/classify", json=ASK).json()["data"][0]["label"]
            assert client.post("/v1/completions", json=SAY).status_code == 200
        assert is_empty(endpoint)


@pytest.mark.parametrize(
    ("path", "body"),
    [("classify", ASK), ("completions", SAY), ("completions", {**SAY, "stream": True})],
    ids=["labels", "text", "stream"],
)
def test_a_slow_engine_meets_the_deadline(
    path: str, body: dict[str, Any], folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    limits = Limits(deadline_s=0.4)
    with served(folders, engine.url, tmp_path, limits=limits) as (client, endpoint):
        engine.delay = 30
        started = time.monotonic()
        found = error(client.post(f"/v1/{path}", json=body), 504)
        assert 0.4 <= time.monotonic() - started < 2
        assert (found["code"], found["message"]) == ("deadline", "not answered within 0.4 s")
        assert is_empty(endpoint)
        wait_until(lambda: engine.broken_off == 1)  # nothing is computed for nobody
        engine.delay = 0
        assert is_right(client.post("/v1/classify", json=ASK), folders)
        assert 'icl_rejected_total{reason="deadline"} 1.0' in client.get("/metrics").text


def test_the_deadline_holds_in_the_waiting_line_too(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    limits = Limits(in_flight=1, waiting=5, deadline_s=0.5)
    with listening(folders, engine.url, tmp_path, limits=limits) as (url, endpoint), ThreadPoolExecutor(4) as threads:
        engine.delay = 30
        asked = [threads.submit(httpx2.post, f"{url}/v1/classify", json=ASK) for _ in range(4)]
        assert [error(each.result(), 504)["code"] for each in asked] == ["deadline"] * 4
        assert is_empty(endpoint)
        engine.delay = 0
        assert is_right(httpx2.post(f"{url}/v1/classify", json=ASK), folders)


GARBAGE = {
    "a page": Trouble(200, b"<!doctype html><title>It works</title>"),
    "half of it": Trouble(200, b'{"choices": [{"ind'),
    "nothing": Trouble(200, b""),
    "another shape": Trouble(200, {"choices": {"0": {}}}),
    "too few": Trouble(200, {"choices": [], "usage": {"prompt_tokens": 1}}),
    "a refusal": Trouble(400, {"error": {"message": "no"}}),
    "a page of errors": Trouble(404, b"<html><body>nginx</body></html>"),
}


@pytest.mark.parametrize("trouble", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_bad_gateway(
    trouble: Trouble, shop: tuple[TestClient, Endpoint, FakeVLLM], folders: dict[str, Path]
) -> None:
    client, endpoint, engine = shop
    for path, body in (("classify", ASK), ("completions", SAY), ("completions", {**SAY, "stream": True})):
        engine.trouble.append(trouble)
        assert error(client.post(f"/v1/{path}", json=body), 502)["code"] == "engine_failed"
    assert is_empty(endpoint)
    assert is_right(client.post("/v1/classify", json=ASK), folders)


def test_numbers_that_are_none(shop: tuple[TestClient, Endpoint, FakeVLLM]) -> None:
    def spoil(answer: Json) -> Json:
        for choice in answer["choices"]:
            choice["logprobs"]["top_logprobs"][0] = dict.fromkeys(choice["logprobs"]["top_logprobs"][0], float("nan"))
        return answer

    client, _, engine = shop
    engine.spoil = spoil
    message = error(client.post("/v1/classify", json=ASK), 502)["message"]
    assert "gave log-probabilities that are none (nan)" in message


def part(**changes: Any) -> Json:
    return {"choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None, **changes}]}


LOGPROBS = {"tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": [{"x": -1.0}], "text_offset": [0]}
GARBAGE_IN_TEXT = {
    "another number": part(index=1),
    "no number": part(index="0"),
    "no text": part(text=None),
    "half a character": part(text="\ud800"),
    "a strange end": part(finish_reason=float("nan")),
    "no choices": {},
    "a list": [],
    "an error": {"error": {"message": "CUDA out of memory"}},
    "nan": part(logprobs={**LOGPROBS, "token_logprobs": [float("nan")]}),
    "too few numbers": part(logprobs={**LOGPROBS, "token_logprobs": []}),
    "numbers of another kind": part(logprobs={**LOGPROBS, "top_logprobs": [5]}),
    "not even a number": part(logprobs=5),
    "a strange cost": {"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 1}},
    "no cost": {"choices": [], "usage": []},
}


@pytest.mark.parametrize("event", GARBAGE_IN_TEXT.values(), ids=GARBAGE_IN_TEXT)
def test_garbage_in_a_text(event: Any, shop: tuple[TestClient, Endpoint, FakeVLLM]) -> None:
    client, endpoint, engine = shop
    engine.spoil = lambda _: event
    for more in ({}, {"stream": True}):
        assert error(client.post("/v1/completions", json={**SAY, **more}), 502)["code"] == "engine_failed"
    assert is_empty(endpoint)


@pytest.mark.parametrize("event", GARBAGE_IN_TEXT.values(), ids=GARBAGE_IN_TEXT)
def test_garbage_in_the_middle_of_a_text(event: Any, shop: tuple[TestClient, Endpoint, FakeVLLM]) -> None:
    client, endpoint, engine = shop
    left = [2]

    def later(good: Json) -> Any:
        left[0] -= 1
        return good if left[0] >= 0 else event

    engine.spoil = later
    said = client.post("/v1/completions", json={**SAY, "stream": True}).text.split("\n\n")
    assert len(said) == 2 + 1 + 2
    assert json.loads(said[2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert said[3:] == ["data: [DONE]", ""]
    assert is_empty(endpoint)


def test_an_engine_that_dies_in_the_middle_of_a_text(shop: tuple[TestClient, Endpoint, FakeVLLM]) -> None:
    def dies(event: Json) -> Json:
        left[0] -= 1
        if left[0] < 0:
            raise DROP
        return event

    client, endpoint, engine = shop
    engine.spoil, left = dies, [3]
    said = client.post("/v1/chat/completions", json={**SAY, "messages": [{"role": "user", "content": "sun"}],
                                                     "stream": True}).text.split("\n\n")  # fmt: skip
    assert len(said) == 3 + 1 + 2
    assert json.loads(said[3].removeprefix("data: "))["error"]["code"] == "engine_unreachable"
    left = [3]
    assert error(client.post("/v1/completions", json=SAY), 503)["code"] == "engine_unreachable"
    assert is_empty(endpoint)


def test_an_error_that_comes_too_late_is_not_logged_with_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise BudgetError("the prompt for 'sesame' is too long") from None

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(30)
        return {}

    with pytest.raises(RequestError, match=r"not answered within 0\.01 s"):
        asyncio.run(_while_wanted(Request({"type": "http"}, receive), 0.01, work()))
    gc.collect()
    assert "sesame" not in caplog.text


# The client is gone


def sent(url: str, path: str, body: dict[str, Any], *, buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_client_that_leaves_a_stream_ends_it(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    engine.between = 0.05
    with listening(folders, engine.url, tmp_path) as (url, endpoint):
        connection = sent(url, "/v1/completions", {**SAY, "stream": True})
        read = b""
        while b"data: " not in read:
            read += connection.recv(4096)
        assert endpoint.line.inside == 1
        connection.close()
        wait_until(lambda: is_empty(endpoint))
        wait_until(lambda: engine.broken_off == 1)
        assert engine.streamed < 50


def test_each_part_of_a_text_is_sent_when_it_comes(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    engine.between = 1.0
    with (
        listening(folders, engine.url, tmp_path) as (url, _),
        httpx2.stream("POST", f"{url}/v1/completions", json={**SAY, "stream": True}) as response,
    ):
        first = next(response.iter_lines())
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
        assert engine.streamed <= 1  # it counts when it has sent


def test_a_client_that_leaves_a_slow_classification_ends_it(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    with listening(folders, engine.url, tmp_path, limits=Limits(in_flight=2)) as (url, endpoint):
        engine.delay = 0.5
        before = engine.attempts
        texts = [f"{TEXT} {place}" for place in range(10)]
        connection = sent(url, "/v1/classify", {**ASK, "input": texts})
        wait_until(lambda: engine.in_flight == 2)
        assert endpoint.line.admitted == 10
        connection.close()
        wait_until(lambda: is_empty(endpoint))
        wait_until(lambda: engine.in_flight == 0)
        assert engine.broken_off == 2
        time.sleep(0.2)
        assert engine.attempts - before == 2  # the other eight never asked
        engine.delay = 0
        assert is_right(httpx2.post(f"{url}/v1/classify", json=ASK), folders)
        assert 'route="/v1/classify",status="499"} 1.0' in httpx2.get(f"{url}/metrics").text


def test_a_client_that_leaves_a_text_that_is_not_streamed_ends_it(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    engine.between = 0.05
    with listening(folders, engine.url, tmp_path) as (url, endpoint):
        connection = sent(url, "/v1/completions", SAY)
        wait_until(lambda: engine.streamed == 3)
        connection.close()
        wait_until(lambda: is_empty(endpoint) and engine.broken_off == 1)


@contextmanager
def stalled(url: str, engine: FakeVLLM) -> Iterator[socket.socket]:
    """A client that reads nothing of a text of many megabytes, when no more of it can be sent."""
    engine.spoil = lambda event: json.loads(json.dumps(event).replace('"text": "', '"text": "' + "x" * 1_000_000))
    with closing(sent(url, "/v1/completions", {**SAY, "stream": True}, buffer=4096)) as connection:
        before = 0
        wait_until(lambda: engine.streamed)
        while engine.streamed > before:
            before = engine.streamed
            time.sleep(0.3)
        yield connection


def test_a_client_that_reads_nothing_is_not_waited_for(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    """Else a few of them would take all places."""
    limits = Limits(in_flight=1, deadline_s=1.5)
    with listening(folders, engine.url, tmp_path, limits=limits) as (url, endpoint), stalled(url, engine):
        assert endpoint.line.inside == 1
        wait_until(lambda: is_empty(endpoint) and engine.broken_off == 1)
        engine.spoil = lambda answer: answer
        assert is_right(httpx2.post(f"{url}/v1/classify", json=ASK), folders)


def test_a_client_that_reads_nothing_and_leaves(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    with listening(folders, engine.url, tmp_path) as (url, endpoint):
        with stalled(url, engine) as connection:
            assert endpoint.line.inside == 1
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_until(lambda: is_empty(endpoint) and engine.broken_off == 1)


def test_a_correction_counts_though_its_client_is_gone(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    with listening(folders, engine.url, tmp_path) as (url, endpoint):
        sent(url, "/v1/feedback", {**ASK, "label": "card"}).close()
        wait_until(lambda: len(endpoint.live["customers"].edition.program.pool.data) == 13)
        assert [row["input"] for row in httpx2.get(f"{url}/v1/feedback").json()["data"]] == [TEXT]


# The disk is full, the process is killed


def test_a_full_disk_keeps_nothing_and_breaks_nothing(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    with served(folders, engine.url, tmp_path) as (client, endpoint):
        give = {**ASK, "label": "card"}
        assert client.post("/v1/feedback", json=give).status_code == 201
        database = endpoint.store._db
        [pages] = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        statuses = []
        for place in range(200):
            response = client.post("/v1/feedback", json={**give, "input": f"{place} " + "x" * 300})
            statuses.append(response.status_code)
            if statuses[-3:] == [503] * 3:
                break
        assert set(statuses) == {201, 503}
        assert "disk is full" in error(response, 503)["message"]
        assert error(response, 503)["code"] == "not_kept"
        kept = statuses.count(201) + 1
        assert len(client.get("/v1/feedback?limit=1000").json()["data"]) == kept
        assert client.get("/v1/models/customers").json()["pool_rows"] == 12 + kept
        assert client.post("/v1/classify", json=ASK).status_code == 200
        database.execute("PRAGMA max_page_count = 1000000")
        assert client.post("/v1/feedback", json={**give, "input": "there is room again"}).status_code == 201
        assert client.delete("/v1/feedback/1").json()["undone"]


@contextmanager
def icl_serve(folder: Path, engine: FakeVLLM, state: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The command, in a process of its own, once it says that it is ready."""
    command = [sys.executable, "-c", "from serving.cli import serve; serve()", f"customers={folder}"]
    child = subprocess.Popen(
        [*command, "--upstream", engine.url, "--port", str(port), "--state", str(state)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=TESTS.parent,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        assert child.stdout.readline().startswith("ready: ")
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_killed_endpoint_has_kept_what_it_acknowledged(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    acknowledged: dict[int, str] = {}

    def give(thread: int) -> None:
        with httpx2.Client(base_url=url) as client:
            for place in range(50):
                text = f"text {thread} {place} 🤖"
                until = time.monotonic() + 60
                while time.monotonic() < until:
                    try:
                        given = client.post("/v1/feedback", json={"model": "customers", "input": text, "label": "card"})
                    except httpx2.RequestError:  # killed: the same again when it is back
                        time.sleep(0.05)
                        continue
                    acknowledged[given.json()["id"]] = text
                    break

    threads = [Thread(target=give, args=(thread,)) for thread in range(20)]
    with icl_serve(folders["customers"], engine, tmp_path, port) as child:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(acknowledged) > 400, seconds=60)
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = dict(acknowledged)
    with icl_serve(folders["customers"], engine, tmp_path, port):
        for thread in threads:
            thread.join()
        rows = [
            row
            for after in (0, 1000)
            for row in httpx2.get(f"{url}/v1/feedback?limit=1000&after={after}").json()["data"]
        ]
        kept = {row["id"]: row["input"] for row in rows}
        [card] = httpx2.get(f"{url}/v1/models").json()["data"]
        shots = httpx2.post(f"{url}/v1/explain", json={"model": "customers", "input": "text 3 33 🤖"}).json()["shots"]
    assert len(acknowledged) == 1000 > len(before) > 400
    assert acknowledged.items() <= kept.items()
    assert len(kept) <= 1000 + len(threads)  # kept, and killed before it could say so
    assert card["pool_rows"] == 12 + len(set(kept.values())) == 12 + 1000
    assert "text 3 33 🤖" in [shot["text"] for shot in shots]


# Versions


def test_a_damaged_folder(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["customers"], tmp_path / "customers")
    with served({"customers": folder}, engine.url, tmp_path) as (client, _):
        old = client.get("/v1/models/customers").json()["version"]
        (folder / "pool.jsonl").write_text("{}")
        found = error(client.post("/v1/programs/customers/reload"), 409)
        assert found["code"] == "version_not_served"
        assert "pool.jsonl was changed" in found["message"]
        answer = client.post("/v1/classify", json=ASK)
        assert is_right(answer, folders)
        assert answer.json()["version"] == old
        assert 'icl_reloads_total{outcome="failed",program="customers"} 1.0' in client.get("/metrics").text
    with (
        pytest.raises(ArtifactError, match=r"pool\.jsonl was changed"),
        served({"customers": folder}, engine.url, tmp_path),
    ):
        pass


def test_a_rollback_outlives_a_restart(engine: FakeVLLM, tmp_path: Path) -> None:
    folder = program_folder(tmp_path / "customers")
    old = version_of(folder)
    with served({"customers": folder}, engine.url, tmp_path) as (client, _):
        program_folder(folder, shots=1)
        assert client.post("/v1/programs/customers/reload").json()["version"] == version_of(folder) != old
        assert client.post("/v1/programs/customers/rollback").json()["version"] == old
    with served({"customers": folder}, engine.url, tmp_path) as (client, _):
        assert client.post("/v1/classify", json=ASK).json()["version"] == old
        assert client.post("/v1/programs/customers/reload").json()["version"] == version_of(folder)


def test_versions_change_under_load_and_no_request_is_lost(engine: FakeVLLM, tmp_path: Path) -> None:
    folder = program_folder(tmp_path / "customers")
    engine.delay = 0.002
    done = Event()

    def ask(url: str, texts: list[str]) -> list[tuple[str, str, dict[str, float]]]:
        found = []
        with httpx2.Client() as client:
            while not done.is_set() or len(found) < 10:
                text = texts[len(found) % len(texts)]
                response = client.post(f"{url}/v1/classify", json={**ASK, "input": [text, text]})
                assert response.status_code == 200, response.text
                answer = response.json()
                assert told(answer["data"][0]) == told(answer["data"][1])
                found.append((answer["version"], text, told(answer["data"][0])))
        return found

    with (
        listening({"customers": folder}, engine.url, tmp_path) as (url, endpoint),
        ThreadPoolExecutor(6) as threads,
    ):
        asked = [threads.submit(ask, url, [f"{TEXT} {n}", "where is the card"]) for n in range(4)]
        for shots in (1, 2, 0):
            program_folder(folder, shots=shots)
            both = [threads.submit(httpx2.post, f"{url}/v1/programs/customers/reload") for _ in range(2)]
            assert [each.result().json()["version"] for each in both] == [version_of(folder)] * 2
            assert httpx2.post(f"{url}/v1/programs/customers/rollback").json()["version"] != version_of(folder)
            assert httpx2.post(f"{url}/v1/programs/customers/reload").status_code == 200
        done.set()
        answers = [answer for each in asked for answer in each.result()]
        copies = tmp_path / "versions" / "customers"
        assert len({version for version, _, _ in answers}) >= 3
        laws: dict[tuple[str, str], dict[str, float]] = {}
        for version, text, law in answers:
            if (version, text) not in laws:
                laws[version, text] = expected(copies / version, text)
            assert law == pytest.approx(laws[version, text], rel=1e-6)
        assert is_empty(endpoint)


# More comes than there is room for


@contextmanager
def held(engine: FakeVLLM) -> Iterator[None]:
    """No answer of the engine leaves it before the end of this."""
    let = Event()

    def wait(answer: Json) -> Json:
        let.wait(30)
        return answer

    engine.spoil = wait
    try:
        yield
    finally:
        let.set()


def test_exactly_those_with_a_place_are_answered(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    limits = Limits(in_flight=2, waiting=3)
    with listening(folders, engine.url, tmp_path, limits=limits) as (url, endpoint), ThreadPoolExecutor(30) as threads:
        with held(engine):
            asked = {text: threads.submit(httpx2.post, f"{url}/v1/classify", json={**ASK, "input": text}, timeout=60)
                     for text in (f"{TEXT} {n}" for n in range(30))}  # fmt: skip
            wait_until(lambda: sum(each.done() for each in asked.values()) == 25)
            assert (endpoint.line.admitted, endpoint.line.inside, endpoint.line.waiting) == (5, 2, 3)
            assert httpx2.get(f"{url}/healthz").status_code == 200
        answers = {text: each.result() for text, each in asked.items()}
        assert sorted(answer.status_code for answer in answers.values()) == [200] * 5 + [429] * 25
        for text, answer in answers.items():
            if answer.status_code == 200:
                assert is_right(answer, folders, text)
            else:
                assert error(answer, 429)["code"] == "busy"
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert is_empty(endpoint)
        assert 'icl_rejected_total{reason="queue_full"} 25.0' in httpx2.get(f"{url}/metrics").text


def test_a_request_has_all_its_places_or_none(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> None:
    with served(folders, engine.url, tmp_path, limits=Limits(in_flight=2, waiting=3)) as (client, endpoint):
        before = engine.attempts
        found = error(client.post("/v1/classify", json={**ASK, "input": [TEXT] * 6}), 400)
        assert "send at most 5" in found["message"]
        found = error(client.post("/v1/completions", json={**SAY, "prompt": ["sun"] * 6}), 400)
        assert "send at most 5" in found["message"]
        assert engine.attempts == before
        assert len(client.post("/v1/classify", json={**ASK, "input": [TEXT] * 5}).json()["data"]) == 5
        assert len(client.post("/v1/completions", json={**SAY, "prompt": ["sun"] * 5}).json()["choices"]) == 5
        assert is_empty(endpoint)


def test_clients_that_come_and_leave_take_no_place_with_them(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path
) -> None:
    chance = random.Random(0)
    engine.between = engine.delay = 0.01
    limits = Limits(in_flight=3, waiting=6)

    def come(kind: int, patience_s: float) -> None:
        bodies = [
            ("classify", {**ASK, "input": [TEXT, "x"]}),
            ("completions", {**SAY, "stream": True}),
            ("completions", SAY),
        ]
        path, body = bodies[kind]
        connection = sent(url, f"/v1/{path}", body)
        connection.settimeout(patience_s)
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            pass
        finally:
            connection.close()

    with listening(folders, engine.url, tmp_path, limits=limits) as (url, endpoint), ThreadPoolExecutor(12) as threads:
        visits = [threads.submit(come, chance.randrange(3), chance.uniform(0.001, 0.08)) for _ in range(150)]
        while not all(visit.done() for visit in visits):
            assert endpoint.line.inside <= 3
            assert endpoint.line.admitted <= 9
            time.sleep(0.005)
        for visit in visits:
            visit.result()
        wait_until(lambda: is_empty(endpoint))
        engine.between = engine.delay = 0
        assert is_right(httpx2.post(f"{url}/v1/classify", json=ASK), folders)


def test_prompts_that_share_their_beginning_are_asked_together(
    folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one place, questions to two programs that come by turns are answered program by program."""
    monkeypatch.setattr(line, "_PASSED_OVER_S", 60.0)
    with (
        listening(folders, engine.url, tmp_path, limits=Limits(in_flight=1)) as (url, endpoint),
        ThreadPoolExecutor(10) as threads,
    ):
        heads = {name: list(live.edition.program.template.head) for name, live in endpoint.live.items()}
        with held(engine):
            asked = []
            for place in range(10):
                body = {**SAY, "prompt": f"{TEXT} {place}", "model": ("customers", "words")[place % 2]}
                asked.append(threads.submit(httpx2.post, f"{url}/v1/completions", json=body, timeout=60))
                wait_until(lambda place=place: endpoint.line.inside + endpoint.line.waiting == place + 1)
            before = len(engine.bodies)
        assert [each.result().status_code for each in asked] == [200] * 10
        order: list[str] = []
        for body in engine.bodies[before:]:
            prompt = body["prompt"] if body.get("stream") else body["prompt"][0]
            order.append(next(name for name, head in heads.items() if prompt[: len(head)] == head))
        assert set(order) == {"customers", "words"}
        assert sum(one != next_one for one, next_one in pairwise(order)) == 1
