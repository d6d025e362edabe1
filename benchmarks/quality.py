"""Our levels, the vote of the neighbours and what peers choose, on labelled data; hours a dataset on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.quality [--datasets banking77 mr] [--budgets 512] [--queries 100]

For each dataset and each budget: a label-balanced pool, and queries drawn at random from the test rows, the same for
all systems. `SYSTEMS` is the table of what is compared; whoever adds one writes a function from a `Task` to an answer.

- Peers (`peers/asking.py`) choose rows in their own environments, which are installed when they are first needed. They
  get the same pool, and the same vectors. Their rows go into our template, at most `--shots` of them (as many as -O1
  takes), whole, while they fit into the same budget, the peer's most important first; they stand in the order of the
  peer's prompts. No peer knows a budget, so that more rows are asked for than shown; the query itself is left out.
- Log-loss is that of the right label in nats, no probability counted as less than 1e-9; `log_loss_of_labels` that of
  the law renormalised over the labels. `label_mass` is what the model itself gives to the labels, before calibration.
- `calls` are the prompts that the compiler asked the model about: at -O2 at most `--search-queries`, at -O3 twice as
  many. `compile_seconds` is its time, the loading of the model aside; of a peer, that of all its choosing. `seconds`
  and `tokens` are of a query.
- `--references FOLDER` holds two references for each dataset, FOLDER/DATASET-0 and -1, as `icl finetune` writes them;
  those that are missing are trained: `--method rsr` with its defaults, on `--reference-examples` rows, two seeds. The
  search and the calibration then approximate the first one, on rows that it was not trained on; `tv` is the mean TV
  to it, `floor` that between the two, and the second one is a system too.
- `O1-read` is -O1 with the base model's reading beside the encoder (`--encoder minilm+base`); a search at -O2 decides
  for itself whether to have it. The vote has the encoder alone.
- `--validation N` draws N further test rows, which are no queries: `O1-validated` and `O2-validated` calibrate, and
  search, on those in place of the pool's, as with `icl compile --validation`.
- Differences are those of -O2 less a system, query by query, with 95 % intervals, each by itself: of accuracy and TV by
  betting, of log-loss, which has no small range, Student's, which is approximate. With several `--pool`, one after the
  other, the largest is compared with the others in the same way.

Rows are appended to `benchmarks/rows/quality.jsonl`, and for each of them what happened at each query to
`benchmarks/rows/quality/DATASET.jsonl`; what stands there is not measured again, so that the command can be stopped at
any time; a search or a training that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from benchmarks.peers.asking import PEERS, Recorded, choose
from evaluation.comparison import Difference, bounded_difference, unbounded_difference
from evaluation.evaluate import commit, machine
from evaluation.gap import distances
from evaluation.neighbours import NeighboursVote
from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import make_method
from evaluation.reference.trainer import finetune, load_reference
from icl_compiler.backends.backend import Backend, Progress
from icl_compiler.calibration.calibrating import calibrate
from icl_compiler.calibration.held_out import LEAST_PROBABILITY
from icl_compiler.compile import compile_program
from icl_compiler.compile_cli import ENOUGH_OTHERS
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.encoders import with_base
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, QUERIES, optimise
from icl_compiler.predictor import Predictions, Predictor, PromptedPredictor, open_backend
from icl_compiler.program import Program

ROWS = Path(__file__).parent / "rows" / "quality.jsonl"
EACH_QUERY = ROWS.with_suffix("")
WORK = Path("bench-quality")
DATASETS = ("banking77", "clinc150_oos", "hwu64", "mr", "subj", "goemotions_single")
MODEL, ENCODER = "smollm2-135m", "minilm"
BETTER = {"accuracy": 1, "log_loss": -1, "tv": -1}
"""What is compared, and whether more of it is better."""


class Task(NamedTuple):
    """A pool, queries, and what a system may spend."""

    name: str
    pool: Dataset
    queries: Dataset
    budget: int
    search_queries: int
    seed: int
    backend: Backend
    references: Sequence[Predictor] = ()  # two, or none
    shots: int = 16
    among: Sequence[int] | None = None  # rows of the pool that the first reference was not trained on
    validation: Dataset | None = None

    @property
    def reference(self) -> Predictor | None:
        """What the search and the calibration approximate, if not the right labels."""
        return self.references[0] if self.references else None


class Answer(NamedTuple):
    """What a system says of the queries, and what it was made of."""

    said: Predictions
    compile_seconds: float
    calls: int
    settings: Row


def at_level(
    level: Literal[0, 1, 2, 3], calibrated: bool, validated: bool = False, encoder: str = ENCODER
) -> Callable[[Task], Answer]:
    """A program as `icl compile -O` makes it; a search may put the base model's reading beside the encoder."""

    def answer(task: Task) -> Answer:
        started, calls = time.perf_counter(), 0
        held_out = task.validation if validated else None
        among = None if validated else task.among  # the reference was not trained on test rows
        program = compile_program(
            task.pool, model=task.backend.model, encoder=encoder, retriever=DEFAULT_RETRIEVERS[level],
            budget=task.budget, seed=task.seed,
        )  # fmt: skip
        if level == 2 or level == 3:
            WORK.mkdir(exist_ok=True)
            queries = task.search_queries * QUERIES[level] // QUERIES[2]
            higher = ("" if level == 2 else f"-O{level}") + "-validated" * validated
            log = WORK / f"{task.name}-{task.budget}-{task.search_queries}-{task.seed}{higher}.jsonl"
            program, trace = optimise(
                program, task.backend, level=level, queries=queries, reference=task.reference, among=among,
                validation=held_out, log=log,
            )  # fmt: skip
            calls = trace[0]["prompts_asked"]
        elif calibrated:
            program, choice = calibrate(
                program, task.backend, reference=task.reference, among=among, validation=held_out, seed=task.seed
            )
            calls = choice.queries
        seconds = time.perf_counter() - started
        return Answer(
            PromptedPredictor(program, task.backend).predict(task.queries.texts), seconds, calls, _told(program)
        )

    return answer


