"""`icl bounds`: what theory says about the number of examples, as a table. No model is involved.

- A bound is asked one question only: are n examples enough for epsilon? By bisection that gives both columns, the
  examples for an epsilon and the epsilon of a number of examples, so that the two never contradict each other.
- Labels are counted with "other", as in the gap that `icl evaluate` measures.
- What needs more than 1e15 examples, or promises no more than a total variation of 1, is called vacuous.
"""

import math
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Literal, NamedTuple

import click

from icl_compiler.command_line import (
    FiniteNumber,
    WholeNumber,
    json_option,
    print_json,
    say,
)
from icl_compiler.data_options import label_column_option, text_column_option

Kind = Literal["provable", "lower", "order"]

HEADINGS: dict[Kind, str] = {
    "provable": "Provable: so many are enough",
    "lower": "Lower bounds: fewer are not enough",
    "order": "Order, constant unknown (here 1)",
}
SENTENCES = (
    "All of this is about a learner without prior, which sees the examples and nothing else. A frozen language model "
    "has a prior: prompted, it may need far fewer examples, or stay away from the fine-tuned model for ever.",
    "So these numbers are a yardstick, neither upper nor lower bounds on a prompt: `icl evaluate` measures it, and "
    "`icl decide` judges what was measured.",
)
MOST_EXAMPLES = 10**100
VACUOUS = 1e15
_PART = FiniteNumber(0, 1, min_open=True, max_open=True)


class Case(NamedTuple):
    """What is to be learned: one law over `vocabulary` ** `length` answers in each of `contexts` contexts.

    `labels` is their number without "other", `None` for generation.
    """

    vocabulary: int
    length: int
    contexts: int
    delta: float
    labels: int | None = None


