"""The verdict in words, from rows of measurements.

The sentences claim what the intervals support. Where two rows hold the gaps of the same queries, the interval of
their difference decides, query by query; else two intervals that do not overlap decide, and two that do are called
undecided, whatever the points say. No interval, no claim.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from evaluation.comparison import difference_of_gaps
from evaluation.formatting import counted, joined, one_line, share, with_interval
from evaluation.measurement import SERIES, Group, Measurement, Row, grouped, measurements

SEEN = 0.005
"""The least scoring noise that shows in the two digits of a gap."""


def verdict_sentence(rows: Sequence[Row]) -> list[str]:
    """The verdict in words, one sentence or two a line, claiming no more than the intervals support.

    Several datasets, or models, give one block of lines each, every line with the name in front.

    Raises:
        EvaluationError: if there are no rows, or a row is not usable.

    >>> program = {"series": "program", "dataset": "toy", "gap": 0.21, "gap_low": 0.18, "gap_high": 0.25,
    ...            "n_examples": 512, "n_queries": 200, "model": "smollm2-135m", "level": 0.95}
    >>> floor = {"series": "floor", "dataset": "toy", "gap": 0.09, "gap_low": 0.07, "gap_high": 0.11}
    >>> for line in verdict_sentence([program, floor])[:2]:
    ...     print(line)
    With 512 examples the prompted smollm2-135m is 0.21 [0.18, 0.25] in total variation from the fine-tuned
    reference, on 200 queries; two fine-tunings with different seeds are 0.09 [0.07, 0.11] apart (the floor).
    The gap is above the floor: its whole interval lies above the floor's.
    """
    groups = grouped(measurements(rows))
    names = [f"{group.name}: " if len(groups) > 1 else "" for group in groups]
    return [
        one_line(name + sentence) for name, group in zip(names, groups, strict=True) for sentence in sentences(group)
    ]


def answer(groups: Sequence[Group]) -> str:
    """The answer in one line: the headline of a single group, a count of what several are.

    >>> row = Measurement("program", gap=0.21, gap_low=0.18, gap_high=0.25)
    >>> answer([Group("mr", [row])])
    'The gap is 0.21 [0.18, 0.25]. Whether that is much is open: the floor is not measured.'
    >>> answer([Group("mr", [row]), Group("subj", [])])
    'Of 2 gaps, 1 is without a measured floor and 1 is not measured.'
    """
    if len(groups) == 1:
        return headline(groups[0])
    statuses = [status(group) for group in groups]
    counts = [(statuses.count(words), words) for words in dict.fromkeys(statuses)]
    parts = [f"{count} {'is' if count == 1 else 'are'} {words}" for count, words in counts]
    return f"Of {len(groups)} gaps, {joined(parts)}."


def headline(group: Group) -> str:
    """What the gap of one group is, in one line."""
    head, floor = group.head, group.beside("floor")
    if head is None:
        return "The gap of the program is not measured."
    if floor is None:
        return f"The gap is {_text(head)}. Whether that is much is open: the floor is not measured."
    gap, least = share(head.gap), share(floor.gap)
    return {
        "above": f"The prompt does not match the fine-tuned model: its gap of {gap} is above the floor of {least}.",
        "below": f"The prompt is closer to the fine-tuned model than a second fine-tuning is: "
        f"a gap of {gap}, below the floor of {least}.",
        "overlap": f"The gap of {gap} is not above the floor of {least}, as far as {_queries(head, floor)} can tell.",
        "unknown": f"The gap is {gap}, the floor {least}. Which is larger is open: an interval is not measured.",
    }[_order(head, floor).word]


def status(group: Group) -> str:
    """What the gap is, as far as is known, after "the gap is"."""
    head, floor = group.head, group.beside("floor")
    if head is None:
        return "not measured"
    if floor is None:
        return "without a measured floor"
    return {
        "above": "above the floor",
        "below": "below the floor",
        "overlap": "not shown to be above the floor",
        "unknown": "without an interval",
    }[_order(head, floor).word]


def sentences(group: Group) -> list[str]:
    """All that is to say of one group: the gap, the floor, the baselines, the trend, the caveats."""
    head = group.head
    if head is None:
        return [
            "The gap of the program is not measured, so there is no verdict. "
            "Measure it: icl evaluate PROGRAM --reference REFERENCE --data TEST."
        ]
    found = [
        _gap_and_floor(head, group.beside("floor")),
        asked_in_turn(head),
        _against_floor(head, group.beside("floor")),
        _judge(head),
        _texts(head),
        _against_vote(head, group.beside("neighbours' vote")),
        _accuracy(head),
        *(
            _closer(head, other)
            for other in map(group.beside, ("uncalibrated", "random shots", "zero shots", "shuffled labels"))
            if other
        ),
        _trend(group, head),
        *_other_cells(group, head),
        _label_mass(head),
        _truncation(head),
        _noise(group, head),
    ]
    return [sentence for sentence in found if sentence]


def _gap_and_floor(head: Measurement, floor: Measurement | None) -> str:
    examples = f"With {counted(head.n_examples, 'example')} the" if head.n_examples is not None else "The"
    reference = f"the fine-tuned reference ({head.reference})" if head.reference else "the fine-tuned reference"
    queries = f", on {counted(head.n_queries, 'query', 'queries')}" if head.n_queries else ""
    apart = f"; two fine-tunings with different seeds are {_text(floor)} apart (the floor)" if floor else ""
    model = head.model or "model"
    return f"{examples} prompted {model} is {_text(head)} in total variation from {reference}{queries}{apart}."


def asked_in_turn(row: Measurement) -> str:
    """Of queries asked until a decision: what it is, and what it saved. Empty for a number that was fixed.

    >>> asked_in_turn(Measurement("program", epsilon=0.1, decision="within", queries_asked=48, queries_max=400))
    'Within 0.1: decided after 48 of at most 400 queries, 352 saved. The interval holds whenever one stops asking.'
    """
    if row.decision is None or row.queries_asked is None or row.queries_max is None:
        return ""
    asked, most = row.queries_asked, counted(row.queries_max, "query", "queries")
    holds = "The interval holds whenever one stops asking"
    if row.decision == "undecided":
        return f"Not decided whether it is within {row.epsilon:g}, after all {most}. {holds}, and goes on with more."
    saved = f"{row.queries_max - asked:,} saved"
    return f"{_capital(row.decision)} {row.epsilon:g}: decided after {asked:,} of at most {most}, {saved}. {holds}."


def _against_floor(head: Measurement, floor: Measurement | None) -> str:
    if floor is None:
        return (
            "The floor is not measured, so nothing says how small a gap can be expected to get: "
            "pass a second --reference, trained with another seed."
        )
    order = _order(head, floor)
    return {
        "above": f"The gap is above the floor, by {order.by}."
        if order.by
        else "The gap is above the floor: its whole interval lies above the floor's.",
        "below": "The gap is below the floor: the prompt is closer to the reference than a second fine-tuning is.",
        "overlap": f"The gap is not above the floor as far as {_queries(head, floor)} can tell: {order.chance}. "
        "That does not show that the two are equal.",
        "unknown": "Whether the gap is above the floor is open: an interval is not measured.",
    }[order.word]


def _texts(head: Measurement) -> str:
    if head.samples is None or head.token_gap is None:
        return ""
    token = with_interval(head.token_gap, head.token_gap_low, head.token_gap_high)
    return (
        f"That is about whole answers of up to {counted(head.max_new_tokens or 0, 'token')} (at most "
        f"{share(head.gap_coupling)} by coupling them token by token). Along what the reference writes, the laws of "
        f"the next token are {token} apart on average."
    )


def _judge(head: Measurement) -> str:
    def percent(gap: float) -> str:
        return f"{50 * (1 + gap):.0f} %"

    between = ""
    if head.gap_low is not None and head.gap_high is not None:
        between = f" (between {percent(head.gap_low)} and {percent(head.gap_high)})"
    return (
        "In words: the best possible judge, who sees a query and one answer to it, tells the two models "
        f"apart in {percent(head.gap or 0.0)} of cases{between}; guessing gives 50 %."
    )


def _against_vote(head: Measurement, vote: Measurement | None) -> str:
    if vote is None:
        return (
            "The vote of the neighbours without a language model is not measured: "
            "it is the cheap baseline that a prompt should beat."
        )
    sentence = _closer(head, vote)
    if _order(vote, head).word == "below":
        sentence += " As an approximation of the reference, the language model brings no gain here."
    if vote.accuracy is not None and head.accuracy is not None and vote.accuracy > head.accuracy:
        also = "also " if (vote.gap or 0.0) <= (head.gap or 0.0) else ""
        sentence += (
            f" On these queries the vote is {also}right more often: {share(vote.accuracy)} against "
            f"{share(head.accuracy)}."
        )
    if vote.neighbours is not None:
        how = ", the nearer the more" if vote.vote_sharpness else ""
        sentence += f" It counts {counted(vote.neighbours, 'row')}{how}: what serves rows of the pool best, left out."
    return sentence


def _closer(head: Measurement, other: Measurement) -> str:
    """Which of the two is closer to the reference, as far as the intervals tell."""
    nearer, further = sorted((head, other), key=lambda row: row.gap or 0.0)
    names = {id(head): "the prompt", id(other): SERIES[other.series][0]}
    if other.series not in ("zero shots", "floor") and other.n_examples not in (None, head.n_examples):
        names[id(other)] += f" (with {counted(other.n_examples or 0, 'example')})"
    near, far = names[id(nearer)], names[id(further)]
    order = _order(nearer, further)
    if order.word == "below":
        by = f", by {order.by}" if order.by else ""
        return f"{_capital(near)} is closer to the reference ({_text(nearer)}) than {far} ({_text(further)}){by}."
    measured = f"{_capital(near)} has the smaller measured gap ({_text(nearer)}, against {_text(further)} for {far})"
    if nearer.gap == further.gap:
        measured = f"{_capital(near)} and {far} have the same measured gap ({_text(nearer)})"
    if order.word == "unknown":
        return f"{measured}; an interval is not measured, so which is closer is open."
    return f"{measured}, but {order.chance}: {_queries(head, other)} cannot tell which is closer."


def _accuracy(head: Measurement) -> str:
    if head.accuracy is None or head.reference_accuracy is None:
        return ""
    prompt = with_interval(head.accuracy, head.accuracy_low, head.accuracy_high)
    reference = share(head.reference_accuracy)
    theorem = (
        "Right is an output of likeliest tokens that is the target."
        if head.samples
        else (
            "For answers drawn from the two models the accuracies cannot differ by more than the gap "
            "(a theorem); for the most likely label alone they can."
        )
    )
    if head.accuracy <= head.reference_accuracy:
        return f"The prompt's accuracy is {prompt}, the reference's {reference}. {theorem}"
    sure = head.accuracy_low is not None and head.accuracy_low > head.reference_accuracy
    chance = "" if sure else " (which may be chance: the interval does not exclude it)"
    return (
        f"On these queries the prompt is right more often than the reference, {prompt} against "
        f"{reference}{chance}. The gap is a distance from the reference, not from the truth: part of it may "
        f"be the prompt doing better, or a reference trained too little. {theorem}"
    )


def _trend(group: Group, head: Measurement) -> str:
    line = [row for row in _alike(group, head, but="n_examples") if row.n_examples is not None]
    if len({row.n_examples for row in line}) < 2:
        return ""
    first = min(line, key=lambda row: row.n_examples or 0)
    change = (
        f"{_text(first)} with {counted(first.n_examples or 0, 'example')} to {_text(head)} with {head.n_examples:,}"
    )
    order = _order(first, head)
    by = f", by {order.by}" if order.by else ""
    return {
        "above": f"The gap falls from {change}{by}.",
        "below": f"The gap grows from {change}{by}: more examples take the prompt further from the reference.",
        "overlap": f"The measured gap goes from {change}; {order.chance}, so no change is shown.",
        "unknown": f"The measured gap goes from {change}; an interval is not measured.",
    }[order.word]


def _other_cells(group: Group, head: Measurement) -> list[str]:
    """The same measurement in other settings, so that nobody takes the head for the best or the only one."""
    found = []
    levels = [row for row in _alike(group, head, but="optimisation") if row.optimisation != head.optimisation]
    if levels:
        said = [f"{_text(row)} at -{row.optimisation} ({row.retriever}{_more(row, head, '; ')})" for row in levels]
        found.append(f"The program was compiled at -{head.optimisation}; the gap is {joined(said)}.")
    for field, words in (
        ("max_prompt_tokens", "a budget of {:,} tokens"),
        ("retriever", "the retriever {}"),
        ("calibration", "the calibration {}"),
        ("reference", "the reference “{}”"),
    ):
        others = [row for row in _alike(group, head, but=field) if getattr(row, field) != getattr(head, field)]
        named = [
            f"{_text(row)} with {words.format(getattr(row, field))}{_more(row, head)}"
            for row in others
            if getattr(row, field)
        ]
        if named:
            found.append(f"All else equal, the gap is {joined(named)}.")
    seeds = _alike(group, head, but="seed")
    if len(seeds) > 1:
        gaps = [row.gap or 0.0 for row in seeds]
        found.append(
            f"Over {len(seeds)} seeds the gap goes from {share(min(gaps))} to {share(max(gaps))}; "
            f"the other figures are those of seed {head.seed}."
        )
    return found


def _label_mass(head: Measurement) -> str:
    if head.label_mass is None or head.label_mass >= 0.9:
        return ""
    return (
        f"The prompted model puts {share(head.label_mass)} of its probability on the label words; "
        "the rest counts as “other”, and is part of the gap."
    )


def _truncation(head: Measurement) -> str:
    if (head.gap_truncation or 0.0) < SEEN / 10:
        return ""
    return (
        "The engine gave only its likeliest tokens, so that the gap is known within bounds on these queries: they are "
        f"{share(head.gap_truncation)} apart, the figure is their midpoint, and the interval covers both."
    )


def _noise(group: Group, head: Measurement) -> str:
    kinds = dict.fromkeys(row.noise_against for row in group.rows if row.series == "scoring noise")
    noises = [row for kind in kinds if (row := group.beside("scoring noise", noise_against=kind))]
    if not noises:
        return ""
    noise = max(noises, key=lambda row: row.gap or 0.0)
    again = f"the same prompts, scored in {noise.noise_against or 'other batches'}"
    apart = f"differ by {with_interval(noise.gap, noise.gap_low, noise.gap_high, 3)}, on {_queries(noise, noise)}"
    if _order(noise, head).word != "below":
        return f"The scoring noise is not clearly below the gap: {again}, {apart}."
    if (noise.gap or 0.0) < SEEN:
        return ""
    return f"Differences between gaps that are below the scoring noise mean nothing: {again}, {apart}."


class _Order(NamedTuple):
    """Where a gap lies, seen from another, and by how much; `by` is empty where they are not known query by query."""

    word: Literal["above", "below", "overlap", "unknown"]
    by: str = ""

    @property
    def chance(self) -> str:
        """Why nothing is claimed where the word is "overlap"."""
        return f"the difference, {self.by}, may be chance" if self.by else "the intervals overlap"


def _order(a: Measurement, b: Measurement) -> _Order:
    """Where the gap of `a` lies, seen from that of `b`."""
    if found := difference_of_gaps(b, a):
        size, low, high = found.difference, found.low, found.high
        word: Literal["above", "below", "overlap"] = "above" if low > 0 else "below" if high < 0 else "overlap"
        if size < 0:
            size, low, high = -size, -high, -low
        return _Order(word, f"{with_interval(size, low, high)} query by query")
    if a.gap_low is None or a.gap_high is None or b.gap_low is None or b.gap_high is None:
        return _Order("unknown")
    if a.gap_low > b.gap_high:
        return _Order("above")
    return _Order("below" if a.gap_high < b.gap_low else "overlap")


def _more(row: Measurement, head: Measurement, before: str = ", ") -> str:
    """By how much the gap of a row is larger than the head's, query by query; empty where that is not known."""
    found = difference_of_gaps(head, row)
    if found is None:
        return ""
    size, low, high = found.difference, found.low, found.high
    if size < 0:
        return f"{before}smaller by {with_interval(-size, -high, -low)}"
    return f"{before}larger by {with_interval(size, low, high)}"


def _alike(group: Group, head: Measurement, but: str) -> list[Measurement]:
    """The measured programs that share every setting with `head` except one."""
    own = {"retriever", "shots", "calibration"}  # what is not named is the level's own
    same = {"n_examples", "max_prompt_tokens", "optimisation", "reference", "seed"} | own
    same -= own if but == "optimisation" else set()
    same -= {but}
    if but == "n_examples":
        same -= {"reference"}  # a reference may be trained on the same n examples
    return [
        row
        for row in group.rows
        if row.series == "program"
        and row.gap is not None
        and all(getattr(row, name) == getattr(head, name) for name in same)
    ]


def _queries(a: Measurement, b: Measurement) -> str:
    counts = [row.n_queries for row in (a, b) if row.n_queries]
    return counted(min(counts), "query", "queries") if counts else "these queries"


def _text(row: Measurement) -> str:
    return with_interval(row.gap, row.gap_low, row.gap_high)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
