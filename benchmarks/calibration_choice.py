"""How well a calibration is chosen with few held-out texts, by labels and towards a reference; minutes on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.calibration_choice [--datasets mr ...] [--references FOLDER]

The programs of `benchmarks.calibration`, and 200 test texts of each dataset. Some of them, drawn at random, play the
held-out ones: the calibrations are fitted to them, one is chosen by five folds, and what that costs is measured on all
the others: log-loss against the labels and, with references, total variation to the reference. This `--draws` times.

- `0`, `0.5` and `1` are rules: the lowest risk, or the simplest method whose risk is not higher by more than so many
  standard errors of the paired difference. `icl compile` takes the lowest.
- `log_loss` is that of the right labels, of each method and of what the lowest risk chooses, whatever the risk.
- `best` is the one that is best on the others, which nobody knows.
- `--references FOLDER` holds one for each dataset, FOLDER/DATASET-..., as `icl sweep` leaves them in `references/`.

Answers of the model are kept in `bench-calibration/`: after `benchmarks.calibration --held-out 300 --test 200` nothing
is asked again. Rows are appended to `benchmarks/rows/calibration_choice.jsonl`; what stands there is not measured
again. At the end the table of `docs/calibration.md` is printed.
"""

import argparse
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.calibration import ANSWERS, DATASETS, MODEL, Kept, evidence_of, program_of, test_rows
from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from evaluation.reference.trainer import load_reference
from icl_compiler.calibration.calibrating import score_held_out
from icl_compiler.calibration.choosing import cross_validated, evidence_for
from icl_compiler.calibration.held_out import HeldOut
from icl_compiler.predictor import open_backend
from icl_compiler.registry import CALIBRATIONS

ROWS = Path(__file__).parent / "rows" / "calibration_choice.jsonl"
RULES = (0.0, 0.5, 1.0)
TEXTS, ASKED, HELD_OUT = 200, 300, (25, 50, 100)


def everything_about(dataset: str, folder: Path, reference: Path | None) -> HeldOut:
    """What model, neighbours and reference say of the test texts, which take no part in the program."""
    program, asked = program_of(dataset, folder, 0), test_rows(dataset, folder, TEXTS, 0)
    engine = Kept(open_backend("transformers", MODEL), float("inf"))
    evidence, labels = evidence_of(program, engine, asked)
    priors = score_held_out(program, engine, queries=ASKED, seed=0).priors
    law = None
    if reference is not None:
        said = load_reference(reference).predictor().predict(asked.texts)
        law = said.probabilities[:, [said.labels.index(label) for label in program.labels]]
    return HeldOut(np.arange(TEXTS) + len(program.pool.data), labels, evidence, priors, law)


def chosen_by(factor: float, risks: list[np.ndarray]) -> int:
    """The simplest, which come first, within so many standard errors of the best."""
    lowest = min(range(len(risks)), key=lambda i: risks[i].mean())
    for i, risk in enumerate(risks):
        more = risk - risks[lowest]
        if i == lowest or more.mean() <= factor * more.std(ddof=1) / np.sqrt(len(more)):
            return i
    raise AssertionError("the lowest is not above itself")


def measure(everyone: HeldOut, held_out: int, draws: int) -> Row:
    """Mean risks on the texts that were not held out, of every method and of what each rule chooses."""
    found: dict[str, list[float]] = defaultdict(list)
    surprise: dict[str, list[float]] = defaultdict(list)
    names: dict[str, Counter[str]] = defaultdict(Counter)
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(TEXTS)
        fitted_to, others = everyone.take(order[:held_out]), everyone.take(order[held_out:])
        methods, risks, costs = [], [], []
        for name in CALIBRATIONS:
            if validated := cross_validated(fitted_to, name):
                law = validated.calibration.law(evidence_for(validated.calibration, others, everyone))
                methods.append(name)
                risks.append(validated.risks)
                costs.append(float(others.risks(law).mean()))
                surprise[name].append(float(replace(others, reference=None).risks(law).mean()))
        for name, cost in zip(methods, costs, strict=True):
            found[name].append(cost)
        for factor in RULES:
            place = chosen_by(factor, risks)
            found[f"{factor:g}"].append(costs[place])
            names[f"{factor:g}"][methods[place]] += 1
        found["best"].append(min(costs))
        surprise["0"].append(surprise[methods[chosen_by(0, risks)]][-1])
    errors = {
        f"{factor:g}": float(np.std(np.subtract(found[f"{factor:g}"], found["0"]), ddof=1) / np.sqrt(draws))
        for factor in RULES[1:]
    }
    means = {name: float(np.mean(costs)) for name, costs in found.items()}
    return {
        "means": means,
        "log_loss": {name: float(np.mean(losses)) for name, losses in surprise.items()},
        "errors_of_differences_to_0": errors,
        "chosen": {rule: dict(n) for rule, n in names.items()},
    }


def table(rows: list[Row]) -> str:
    """What was measured, in Markdown."""
    heads = [
        "dataset",
        "risk",
        "held out",
        "lowest risk",
        "within half an error",
        "within one",
        "best",
        "mostly chosen",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        means, most = row["means"], Counter(row["chosen"]["0"]).most_common(1)[0][0]
        shown = [f"{means[name]:.3f}" for name in ("0", "0.5", "1", "best")]
        lines.append("| " + " | ".join([row["dataset"], row["risk"], str(row["held_out"]), *shown, most]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--references", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    data = data_folder(DATASETS)
    ANSWERS.mkdir(exist_ok=True)
    for dataset in asked.datasets:
        reference = next(iter(sorted(asked.references.glob(f"{dataset}-*"))), None) if asked.references else None
        kinds = ["log-loss", "TV to the reference"][: 1 + (reference is not None)]
        keys = {(kind, count): [dataset, kind, count, asked.draws] for kind in kinds for count in HELD_OUT}
        known = [row["key"] for row in rows_of(ROWS)]
        if all(key in known for key in keys.values()):
            continue
        everyone = everything_about(dataset, data, reference)
        for (kind, count), key in keys.items():
            if key in known:
                continue
            judged = replace(everyone, reference=None) if kind == "log-loss" else everyone
            facts = {"key": key, "dataset": dataset, "risk": kind, "held_out": count, "draws": asked.draws, "seed": 0}
            row = facts | measure(judged, count, asked.draws) | {"machine": machine(), "commit": commit()}
            keep(ROWS, row)
    print(table(rows_of(ROWS)))


if __name__ == "__main__":
    main()
