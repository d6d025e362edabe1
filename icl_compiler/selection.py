"""Which shots stand in a prompt, and in which order, under a budget of exact tokens.

- Whole shots only: a shot that does not fit is skipped and counted, the next best is tried; the instruction
  and the query are never cut.
- No query retrieves itself: a row whose text is the query's (case and blanks aside) is left out.
- The best shot stands last, next to the query. A fixed set of shots is written best first instead, so that
  all prompts begin alike.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

Order = Literal["best-last", "best-first"]


class Selection(NamedTuple):
    """The shots of one prompt."""

    rows: list[int]
    """Rows of the pool, in the order of the prompt."""
    ranks: list[int]
    """Rank of each row among the candidates, from 1."""
    scores: list[float]
    """The retriever's score of each row."""
    too_long: int
    """Candidates skipped because they did not fit the budget any more."""
    itself: int
    """Candidates left out because they are the query."""


def pack(
    ids: Int64[np.ndarray, " candidates"],
    scores: Float32[np.ndarray, " candidates"],
    *,
    shot_tokens: Int64[np.ndarray, " rows"],
    is_query: Bool[np.ndarray, " candidates"],
    room: int,
    shots: int,
    order: Order,
) -> Selection:
    """Take candidates, best first, while they fit into `room` tokens, up to `shots` of them.

    >>> pack(np.array([2, 0, 1]), np.array([0.875, 0.5, 0.125], dtype=np.float32),
    ...      shot_tokens=np.array([30, 5, 7]), is_query=np.array([False, False, False]),
    ...      room=20, shots=2, order="best-last")
    Selection(rows=[1, 2], ranks=[3, 1], scores=[0.125, 0.875], too_long=1, itself=0)
    """
    rows: list[int] = []
    ranks: list[int] = []
    taken: list[float] = []
    too_long = itself = 0
    for rank, (row, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), start=1):
        if len(rows) == shots:
            break
        if is_query[rank - 1]:
            itself += 1
        elif int(shot_tokens[row]) > room:
            too_long += 1
        else:
            room -= int(shot_tokens[row])
            rows.append(row)
            ranks.append(rank)
            taken.append(score)
    if order == "best-last":
        rows, ranks, taken = rows[::-1], ranks[::-1], taken[::-1]
    return Selection(rows, ranks, taken, too_long, itself)


def candidates(shots: int, rows: int) -> int:
    """How many rows to retrieve in order to find `shots` that fit: twice as many and eight more.

    >>> candidates(16, 10_000), candidates(16, 20), candidates(0, 20)
    (40, 20, 0)
    """
    return min(rows, 2 * shots + 8) if shots else 0


def matches(texts: Sequence[str], query: str) -> Bool[np.ndarray, " candidates"]:
    """Which of `texts`, already normalised, are `query`, already normalised."""
    return np.array([text == query for text in texts], dtype=bool)