class Bound(NamedTuple):
    """A bound in words, and the question whether it holds that n examples are enough for an epsilon."""

    kind: Kind
    name: str
    enough: Callable[[int, float], bool]
    condition: str
    source: str

    def examples(self, epsilon: float) -> int | None:
        """The least number of examples that is enough for `epsilon`; `None` beyond 1e100.

        >>> Bound("order", "d / eps", lambda n, epsilon: n >= 7 / epsilon, "", "").examples(0.1)
        70
        """
        low, high = 0, 1
        while not self._holds(high, epsilon):
            low, high = high, 2 * high
            if high > MOST_EXAMPLES:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(middle, epsilon) else (middle, high)
        return high

    def epsilon(self, examples: int) -> float:
        """The least epsilon for which `examples` are enough, to nine digits; 1 if there is none."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self._holds(examples, middle) else (middle, high)
        return high

    def _holds(self, n: int, epsilon: float) -> bool:
        from icl_compiler.errors import EvaluationError

        try:
            return self.enough(n, epsilon)
        except EvaluationError:  # a count beyond 1e100
            return False


def bounds_of(case: Case) -> list[Bound]:
    """The bounds that fit the case: provable ones, lower bounds, and the orders of arXiv 2506.08060.

    >>> [bound.examples(0.1) for bound in bounds_of(Case(77, 1, 1, delta=0.05, labels=76))][:2]
    [2819, 7523]
    """
    from evaluation import bounds as b

    v, length, m, delta, labels = case
    answers, states = v**length, b.prefix_states(m, v, length)
    outcomes = min(answers, 10 * MOST_EXAMPLES)  # more are refused all the same, or change nothing
    balanced, per_prefix = "as many samples in each context", "as many samples after each prefix"
    found = [
        (True, Bound("provable", "the law of the answers in one context",
         lambda n, e: n >= b.n_tv(outcomes, epsilon=e, delta=delta), "i.i.d. samples of it",
         "van der Vaart and Wellner 1996; Canonne 2020")),
        (m > 1, Bound("provable", f"on average over {m:,} contexts",
         lambda n, e: n >= b.n_avg(m, outcomes, epsilon=e, delta=delta), "fixed shares of the samples",
         "Cauchy-Schwarz; McDiarmid")),
        (m > 1, Bound("provable", f"in all {m:,} contexts at once",
         lambda n, e: n >= b.n_all(m, outcomes, epsilon=e, delta=delta), balanced, "the first line; union bound")),
        (True, Bound("provable", f"{'on average, ' * (m > 1)}in expectation, with a flat prior",
         lambda n, e: e >= (b.laplace_avg(n, m, outcomes) if m > 1 else b.laplace_tv(n, outcomes)),
         "i.i.d. contexts and samples" if m > 1 else "i.i.d. samples", "Bretagnolle-Huber; Jensen")),
        (not labels, Bound("provable", "token by token, in expectation, flat prior",
         lambda n, e: e >= b.laplace_sequence(n // states, v, length), per_prefix,
         "chain rule of KL; Bretagnolle-Huber")),
        (not labels, Bound("provable", "token by token",
         lambda n, e: n >= b.n_hybrid(m, v, length, epsilon=e, delta=delta), per_prefix,
         "chain rule of TV")),
        (not labels, Bound("provable", "the probability of each single answer",
         lambda n, e: n >= b.n_selection(candidates=answers, epsilon=e, delta=delta), "weaker than TV; one context",
         "Hoeffding; union bound")),
        (bool(labels), Bound("provable", "the probability of one label in one context",
         lambda n, e: n >= b.n_fixed_context(epsilon=e, delta=delta), "i.i.d. samples", "Hoeffding")),
        (True, Bound("lower", "any learner on its worst law, in expectation",
         lambda n, e: e >= b.assouad_lower(n, outcomes, contexts=m), balanced, "Assouad's lemma; Canonne 2020")),
        (True, Bound("lower", "the best learner on its worst law",
         lambda n, e: e >= b.minimax_tv(n, outcomes), "a limit for many samples; one context", "Kamath et al. 2015")),
        (True, Bound("order", "m V / eps^2 ln(m / delta)",
         lambda n, e: n >= b.sharma_s1(m, v, epsilon=e, delta=delta), f"text of fixed length; m = {m:,}, V = {v:,}",
         "arXiv 2506.08060")),
        (True, Bound("order", "l ln V / eps^2 ln(1 / delta)",
         lambda n, e: n >= b.sharma_s2(length, v, epsilon=e, delta=delta),
         f"bounded context; l = {length:,}; never a TV guarantee", "arXiv 2506.08060")),
        (bool(labels), Bound("order", "d / eps",
         lambda n, e: n >= b.sharma_s3(1, epsilon=e), "linear classification; for each of d dimensions",
         "arXiv 2506.08060")),
        (bool(labels), Bound("order", "ln(1 / delta) / eps^2",
         lambda n, e: n >= b.sharma_s4(epsilon=e, delta=delta), "linear classification; fixed context",
         "arXiv 2506.08060")),
    ]  # fmt: skip
    return [bound for fits, bound in found if fits]


@click.command()
@click.argument("data", required=False)
@click.option("--labels", type=WholeNumber(min=2), help="Classification: how many labels there are.")
@click.option("--vocabulary", type=WholeNumber(min=2), help="Generation: how many tokens there are.")
@click.option("--length", type=WholeNumber(1, 10**4), help="Generation: tokens of an answer.")
@click.option("--epsilon", default=0.1, type=_PART, help="Total variation to stay within.")
@click.option("--delta", default=0.05, type=_PART, help="Allowed probability of failure.")
@click.option(
    "--contexts",
    type=WholeNumber(min=1),
    show_default="1; with DATA, its different texts",
    help="Different queries, each with a law of its own.",
)
@click.option(
    "--examples",
    type=WholeNumber(min=1),
    show_default="with DATA, its rows",
    help="Say also which epsilon so many examples give.",
)
@text_column_option
@label_column_option
@json_option
def bounds(
    data: str | None,
    labels: int | None,
    vocabulary: int | None,
    length: int | None,
    epsilon: float,
    delta: float,
    contexts: int | None,
    examples: int | None,
    text_column: str | None,
    label_column: str | None,
    as_json: bool,
) -> None:
    """Say how many examples theory asks for.

    For a learner that knows nothing but the examples: how many bring it within --epsilon, in total variation, of the
    law that gave them? No model runs. Name the case in one of three ways: DATA, a labelled file of any kind that
    `icl compile` reads; --labels; or --vocabulary and --length.

    \b
      icl bounds train.csv
      icl bounds --labels 77 --epsilon 0.05
      icl bounds --labels 77 --contexts 100 --examples 10000
      icl bounds --vocabulary 49152 --length 8
    """
    generation = vocabulary is not None or length is not None
    if [data is not None, labels is not None, generation].count(True) != 1:
        raise click.UsageError("name one case: DATA, or --labels, or --vocabulary and --length")
    if generation and (vocabulary is None or length is None):
        raise click.UsageError("give --vocabulary and --length together")
    if data is None and (text_column or label_column):
        raise click.UsageError("--text-column and --label-column name columns of DATA")
    if data is not None:
        from icl_compiler.data import load_dataset

        dataset = load_dataset(data, text_column=text_column, label_column=label_column)
        for warning in dataset.warnings:
            say(f"Warning: {warning}")
        labels, examples = len(dataset.labels), examples or len(dataset)
        contexts = contexts or len(set(dataset.texts))
    examples = min(examples, MOST_EXAMPLES) if examples else None
    case = Case(vocabulary or (labels or 0) + 1, length or 1, contexts or 1, delta, labels)
    rows = [
        (bound, bound.examples(epsilon), bound.epsilon(examples) if examples else None) for bound in bounds_of(case)
    ]
    if as_json:
        found = [
            {name: part for name, part in bound._asdict().items() if name != "enough"}
            | {"examples": n if n is None or n < 2**53 else float(n), "epsilon": reached}
            for bound, n, reached in rows
        ]
        asked = {**case._asdict(), "epsilon": epsilon, "examples": examples}
        print_json({**asked, "bounds": found, "sentences": SENTENCES})
        return
    what = f'{labels:,} labels and "other"' if labels else f"answers of {length:,} tokens out of {vocabulary:,}"
    click.echo(f"{what}, {case.contexts:,} context{'s' * (case.contexts > 1)}")
    known = "" if examples is None else f", epsilon with {_count(examples)} examples"
    click.echo(f"examples for epsilon {epsilon:g}{known}; delta {delta:g}\n")
    click.echo("\n".join(_table(rows)))
    for sentence in SENTENCES:
        click.echo("\n" + fill(sentence, 80, break_on_hyphens=False))


def _table(rows: Sequence[tuple[Bound, int | None, float | None]]) -> list[str]:
    lines: list[str] = []
    for kind, heading in HEADINGS.items():
        second = "" if rows[0][2] is None else "epsilon"
        lines += [""] * bool(lines) + [f"{heading:<50}{'examples':>15}{second:>15}".rstrip()]
        for bound, n, reached in rows:
            if bound.kind == kind:
                needed = "vacuous" if kind == "provable" and (n is None or n > VACUOUS) else _count(n)
                lines.append(f"  {bound.name:<48}{needed:>15}{_within(reached, kind):>15}".rstrip())
                lines.append(f"      {bound.condition} ({bound.source})")
    return lines


def _count(n: int | None) -> str:
    if n is None:
        return "> 1e+100"
    return f"{n:,}" if n < 10**9 else f"{float(n):.1e}"


def _within(epsilon: float | None, kind: Kind) -> str:
    if epsilon is None:
        return ""
    if epsilon > 1 - 1e-6:
        return "vacuous"
    # Rounded to the side on which the bound still holds.
    return f"{(math.floor(epsilon * 1000 + 1e-4) if kind == 'lower' else math.ceil(epsilon * 1000 - 1e-4)) / 1000:.3f}"
