"""Programs at every level, and the vote of the neighbours, on labelled datasets; about an hour a dataset on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.quality [--datasets banking77 mr] [--budgets 512] [--queries 100]

For each dataset and each budget: a label-balanced pool, and queries drawn at random from the test rows, the same for
all systems. `SYSTEMS` is the table of what is compared; whoever adds one writes a function from a `Task` to an answer.

- Log-loss is that of the right label in nats, no probability counted as less than 1e-9; `log_loss_of_labels` that of
  the law renormalised over the labels. `label_mass` is what the model itself gives to the labels, before calibration.
- `calls` are the prompts that the compiler asked the model about, `compile_seconds` its time, the loading of the model
  aside; `seconds` and `tokens` are of a query.
- `--references FOLDER` holds a reference for each dataset, FOLDER/DATASET, as `icl finetune` writes it: then the
  search and the calibration approximate that one, and the rows have the mean TV to it.

Rows are appended to `benchmarks/rows/quality.jsonl`; what stands there is not measured again, so that the command can
be stopped at any time; a search that was stopped goes on.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.evaluate import commit, machine
from evaluation.neighbours import NeighboursVote
from evaluation.reference.trainer import load_reference
from evaluation.tv import tv_distance, with_other
from icl_compiler.backends.backend import Backend
from icl_compiler.calibration.calibrating import calibrate
from icl_compiler.calibration.methods import LEAST_PROBABILITY
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, optimise
from icl_compiler.predictor import Predictions, Predictor, PromptedPredictor, open_backend
from icl_compiler.program import Program

ROWS = Path(__file__).parent / "rows" / "quality.jsonl"
LOGS = Path("bench-quality")
DATASETS = ("banking77", "clinc150_oos", "hwu64", "mr", "subj", "goemotions_single")
MODEL, ENCODER = "smollm2-135m", "minilm"
Row = dict[str, Any]


class Task(NamedTuple):
    """A pool, queries, and what a system may spend."""

    name: str
    pool: Dataset
    queries: Dataset
    budget: int
    search_queries: int
    seed: int
    backend: Backend
    reference: Predictor | None


class Answer(NamedTuple):
    """What a system says of the queries, and what it was made of."""

    said: Predictions
    compile_seconds: float
    calls: int
    settings: Row


def at_level(level: int, calibrated: bool) -> Callable[[Task], Answer]:
    """A program as `icl compile -O` makes it."""

    def answer(task: Task) -> Answer:
        started, calls = time.perf_counter(), 0
        program = compile_program(
            task.pool, model=task.backend.model, encoder=ENCODER, retriever=DEFAULT_RETRIEVERS[level],
            budget=task.budget, seed=task.seed,
        )  # fmt: skip
        if level == 2:
            LOGS.mkdir(exist_ok=True)
            log = LOGS / f"{task.name}-{task.budget}-{task.search_queries}-{task.seed}.jsonl"
            program, trace = optimise(
                program, task.backend, queries=task.search_queries, reference=task.reference, log=log
            )
            calls = trace[0]["prompts_asked"]
        elif calibrated:
            program, choice = calibrate(program, task.backend, reference=task.reference, seed=task.seed)
            calls = choice.queries
        seconds = time.perf_counter() - started
        return Answer(
            PromptedPredictor(program, task.backend).predict(task.queries.texts), seconds, calls, _told(program)
        )

    return answer


def vote(task: Task) -> Answer:
    """The shares of the labels among the 8 nearest rows; no language model."""
    started = time.perf_counter()
    voting = NeighboursVote(task.pool, encoder=ENCODER)
    return Answer(voting.predict(task.queries.texts), time.perf_counter() - started, 0, {})


SYSTEMS: Mapping[str, Callable[[Task], Answer]] = {
    "vote": vote,
    "O0": at_level(0, calibrated=False),
    "O1": at_level(1, calibrated=False),
    "O1-calibrated": at_level(1, calibrated=True),
    "O2": at_level(2, calibrated=True),
}


def _told(program: Program) -> Row:
    settings = program.settings
    return {
        "retriever": settings.retriever,
        "shots": settings.shots,
        "order": settings.order,
        "per_label": settings.per_label,
        "template": program.template.template.name,
        "calibration": program.calibration.describe(),
    }


def measure(system: str, task: Task) -> Row:
    """One row."""
    said, compile_seconds, calls, settings = SYSTEMS[system](task)
    right = np.array([said.labels.index(answer) for answer in task.queries.answers])
    place = np.arange(len(right))
    labels = said.probabilities / np.maximum(said.probabilities.sum(axis=1, keepdims=True), LEAST_PROBABILITY)
    row: Row = {
        "accuracy": float((said.best == right).mean()),
        "log_loss": _log_loss(said.probabilities[place, right]),
        "log_loss_of_labels": _log_loss(labels[place, right]),
        "label_mass": float((said.uncalibrated or said).probabilities.sum(axis=1).mean()),
        "calls": calls,
        "compile_seconds": compile_seconds,
        "seconds": said.seconds / len(right),
        "tokens": float(said.prompt_tokens.mean()),
        "settings": settings,
        "machine": machine(),
        "commit": commit(),
    }
    if task.reference is not None:
        theirs = task.reference.predict(task.queries.texts)
        order = [theirs.labels.index(label) for label in said.labels]
        tv = tv_distance(with_other(said.probabilities), with_other(theirs.probabilities[:, order]))
        row["tv"] = float(tv.mean())
    return row


def _log_loss(of_right: Any) -> float:
    return float(-np.log(np.maximum(of_right, LEAST_PROBABILITY)).mean())


def rows() -> list[Row]:
    """All that was measured."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> str:
    """What was measured, in Markdown."""
    columns = ("dataset", "budget", "system", "accuracy", "log_loss", "log_loss_of_labels", "label_mass", "calls",
               "compile_seconds", "seconds", "tokens")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows():
        cells = (f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--search-queries", type=int, default=1500)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--references", type=Path)
    asked = parser.parse_args()
    data = Path(os.environ.get("ICL_DATASETS", Path(__file__).parents[2] / "shared" / "data"))
    if not data.is_dir():
        sys.exit(f"there are no datasets at {data}; set ICL_DATASETS to the folder that holds {', '.join(DATASETS)}")
    backend = open_backend("transformers", MODEL)
    ROWS.parent.mkdir(exist_ok=True)
    for name in asked.datasets:
        train, test = (load_dataset(data / name / f"{part}.jsonl") for part in ("train", "test"))
        test = test.take([row for row, answer in enumerate(test.answers) if answer in train.labels])
        reference = load_reference(asked.references / name).predictor() if asked.references else None
        for seed in asked.seeds:
            drawn = np.sort(np.random.default_rng(seed).permutation(len(test))[: asked.queries]).tolist()
            for budget in asked.budgets:
                for system in asked.systems:
                    pool = min(asked.pool, len(train))
                    key = [name, budget, system, seed, pool, len(drawn), asked.search_queries, reference is not None]
                    if key in [row["key"] for row in rows()]:
                        continue
                    task = Task(
                        name, train.subset(pool, seed=seed), test.take(drawn), budget, asked.search_queries, seed,
                        backend, reference,
                    )  # fmt: skip
                    row = {"key": key, "dataset": name, "budget": budget, "system": system, **measure(system, task)}
                    with ROWS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(
                        {k: row[k] for k in ("dataset", "budget", "system", "accuracy", "log_loss", "calls")},
                        flush=True,
                    )
    print(table())


if __name__ == "__main__":
    main()
