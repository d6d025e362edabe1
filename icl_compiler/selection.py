"""Which shots stand in a prompt, and in which order, under a budget of exact tokens; for many queries at once.

- Whole shots only: a shot that does not fit is skipped and counted, the next best is tried; the instruction
  and the query are never cut.
- No query retrieves itself: a row whose text is the query's (case and blanks aside) is left out.
- The best shot stands last, next to the query. A fixed set of shots is written best first instead, so that
  all prompts begin alike. A random order is drawn from the seed and the query's own text, so that it does not depend
  on what was asked before.
- `in_rounds` gives every label among the candidates its turn: with many labels the nearest rows would otherwise often
  be of two or three of them. It reorders candidates and drops none, so that a prompt is as full as before.
- All of it is arrays over queries and candidates: no loop over queries, and one over candidates only where not all of
  the best fit.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64

Order = Literal["best-last", "best-first", "random", "by-label"]


class Selection(NamedTuple):
    """The shots of one prompt."""

    rows: list[int]
    """Rows of the pool, in the order of the prompt."""
    ranks: list[int]
    """Rank of each row among the retriever's, from 1; 0 in a fixed block."""
    scores: list[float]
    """The retriever's score of each row; 0 in a fixed block."""
    too_long: int
    """Candidates skipped because they did not fit the budget any more."""
    itself: int
    """Candidates left out because they are the query."""
    fixed: int = 0
    """How many of the rows, the first ones, are those of a fixed block (see `layouts`)."""


class Packed(NamedTuple):
    """Which candidates each prompt takes, and which it passes over before it is full."""

    taken: Bool[np.ndarray, "queries candidates"]
    passed: Bool[np.ndarray, "queries candidates"]


def pack(
    tokens: Int64[np.ndarray, "queries candidates"],
    barred: Bool[np.ndarray, "queries candidates"],
    *,
    room: Int64[np.ndarray, " queries"],
    shots: Int64[np.ndarray, " queries"],
) -> Packed:
    """Take candidates, best first, while they fit into `room` tokens, up to `shots` of them.

    Args:
        tokens: of each candidate as a shot.
        barred: candidates that must not be taken.

    >>> pack(np.array([[30, 5, 7]]), np.zeros((1, 3), dtype=bool), room=np.array([20]), shots=np.array([2]))
    Packed(taken=array([[False,  True,  True]]), passed=array([[ True, False, False]]))
    """
    so_far = np.cumsum(~barred, axis=1)
    taken = ~barred & (so_far <= shots[:, None])
    passed = barred & (so_far < shots[:, None])
    tight = (tokens * taken).sum(axis=1) > room
    if tight.any():
        taken[tight], passed[tight] = _one_by_one(tokens[tight], barred[tight], room[tight], shots[tight])
    return Packed(taken, passed)


def _one_by_one(
    tokens: Int64[np.ndarray, "queries candidates"],
    barred: Bool[np.ndarray, "queries candidates"],
    room: Int64[np.ndarray, " queries"],
    shots: Int64[np.ndarray, " queries"],
) -> Packed:
    """`pack` where not all of the best fit: candidate after candidate."""
    taken, passed = (np.zeros(barred.T.shape, dtype=bool) for _ in range(2))
    left, wanted = room.copy(), shots.copy()
    for cost, bar, takes, passes in zip(tokens.T, barred.T, taken, passed, strict=True):
        looks = wanted > 0
        np.logical_and(looks & ~bar, cost <= left, out=takes)
        np.logical_and(looks, ~takes, out=passes)
        left -= cost * takes
        wanted -= takes
    return Packed(taken.T, passed.T)


def arranged(
    queries: Int64[np.ndarray, " shots"],
    places: Int64[np.ndarray, " shots"],
    order: Order,
    *,
    labels: Int64[np.ndarray, " shots"] | None = None,
    keys: UInt64[np.ndarray, " shots"] | None = None,
) -> Int64[np.ndarray, " shots"]:
    """The permutation that puts the shots of each query into `order`.

    Args:
        queries: of which query each shot is, ascending.
        places: of each shot among its query's candidates; smaller is better.
        labels: number of the label of each shot, for `by-label`: those of one label stand together, the label with
            the best shot last, and in it the best shot last.
        keys: random numbers, for `random`.

    >>> queries, places = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 0])
    >>> arranged(queries, places, "best-last").tolist()
    [2, 1, 0, 3]
    >>> arranged(queries, places, "by-label", labels=np.array([5, 7, 5, 5])).tolist()
    [1, 2, 0, 3]
    """
    by: tuple[np.ndarray, ...] = (-places, queries)
    if order == "best-first":
        by = (places, queries)
    elif order == "random":
        assert keys is not None
        by = (keys, queries)
    elif order == "by-label":
        assert labels is not None
        _, group = np.unique(np.stack([queries, labels]), axis=1, return_inverse=True)
        group = group.ravel()
        best = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
        np.minimum.at(best, group, places)
        by = (-places, -best[group], queries)
    permutation: Int64[np.ndarray, " shots"] = np.lexsort(by)
    return permutation


