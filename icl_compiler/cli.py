"""`icl`: the commands of the compiler. Those of the evaluator stand in `evaluation/cli.py`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from icl_compiler.command_line import (
    LazyGroup,
    column_options,
    engine_options,
    json_option,
    model_option,
    print_json,
    progress_bar,
    say,
    seed_option,
)
from icl_compiler.registry import COMMANDS, RETRIEVERS

_CHUNK = 256


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="icl-compiler", prog_name="icl")
def main() -> None:
    """Can a prompt stand in for fine-tuning, and how sure are we?

    Compile a labelled dataset into prompts for a frozen language model, and measure how far the prompted
    model is from a fine-tuned one. Begin with `icl demo`, or with your data:

    \b
      icl compile train.csv -o program
      icl predict program "where is my parcel?"
      icl finetune train.csv -o reference
      icl evaluate program --reference reference --data test.csv -o report.html
    """


@click.command("compile")
@click.argument("data")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the program.")
@model_option
@click.option("--encoder", default="minilm", show_default=True, metavar="NAME", help="Model of sentence embeddings.")
@click.option(
    "--template",
    metavar="NAME",
    help="Name in prompts/ or path of a Jinja file.  [default: the plain one of the task]",
)
@click.option(
    "--retriever",
    default="dense",
    show_default=True,
    metavar="NAME",
    help=f"How shots are found: {', '.join(RETRIEVERS)}, or package.module:Class.",
)
@click.option("--shots", default=16, show_default=True, type=click.IntRange(min=0), help="Most shots in a prompt.")
@click.option("--budget", default=1024, show_default=True, type=click.IntRange(min=1), help="Most tokens in a prompt.")
@click.option("--examples", type=click.IntRange(min=1), help="Rows of DATA to use, label-balanced.  [default: all]")
@click.option("--test", metavar="DATA", help="Rows whose text stands in this file are removed from the pool.")
@column_options
@seed_option
@json_option
def compile_command(
    data: str,
    output: Path,
    model: str,
    encoder: str,
    template: str | None,
    retriever: str,
    shots: int,
    budget: int,
    examples: int | None,
    test: str | None,
    text_column: str | None,
    label_column: str | None,
    target_column: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compile DATA, a labelled file, into a program: a folder that makes prompts.

    DATA is a CSV, TSV, JSONL, JSON or Parquet file, a folder that Hugging Face datasets saved, or
    hf:NAME[:SPLIT].
    """
    from icl_compiler.artifact import save_program
    from icl_compiler.compile import compile_program
    from icl_compiler.data import load_dataset, load_texts

    dataset = load_dataset(data, text_column=text_column, label_column=label_column, target_column=target_column)
    warnings = list(dataset.warnings)
    if test is not None:
        dataset, dropped = dataset.without_texts(load_texts(test, text_column=text_column))
        if dropped:
            warnings.append(f"{dropped} rows stand in {test} too and were removed from the pool")
    for warning in warnings:
        say(f"Warning: {warning}")
    program = compile_program(
        dataset,
        model=model,
        encoder=encoder,
        template=template,
        retriever=retriever,
        shots=shots,
        budget=budget,
        examples=examples,
        seed=seed,
        notify=say if sys.stderr.isatty() else None,
    )
    save_program(program, output)
    summary: dict[str, Any] = {
        "program": str(output),
        "task": program.task,
        "rows": len(program.pool.data),
        "labels": len(program.labels),
        "model": model,
        "retriever": retriever,
        "shots": shots,
        "budget": budget,
        "tokens_per_shot": round(len(program.pool.tokens) / max(1, len(program.pool.data)), 1),
        "warnings": warnings,
    }
    if as_json:
        print_json(summary)
        return
    kind = f"{summary['labels']} labels" if program.labels else "text to text"
    click.echo(
        f"{output}: {summary['rows']:,} rows, {kind}, {retriever} retrieval of up to {shots} shots "
        f"(about {summary['tokens_per_shot']:.0f} tokens each) into {budget:,} tokens for {model}"
    )


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--query", required=True, metavar="TEXT", help="The text to write a prompt for.")
@json_option
def show(program: Path, query: str, as_json: bool) -> None:
    """Show the exact prompt for a text, and why each of its shots was chosen. Runs no language model."""
    from icl_compiler.artifact import load_program

    loaded = load_program(program)
    shown = loaded.explain(query)
    if as_json:
        print_json({**shown._asdict(), "shots": [shot._asdict() for shot in shown.shots]})
        return
    click.echo(shown.prompt)
    click.secho(
        f"\n{shown.tokens} tokens of at most {shown.budget}; {len(shown.shots)} shots, in this order:",
        bold=True,
    )
    for number, shot in enumerate(shown.shots, start=1):
        click.echo(
            f"{number:>4}. score {shot.score:.3f}  {shot.tokens:>3} tokens  {shot.label}\n"
            f"      {' '.join(shot.text.split())}\n      chosen as {shot.why}; row {shot.row} of the pool"
        )
    for note in shown.notes:
        click.echo(f"      {note}")


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--file", "source", metavar="FILE", help="Texts in a data file, or one a line in a .txt file.")
@click.option("--text-column", metavar="NAME", help="Column of the texts in FILE; guessed by its name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file.  [default: standard output]")
@click.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer (generation).",
)
@engine_options
def predict(
    program: Path,
    texts: tuple[str, ...],
    source: str | None,
    text_column: str | None,
    output: Path | None,
    max_new_tokens: int,
    backend: str,
    dtype: str,
) -> None:
    """Predict the label of each text: given as arguments, in a file, or one a line on standard input.

    Prints one JSON object a line: label, its probability, the probabilities of all labels, "other" (the mass
    of all answers that are no label), and the tokens of the prompt.
    """
    if texts and source:
        raise click.UsageError("give texts as arguments or with --file, not both")
    if not texts and not source and sys.stdin.isatty():
        raise click.UsageError("give texts as arguments, with --file, or on standard input")
    from icl_compiler.artifact import load_program
    from icl_compiler.data import load_texts
    from icl_compiler.errors import DataError
    from icl_compiler.predictor import open_backend

    loaded = load_program(program)
    asked = texts or (load_texts(source, text_column=text_column) if source else tuple(_standard_input()))
    if not asked:
        raise DataError("there are no texts to predict; expected one a line on standard input")
    if any(not text.strip() for text in asked):
        raise DataError("one of the texts is empty; expected at least one character that is not a blank")
    engine = open_backend(backend, loaded.settings.model, dtype=dtype)
    with _writing(output) as out, progress_bar("predicting", len(asked), "text") as advance:
        for first in range(0, len(asked), _CHUNK):
            part = asked[first : first + _CHUNK]
            if loaded.task == "classification":
                rows = _labelled(loaded, engine, part, advance)
            else:
                rows = _generated(loaded, engine, part, max_new_tokens, advance)
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