def vote(task: Task) -> Answer:
    """The shares of the labels among the nearest rows; no language model."""
    started = time.perf_counter()
    voting = NeighboursVote(task.pool, encoder=ENCODER)
    said = voting.predict(task.queries.texts)
    return Answer(said, time.perf_counter() - started, 0, {"k": voting.vote.k, "sharpness": voting.vote.sharpness})


def chosen_by(name: str) -> Callable[[Task], Answer]:
    """The rows that a peer chooses, in our prompts."""

    def answer(task: Task) -> Answer:
        texts = task.queries.texts
        found = choose(
            PEERS[name], task.pool, texts, WORK / f"{name}.json",
            model=MODEL, encoder=ENCODER, shots=task.shots, seed=task.seed,
        )  # fmt: skip
        program = compile_program(
            task.pool, model=task.backend.model, retriever="uniform", shots=task.shots, budget=task.budget,
            seed=task.seed, order=found.order,
        )  # fmt: skip
        recorded = Recorded(dict(zip(texts, found.rows, strict=True)))
        program = replace(program, retriever=recorded, settings=replace(program.settings, retriever=name))
        said = PromptedPredictor(program, task.backend).predict(texts)
        return Answer(said, found.seconds, 0, _told(program) | {"version": found.version})

    return answer


def fine_tuned(task: Task) -> Answer:
    """The second reference: its TV to the first one is the floor."""
    return Answer(task.references[1].predict(task.queries.texts), 0.0, 0, {})


SYSTEMS: Mapping[str, Callable[[Task], Answer]] = {
    "vote": vote,
    "O0": at_level(0, calibrated=False),
    "O1": at_level(1, calibrated=False),
    "O1-calibrated": at_level(1, calibrated=True),
    "O1-read": at_level(1, calibrated=False, encoder=with_base(ENCODER)),
    "O1-read-calibrated": at_level(1, calibrated=True, encoder=with_base(ENCODER)),
    "O2": at_level(2, calibrated=True),
    "O1-validated": at_level(1, calibrated=True, validated=True),
    "O2-validated": at_level(2, calibrated=True, validated=True),
    "O3": at_level(3, calibrated=True),
    **{name: chosen_by(name) for name in PEERS},
    "fine-tuned": fine_tuned,
}
VALIDATED = ("O1-validated", "O2-validated")
_KEY = 9  # parts of the key of a row without validation data
_POOL = 4  # where in it the size of the pool stands


def _told(program: Program) -> Row:
    settings = program.settings
    return {
        "retriever": settings.retriever,
        "encoder": settings.encoder,
        "shots": settings.shots,
        "order": settings.order,
        "per_label": settings.per_label,
        "ensembles": settings.ensembles,
        "template": program.template.template.name,
        "reranker": program.reranker is not None,
        "calibration": program.calibration.describe(),
    }


