"""What a curve is fitted to: mean gaps at several numbers of examples, their errors, and how they might have come out.

- All sizes are asked the same queries. The bootstrap draws whole queries, so that hard ones are hard at every size.
- Several seeds (of the examples drawn, and of the reference) are a second level of it: whole seeds are drawn too, each
  with the same queries. As few seeds drawn with replacement vary too little, their shares are spread (Rao and Wu 1988).
  Two or three seeds hardly tell how seeds vary, so that intervals are still too narrow then.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri

from icl_compiler.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Points:
    """Mean gaps at several numbers of examples, with standard errors: what a curve is fitted to.

    Attributes:
        sizes: numbers of examples, at least two, at least 1, strictly increasing.
        gaps: the mean gap at each size, in [0, 1].
        errors: their standard errors, above 0; a fit weighs a size by 1 / error^2.
        per_query: the gap of each query at each size, where known: the same queries at every size.
        per_seed: the same for each seed, where there are several; `per_query` is their mean.
    """

    sizes: Int[np.ndarray, " sizes"]
    gaps: Float[np.ndarray, " sizes"]
    errors: Float[np.ndarray, " sizes"]
    per_query: Float[np.ndarray, "queries sizes"] | None = None
    per_seed: Float[np.ndarray, "seeds queries sizes"] | None = None

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or self.sizes.min() < 1 or bool((np.diff(self.sizes) <= 0).any()):
            raise EvaluationError(
                f"sizes should be at least two, at least 1 and strictly increasing, are {self.sizes.tolist()}; "
                "zero shots are another prompt"
            )
        check_gaps(self.gaps)
        if not bool(((self.errors > 0) & (self.errors < math.inf)).all()):
            raise EvaluationError(
                f"standard errors should be above 0 and finite, are {self.errors.tolist()}; "
                "an interval without width would weigh infinitely"
            )

    @classmethod
    def from_queries(cls, sizes: Int[np.ndarray, " sizes"], per_query: Float[np.ndarray, "queries sizes"]) -> "Points":
        """Points from the gap of each query (row) at each size (column), in [0, 1]: the better source.

        The variance counts one query more, at distance 1/2 from the mean, as `evaluation.intervals.betting` does: so
        a size where all gaps are alike, perhaps 0, does not weigh infinitely.

        Raises:
            EvaluationError: sizes or gaps that `Points` does not take, fewer than two queries.

        >>> Points.from_queries(np.array([4, 64]), np.array([[0.5, 0.2], [0.3, 0.2]])).gaps
        array([0.4, 0.2])
        """
        rows = per_query.astype(np.float64)
        queries = len(rows)
        if queries < 2:
            raise EvaluationError(f"a curve needs at least two queries, there are {queries}")
        check_gaps(rows)
        squares = ((rows - rows.mean(axis=0)) ** 2).sum(axis=0)
        return cls(sizes, rows.mean(axis=0), np.sqrt((0.25 + squares) / (queries + 1) / queries), rows)

    @classmethod
    def from_seeds(
        cls, sizes: Int[np.ndarray, " sizes"], per_seed: Float[np.ndarray, "seeds queries sizes"]
    ) -> "Points":
        """Points from several seeds that asked the same queries: means over both, in whose errors both count.

        Raises:
            EvaluationError: as `from_queries`.

        >>> gaps = np.array([[[0.5, 0.2], [0.3, 0.2]], [[0.4, 0.3], [0.4, 0.1]]])
        >>> Points.from_seeds(np.array([4, 64]), gaps).gaps
        array([0.4, 0.2])
        """
        pooled = cls.from_queries(sizes, per_seed.astype(np.float64).mean(axis=0))
        seeds = len(per_seed)
        if seeds == 1:
            return pooled
        between = per_seed.mean(axis=1).var(axis=0, ddof=1) / seeds
        errors = np.sqrt(pooled.errors**2 + between)
        return replace(pooled, errors=errors, per_seed=per_seed.astype(np.float64))

    @classmethod
    def from_intervals(
        cls,
        sizes: Int[np.ndarray, " sizes"],
        gaps: Float[np.ndarray, " sizes"],
        lows: Float[np.ndarray, " sizes"],
        highs: Float[np.ndarray, " sizes"],
        *,
        level: float = 0.95,
    ) -> "Points":
        """Points from means and intervals alone, as rows of measurements have them.

        A standard error is half the width over the normal quantile. The sizes then count as independent, which they
        are not if they share queries: intervals of slopes are too wide, those of the floor may be too narrow.

        Raises:
            EvaluationError: sizes or gaps that `Points` does not take, an interval without width.

        >>> sizes, gaps = np.array([4, 64]), np.array([0.4, 0.2])
        >>> Points.from_intervals(sizes, gaps, gaps - 0.098, gaps + 0.098).errors.round(4)
        array([0.05, 0.05])
        """
        check_part("level", level)
        return cls(sizes, gaps.astype(np.float64), (highs - lows).astype(np.float64) / 2 / normal_quantile(level))


def resampled_means(points: Points, resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "resamples sizes"]:
    """Mean gaps at each size as they might have come out, cut to [0, 1]."""
    if points.per_query is None:
        drawn = rng.normal(points.gaps, points.errors, (resamples, len(points.gaps)))
    else:
        queries = len(points.per_query)
        drawn = np.empty((resamples, len(points.gaps)))
        rows = max(1, 2**22 // queries)
        for start in range(0, resamples, rows):
            times = rng.multinomial(queries, np.full(queries, 1 / queries), size=min(rows, resamples - start))
            if points.per_seed is None:
                drawn[start : start + rows] = times @ points.per_query / queries
            else:
                shares = _seed_shares(len(points.per_seed), len(times), rng)
                of_seeds = np.stack([times @ gaps / queries for gaps in points.per_seed])
                drawn[start : start + rows] = (shares.T[:, :, None] * of_seeds).sum(axis=0)
    means: Float[np.ndarray, "resamples sizes"] = np.clip(drawn, 0.0, 1.0)
    return means


def _seed_shares(seeds: int, resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "resamples seeds"]:
    # Drawn with replacement, a few seeds vary too little, by (seeds - 1) / seeds: their shares are spread by that.
    times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    shares: Float[np.ndarray, "resamples seeds"] = 1 / seeds + (times - 1) / seeds * math.sqrt(seeds / (seeds - 1))
    return shares


def normal_quantile(level: float) -> float:
    """How many standard errors an interval of this level reaches to each side."""
    return float(ndtri(0.5 + level / 2))


def check_part(name: str, part: float) -> None:
    """Raise an `EvaluationError` unless it lies between 0 and 1."""
    if not 0 < part < 1:
        raise EvaluationError(f"{name} should be between 0 and 1, both excluded, is {part}")


def check_gaps(gaps: Float[np.ndarray, "*shape"]) -> None:
    """Raise an `EvaluationError` unless all lie in [0, 1]."""
    right = (gaps >= 0) & (gaps <= 1)
    if not right.all():
        raise EvaluationError(f"gaps should be in [0, 1], one is {gaps[~right][0]}")
