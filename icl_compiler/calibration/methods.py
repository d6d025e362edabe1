"""The methods: each fits the numbers of a `Calibration` to held-out queries.

A method is a function of `HeldOut`; it gives variants of itself (a grid of strengths, always of the same length), or
nothing where what it needs was not asked. P is the model's law of the label words, y a label, x a query.

    none            P(y | x)
    normalise       P(y | x) / sum over labels
    temperature     softmax of log P(y | x) / T                                   T fitted          (Guo 2017)
    batch           P(y | x) / mean of P(y | x') over held-out queries x'         no label is used  (Zhou 2023)
    pmi             P(y | x) / P(y | the template without text or shots)          1 prompt more     (Holtzman 2021)
    contextual      P(y | x) / mean of P(y | "N/A", "[MASK]" or no text)          21 prompts more   (Zhao 2021)
    domain-context  P(y | x) / mean of P(y | random words of the domain)          21 prompts more   (Fei 2023)
    bias            softmax of log P(y | x) / T + offset(y)                       T, offsets fitted
    mixture         (1 - w) softmax of log P(y | x) / T + w votes                 T, w fitted
    product         softmax of log P(y | x) / T + w log votes + offset(y)         T, w, offsets fitted, or no offsets
    knn             (1 - w) softmax of log P(y | x) / T + w votes of the held-out queries with the most similar
                    answers                                                       T, w fitted       (Xu 2023)

- A program has other shots for each query. The priors of `contextual` and `domain-context` are therefore means over
  the shots of held-out queries, taken once: a query costs no further call of the model.
- Numbers are fitted by log-loss, against labels or the law of a reference, with normal priors so weak that ten queries
  outweigh them, except those of the offsets: 150 offsets and 200 queries overfit, so that their width is chosen.
- Where a reference is to be approximated, scale, weight, the size of the offsets and the score of "other" (where the
  reference leaves it a hundredth or more), four numbers at most, are then fitted by the total variation to its law,
  which is what counts: log-loss would have them too cautious. A nat of log-loss still counts as 0.03 of it: total
  variation alone would have an answer as sure as it can be wherever it is mostly right, which brings the gap no further
  down (`docs/calibration.md`).
- Arithmetic is by element: a matrix product this small, on the threads of a busy machine, takes many times longer.
- The form of a vote (how many, how sharp) is that whose votes alone have the lowest log-loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import logit, logsumexp

from icl_compiler.calibration.held_out import LEAST_PROBABILITY, HeldOut, log_loss
from icl_compiler.calibration.law import Anchors, Calibration, Law, nearest_answers, softmax
from icl_compiler.calibration.votes import Vote, Voters, law_of_votes, smoothed

_WIDTHS = (0.1, 0.3, 1.0)  # of the offsets' normal prior
_LOOSE = 3.0  # width of the prior of every other number
_VOTES = (*(Vote(k) for k in (4, 8, 16, 32)), *(Vote(k, s) for k in (16, 64) for s in (10.0, 20.0, 40.0)))
_ANSWER_VOTES = tuple(Vote(k) for k in (1, 3, 7, 15, 31))
_SMOOTHINGS = (0.01, 0.1, 0.3)
_OF_LOG_LOSS = 0.03  # total variation that a nat is worth
_LEAST_START, _FIRST_STEP, _MOST_TRIED = 0.05, 0.6, 80  # of the search for the nearest, the last for each number
_LEAST_OTHER = 0.01  # mean share that a reference leaves to "other", from which on it is fitted
MOST_VOTERS = max(vote.k for vote in _VOTES)


def none(held_out: HeldOut) -> list[Calibration]:
    """The model's law as it is."""
    return [Calibration()]


def normalise(held_out: HeldOut) -> list[Calibration]:
    """Nothing is left to "other"."""
    return [Calibration("normalise")]


def temperature(held_out: HeldOut) -> list[Calibration]:
    """One number for all labels (Guo et al. 2017, arXiv 1706.04599)."""
    numbers, _ = _fit([held_out.evidence.middle], held_out.targets, [1.0])
    return [_nearest(held_out, Calibration("temperature", scale=numbers[0]))]


def batch(held_out: HeldOut) -> list[Calibration]:
    """Batch calibration (Zhou et al. 2023, arXiv 2309.17249), its prior taken once."""
    return [Calibration("batch", offsets=_against(softmax(held_out.evidence.middle).mean(axis=0)))]


def pmi(held_out: HeldOut) -> list[Calibration]:
    """Domain-conditional pointwise mutual information (Holtzman et al. 2021, arXiv 2104.08315)."""
    return _without_prior(held_out, "pmi")


def contextual(held_out: HeldOut) -> list[Calibration]:
    """Contextual calibration (Zhao et al. 2021, arXiv 2102.09690), diagonal."""
    return _without_prior(held_out, "contextual")


def domain_context(held_out: HeldOut) -> list[Calibration]:
    """Domain-context calibration (Fei et al. 2023, arXiv 2305.19148)."""
    return _without_prior(held_out, "domain-context")


