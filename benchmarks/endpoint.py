"""`icl serve` against vLLM asked directly, under load, and its memory; about half an hour on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.endpoint [--parts speed load memory]

vLLM and `icl serve` run as users start them, on loopback; texts of mr, 4 shots of 1,200 examples (seed 0).

- speed: the same texts, each once, at 1, 8 and 32 at once, through `icl serve` (POST /v1/classify, a text each) and as
  the same questions sent to vLLM by a client that has the prompts ready; in turns, vLLM's prefix cache emptied before
  each. `overhead` is what a request took beside retrieval, queue and model, as its answer tells them.
- load: 200 texts are asked alone, then all of them 32 at once; then they come at 4 times that rate, for 2 minutes,
  whether or not earlier ones were answered. Every answer is compared with that of the same text asked alone.
- memory: 20,000 requests, 32 at once, 10,000 different texts, dense retrieval, in front of a server that answers as
  vLLM does, from a table (`tests/fake_vllm.py`); the resident memory of `icl serve` every 1,000.

Rows are appended to `benchmarks/rows/endpoint.jsonl`; what stands there for this commit is not measured again.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.vllm_protocol import label_walk
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.vllm_launch import free_port, running_server
from serving.upstream import Engine, Upstream

ROWS = Path(__file__).parent / "rows" / "endpoint.jsonl"
MODEL, SHOTS, EXAMPLES, SEED = "smollm2-135m", 4, 1200, 0
RETRIEVERS = ("bm25", "dense")
AT_ONCE = (1, 8, 32)
TEXTS = {1: 24, 8: 48, 32: 64}
ROUNDS = 3
LOAD_S, TIMES = 120.0, 4.0
REQUESTS, EVERY, DISTINCT = 20_000, 1_000, 10_000


@contextmanager
def endpoint(programs: list[str], upstream: str, *more: str) -> Iterator[tuple[str, int]]:
    """`icl serve` in a process of its own: its URL and process number."""
    port = free_port()
    with tempfile.TemporaryDirectory() as state:
        command = [str(Path(sys.executable).with_name("icl")), "serve", *programs, "--upstream", upstream]
        command += ["--port", str(port), "--state", state, *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            if not process.stdout.readline().startswith("ready"):
                sys.exit("icl serve did not start")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def resident_mib(pid: int) -> float:
    """Memory that a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


async def at_once(
    numbers: Iterable[int], count: int, ask: Callable[[int], Awaitable[Any]]
) -> tuple[float, list[float]]:
    """Ask for all, `count` at a time: the seconds it took, and those of each."""
    waits = []
    coming = iter(numbers)

    async def client() -> None:
        for number in coming:
            started = time.perf_counter()
            await ask(number)
            waits.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    return time.perf_counter() - started, waits


def facts() -> Row:
    """What every row holds."""
    return {"model": MODEL, "seed": SEED, "machine": machine(), "commit": commit()}


