"""Stop asking as soon as it is decided whether the mean gap is within epsilon.

- The gaps come batch after batch, in random order: betting is about queries drawn at random, and files are often
  sorted.
- After each batch there is a confidence sequence (`intervals.confidence_sequence`). Its intervals hold at all times at
  once, so that one may stop when they decide: "within" once the upper end is at most epsilon, "not within" once the
  lower end is above. Either is wrong with probability at most (1 - level) / 2, whenever it comes.
- What is measured of anything else on the same queries needs a confidence sequence too: how many there are was chosen
  by what they showed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from evaluation.intervals import Interval, confidence_sequence
from evaluation.tv import Sandwich
from evaluation.verdict import Answer
from icl_compiler.errors import EvaluationError


class Stopped(NamedTuple):
    """Where the asking ended.

    Attributes:
        queries: how many were asked.
        interval: of the mean gap; the answer is read from it.
    """

    answer: Answer
    queries: int
    interval: Interval


def until_decided(batches: Iterable[Sandwich], *, epsilon: float, level: float = 0.95) -> Stopped:
    """Take batches of gaps, bounds on the gap of each query, until they decide; no further one is asked for.

    A gap that is known exactly is its own lower and upper bound. "Undecided" if the batches end before.

    Source: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686), theorem 3; Ville's inequality.

    Raises:
        EvaluationError: no queries, a gap outside [0, 1] or NaN, `epsilon` or `level` outside (0, 1).

    >>> gaps = np.random.default_rng(0).beta(1, 19, (25, 16))  # 25 batches of 16, with a mean of 0.05
    >>> stopped = until_decided([Sandwich(batch, batch) for batch in gaps], epsilon=0.1)
    >>> stopped.answer, stopped.queries < 200
    ('within', True)
    """
    for name, part in (("epsilon", epsilon), ("level", level)):
        if not 0 < part < 1:
            raise EvaluationError(f"{name} should be between 0 and 1, both excluded, is {part}")
    lower, upper = np.empty(0), np.empty(0)
    interval = Interval(0.0, 1.0)
    for batch in batches:
        lower, upper = np.concatenate([lower, batch.lower]), np.concatenate([upper, batch.upper])
        interval = running_interval(Sandwich(lower, upper), level=level)
        if interval.high <= epsilon or interval.low > epsilon:
            break
    if not len(lower):
        raise EvaluationError("no queries: nothing can be decided")
    answer: Answer = "within" if interval.high <= epsilon else "not within" if interval.low > epsilon else "undecided"
    return Stopped(answer, len(lower), interval)


def running_interval(gaps: Sandwich, *, level: float) -> Interval:
    """The confidence sequence of the mean after all of these gaps, which are in the order drawn; two-sided.

    >>> gaps = np.array([0.2, 0.4] * 100)
    >>> low, high = running_interval(Sandwich(gaps, gaps), level=0.95)
    >>> round(low, 2), round(high, 2)
    (0.28, 0.32)
    """
    lows, highs = confidence_sequence(gaps.lower, delta=1 - level)
    if gaps.upper is not gaps.lower and not np.array_equal(gaps.lower, gaps.upper):
        highs = confidence_sequence(gaps.upper, delta=1 - level).highs
    return Interval(float(lows[-1]), float(highs[-1]))
