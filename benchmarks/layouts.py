"""What fixed blocks of shots spare a vLLM server, and what they cost in accuracy; about half an hour on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks layouts
    python -m benchmarks.layouts --datasets banking77

For each dataset the same 1,200 examples are compiled in every layout of `icl compile --layout`, into 1,024 tokens: 16
shots of the query's own, or blocks as large as fit; beside them 4 shots of the query's own, alone and behind a block of
4 (`LAYOUTS`). Queries are drawn from the test rows (seed 0).

- Tokens are those of the server's own counters: prompt tokens less those from its prefix cache, one request a query,
  which generates its answer. First the beginning of each block is sent once (`warm_up_tokens`), as a server
  that runs for a while has it; then the queries. The compiler's prediction stands beside that.
- A request is sent after the other: a rate is of one client who waits for his answer.
- Accuracy is that of the greedy answer: right where it is the label, letter for letter. Beside the 16 shots of the
  query's own: the difference with its 95 % interval by betting on the paired queries, and McNemar's exact test.

Rows are appended to `benchmarks/rows/layouts.jsonl`; what stands there for this commit is not measured again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.parts.kept import data_folder, keep, rows_of
from benchmarks.served_scoring import counters
from evaluation.evaluate import commit, machine
from evaluation.intervals import betting
from icl_compiler.backends.vllm_server import VLLMServerBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.program import Program
from icl_compiler.vllm_launch import engine_arguments, free_port, running_server

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "layouts.jsonl"
MODEL = "smollm2-135m"
DATASETS = ("banking77", "clinc150_oos", "hwu64")
EXAMPLES, BUDGET, SEED = 1200, 1024, 0
LAYOUTS: dict[str, dict[str, Any]] = {
    "per-query": {},
    "mixed, 8 shots": {"layout": "mixed", "shots": 8, "block_share": 0.5},
    "per-query, 4 shots": {"shots": 4},
    "mixed, all that fits": {"layout": "mixed", "shots": BUDGET, "block_share": 0.95},
    "clustered": {"layout": "clustered"},
    "shared": {"layout": "shared"},
}


def compiled(train: Dataset, name: str) -> Program:
    """The program of one of `LAYOUTS`, for the server that `icl vllm` starts here."""
    block = engine_arguments().get("block_size", 16)
    return compile_program(train, examples=EXAMPLES, budget=BUDGET, cache_block=block, seed=SEED, **LAYOUTS[name])


def measure(program: Program, asked: Dataset, url: str) -> dict[str, object]:
    """What the server computes for these texts, once it holds the blocks, and where it answers right."""
    backend = VLLMServerBackend(MODEL, server=url, in_flight=1)
    end = program.template.terminator_ids
    blocks, head = program.blocks, list(program.template.head)
    beginnings = [head]
    for block in range(len(blocks) if blocks is not None else 0):
        assert blocks is not None
        shots = [program.pool.tokens[slice(*program.pool.offsets[row : row + 2])] for row in blocks[block]]
        beginnings.append([*head, *np.concatenate(shots).tolist()])
    start = counters(url)
    backend.generate(beginnings, end, max_new_tokens=1, temperature=0.0)
    before = counters(url)
    prompts = program.prompts(asked.texts)
    longest = max(map(len, program.label_words))
    started = time.perf_counter()
    answers = backend.generate([prompt.tokens for prompt in prompts], end, max_new_tokens=longest, temperature=0.0)
    seconds = time.perf_counter() - started
    warm, told = (
        {key: late[key] - early[key] for key in late} for early, late in ((start, before), (before, counters(url)))
    )
    decode, count = program.template.tokenizer.decode, len(asked)
    right = [decode(program.label_words[program.labels.index(answer)]) for answer in asked.answers]
    correct = [int(decode(item.tokens) == label) for item, label in zip(answers.items, right, strict=True)]
    assert program.expected is not None
    return {
        "blocks": len(beginnings) - 1, "queries": count,
        "shots_per_query": float(np.mean([len(prompt.selection.rows) for prompt in prompts])),
        "prompt_tokens_per_query": told["prompt_tokens"] / count,
        "computed_tokens_per_query": (told["prompt_tokens"] - told["cached_tokens"]) / count,
        "predicted_tokens_per_query": program.expected.computed_tokens,
        "queries_per_second": count / seconds,
        "warm_up_tokens": warm["prompt_tokens"] - warm["cached_tokens"],
        "accuracy": float(np.mean(correct)), "correct": correct, "server": backend.device.partition(" at ")[0],
        "examples": EXAMPLES, "budget": BUDGET, "cache_block": program.settings.cache_block, "model": MODEL,
        "seed": SEED, "machine": machine(), "commit": commit(),
    }  # fmt: skip


def drawn(name: str, data: Path, queries: int) -> tuple[Dataset, Dataset]:
    """The rows to compile of a dataset, and those to ask."""
    train, test = (load_dataset(str(data / name / f"{part}.jsonl")) for part in ("train", "test"))
    asked = test.take(np.random.default_rng(SEED).permutation(len(test))[:queries].tolist())
    return train.without_texts(asked.texts)[0], asked


def measured() -> list[dict[str, Any]]:
    return [row for row in rows_of(ROWS) if row["commit"] == commit()]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/results.md`."""
    names = ("dataset", "layout", "blocks", "shots", "prompt tokens", "computed", "predicted", "fewer by", "queries/s",
             "accuracy", "difference", "McNemar p")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        same = [other for other in rows if (other["dataset"], other["layout"]) == (row["dataset"], "per-query")]
        plain = same[0] if same else None
        cells = [row["dataset"], row["layout"], str(row["blocks"]), f"{row['shots_per_query']:.1f}"]
        cells += [f"{row[f'{name}_tokens_per_query']:.0f}" for name in ("prompt", "computed", "predicted")]
        compared = ["", "", ""]
        if plain is not None and plain is not row:
            fewer = plain["computed_tokens_per_query"] / row["computed_tokens_per_query"]
            compared = [f"{fewer:.1f}", *paired(row["correct"], plain["correct"])]
        lines.append(
            "| "
            + " | ".join(
                [*cells, compared[0], f"{row['queries_per_second']:.2f}", f"{row['accuracy']:.2f}", *compared[1:]]
            )
            + " |"
        )
    return "\n".join(lines)


def paired(correct: list[int], others: list[int]) -> list[str]:
    """The difference of two accuracies on the same queries with its interval, and McNemar's exact p-value."""
    difference = np.subtract(correct, others)
    low, high = (2 * bound - 1 for bound in betting((difference + 1) / 2))
    won, changed = int((difference > 0).sum()), int((difference != 0).sum())
    p = binomtest(won, changed).pvalue if changed else 1.0
    return [f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]", f"{p:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--queries", type=int, default=80)
    given = parser.parse_args()
    data = data_folder(DATASETS)
    done = {(row["dataset"], row["layout"]) for row in measured()}
    if missing := [(name, layout) for name in given.datasets for layout in given.layouts if (name, layout) not in done]:
        with running_server(MODEL, port=free_port()) as url:
            for name, layout in missing:
                train, asked = drawn(name, data, given.queries)
                row = {"dataset": name, "layout": layout, **measure(compiled(train, layout), asked, url)}
                keep(ROWS, row)
    print(table(measured()))


if __name__ == "__main__":
    main()
