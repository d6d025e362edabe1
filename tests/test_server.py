"""The endpoint's routes, on the fake vLLM: what clients send and get, and what happens when things go wrong."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_vllm import FakeVLLM, logprob
from fastapi.testclient import TestClient
from serving_toys import BYTES, fake_vllm, program_folder, served, translations

from icl_compiler.artifact import load_program


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


@pytest.fixture
def client(folders: dict[str, Path], engine: FakeVLLM, tmp_path: Path) -> Iterator[TestClient]:
    with served(folders, engine.url, tmp_path) as (found, _):
        yield found


def expected(folder: Path, text: str) -> dict[str, float]:
    """The law of the labels, by the program as it is and the law behind the fake."""
    program = load_program(folder)
    [prompt] = program.prompts([text])
    return {
        label: float(np.exp(logprob(prompt.tokens, word, BYTES)))
        for label, word in zip(program.labels, program.label_words, strict=True)
    }


def test_classify(client: TestClient, folders: dict[str, Path]) -> None:
    texts = ["my money is late", "the parcel got swallowed"]
    answer = client.post("/v1/classify", json={"model": "customers", "input": texts}).json()
    for row, text in zip(answer["data"], texts, strict=True):
        law = expected(folders["customers"], text)
        assert {e["label"]: e["probability"] for e in row["labels"]} == pytest.approx(law, rel=1e-6)
        assert row["label"] == max(law, key=lambda label: law[label]) == row["labels"][0]["label"]
        assert row["other"] == pytest.approx(1 - sum(law.values()))
    assert answer["usage"]["prompt_tokens"] > 0
    assert set(answer["timing"]) == {"retrieve_s", "queue_s", "model_s", "total_s"}


def test_chat(client: TestClient, folders: dict[str, Path]) -> None:
    law = expected(folders["customers"], "my money is late")
    body = {
        "model": "customers",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "my money is late"}],
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == max(law, key=lambda label: law[label])
    [entry] = choice["logprobs"]["content"]
    assert np.exp(entry["logprob"]) == pytest.approx(max(law.values()))
    assert len(entry["top_logprobs"]) == 2


def test_words_are_generated(client: TestClient) -> None:
    body = {"model": "words", "prompt": "sun", "max_tokens": 5}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    print(answer.json())


def test_feedback(client: TestClient) -> None:
    body = {"model": "customers", "input": "the dog ate it", "label": "parcel"}
    given = client.post("/v1/feedback", json=body)
    assert given.status_code == 201, given.text
    explained = client.post("/v1/explain", json={"model": "customers", "input": "the dog ate it"}).json()
    assert ("the dog ate it", "parcel") in [(s["text"], s["label"]) for s in explained["shots"]]
    assert client.delete(f"/v1/feedback/{given.json()['id']}").status_code == 200
    explained = client.post("/v1/explain", json={"model": "customers", "input": "the dog ate it"}).json()
    assert "the dog ate it" not in [s["text"] for s in explained["shots"]]
