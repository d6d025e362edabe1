"""Choose one set of shots for all texts: sets are raced on held-out rows, and the best is bettered shot by shot.

- First whole sets: balanced random draws, the first rows of vote-k, and the typical row of each of as many clusters as
  there are shots.
- Then exchanges: of the best set one shot at a time is exchanged for a random row, several tries to a race, as long
  as there is budget. That is a greedy search whose every step is a race.
- At the end the set is taken only if it is better than the random one by a paired test.
- A held-out row that stands in a set is asked without itself, as everywhere.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from icl_compiler.encoders import encoder_of
from icl_compiler.optimise.search import Races
from icl_compiler.optimise.variants import Variant
from icl_compiler.selection import in_rounds
from retrievers.cluster import k_means
from retrievers.encoder import unit

DRAWS, EXCHANGES, ROUNDS = 12, 7, 3
"""Random sets; exchanges in a race; races of exchanges."""
OF_SETS, OF_EXCHANGES = 0.4, 0.3
"""Shares of what is left of the budget: of the race of sets, and of each race of exchanges."""


class Drawn(NamedTuple):
    """A set of rows, and where it comes from."""

    rows: tuple[int, ...]
    source: str


def choose_set(races: Races, found: Variant) -> Variant:
    """`found`, which has a random set, with the best set that the budget of `races` can tell from it."""
    if not found.shots:
        return found
    draw = np.random.default_rng(races.variants.base.settings.seed)
    sets = _sets(races, found.shots, draw)
    races.trace += [{"note": f"set {' '.join(map(str, each.rows))}: {each.source}"} for each in sets]
    entered = [found, *(found._replace(rows=each.rows) for each in sets)]
    best = races.race("sets", entered, share=OF_SETS)[0]
    pool, index = len(races.variants.base.pool.data), races.variants.index("static")
    random = tuple(index.search([""], found.shots).ids[0].tolist())
    for number in range(1, ROUNDS + 1):
        tries = [_exchanged(best.rows or random, pool, draw) for _ in range(EXCHANGES)]
        best = races.race(
            f"exchanges {number}", [best, *(best._replace(rows=rows) for rows in tries)], share=OF_EXCHANGES
        )[0]
    return found if best == found else races.challenge("static set", found, best)


def _sets(races: Races, shots: int, draw: np.random.Generator) -> list[Drawn]:
    base = races.variants.base
    data = base.pool.data
    shots = min(shots, len(data))
    sets = [Drawn(tuple(races.variants.index("votek").search([""], shots).ids[0].tolist()), "vote-k")]
    vectors = unit(encoder_of(base).encode(data.texts))
    centres, _ = k_means(vectors, seed=base.settings.seed, clusters=shots)
    typical = dict.fromkeys(int(np.vecdot(vectors, centre).argmax()) for centre in centres)
    sets.append(Drawn(tuple(typical), "the typical rows of clusters"))
    number = {label: i for i, label in enumerate(base.labels)}
    for _ in range(DRAWS):
        rows: Int64[np.ndarray, " rows"] = draw.permutation(len(data))
        if base.labels:
            labels = np.array([[number[data.answers[row]] for row in rows.tolist()]])
            rows = rows[in_rounds(labels, 1)[0]]
        sets.append(Drawn(tuple(rows[:shots].tolist()), "drawn at random, balanced"))
    return sets


def _exchanged(rows: tuple[int, ...], pool: int, draw: np.random.Generator) -> tuple[int, ...]:
    """One of `rows`, drawn at random, exchanged for a row that is not among them, if there is one."""
    others = np.setdiff1d(np.arange(pool), rows)
    if not len(others):
        return rows
    place = int(draw.integers(len(rows)))
    return (*rows[:place], int(draw.choice(others)), *rows[place + 1 :])
