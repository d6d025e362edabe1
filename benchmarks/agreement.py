"""The same labels scored by every backend, number format and batch: how far apart they are; a quarter of an hour.

    ICL_DATASETS=FOLDER python -m benchmarks agreement

For each dataset a program with 16 retrieved shots (1,200 examples, seed 0) asks 16 test queries drawn at random. They
are scored by transformers in float32 and bfloat16, in bfloat16 with other batches, by a vLLM engine of this process and
by a vLLM server; where there are many labels the two vLLM do 4 or 6, as they ask for each node of the label tree. A
row is the mean total variation between two of them with its 95 % interval. Rows are appended to
`benchmarks/rows/agreement.jsonl`; a dataset that stands there for this commit is not measured again.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.kept import data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from evaluation.gap import gap_of_laws
from evaluation.tv import with_other
from icl_compiler.backends.backend import Backend
from icl_compiler.compile import compile_program
from icl_compiler.data import load_dataset

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "agreement.jsonl"
MODEL = "smollm2-135m"
DATASETS = {"mr": 16, "subj": 16, "banking77": 6, "clinc150_oos": 4}
"""Each dataset with the number of queries that vLLM is asked."""
QUERIES = 16
SHOTS = 16


def contenders() -> Iterator[tuple[str, Backend]]:
    """Every backend under its name, one after the other; a server or an engine lives as long as it is asked."""
    from icl_compiler.backends.hf_transformers import TransformersBackend

    yield "transformers float32", TransformersBackend(MODEL, "float32")
    yield "transformers bfloat16", TransformersBackend(MODEL, "bfloat16")
    yield "transformers bfloat16, other batches", TransformersBackend(MODEL, "bfloat16", tree_tokens=4096)
    with server() as backend:
        yield "vLLM server bfloat16", backend
    from icl_compiler.backends.vllm_offline import VLLMOfflineBackend

    yield "vLLM offline bfloat16", VLLMOfflineBackend(MODEL)


@contextmanager
def server() -> Iterator[Backend]:
    """A vLLM server on a free port, and the backend that speaks to it."""
    from icl_compiler.backends.vllm_server import VLLMServerBackend
    from icl_compiler.vllm_launch import running_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running_server(MODEL, port=port) as url:
        yield VLLMServerBackend(MODEL, server=url)


def questions(data: Path) -> dict[str, tuple[list[Any], Any]]:
    """Prompts and label words of each dataset."""
    asked = {}
    for name in DATASETS:
        train, test = (load_dataset(str(data / name / f"{part}.jsonl")) for part in ("train", "test"))
        program = compile_program(train, shots=SHOTS, examples=1200, seed=0, budget=4096)
        drawn = np.random.default_rng(0).permutation(len(test))[:QUERIES]
        prompts = program.prompts([test.texts[i] for i in drawn])
        asked[name] = [prompt.tokens for prompt in prompts], program.label_words
    return asked


def compare(name: str, laws: dict[str, np.ndarray[Any, Any]]) -> Iterator[dict[str, object]]:
    """One row for each two backends."""
    for first, second in combinations(laws, 2):
        count = min(len(laws[first]), len(laws[second]))
        found = gap_of_laws(with_other(laws[first][:count]), with_other(laws[second][:count]))
        yield {
            "dataset": name, "first": first, "second": second, "mean_tv": found.mean, "low": found.interval[0],
            "high": found.interval[1], "largest_tv": float(found.per_query.max()), "queries": count, "shots": SHOTS,
            "seed": 0, "model": MODEL, "machine": machine(), "commit": commit(),
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Mean total variation between two backends, a line for each two and a column for each dataset."""
    names = list(dict.fromkeys(str(row["dataset"]) for row in rows))
    lines = ["| first | second | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for pair in dict.fromkeys((row["first"], row["second"]) for row in rows):
        cells = [
            f"{row['mean_tv']:.4f}"
            for n in names
            for row in rows
            if (row["first"], row["second"], row["dataset"]) == (*pair, n)
        ]
        lines.append(f"| {pair[0]} | {pair[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured() -> list[dict[str, Any]]:
    return [row for row in rows_of(ROWS) if row["commit"] == commit()]


def main() -> None:
    data = data_folder(DATASETS)
    if not measured():
        asked = questions(data)
        laws: dict[str, dict[str, np.ndarray[Any, Any]]] = {name: {} for name in asked}
        for contender, backend in contenders():
            for name, (prompts, words) in asked.items():
                count = DATASETS[name] if "vLLM" in contender else QUERIES
                scores = backend.label_logprobs(prompts[:count], words)
                laws[name][contender] = np.exp(scores.logprobs)
                print(f"{contender}, {name}: {scores.usage}", flush=True)
        keep(ROWS, *(row for name in asked for row in compare(name, laws[name])))
    print(table(measured()))


if __name__ == "__main__":
    main()
