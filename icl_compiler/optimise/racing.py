"""Which of several candidates has the lowest mean loss, where every loss costs a model call.

Successive halving with paired tests: in each round all that are left see the same further queries; those that a test
says are worse than the leader go, and then the worse half goes (Karnin, Koren & Somekh 2013, sequential halving;
Birattari et al. 2002, racing).

- The budget of calls is shared out evenly over the rounds that halving needs; what the tests save goes to later ones.
- Differences are paired: two candidates are compared on the same queries, so that hard queries are hard for both.
- The test is Student's, of the paired differences, at delta / (rivals x rounds): Bonferroni, so that the looks after
  every round are paid for. It is exact for normal differences only; the simulations in its tests show what it does
  for skewed ones. Tests that are exact for all bounded losses (betting) cannot stake more than the largest loss
  allows: with losses of up to 10 nats they refuse a difference of 0.5 (standard deviation 1) after some 250 queries,
  this one after 45. So a test here saves calls; what it says is no claim about the candidates.
- Nothing is drawn at random: whoever calls shuffles the queries, once for all races, so that what one race paid for
  is free in the next.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

LEAST = 4
"""Fewest queries of a round: fewer say nothing about a spread."""

Losses = Callable[[int, int], Float[np.ndarray, " queries"]]
"""`losses(candidate, n)`: its losses on the first `n` queries; those asked for before cost nothing."""


class OutOfTime(Exception):
    """Raised by `losses` when the time is up; the race ends with what is known."""


class Standing(NamedTuple):
    """How a candidate ended.

    Attributes:
        queries: how many it saw.
        mean: of its losses; `nan` where it saw none.
        low, high: Student's 95 % interval of the mean: approximate, for display.
        out: after which round it left, from 1; `None` for the winner.
        why: in words.
    """

    candidate: int
    queries: int
    mean: float
    low: float
    high: float
    out: int | None
    why: str


class Race(NamedTuple):
    """The winner, how each candidate ended (in their order), and the calls that were paid for."""

    winner: int
    standings: tuple[Standing, ...]
    calls: int


def race(
    losses: Losses,
    candidates: int,
    *,
    queries: int,
    budget: int,
    seen: Sequence[int] | None = None,
    costs: Sequence[int] | None = None,
    delta: float = 0.05,
) -> Race:
    """Find the candidate with the lowest mean loss.

    Of equal ones the first wins; where the budget holds not `LEAST` queries for each, the last are not tried. The
    first is never left out.

    Args:
        candidates: how many there are, numbered from 0, the likeliest winner first.
        queries: how many there are at most.
        budget: most calls to pay for.
        seen: for each candidate, how many of the first queries were paid for already.
        costs: calls for a query of each candidate; by default 1.
        delta: bound on the probability that the tests (not the halving) drop the best.

    >>> table = np.array([[1.0, 0.5, 1.0, 0.5] * 8, [0.25, 0.5, 0.25, 0.0] * 8])
    >>> found = race(lambda candidate, n: table[candidate, :n], 2, queries=32, budget=64)
    >>> found.winner, found.calls, found.standings[0].why
    (1, 64, 'worse than 1 by a paired test')
    """
    paid = [0] * candidates if seen is None else list(seen)
    known: dict[int, Float[np.ndarray, " queries"]] = {}
    least = min(LEAST, queries)
    price = [1] * candidates if costs is None else list(costs)
    left = _affordable(paid, price, budget, least)
    exits = {c: (0, "not tried: no queries were left for it") for c in range(candidates) if c not in left}
    calls, number = 0, 0
    rounds = max(1, math.ceil(math.log2(len(left))))
    level = delta / max(1, (len(left) - 1) * rounds)
    while len(left) > 1:
        number += 1
        share = (budget - calls) // max(1, rounds - number + 1)
        n = deepest([(paid[c], price[c]) for c in left], share, queries)
        n = max(least, n, *(len(values) for values in known.values()))
        late = False
        try:
            for c in left:
                known[c] = losses(c, n)
                calls += price[c] * max(0, n - paid[c])
                paid[c] = max(n, paid[c])
        except OutOfTime:
            late = True
            asked = [c for c in left if c in known] or left[:1]
            exits |= {c: (number, "not tried: the time was up") for c in left if c not in asked}
            left = asked
        means = _means(left, known)
        best = min(left, key=lambda c: (means[c], c))
        if late:
            exits |= {c: (number, "worse when the time was up") for c in left if c != best}
            left = [best]
            break
        worse = {c for c in left if c != best and is_worse(known[c] - known[best], level)}
        exits |= dict.fromkeys(worse, (number, f"worse than {best} by a paired test"))
        size = 1 if n == queries or number >= rounds else (len(left) + 1) // 2
        kept = sorted(set(left) - worse, key=lambda c: (means[c], c))[:size]
        exits |= dict.fromkeys(set(left) - worse - set(kept), (number, "in the worse half"))
        left = sorted(kept)
    standings = (standing(c, known.get(c), *exits.get(c, (None, "the winner"))) for c in range(candidates))
    return Race(left[0], tuple(standings), calls)


def _affordable(paid: Sequence[int], price: Sequence[int], budget: int, least: int) -> list[int]:
    """The first candidates, as far as `budget` holds `least` queries for each; one at least."""
    cost = np.cumsum([each * max(0, least - count) for count, each in zip(paid, price, strict=True)])
    return list(range(max(1, int((cost <= budget).sum()))))


def deepest(paid: Sequence[tuple[int, int]], share: int, queries: int) -> int:
    """The most queries that all can have seen for `share` further calls; of each, those paid for and its price."""
    low, high = 0, queries
    while low < high:
        n = (low + high + 1) // 2
        low, high = (n, high) if sum(each * max(0, n - count) for count, each in paid) <= share else (low, n - 1)
    return low


def _means(left: Sequence[int], known: dict[int, Float[np.ndarray, " queries"]]) -> dict[int, float]:
    """Mean losses over the queries that all have seen; rounded, as no figure beyond that is worth a choice."""
    if not all(c in known for c in left):
        return dict.fromkeys(left, 0.0)
    n = min(len(known[c]) for c in left)
    return {c: round(float(known[c][:n].mean()), 4) for c in left}


def is_worse(differences: Float[np.ndarray, " queries"], level: float) -> bool:
    """Whether the mean of paired differences of losses is above 0, by Student's test, one-sided, at `level`.

    >>> is_worse(np.array([0.5, 0.25, 0.5, 0.25]), 0.05), is_worse(np.array([0.5, -0.5, 0.5, -0.25]), 0.05)
    (True, False)
    """
    n, mean, spread = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if spread == 0 or mean <= 0:
        return False
    return bool(student.sf(mean / spread * math.sqrt(n), n - 1) <= level)


def standing(candidate: int, losses: Float[np.ndarray, " queries"] | None, out: int | None, why: str) -> Standing:
    """How a candidate with these losses ended."""
    if losses is None:
        return Standing(candidate, 0, math.nan, math.nan, math.nan, out, why)
    mean, n = float(losses.mean()), len(losses)
    half = math.inf if n < 2 else float(student.ppf(0.975, n - 1) * losses.std(ddof=1) / math.sqrt(n))
    return Standing(candidate, n, mean, mean - half, mean + half, out, why)