def bias(held_out: HeldOut) -> list[Calibration]:
    """A temperature and an offset for each label, for several widths of the offsets' prior."""
    _, *shrunk = _fit_with_offsets([held_out.evidence.middle], held_out.targets, [1.0])
    return [_nearest(held_out, Calibration("bias", scale, offsets)) for [scale], offsets in shrunk]


def mixture(held_out: HeldOut) -> list[Calibration]:
    """Model and votes, a linear pool."""
    if held_out.evidence.voters is None:
        return []
    vote, votes = _best_vote(held_out.evidence.voters, _VOTES, held_out.targets)
    scale, weight = _fit_mixture(held_out.evidence.middle, votes, held_out.targets)
    return [_nearest(held_out, Calibration("mixture", scale=scale, vote=vote, weight=weight), votes)]


def product(held_out: HeldOut) -> list[Calibration]:
    """Model and votes, a logarithmic pool; without offsets, and with some for several widths of their prior."""
    if held_out.evidence.voters is None:
        return []
    vote, votes = _best_vote(held_out.evidence.voters, _VOTES, held_out.targets)
    heard = votes.sum(axis=1, keepdims=True) > 0
    logs = np.log(np.where(heard, np.maximum(votes, LEAST_PROBABILITY), 1.0))
    fits = _fit_with_offsets([held_out.evidence.middle, logs], held_out.targets, [1.0, 0.0])
    return [
        _nearest(held_out, Calibration("product", scale, offsets, vote, "log", weight), votes)
        for [scale, weight], offsets in fits
    ]


def knn(held_out: HeldOut) -> list[Calibration]:
    """kNN prompting (Xu et al. 2023, arXiv 2303.13824), over the labels; all held-out queries become anchors."""
    if not held_out.of_pool:
        return []  # a program keeps the labels of its pool only
    logprobs = held_out.evidence.middle
    others = np.where(np.eye(len(logprobs), dtype=bool), -1, held_out.labels[None, :])
    vote, votes = _best_vote(nearest_answers(logprobs, logprobs, others), _ANSWER_VOTES, held_out.targets)
    scale, weight = _fit_mixture(logprobs, votes, held_out.targets)
    anchors = Anchors(held_out.rows, logprobs)
    return [_nearest(held_out, Calibration("knn", scale=scale, vote=vote, weight=weight, anchors=anchors), votes)]


def _without_prior(held_out: HeldOut, method: str) -> list[Calibration]:
    if method not in held_out.priors:
        return []
    return [Calibration(method, offsets=_against(held_out.priors[method]))]


def _against(prior: Float[np.ndarray, " labels"]) -> Float[np.ndarray, " labels"]:
    offsets: Float[np.ndarray, " labels"] = -np.log(np.maximum(prior, LEAST_PROBABILITY))
    return offsets


def _best_vote(
    voters: Voters, votes: Sequence[Vote], targets: Float[np.ndarray, "queries labels"]
) -> tuple[Vote, Float[np.ndarray, "queries labels"]]:
    best: tuple[float, Vote, Float[np.ndarray, "queries labels"]] | None = None
    for vote in votes:
        counted = law_of_votes(voters, vote, targets.shape[1])
        for smoothing in _SMOOTHINGS:
            law = smoothed(counted, smoothing)
            loss = float(log_loss(law, targets).mean())
            if best is None or loss < best[0]:
                best = loss, vote._replace(smoothing=smoothing), law
    assert best is not None
    return best[1:]


def _fit(
    features: Sequence[Float[np.ndarray, "queries labels"]],
    targets: Float[np.ndarray, "queries labels"],
    usual: Sequence[float],
    *,
    width: float | None = None,
    begin: Sequence[float] | None = None,
) -> tuple[list[float], Float[np.ndarray, " offsets"]]:
    """Numbers >= 0 and offsets (none without a `width`) of least log-loss of softmax(sum number * feature + offset)."""
    queries, labels = targets.shape
    stacked, centre, count = np.stack(features), np.array(usual), len(usual)
    mass = targets.sum(axis=1, keepdims=True)

    def loss(unknown: Float[np.ndarray, " unknown"]) -> tuple[float, Float[np.ndarray, " unknown"]]:
        numbers, offsets = unknown[:count], unknown[count:]
        scores = (numbers[:, None, None] * stacked).sum(axis=0)
        scores = scores + offsets if width else scores
        scores -= scores.max(axis=1, keepdims=True)
        powers = np.exp(scores)
        total = powers.sum(axis=1, keepdims=True)
        value = float((mass * np.log(total) - (targets * scores).sum(axis=1, keepdims=True)).sum())
        slope = mass * powers / total - targets
        value += float(((numbers - centre) ** 2).sum()) / (2 * _LOOSE**2)
        gradient = [(stacked * slope).sum(axis=(1, 2)) + (numbers - centre) / _LOOSE**2]
        if width:
            value += float((offsets**2).sum()) / (2 * width**2)
            gradient.append(slope.sum(axis=0) + offsets / width**2)
        return value / queries, np.concatenate(gradient) / queries

    unknown = [*usual, *[0.0] * (labels if width else 0)]
    bounds = [(0.0, None)] * count + [(None, None)] * (len(unknown) - count)
    found = minimize(loss, np.array(begin or unknown), jac=True, method="L-BFGS-B", bounds=bounds).x
    return found[:count].tolist(), found[count:]


