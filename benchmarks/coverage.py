"""Do intervals hold what they say, and what does stopping early save? Simulated on ten laws; about ten minutes.

    python -m benchmarks.coverage

For each law of the gap of a query, 1,000 runs (seed 0; no model runs, no data are needed):

- interval: share of the 95 % intervals by betting that hold the mean, with 50, 200 and 1,000 queries, and their mean
  width beside Hoeffding's.
- sequence: share of the 95 % confidence sequences that hold the mean at every time up to 50, 200 and 1,000 queries, and
  how often one of up to 1,000 queries says "within" where epsilon lies a hair below the mean.
- stopping: queries asked, in batches of 16 and 1,000 at most, until it is decided whether the mean is within epsilon,
  where epsilon is 0.05, 0.1 or 0.2 away. Beside it two fixed numbers: the one that Hoeffding's bound needs to resolve
  0.05, for who fixes it beforehand; and the least one with which the interval by betting decides rightly in 95 % of the
  runs, for who knew the law. And what no test can do better: the mean number that any test needs, however it stops,
  that decides rightly in 95 % of the runs.

The rows are written to `benchmarks/rows/coverage.jsonl`, in place of those that stand there, and the tables of
`docs/evaluating.md` are printed.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

from evaluation.asking import BATCH
from evaluation.evaluate import commit, machine
from evaluation.intervals import betting, confidence_sequence, hoeffding

ROWS = Path(__file__).parent / "rows" / "coverage.jsonl"
RUNS = 1000
SIZES = (50, 200, 1000)
DISTANCES = (0.05, 0.1, 0.2)
FIXED = math.ceil(math.log(2 / 0.05) / (2 * 0.05**2))
"""Queries after which Hoeffding's two-sided interval at 95 % reaches 0.05 to each side."""
Row = dict[str, Any]
Array = Float[np.ndarray, "..."]


class Law(NamedTuple):
    """A law of the gap of one query: draws of a given shape, and their mean."""

    draw: Callable[[np.random.Generator, tuple[int, ...]], Array]
    mean: float


class Toy(NamedTuple):
    """Two laws over the same sequences: |P - Q| / (P + Q) of each sequence, P, Q, and their total variation."""

    z: Array
    p: Array
    q: Array
    tv: float


def _chain(start: tuple[float, float], steps: list[list[float]], length: int) -> Array:
    """The probability of every binary sequence of a Markov chain."""
    sequences = itertools.product((0, 1), repeat=length)
    return np.array([start[s[0]] * math.prod(steps[a][b] for a, b in itertools.pairwise(s)) for s in sequences])


def _toy(p: Array, q: Array) -> Toy:
    return Toy(np.abs(p - q) / (p + q), p / p.sum(), q / q.sum(), float(0.5 * np.abs(p - q).sum()))


TOYS = {
    "bern": _toy(_chain((0.5, 0.5), [[0.5, 0.5]] * 2, 8), _chain((0.4, 0.6), [[0.4, 0.6]] * 2, 8)),
    "markov": _toy(
        _chain((0.7, 0.3), [[0.9, 0.1], [0.2, 0.8]], 10), _chain((0.6, 0.4), [[0.8, 0.2], [0.25, 0.75]], 10)
    ),
    "close": _toy(_chain((0.5, 0.5), [[0.6, 0.4], [0.3, 0.7]], 6), _chain((0.5, 0.5), [[0.62, 0.38], [0.3, 0.7]], 6)),
}


def paired(rng: np.random.Generator, shape: tuple[int, ...], toy: str) -> Array:
    """The paired mixture estimates of the total variation of a toy, one sample of each law a value."""
    z, p, q, _ = TOYS[toy]
    values: Array = (z[rng.choice(len(z), shape, p=p)] + z[rng.choice(len(z), shape, p=q)]) / 2
    return values


