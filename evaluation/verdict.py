"""Prompt, fine-tune, or undecided: what the gaps at several numbers of examples show, and what each choice costs.

- Within: from n* examples on, the gap is at most epsilon at every size measured. Not within: with the most examples
  measured it is above epsilon. Else undecided, with the number of further queries that would probably decide.
- One interval per size decides, the one that is displayed beside the gap. Its upper end serves the first claim, in the
  order of `n_star`, its lower end the second; each may err with probability delta / 2, delta = 1 - level. So a verdict
  is wrong with probability at most delta, however many sizes there are, and although all share their queries.
- Queries have to be i.i.d., and neither shots nor prompt chosen on them. Coming back with more queries until a verdict
  is reached is another test: ask for it with `anytime`.
- "As good as fine-tuned" means at the floor, the gap between two fine-tunings with different seeds: give its interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from evaluation.formatting import brackets, counted, joined, with_interval
from evaluation.intervals import Interval, betting, confidence_sequence, n_star
from icl_compiler.errors import EvaluationError

Answer = Literal["within", "not within", "undecided"]

# More queries than this are no plan.
MOST_QUERIES = 1e12


@dataclass(frozen=True)
class Verdict:
    """What the intervals say about epsilon.

    Attributes:
        n: n* where the answer is "within", else the largest size measured.
        sizes: numbers of examples, increasing, each with its mean gap and its interval at `level`.
        further_queries: of an undecided verdict, how many more would decide if the gap is as measured; `None` where the
            measured gap is at epsilon, so that no number can be foreseen.
        floor: interval of the gap between two fine-tunings, if it was given.
        beyond_floor: the gap with `n` examples less the floor, query by query, where each is known; in [-1, 1].
    """

    answer: Answer
    n: int
    epsilon: float
    level: float
    queries: int
    sizes: tuple[int, ...]
    gaps: tuple[float, ...]
    intervals: tuple[Interval, ...]
    further_queries: int | None = None
    floor: Interval | None = None
    beyond_floor: Interval | None = None

    @property
    def advice(self) -> Literal["prompt", "fine-tune", "undecided"]:
        """What to do, in a word."""
        words: dict[Answer, Literal["prompt", "fine-tune", "undecided"]]
        words = {"within": "prompt", "not within": "fine-tune", "undecided": "undecided"}
        return words[self.answer]

    @property
    def against_floor(self) -> Literal["above", "at", "below"] | None:
        """Where the gap with `n` examples lies, seen from the floor; "at" where the queries do not tell.

        By the difference query by query where that is known, else by whether the two intervals overlap.
        """
        if self.floor is None:
            return None
        low, high = self.intervals[self.sizes.index(self.n)]
        if self.beyond_floor is not None:
            beyond = self.beyond_floor
        else:
            beyond = Interval(low - self.floor.high, high - self.floor.low)
        return "above" if beyond.low > 0 else "below" if beyond.high < 0 else "at"

    @property
    def sentence(self) -> str:
        """The verdict in plain words: what to do, why, and where the gap is seen from the floor."""
        said = {"within": self._within, "not within": self._not_within, "undecided": self._undecided}[self.answer]()
        return " ".join([said, *self._about_floor()])

    def _within(self) -> str:
        more = f" and at every larger size measured, up to {self.sizes[-1]:,}," if self.n < self.sizes[-1] else ""
        return (
            f"Prompt: with {counted(self.n, 'example')}{more} the gap is at most {self.epsilon:g}; "
            f"with {self.n:,} it is {self._measured(self.n)}."
        )

    def _not_within(self) -> str:
        said = (
            f"Fine-tune, or look for a better prompt: with {counted(self.n, 'example')}, the most measured, the gap is "
            f"{self._measured(self.n)}, above {self.epsilon:g}."
        )
        open_sizes = [n for n, interval in zip(self.sizes, self.intervals, strict=True) if interval.low <= self.epsilon]
        if open_sizes:
            named = joined([f"{n:,} ({self._measured(n)})" for n in open_sizes])
            return f"{said} With fewer examples this is not shown: {named}. More examples did not help here."
        return said if len(self.sizes) == 1 else f"{said} So it is at all {len(self.sizes)} sizes measured."

    def _undecided(self) -> str:
        said = (
            f"Undecided: with {counted(self.n, 'example')}, the most measured, the gap is {self._measured(self.n)} on "
            f"{counted(self.queries, 'query', 'queries')}, and the interval holds {self.epsilon:g}."
        )
        if self.further_queries is None:
            return f"{said} The measured gap is too close to {self.epsilon:g} to say how many queries would decide."
        more = counted(self.further_queries, "further query", "further queries")
        return f"{said} If the gap is as measured, about {more} would decide."

    def _about_floor(self) -> list[str]:
        if self.floor is None or self.against_floor is None:
            return []
        floor = f"the floor, {brackets(*self.floor, digits=3)}"
        if self.beyond_floor is not None:
            floor += f" (by {brackets(*self.beyond_floor, digits=3)} query by query)"
        with_n = f"With {counted(self.n, 'example')} the gap is"
        found = {
            "above": f"{with_n} above {floor}: a second fine-tuning is closer to the reference.",
            "at": f"{with_n} at {floor}, as far as {counted(self.queries, 'query', 'queries')} can tell: the prompt is "
            "as close to the reference as a second fine-tuning, or not shown to be further away.",
            "below": f"{with_n} below {floor}: the prompt is closer to the reference than a second fine-tuning.",
        }[self.against_floor]
        if self.floor.low > self.epsilon:
            return [found, f"A second fine-tuning is itself not within {self.epsilon:g}: epsilon is below the floor."]
        return [found]

    def _measured(self, n: int) -> str:
        place = self.sizes.index(n)
        return with_interval(self.gaps[place], *self.intervals[place], digits=3)


class TokenCost(NamedTuple):
    """What one query costs: tokens in and out, and the price of one token of each kind, all at least 0.

    Prices are in any currency, the same everywhere; tokens may be means over queries. Where a provider discounts
    tokens of a cached prefix, give the mean price of an input token.
    """

    input_tokens: float
    output_tokens: float
    input_price: float
    output_price: float

    @property
    def per_query(self) -> float:
        """The cost of one query.

        >>> TokenCost(input_tokens=2000, output_tokens=5, input_price=0.25, output_price=1.0).per_query
        505.0
        """
        return self.input_tokens * self.input_price + self.output_tokens * self.output_price


class BreakEven(NamedTuple):
    """From how many queries on fine-tuning is cheaper than the prompt; `None` is never."""

    queries: int | None
    prompt_per_query: float
    tuned_per_query: float
    tuning: float

    @property
    def sentence(self) -> str:
        """The comparison in plain words."""
        per_query = (
            f"a query costs {self.prompt_per_query:.3g} with the prompt, {self.tuned_per_query:.3g} with the tuned"
        )
        if self.queries is None:
            return f"Fine-tuning never pays: {per_query} model."
        return (
            f"Fine-tuning is cheaper from {counted(self.queries, 'query', 'queries')} on: {per_query} model, and "
            f"tuning costs {self.tuning:.3g} once."
        )


def verdict(
    sizes: Int[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, "queries sizes"],
    *,
    epsilon: float,
    level: float = 0.95,
    floor: Interval | None = None,
    anytime: bool = False,
) -> Verdict:
    """The verdict from the gap of each query (row) at each number of examples (column), in [0, 1].

    Intervals are those of `betting`, on the queries in the order that `evaluation.gap` gives them (shuffled with a
    fixed seed). With `anytime` they are those of `confidence_sequence`, on the queries in the order given, which has to
    be the order drawn: wider, but the verdict may be asked for again, with more queries, as often as you like. All
    answers given on the way are then right with probability `level`.

    Source: fixed-sequence tests (Maurer, Hothorn and Lehmacher 1995) on betting intervals (Waudby-Smith and Ramdas
    2024, arXiv 2010.09686).

    Raises:
        EvaluationError: no queries, a gap outside [0, 1], sizes that do not strictly increase, `epsilon` or `level`
            outside (0, 1).

    >>> gaps = np.random.default_rng(0).uniform(0, 1, (300, 2)) * np.array([0.3, 0.1])
    >>> found = verdict(np.array([16, 256]), gaps, epsilon=0.1)
    >>> found.answer, found.n
    ('within', 256)
    >>> verdict(np.array([16, 256]), gaps, epsilon=0.04).advice
    'fine-tune'
    """
    _check_part("level", level)
    delta = 1 - level
    if anytime:
        sequences = [confidence_sequence(column, delta=delta) for column in gaps.T]
        intervals = [Interval(float(lows[-1]), float(highs[-1])) for lows, highs in sequences]
    else:
        order = np.random.default_rng(0).permutation(len(gaps))
        intervals = [betting(column, delta=delta) for column in gaps[order].T]
    means = gaps.astype(np.float64).mean(axis=0)
    return verdict_of_intervals(sizes, means, intervals, queries=len(gaps), epsilon=epsilon, level=level, floor=floor)


def verdict_of_intervals(
    sizes: Int[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, " sizes"],
    intervals: Sequence[Interval],
    *,
    queries: int,
    epsilon: float,
    level: float = 0.95,
    floor: Interval | None = None,
) -> Verdict:
    """The verdict from mean gaps and their two-sided intervals at `level`, as rows of measurements have them.

    Further queries: widths shrink like 1 / sqrt(queries). If the mean m stays where it is, the end that faces epsilon,
    now at distance r from m, reaches it with queries (r / (m - epsilon))^2 in all. Since m moves, that would be enough
    about every second time; betting intervals of few queries shrink faster, so that it mostly is.

    Raises:
        EvaluationError: sizes that do not strictly increase, an interval that is none, no `queries`, `epsilon` or
            `level` outside (0, 1).

    >>> found = verdict_of_intervals(
    ...     np.array([16, 256]), np.array([0.2, 0.08]), [Interval(0.15, 0.25), Interval(0.05, 0.12)],
    ...     queries=100, epsilon=0.1, floor=Interval(0.04, 0.06),
    ... )
    >>> found.answer, found.further_queries, found.against_floor
    ('undecided', 300, 'at')
    >>> print(found.sentence)
    Undecided: with 256 examples, the most measured, the gap is 0.080 [0.050, 0.120] on 100 queries, and the interval
    holds 0.1. If the gap is as measured, about 300 further queries would decide. With 256 examples the gap is at the
    floor, [0.040, 0.060], as far as 100 queries can tell: the prompt is as close to the reference as a second
    fine-tuning, or not shown to be further away.
    """
    _check_part("epsilon", epsilon)
    _check_part("level", level)
    if queries < 1:
        raise EvaluationError(f"queries should be >= 1, is {queries}")
    for low, high in [*intervals, *([floor] if floor else [])]:
        if not 0 <= low <= high <= 1:
            raise EvaluationError(f"an interval of gaps should be within [0, 1], low end first, is [{low}, {high}]")
    least = n_star(sizes, np.array([interval.high for interval in intervals]), epsilon=epsilon)
    last, mean, most = intervals[-1], float(gaps[-1]), int(sizes[-1])
    answer: Answer = "within" if least is not None else "not within" if last.low > epsilon else "undecided"
    return Verdict(
        answer=answer,
        n=most if least is None else least,
        epsilon=epsilon,
        level=level,
        queries=queries,
        sizes=tuple(sizes.tolist()),
        gaps=tuple(gaps.tolist()),
        intervals=tuple(intervals),
        further_queries=_further_queries(mean, last, epsilon, queries) if answer == "undecided" else None,
        floor=floor,
    )


def break_even(*, prompt: TokenCost, tuned: TokenCost, tuning: float) -> BreakEven:
    """The number of queries from which fine-tuning is cheaper: the first q with tuning + q tuned < q prompt.

    That is floor(tuning / (prompt - tuned)) + 1, with the costs of one query; never where the prompt costs no more than
    the tuned model. `tuning` is paid once. Labelled examples are needed for both, and count for neither.

    Raises:
        EvaluationError: a number of tokens, a price or a cost that is negative, infinite or NaN.

    >>> prompt = TokenCost(input_tokens=2000, output_tokens=5, input_price=0.25, output_price=1.0)
    >>> tuned = TokenCost(input_tokens=100, output_tokens=5, input_price=0.5, output_price=2.0)
    >>> break_even(prompt=prompt, tuned=tuned, tuning=1e6).queries
    2248
    """
    for name, amount in (
        *((f"prompt.{field}", value) for field, value in prompt._asdict().items()),
        *((f"tuned.{field}", value) for field, value in tuned._asdict().items()),
        ("tuning", tuning),
    ):
        if not 0 <= amount < math.inf:
            raise EvaluationError(f"{name} should be a number >= 0, is {amount}")
    saving = prompt.per_query - tuned.per_query
    # Costs that are equal but for the last digit are equal.
    if saving <= 1e-12 * prompt.per_query:
        return BreakEven(None, prompt.per_query, tuned.per_query, tuning)
    # 0.3 / 0.1 is 3, whatever the last digit says.
    queries = math.floor(tuning / saving * (1 + 1e-12)) + 1
    return BreakEven(queries, prompt.per_query, tuned.per_query, tuning)


def _further_queries(mean: float, interval: Interval, epsilon: float, queries: int) -> int | None:
    distance = abs(mean - epsilon)
    radius = interval.high - mean if mean <= epsilon else mean - interval.low
    if distance * math.sqrt(MOST_QUERIES) <= radius * math.sqrt(queries):
        return None
    needed = queries * (radius / distance) ** 2
    return max(1, math.ceil(needed * (1 - 1e-12)) - queries)


def _check_part(name: str, part: float) -> None:
    if not 0 < part < 1:
        raise EvaluationError(f"{name} should be between 0 and 1, both excluded, is {part}")
