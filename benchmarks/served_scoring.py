"""What exact scoring costs a vLLM server, told by its own counters; about ten minutes on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks served_scoring

A server is started as `icl vllm` does. Of two datasets it scores queries drawn at random, 16 requests in flight, the
shots retrieved from 1,200 examples (seed 0): banking77, 16 shots, whose 77 labels are a tree of 218 questions a query,
and mr, 4 shots, 500 queries of two labels. A row holds the requests and tokens of the server's `/metrics`, before and
after, and the least share of prompt tokens that the prefix cache can save: all full blocks of a prompt, in every
question but its first. Rows are appended to `benchmarks/rows/served_scoring.jsonl`; a dataset that stands there for
this commit is not measured again.
"""

import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.parts.kept import data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from icl_compiler.backends.label_walk import LabelWalk
from icl_compiler.backends.vllm_server import VLLMServerBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import load_dataset
from icl_compiler.vllm_launch import engine_arguments, running_server

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "served_scoring.jsonl"
MODEL = "smollm2-135m"
QUERIES = {"banking77": 20, "mr": 500}
SHOTS = {"banking77": 16, "mr": 4}
IN_FLIGHT, SEED = 16, 0
COUNTERS = {
    "requests": "vllm:request_success_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
}


def counters(url: str) -> dict[str, float]:
    """The server's own counts since it started."""
    text = httpx2.get(f"{url}/metrics", timeout=30).text
    return {
        name: sum(float(value) for value in re.findall(rf"^{counter}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        for name, counter in COUNTERS.items()
    }


def least_cached_share(prompts: list[Any], walk: LabelWalk, block: int) -> float:
    """Share of the prompt tokens sent that stand in full blocks of prompts already computed."""
    sent = cached = 0
    for prompt in prompts:
        for number, question in enumerate(walk.questions):
            length = len(prompt) + len(question.suffix)
            sent += length
            cached += min(len(prompt), length - 1) // block * block if number else 0
    return cached / sent


def measure(name: str, url: str, data: Path) -> dict[str, object]:
    """Score the queries of one dataset."""
    train, test = (load_dataset(str(data / name / f"{part}.jsonl")) for part in ("train", "test"))
    program = compile_program(train, shots=SHOTS[name], examples=1200, seed=SEED, budget=4096)
    drawn = np.random.default_rng(SEED).permutation(len(test))[: QUERIES[name]]
    prompts = [prompt.tokens for prompt in program.prompts([test.texts[i] for i in drawn])]
    backend = VLLMServerBackend(MODEL, server=url, in_flight=IN_FLIGHT)
    backend.label_logprobs([[1]], [[2]])  # finds out what the server can do
    before, started = counters(url), time.perf_counter()
    scores = backend.label_logprobs(prompts, program.label_words)
    seconds = time.perf_counter() - started
    told = {key: value - before[key] for key, value in counters(url).items()}
    walk = LabelWalk.build(program.label_words, ids_per_question=128)
    count = len(prompts)
    best = scores.logprobs.argmax(axis=1)
    right = [program.labels[label] == test.answers[row] for label, row in zip(best, drawn, strict=True)]
    return {
        "dataset": name, "labels": len(program.label_words), "shots": SHOTS[name], "queries": count,
        "answered": int(np.isfinite(scores.logprobs).all(axis=1).sum()), "in_flight": IN_FLIGHT,
        "seconds_per_query": seconds / count, "prompt_tokens_per_query": scores.usage.prompt_tokens / count,
        "requests_per_query": told["requests"] / count, "questions_per_query": len(walk.questions),
        "server_prompt_tokens_per_query": told["prompt_tokens"] / count,
        "server_computed_tokens_per_query": (told["prompt_tokens"] - told["cached_tokens"]) / count,
        "reported_computed_tokens_per_query": scores.usage.computed_tokens / count,
        "cached_share": told["cached_tokens"] / told["prompt_tokens"],
        "least_cached_share": least_cached_share(prompts, walk, engine_arguments().get("block_size", 16)),
        "accuracy": float(np.mean(right)),
        "server": backend.device.partition(" at ")[0], "model": MODEL, "seed": SEED, "machine": machine(),
        "commit": commit(),
    }  # fmt: skip


def measured() -> list[dict[str, Any]]:
    return [row for row in rows_of(ROWS) if row["commit"] == commit()]


def table(rows: list[dict[str, Any]]) -> str:
    """One line a measure, one column a dataset."""
    lines = ["| | " + " | ".join(str(row["dataset"]) for row in rows) + " |", "|" + "---|" * (1 + len(rows))]
    for key, value in rows[0].items() if rows else ():
        if isinstance(value, int | float):
            cells = (f"{row[key]:.4g}" for row in rows)
            lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    data = data_folder(QUERIES)
    missing = [name for name in QUERIES if name not in {row["dataset"] for row in measured()}]
    if missing:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with running_server(MODEL, port=port) as url:
            for name in missing:
                row = measure(name, url, data)
                keep(ROWS, row)
    print(table(measured()))


if __name__ == "__main__":
    main()