LAWS = {
    "bernoulli .05": Law(lambda rng, shape: (rng.random(shape) < 0.05).astype(float), 0.05),
    "bernoulli .5": Law(lambda rng, shape: (rng.random(shape) < 0.5).astype(float), 0.5),
    "beta .05": Law(lambda rng, shape: rng.beta(0.5, 9.5, shape), 0.05),
    "beta .71": Law(lambda rng, shape: rng.beta(5, 2, shape), 5 / 7),
    "two points": Law(lambda rng, shape: np.where(rng.random(shape) < 0.1, 0.9, 0.1), 0.18),
    "rare and large": Law(lambda rng, shape: np.where(rng.random(shape) < 0.01, 1.0, 0.02), 0.0298),
    "near 0": Law(lambda rng, shape: 0.001 * rng.random(shape), 0.0005),
    "toy bern": Law(lambda rng, shape: paired(rng, shape, "bern"), TOYS["bern"].tv),
    "toy markov": Law(lambda rng, shape: paired(rng, shape, "markov"), TOYS["markov"].tv),
    "toy close": Law(lambda rng, shape: paired(rng, shape, "close"), TOYS["close"].tv),
}


def interval_rows(name: str, *, runs: int, sizes: tuple[int, ...] = SIZES) -> Iterator[Row]:
    """Coverage and width of the intervals of one law."""
    law = LAWS[name]
    for n in sizes:
        drawn = law.draw(np.random.default_rng([0, n]), (runs, n))
        found = np.array([betting(values) for values in drawn])
        ceiling = np.array([hoeffding(values) for values in drawn])
        yield {
            "what": "interval",
            "law": name,
            "n": n,
            "runs": runs,
            "coverage": float(((found[:, 0] <= law.mean) & (law.mean <= found[:, 1])).mean()),
            "width": float((found[:, 1] - found[:, 0]).mean()),
            "hoeffding_width": float((ceiling[:, 1] - ceiling[:, 0]).mean()),
        }


def sequences(name: str, *, runs: int, most: int = SIZES[-1]) -> tuple[Array, Array]:
    """Ends of the confidence sequences of `runs` runs, `(runs, most)` each."""
    drawn = LAWS[name].draw(np.random.default_rng([1, most]), (runs, most))
    lows, highs = zip(*(confidence_sequence(values) for values in drawn), strict=True)
    return np.array(lows), np.array(highs)


def sequence_rows(name: str, lows: Array, highs: Array) -> Iterator[Row]:
    """Coverage at every time, and false decisions."""
    mean = LAWS[name].mean
    for n in (size for size in SIZES if size <= lows.shape[1]):
        # The intervals are nested: what the last one holds, all held.
        held = (lows[:, n - 1] <= mean) & (mean <= highs[:, n - 1])
        yield {
            "what": "sequence",
            "law": name,
            "n": n,
            "runs": len(lows),
            "coverage": float(held.mean()),
            "false_within": float((highs[:, n - 1] < mean).mean()),
        }


def stops(lows: Array, highs: Array, epsilon: float) -> tuple[Array, Array]:
    """After how many queries each run stops, looking after every batch, and whether it decided."""
    looks = np.arange(BATCH, lows.shape[1] + 1, BATCH) - 1
    decided = (highs[:, looks] <= epsilon) | (lows[:, looks] > epsilon)
    first = np.where(decided.any(axis=1), looks[decided.argmax(axis=1)] + 1, lows.shape[1])
    return first.astype(float), np.asarray(decided.any(axis=1))