def _labelled(program: Any, engine: Any, texts: tuple[str, ...], advance: Any) -> Iterator[dict[str, Any]]:
    from icl_compiler.predictor import PromptedPredictor

    said = PromptedPredictor(program, engine).predict(texts, progress=advance)
    for i, text in enumerate(texts):
        law = {label: float(p) for label, p in zip(said.labels, said.probabilities[i], strict=True)}
        label = said.labels[said.best[i]]
        yield {
            "text": text,
            "label": label,
            "probability": law[label],
            "probabilities": law,
            "other": float(said.other[i]),
            "prompt_tokens": int(said.prompt_tokens[i]),
        }


def _generated(
    program: Any, engine: Any, texts: tuple[str, ...], max_new_tokens: int, advance: Any
) -> Iterator[dict[str, Any]]:
    prompts = program.prompts(texts)
    end = program.template.terminator_ids
    found = engine.generate(
        [prompt.tokens for prompt in prompts],
        end,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        progress=advance,
    )
    for text, prompt, item in zip(texts, prompts, found.items, strict=True):
        tokens = item.tokens[: -len(end)] if item.finished else item.tokens
        yield {
            "text": text,
            "output": program.template.tokenizer.decode(tokens).strip(),
            "finished": item.finished,
            "prompt_tokens": len(prompt.tokens),
        }


