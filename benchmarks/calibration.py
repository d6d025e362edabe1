"""Every calibration on four real datasets, by held-out risk and on test rows; about 3 minutes a dataset on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.calibration [--datasets banking77 ...] [--held-out 100] [--test 100]

A program (dense retrieval, 8 shots, 1,024 tokens) of 1,000 label-balanced rows is asked about held-out rows of its own
pool, and about test rows drawn at random. Every candidate is fitted to the former and measured on the latter, from the
same answers of the model; `chosen` is the one that `icl compile --calibration auto` takes.

Answers of the model are kept in `bench-calibration/`, so that the command can be stopped at any time, by itself
after `--minutes`. Rows are appended to `benchmarks/rows/calibration.jsonl`; what stands there is not measured again. At
the end the table of `docs/calibration.md` is printed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from evaluation.gap import calibration_error
from icl_compiler.backends.backend import Backend, LabelScores, Progress, Usage
from icl_compiler.calibration.calibrating import score_held_out, with_voters
from icl_compiler.calibration.choosing import fit_and_choose
from icl_compiler.calibration.held_out import log_loss
from icl_compiler.calibration.law import Evidence
from icl_compiler.calibration.votes import Voters
from icl_compiler.compile import compile_program, with_calibration
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.optimise.judges import Asker
from icl_compiler.optimise.racing import OutOfTime
from icl_compiler.optimise.score_log import ScoreLog
from icl_compiler.predictor import open_backend
from icl_compiler.program import Program
from icl_compiler.tokenizer import TokenIds

ROWS = Path(__file__).parent / "rows" / "calibration.jsonl"
DATASETS = ("banking77", "clinc150_oos", "subj", "mr")
POOL, SHOTS, BUDGET, MODEL = 1000, 8, 1024, "smollm2-135m"
ANSWERS = Path("bench-calibration")


class Kept:
    """A backend whose answers about labels are kept."""

    def __init__(self, backend: Backend, deadline: float) -> None:
        self._asker = Asker(backend, ScoreLog(ANSWERS / "answers.jsonl"), deadline=deadline)
        self.label_logprobs_of = backend.label_logprobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asker.backend, name)

    def label_logprobs(
        self, prompts: Sequence[TokenIds], label_words: Sequence[TokenIds], *, progress: Progress | None = None
    ) -> LabelScores:
        """As the backend says, or has said; what that cost is not known."""

        def ask(new: list[TokenIds]) -> list[list[list[float]]]:
            return [[row] for row in self.label_logprobs_of(new, label_words).logprobs.tolist()]

        answers = self._asker.ask(f"labels {label_words}", prompts, ask)
        return LabelScores(np.array([answer[0] for answer in answers]), Usage(0, 0, 0))


def program_of(dataset: str, folder: Path, seed: int) -> Program:
    """What is calibrated."""
    rows = load_dataset(folder / dataset / "train.jsonl")
    return compile_program(rows, model=MODEL, shots=SHOTS, budget=BUDGET, examples=POOL, seed=seed)


def test_rows(dataset: str, folder: Path, count: int, seed: int) -> Dataset:
    """Some, at random."""
    rows = load_dataset(folder / dataset / "test.jsonl")
    return rows.take(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())


def evidence_of(program: Program, engine: Kept, asked: Dataset) -> tuple[Evidence, Int64[np.ndarray, " texts"]]:
    """What model and neighbours say of texts, and the number of the right label of each."""
    prompts = with_voters(program).prompts(asked.texts)
    scores = engine.label_logprobs([prompt.tokens for prompt in prompts], program.label_words)
    voters = Voters.joined([prompt.voters for prompt in prompts if prompt.voters is not None])
    labels = np.array([program.labels.index(answer) for answer in asked.answers], dtype=np.int64)
    return Evidence(scores.logprobs, scores.upper, voters), labels


def measure(
    dataset: str, folder: Path, key: list[object], *, held_out: int, test: int, seed: int, deadline: float
) -> list[Row]:
    """One row for each candidate."""
    program, asked = program_of(dataset, folder, seed), test_rows(dataset, folder, test, seed)
    engine = Kept(open_backend("transformers", MODEL), deadline)
    fitted_to = score_held_out(program, engine, queries=held_out, seed=seed)
    scored = time.perf_counter()
    choice = fit_and_choose(fitted_to)
    fitted = time.perf_counter()
    evidence, labels = evidence_of(program, engine, asked)
    rows = []
    for candidate in choice.candidates:
        found = candidate.calibration
        heard = evidence
        if found.anchors is not None:
            anchored = with_calibration(program, found).prompts(asked.texts)
            voters = Voters.joined([prompt.voters for prompt in anchored if prompt.voters is not None])
            heard = evidence._replace(voters=voters)
        law = found.law(heard).probabilities
        right = law.argmax(axis=1) == labels
        losses = log_loss(law, np.eye(law.shape[1])[labels])
        rows.append(
            {
                "key": [*key, candidate.name],
                "dataset": dataset,
                "method": candidate.name,
                "chosen": found is choice.calibration,
                "fitted": found.describe(),
                "held_out_risk": [candidate.risk, candidate.risk_low, candidate.risk_high],
                "held_out_saved": [candidate.saved, candidate.saved_low, candidate.saved_high],
                "held_out_accuracy": candidate.accuracy,
                "accuracy": float(right.mean()),
                "log_loss": float(losses.mean()),
                "log_loss_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
                "ece": calibration_error(law.max(axis=1), right.astype(float)),
                "label_mass": float(law.sum(axis=1).mean()),
                "held_out": len(fitted_to.rows),
                "test": len(labels),
                "seed": seed,
                "seconds_to_fit": fitted - scored,
                "model": MODEL,
                "machine": f"{machine()}; {engine.device}",
                "commit": commit(),
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """What was measured, in Markdown; the chosen one is bold."""
    lines = ["| dataset | calibration | held-out log-loss | log-loss | accuracy | ECE |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["held_out_risk"][1:]
        name = f"**{row['method']}**" if row["chosen"] else row["method"]
        risk = f"{row['held_out_risk'][0]:.3f} [{low:.3f}, {high:.3f}]"
        loss = f"{row['log_loss']:.3f} ± {row['log_loss_error']:.3f}"
        lines.append(f"| {row['dataset']} | {name} | {risk} | {loss} | {row['accuracy']:.2f} | {row['ece']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    data = data_folder(DATASETS)
    ANSWERS.mkdir(exist_ok=True)
    for dataset in asked.datasets:
        key = [dataset, asked.held_out, asked.test, asked.seed]
        if any(row["key"][:-1] == key for row in rows_of(ROWS)):
            continue
        try:
            rows = measure(dataset, data, key, held_out=asked.held_out, test=asked.test, seed=asked.seed, deadline=end)
        except OutOfTime:
            sys.exit(f"the time is up within {dataset}; the same command goes on from there")
        keep(ROWS, *rows)
    print(table(rows_of(ROWS)))


if __name__ == "__main__":
    main()