def _fit_with_offsets(
    features: Sequence[Float[np.ndarray, "queries labels"]],
    targets: Float[np.ndarray, "queries labels"],
    usual: Sequence[float],
) -> list[tuple[list[float], Float[np.ndarray, " labels"] | None]]:
    """`_fit` without offsets, and then with some for each width of their prior, each from where the last one ended."""
    numbers, _ = _fit(features, targets, usual)
    found: list[tuple[list[float], Float[np.ndarray, " labels"] | None]] = [(numbers, None)]
    offsets = np.zeros(targets.shape[1])
    for width in _WIDTHS:
        numbers, offsets = _fit(features, targets, usual, width=width, begin=[*numbers, *offsets])
        found.append((numbers, offsets))
    return found


def _fit_mixture(
    logprobs: Float[np.ndarray, "queries labels"],
    votes: Float[np.ndarray, "queries labels"],
    targets: Float[np.ndarray, "queries labels"],
) -> tuple[float, float]:
    """Scale and weight of least log-loss of (1 - weight) softmax(scale * logprobs) + weight * votes."""
    queries = len(targets)
    heard = votes.sum(axis=1, keepdims=True) > 0

    def loss(unknown: Float[np.ndarray, " 2"]) -> tuple[float, Float[np.ndarray, " 2"]]:
        scale, weight = unknown[0], np.where(heard, unknown[1], 0.0)
        law = softmax(scale * logprobs)
        pooled = np.maximum((1 - weight) * law + weight * votes, LEAST_PROBABILITY)
        value = -float((targets * np.log(pooled)).sum()) + (scale - 1) ** 2 / (2 * _LOOSE**2)
        shares = targets / pooled
        of_scale = -(shares * (1 - weight) * law * (logprobs - (law * logprobs).sum(axis=1, keepdims=True))).sum()
        of_weight = -(shares * (votes - law) * heard).sum()
        return value / queries, np.array([of_scale + (scale - 1) / _LOOSE**2, of_weight]) / queries

    [alone], _ = _fit([logprobs], targets, [1.0])
    start = np.array([alone, 0.5])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None), (0.0, 1.0)]).x
    return float(found[0]), float(found[1])


class _Start(NamedTuple):
    """Where the search for a number begins, between what it lies, and how far the first step goes."""

    value: float
    least: float = 0.0
    most: float = np.inf
    step: float = 0.0


def _nearest(
    held_out: HeldOut, fitted: Calibration, votes: Float[np.ndarray, "queries labels"] | None = None
) -> Calibration:
    """With the scale, the weight and the size of the offsets that bring it nearest to the reference, if there is one.

    By total variation and a little log-loss; from what log-loss alone found, by the simplex of Nelder and Mead, as
    total variation has corners.
    """
    if held_out.reference is None:
        return fitted
    logprobs = held_out.evidence.middle
    start = {"scale": _Start(max(fitted.scale, _LEAST_START))}
    if fitted.offsets is not None:
        start["size"] = _Start(1.0)
    if votes is not None:
        most = 1.0 if fitted.pooling == "linear" else np.inf
        start["weight"] = _Start(max(fitted.weight, _LEAST_START), most=most)
    others = float(1 - held_out.targets.sum(axis=1).mean())
    if others >= _LEAST_OTHER:
        even = np.median(logsumexp(fitted.scores(logprobs, votes), axis=1)) + logit(min(others, 1 - _LEAST_OTHER))
        start["other"] = _Start(float(even), least=-np.inf, step=1.0)

    def told(numbers: Float[np.ndarray, " numbers"]) -> Calibration:
        named = dict(zip(start, numbers.tolist(), strict=True))
        size = named.pop("size", 1.0)
        return replace(fitted, offsets=None if fitted.offsets is None else fitted.offsets * size, **named)

    def cost(calibration: Calibration) -> float:
        law = calibration.combined(logprobs, votes)
        return float((held_out.risks(Law(law)) + _OF_LOG_LOSS * log_loss(law, held_out.targets)).mean())

    def cost_of(numbers: Float[np.ndarray, " numbers"]) -> float:
        return cost(told(numbers))

    first = np.array([each.value for each in start.values()])
    steps = [each.step or _FIRST_STEP * each.value for each in start.values()]
    inside = [
        step if each.value + step <= each.most else -step for step, each in zip(steps, start.values(), strict=True)
    ]
    found = minimize(
        cost_of,
        first,
        method="Nelder-Mead",
        bounds=[(each.least, each.most) for each in start.values()],
        options={
            "initial_simplex": np.stack([first, *(first + np.diag(inside))]),
            "xatol": 1e-3,
            "fatol": 1e-5,
            "maxfev": _MOST_TRIED * len(first),
        },
    ).x
    return min(told(found), fitted, key=cost)