def _standard_input() -> Iterator[str]:
    from icl_compiler.errors import DataFormatError

    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataFormatError(
                f"standard input is not UTF-8: byte 0x{error.object[error.start]:02X} in line {number}; "
                "convert it first"
            ) from error
        if text.strip():
            yield text


class _writing:
    """Context: standard output, or a file that takes its place when all is written."""

    def __init__(self, target: Path | None) -> None:
        self._target = target

    def __enter__(self) -> IO[str]:
        if self._target is None:
            return sys.stdout
        self._draft = self._target.with_name(f".{self._target.name}.part")
        self._file = self._draft.open("w", encoding="utf-8", newline="\n")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._target is None:
            return
        self._file.close()
        if kind is None:
            self._draft.replace(self._target)
        else:
            self._draft.unlink(missing_ok=True)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write into.")
@click.option(
    "--train",
    "n_train",
    default=2000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows to train on.",
)
@click.option("--test", "n_test", default=500, show_default=True, type=click.IntRange(min=1), help="Rows to test on.")
@seed_option
def messages(output: Path, n_train: int, n_test: int, seed: int) -> None:
    """Write the demo's dataset: customer messages in 16 intents, whose true label probabilities are known."""
    from icl_compiler.messages import bayes_accuracy, train_test, write_jsonl

    train, test = train_test(n_train, n_test, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(train, output / "train.jsonl")
    write_jsonl(test, output / "test.jsonl")
    click.echo(
        f"{output}/train.jsonl: {n_train:,} rows; {output}/test.jsonl: {n_test:,} rows; "
        f"no predictor can be right on more than {bayes_accuracy(test):.1%} of the test rows on average"
    )


@click.group()
def models() -> None:
    """Models that come by pip, for machines without a model hub."""


@models.command("list")
@json_option
def models_list(as_json: bool) -> None:
    """List the embedded models and say which are ready."""
    from icl_compiler.models import EMBEDDED

    rows = [
        {
            "name": model.name,
            "kind": model.kind,
            "ready": model.ready,
            "installed": model.installed,
            "install": model.install_command,
            "licence": model.licence,
            "description": model.description,
        }
        for model in EMBEDDED.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        if row["ready"]:
            state = "ready"
        elif row["installed"]:
            state = f"installed; `icl models get {row['name']}` converts it"
        else:
            state = f"missing: {row['install']}"
        click.echo(f"{row['name']:<14} {row['kind']:<15} {state}\n{'':<14} {row['description']}; {row['licence']}")
    click.echo("A folder, or a name on the Hugging Face hub, works wherever a model is named.")


@models.command("get")
@click.argument("name")
def models_get(name: str) -> None:
    """Make an embedded model ready and print its folder."""
    from icl_compiler.models import EMBEDDED, locate

    if name not in EMBEDDED:
        raise click.UsageError(f"there is no embedded model {name!r}; expected one of {', '.join(EMBEDDED)}")
    click.echo(locate(name))


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what is installed, what is missing, and what to do about it.

    Exit code 1 if something needed is missing.
    """
    from icl_compiler.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            mark = {"ok": "ok     ", "optional": "absent ", "missing": "MISSING"}[finding.state]
            click.echo(f"{mark}  {finding.subject:<24} {finding.detail}")
            if finding.remedy:
                click.echo(f"{'':<34}{finding.remedy}")
    ctx.exit(1 if any(finding.state == "missing" for finding in findings) else 0)
