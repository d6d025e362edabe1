"""What all commands share: lazy loading, errors as sentences, progress bars, the options of data and models.

- `icl --help` imports no model code: a command's module is imported when the command is asked for, and heavy
  packages inside its body.
- Exit codes: 0 done; 1 the run failed; 2 wrong use. `ICLError` and errors of the operating system become one
  sentence.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from icl_compiler.errors import ICLError
from icl_compiler.registry import resolve

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


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
            return None
        command: click.Command = resolve("command", self._table, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an expected error becomes a sentence."""
        try:
            return super().invoke(ctx)
        except ICLError as error:
            fail(str(error))
        except BrokenPipeError:
            # Whoever read our output has had enough of it, as `head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")
        except MemoryError:
            fail("out of memory; use a smaller --budget, or a smaller model")


def fail(message: str) -> NoReturn:
    """End with the sentence and exit code 1."""
    raise click.ClickException(message)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order given."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


column_options = options(
    click.option("--text-column", metavar="NAME", help="Column of the texts; guessed by its name."),
    click.option("--label-column", metavar="NAME", help="Column of the labels; guessed by its name."),
    click.option("--target-column", metavar="NAME", help="Column of the targets, for generation."),
)
model_option = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    metavar="NAME",
    help="Frozen base model: one of `icl models list`, a folder, or a hub name.",
)
engine_options = options(
    click.option(
        "--backend",
        default="transformers",
        show_default=True,
        metavar="NAME",
        help="Engine that runs the base model.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        show_default=True,
        help="Number format; auto is bfloat16 where the processor computes in it.",
    ),
)
seed_option = click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Random seed.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def say(message: str) -> None:
    """A sentence for the person at the terminal, on standard error."""
    click.echo(message, err=True)


@contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar on standard error that appears if the work takes over two seconds."""
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, delay=2, leave=False, dynamic_ncols=True) as bar:
        yield bar.update
