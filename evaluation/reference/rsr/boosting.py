"""Training in rounds, as boosting: each fits what is still wrong, and its step is found on held-out examples.

- Round r adds a function f_r to F. Its step nu_r minimises the held-out loss of F + nu_r f_r over the logits, which is
  convex in nu_r; with several modules, one step each.
- Influential examples first: of the training examples, the share `a` with the largest residual (1 minus the
  probability of the answer, as last seen) is kept, the same share of all is drawn from the rest, with the weight that
  keeps the loss unbiased (one-sided sampling, as in LightGBM, Ke et al. 2017).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from scipy.optimize import minimize

from evaluation.reference.objective import LOGIT_ROWS, AnswerLogits

_LONGEST = 2.0


def best_steps(before: AnswerLogits, after: Sequence[AnswerLogits]) -> Float[np.ndarray, " ways"]:
    """The steps nu in [0, 2] that minimise the mean loss of `before + sum over k of nu_k * (after[k] - before)`.

    >>> before = AnswerLogits(torch.zeros(2, 2), torch.tensor([0, 1]), [1, 1])
    >>> after = before._replace(logits=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # right once, wrong once
    >>> best_steps(before, [after]).round(3).tolist()
    [0.0]
    """

    def loss_and_slope(steps: Float[np.ndarray, " ways"]) -> tuple[float, Float[np.ndarray, " ways"]]:
        nu = torch.tensor(steps, dtype=torch.float32, device=before.targets.device, requires_grad=True)
        total = 0.0
        for begin in range(0, len(before.targets), LOGIT_ROWS):
            rows = slice(begin, begin + LOGIT_ROWS)
            start = before.logits[rows].float()
            moved = start
            for k, end in enumerate(after):
                moved = moved + nu[k] * (end.logits[rows].float() - start)
            loss = torch.nn.functional.cross_entropy(moved, before.targets[rows], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.item()
        assert nu.grad is not None
        return total / len(before.lengths), nu.grad.double().cpu().numpy() / len(before.lengths)

    first = np.ones(len(after))
    found = minimize(
        loss_and_slope,
        first,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, _LONGEST)] * len(after),
        options={"maxiter": 5, "ftol": 1e-4},
    )
    steps: Float[np.ndarray, " ways"] = found.x
    return steps


class Sample(NamedTuple):
    """Examples of a round, and what each counts."""

    rows: Int[np.ndarray, " rows"]
    weights: Float32[np.ndarray, " rows"]


def one_sided(residuals: Float[np.ndarray, " examples"], share: float, stream: np.random.Generator) -> Sample:
    """The `share` of the examples with the largest residuals, and as many drawn from the rest, weighted.

    >>> one_sided(np.array([0.9, 0.1, 0.2, 0.8]), 0.25, np.random.default_rng(0)).weights.tolist()
    [1.0, 3.0]
    """
    count = max(1, round(share * len(residuals)))
    order = np.argsort(-residuals, kind="stable")
    top, rest = order[:count], order[count:]
    drawn = stream.choice(rest, size=min(count, len(rest)), replace=False)
    weights = np.ones(len(top) + len(drawn), dtype=np.float32)
    if len(drawn):
        weights[len(top) :] = len(rest) / len(drawn)
    return Sample(np.concatenate([top, drawn]), weights)
