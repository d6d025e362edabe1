"""`icl explain` and `icl diff`: why a program is as it is, and how two differ."""

from pathlib import Path
from typing import Any

import click

from icl_compiler.command_line import counted, json_option, print_json, require_text


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--query", metavar="TEXT", help="The text to write a prompt for.")
@json_option
def explain(program: Path, query: str | None, as_json: bool) -> None:
    """Tell how a program was made, or show the prompt for a text.

    PROGRAM is a folder that `icl compile` wrote. Without a --query: its settings, its calibration, and what the
    search tried. With one: the prompt, exactly as the language model reads it, and why each shot is in it. The
    prompt is not sent to it.

    \b
      icl explain program
      icl explain program --query "where is my parcel?"
    """
    from icl_compiler.artifact import load_program, load_trace

    if query is not None:
        require_text(query)
    loaded = load_program(program)
    if query is None:
        _tell_making(loaded, load_trace(program), as_json)
    else:
        _tell_prompt(loaded.explain(query), as_json)


def _tell_making(program: Any, trace: list[dict[str, Any]], as_json: bool) -> None:
    from icl_compiler.differences import facts
    from icl_compiler.optimise.trace import table

    told = facts(program)
    if as_json:
        print_json({**told, "trace": trace})
        return
    width = max(len(name) for name in told)
    for name, value in told.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {value}")
    click.echo()
    click.echo(table(trace) if trace else "no search: compiled at -O0 or -O1")


def _tell_prompt(shown: Any, as_json: bool) -> None:
    if as_json:
        print_json({**shown._asdict(), "shots": [shot._asdict() for shot in shown.shots]})
        return
    click.echo(shown.prompt)
    shots = counted(len(shown.shots), "shot") + ", in this order" * (len(shown.shots) > 1)
    tokens = f"{shown.tokens:,} tokens of at most {shown.budget:,}"
    if shown.prompts > 1:
        tokens = f"{shown.prompts} prompts, {shown.tokens:,} tokens in all, each of at most {shown.budget:,}"
    click.secho(f"\n{tokens}; {shots}", bold=True)
    for number, shot in enumerate(shown.shots, start=1):
        score = f"score {shot.score:.3f}" if shot.rank else "in the block"
        click.echo(
            f"{number:>4}. {score}  {shot.tokens:>3} tokens  {shot.label}\n"
            f"      {' '.join(shot.text.split())}\n      chosen as {shot.why}; row {shot.row} of the pool"
        )
    for note in shown.notes:
        click.echo(f"      {note}")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--query",
    "queries",
    multiple=True,
    metavar="TEXT",
    show_default="20 of the first pool",
    help="A text whose shots are compared; may be given again.",
)
@json_option
def diff(first: Path, second: Path, queries: tuple[str, ...], as_json: bool) -> None:
    """Say how the program SECOND differs from FIRST.

    Compares settings, template, labels, calibration and pool, and the shots that both choose for some texts.
    The language model does not run. The exit code is 0, whether they differ or not.

    \b
      icl diff program program-2
      icl diff program program-2 --query "where is my parcel?"
    """
    from icl_compiler.artifact import load_program
    from icl_compiler.differences import differences

    for query in queries:
        require_text(query)
    found = differences(load_program(first), load_program(second), queries)
    if as_json:
        print_json(found._asdict())
        return
    if not found.differ:
        click.echo(f"{first} and {second} are the same program")
        return
    click.echo(f"A is {first}, B is {second}")
    for name, (one, other) in found.facts.items():
        click.echo(f"{name.replace('_', ' ')}: {one} in A, {other} in B")
    for sentence in found.sentences:
        click.echo(sentence)
