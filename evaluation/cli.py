"""`icl`: the commands of the evaluator."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluation.reference_cli import training_bar
from icl_compiler.command_line import (
    FiniteNumber,
    OutputFile,
    OutputFolder,
    WholeNumber,
    engine_options,
    json_option,
    print_json,
    progress_bar,
    say,
    seed_option,
)
from icl_compiler.data_options import Columns, column_options

if TYPE_CHECKING:
    from evaluation.evaluate import Answers, Evaluation, ProgressFor
    from evaluation.measurement import Row
    from evaluation.reference.trainer import Reference
    from icl_compiler.backends.backend import Backend
    from icl_compiler.data import Dataset
    from icl_compiler.program import Program

REPORT_TITLE = "Prompt or fine-tune?"


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    "references",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    multiple=True,
    required=True,
    help="Folder that `icl finetune` wrote. Give a second one, trained with another seed, to measure the floor.",
)
@click.option("--data", required=True, metavar="DATA", help="Labelled test data, of any kind that `icl compile` reads.")
@click.option("-o", "--output", type=OutputFile(), help="Write the report here, as one HTML file.")
@click.option("--rows", type=OutputFile(), help="Append the results to this file, one JSON object a line.")
@click.option("--per-query", type=OutputFile(), help="Append what each query showed to this file, for `icl compare`.")
@click.option("--queries", type=WholeNumber(min=1), show_default="all", help="Test rows to ask, drawn at random.")
@click.option(
    "--epsilon",
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Ask query after query, --queries at most, and stop once it is decided whether the gap is within this.",
)
@click.option(
    "--examples",
    type=WholeNumber(min=1),
    multiple=True,
    help="Measure also with a pool of only this many rows; may be given several times.",
)
@click.option(
    "--level",
    default=0.95,
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Coverage of the intervals.",
)
@click.option("--baselines/--no-baselines", default=True, help="Measure the baselines too.")
@click.option(
    "--max-new-tokens",
    default=64,
    type=WholeNumber(min=1),
    help="Of a program that generates texts: tokens of an answer that count, at most.",
)
@click.option(
    "--samples",
    default=4,
    type=WholeNumber(min=1),
    help="Of a program that generates texts: answers that each model draws to a query.",
)
@engine_options
@column_options
@seed_option
@json_option
def evaluate(
    program: Path,
    references: tuple[Path, ...],
    data: str,
    output: Path | None,
    rows: Path | None,
    per_query: Path | None,
    queries: int | None,
    epsilon: float | None,
    examples: tuple[int, ...],
    level: float,
    baselines: bool,
    max_new_tokens: int,
    samples: int,
    backend: str | None,
    server: str | None,
    in_flight: int | None,
    dtype: str,
    columns: Columns,
    seed: int,
    as_json: bool,
) -> None:
    """Measure how far PROGRAM is from a fine-tuned reference.

    The gap is the total variation between their answers to the test texts, with an interval: 0 where they answer
    alike, 1 where they never do. Beside it stand the baselines: zero shots, random shots, shuffled labels (what the
    labels are worth), the vote of the neighbours without a language model, the floor (two references, two seeds)
    and the noise of scoring the same program again, in other batches and in float32. Where the program was compiled
    from some of the test texts, these are left out of its pool. Of a program that generates texts, samples are
    compared.

    \b
      icl evaluate program --reference reference --data test.csv -o report.html
      icl evaluate program --reference reference --reference reference-1 \\
          --data test.csv --queries 200 --examples 100 --examples 1000
      icl evaluate program --reference reference --data test.csv --epsilon 0.1
    """
    from evaluation.asking import in_random_order
    from evaluation.evaluate import BASELINES, ask_references, texts_learned_from
    from evaluation.generation import require_comparable_texts
    from evaluation.generation_cli import measure_texts
    from evaluation.reference.trainer import load_reference
    from evaluation.sequential_cli import measure_until_decided
    from evaluation.texts import Lengths
    from icl_compiler.artifact import load_program
    from icl_compiler.predictor import open_backend

    if output is not None and output.exists() and not output.is_file():
        raise click.UsageError(f"{output} is a device or a pipe; expected the name of a file for the report")
    loaded = load_program(program)
    described = [load_reference(folder) for folder in references]
    dataset = columns.load(data)
    warnings = list(dataset.warnings)
    writes = loaded.task == "generation"
    dataset = (draw if epsilon is None else in_random_order)(dataset, queries, seed=seed)
    sizes = pool_sizes(loaded, examples)
    warnings += texts_learned_from(described, dataset)
    (require_comparable_texts if writes else require_comparable)(loaded, described, dataset)
    open_engine = partial(open_backend, backend, loaded.settings.model, dtype=dtype, server=server, in_flight=in_flight)
    series = BASELINES if baselines else ()
    with _bars() as progress:
        if writes:
            measured = measure_texts(
                loaded,
                open_engine,
                described,
                dataset,
                sizes,
                lengths=Lengths(samples, max_new_tokens),
                epsilon=epsilon,
                dataset_name=_dataset_name(data),
                level=level,
                series=series,
                dtype=dtype,
                seed=seed,
                progress=progress,
            )
        elif epsilon is None:
            answers = ask_references(described, dataset, dtype=dtype, progress=progress)
            measured = measure_sizes(
                loaded,
                open_engine(),
                answers,
                dataset,
                sizes,
                dataset_name=_dataset_name(data),
                level=level,
                series=series,
                progress=progress,
            )
        else:
            measured = measure_until_decided(
                loaded,
                open_engine(),
                described,
                dataset,
                sizes,
                epsilon=epsilon,
                dataset_name=_dataset_name(data),
                level=level,
                series=series,
                dtype=dtype,
                progress=progress,
            )
        results, unwritten = kept(measured, rows, per_query)
    warnings += [warning for result in results for warning in result.warnings]
    if len(references) == 1 and baselines:
        warnings.append("the floor was not measured: give a second --reference, trained with another --seed")
    command = click.get_current_context().command_path
    arguments = _arguments(program, references, data, queries, epsilon, examples, seed)
    arguments += f" --max-new-tokens {max_new_tokens} --samples {samples}" if writes else ""
    finish(results, output, warnings, [f"{command} {arguments}"], as_json=as_json, unwritten=unwritten)


@click.command()
@click.option("-o", "--output", type=OutputFolder(), default="demo", help="Folder to write.")
@click.option("--queries", default=100, type=WholeNumber(min=2), help="Test messages to ask.")
@click.option(
    "--train",
    "n_train",
    default=480,
    type=WholeNumber(min=64),
    help="Messages to fine-tune on, and the most that the program gets.",
)
@seed_option
@json_option
def demo(output: Path, queries: int, n_train: int, seed: int, as_json: bool) -> None:
    """See the whole idea on small models, in about 6 minutes.

    Customer messages, made by code, are compiled into prompts for a frozen SmolLM2-135M; the same model is
    fine-tuned on them, twice; the gap between the two is measured for several numbers of examples. Needs two
    cores and no network. Started again, it keeps what is trained.

    \b
      icl demo
      icl demo -o quick --queries 20 --train 64
    """
    from evaluation.evaluate import BASELINES, ask_references
    from icl_compiler.artifact import save_program
    from icl_compiler.compile import compile_program
    from icl_compiler.data import load_dataset
    from icl_compiler.messages import MAX_MESSAGES, require_messages, train_test, write_jsonl
    from icl_compiler.predictor import open_backend

    if queries + n_train > MAX_MESSAGES:
        raise click.UsageError(
            f"--queries and --train ask for {queries + n_train:,} messages; there are {MAX_MESSAGES:,} distinct ones"
        )
    started = time.perf_counter()
    if output.is_dir() and any(output.iterdir()) and not (output / "train.jsonl").exists():
        raise click.UsageError(f"{output} holds other things than a demo; choose another folder")
    for name in ("train.jsonl", "test.jsonl"):
        require_messages(output / name)
    train, test = train_test(n_train, queries, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(train, output / "train.jsonl")
    write_jsonl(test, output / "test.jsonl")
    pool, asked = load_dataset(output / "train.jsonl"), load_dataset(output / "test.jsonl")
    say(f"1/4  {n_train} customer messages in 16 intents to learn from, {len(asked)} to ask: {output}/*.jsonl")
    program = compile_program(pool, shots=8, budget=768, seed=seed)
    save_program(program, output / "program")
    say(f"2/4  compiled into a program for the frozen {program.settings.model}: {output}/program")
    say("3/4  fine-tuning the same model on the same messages, with two seeds (about 2 minutes each)")
    references = [_demo_reference(pool, output / f"reference-{seed + i}", seed + i) for i in range(2)]
    say("4/4  measuring the gap between the two (about 3 minutes)")
    with _bars() as progress:
        answers = ask_references(references, asked, progress=progress)
        engine = open_backend("transformers", program.settings.model)
        sizes = [n for n in (32, 128) if n < len(pool)] + [len(pool)]
        measured = measure_sizes(
            program,
            engine,
            answers,
            asked,
            sizes,
            dataset_name="customer messages",
            level=0.95,
            series=BASELINES,
            progress=progress,
        )
        rows = output / "rows.jsonl"
        rows.unlink(missing_ok=True)
        results, unwritten = kept(measured, rows)
    warnings = [warning for result in results for warning in result.warnings]
    command = f"icl demo --queries {queries} --train {n_train} --seed {seed}"
    finish(results, output / "report.html", warnings, [command], as_json=as_json, unwritten=unwritten)
    say(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Open {output}/report.html in a browser.")


def measure_sizes(
    program: "Program",
    engine: "Backend",
    answers: "Answers",
    data: "Dataset",
    sizes: Sequence[int],
    *,
    dataset_name: str,
    level: float,
    series: Sequence[str],
    progress: "ProgressFor",
) -> "Iterator[Evaluation]":
    """Evaluate the program with pools of several sizes; all baselines with the largest, the vote with every one."""
    from evaluation.evaluate import evaluate as evaluate_program
    from evaluation.evaluate import with_examples
    from evaluation.float32 import float32_opener

    for size in sizes:
        largest = size == max(sizes)
        yield evaluate_program(
            with_examples(program, size),
            engine,
            answers,
            data,
            dataset_name=dataset_name,
            level=level,
            series=series if largest else [name for name in series if name == "neighbours' vote"],
            float32_backend=float32_opener(engine, program.settings.model),
            progress=progress,
        )


def kept(
    measured: "Iterable[Evaluation]", rows_file: Path | None, per_query_file: Path | None = None
) -> "tuple[list[Evaluation], OSError | None]":
    """All that is measured, each appended to the files as soon as it is known; and why that failed, if it did."""
    results: list[Evaluation] = []
    unwritten = None
    for found in measured:
        results.append(found)
        try:
            _append(rows_file, found.rows)
            _append(per_query_file, found.per_query)
        except OSError as error:
            unwritten = error
    return results, unwritten


def finish(
    results: "Sequence[Evaluation]",
    output: Path | None,
    warnings: Sequence[str],
    commands: Sequence[str],
    *,
    as_json: bool = False,
    unwritten: OSError | None = None,
) -> None:
    """Print the results, then write the report; if rows could not be written, that is said once they are printed."""
    from evaluation.report import write_report
    from evaluation.sentences import verdict_sentence
    from evaluation.summary import summary_lines
    from evaluation.tables import PER_QUERY

    rows = [row for result in results for row in result.rows]
    for warning in warnings:
        say(f"Warning: {warning}")
    if as_json:
        printed = [{name: value for name, value in row.items() if name not in PER_QUERY} for row in rows]
        print_json({"rows": printed, "verdict": verdict_sentence(rows), "warnings": list(warnings)})
    else:
        for line in [*summary_lines(rows), "", *verdict_sentence(rows)]:
            click.echo(line)
    if unwritten is not None:
        raise unwritten
    if output is not None:
        worst = results[-1].worst
        write_report(output, rows, worst=worst, commands=commands, warnings=warnings, title=REPORT_TITLE)
        if not as_json:
            click.echo(f"\nReport: {output}")


def _append(path: Path | None, lines: "Sequence[Row]") -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def require_comparable(program: "Program", references: "Sequence[Reference]", data: "Dataset") -> None:
    """Find out before the models run, rather than after, what would end the evaluation.

    Raises:
        EvaluationError: if the labels of program, references and data differ.
        BudgetError: if a text is too long for the program.
        DataError: if all rows of the program's pool are test data.
    """
    from evaluation.gap import require_known
    from evaluation.reference.trainer import same_labels
    from icl_compiler.compile import without_rows
    from icl_compiler.errors import EvaluationError

    for reference in references:
        if difference := same_labels(program.labels, reference.labels):
            difference = difference.replace("the first", "the program").replace("the second", "the reference")
            raise EvaluationError(
                f"the program and the reference {reference.folder} have other labels: {difference}; "
                "compile and fine-tune on the same data"
            )
    require_known(program.labels, data.answers)
    program.prompt_sets(data.texts)
    without_rows(program, data.texts)


def draw(data: "Dataset", queries: int | None, *, seed: int) -> "Dataset":
    """`queries` rows drawn uniformly without replacement, in file order; the intervals are about such a draw.

    Raises:
        DataError: if there are fewer rows.
    """
    import numpy as np

    from evaluation.formatting import counted
    from icl_compiler.errors import DataError

    if queries is None:
        return data
    if queries > len(data):
        raise DataError(f"--queries {queries} exceeds the {counted(len(data), 'row')} of the test data")
    rows = np.random.default_rng(seed).choice(len(data), size=queries, replace=False)
    return data.take(sorted(rows.tolist()))


def pool_sizes(program: "Program", examples: Sequence[int]) -> list[int]:
    """The pool sizes to measure, ascending, the program's own last.

    Raises:
        DataError: if one is larger than the program's pool.
    """
    from evaluation.formatting import counted
    from icl_compiler.errors import DataError

    largest = len(program.pool.data)
    if examples and max(examples) > largest:
        raise DataError(f"--examples {max(examples)} exceeds the {counted(largest, 'row')} of the program's pool")
    return sorted({*examples, largest})


def _demo_reference(pool: "Dataset", folder: Path, seed: int) -> "Reference":
    from evaluation.reference.loop import LoopSettings
    from evaluation.reference.rsr.rsr import RSR
    from evaluation.reference.trainer import finetune as train_reference
    from evaluation.reference.trainer import load_reference
    from icl_compiler.artifact import require_replaceable
    from icl_compiler.errors import ArtifactError

    if folder.exists():
        try:
            kept = load_reference(folder)
            if kept.data_hash == pool.content_hash and kept.seed == seed:
                say(f"     {folder} is trained on the same messages already")
                return kept
        except ArtifactError:
            require_replaceable(folder, kind="reference")
            say(f"     {folder} is damaged and is trained again")
    method = RSR()
    settings = LoopSettings(epochs=4, learning_rate=method.learning_rate, seed=seed)
    with training_bar(f"seed {seed}") as report:
        reference = train_reference(pool, folder, method=method, settings=settings, report=report)
    best = min(check.held_out_loss for check in reference.curve)
    say(f"     {folder}: {reference.method}, held-out loss {best:.3f}, {reference.curve[-1].seconds:.0f} s")
    return reference


@contextmanager
def _bars() -> "Iterator[ProgressFor]":
    """One bar per series; the last one is closed when the next one begins."""
    with ExitStack() as stack:

        def begin(name: str, total: int) -> Any:
            stack.close()
            return stack.enter_context(progress_bar(name, total, "text"))

        yield begin


def _dataset_name(source: str) -> str:
    path = Path(source)
    if path.stem in {"test", "dev", "valid", "validation", "train", "eval"} and path.resolve().parent.name:
        return path.resolve().parent.name
    return path.stem or source


def _arguments(
    program: Path,
    references: Sequence[Path],
    data: str,
    queries: int | None,
    epsilon: float | None,
    examples: Sequence[int],
    seed: int,
) -> str:
    import shlex

    parts = [str(program)]
    parts += [part for folder in references for part in ("--reference", str(folder))]
    parts += ["--data", data]
    parts += ["--queries", str(queries)] if queries is not None else []
    parts += ["--epsilon", str(epsilon)] if epsilon is not None else []
    parts += [part for n in examples for part in ("--examples", str(n))]
    parts += ["--seed", str(seed)]
    return shlex.join(parts)