def measure(system: str, task: Task) -> tuple[Row, Row]:
    """One row, and what it is the mean of: a value for each query."""
    said, compile_seconds, calls, settings = SYSTEMS[system](task)
    right = np.array([said.labels.index(answer) for answer in task.queries.answers])
    place = np.arange(len(right))
    labels = said.probabilities / np.maximum(said.probabilities.sum(axis=1, keepdims=True), LEAST_PROBABILITY)
    each = {"accuracy": (said.best == right).astype(float), "log_loss": _log_loss(said.probabilities[place, right])}
    row: Row = {
        "log_loss_of_labels": float(_log_loss(labels[place, right]).mean()),
        "label_mass": float((said.uncalibrated or said).probabilities.sum(axis=1).mean()),
        "calls": calls,
        "compile_seconds": compile_seconds,
        "seconds": said.seconds / len(right),
        "tokens": float(said.prompt_tokens.mean()),
        "settings": settings,
        "machine": machine(),
        "commit": commit(),
    }
    if task.references:
        theirs = [reference.predict(task.queries.texts) for reference in task.references]
        each["tv"] = distances(said, theirs[0]).lower
        row["floor"] = float(distances(theirs[0], theirs[1]).lower.mean())
    means = {name: float(values.mean()) for name, values in each.items()}
    return means | row, {name: values.round(5).tolist() for name, values in each.items()}


def _log_loss(of_right: Float[np.ndarray, " queries"]) -> Float[np.ndarray, " queries"]:
    loss: Float[np.ndarray, " queries"] = 0.0 - np.log(np.maximum(of_right, LEAST_PROBABILITY))
    return loss


