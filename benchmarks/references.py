"""Every method of fine-tuning on four real datasets, by the commands a user would type; many hours on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks.references [--stages search main ablation] [--part 0/1]

- search: each method at each of its learning rates, on 600 rows of banking77 (77 labels) and of subj (2), for two
  epochs (seed 100). The one with the lowest held-out loss is used for the datasets with many labels, or with two.
- main: each method on 2,222 label-balanced rows (a tenth of them, at most 200, held out) of each dataset, three seeds.
  SHiRA has as many parameters as RSR. Accuracy and negative log-likelihood are over 400 test rows
  drawn at random; processor seconds are those of the whole training process, its start included; the peak is its
  resident memory. `floor` rows follow: the TV between two seeds of a method on these rows, with an interval, where
  the answers of both lie in `bench-references` here.
- ablation: RSR with all of its parts, and with one of them switched off, or exchanged, on 600 label-balanced rows and
  200 held out of banking77 and of subj, three seeds; the loss of the right answer over the same 400 test rows, paired
  by row. The eight parts (`docs/references.md`) come first, other choices after them.
- workers: RSR by one and by two processes, on 1,111 rows of banking77; alone on the machine, with all its threads.
- cascade: three generations of `icl cascade` on 1,111 rows of banking77 and of subj, each of three quarters of the
  parameters of the one before, which stop at no loss; a row for each model. Killed, it goes on in `bench-references`.

Rows are appended to `benchmarks/rows/references.jsonl`; what stands there is not measured again, so that the command
can be stopped at any time. `--datasets`, `--methods`, `--variants` and `--seeds` take a part, `--set frontier=10`
measures RSR with other settings; `--part 0/2` and `--part 1/2`, with OMP_NUM_THREADS=1, share the work. At the end the
tables of `docs/references.md` are printed (`benchmarks/parts/reference_tables.py`).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from benchmarks.parts.reference_tables import tables
from evaluation.evaluate import commit, machine
from evaluation.intervals import betting
from evaluation.reference.method import Task
from evaluation.reference.objective import AnswerLoss
from evaluation.reference.trainer import Reference, load_reference, training_examples
from evaluation.tv import tv_distance, with_other
from icl_compiler.compile import load_tokenizer
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.models import locate
from icl_compiler.templates import EncodedTemplate

ROWS = Path(__file__).parent / "rows" / "references.jsonl"
ANSWERS = Path("bench-references")
DATASETS = ("banking77", "subj", "clinc150_oos", "mr")
EPOCHS = {"banking77": 3, "clinc150_oos": 3, "subj": 2, "mr": 2}
SEARCHED = {"banking77": "banking77", "clinc150_oos": "banking77", "subj": "subj", "mr": "subj"}
RATES = {
    "rsr": (5e-3, 1e-2, 2e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
    "shira": (1e-3, 3e-3, 1e-2),
    "loreft": (1e-3, 3e-3, 1e-2),
    "head": (1.0,),  # it has none
}
EVERY_PART = {"importance": "agreement", "replaced": "0.3", "trails": "true"}
ABLATIONS: dict[str, dict[str, str]] = {
    "every part": EVERY_PART,
    "no line search, no adaptive rate": EVERY_PART | {"line_search": "false"},
    "fixed rate": EVERY_PART | {"adaptive_rate": "false"},
    "fixed units": EVERY_PART | {"replaced": "0"},
    "no trails": EVERY_PART | {"trails": "false"},
    "random units": EVERY_PART | {"importance": "random"},
    "random units, fixed, no trails": {},  # the defaults
    "random whole rows, fixed, no trails": {"unit": "576"},
    "random single entries, fixed, no trails": {"unit": "1"},
    "important units, fixed, no trails": {"importance": "agreement", "replaced": "0", "trails": "false"},
    "all above the frontier": EVERY_PART | {"budget": "0.26", "unit": "576"},
    "four modules": EVERY_PART | {"modules": "4"},
    "one-sided sampling": EVERY_PART | {"sampling": "0.3"},
    "one round": EVERY_PART | {"rounds": "1"},
    "no pre-training": EVERY_PART,
    "all layers": EVERY_PART | {"frontier": "0"},
    "units keep what they learned": EVERY_PART | {"revert": "false"},
    "half of the budget": EVERY_PART | {"budget": "0.01"},
    "Fisher importance": EVERY_PART | {"importance": "fisher"},
    "top units": EVERY_PART | {"allocation": "top"},
    "the best of each matrix": EVERY_PART | {"allocation": "matrix"},
    "whole rows": EVERY_PART | {"unit": "576"},
    "single entries": EVERY_PART | {"unit": "1"},
    "the upper two thirds": EVERY_PART | {"frontier": "10"},
    "six rounds": EVERY_PART | {"rounds": "6"},
}
OWN_RATES = {"all above the frontier": 3e-4}  # full fine-tuning's: at RSR's the loss rises
WORKERS = {
    "one worker": {},
    "two, each with half of a batch": {"workers": "2"},
    "two, apart": {"workers": "2", "schedule": "local"},
    "two, a module each": {"workers": "2", "schedule": "modules", "modules": "2"},
}
TEST_ROWS, SEARCH_ROWS, MAIN_ROWS, ABLATION_ROWS, WORKERS_ROWS, CASCADE_ROWS = 400, 600, 2222, 800, 1111, 1111
CASCADED = ("banking77", "subj")


class Cell(NamedTuple):
    """One training."""

    stage: str
    dataset: str
    method: str
    variant: str
    settings: tuple[tuple[str, str], ...]
    rate: float
    seed: int
    rows: int
    epochs: int

    @property
    def key(self) -> list[object]:
        """What tells it from all others."""
        return [self.stage, self.dataset, self.method, self.variant, self.rate, self.seed, self.rows, self.epochs]


def cells(stages: list[str], datasets: list[str], given: float | None = None) -> Iterator[Cell]:
    """What is to be measured; the learning rates of later stages are `given`, or those found so far."""
    if "search" in stages:
        for name in sorted({SEARCHED[name] for name in datasets}):
            for method, rates in RATES.items():
                for rate in rates if len(rates) > 1 else ():
                    yield Cell("search", name, method, "", (), rate, 100, SEARCH_ROWS, 2)
    if "main" in stages:
        for seed in range(3):
            for name in datasets:
                for method in RATES:
                    if known := given or found_rate(method, name):
                        yield Cell("main", name, method, "", (), known, seed, MAIN_ROWS, EPOCHS[name])
    if "ablation" in stages:
        for seed in range(3):
            for name in sorted({"banking77", "subj"} & set(datasets)):
                for variant, settings in ABLATIONS.items():
                    if known := given or found_rate("rsr", name):
                        told, rate = tuple(settings.items()), OWN_RATES.get(variant, known)
                        yield Cell("ablation", name, "rsr", variant, told, rate, seed, ABLATION_ROWS, EPOCHS[name])

    if "workers" in stages:
        for variant, settings in WORKERS.items():
            if known := given or found_rate("rsr", "banking77"):
                told = tuple(settings.items())
                yield Cell("workers", "banking77", "rsr", variant, told, known, 0, WORKERS_ROWS, EPOCHS["banking77"])


def found_rate(method: str, dataset: str) -> float | None:
    """The learning rate with the lowest held-out loss; `None` while it is not known."""
    if len(RATES[method]) == 1:
        return RATES[method][0]
    losses = {
        row["rate"]: row["held_out_loss"]
        for row in rows_of(ROWS)
        if (row["stage"], row["dataset"], row["method"], row["variant"]) == ("search", SEARCHED[dataset], method, "")
    }
    return min(losses, key=lambda rate: losses[rate]) if set(RATES[method]) <= set(losses) else None


def measure(cell: Cell, data: Path) -> Row:
    """Train, and ask the reference about test rows (not while learning rates are searched)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "reference"
        command = [str(Path(sys.executable).with_name("icl")), "finetune", str(data / cell.dataset / "train.jsonl")]
        command += ["-o", str(folder), "--method", cell.method, "--learning-rate", str(cell.rate)]
        command += ["--seed", str(cell.seed), "--examples", str(cell.rows), "--epochs", str(cell.epochs)]
        command += [part for name, value in cell.settings for part in ("--set", f"{name}={value}")]
        if cell.stage == "ablation":
            command += ["--held-out", "0.25"]
        if cell.variant == "no pre-training":
            command += ["--model", str(untrained(Path(scratch) / "untrained", cell.seed))]
        print("$", " ".join(command[1:]), flush=True)
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"it ended with {os.waitstatus_to_exitcode(status)}")
        reference = load_reference(folder)
        best = min(reference.curve, key=lambda check: check.held_out_loss)
        row: Row = dict(zip(Cell._fields, cell, strict=True)) | {
            "settings": dict(cell.settings),
            "trained_parameters": json.loads((folder / "manifest.json").read_text())["trained_parameters"],
            "held_out_loss": best.held_out_loss,
            "seconds_to_best": best.seconds,
            "seconds": reference.curve[-1].seconds,
            "wall_seconds": time.perf_counter() - started,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_mib": used.ru_maxrss / 1024,
            "artefact_mb": sum(file.stat().st_size for file in learned(folder)) / 1e6,
            "curve": [tuple(check) for check in reference.curve],
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "machine": machine(),
            "commit": commit(),
        }
        if cell.stage == "ablation":
            row |= answer_losses(cell, reference, data)
        elif cell.stage != "search":
            row |= ask(cell, reference, data)
    return row