def least_fixed(law: Law, epsilon: float, *, runs: int = 300, most: int = 4000) -> int | None:
    """The least number of queries, to a multiple of 4, at which 95 % of the fixed intervals decide rightly."""
    drawn = law.draw(np.random.default_rng(2), (runs, most))

    def decides(n: int) -> bool:
        found = np.array([betting(values[:n]) for values in drawn])
        return bool(np.mean(found[:, 1] <= epsilon if law.mean < epsilon else found[:, 0] > epsilon) >= 0.95)

    low, high = 0, 4
    while not decides(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 4:
        middle = (low + high) // 8 * 4
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def least_of_any_test(law: Law, epsilon: float, *, delta: float = 0.05, power: float = 0.95) -> float:
    """Queries asked on average, at least, by any test that stops when it likes and decides rightly with `power`.

    It is wrong with probability `delta` at most, whatever the law of gaps. That is kl(power, delta) / K: what it sees
    until it stops must tell the law from every one whose mean lies beyond epsilon, and K, the divergence of the nearest
    of those, is the growth of the best bet against epsilon, max E log(1 + bet (X - epsilon)); from a million draws.

    Source: Wald 1945; the bound as in Garivier and Kaufmann 2016 (arXiv 1602.04589), lemma 1; K as the best bet in
    Honda and Takemura 2010, theorem 8.
    """
    values = law.draw(np.random.default_rng(3), (10**6,))
    sample, mean = (values, epsilon) if law.mean > epsilon else (1 - values, 1 - epsilon)

    def shrinks(bet: float) -> float:
        return -float(np.log1p(bet * (sample - mean)).mean())

    growth = -minimize_scalar(shrinks, bounds=(0.0, (1 - 1e-9) / mean), method="bounded").fun
    told = power * math.log(power / delta) + (1 - power) * math.log((1 - power) / (1 - delta))
    return told / float(growth)


def stopping_rows(name: str, lows: Array, highs: Array, *, known: bool = True) -> Iterator[Row]:
    """What stopping early saves; `known`: also beside a number fixed by who knows the law, which takes longer."""
    law = LAWS[name]
    for distance, sign in itertools.product(DISTANCES, (1, -1)):
        epsilon = law.mean + sign * distance
        if not 0.001 < epsilon < 0.999:
            continue
        asked, decided = stops(lows, highs, epsilon)
        right = highs[:, -1] <= epsilon if sign > 0 else lows[:, -1] > epsilon
        fixed = least_fixed(law, epsilon) if known else None
        yield {
            "what": "stopping",
            "law": name,
            "epsilon": epsilon,
            "distance": distance,
            "answer": "within" if sign > 0 else "not within",
            "runs": len(lows),
            "queries": float(asked.mean()),
            "decided": float(decided.mean()),
            "right": float((decided & right).mean()),
            "fixed_beforehand": FIXED,
            "times_fewer": FIXED / float(asked.mean()),
            "fixed_knowing_the_law": fixed,
            "times_fewer_knowing_the_law": fixed and fixed / float(asked.mean()),
            "least_of_any_test": least_of_any_test(law, epsilon) if known else None,
        }


def tables(rows: list[Row]) -> str:
    """The tables of the documentation."""
    lines = [
        '| law | n | interval covers | width | of Hoeffding\'s | sequence covers | false "within" |',
        "|---" * 7 + "|",
    ]
    for row in (row for row in rows if row["what"] == "interval"):
        [other] = [s for s in rows if (s["what"], s["law"], s.get("n")) == ("sequence", row["law"], row["n"])]
        lines.append(
            f"| {row['law']} | {row['n']:,} | {row['coverage']:.3f} | {row['width']:.3f} | "
            f"{row['width'] / row['hoeffding_width']:.2f} | {other['coverage']:.3f} | {other['false_within']:.3f} |"
        )
    names = ("law", "epsilon", "true answer", "queries", "decided rightly", "fixed, Hoeffding", "fixed, law known")
    lines += ["", f"| {' | '.join(names)} | any test, at least |", "|---" * 8 + "|"]
    for row in (row for row in rows if row["what"] == "stopping"):
        known = row["fixed_knowing_the_law"]
        times = f"{known} ({row['times_fewer_knowing_the_law']:.1f}x)" if known else "over 4,000"
        lines.append(
            f"| {row['law']} | {row['epsilon']:.3f} | {row['answer']} | {row['queries']:.0f} | {row['right']:.3f} | "
            f"{row['fixed_beforehand']} ({row['times_fewer']:.1f}x) | "
            f"{times} | {row['least_of_any_test']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows: list[Row] = []
    where = {"seed": 0, "machine": machine(), "commit": commit()}
    for name in LAWS:
        print(name, flush=True)
        lows, highs = sequences(name, runs=RUNS)
        rows += interval_rows(name, runs=RUNS)
        rows += sequence_rows(name, lows, highs)
        rows += stopping_rows(name, lows, highs)
    ROWS.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
    print(tables(rows))


if __name__ == "__main__":
    main()
