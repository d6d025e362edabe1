"""From rows of measurements to a decision for each program: prompt, fine-tune or undecided, and what follows.

- One decision for the rows that differ in their number of examples only: same dataset and queries, model,
  optimisation, retriever, budget, seed and reference. It rests on the intervals in the rows, and computes none anew.
- Of several seeds that asked the same queries it is about their mean (`evaluation.seeds`), and says what each shows.
- Where the rows support no verdict (no interval, several levels, two gaps for one size), a sentence says why.
- Rows do not say on which queries a program was chosen. Where several were measured on one dataset, a sentence says
  that each verdict holds by itself, and not for the best of them.
- The floor is that of the same reference, queries and level: the first, its own model's before others'.
- The vote of the neighbours is looked at too: where it alone is within epsilon, or closer than the prompt, a sentence
  says so.
- Where queries were asked until a decision, the intervals hold for every epsilon and whenever one stopped.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int

from evaluation.bounds import n_tv
from evaluation.comparison import difference_of_gaps
from evaluation.curve_points import Points
from evaluation.curves import FittedCurve, fitted_curve
from evaluation.formatting import brackets, counted, joined, one_line, with_interval
from evaluation.intervals import Interval
from evaluation.measurement import Measurement
from evaluation.seeds import Pooled, pooled, without_seed
from evaluation.sentences import asked_in_turn
from evaluation.verdict import BreakEven, TokenCost, Verdict, break_even, verdict_of_intervals
from icl_compiler.errors import EvaluationError

# What makes a program another one, and how it is named where it varies.
SETTINGS = {
    "model": "{}",
    "optimisation": "-{}",
    "retriever": "{}",
    "max_prompt_tokens": "{:,} tokens",
    "shots": "shots {}",
    "calibration": "calibration {}",
    "seed": "seed {}",
    "reference": "against {}",
    "data_sha256": "queries {:.8}",
}
# What a verdict cannot do without.
NEEDED = {
    "n_examples": "number of examples",
    "gap_low": "interval",
    "gap_high": "interval",
    "level": "level",
    "n_queries": "number of queries",
}
# Fewer sizes than this leave the three parameters of a curve open.
ENOUGH_SIZES = 4


class Prices(NamedTuple):
    """Prices in one currency, at least 0: of a million prompt tokens, of the tuning, and of one answer."""

    prompt: float
    tuned: float
    tuning: float
    prompt_answer: float = 0.0
    tuned_answer: float = 0.0


class Decision(NamedTuple):
    """What the rows of one program say; without a verdict where they support none, and `sentences` say why.

    Attributes:
        curve: the fitted curve, from four sizes on.
        without_prior: examples with which a learner without prior knows the answers to one query within epsilon.
    """

    name: str
    sentences: tuple[str, ...]
    verdict: Verdict | None = None
    curve: FittedCurve | None = None
    break_even: BreakEven | None = None
    without_prior: int | None = None


def decide(
    rows: Sequence[Measurement], *, epsilon: float, labels: int | None = None, prices: Prices | None = None
) -> list[Decision]:
    """One decision for each program in the rows, in their order.

    Args:
        labels: their number, without "other", where the rows do not tell it; to say what a learner without prior
            would need.
        prices: to say from how many queries on fine-tuning is cheaper.

    Raises:
        EvaluationError: if no program is measured, or the rows of none support a verdict.

    >>> rows = [Measurement("program", n_examples=n, gap=gap, gap_low=gap - 0.03, gap_high=gap + 0.03, n_queries=200,
    ...                     level=0.95) for n, gap in ((64, 0.12), (256, 0.05))]
    >>> found = decide(rows, epsilon=0.1)[0].verdict
    >>> found.advice, found.n
    ('prompt', 256)
    """
    lines: dict[tuple[object, ...], list[Measurement]] = {}
    for row in rows:
        if row.series == "program" and row.gap is not None:
            lines.setdefault((row.dataset, *(getattr(row, field) for field in SETTINGS)), []).append(row)
    if not lines:
        raise EvaluationError(
            "there is no gap of a program among the rows; measure it: "
            "icl evaluate PROGRAM --reference REFERENCE --data TEST --rows FILE"
        )
    found = []
    programs = _programs(list(lines.values()), rows)
    for line, pool in programs:
        rivals = [other[0] for other, _ in programs if other[0].dataset == line[0].dataset]
        name = _name(line[0], rivals)
        beside = [*rows, *(pool.beside if pool else ())]
        try:
            seeds = pool.lines if pool else ()
            decision = _decision(name, line, beside, len(rivals), epsilon, labels, prices, seeds)
            if pool and decision.verdict:
                told = _seed_by_seed(pool)
                decision = decision._replace(sentences=(*decision.sentences[:2], *told, *decision.sentences[2:]))
        except EvaluationError as error:
            decision = Decision(name, (f"No verdict: {error}.",))
        found.append(decision)
    if all(decision.verdict is None for decision in found):
        raise EvaluationError(" ".join(f"{decision.name}: {decision.sentences[0]}" for decision in found))
    return found


def _programs(
    lines: Sequence[list[Measurement]], rows: Sequence[Measurement]
) -> list[tuple[list[Measurement], Pooled | None]]:
    """The rows of each program: of the mean over its seeds where these can be taken together, else of each seed."""
    programs: dict[tuple[object, ...], list[list[Measurement]]] = {}
    for line in lines:
        settings = [getattr(line[0], field) for field in SETTINGS if field not in ("seed", "reference")]
        key = (line[0].dataset, *settings, without_seed(line[0].reference))
        programs.setdefault(key, []).append(line)
    found: list[tuple[list[Measurement], Pooled | None]] = []
    for seeds in programs.values():
        pool = pooled(seeds, rows)
        found += [(pool.line, pool)] if pool else [(line, None) for line in seeds]
    return found


def _seed_by_seed(pool: Pooled) -> list[str]:
    """What each seed shows with the most examples, and what the mean says nothing about."""
    most = max(cast(int, row.n_examples) for row in pool.line)
    ends = sorted((row for line in pool.lines for row in line if row.n_examples == most), key=lambda row: row.seed or 0)
    told = joined([with_interval(row.gap, row.gap_low, row.gap_high, digits=3) for row in ends])
    return [
        f"That is the mean gap over the seeds {joined([str(seed) for seed in pool.seeds])}, of the examples drawn and "
        f"of the reference; with {counted(most, 'example')} they have {told}. How far other seeds would differ is not "
        "in the interval."
    ]


def _name(row: Measurement, rivals: Sequence[Measurement]) -> str:
    varied = [field for field in SETTINGS if len({getattr(rival, field) for rival in rivals}) > 1]
    named = [SETTINGS[field].format(getattr(row, field)) for field in varied if getattr(row, field) is not None]
    return one_line(", ".join([row.dataset or "the data", *named]))


def _decision(
    name: str,
    line: Sequence[Measurement],
    rows: Sequence[Measurement],
    rivals: int,
    epsilon: float,
    labels: int | None,
    prices: Prices | None,
    seeds: Sequence[Sequence[Measurement]] = (),
) -> Decision:
    by_size = _by_size(line)
    ordered = [by_size[n] for n in sorted(by_size)]
    sizes, most = np.array(sorted(by_size)), ordered[-1]
    gaps = np.array([cast(float, row.gap) for row in ordered])
    intervals = [_interval(row) for row in ordered]
    level, floor = cast(float, most.level), _beside(most, rows, "floor")
    labels = most.n_labels if labels is None else labels
    found = verdict_of_intervals(
        sizes,
        gaps,
        intervals,
        queries=cast(int, most.n_queries),
        epsilon=epsilon,
        level=level,
        floor=_interval(floor) if floor else None,
    )
    if floor and (beyond := difference_of_gaps(floor, by_size[found.n])):
        found = replace(found, beyond_floor=Interval(beyond.low, beyond.high))
    said = [
        found.sentence,
        f"The verdict on {epsilon:g} is wrong with probability at most {100 * (1 - level):.3g} %, if the queries were "
        "drawn at random and nothing was chosen on them.",
    ]
    if rivals > 1:
        said.append(
            f"{rivals} verdicts are about this dataset. Each holds for a program that was settled on beforehand; the "
            "best of them has to be measured again, on other queries."
        )
    if asked_in_turn(most):
        said.append(f"{asked_in_turn(most)} So it may be asked about other epsilons, too.")
    if vote := _beside(most, rows, "neighbours' vote"):
        said += _about_vote(most, vote, epsilon)
    if floor is None:
        said.append(
            f"No floor with an interval of {100 * level:g} % is among the rows, so nothing says how small a gap can be "
            "expected to get: give `icl evaluate` a second --reference, trained with another seed."
        )
    if any(row.gap_truncation for row in ordered):
        said.append("The engine gave only its likeliest tokens; more queries do not narrow what that leaves open.")
    curve = None
    if len(sizes) < ENOUGH_SIZES:
        said.append(
            f"{counted(len(sizes), 'size')} measured, and a curve needs {ENOUGH_SIZES}: "
            "`icl evaluate --examples N`, several times, measures more."
        )
    else:
        try:
            points = _points_of_queries(sizes, seeds or [line])
            if points is None:
                lows, highs = np.array(intervals).T
                points = Points.from_intervals(sizes, gaps, lows, highs, level=level)
            curve = fitted_curve(points, rng=np.random.default_rng(0), level=level)
            said += _about_curve(curve, epsilon)
        except EvaluationError as error:
            said.append(f"No curve: {error}.")
    without_prior = None
    if labels is not None:
        without_prior = n_tv(labels + 1, epsilon=epsilon, delta=1 - level)
        said.append(
            f"A learner without prior needs {counted(without_prior, 'example')} to know the answers to a single query "
            f'({labels:,} labels and "other") within {epsilon:g}: a yardstick, and no bound on a prompt (`icl bounds`).'
        )
    cost = None
    if prices is not None:
        try:
            cost = _break_even(by_size[found.n], floor, rows, prices)
            said.append(cost.sentence)
        except EvaluationError as error:
            said.append(f"No break-even: {error}.")
    return Decision(name, tuple(said), found, curve, cost, without_prior)


def _by_size(line: Sequence[Measurement]) -> dict[int, Measurement]:
    found: dict[int, Measurement] = {}
    for row in line:
        for field, words in NEEDED.items():
            if getattr(row, field) is None:
                raise EvaluationError(f"the row with the gap {row.gap:.3f} does not say its {words} ({field})")
        n = cast(int, row.n_examples)
        same = found.setdefault(n, row)
        if (same.gap, same.gap_low, same.gap_high) != (row.gap, row.gap_low, row.gap_high):
            raise EvaluationError(
                f"two rows with {counted(n, 'example')} differ, with gaps of {same.gap:.3f} and {row.gap:.3f}; leave "
                "one out, and not for its gap"
            )
    levels = sorted({cast(float, row.level) for row in line})
    if len(levels) > 1:
        named = joined([f"{100 * level:g} %" for level in levels])
        raise EvaluationError(f"the intervals are of {named}, and a verdict needs one level (icl evaluate --level)")
    return found


def _points_of_queries(sizes: Int[np.ndarray, " sizes"], seeds: Sequence[Sequence[Measurement]]) -> Points | None:
    """The points of a curve, from the gaps of the same queries at all sizes and seeds; `None` without these."""
    gaps = [[by_size[n].gaps for n in sizes.tolist()] for by_size in map(_by_size, seeds)]
    if len({len(each or ()) for seed in gaps for each in seed}) > 1 or None in gaps[0]:
        return None
    return Points.from_seeds(sizes, np.array(gaps, dtype=np.float64).transpose(0, 2, 1))


def _interval(row: Measurement) -> Interval:
    return Interval(cast(float, row.gap_low), cast(float, row.gap_high))


def _about_vote(head: Measurement, vote: Measurement, epsilon: float) -> list[str]:
    """Where the vote makes the language model needless, as far as the intervals tell."""
    apart = difference_of_gaps(head, vote)
    interval, measured = _interval(vote), with_interval(vote.gap, vote.gap_low, vote.gap_high, digits=3)
    said = []
    if interval.high <= epsilon:
        said.append(
            f"The vote of the nearest neighbours alone is within {epsilon:g}, at {measured}: for that no language "
            "model is needed."
        )
    if apart.high < 0 if apart else interval.high < _interval(head).low:
        by = ""
        if apart:
            by = f", by {with_interval(-apart.difference, -apart.high, -apart.low, digits=3)} query by query"
        said.append(
            f"The vote of the nearest neighbours alone, at {measured}, is closer to the reference than the prompt{by}: "
            "here the language model brings no gain."
        )
    return said


def _beside(head: Measurement, rows: Sequence[Measurement], series: str) -> Measurement | None:
    """The row of a series on the same queries, with an interval: that of the same model and size, or else the first."""
    alike = ("dataset", "reference", "data_sha256", "level")
    found = [
        row
        for row in rows
        if row.series == series
        and None not in (row.gap_low, row.gap_high)
        and all(getattr(row, field) == getattr(head, field) for field in alike)
    ]
    return min(found, key=lambda row: (row.model != head.model, row.n_examples != head.n_examples), default=None)


def _about_curve(curve: FittedCurve, epsilon: float) -> list[str]:
    form = f"The fitted curve ({curve.fit.curve.form}; approximate)"
    if curve.misfit:
        return [f"{form} does not fit: {curve.misfit}. So it tells nothing about other numbers of examples."]
    until, floor = curve.examples_until(epsilon), curve.interval("floor")
    levels_off = f"{curve.fit.curve.floor:.3f} {brackets(*floor, digits=3)}"
    if until.n is None:
        reached = "" if until.low is None else f"; its interval begins at {counted(until.low, 'example')}"
        said = [f"{form} does not get to {epsilon:g}: it levels off at {levels_off}{reached}."]
    else:
        high = "never" if until.high is None else f"{until.high:,}"
        said = [f"{form} gets to {epsilon:g} with {counted(until.n, 'example')} [{until.low:,}, {high}]."]
    if until.warning:
        said.append(f"{until.warning}.")
    if curve.floor_is_unidentified:
        said.append(f"These sizes leave open where the gap levels off ({levels_off}): build nothing on it.")
    return said


def _break_even(row: Measurement, floor: Measurement | None, rows: Sequence[Measurement], prices: Prices) -> BreakEven:
    # The fine-tuned model reads what the prompt without shots holds.
    bare = [floor] if floor else []
    bare += [
        other
        for other in rows
        if other.series == "zero shots"
        and (other.dataset, other.model, other.data_sha256) == (row.dataset, row.model, row.data_sha256)
    ]
    tokens = [other.prompt_tokens_per_query for other in bare if other.prompt_tokens_per_query]
    if row.prompt_tokens_per_query is None or not tokens:
        raise EvaluationError(
            "the rows do not say how many tokens a query has with the prompt and with the tuned model; "
            "`icl evaluate` with baselines says both"
        )
    million = 1_000_000
    prompt = TokenCost(row.prompt_tokens_per_query, 1.0, prices.prompt / million, prices.prompt_answer)
    tuned = TokenCost(tokens[0], 1.0, prices.tuned / million, prices.tuned_answer)
    return break_even(prompt=prompt, tuned=tuned, tuning=prices.tuning)
