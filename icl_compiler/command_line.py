"""What all commands share: lazy loading, errors as sentences, progress bars, the options of data and models.

- `icl --help` imports no model code: a command's module is imported when the command is asked for, and heavy
  packages inside its body.
- Exit codes: 0 done; 1 the run failed; 2 wrong use. `ICLError`, errors of the operating system, a package that is
  not there and Ctrl-C become one sentence.
- Where results will be written is checked before the work begins: not after an hour of it.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from icl_compiler.errors import ICLError
from icl_compiler.registry import BACKENDS, did_you_mean, resolve

if TYPE_CHECKING:
    from tqdm import tqdm

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_MOST_SEED = 2**32 - 1  # what every random generator takes
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class LazyGroup(click.Group):
    """A group whose commands are entries of a table."""

    def __init__(self, *args: Any, table: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in self._table:
            ctx.fail(f"there is no command {cmd_name!r}. {did_you_mean(cmd_name, self._table)}")
        command: click.Command = resolve("command", self._table, cmd_name)
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program: with three streams, of which the two written to are UTF-8."""
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by whoever started us
                setattr(sys, name, TextIOWrapper(BytesIO(), encoding="utf-8"))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse arguments that are no text."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise click.UsageError(f"the argument {os.fsencode(argument)!r} is no text in UTF-8") from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an expected error becomes a sentence."""
        try:
            return super().invoke(ctx)
        except ICLError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("interrupted; every file that was there before is as it was")
        except BrokenPipeError:
            # Whoever read our output has had enough of it, as `head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            where = f"{error.filename or 'reading or writing failed'}: " if error.strerror else ""
            fail(f"{where}{error.strerror or error}")
        except ModuleNotFoundError as error:
            fail(f"{error}; `icl doctor` says what is missing, and what to do")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            fail("out of memory; use a smaller --budget or --batch-size, or a smaller model")


def fail(message: str) -> NoReturn:
    """End with the sentence and exit code 1."""
    raise click.ClickException(message)


class TableName(click.ParamType[str]):
    """A name in a table of plug-ins, or, with `paths`, package.module:Class."""

    name = "name"

    def __init__(self, kind: str, table: Mapping[str, str], *, paths: bool = False) -> None:
        self._kind = kind
        self._table = table
        self._paths = paths

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if it is one."""
        if value not in self._table and not (self._paths and ":" in value):
            self.fail(f"unknown {self._kind} {value!r}. {did_you_mean(value, self._table)}", param, ctx)
        return str(value)


class WholeNumber(click.IntRange):
    """A whole number in a range."""

    name = "whole number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As it stands in the help."""
        return "N"


class FiniteNumber(click.FloatRange):
    """A number in a range, and not "nan", which lies in every one."""

    name = "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As it stands in the help."""
        return "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class OutputFolder(click.ParamType[Path]):
    """A folder to write: it is there and may be written, or it can be made."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        path = Path(value)
        existing = next((place for place in (path, *path.parents) if place.exists()), Path())
        if not str(value):
            self.fail("expected the name of a folder.", param, ctx)
        if not existing.is_dir():
            self.fail(f"{existing} is a file, expected a folder; choose another name.", param, ctx)
        if not os.access(existing, os.W_OK):
            self.fail(f"the folder {existing} cannot be written; choose another one.", param, ctx)
        return path


class OutputFile(click.ParamType[Path]):
    """A file to write: its folder is there, and it is no folder itself."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        path = Path(value)
        if not str(value):
            self.fail("expected the name of a file.", param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a folder, expected the name of a file.", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}; make it first, or choose another one.", param, ctx)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            self.fail(f"{path} cannot be written; choose another place.", param, ctx)
        return path


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order given."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


model_option = click.option(
    "--model",
    default="smollm2-135m",
    metavar="NAME",
    help="Language model: one of `icl models list`, a folder, or a hub name.",
)
template_option = click.option(
    "--template",
    metavar="NAME",
    show_default="the plain one of the task",
    help="How a prompt is written: classify, classify_chat, generate, or the path of a Jinja file.",
)
engine_options = options(
    click.option(
        "--backend",
        type=TableName("backend", BACKENDS, paths=True),
        show_default="vllm_server with --server, else transformers",
        help=f"What runs the model: {', '.join(BACKENDS)}, or package.module:Class.",
    ),
    click.option("--server", metavar="URL", help="Where a vLLM server runs; `icl vllm MODEL` starts one."),
    click.option(
        "--in-flight",
        type=WholeNumber(min=1),
        show_default="16",
        help="Most requests to the server that are under way at once.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        metavar="NAME",
        help="Numbers to compute in: bfloat16, float32, or auto (bfloat16 where the processor is fast in it).",
    ),
)
seed_option = click.option("--seed", default=0, type=WholeNumber(0, _MOST_SEED), help="Of every random choice.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def require_text(text: str) -> None:
    """Refuse a text that is blank."""
    if not text.strip():
        raise click.UsageError(f"the text {text!r} is blank; expected at least one character that is not")


def say(message: str) -> None:
    """A sentence for the person at the terminal, on standard error."""
    click.echo(message, err=True)


def new_bar(description: str, unit: str, total: int | None = None) -> "tqdm[NoReturn]":
    """A bar on standard error, if that is a terminal, that appears if the work takes over two seconds."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, delay=2, leave=False, dynamic_ncols=True, disable=None)


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """The bar as a callback that is told how much was done since the last call."""
    with new_bar(description, unit, total) as bar:
        yield bar.update
