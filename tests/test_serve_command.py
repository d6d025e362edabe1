"""`icl serve` as users start it: a process of its own, in front of a real vLLM; and how it is used wrongly."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from openai import OpenAI
from real_vllm import MODEL, RealVLLM
from serving_toys import fake_vllm, program_folder, translations

from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.vllm_server import VLLMServerBackend
from icl_compiler.cli import main
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.messages import train_test
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.vllm_launch import free_port

ICL = Path(sys.executable).with_name("icl")


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The URL of an `icl serve` that is ready, and its process."""
    command = [str(ICL), "serve", *map(str, arguments), "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        assert ready.startswith("ready: "), process.communicate(timeout=10)
        yield ready.split()[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@dataclass
class Programs:
    intents: Path
    words: Path
    texts: list[str]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    place = tmp_path_factory.mktemp("programs")
    train, test = train_test(300, 12)
    data = Dataset(tuple(m.text for m in train), tuple(m.label for m in train), "classification", "messages")
    save_program(compile_program(data, model=MODEL, retriever="bm25", shots=4), place / "intents")
    save_program(compile_program(translations(), model=MODEL, retriever="bm25", shots=3), place / "words")
    return Programs(place / "intents", place / "words", [m.text for m in test])


@pytest.mark.models
def test_a_real_round_trip(real_vllm: RealVLLM, programs: Programs, tmp_path: Path) -> None:
    program, where = load_program(programs.intents), real_vllm.process.url
    backend = VLLMServerBackend(MODEL, server=where)
    truth = PromptedPredictor(program, backend).predict(programs.texts)
    with serving(programs.intents, programs.words, "--upstream", where, "--state", tmp_path) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        told = httpx2.post(f"{url}/v1/classify", json={"model": "intents", "input": programs.texts}, timeout=120).json()
        laws = [{row["label"]: row["probability"] for row in item["labels"]} for item in told["data"]]
        found = np.array([[law[label] for label in program.labels] for law in laws])
        assert 0.5 * np.abs(found - truth.probabilities).sum(axis=1).mean() < 0.01

        answers = [
            client.chat.completions.create(
                model="intents", messages=[{"role": "user", "content": text}], logprobs=True
            ).choices[0]
            for text in programs.texts[:4]
        ]
        for answer, law in zip(answers, laws, strict=False):
            label = answer.message.content or ""
            assert law[label] > max(law.values()) - 0.05
            assert answer.logprobs is not None and answer.logprobs.content is not None
            assert np.exp(answer.logprobs.content[0].logprob) == pytest.approx(law[label], abs=0.05)

        whole = client.completions.create(model="words", prompt="sun", temperature=0, max_tokens=8).choices[0]
        parts = list(client.completions.create(model="words", prompt="sun", temperature=0, max_tokens=8, stream=True))
        assert "".join(part.choices[0].text for part in parts) == whole.text.strip() != ""
        assert "\n" not in whole.text
        metrics = httpx2.get(f"{url}/metrics").text
        assert 'icl_requests_total{program="intents",route="/v1/classify",status="200"} 1.0' in metrics


def test_corrections_and_the_next_version(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"{thing} number {n}", "label": thing} for thing in ("card", "parcel") for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = program_folder(tmp_path / "post", Dataset(
        tuple(row["text"] for row in rows), tuple(row["label"] for row in rows), "classification", "post"
    ))  # fmt: skip
    body = {"model": "post", "input": "an umbrella", "label": "parcel"}
    with fake_vllm() as engine:
        with serving(folder, "--upstream", engine.url, "--state", tmp_path / "state") as (url, process):
            assert httpx2.post(f"{url}/v1/feedback", json=body).json()["pool_rows"] == 13
            process.kill()
        with serving(folder, "--upstream", engine.url, "--state", tmp_path / "state") as (url, process):
            [model] = httpx2.get(f"{url}/v1/models").json()["data"]
            assert model["pool_rows"] == 13
            command = ["compile", str(data), "-o", str(folder), "--model", "echo", "--retriever", "bm25"]
            command += ["--budget", "600", "--from-feedback", str(tmp_path / "state" / "corrections.sqlite")]
            made = CliRunner().invoke(main, command)
            assert made.exit_code == 0, made.output
            assert "1 correction" in made.output
            assert load_program(folder).pool.data.texts[-1] == "an umbrella"
            process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 20
            while httpx2.get(f"{url}/v1/models").json()["data"][0]["version"] == model["version"]:
                assert time.monotonic() < until
                time.sleep(0.05)
            [again] = httpx2.get(f"{url}/v1/models").json()["data"]
            assert again["pool_rows"] == 13


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_engine_that_was_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    folder, ended = program_folder(tmp_path / "one"), tmp_path / "ended"
    with fake_vllm() as engine:
        code = f"""
import sys
from contextlib import contextmanager
from pathlib import Path
from icl_compiler import cli, vllm_launch

@contextmanager
def running(model, **_):
    try:
        yield {engine.url!r}
    finally:
        Path({str(ended)!r}).touch()

vllm_launch.running_server = running
sys.argv = ["icl", "serve", {str(folder)!r}, "--model", "echo", "--state", {str(tmp_path / "state")!r},
            "--port", "{free_port()}"]
cli.main()
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ")
        assert not ended.exists()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert ended.exists()
    assert process.returncode == 0 and "Traceback" not in said


WRONG = {
    "no engine": ([], "either --upstream URL, where vLLM runs, or --model MODEL"),
    "two engines": (["--upstream", "http://127.0.0.1:9", "--model", "echo"], "either --upstream"),
    "open to all": (["--upstream", "http://127.0.0.1:9", "--host", "0.0.0.0"], "icl keys add NAME"),
    "no key file": (["--upstream", "http://127.0.0.1:9", "--keys", "nowhere.json"], "nowhere.json"),
    "no URL": (["--upstream", "nonsense"], "'nonsense' is no URL of a server"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_use(tmp_path: Path, arguments: list[str], said: str) -> None:
    folder = program_folder(tmp_path / "one")
    command = ["serve", str(folder), "--state", str(tmp_path / "state"), *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert "Traceback" not in result.output


def test_programs_that_cannot_be_served(tmp_path: Path) -> None:
    one, two = program_folder(tmp_path / "a" / "one"), program_folder(tmp_path / "b" / "one")
    state = ["--state", str(tmp_path / "state")]
    with fake_vllm() as engine:
        up = ["--upstream", engine.url, *state]
        same = CliRunner().invoke(main, ["serve", str(one), str(two), *up])
        assert same.exit_code == 2 and "two programs are named 'one'" in same.output
        lost = CliRunner().invoke(main, ["serve", str(tmp_path / "none"), *up])
        assert lost.exit_code == 1 and "there is no program" in lost.output
        (one / "pool.jsonl").write_text("{}\n")
        broken = CliRunner().invoke(main, ["serve", str(one), *up])
        assert broken.exit_code == 1 and "pool.jsonl was changed" in broken.output
        name = CliRunner().invoke(main, ["serve", f"../x={two}", *up])
        assert name.exit_code == 1 and "'../x'" in name.output
