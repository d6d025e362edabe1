"""`icl`: the commands of the compiler. Those of the evaluator stand in `evaluation/cli.py`."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from icl_compiler.command_line import (
    LazyGroup,
    OutputFile,
    OutputFolder,
    WholeNumber,
    counted,
    engine_options,
    json_option,
    print_json,
    progress_bar,
    require_text,
    say,
    seed_option,
)
from icl_compiler.registry import COMMANDS, did_you_mean

_CHUNK = 128


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
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

    Exit codes: 0 done, 1 the run failed, 2 wrong use. Results go to standard output, warnings, errors and
    progress to standard error.
    """


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--file", "source", metavar="FILE", help="Texts in a data file, or one a line in a .txt file.")
@click.option("--text-column", metavar="NAME", help="Column of the texts in FILE; guessed by its name.")
@click.option(
    "-o", "--output", type=OutputFile(), show_default="standard output", help="File to write; replaced at the end."
)
@click.option(
    "--max-new-tokens", default=64, type=WholeNumber(min=1), help="Longest answer, where texts are generated."
)
@engine_options
def predict(
    program: Path,
    texts: tuple[str, ...],
    source: str | None,
    text_column: str | None,
    output: Path | None,
    max_new_tokens: int,
    backend: str | None,
    server: str | None,
    in_flight: int | None,
    dtype: str,
) -> None:
    """Label texts with a program and its language model.

    PROGRAM is a folder that `icl compile` wrote. TEXTS are arguments, the rows of a --file, or the lines of
    standard input that are not blank. Put -- before texts that begin with a dash.

    Prints one JSON object a line: the label, its probability, the probabilities of all labels, "other" (the
    mass of all answers that are no label), and the tokens of the prompt. A program made from targets instead
    of labels generates: the output, and whether it came to its end. If the engine fails in the middle, what is
    done is kept beside the --output, under its name and ".part".

    \b
      icl predict program "where is my parcel?" "i lost my card"
      icl predict program "where is my parcel?" --server http://127.0.0.1:8000
      icl predict program --file test.csv -o predictions.jsonl
      cat texts.txt | icl predict program
    """
    if texts and source:
        raise click.UsageError("give texts as arguments or with --file, not both")
    if text_column and not source:
        raise click.UsageError("--text-column names a column of --file; give that too, or leave it out")
    if not texts and not source and sys.stdin.isatty():
        raise click.UsageError("give texts as arguments, with --file, or on standard input")
    for text in texts:
        require_text(text)
    from icl_compiler.artifact import load_program
    from icl_compiler.data import load_texts
    from icl_compiler.errors import DataError
    from icl_compiler.predictor import open_backend

    loaded = load_program(program)
    asked = texts or (load_texts(source, text_column=text_column) if source else tuple(_standard_input()))
    if not asked:
        raise DataError("there are no texts to predict; expected one a line on standard input")
    engine = open_backend(backend, loaded.settings.model, dtype=dtype, server=server, in_flight=in_flight)
    bounded = False
    with _writing(output) as out, progress_bar("predicting", len(asked), "text") as advance:
        for first in range(0, len(asked), _CHUNK):
            part = asked[first : first + _CHUNK]
            if loaded.task == "classification":
                rows = _labelled(loaded, engine, part, advance)
            else:
                rows = _generated(loaded, engine, part, max_new_tokens, advance)
            for row in rows:
                if "at_most" in row and not bounded:
                    bounded = True
                    say(
                        f"Note: {engine.device} tells its likeliest tokens only, so that the probabilities are "
                        'lower bounds; "at_most" holds the upper ones. A newer vLLM tells them exactly.'
                    )
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


def _labelled(program: Any, engine: Any, texts: tuple[str, ...], advance: Any) -> Iterator[dict[str, Any]]:
    from icl_compiler.predictor import PromptedPredictor

    said = PromptedPredictor(program, engine).predict(texts, progress=advance)
    for i, text in enumerate(texts):
        law = {label: float(p) for label, p in zip(said.labels, said.probabilities[i], strict=True)}
        label = said.labels[said.best[i]]
        row = {
            "text": text,
            "label": label,
            "probability": law[label],
            "probabilities": law,
            "other": float(said.other[i]),
            "prompt_tokens": int(said.prompt_tokens[i]),
        }
        if said.upper is not None:
            row["at_most"] = {label: float(p) for label, p in zip(said.labels, said.upper[i], strict=True)}
        yield row


