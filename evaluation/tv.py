"""Total variation: exact over finite outcomes, estimated over sequences, bounded where little is known.

- TV(P, Q) = 1/2 sum |P - Q| in [0, 1]. It bounds the difference of any score in [0, 1], accuracy included.
- Over labels and "other" it is exact for these events, and a lower bound on the TV over all texts. No noise
  is left within a query, so intervals are needed over queries only.
- Sequences are sampled at temperature 1 and scored under both models; a log ratio is log P(x) - log Q(x). The
  functions give one value in [0, 1] per sample (or pair): average them within a query, then take an interval
  over queries. With long answers the TV of sequences is close to 1 and says little: use `mean_token_tv`.
- `topk_bounds` and `boxed_tv` are intervals without probability: they hold for every law with the given top-k, or
  between the given bounds.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from evaluation.bounds import eps_tv
from evaluation.intervals import Interval
from icl_compiler.errors import EvaluationError, NotADistributionError

# Rows of probabilities may miss a sum of 1 by this much.
TOLERANCE = 1e-6
# Probabilities of label words come from bfloat16 models: their sum may exceed 1 by this much.
EXCESS = 1e-3
# Numbers per step of `tv_distance`, to bound memory.
CHUNK = 2**20


class Sandwich(NamedTuple):
    """Lower and upper bound on each of several TVs."""

    lower: Float[np.ndarray, "*shape"]
    upper: Float[np.ndarray, "*shape"]


class Box(NamedTuple):
    """All laws between two bounds: in each row any `law` with `lower <= law <= upper` and sum 1."""

    lower: Float[np.ndarray, "queries outcomes"]
    upper: Float[np.ndarray, "queries outcomes"]


class PluginTV(NamedTuple):
    """TV between two empirical laws, which is biased upward, and an interval for that of the true laws."""

    value: float
    interval: Interval


def tv_distance(
    p: Float[np.ndarray, "queries outcomes"], q: Float[np.ndarray, "queries outcomes"]
) -> Float[np.ndarray, " queries"]:
    """Total variation between matching rows of `p` and `q`, exact, in [0, 1].

    Rows are probabilities: non-negative, summing to 1.

    Raises:
        NotADistributionError: a negative or NaN entry, a row that does not sum to 1 within 1e-6.

    >>> tv_distance(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]))
    array([0.5])
    """
    for name, rows in (("p", p), ("q", q)):
        sums = rows.sum(axis=1, dtype=np.float64)
        _check_rows(name, rows, np.abs(sums - 1) <= TOLERANCE, "1 within 1e-6; is the outcome 'other' missing?")
    distances = np.empty(len(p))
    step = max(1, CHUNK // max(1, p.shape[1]))
    for start in range(0, len(p), step):
        part = slice(start, start + step)
        distances[part] = np.abs(p[part] - q[part]).sum(axis=1, dtype=np.float64) / 2
    return np.minimum(distances, 1.0)


def with_other(label_probs: Float[np.ndarray, "queries labels"]) -> Float[np.ndarray, "queries labels+1"]:
    """Adds the outcome "other" as a last column: what the labels leave of 1. Rows then sum to 1.

    Rows whose sum exceeds 1 by up to 1e-3 (models in bfloat16) are divided by it, their "other" is 0.

    Raises:
        NotADistributionError: a negative or NaN entry, a row whose sum exceeds 1 by more than 1e-3.

    >>> with_other(np.array([[0.5, 0.25]]))
    array([[0.5 , 0.25, 0.25]])
    """
    sums = label_probs.sum(axis=1, dtype=np.float64)
    _check_rows("label_probs", label_probs, sums <= 1 + EXCESS, "at most 1.001; are the labels prefix-free?")
    complete = np.empty((len(label_probs), label_probs.shape[1] + 1))
    np.divide(label_probs, np.maximum(sums, 1.0)[:, None], out=complete[:, :-1])
    complete[:, -1] = np.maximum(1.0 - sums, 0.0)
    return complete


def box_with_other(lower: Float[np.ndarray, "queries labels"], upper: Float[np.ndarray, "queries labels"]) -> Box:
    """All laws over labels and "other" (last column) that give each label a probability between `lower` and `upper`.

    "other" has what the labels leave: at most 1 - sum(lower), at least 1 - sum(upper). Rows whose lower bounds exceed
    a sum of 1 by up to 1e-3 (models in bfloat16) are divided by it.

    Raises:
        NotADistributionError: lower bounds as in `with_other`; an upper bound that is NaN or below its lower one.

    >>> box = box_with_other(np.array([[0.5, 0.0]]), np.array([[0.5, 0.1]]))
    >>> box.lower, box.upper
    (array([[0.5, 0. , 0.4]]), array([[0.5, 0.1, 0.5]]))
    """
    most_other = with_other(lower)
    if not (right := upper >= lower - TOLERANCE).all():
        row, column = np.argwhere(~right)[0].tolist()
        raise NotADistributionError(
            f"upper[{row}, {column}] is {upper[row, column]}, expected at least the lower bound {lower[row, column]}"
        )
    scale = np.maximum(lower.sum(axis=1, dtype=np.float64), 1.0)[:, None]
    least, most = most_other.copy(), most_other
    most[:, :-1] = np.clip(upper / scale, least[:, :-1], 1.0)
    least[:, -1] = np.clip(1 - most[:, :-1].sum(axis=1), 0.0, most[:, -1])
    return Box(least, most)


def boxed_tv(p: Box, q: Box) -> Sandwich:
    """Bounds on the TV, within [0, 1], that hold for every law of `p` against every law of `q`, row by row.

    For engines that give only their likeliest tokens; a law that is known exactly is the box `Box(law, law)`. The
    lower bound is attained. The upper one, if one of the two laws is known, is too large by at most a quarter of the
    widest range of an outcome (the exact one would take a search over all events).

    Source: the overlap sum min(P, Q) = 1 - TV is largest if what each law has above its lower bounds goes onto the
    lower bounds of the other first, then in pairs onto what both leave free, as in `topk_bounds`. With D = P - Q, the
    sums of D's positive and of its negative parts are both the TV, and so is t times the one plus 1 - t times the
    other; each term of that is largest at an end of its range, and the least sum over t lies where two ends tie.

    Raises:
        NotADistributionError: a negative or NaN bound, a lower one above its upper one, a row without a law of sum 1.

    >>> known = np.array([[0.4, 0.3, 0.3]])
    >>> boxed_tv(Box(np.array([[0.5, 0.0, 0.4]]), np.array([[0.5, 0.1, 0.5]])), Box(known, known))
    Sandwich(lower=array([0.2]), upper=array([0.3]))
    """
    for name, (lower, upper) in (("p", p), ("q", q)):
        sums = lower.sum(axis=1), upper.sum(axis=1)
        possible = (sums[0] <= 1 + TOLERANCE) & (sums[1] >= 1 - TOLERANCE)
        _check_rows(f"{name}.lower", lower, possible & (lower <= upper).all(axis=1), "a law between the bounds")
    p_rest, q_rest = (np.maximum(1 - box.lower.sum(axis=1), 0.0) for box in (p, q))
    either, both = np.maximum(p.lower, q.lower), np.minimum(p.lower, q.lower).sum(axis=1)
    p_on_q = np.minimum(p_rest, _room(p.lower, np.minimum(q.lower, p.upper)))
    q_on_p = np.minimum(q_rest, _room(q.lower, np.minimum(p.lower, q.upper)))
    in_pairs = np.minimum(np.minimum(p_rest - p_on_q, q_rest - q_on_p), _room(either, np.minimum(p.upper, q.upper)))
    least_tv = 1 - (both + p_on_q + q_on_p + in_pairs)
    low, high = p.lower - q.upper, p.upper - q.lower
    ties = np.clip(np.divide(-low, high - low, out=np.zeros_like(low), where=high > low), 0.0, 1.0)
    most_tv = 1 - both
    for t in (np.zeros(len(low)), *ties.T, np.ones(len(low))):
        most_tv = np.minimum(most_tv, np.maximum(t[:, None] * high, (t[:, None] - 1) * low).sum(axis=1))
    least_tv = np.clip(least_tv, 0.0, 1.0)
    return Sandwich(least_tv, np.clip(most_tv, least_tv, 1.0))


def one_sided(log_ratio: Float[np.ndarray, "*samples"]) -> Float[np.ndarray, "*samples"]:
    """Unbiased values for TV(P, Q) in [0, 1], from samples of P alone: max(0, 1 - Q/P).

    For i.i.d. samples x of P with log_ratio = log P(x) - log Q(x); +inf where Q(x) = 0. Source: TV = E_P[(1 -
    Q/P)+] (Canonne, note on Bretagnolle-Huber). `paired_mixture` varies less.

    Raises:
        EvaluationError: a log ratio that is NaN or -inf (impossible for a sample of P).

    >>> one_sided(np.array([0.0, np.log(4.0), -1.0]))
    array([0.  , 0.75, 0.  ])
    """
    _check_ratios("log_ratio", log_ratio, impossible=-np.inf)
    values: Float[np.ndarray, "*samples"] = -np.expm1(-np.maximum(log_ratio, 0.0))
    return values


def paired_mixture(
    log_ratio_at_p: Float[np.ndarray, "*pairs"], log_ratio_at_q: Float[np.ndarray, "*pairs"]
) -> Float[np.ndarray, "*pairs"]:
    """Unbiased values for TV(P, Q) in [0, 1], each from one sample of P and one of Q: take this one.

    |tanh(log_ratio / 2)| = |P - Q| / (P + Q) averaged over the pair: i.i.d. values for i.i.d. pairs. Both
    log ratios are log P(x) - log Q(x); infinite where one law excludes what the other gave.
    Variance at most TV (1 - TV). Source: TV is the mean of |P - Q| / (P + Q) under the mixture (P + Q) / 2.

    Raises:
        EvaluationError: NaN; -inf at a sample of P or +inf at one of Q (impossible: are the two swapped?).

    >>> paired_mixture(np.array([np.log(3.0)]), np.array([-np.inf]))
    array([0.75])
    """
    _check_ratios("log_ratio_at_p", log_ratio_at_p, impossible=-np.inf)
    _check_ratios("log_ratio_at_q", log_ratio_at_q, impossible=np.inf)
    at_p, at_q = np.abs(np.tanh(log_ratio_at_p / 2)), np.abs(np.tanh(log_ratio_at_q / 2))
    values: Float[np.ndarray, "*pairs"] = (at_p + at_q) / 2
    return values


def coupling_upper(token_log_ratio: Float[np.ndarray, "*samples tokens"]) -> Float[np.ndarray, "*samples"]:
    """Values in [0, 1] whose mean is an upper bound on the TV of sequences: 1 - prod_t min(1, Q_t / P_t).

    For i.i.d. samples of P; log P - log Q of each token given those before it, 0 where the answer has ended.
    The mean is the probability that coupling token by token (speculative decoding) parts somewhere; it lies
    between the TV and `chain_upper`. Source: Leviathan, Kalman and Matias 2023, theorem 3.5, per token.

    Raises:
        EvaluationError: a log ratio that is NaN or -inf (impossible for a sample of P).

    >>> coupling_upper(np.array([[np.log(2.0), -3.0, np.log(2.0), 0.0]]))
    array([0.75])
    """
    _check_ratios("token_log_ratio", token_log_ratio, impossible=-np.inf)
    log_kept = -np.maximum(token_log_ratio, 0.0).sum(axis=-1, dtype=np.float64)
    values: Float[np.ndarray, "*samples"] = -np.expm1(log_kept)
    return values


def chain_upper(token_tv: Float[np.ndarray, "*samples tokens"]) -> Float[np.ndarray, "*samples"]:
    """Values in [0, tokens] whose mean is an upper bound on the TV of sequences: sum_t TV(P_t, Q_t).

    For i.i.d. samples of P; the exact TV of the next-token laws after each prefix, 0 where the answer has
    ended. Cap the mean at 1, never single values: the mean of capped values can fall below the TV. For an
    interval divide by the largest number of tokens. Source: chain rule (hybrid argument).

    Raises:
        EvaluationError: a TV that is NaN or outside [0, 1].

    >>> chain_upper(np.array([[0.25, 0.5, 0.5]]))
    array([1.25])
    """
    _check_tvs(token_tv)
    sums: Float[np.ndarray, "*samples"] = token_tv.sum(axis=-1, dtype=np.float64)
    return sums


def mean_token_tv(
    token_tv: Float[np.ndarray, "*samples tokens"], lengths: Int[np.ndarray, "*samples"]
) -> Float[np.ndarray, "*samples"]:
    """Mean TV of the next-token laws along each sample, in [0, 1]: for answers too long for their own TV.

    Usually along samples of the reference. `lengths` counts the tokens of each sample, the end token
    included; the padding after them is ignored. The estimand is the mean over samples, each with equal
    weight.

    Raises:
        EvaluationError: a TV that is NaN or outside [0, 1], a length outside [1, tokens].

    >>> mean_token_tv(np.array([[0.25, 0.75, 0.0]]), np.array([2]))
    array([0.5])
    """
    _check_tvs(token_tv)
    tokens = token_tv.shape[-1]
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= tokens:
        raise EvaluationError(
            f"lengths should be between 1 and {tokens} tokens, are {lengths.min()} to {lengths.max()}"
        )
    inside = np.arange(tokens) < lengths[..., None]
    sums = np.where(inside, token_tv, 0.0).sum(axis=-1, dtype=np.float64)
    means: Float[np.ndarray, "*samples"] = sums / lengths
    return means


def topk_bounds(
    p: Mapping[int, float],
    q: Mapping[int, float],
    *,
    p_ceiling: float | None = None,
    q_ceiling: float | None = None,
) -> Interval:
    """Interval for TV(P, Q), within [0, 1], that holds for all laws with these top-k probabilities.

    `p` and `q` map tokens to probabilities. No token outside `p` is more likely under P than `p_ceiling`: by
    default the smallest one listed; give that of the k-th if `p` holds further tokens (vLLM adds the sampled
    one). The low end is attained, the high end where the vocabulary has room for two separate tails; the width
    is at most the mass of both tails. For a mean over queries take an interval's low end from the low ends, its
    high end from the high ends.
    Source: overlap sum min(P, Q) = 1 - TV as a linear programme. The number of tokens does not enter: listed
    tokens at their ceilings leave no more tail than the others can hold.

    Raises:
        NotADistributionError: nothing listed, a negative or NaN entry, a sum above 1.001.
        EvaluationError: a ceiling outside [0, 1].

    >>> low, high = topk_bounds({0: 0.5, 1: 0.2, 2: 0.1}, {0: 0.4, 1: 0.3, 3: 0.12})
    >>> round(low, 6), round(high, 6)
    (0.12, 0.4)
    """
    p, p_rest, p_ceiling = _listed("p", p, p_ceiling)
    q, q_rest, q_ceiling = _listed("q", q, q_ceiling)
    shared = sum(min(p[token], q[token]) for token in p.keys() & q.keys())
    # What Q's tail can overlap of the tokens listed for P alone, and the other way round.
    on_p = sum(min(p[token], q_ceiling) for token in p.keys() - q.keys())
    on_q = sum(min(q[token], p_ceiling) for token in q.keys() - p.keys())
    overlap = shared + min(p_rest + on_p, q_rest + on_q, p_rest + q_rest)
    return Interval(min(1.0, max(0.0, 1 - overlap)), min(1.0, max(0.0, 1 - shared)))


def pinsker(kl: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Upper bound sqrt(KL / 2) on the TV, capped at 1, from the KL divergence in nats (either direction).

    Better than `bretagnolle_huber` below about 1.59 nats; take the smaller one. The KL of sequences is the
    sum of the expected KLs of tokens. Source: Pinsker 1964 (Canonne 2022, arXiv 2202.07198).

    Raises:
        EvaluationError: a KL that is NaN or negative.

    >>> pinsker(np.array([0.5, 8.0]))
    array([0.5, 1. ])
    """
    _check_least("kl", kl)
    bound: Float[np.ndarray, "*shape"] = np.minimum(np.sqrt(kl / 2), 1.0)
    return bound


