"""`icl cascade`: generations of a model, each smaller than the one before, for a task or for several."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evaluation.reference_cli import method_settings, training_bar
from icl_compiler.command_line import (
    FiniteNumber,
    OutputFolder,
    WholeNumber,
    counted,
    json_option,
    model_option,
    print_json,
    say,
    seed_option,
    template_option,
)
from icl_compiler.data_options import Columns, column_options

if TYPE_CHECKING:
    from evaluation.reference.cascade import Generation, Lesson
    from icl_compiler.data import Dataset

_METHODS = ("rsr", "full", "lora", "shira")


@click.command()
@click.argument("data")
@click.option("-o", "--output", type=OutputFolder(), required=True, help="Folder to write, or to go on in.")
@click.option("--generations", default=3, type=WholeNumber(min=1), help="How often the model is pruned.")
@click.option(
    "--share",
    default=0.75,
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Share of the parameters that each generation keeps, about; half of what goes is whole layers.",
)
@click.option("--keep-heads", is_flag=True, help="Leave all attention heads in each layer.")
@click.option(
    "--tolerance",
    default=1.5,
    type=FiniteNumber(min=0, min_open=True),
    help="Stop when the held-out loss is above so many times that of the model not pruned.",
)
@click.option("--then", "more", multiple=True, metavar="DATA", help="What the next generation learns; may be repeated.")
@click.option(
    "--test", "tests", multiple=True, metavar="DATA", help="Test data of DATA, then of each --then; kept out of them."
)
@click.option("--method", default="rsr", type=click.Choice(_METHODS), metavar="NAME", help="rsr, full, lora or shira.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method, such as budget=0.02."
)
@click.option(
    "--heal",
    multiple=True,
    metavar="NAME=VALUE",
    show_default="frontier=0 for rsr",
    help="A setting of the method in healing, where it is another.",
)
@model_option
@template_option
@click.option("--examples", type=WholeNumber(min=2), show_default="all", help="Rows of each DATA, label-balanced.")
@click.option("--epochs", default=4, type=WholeNumber(min=1), help="Most passes over the rows to specialise.")
@click.option("--healing-epochs", default=2, type=WholeNumber(min=1), help="Most passes over the rows to heal.")
@click.option(
    "--learning-rate",
    type=FiniteNumber(min=0, min_open=True),
    show_default="the method's own",
    help="Of AdamW, at its highest.",
)
@column_options
@seed_option
@json_option
def cascade(
    data: str,
    output: Path,
    generations: int,
    share: float,
    keep_heads: bool,
    tolerance: float,
    more: tuple[str, ...],
    tests: tuple[str, ...],
    method: str,
    settings: tuple[str, ...],
    heal: tuple[str, ...],
    model: str,
    template: str | None,
    examples: int | None,
    epochs: int,
    healing_epochs: int,
    learning_rate: float | None,
    columns: Columns,
    seed: int,
    as_json: bool,
) -> None:
    """Specialise the model on DATA, prune it, heal it; and again.

    In each generation the layers, heads and neurons that the task needs least are dropped. What is left is an
    ordinary checkpoint in FOLDER/generation-N/model, and what the next generation starts from. Killed, the same
    command goes on where it was.

    \b
      icl cascade train.csv -o cascade --test test.csv
      icl cascade a.csv --then b.csv --generations 2 -o cascade --share 0.6
    """
    from evaluation.reference.cascade import Recipe, run_cascade
    from evaluation.reference.loop import LoopSettings
    from evaluation.reference.method import make_method

    sources = (data, *more)
    if tests and len(tests) != len(sources):
        raise click.UsageError(f"there are {len(sources)} DATA and {len(tests)} --test; give one for each, or none.")
    given = method_settings(method, settings)
    healing = ({"frontier": "0"} if method == "rsr" else {}) | given | method_settings(method, heal, option="--heal")
    how, healer = make_method(method, given), make_method(method, healing)
    rate = learning_rate or how.learning_rate
    recipe = Recipe(
        share=share,
        heads=not keep_heads,
        method=how,
        healing=healer,
        loop=LoopSettings(epochs=epochs, learning_rate=rate, seed=seed),
        healing_loop=LoopSettings(epochs=healing_epochs, learning_rate=rate, seed=seed),
    )
    lessons = [
        _lesson(columns.load(source), columns.load(tests[i]) if tests else None, examples)
        for i, source in enumerate(sources)
    ]
    result = run_cascade(
        lessons,
        output,
        model=model,
        generations=generations,
        recipe=recipe,
        tolerance=tolerance,
        template=template,
        bar=training_bar,
        notify=say,
    )
    if as_json:
        rows = [row._asdict() for row in result.rows]
        print_json({"cascade": str(output), "rows": rows, "stopped": result.stopped})
        return
    click.echo(_table(result.rows))
    measured_on = "on the test data" if tests else "on held-out rows, which chose what was dropped"
    click.echo(f"Accuracy and its share that is kept: {measured_on}.")
    if result.stopped:
        click.echo(f"{result.stopped[0].upper()}{result.stopped[1:]}.")


def _lesson(data: "Dataset", test: "Dataset | None", examples: int | None) -> "Lesson":
    from evaluation.reference.cascade import Lesson

    for warning in data.warnings:
        say(f"Warning: {warning}")
    if test is not None:
        data, dropped = data.without_texts(test.texts)
        if dropped:
            say(f"Warning: {counted(dropped, 'row')} of {data.source} left out: in {test.source} too")
    return Lesson(data if examples is None else data.subset(examples, seed=0), test)


def _table(rows: "list[Generation]") -> str:
    lines = [("", "data", "millions", "layers", "heads", "width", "held-out loss", "accuracy", "ms/text", "kept")]
    for row in rows:
        losses = (row.specialised_loss, row.pruned_loss, row.healed_loss)
        lines.append(
            (
                str(row.generation),
                Path(row.data).name[-16:],
                f"{row.parameters / 1e6:.1f}",
                str(row.layers),
                str(row.heads),
                str(row.width),
                " > ".join(f"{loss:.2f}" for loss in losses if loss is not None),
                f"{row.accuracy:.3f}",
                f"{1000 * row.seconds_per_text:.1f}",
                f"{row.quality_kept:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)