def _generated(
    program: Any, engine: Any, texts: tuple[str, ...], max_new_tokens: int, advance: Any
) -> Iterator[dict[str, Any]]:
    from icl_compiler.predictor import answer_text

    prompts = program.prompts(texts)
    found = engine.generate(
        [prompt.tokens for prompt in prompts],
        program.template.terminator_ids,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        progress=advance,
    )
    for text, prompt, item in zip(texts, prompts, found.items, strict=True):
        yield {
            "text": text,
            "output": answer_text(program.template, item),
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
                f"standard input is not UTF-8: byte 0x{error.object[error.start]:02X} in line {number}. "
                "Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        if "\0" in text:
            raise DataFormatError(f"standard input has a NUL byte in line {number}, so it is no text in UTF-8")
        if text.strip():
            yield text


class _writing:
    """Context: standard output, a device, or a file that takes its place when all is written.

    What an error or Ctrl-C leaves unfinished is kept beside it, under its name and `.part`.
    """

    def __init__(self, target: Path | None) -> None:
        self._target = target
        self._draft: Path | None = None

    def __enter__(self) -> IO[str]:
        if self._target is None:
            return sys.stdout
        path = self._target.resolve()
        if not path.exists() or path.is_file():
            self._target, path = path, path.with_name(f".{path.name}.{os.getpid()}.part")
            self._draft = path
        self._file = path.open("w", encoding="utf-8", newline="\n")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._target is None:
            return
        try:
            self._file.close()
            if self._draft is None:
                return
            if kind is None:
                self._draft.replace(self._target)
            elif lines := self._draft.read_bytes().count(b"\n"):
                kept = self._target.with_name(f"{self._target.name}.part")
                self._draft.replace(kept)
                say(f"the first {lines} lines are done and kept in {kept}")
        finally:
            if self._draft is not None:
                self._draft.unlink(missing_ok=True)


@click.command()
@click.option("-o", "--output", type=OutputFolder(), required=True, help="Folder for train.jsonl and test.jsonl.")
@click.option("--train", "n_train", default=2000, type=WholeNumber(min=1), help="Rows to train on.")
@click.option("--test", "n_test", default=500, type=WholeNumber(min=1), help="Rows to test on.")
@seed_option
@json_option
def messages(output: Path, n_train: int, n_test: int, seed: int, as_json: bool) -> None:
    """Write the demo's dataset, customer messages in 16 intents.

    They are made by code, so the true probability of each label is known and stands in each row, beside the text
    and the label. The same seed gives the same messages.

    \b
      icl messages -o messages
      icl compile messages/train.jsonl -o program --test messages/test.jsonl
    """
    from icl_compiler.messages import MAX_MESSAGES, bayes_accuracy, require_messages, train_test, write_jsonl

    if n_train + n_test > MAX_MESSAGES:
        raise click.UsageError(
            f"--train and --test ask for {n_train + n_test:,} messages; there are {MAX_MESSAGES:,} distinct ones"
        )
    files = (output / "train.jsonl", output / "test.jsonl")
    for file in files:
        require_messages(file)
    output.mkdir(parents=True, exist_ok=True)
    parts = train_test(n_train, n_test, seed=seed)
    for file, part in zip(files, parts, strict=True):
        write_jsonl(part, file)
    best = bayes_accuracy(parts[1])
    if as_json:
        print_json({"train": str(files[0]), "test": str(files[1]), "seed": seed, "bayes_accuracy": best})
        return
    click.echo(
        f"{files[0]}: {counted(n_train, 'row')}; {files[1]}: {counted(n_test, 'row')}; "
        f"no predictor can be right on more than {best:.1%} of the test rows on average"
    )


@click.group()
def models() -> None:
    """List and prepare the small models that come by pip.

    They are for machines without a model hub. Wherever a model is named, a folder or a name on the Hugging Face
    hub works as well.
    """


@models.command("list")
@json_option
def models_list(as_json: bool) -> None:
    """List the models, and what is missing for each."""
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
@json_option
def models_get(name: str, as_json: bool) -> None:
    """Prepare the model NAME and print its folder.

    The weights are converted once (about 25 s) into the folder that ICL_CACHE names, by default
    ~/.cache/icl-compiler. Every command does this by itself where it needs to.

    \b
      icl models get smollm2-135m
    """
    from icl_compiler.models import EMBEDDED, locate

    if name not in EMBEDDED:
        raise click.UsageError(f"unknown embedded model {name!r}. {did_you_mean(name, EMBEDDED)}")
    folder = locate(name)
    if as_json:
        print_json({"name": name, "folder": folder})
        return
    click.echo(folder)


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what is installed, what is missing, and what to do.

    Looks at Python, the packages, the models, the processor and the disk. The exit code is 1 if something that
    is needed is missing.
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