class Remembering:
    """A predictor that is asked about the same texts once."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._said: dict[tuple[str, ...], Predictions] = {}
        self.labels = predictor.labels

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """As the predictor says, or has said."""
        if tuple(texts) not in self._said:
            self._said[tuple(texts)] = self._predictor.predict(texts, progress=progress)
        return self._said[tuple(texts)]


def references(folder: Path, name: str, train: Dataset, examples: int) -> tuple[list[Predictor], list[str]]:
    """Two references of seeds 0 and 1, trained if they are not there, and what they are, in words."""
    how = make_method("rsr", {})
    found: list[Predictor] = []
    told = []
    for seed in (0, 1):
        path = folder / f"{name}-{seed}"
        if not path.exists():
            print(f"training {path}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            loop = LoopSettings(learning_rate=how.learning_rate, seed=seed)
            finetune(train.subset(min(examples, len(train)), seed=0), path, model=MODEL, method=how, settings=loop)
        reference = load_reference(path)
        found.append(Remembering(reference.predictor()))
        told.append(reference.description)
    return found, told


def _others(reference: Path, pool: Dataset) -> list[int] | None:
    """Rows of the pool that the reference was not trained on, as `icl compile` asks it about; `None` if too few."""
    trained = load_reference(reference).trained_on(pool.texts)
    others = [] if trained is None else np.flatnonzero(~trained).tolist()
    return others if len(others) >= ENOUGH_OTHERS else None


def table() -> str:
    """What was measured, in Markdown, and how -O2 compares with the vote alone."""
    columns = ("dataset", "budget", "queries", "seed", "system", "accuracy", "log_loss", "tv", "floor", "label_mass",
               "log_loss_of_labels", "calls", "compile_seconds", "seconds", "tokens")  # fmt: skip
    heads = [*columns, *(f"O2: {name}" for name in BETTER)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    against_vote: dict[str, list[Difference]] = {name: [] for name in BETTER}
    for row in rows_of(ROWS):
        row |= {"seed": row["key"][3], "queries": row["key"][5]}
        values = (row.get(name, "") for name in columns)
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        found = differences(row)
        cells += [_shown(found[name]) if name in found else "" for name in BETTER]
        lines.append("| " + " | ".join(cells) + " |")
        for name, difference in found.items():
            against_vote[name] += [difference] * (row["system"] == "vote")
    verdicts = (told for name in BETTER if (told := verdict(name, against_vote[name])))
    return "\n".join([*lines, "", *verdicts, *more_data()])


def more_data() -> list[str]:
    """What the largest pool changes beside each smaller one, in the same setting, a line each."""
    rows = sorted(rows_of(ROWS), key=lambda row: int(row["key"][_POOL]))
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(json.dumps([*row["key"][:_POOL], *row["key"][_POOL + 1 :]]), []).append(row)
    told = []
    for *smaller, largest in settings.values():
        for row in smaller:
            found = compared(row["dataset"], largest["key"], row["key"])
            shown = ", ".join(f"{name} {_shown(found[name])}" for name in BETTER if name in found)
            pools = f"{largest['key'][_POOL]:,} rows less {row['key'][_POOL]:,}"
            told += [f"{row['dataset']}, {row['budget']} tokens, {row['system']}: {pools}: {shown}"] if shown else []
    return told


def differences(row: Row) -> dict[str, Difference]:
    """-O2 less the system of this row, in the same setting; nothing where not both kept each query."""
    return compared(row["dataset"], [*row["key"][:2], "O2", *row["key"][3:_KEY]], row["key"])


def compared(dataset: str, first: list[object], second: list[object]) -> dict[str, Difference]:
    """The row of the key `first` less that of `second`, by query; nothing where not both kept each query."""
    each = {json.dumps(kept["key"]): kept for kept in rows_of(EACH_QUERY / f"{dataset}.jsonl")}
    ours, theirs = (each.get(json.dumps(key), {}) for key in (first, second))
    if ours is theirs:
        return {}
    found = {}
    for name in BETTER:
        if name in ours and name in theirs:
            # the rows are in the order of the file, which is often sorted by label; betting wants a random one
            a, b = (np.random.default_rng(0).permutation(each[name]) for each in (theirs, ours))
            difference = unbounded_difference if name == "log_loss" else bounded_difference
            found[name] = difference(name, a, b, 0.95, anytime=False)
    return found


def _shown(found: Difference) -> str:
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def verdict(name: str, found: Sequence[Difference]) -> str:
    """Whether -O2 is ever worse than the vote alone, in words; nothing where they were not compared."""
    if not found:
        return ""
    gains = BETTER[name] * np.array([(each.difference, each.low, each.high) for each in found])
    counts = {
        "better": ((gains[:, 0] > 0).sum(), (gains.min(axis=1) > 0).sum()),
        "worse": ((gains[:, 0] < 0).sum(), (gains.max(axis=1) < 0).sum()),
    }
    told = ", ".join(f"{word} in {plain} (clearly in {clearly})" for word, (plain, clearly) in counts.items())
    return f"{name} of -O2 beside the vote alone, of {len(found)}: {told}"


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--search-queries", type=int, default=1500)
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="test rows to calibrate on; no queries")
    parser.add_argument("--shots", type=int, default=16, help="most shots of what peers choose")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--references", type=Path, metavar="FOLDER", help="of fine-tuned models; made if missing")
    parser.add_argument("--reference-examples", type=int, default=2000)
    asked = parser.parse_args()
    data = data_folder(DATASETS)
    backend = open_backend("transformers", MODEL)
    failed: dict[str, str] = {}
    for name in asked.datasets:
        train, test = (load_dataset(data / name / f"{part}.jsonl") for part in ("train", "test"))
        test = test.take([row for row, answer in enumerate(test.answers) if answer in train.labels])
        tuned: list[Predictor] = []
        told: list[str] = []
        if asked.references:
            unseen, _ = train.without_texts(test.texts)
            tuned, told = references(asked.references, name, unseen, asked.reference_examples)
        for seed in asked.seeds:
            shuffled = np.random.default_rng(seed).permutation(len(test))
            drawn = np.sort(shuffled[: asked.queries]).tolist()
            others = shuffled[asked.queries : asked.queries + asked.validation].tolist()
            pool = train.subset(min(asked.pool, len(train)), seed=seed)
            among = _others(asked.references / f"{name}-0", pool) if tuned else None
            for budget in asked.budgets:
                task = Task(
                    name, pool, test.take(drawn), budget, asked.search_queries, seed, backend, tuned, asked.shots,
                    among, test.take(others) if others else None,
                )  # fmt: skip
                for system in asked.systems:
                    key = [
                        name, budget, system, seed, len(pool), len(drawn), asked.search_queries, told, asked.shots
                    ]  # fmt: skip
                    if (system == "fine-tuned" and not tuned) or (system in VALIDATED and not others):
                        continue
                    key += [len(others)] if system in VALIDATED else []
                    if key in [row["key"] for row in rows_of(ROWS)]:
                        continue
                    try:
                        row, each = measure(system, task)
                    except (RuntimeError, subprocess.CalledProcessError) as error:
                        failed[system] = str(error)
                        print(f"{system} failed: {error}", file=sys.stderr, flush=True)
                        continue
                    keep(EACH_QUERY / f"{name}.jsonl", {"key": key, **each})
                    row = {"key": key, "dataset": name, "budget": budget, "system": system, **row}
                    keep(ROWS, row)
                    shown = ("dataset", "budget", "system", "accuracy", "log_loss", "tv", "calls")
                    print({k: row[k] for k in shown if k in row}, flush=True)
    print(table())
    if failed:
        sys.exit("\n".join(f"not measured: {system}: {why}" for system, why in failed.items()))


if __name__ == "__main__":
    main()
