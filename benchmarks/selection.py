"""Finished prompts per second beside three peers, and from a pool of a million rows; about twenty minutes on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks selection
    python -m benchmarks.selection --million

The pool: 10,000 training rows of banking77 and clinc150_oos, drawn at random (seed 0); 1,000 test rows are the queries;
16 shots each. Every contender gets the same vectors (MiniLM) from the same table, in a fresh process;
`benchmarks/peers/` has a script for each, which says up to where it goes. The clock runs from texts to finished
prompts, without encoding and without making the index; the fastest of three rounds, on one thread. Rates are of the
processor's time, of which others on the machine take nothing; the seconds of the clock stand in the rows too. Ours
is the only one that tokenises, and packs into a budget.

- `same shots` is the share of the 16 rows with the highest inner product (numpy, all rows compared) that stand in the
  prompts.
- `--million`: a pool of 1,000,000 synthetic rows of 384 numbers, a mixture of 2,000 directions with noise; one query at
  a time, whole prompts; also the share of the exact ten nearest that are found.

Rows are appended to `benchmarks/rows/selection.jsonl`; what stands there for this commit is not measured again.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from benchmarks.parts.kept import data_folder, keep, rows_of
from benchmarks.peers.asking import ask, write_job
from benchmarks.peers.environments import peers_python, selection_python
from evaluation.evaluate import commit, machine

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "selection.jsonl"
WORK = Path("bench-selection")
MODEL = "smollm2-135m"
POOL, QUERIES, SHOTS, SEED = 10_000, 1000, 16, 0
MILLION, WIDTH, DIRECTIONS, NOISE = 1_000_000, 384, 2000, 0.7
CONTENDERS: dict[str, tuple[str, Callable[[], Path]]] = {
    "icl": ("selection_icl.py", lambda: Path(sys.executable)),
    "icl-one-by-one": ("selection_icl.py", lambda: Path(sys.executable)),
    "langchain": ("selection_langchain.py", selection_python),
    "dspy": ("selection_dspy.py", selection_python),
    "openicl": ("selection_openicl.py", peers_python),
}


def job(data: Path) -> tuple[list[str], Any, Path]:
    """The job of all contenders on disk; the texts of its pool, and the vectors of pool and queries."""
    from icl_compiler.data import Dataset, load_dataset
    from icl_compiler.encoders import named_encoder
    from icl_compiler.models import locate

    def rows(part: str, count: int) -> Dataset:
        sets = [load_dataset(str(data / name / f"{part}.jsonl")) for name in ("banking77", "clinc150_oos")]
        texts, answers = (sum((getattr(each, name) for each in sets), ()) for name in ("texts", "answers"))
        drawn = np.random.default_rng(SEED).permutation(len(texts))[:count].tolist()
        return Dataset(texts, answers, "classification", part).take(drawn)

    queries = rows("test", QUERIES)
    pool, _ = rows("train", POOL + QUERIES).without_texts(queries.texts)
    pool = pool.take(range(POOL))
    path = WORK / "job.json"
    vectors = named_encoder("minilm").encode([*pool.texts, *queries.texts])
    write_job(path, pool, queries.texts, vectors, shots=SHOTS, model=locate(MODEL))
    return list(pool.texts), vectors, path


def contender(name: str, path: Path, texts: list[str], nearest: Any) -> dict[str, object]:
    """The row of one contender."""
    script, python = CONTENDERS[name]
    found = ask(script, python(), path, WORK / f"{name}.json")
    same = [
        sum(texts[row] in shots for row in rows) / SHOTS for rows, shots in zip(nearest, found["shots"], strict=True)
    ]
    return {
        "name": name, "version": found["version"], "pool": POOL, "queries": QUERIES, "shots": SHOTS,
        "prompts_per_second": QUERIES / found["cpu_seconds"], "cpu_seconds": found["cpu_seconds"],
        "seconds": found["seconds"],
        "same_shots": statistics.fmean(same),
    }  # fmt: skip


class Mixture:
    """The encoder of the synthetic pool: `row 7` is vector 7, `query 7` lies near a direction too."""

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        directions = rng.normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)
        self._tables = {
            word: self._drawn(directions, count, rng) for word, count in (("row", MILLION), ("query", 2000))
        }

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """A vector of length 1 for each text."""
        words = [text.split() for text in texts]
        if words and all(word == words[0][0] for word, _ in words):
            found: Float32[np.ndarray, "texts width"] = self._tables[words[0][0]][[int(number) for _, number in words]]
            return found
        return np.concatenate([self.encode([text]) for text in texts])

    def _drawn(self, directions: Any, count: int, rng: Any) -> Any:
        made = np.empty((count, WIDTH), dtype=np.float32)
        for start in range(0, count, 50_000):
            part = made[start : start + 50_000]
            part[:] = directions[rng.integers(DIRECTIONS, size=len(part))]
            part += NOISE * rng.standard_normal(part.shape, dtype=np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return made


def million() -> dict[str, object]:
    """Prompts from a million rows, one query at a time."""
    from icl_compiler import compile as compiling
    from icl_compiler import encoders
    from icl_compiler.data import Dataset

    mixture = Mixture()
    encoders.named_encoder = lambda name: mixture  # type: ignore[assignment]  # the table is the encoder
    texts = tuple(f"row {number}" for number in range(MILLION))
    began = time.perf_counter()
    program = compiling.compile_program(
        Dataset(texts, tuple(f"label {number % 50}" for number in range(MILLION)), "classification", "mixture"),
        model=MODEL, shots=SHOTS,
    )  # fmt: skip
    compiled = time.perf_counter() - began
    queries = [f"query {number}" for number in range(300)]
    program.prompts(queries[:20])
    seconds = []
    for text in queries:
        began = time.perf_counter()
        program.prompts([text])
        seconds.append(time.perf_counter() - began)
    vectors, rows = mixture.encode(queries[:100]), mixture.encode(texts)
    exact = np.argpartition(-(vectors @ rows.T), 10, axis=1)[:, :10]
    found = program.retriever.search(queries[:100], 10).ids
    recall = statistics.fmean(len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True))
    ordered = sorted(seconds)
    return {
        "name": "icl, a million rows", "pool": MILLION, "queries": len(queries), "shots": SHOTS,
        "p50_ms": 1000 * ordered[len(ordered) // 2], "p99_ms": 1000 * ordered[int(0.99 * len(ordered))],
        "recall_at_10": recall, "compile_seconds": compiled,
        "vectors_mib": rows.nbytes / 2**20,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }  # fmt: skip


def measured() -> list[dict[str, Any]]:
    return [row for row in rows_of(ROWS) if row["commit"] == commit()]


def add(row: dict[str, object]) -> None:
    """Append a row, with the facts that all have."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    facts = {"threads": threads, "seed": SEED, "machine": machine(), "commit": commit()}
    keep(ROWS, row | facts)


def table(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/results.md`."""
    lines = ["| | version | prompts/s | ours is faster by | same shots |", "|---|---|---|---|---|"]
    speed = {row["name"]: row["prompts_per_second"] for row in rows if "prompts_per_second" in row}
    for row in rows:
        if row["name"] in speed:
            times = f"{speed['icl'] / speed[row['name']]:.1f}" if "icl" in speed and row["name"] != "icl" else ""
            cells = [row["name"], row["version"], f"{speed[row['name']]:,.0f}", times, f"{row['same_shots']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [json.dumps(row) for row in rows if row["name"] not in speed]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--million", action="store_true", help="only the pool of a million rows")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders only")
    given = parser.parse_args()
    data = data_folder(["banking77", "clinc150_oos"])
    done = {row["name"] for row in measured()}
    if given.million:
        if "icl, a million rows" not in done:
            add(million())
    elif missing := [name for name in given.only if name not in done]:
        texts, vectors, path = job(data)
        scores = vectors[POOL:] @ vectors[:POOL].T
        nearest = np.argpartition(-scores, SHOTS, axis=1)[:, :SHOTS].tolist()
        for name in missing:
            add(contender(name, path, texts, nearest))
    print(table(measured()))


if __name__ == "__main__":
    main()