async def speed(retriever: str, folder: Path, texts: list[str], vllm: str, url: str) -> list[Row]:
    """Rows of both contenders, for each number of clients."""
    program = load_program(folder)
    prompts = [list(prompt.tokens) for prompt in program.prompts(texts)]
    upstream = Upstream(vllm, connections=256)
    engine: Engine = await upstream.engine(MODEL)
    walk = label_walk(program.label_words)
    groups = engine.ability.groups(walk)
    rows = []
    unasked = iter(range(len(texts)))
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=64)) as client:
        for count in AT_ONCE:
            told: list[Row] = []

            async def through(number: int, told: list[Row] = told) -> None:
                started = time.perf_counter()
                reply = await client.post("/v1/classify", json={"model": retriever, "input": texts[number]})
                timing = reply.raise_for_status().json()["timing"]
                inside = timing["retrieve_s"] + timing["queue_s"] + timing["model_s"]
                told.append({**timing, "beside_s": time.perf_counter() - started - inside})

            async def directly(number: int) -> None:
                await engine.label_logprobs(prompts[number], walk, groups)

            times: dict[str, list[tuple[float, list[float]]]] = {"icl serve": [], "direct": []}
            for turn in range(ROUNDS):
                new = [next(unasked) for _ in range(TEXTS[count])]
                contenders = [("icl serve", through), ("direct", directly)]
                for name, ask in contenders if turn % 2 else contenders[::-1]:
                    (await client.post(f"{vllm}/reset_prefix_cache")).raise_for_status()
                    times[name].append(await at_once(new, count, ask))
            for name, rounds in times.items():
                waits = np.concatenate([waits for _, waits in rounds])
                row: Row = {
                    "part": "speed", "contender": name, "retriever": retriever, "at_once": count,
                    "texts": TEXTS[count], "rounds": ROUNDS,
                    "texts_per_second": TEXTS[count] / float(np.median([seconds for seconds, _ in rounds])),
                    "p50_ms": 1000 * float(np.median(waits)), "p99_ms": 1000 * float(np.quantile(waits, 0.99)),
                }  # fmt: skip
                if name == "icl serve":
                    stages = {key: np.array([timing[key] for timing in told]) for key in told[0]}
                    row |= {
                        "retrieve_p50_ms": 1000 * float(np.median(stages["retrieve_s"])),
                        "model_p50_ms": 1000 * float(np.median(stages["model_s"])),
                        "overhead_p50_ms": 1000 * float(np.median(stages["beside_s"])),
                    }
                rows.append(facts() | row)
    await upstream.close()
    return rows


async def load(texts: list[str], url: str, pid: int) -> Row:
    """Texts faster than they can be answered; what became of them."""
    alone: dict[str, np.ndarray[Any, Any]] = {}
    statuses: Counter[int] = Counter()
    waits: list[float] = []
    wrong = 0

    def law(reply: httpx2.Response) -> np.ndarray[Any, Any]:
        [row] = reply.json()["data"]
        return np.array([p["probability"] for p in sorted(row["labels"], key=lambda p: str(p["label"]))])

    limits = httpx2.Limits(max_connections=2000, max_keepalive_connections=2000)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for text in texts:
            alone[text] = law(await client.post("/v1/classify", json={"model": "bm25", "input": text}))

        async def calmly(number: int) -> None:
            body = {"model": "bm25", "input": texts[number]}
            (await client.post("/v1/classify", json=body)).raise_for_status()

        capacity = len(texts) / (await at_once(range(len(texts)), 32, calmly))[0]
        rate = TIMES * capacity

        async def one(text: str) -> None:
            nonlocal wrong
            started = time.perf_counter()
            reply = await client.post("/v1/classify", json={"model": "bm25", "input": text})
            statuses[reply.status_code] += 1
            if reply.is_success:
                waits.append(time.perf_counter() - started)
                wrong += float(np.abs(law(reply) - alone[text]).sum()) / 2 > 0.1
            elif reply.status_code == 429 and "Retry-After" not in reply.headers:
                wrong += 1

        rng = np.random.default_rng(SEED)
        under_way = []
        before, started, sent = resident_mib(pid), time.perf_counter(), 0
        while (now := time.perf_counter() - started) < LOAD_S:
            while sent < now * rate:
                under_way.append(asyncio.create_task(one(texts[rng.integers(len(texts))])))
                sent += 1
            await asyncio.sleep(0.005)
        done = await asyncio.gather(*under_way, return_exceptions=True)
    lost = [error for error in done if error is not None]
    return facts() | {
        "part": "load", "retriever": "bm25", "seconds": LOAD_S, "capacity": capacity, "rate": rate, "sent": sent,
        "answered": statuses[200], "refused_429": statuses[429],
        "other": sum(statuses.values()) - statuses[200] - statuses[429], "lost": len(lost), "wrong": wrong,
        "answered_per_second": statuses[200] / LOAD_S,
        "p50_s": float(np.median(waits)), "p99_s": float(np.quantile(waits, 0.99)),
        "memory_before_mib": before, "memory_after_mib": resident_mib(pid),
    }  # fmt: skip


