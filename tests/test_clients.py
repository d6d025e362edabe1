"""Clients that people have: `openai`, LangChain, curl; unchanged, against the endpoint on a socket."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vllm import FakeVLLM
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serving_toys import expected, fake_vllm, listening, program_folder, translations

TEXT = "my money is late"


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeVLLM]:
    with fake_vllm() as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("programs")
    return {"customers": program_folder(place / "one"), "words": program_folder(place / "two", translations())}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path], engine: FakeVLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(folders, engine.url, tmp_path_factory.mktemp("state")) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="not needed here", max_retries=0)


def likeliest(law: dict[str, float]) -> str:
    return max(law, key=lambda label: law[label])


def test_openai_lists_the_programs(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["customers", "words"]
    assert client.models.retrieve("words").owned_by == "icl"


def test_openai_chat(client: OpenAI, folders: dict[str, Path]) -> None:
    law = expected(folders["customers"], TEXT)
    answer = client.chat.completions.create(
        model="customers", messages=[{"role": "user", "content": TEXT}], logprobs=True, top_logprobs=3, temperature=0
    )
    [choice] = answer.choices
    assert choice.message.content == likeliest(law)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = {entry.token: np.exp(entry.logprob) for entry in choice.logprobs.content[0].top_logprobs}
    assert told == pytest.approx(law)
    assert answer.usage is not None and answer.usage.prompt_tokens > answer.usage.completion_tokens > 0


def test_openai_chat_streamed(client: OpenAI, folders: dict[str, Path]) -> None:
    stream = client.chat.completions.create(
        model="customers",
        messages=[{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == likeliest(expected(folders["customers"], TEXT))
    assert chunks[-1].usage is not None and not chunks[-1].choices


def test_openai_completions(client: OpenAI, folders: dict[str, Path]) -> None:
    texts = [TEXT, "a parcel"]
    answer = client.completions.create(model="customers", prompt=texts, logprobs=1)
    assert [choice.text for choice in answer.choices] == [likeliest(expected(folders["customers"], t)) for t in texts]
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_openai_text_grows(client: OpenAI, engine: FakeVLLM) -> None:
    whole = client.completions.create(model="words", prompt="sun", max_tokens=40, temperature=0).choices[0]
    parts = [
        chunk.choices[0]
        for chunk in client.completions.create(model="words", prompt="sun", max_tokens=40, temperature=0, stream=True)
    ]
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == whole.text != ""
    assert parts[-1].finish_reason == whole.finish_reason == "length"
    assert engine.bodies[-1]["stream"] is True


def test_openai_async(url: str, folders: dict[str, Path]) -> None:
    async def ask() -> str | None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(
                model="customers", messages=[{"role": "user", "content": TEXT}]
            )
        return answer.choices[0].message.content

    assert asyncio.run(ask()) == likeliest(expected(folders["customers"], TEXT))


def test_openai_understands_the_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is no program 'gpt-4'") as lost:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert lost.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="the budget is 600") as long:
        client.chat.completions.create(model="customers", messages=[{"role": "user", "content": "long " * 500}])
    assert long.value.code == "context_length_exceeded"


def test_langchain(url: str, folders: dict[str, Path]) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI, OpenAI

    model = ChatOpenAI(model="customers", base_url=f"{url}/v1", api_key="none")  # type: ignore[arg-type]
    prompt = ChatPromptTemplate.from_messages([("system", "You are a classifier."), ("user", "{text}")])
    chain = prompt | model | StrOutputParser()
    best = likeliest(expected(folders["customers"], TEXT))
    assert chain.invoke({"text": TEXT}) == best
    assert "".join(chain.stream({"text": TEXT})) == best
    assert chain.batch([{"text": TEXT}, {"text": "a parcel"}])[0] == best
    assert OpenAI(model="customers", base_url=f"{url}/v1", api_key="none").invoke(TEXT) == best  # type: ignore[arg-type]


def test_curl(url: str, folders: dict[str, Path]) -> None:
    command = ["curl", "-sS", f"{url}/v1/classify", "-H", "Content-Type: application/json", "-d"]
    said = subprocess.run(
        [*command, json.dumps({"model": "customers", "input": TEXT})], capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(said.stdout)
    assert answer["data"][0]["label"] == likeliest(expected(folders["customers"], TEXT))
