"""Writing answers to long prompts, beside `transformers.generate` on the same prompts; about 5 minutes on 2 cores.

    ICL_DATASETS=FOLDER OMP_NUM_THREADS=1 python -m benchmarks.generation [--queries 24] [--batch 8]

SmolLM2-135M in bfloat16, the program of 16 dense shots of topv2_en (frames of commands, 1,024 tokens at most), its test
texts; answers of 64 tokens at most. Greedy, and four samples of each query at temperature 1.

- "icl" is the `transformers` backend; "transformers" asks `generate` about one query at a time, "in batches" about
  `--batch` of them, sorted by length and padded on the left: what a user would write. An answer ends at a line break.
- Processor seconds, loading aside; the greedy answers that are the same as those of "transformers", which rounds
  otherwise: one token that is another changes all that follow.

Rows are appended to `benchmarks/rows/generation.jsonl`.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts.kept import data_folder, keep
from evaluation.evaluate import commit, machine
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import load_dataset
from icl_compiler.models import load_causal_lm

ROWS = Path(__file__).parent / "rows" / "generation.jsonl"
MODEL, SHOTS, BUDGET, MOST, SAMPLES = "smollm2-135m", 16, 1024, 64, 4
Answers = list[list[int]]


def by_transformers(network: Any, prompts: Answers, end: int, samples: int, batch: int) -> Answers:
    """What `generate` writes, cut behind `end`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: Answers = [[] for _ in range(len(prompts) * max(1, samples))]
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples else {"do_sample": False}
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        longest = max(len(prompts[i]) for i in rows)
        tokens = torch.tensor([[end] * (longest - len(prompts[i])) + list(prompts[i]) for i in rows])
        lengths = torch.tensor([len(prompts[i]) for i in rows])
        seen = torch.arange(longest) >= longest - lengths[:, None]
        written = network.generate(
            tokens, attention_mask=seen.long(), max_new_tokens=MOST, eos_token_id=end, pad_token_id=end, **how
        )
        for row, answer in enumerate(written[:, longest:].tolist()):
            place = rows[row // max(1, samples)] * max(1, samples) + row % max(1, samples)
            found[place] = answer[: answer.index(end) + 1] if end in answer else answer
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    data = data_folder(["topv2_en"]) / "topv2_en"
    pool = load_dataset(data / "train.jsonl", target_column="target")
    program = compile_program(pool, model=MODEL, shots=SHOTS, budget=BUDGET)
    texts = load_dataset(data / "test.jsonl", target_column="target").subset(asked.queries, seed=0).texts
    prompts = [list(prompt.tokens) for prompt in program.prompts(texts)]
    [end] = program.template.terminator_ids
    backend = TransformersBackend(MODEL, "bfloat16")
    network = load_causal_lm(MODEL, torch.bfloat16).eval()

    def ours(samples: int) -> Answers:
        how: dict[str, Any] = {"samples": samples} if samples else {"temperature": 0.0}
        return [item.tokens for item in backend.generate(prompts, [end], max_new_tokens=MOST, **how).items]

    contenders: dict[str, Callable[[int], Answers]] = {
        "icl": ours,
        "transformers": lambda samples: by_transformers(network, prompts, end, samples, 1),
        "transformers, in batches": lambda samples: by_transformers(network, prompts, end, samples, asked.batch),
    }
    for samples in (0, SAMPLES):
        answers: dict[str, Answers] = {}
        for name, contender in contenders.items():
            torch.manual_seed(0)
            began = time.process_time()
            answers[name] = contender(samples)
            seconds = time.process_time() - began
            row = {
                "writes": name,
                "samples": samples,
                "queries": len(prompts),
                "prompt_tokens": sum(map(len, prompts)) / len(prompts),
                "written_tokens": sum(map(len, answers[name])) / len(answers[name]),
                "cpu_seconds_per_query": seconds / len(prompts),
                "batch": asked.batch,
                "seed": 0,
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                "machine": machine(),
                "commit": commit(),
            }
            keep(ROWS, row)
            print(row, flush=True)
        if not samples:
            for name, found in answers.items():
                same = sum(a == b for a, b in zip(found, answers["transformers"], strict=True))
                print(f"{name}: {same} of {len(found)} answers as transformers writes them")


if __name__ == "__main__":
    main()
