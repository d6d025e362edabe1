"""`icl sweep` and `icl report`: many measurements from one description, and the page made of rows."""

import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluation.reference_cli import method_settings, training_bar
from icl_compiler.command_line import (
    FiniteNumber,
    OutputFile,
    OutputFolder,
    TableName,
    WholeNumber,
    engine_options,
    json_option,
    print_json,
    say,
)
from icl_compiler.registry import CALIBRATIONS, METHODS, RETRIEVERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evaluation.sweep_plan import Job, Plan, ReferenceJob
    from evaluation.sweep_spec import SweepSpec
    from evaluation.tables import Kind

TITLE = "How close does a prompt get to fine-tuning?"
TOKENS_PER_S = 1000
"""What a model of 135 million parameters computes on two cores, where no row says what this machine does."""


class _NumberOr(click.ParamType[str]):
    """A whole number from 1 on, or a word."""

    name = "number"

    def __init__(self, word: str) -> None:
        self._word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it was typed; the description of the sweep is checked as one."""
        if str(value) != self._word and not (str(value).isdecimal() and int(value) > 0):
            self.fail(f"expected a whole number from 1 on, or {self._word!r}, not {value!r}.", param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As it stands in the help."""
        return f"N|{self._word}"


@click.command()
@click.argument("dataset", nargs=-1, required=True, metavar="SWEEP.yaml | DATASET...")
@click.option(
    "-o", "--output", type=OutputFolder(), required=True, help="Folder of the rows, the references, the report."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder that paths of datasets start from.",
    show_default="here",
)
@click.option(
    "--size",
    "sizes",
    type=_NumberOr("all"),
    multiple=True,
    show_default="16 64 256 all",
    help="Examples in the pool; may be given several times, as all below.",
)
@click.option(
    "--budget",
    "budgets",
    type=WholeNumber(min=1),
    multiple=True,
    show_default="1024",
    help="Context length: most tokens of a prompt.",
)
@click.option(
    "--shots",
    type=_NumberOr("fit"),
    multiple=True,
    show_default="fit",
    help="Most shots in a prompt; fit: as the budget takes.",
)
@click.option(
    "-O",
    "levels",
    multiple=True,
    metavar="LEVEL",
    show_default="1",
    help="How hard to look for good prompts, as of `icl compile`.",
)
@click.option(
    "--search-queries",
    type=WholeNumber(min=1),
    show_default="the level's own",
    help="Most prompts that the search of one cell asks (-O2 and up).",
)
@click.option(
    "--retriever",
    "retrievers",
    type=TableName("retriever", RETRIEVERS, paths=True),
    metavar="NAME",
    multiple=True,
    show_default="the level's own, or as a search finds",
    help="How shots are found.",
)
@click.option(
    "--calibration",
    "calibrations",
    type=TableName("calibration", {"auto": "", **CALIBRATIONS}),
    metavar="NAME",
    multiple=True,
    show_default="none; auto from -O2 on",
    help="Of the prompt's probabilities: none, auto, or a method.",
)
@click.option(
    "--seed",
    "seeds",
    type=WholeNumber(0, 2**32 - 1),
    multiple=True,
    show_default="0",
    help="Of the examples drawn, and of the reference.",
)
@click.option("--queries", type=_NumberOr("all"), show_default="all", help="Test rows to ask, drawn at random.")
@click.option(
    "--reference",
    "references",
    metavar="FOLDER",
    multiple=True,
    help="A reference that is trained already, and one for the floor.",
)
@click.option(
    "--method",
    type=TableName("method", METHODS),
    metavar="NAME",
    show_default="rsr",
    help="How references are trained, as of `icl finetune`.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method, such as budget=0.02."
)
@click.option("--epochs", type=WholeNumber(min=1), show_default="4", help="Most passes of a training.")
@click.option(
    "--reference-on",
    type=click.Choice(["all", "n"]),
    metavar="all|n",
    show_default="all",
    help="Train references on all rows, or on those of the prompt.",
)
@click.option("--no-baselines", is_flag=True, help="Measure the prompt only.")
@click.option("--model", metavar="NAME", show_default="smollm2-135m", help="Language model, as of `icl compile`.")
@click.option(
    "--level",
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    show_default="0.95",
    help="Coverage of the intervals.",
)
@click.option(
    "--epsilon",
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Largest gap that is good enough, for the verdicts.",
)
@click.option(
    "--rows-of",
    metavar="VERSION",
    show_default="this one",
    help="Go on with the rows that this version of icl-compiler measured, as if nothing had changed since.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and what it would cost.")