def untrained(folder: Path, seed: int) -> Path:
    """The default model as it was before it had seen a text: its shape and tokenizer, and random weights."""
    location = locate("smollm2-135m")
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(location)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(location).save_pretrained(folder)
    return folder


def learned(folder: Path) -> list[Path]:
    """What a method left, without what every reference has: tokenizer, template, manifest."""
    return [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin") or "adapter" in file.name]


def test_rows(dataset: str, data: Path) -> Dataset:
    """The rows that every reference is asked about."""
    test = load_dataset(str(data / dataset / "test.jsonl"))
    rows = np.sort(np.random.default_rng(0).permutation(len(test))[:TEST_ROWS])
    return test.take(rows.tolist())


def answer_losses(cell: Cell, reference: Reference, data: Path) -> Row:
    """The negative log-likelihood of each test row's answer among all texts, as training counts it, in nats."""
    tokenizer = load_tokenizer(reference.base_model)
    encoded = EncodedTemplate.build(reference.template, tokenizer, reference.labels)
    examples = training_examples(encoded, test_rows(cell.dataset, data))
    loss = AnswerLoss(reference.network(), (), examples, bfloat16=Task("", (), ()).bfloat16)
    with torch.no_grad():
        parts = [loss.losses(range(i, min(i + 50, len(examples))), held_out=True) for i in range(0, len(examples), 50)]
    losses = torch.cat(parts)
    return {"test_loss": float(losses.mean()), "test_losses": [round(x, 4) for x in losses.tolist()]}


def ask(cell: Cell, reference: Reference, data: Path) -> Row:
    """How right the reference is; its answers are kept for the floor."""
    test = test_rows(cell.dataset, data)
    said = reference.predictor().predict(test.texts)
    right = [said.labels.index(answer) for answer in test.answers]
    ANSWERS.mkdir(exist_ok=True)
    np.save(answers(cell.key), said.probabilities)
    of_right = said.probabilities[range(len(right)), right]
    return {
        "accuracy": float((said.best == right).mean()),
        "nll": float(-np.log(np.maximum(of_right, 1e-12)).mean()),
        "test_rows": len(right),
    }


def floors(method: str, dataset: str) -> Iterator[Row]:
    """The TV between two seeds of a method, where the answers of both lie here, and its 95 % interval."""
    known = [row["key"] for row in rows_of(ROWS)]
    cells: dict[tuple[object, ...], list[Row]] = {}
    for row in rows_of(ROWS):
        if (row["stage"], row["dataset"], row["method"]) == ("main", dataset, method) and answers(row["key"]).exists():
            cells.setdefault((row["variant"], row["rate"]), []).append(row)
    for (variant, rate), rows in cells.items():
        for one, other in itertools.combinations(sorted(rows, key=lambda row: int(row["seed"])), 2):
            key = ["floor", dataset, method, variant, rate, [one["seed"], other["seed"]]]
            if key in known:
                continue
            tv = tv_distance(*(with_other(np.load(answers(row["key"]))) for row in (one, other)))
            yield {
                "key": key,
                "stage": "floor",
                "dataset": dataset,
                "method": method,
                "variant": variant,
                "rate": rate,
                "seed": key[-1],
                "tv": float(tv.mean()),
                "interval": list(betting(tv)),
                "test_rows": len(tv),
                "commits": [one["commit"], other["commit"]],
            }


def answers(key: list[object]) -> Path:
    """Where the probabilities are kept that a reference gave the test rows."""
    return ANSWERS / f"{'-'.join(map(str, key)).replace(' ', '_')}.npy"


def cascade(dataset: str, data: Path) -> Iterator[Row]:
    """Three generations on a dataset, a row for each model that was measured."""
    ANSWERS.mkdir(exist_ok=True)
    folder, test = ANSWERS / f"cascade-{dataset}", ANSWERS / f"{dataset}-test.jsonl"
    asked = test_rows(dataset, data)
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(asked.texts, asked.answers, strict=True)]
    test.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("icl")), "cascade", str(data / dataset / "train.jsonl")]
    command += ["--test", str(test), "-o", str(folder), "--examples", str(CASCADE_ROWS), "--tolerance", "1000"]
    command += ["--epochs", str(EPOCHS[dataset]), "--healing-epochs", str(EPOCHS[dataset])]
    print("$", " ".join(command[1:]), flush=True)
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"it ended with {status}")
    for row in rows_of(folder / "rows.jsonl"):
        yield {
            "key": ["cascade", dataset, row["generation"]],
            "stage": "cascade",
            "dataset": dataset,
            "method": "rsr",
            "variant": "",
            **row,
            "data": dataset,  # not where it lies
            "rows": CASCADE_ROWS,
            "epochs": EPOCHS[dataset],
            "machine": machine(),
            "commit": commit(),
        }


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", choices=("search", "main", "ablation", "workers", "cascade"), default=["search", "main"]
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="not of the search, which has its own")
    parser.add_argument("--rate", type=float, help="learning rate, in place of the one that the search found")
    parser.add_argument("--set", nargs="+", default=[], help="settings of RSR in the stage main, NAME=VALUE: a variant")
    parser.add_argument("--variants", nargs="+", choices=[*ABLATIONS, *WORKERS], help="of ablation and workers")
    parser.add_argument("--part", default="0/1")
    asked = parser.parse_args()
    data = data_folder(DATASETS)
    part, parts = map(int, asked.part.split("/"))
    for stage in asked.stages:  # the learning rates of the later ones are known when the first is done
        for number, cell in enumerate(cells([stage], asked.datasets, asked.rate)):
            if asked.variants and stage in ("ablation", "workers") and cell.variant not in asked.variants:
                continue
            if cell.stage == "main" and cell.method == "rsr" and asked.set:
                told = tuple((name, value) for name, _, value in (each.partition("=") for each in asked.set))
                cell = cell._replace(variant=" ".join(asked.set), settings=told)
            if cell.method not in asked.methods or (stage != "search" and cell.seed not in asked.seeds):
                continue
            if number % parts != part or json.loads(json.dumps(cell.key)) in [row["key"] for row in rows_of(ROWS)]:
                continue
            row = {"key": cell.key, **measure(cell, data)}
            keep(ROWS, row)
            print({k: row[k] for k in ("held_out_loss", "cpu_seconds", "peak_mib", "accuracy") if k in row}, flush=True)
            if stage == "main":
                keep(ROWS, *floors(cell.method, cell.dataset))
    if "cascade" in asked.stages:
        for dataset in CASCADED:
            if dataset in asked.datasets and not any(r["key"][:2] == ["cascade", dataset] for r in rows_of(ROWS)):
                keep(ROWS, *cascade(dataset, data))
    print(tables(rows_of(ROWS)))


if __name__ == "__main__":
    main()
