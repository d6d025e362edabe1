"""The main job on four real datasets, by the commands a user would type; about an hour on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks main_job

For each dataset: a program and two references (two seeds) are made from the same 1,200 labelled rows, 120 of which
the references hold out; the gap is measured on 200 test rows drawn at random. Rows are appended to
`benchmarks/rows/main_job.jsonl`, one object a line; a dataset that stands there is not measured again. At the end the
table of `docs/results.md` is printed.
"""

import subprocess
from pathlib import Path

from benchmarks.parts.kept import data_folder, rows_of

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "main_job.jsonl"
DATASETS = {"banking77": 3, "mr": 2, "subj": 2, "clinc150_oos": 3}
"""Each dataset with its epochs of fine-tuning: two labels are learned in fewer than 77."""
WORK = Path("bench-main-job")
COLUMNS = (
    "dataset", "series", "gap", "accuracy", "reference accuracy", "agreement", "ECE", "label mass", "tokens/query",
    "s/query",
)  # fmt: skip


def commands(data: Path, name: str) -> list[list[str]]:
    train, test, work = str(data / name / "train.jsonl"), str(data / name / "test.jsonl"), WORK / name
    finetune = ["icl", "finetune", train, "--examples", "1200", "--method", "full", "--first-layer", "20"]
    finetune += ["--learning-rate", "3e-4", "--epochs", str(DATASETS[name])]
    references = [work / f"reference-{seed}" for seed in (0, 1)]
    return [
        ["icl", "compile", train, "-o", str(work / "program"), "--examples", "1200"],
        *([*finetune, "--seed", str(seed), "-o", str(folder)] for seed, folder in enumerate(references)),
        ["icl", "evaluate", str(work / "program"), "--data", test, "--queries", "200", "-o", str(work / "report.html")]
        + [part for folder in references for part in ("--reference", str(folder))]
        + ["--rows", str(ROWS)],
    ]


def table(rows: list[dict[str, object]]) -> str:
    def cell(row: dict[str, object], column: str) -> str:
        if column == "gap":
            return f"{row['gap']:.3f} [{row['gap_low']:.3f}, {row['gap_high']:.3f}]"
        keys = {"ECE": "ece", "label mass": "label_mass", "reference accuracy": "reference_accuracy"}
        keys |= {"tokens/query": "computed_tokens_per_query", "s/query": "seconds_per_query"}
        value = row.get(keys.get(column, column))
        if isinstance(value, float):
            return f"{value:.0f}" if column == "tokens/query" else f"{value:.2f}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row, column) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    data = data_folder(DATASETS)
    ROWS.parent.mkdir(exist_ok=True)
    for name in DATASETS:
        if any(row["dataset"] == name for row in rows_of(ROWS)):
            continue
        (WORK / name).mkdir(parents=True, exist_ok=True)
        for command in commands(data, name):
            output = Path(command[command.index("-o") + 1])
            if command[1] != "evaluate" and output.is_dir():
                continue
            print("$", " ".join(command), flush=True)
            subprocess.run(command, check=True)
    print(table(rows_of(ROWS)))


if __name__ == "__main__":
    main()