@click.option(
    "--engine",
    type=click.Choice(["process", "ray"]),
    default="process",
    metavar="NAME",
    help="Where it runs: in this process, or on a Ray cluster.",
)
@engine_options
@json_option
def sweep(
    dataset: tuple[str, ...],
    output: Path,
    data: Path,
    references: tuple[str, ...],
    method: str | None,
    settings: tuple[str, ...],
    epochs: int | None,
    no_baselines: bool,
    epsilon: float,
    dry_run: bool,
    engine: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the gap over dataset sizes and context lengths.

    What to measure stands in a YAML file, or is named here; an option takes the place of what the file says. A
    DATASET is a folder with a train and a test file, or hf:NAME. References are trained on its training data,
    once for each seed and method; every prompt is compared with the reference of its seed, beside zero shots,
    random shots, the vote of the neighbours, and the floor.

    Rows are appended to rows.jsonl in the output folder. Killed at any moment, the same command goes on where it
    was; at the end it writes report.html. `icl decide` judges the rows.

    \b
      icl sweep sweep.yaml -o sweep --dry-run
      icl sweep banking77 mr -o sweep --size 16 --size 256 --size all \\
          --budget 512 --budget 2048 --queries 200
      icl sweep mr -o levels -O0 -O1 -O2 --size 64 --size 256 --dry-run
    """
    from evaluation.sweep import in_process, run
    from evaluation.sweep_plan import load, plan

    spec = _spec(dataset, data, _changes(references, method, settings, epochs, no_baselines, given))
    loaded = {each.name: load(spec, each) for each in spec.datasets}
    planned = plan(spec, loaded)
    others = [] if spec.rows_of else _of_other_versions(output, planned)
    for warning in [*planned.warnings, *others]:
        say(f"Warning: {warning}")
    if dry_run:
        _tell(spec, loaded, planned, output, as_json=as_json)
        return
    if engine == "ray":
        from evaluation.sweep_ray import on_cluster

        how = on_cluster()
    else:
        how = in_process(_training)
    rows = run(spec, output, planned, engine=how, notify=_notify)
    _finish(rows, output, planned, epsilon, as_json=as_json)


def _spec(what: tuple[str, ...], data: Path, changes: dict[str, object]) -> "SweepSpec":
    from evaluation.sweep_spec import SweepSpec

    if what[0].endswith((".yaml", ".yml")):
        if len(what) > 1:
            raise click.UsageError("give one YAML file, or datasets, not both")
        return SweepSpec.from_yaml(Path(what[0]), changes, root=data)
    return SweepSpec.from_mapping({"datasets": list(what), **changes}, root=data)


def _changes(
    references: tuple[str, ...],
    method: str | None,
    settings: tuple[str, ...],
    epochs: int | None,
    no_baselines: bool,
    given: dict[str, Any],
) -> dict[str, object]:
    """The options that were given, as keys of a sweep."""
    from evaluation.sweep_spec import ReferenceSpec

    changes: dict[str, object] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value not in (None, ()) and not (key == "dtype" and value == "auto")
    }
    if references:
        if method or settings or epochs:
            raise click.UsageError("--reference names what is trained; leave out --method, --set and --epochs")
        changes["references"] = [{"folder": folder} for folder in references]
    elif method or settings or epochs:
        chosen = method or ReferenceSpec.method
        how: dict[str, object] = {"method": chosen, "settings": method_settings(chosen, settings)}
        changes["references"] = [how | ({"epochs": epochs} if epochs else {})]
    if no_baselines:
        changes["baselines"] = []
    return changes


def _of_other_versions(output: Path, planned: "Plan") -> list[str]:
    """What there is to say of rows that another version of this package has measured: it does not go on with them."""
    from importlib.metadata import version

    from evaluation.formatting import counted, joined
    from evaluation.row_file import read_rows

    own, rows = version("icl-compiler"), read_rows(output / "rows.jsonl")
    other = [row for row in rows if row.get("version", own) != own]
    if not other or planned.keys <= {row["key"] for row in rows}:
        return []
    versions = joined(sorted({str(row["version"]) for row in other}))
    return [
        f"{output / 'rows.jsonl'} holds {counted(len(other), 'row')} of version {versions}, and this is {own}: what is "
        "there stays, and every cell is measured anew; go on with it (--rows-of), or begin another folder (-o)"
    ]


@contextmanager
def _training(job: "ReferenceJob") -> "Iterator[Any]":
    say(f"training the reference {job.name}")
    with training_bar(job.name) as report:
        yield report


def _notify(what: str, done: int, of: int) -> None:
    say(f"{done:>5} of {of} rows: {what}")


def _tell(spec: "SweepSpec", loaded: Any, planned: "Plan", output: Path, *, as_json: bool) -> None:
    """The cells and what they cost, without a model."""
    from evaluation.formatting import counted
    from evaluation.row_file import read_rows
    from evaluation.sweep import answers_path, references_of
    from evaluation.sweep_plan import estimate

    rows = read_rows(output / "rows.jsonl")
    jobs = planned.without({str(row["key"]) for row in rows})
    trained = {job.key for job in references_of(jobs) if answers_path(output, job).exists()}
    cost = estimate(spec, loaded, jobs, trained)
    rate = _rate(rows)
    hours = (cost.prompts + cost.training) / (rate or TOKENS_PER_S) / 3600
    if as_json:
        asks = [job.ask._asdict() | {"rows": len(job.rows)} for job in jobs]
        print_json({"rows": len(planned.keys), "to_do": asks, "tokens": cost._asdict(), "hours": hours})
        return
    for line in _table(jobs):
        click.echo(line)
    missing = [job.name for job in references_of(jobs) if job.key not in trained]
    click.echo(f"\n{len(planned.keys)} rows, of which {sum(len(job.rows) for job in jobs)} are to be measured")
    click.echo(f"{counted(len(missing), 'reference')} to train and ask: {', '.join(missing) or 'none'}")
    if searches := sum(job.ask.searches for job in jobs):
        asked = f"{cost.search_prompts:,} prompts at most"
        click.echo(f"{counted(searches, 'search', 'searches')} of the best prompt, which ask {asked}")
    click.echo(f"about {cost.prompts:,.0f} tokens of prompts and {cost.training:,.0f} of training, at most")
    how = "as the rows here were measured" if rate else "as a model of 135 million parameters does on two cores"
    click.echo(f"about {hours:.1f} hours at {rate or TOKENS_PER_S:,.0f} tokens a second, {how}")


def _rate(rows: "list[dict[str, Any]]") -> float | None:
    seconds = sum(row.get("seconds_model", 0.0) for row in rows)
    tokens = sum(
        row["n_queries"] * row.get("computed_tokens_per_query", 0.0) for row in rows if row.get("seconds_model")
    )
    return tokens / seconds if seconds else None


def _table(jobs: "list[Job]") -> list[str]:
    cells = [["dataset", "series", "level", "n", "budget", "shots", "retriever", "calibration", "seed", "rows"]]
    for job in jobs:
        ask = job.ask
        parts = (
            ask.dataset,
            ask.series,
            ask.optimisation,
            ask.n,
            ask.budget,
            ask.shots,
            ask.retriever,
            ask.calibration,
            ask.seed,
            len(job.rows),
        )
        cells.append(["-" if part is None else str(part) for part in parts])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _finish(rows: "list[dict[str, object]]", output: Path, planned: "Plan", epsilon: float, *, as_json: bool) -> None:
    from evaluation.measurement import grouped, measurements
    from evaluation.report import write_report
    from evaluation.sentences import verdict_sentence
    from evaluation.summary import summary_lines
    from evaluation.sweep import worst_of

    heads = [group.head for group in grouped(measurements(rows))]
    chosen = [row for row, head in zip(rows, measurements(rows), strict=True) if head in heads]
    worst = [each for row in chosen for each in worst_of(output, row)]
    command = " ".join(["icl", *map(shlex.quote, sys.argv[1:])])
    page = output / "report.html"
    write_report(page, rows, worst=worst, commands=[command], warnings=planned.warnings, title=TITLE, epsilon=epsilon)
    if as_json:
        print_json({"rows": rows, "warnings": planned.warnings})
        return
    for line in [*summary_lines(rows), "", *verdict_sentence(rows)]:
        click.echo(line)
    click.echo(f"\nReport: {page}")


@click.command()
@click.argument("rows", nargs=-1, required=True)
@click.option("-o", "--output", type=OutputFile(), help="Write the report here, as one HTML file.")
@click.option(
    "--format",
    "table",
    type=click.Choice(["md", "csv", "json"]),
    metavar="md|csv|json",
    help="Print the rows as a table.",
)
@click.option(
    "--epsilon",
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Largest gap that is good enough, for the verdicts.",
)
def report(rows: tuple[str, ...], output: Path | None, table: "Kind | None", epsilon: float) -> None:
    """Make a report, or a table, of the ROWS measured.

    ROWS are files that `icl sweep`, `icl evaluate --rows` or `icl demo` wrote. No model is involved.

    \b
      icl report sweep/rows.jsonl -o report.html
      icl report sweep/rows.jsonl --format csv > rows.csv
    """
    from evaluation.report import write_report
    from evaluation.tables import as_table
    from icl_compiler.errors import DataError

    if output is None and table is None:
        raise click.UsageError("say what to make: -o FILE for the report, or --format for a table")
    found = []
    for name in rows:
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{name}, line {number}: expected a JSON object, one row of measurements") from error
    if table is not None:
        click.echo(as_table(found, table))
    if output is not None:
        command = shlex.join(["icl", "report", *rows, "-o", str(output)])
        write_report(output, found, commands=[command], title=TITLE, epsilon=epsilon)
