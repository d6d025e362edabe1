"""`icl decide`: from rows that were measured to prompt, fine-tune or undecided. No model is involved."""

from dataclasses import asdict
from textwrap import fill
from typing import TYPE_CHECKING

import click

from icl_compiler.command_line import FiniteNumber, WholeNumber, json_option, print_json

if TYPE_CHECKING:
    from evaluation.decide import Decision
    from evaluation.measurement import Measurement

_PRICE = FiniteNumber(min=0)


@click.command()
@click.argument("rows", nargs=-1, required=True)
@click.option(
    "--epsilon",
    default=0.1,
    type=FiniteNumber(0, 1, min_open=True, max_open=True),
    help="Largest gap that is good enough; settle on it before you look.",
)
@click.option(
    "--labels",
    type=WholeNumber(min=2),
    help="How many there are, where the rows do not tell: say what a learner without prior needs.",
)
@click.option("--prompt-price", type=_PRICE, help="Price of a million tokens of prompts to the frozen model.")
@click.option("--tuned-price", type=_PRICE, help="Price of a million tokens of prompts to the tuned model.")
@click.option(
    "--answer-price",
    type=_PRICE,
    nargs=2,
    metavar="X Y",
    show_default="0 0",
    help="Price of one answer of the frozen and of the tuned model.",
)
@click.option("--tuning-cost", type=_PRICE, help="Price of the fine-tuning, paid once.")
@json_option
def decide(
    rows: tuple[str, ...],
    epsilon: float,
    labels: int | None,
    prompt_price: float | None,
    tuned_price: float | None,
    answer_price: tuple[float, float] | None,
    tuning_cost: float | None,
    as_json: bool,
) -> None:
    """Prompt or fine-tune? Judge the ROWS measured.

    ROWS are files that `icl evaluate --rows` or `icl demo` wrote. Every program in them gets a verdict: from how many
    examples on its gap is within --epsilon, or that it is not, or how many more queries would tell; beside it the
    floor and, from four numbers of examples on, a fitted curve. With three prices, in any currency, also from how
    many queries on fine-tuning is cheaper; the tokens of a query come from the rows. The exit code is 0 whatever the
    verdict.

    \b
      icl decide demo/rows.jsonl
      icl decide rows.jsonl --epsilon 0.05 --labels 77
      icl decide rows.jsonl --prompt-price 0.15 --tuned-price 0.3 --tuning-cost 20
    """
    from evaluation.decide import Prices
    from evaluation.decide import decide as decide_rows

    prices = None
    if (prompt_price, tuned_price, tuning_cost, answer_price) != (None, None, None, None):
        if prompt_price is None or tuned_price is None or tuning_cost is None:
            raise click.UsageError("a break-even needs --prompt-price, --tuned-price and --tuning-cost")
        prices = Prices(prompt_price, tuned_price, tuning_cost, *(answer_price or ()))
    measured = [row for name in rows for row in _read(name)]
    if labels is not None and len({row.dataset for row in measured}) > 1:
        raise click.UsageError("--labels is the number of one dataset, and the rows are about several; leave it out")
    found = decide_rows(measured, epsilon=epsilon, labels=labels, prices=prices)
    if as_json:
        print_json([_for_machines(decision, epsilon) for decision in found])
        return
    for place, decision in enumerate(found):
        click.echo("\n" * (place > 0) + decision.name)
        for sentence in decision.sentences:
            click.echo(fill(sentence, 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def _read(name: str) -> "list[Measurement]":
    from evaluation.measurement import Measurement
    from icl_compiler.errors import EvaluationError
    from icl_compiler.readers import read_table

    table = read_table(name)
    columns = {column: table.column(column) for column in table.names}
    found = []
    for place, number in enumerate(table.rows):
        try:
            found.append(Measurement.from_row({column: cells[place] for column, cells in columns.items()}, number))
        except EvaluationError as error:
            raise EvaluationError(f"{name}, {error}") from error
    return found


def _for_machines(decision: "Decision", epsilon: float) -> dict[str, object]:
    found: dict[str, object] = {"name": decision.name, "answer": None, "epsilon": epsilon}
    if (verdict := decision.verdict) is not None:
        found |= asdict(verdict) | {"advice": verdict.advice, "against_floor": verdict.against_floor}
    if (curve := decision.curve) is not None:
        found["curve"] = {
            **asdict(curve.fit.curve),
            "misfit": curve.misfit,
            "floor_interval": curve.interval("floor"),
            "floor_is_unidentified": curve.floor_is_unidentified,
            "examples_until_epsilon": curve.examples_until(epsilon)._asdict(),
        }
    if decision.break_even is not None:
        found["break_even"] = decision.break_even._asdict()
    return found | {"without_prior": decision.without_prior, "sentences": decision.sentences}
