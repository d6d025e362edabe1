"""`icl finetune` and `icl merge`: references made, and turned into ordinary checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from icl_compiler.command_line import (
    FiniteNumber,
    OutputFolder,
    TableName,
    WholeNumber,
    counted,
    json_option,
    model_option,
    new_bar,
    print_json,
    say,
    seed_option,
    template_option,
)
from icl_compiler.data_options import Columns, column_options, test_option
from icl_compiler.registry import METHODS

if TYPE_CHECKING:
    from evaluation.reference.loop import Report


@click.command()
@click.argument("data")
@click.option(
    "-o", "--output", type=OutputFolder(), required=True, help="Reference to write; one that is there is replaced."
)
@click.option(
    "--method", default="rsr", type=TableName("method", METHODS), metavar="NAME", help="How to train; see above."
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method, such as rank=16."
)
@model_option
@template_option
@click.option("--examples", type=WholeNumber(min=2), show_default="all", help="Rows of DATA to use, label-balanced.")
@click.option("--epochs", default=4, type=WholeNumber(min=1), help="Most passes over the rows.")
@click.option(
    "--learning-rate",
    type=FiniteNumber(min=0, min_open=True),
    show_default="the method's own",
    help="Of AdamW, at its highest.",
)
@click.option("--batch-size", default=16, type=WholeNumber(min=1), help="Rows a step.")
@click.option(
    "--first-layer",
    type=WholeNumber(min=0),
    show_default="two thirds up; of full 0",
    help="Train from this layer on (rsr, full). The layers below are computed once, which is faster.",
)
@click.option(
    "--held-out",
    show_default="0.1",
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Share of the rows to stop early on, at most 200 rows.",
)
@click.option(
    "--validation",
    metavar="DATA",
    help="Other labelled data to stop early on, at most 200 rows, in place of --held-out.",
)
@test_option
@column_options
@seed_option
@json_option
def finetune(
    data: str,
    output: Path,
    method: str,
    settings: tuple[str, ...],
    model: str,
    template: str | None,
    examples: int | None,
    epochs: int,
    learning_rate: float | None,
    batch_size: int,
    first_layer: int | None,
    held_out: float | None,
    validation: str | None,
    test: str | None,
    columns: Columns,
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune the model on DATA: a reference to compare with.

    DATA is any labelled data that `icl compile` reads. Training stops early on held-out rows; a thousand short texts
    take minutes on a processor. Killed, it goes on where it was with the same command. A second reference with
    another --seed measures the floor: how far two fine-tunings are from each other. Compile and fine-tune with the same
    --where, --examples and --test, so that both learn from the same rows.

    \b
    Methods (--method) and settings of each (--set):
      rsr     a small, changing set of connections: budget, unit, rounds, ...
      full    all weights: the slowest, and takes the most memory
      lora    low-rank adapters of all linear layers: rank, alpha
      loreft  edits of the residual stream: rank, layers, first, last
      shira   single weights, chosen at random: share
      head    a linear probe on the frozen model
    \b
      icl finetune train.csv -o reference
      icl finetune train.csv -o upper --first-layer 28 --examples 500
      icl finetune train.csv -o reference --validation dev.csv --test test.csv
      icl finetune pairs.csv -o writer --target-column reply --test test.csv
      icl finetune train.csv -o whole --method full --learning-rate 1e-4
    """
    from evaluation.reference.loop import LoopSettings
    from evaluation.reference.method import make_method
    from evaluation.reference.trainer import HELD_OUT
    from evaluation.reference.trainer import finetune as train_reference
    from icl_compiler.artifact import require_replaceable

    if held_out is not None and validation is not None:
        raise click.UsageError("--held-out is a share of DATA, and --validation is held out in its place; give one")
    how = make_method(method, method_settings(method, settings, first_layer))
    require_replaceable(output, kind="reference")
    dataset = columns.load(data)
    stopped_on = None if validation is None else columns.load(validation)
    warnings = [*dataset.warnings, *(() if stopped_on is None else stopped_on.warnings)]
    if test is not None:
        dataset, dropped = columns.without_test(dataset, test)
        warnings += dropped
        if stopped_on is not None:
            stopped_on, dropped = columns.apart_from(stopped_on, test)
            warnings += dropped
    if stopped_on is not None:
        dataset, count = dataset.without_texts(stopped_on.texts)
        warnings += [f"{counted(count, 'row')} of {data} not trained on: in {validation} too"] if count else []
    for warning in warnings:
        say(f"Warning: {warning}")
    if examples is not None:
        dataset = dataset.subset(examples, seed=0)
    loop = LoopSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate or how.learning_rate, seed=seed
    )
    with training_bar(f"fine-tuning {model}") as report:
        reference = train_reference(
            dataset,
            output,
            model=model,
            template=template,
            method=how,
            held_out=HELD_OUT if held_out is None else held_out,
            validation=stopped_on,
            settings=loop,
            report=report,
        )
    best = min(reference.curve, key=lambda check: check.held_out_loss)
    if as_json:
        print_json(
            {
                "reference": str(output),
                "method": reference.method,
                "examples": reference.examples,
                "seed": seed,
                "held_out_loss": best.held_out_loss,
                "best_step": best.step,
                "seconds": reference.curve[-1].seconds,
                "curve": [check._asdict() for check in reference.curve],
            }
        )
        return
    click.echo(
        f"{output}: {reference.description}; held-out loss {best.held_out_loss:.3f} nats at step {best.step}, "
        f"{reference.curve[-1].seconds:.0f} s"
    )


@click.command()
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=OutputFolder(), required=True, help="Checkpoint to write; it must not be there yet."
)
def merge(reference: Path, output: Path) -> None:
    """Write REFERENCE as an ordinary checkpoint, for vLLM.

    A reference of `icl finetune` holds what differs from its base model; this writes both as one, in bfloat16.
    transformers loads it too, unless the method is loreft, which vLLM serves by a plug-in of this package.

    \b
      icl merge reference -o merged
      vllm serve merged
    """
    from evaluation.reference.trainer import load_reference

    load_reference(reference).merge(output)
    click.echo(f"{output}: an ordinary checkpoint; try it with `vllm serve {output}`")


@contextmanager
def training_bar(description: str) -> "Iterator[Report]":
    """A bar that a training moves; it shows the losses."""
    with new_bar(description, "step") as bar:

        def report(step: int, steps: int, loss: float, held_out: float | None) -> None:
            bar.total = steps
            if held_out is not None:
                bar.set_postfix_str(f"loss {loss:.2f}, held-out {held_out:.3f}", refresh=False)
            bar.update(step - bar.n)

        yield report


def method_settings(
    method: str, given: tuple[str, ...], first_layer: int | None = None, *, option: str = "--set"
) -> dict[str, str]:
    """The settings of a method as they were typed, NAME=VALUE each.

    Args:
        first_layer: as of --first-layer, which is a setting of some methods.
        option: with which they were given, for messages.
    """
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"{option} is NAME=VALUE, such as rank=16, not {text!r}.")
        settings[name] = value
    if first_layer is not None:
        names = {"full": "first_layer", "rsr": "frontier"}
        if method not in names:
            raise click.UsageError(f"--first-layer is for the methods full and rsr, not for {method}.")
        settings[names[method]] = str(first_layer)
    return settings
