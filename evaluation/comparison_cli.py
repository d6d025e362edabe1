"""`icl compare`: two programs on the same queries. No model is involved."""

import json
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from icl_compiler.command_line import FiniteNumber, WholeNumber, json_option, print_json

if TYPE_CHECKING:
    from evaluation.comparison import Comparison

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE, required=False)
@click.option("--series", default="program", metavar="NAME", help="What is taken from A.")
@click.option("--with", "other", metavar="NAME", show_default="the same", help="What is taken from B.")
@click.option("--examples", type=WholeNumber(min=1), help="Size of the pool, where the files have several.")
@click.option(
    "--level",
    default=0.95,
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Coverage of the intervals.",
)
@json_option
def compare(
    a: Path,
    b: Path | None,
    series: str,
    other: str | None,
    examples: int | None,
    level: float,
    as_json: bool,
) -> None:
    """Say which of two programs is closer, query by query.

    A and B are files that `icl evaluate --per-query` wrote on the same test data. Queries are paired by their
    text, which tells much smaller differences from chance than two intervals side by side. Without B, two series
    of A are compared, such as the program and the vote of the neighbours. The exit code is 0 whatever the
    verdict.

    \b
      icl evaluate program --reference reference --data test.csv --per-query a
      icl evaluate program-2 --reference reference --data test.csv --per-query b
      icl compare a b
      icl compare a --with "neighbours' vote"
    """
    from evaluation.comparison import choose_line, compare_lines

    if b is None and other in (None, series):
        raise click.UsageError('with one file, name the series to compare with: --with "neighbours\' vote"')
    one = choose_line(_read(a), series, examples, str(a))
    two = choose_line(_read(b or a), other or series, examples, str(b or a))
    found = compare_lines(one, two, level=level)
    if as_json:
        print_json(found._asdict() | {"differences": [each._asdict() for each in found.differences]})
        return
    both, in_first, in_second = found.queries
    click.echo(f"A is {a}, {series}; B is {b or a}, {other or series}")
    click.echo(f"{both:,} queries in both, of {in_first:,} in A and {in_second:,} in B\n")
    for line in _table(found):
        click.echo(line)
    click.echo()
    for sentence in found.sentences:
        click.echo(fill(sentence, 80, break_on_hyphens=False))


def _table(found: "Comparison") -> list[str]:
    cells = [["", "A", "B", f"B - A [{100 * found.level:g} %]", "p"]]
    for each in found.differences:
        name = each.measure if each.exact else f"{each.measure} (approximate)"
        difference = f"{each.difference:+.3f} [{each.low:+.3f}, {each.high:+.3f}]"
        p_value = f"{each.p_value:.2g}" if each.p_value >= 1e-4 else "< 0.0001"
        cells.append([name, f"{each.first:.3f}", f"{each.second:.3f}", difference, p_value])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _read(path: Path) -> list[dict[str, Any]]:
    from icl_compiler.errors import DataError

    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object, as `icl evaluate --per-query` writes"
            ) from error
    return found