def bretagnolle_huber(kl: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Upper bound sqrt(1 - exp(-KL)) on the TV, below 1 for every finite KL, in nats (either direction).

    Source: Bretagnolle and Huber 1978 (Canonne 2022, arXiv 2202.07198).

    Raises:
        EvaluationError: a KL that is NaN or negative.

    >>> bretagnolle_huber(np.array([0.0, np.log(4.0) - np.log(3.0)]))
    array([0. , 0.5])
    """
    _check_least("kl", kl)
    bound: Float[np.ndarray, "*shape"] = np.sqrt(-np.expm1(-kl))
    return bound


def hellinger_sandwich(bc: Float[np.ndarray, "*shape"]) -> Sandwich:
    """1 - BC <= TV <= sqrt(1 - BC^2), from the Bhattacharyya coefficient BC = sum sqrt(P Q) in [0, 1].

    BC = E_P[exp(-log_ratio / 2)], whose sample means have no upper limit: for exact BCs, or as a diagnostic.
    Source: Le Cam (Canonne, note on Assouad's lemma).

    Raises:
        EvaluationError: a coefficient that is NaN or outside [0, 1].

    >>> hellinger_sandwich(np.array([0.6]))
    Sandwich(lower=array([0.4]), upper=array([0.8]))
    """
    _check_least("bc", bc, most=1.0)
    return Sandwich(1 - bc, np.sqrt((1 - bc) * (1 + bc)))


def plugin_tv(
    p_counts: Int[np.ndarray, " outcomes"], q_counts: Int[np.ndarray, " outcomes"], *, delta: float = 0.05
) -> PluginTV:
    """TV from counts of sampled outcomes alone, for models that give no probabilities.

    The value is biased upward, at P = Q by about sqrt((K - 1) / (pi n)): compare no values of different n.
    The interval, within [0, 1], adds the radius `eps_tv` of each law at delta / 2. For i.i.d. samples of each
    law, over outcomes that were fixed beforehand. Source: triangle inequality, Bretagnolle-Huber-Carol.

    Raises:
        EvaluationError: fewer than two outcomes, a negative count, no samples, `delta` outside (0, 1).

    >>> value, interval = plugin_tv(np.array([900, 100]), np.array([500, 500]))
    >>> value, round(interval.low, 3), round(interval.high, 3)
    (0.4, 0.306, 0.494)
    """
    laws, radius = [], 0.0
    for name, counts in (("p_counts", p_counts), ("q_counts", q_counts)):
        if len(counts) < 2 or counts.min() < 0 or counts.sum() == 0:
            raise EvaluationError(
                f"{name} should count at least two outcomes, none negative, not all 0; is {counts.tolist()}"
            )
        laws.append(counts / counts.sum())
        radius += eps_tv(int(counts.sum()), len(counts), delta=delta / 2)
    value = min(1.0, float(np.abs(laws[0] - laws[1]).sum()) / 2)
    return PluginTV(value, Interval(max(0.0, value - radius), min(1.0, value + radius)))


def _room(
    lower: Float[np.ndarray, "queries outcomes"], upper: Float[np.ndarray, "queries outcomes"]
) -> Float[np.ndarray, " queries"]:
    room: Float[np.ndarray, " queries"] = np.maximum(upper - lower, 0.0).sum(axis=1)
    return room


def _check_rows(
    name: str,
    rows: Float[np.ndarray, "queries outcomes"],
    right: Bool[np.ndarray, " queries"],
    expected: str,
) -> None:
    if rows.size and rows.min() < 0:
        row, column = divmod(int(rows.argmin()), rows.shape[1])
        raise NotADistributionError(f"{name}[{row}, {column}] is {rows.min()}: a probability is not negative")
    if not right.all():
        row = int(right.argmin())
        raise NotADistributionError(f"row {row} of {name} sums to {rows[row].sum()}, expected {expected}")


def _check_ratios(name: str, ratios: Float[np.ndarray, "*shape"], *, impossible: float) -> None:
    if bool(np.isnan(ratios).any()):
        raise EvaluationError(f"{name} has NaN: is a sample impossible under both models, or padding not 0?")
    if bool((ratios == impossible).any()):
        raise EvaluationError(f"{name} has {impossible}, impossible for a sample of its own law: P and Q swapped?")


def _check_tvs(token_tv: Float[np.ndarray, "*shape"]) -> None:
    _check_least("token_tv", token_tv, most=1.0)


def _check_least(name: str, values: Float[np.ndarray, "*shape"], *, most: float = math.inf) -> None:
    right = (values >= 0) & (values <= most)
    if not right.all():
        wrong = values[~right][0]
        raise EvaluationError(f"{name} should be in [0, {most}], has {wrong}")


def _listed(name: str, law: Mapping[int, float], ceiling: float | None) -> tuple[dict[int, float], float, float]:
    # The law without rounding excess, the mass of its tail, and the most that one token of the tail can have.
    total = math.fsum(law.values())
    if not law or not min(law.values()) >= 0 or not total <= 1 + EXCESS:
        raise NotADistributionError(
            f"{name} lists {len(law)} probabilities with sum {total}, expected at least one, none negative, "
            f"with a sum of at most {1 + EXCESS}"
        )
    if ceiling is not None and not 0 <= ceiling <= 1:
        raise EvaluationError(f"{name}_ceiling should be a probability, is {ceiling}")
    scale = max(1.0, total)
    masses = {token: mass / scale for token, mass in law.items()}
    return masses, max(0.0, 1 - total), min(masses.values()) if ceiling is None else ceiling