async def memory(texts: list[str], url: str, pid: int) -> Row:
    """The memory of the endpoint as it answers."""
    held = {}
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=64)) as client:

        async def ask(number: int) -> None:
            body = {"model": "memory", "input": some[number]}
            (await client.post("/v1/classify", json=body)).raise_for_status()

        for start in range(0, REQUESTS, EVERY):
            some = [texts[(start + i) % len(texts)] for i in range(EVERY)]
            await at_once(range(EVERY), 32, ask)
            held[start + EVERY] = round(resident_mib(pid), 1)
            print(f"  {start + EVERY:,} requests: {held[start + EVERY]:,} MiB", flush=True)
    return facts() | {"part": "memory", "requests": REQUESTS, "distinct_texts": len(texts), "resident_mib": held}


def measure_with_vllm(parts: list[str], train: Dataset, drawn: list[str]) -> None:
    """Keep the rows of speed and load."""
    done = {(row["part"], row.get("retriever")) for row in measured()}
    with tempfile.TemporaryDirectory() as folder, running_server(MODEL, port=free_port()) as vllm:
        programs = []
        for retriever in RETRIEVERS:
            made = compile_program(train, model=MODEL, retriever=retriever, shots=SHOTS, examples=EXAMPLES, seed=SEED)
            save_program(made, Path(folder) / retriever)
            programs.append(str(Path(folder) / retriever))
        with endpoint(programs, vllm) as (url, _):
            for retriever in RETRIEVERS:
                if "speed" in parts and ("speed", retriever) not in done:
                    for row in asyncio.run(speed(retriever, Path(folder) / retriever, drawn, vllm, url)):
                        keep(ROWS, row)
        if "load" in parts and ("load", "bm25") not in done:
            with endpoint(programs, vllm, "--in-flight", "16", "--waiting", "48") as (url, pid):
                keep(ROWS, asyncio.run(load(drawn[:200], url, pid)))


def measure_memory(train: Dataset, texts: list[str]) -> None:
    """Keep the row of the memory."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from serving_toys import fake_vllm  # type: ignore[import-not-found]  # of the tests

    short = replace(train, answers=tuple(answer[0] for answer in train.answers))  # a token is a byte: few questions
    made = compile_program(short, model="echo", shots=1, examples=EXAMPLES, seed=SEED, budget=3000)
    with tempfile.TemporaryDirectory() as folder, fake_vllm() as engine:
        save_program(made, Path(folder) / "memory")
        with endpoint([str(Path(folder) / "memory")], engine.url) as (url, pid):
            keep(ROWS, asyncio.run(memory(texts[:DISTINCT], url, pid)))


def measured() -> list[Row]:
    """The rows of this commit."""
    return [row for row in rows_of(ROWS) if row["commit"] == commit()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)  # what `python -m benchmarks` was asked for
    parser.add_argument("--parts", nargs="+", choices=("speed", "load", "memory"), default=("speed", "load", "memory"))
    parts = parser.parse_args().parts
    data = data_folder(["mr"])
    train, test = (load_dataset(str(data / "mr" / f"{part}.jsonl")) for part in ("train", "test"))
    drawn = [test.texts[i] for i in np.random.default_rng(SEED).permutation(len(test))]
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    done = {(row["part"], row.get("retriever")) for row in measured()}
    if {"speed", "load"} & set(parts):
        measure_with_vllm(parts, train, drawn)
    if "memory" in parts and ("memory", None) not in done:
        measure_memory(train, [*drawn, *train.texts])
    for row in measured():
        print(json.dumps({key: value for key, value in row.items() if key not in facts()}))


if __name__ == "__main__":
    main()
