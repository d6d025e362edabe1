"""Seconds of a training step, its attention by a mask over the whole batch or branch by branch; two minutes.

    ICL_DATASETS=FOLDER OMP_NUM_THREADS=1 python -m benchmarks.training_step

SmolLM2-135M; batches of 16 label-balanced rows of banking77 and of subj. All layers move (frontier 0), or RSR's 2 % of
the upper third (frontier 20) above layers that were computed before. Seconds of the processor, medians over five
batches; the two attentions take turns. What they compute is the same (`tests/test_tree_attention.py`).

Rows are appended to `benchmarks/rows/training_step.jsonl`.
"""

import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.parts.kept import data_folder, keep
from evaluation.evaluate import commit, machine
from evaluation.reference.method import Task
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.trainer import training_examples
from evaluation.reference.tree_attention import TREE_ATTENTION
from icl_compiler.compile import DEFAULT_TEMPLATES, load_tokenizer
from icl_compiler.data import load_dataset
from icl_compiler.templates import EncodedTemplate, Template

ROWS = Path(__file__).parent / "rows" / "training_step.jsonl"
MODEL, BATCH, BATCHES, BUDGET = "smollm2-135m", 16, 5, 0.02
ATTENTIONS = {"mask": "sdpa", "branches": TREE_ATTENTION}


def measure(name: str, frontier: int, data: Path) -> dict[str, object]:
    """The row of one dataset and one frontier."""
    rows = load_dataset(str(data / name / "train.jsonl")).subset(BATCH * (BATCHES + 1), seed=0)
    template = Template.from_name(DEFAULT_TEMPLATES["classification"])
    encoded = EncodedTemplate.build(template, load_tokenizer(MODEL), rows.labels)
    examples = training_examples(encoded, rows)
    task = Task(MODEL, examples, examples)
    if frontier:
        model = task.load(task.frozen_dtype)
        synapses = Synapses(model, frontier=frontier, size=64)
        count = int(BUDGET * sum(weight.numel() for weight in model.parameters()) / 64)
        synapses.select(torch.randperm(len(synapses), generator=torch.Generator().manual_seed(0))[:count].sort().values)
    else:
        model = task.load(torch.float32)
    objective = task.objective(model, frontier=frontier)
    seconds: dict[str, list[float]] = {attention: [] for attention in ATTENTIONS}
    for batch in range(BATCHES + 1):  # the first one makes the kernels
        part = range(BATCH * batch, BATCH * (batch + 1))
        if frontier:
            objective.losses(part, held_out=False)
        for attention, implementation in ATTENTIONS.items():
            model.set_attn_implementation(implementation)
            began = time.process_time()
            objective.losses(part, held_out=False).mean().backward()  # type: ignore[no-untyped-call]  # torch gives none
            seconds[attention].append(time.process_time() - began)
            model.zero_grad()
    medians = {f"{attention}_seconds": statistics.median(found[1:]) for attention, found in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["mask"][1:], seconds["branches"][1:], strict=True))
    facts = {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "seed": 0, "machine": machine(), "commit": commit()}
    return {"dataset": name, "frontier": frontier, **medians, "ratio": ratio, **facts}


def main() -> None:
    data = data_folder(["banking77", "subj"])
    for name in ("banking77", "subj"):
        for frontier in (0, 20):
            row = measure(name, frontier, data)
            keep(ROWS, row)
            print(row)


if __name__ == "__main__":
    main()