def in_rounds(
    labels: Int64[np.ndarray, "queries candidates"],
    per_label: int,
    barred: Bool[np.ndarray, "queries candidates"] | None = None,
) -> Int64[np.ndarray, "queries candidates"]:
    """The places of the candidates in rounds: the best `per_label` of each label, then the next of each, and so on.

    Args:
        barred: candidates that will not be taken. They take no turn from others of their label: a query that is a row
            of the pool would be known by the label that then comes too late.

    >>> in_rounds(np.array([[4, 4, 4, 9, 9]]), 1).tolist()
    [[0, 3, 1, 4, 2]]
    >>> in_rounds(np.array([[4, 4, 4, 9, 9]]), 1, np.array([[True, False, False, False, False]])).tolist()
    [[0, 1, 3, 2, 4]]
    """
    by_label = np.argsort(labels, axis=1, kind="stable")
    grouped = np.take_along_axis(labels, by_label, axis=1)
    free = np.ones(labels.shape, dtype=bool) if barred is None else np.take_along_axis(~barred, by_label, axis=1)
    before = np.cumsum(free, axis=1) - free
    begins = np.ones(labels.shape, dtype=bool)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    since = before - np.maximum.accumulate(np.where(begins, before, 0), axis=1)
    rounds = np.empty(labels.shape, dtype=np.int64)
    np.put_along_axis(rounds, by_label, since // per_label, axis=1)
    places: Int64[np.ndarray, "queries candidates"] = np.argsort(rounds, axis=1, kind="stable")
    return places


def dealt_out(
    kinds: Int64[np.ndarray, "queries candidates"], barred: Bool[np.ndarray, "queries candidates"], hands: int
) -> Int64[np.ndarray, "queries candidates"]:
    """Which of so many hands each candidate goes to: those of one kind in turn, the best first; -1 where barred.

    >>> barred = np.array([[False, True, False, False, False]])
    >>> dealt_out(np.array([[0, 0, 0, 0, 7]]), barred, 2).tolist()
    [[0, -1, 1, 0, 0]]
    """
    order = np.argsort(kinds, axis=1, kind="stable")
    grouped, free = (np.take_along_axis(part, order, axis=1) for part in (kinds, ~barred))
    begins = np.ones(kinds.shape, dtype=bool)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    so_far = np.cumsum(free, axis=1) - free
    turn = so_far - np.maximum.accumulate(np.where(begins, so_far, 0), axis=1)
    dealt = np.empty(kinds.shape, dtype=np.int64)
    np.put_along_axis(dealt, order, np.where(free, turn % hands, -1), axis=1)
    return dealt


def random_keys(
    texts: Sequence[str], rows: Int64[np.ndarray, " shots"], queries: Int64[np.ndarray, " shots"], *, seed: int
) -> UInt64[np.ndarray, " shots"]:
    """A random number for each of `rows`, the same whenever the same text is asked; SplitMix64 (Steele et al. 2014)."""
    digests = [sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()[:8] for text in texts]
    begin = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    mixed: UInt64[np.ndarray, " shots"] = begin[queries] + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def joined(
    flat: Shaped[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " rows_and_end"], rows: Int64[np.ndarray, " shots"]
) -> Shaped[np.ndarray, " joined"]:
    """The pieces of `flat` that begin and end at the `offsets` of these rows, one after another.

    >>> joined(np.array([1, 2, 3, 4, 5]), np.array([0, 2, 3, 5]), np.array([2, 0])).tolist()
    [4, 5, 1, 2]
    """
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(lengths)
    moved = np.repeat(offsets[rows] - (ends - lengths), lengths)
    pieces: Shaped[np.ndarray, " joined"] = flat[moved + np.arange(len(moved))]
    return pieces


def candidates(shots: int, rows: int, *, per_label: int = 0) -> int:
    """How many rows to retrieve in order to find `shots` that fit: twice as many and eight more.

    Four times that where each label shall have its turn.

    >>> candidates(16, 10_000), candidates(16, 20), candidates(0, 20), candidates(16, 10_000, per_label=1)
    (40, 20, 0, 160)
    """
    return min(rows, (2 * shots + 8) * (4 if per_label else 1)) if shots else 0
