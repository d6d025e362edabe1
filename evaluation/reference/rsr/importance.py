"""Which connections a task asks for: the importance of every unit, and which are chosen by it.

A *probe* computes the whole gradient on a few batches, matrix by matrix, and keeps one number per unit. Batches come in
pairs (a, b), for the default is an unbiased estimate of the squared mean gradient, that noise does not add to:

    agreement    I_u = sqrt(max(0, mean over pairs of <g_u(a), g_u(b)>))
    l1           mean over batches of |g_u|_1
    fisher       mean over batches of |g_u|^2
    sensitivity  mean over batches of |sum(w_u * g_u)|: to first order, the change of the loss if the unit were cut
    random       the same for all
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int

from evaluation.reference.rsr.synapses import Synapses

Importance = Literal["agreement", "l1", "fisher", "sensitivity", "random"]
Allocation = Literal["gumbel", "top", "matrix"]


def probe(
    synapses: Synapses,
    backward: Callable[[Sequence[int]], object],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    kind: Importance = "agreement",
    add_up: Callable[[torch.Tensor], object] | None = None,
) -> Float[torch.Tensor, " units"]:
    """The importance of every unit, at least 0.

    Args:
        backward: computes the mean loss of some examples, and its gradient.
        pairs: examples of each pair of batches.
        add_up: puts into a gradient the sum of all workers', where there are several.
    """
    scores = torch.zeros(len(synapses), device=synapses.active.device)
    if kind == "random":
        return scores + 1
    first: dict[int, torch.Tensor] = {}

    def see(number: int, gradient: torch.Tensor) -> None:
        if add_up is not None:
            add_up(gradient)
        matrix = synapses.matrices[number]
        if kind == "agreement":
            if number not in first:
                first[number] = gradient.bfloat16()
                return
            found = gradient.mul_(first.pop(number))
        elif kind == "l1":
            found = gradient.abs_()
        elif kind == "fisher":
            found = gradient.square_()
        else:
            found = gradient.mul_(synapses.weight(number))
        per_unit = synapses.per_unit(found).sum(dim=1)
        scores[matrix.first : matrix.first + len(per_unit)] += per_unit.abs() if kind == "sensitivity" else per_unit

    with synapses.probing(see):
        for pair in pairs:
            for rows in pair:
                backward(rows)
    if kind == "agreement":
        return (scores / len(pairs)).clamp_min_(0).sqrt_()
    return scores / (2 * len(pairs))


def allocate(
    synapses: Synapses,
    scores: Float[torch.Tensor, " units"],
    count: int,
    allocation: Allocation,
    generator: torch.Generator,
) -> Int[torch.Tensor, " count"]:
    """`count` units by their scores, ascending; a score of 0 is chosen last.

    - `top`: the highest.
    - `gumbel`: drawn without replacement in proportion to the scores (Gumbel top-k), so that others get a chance.
    - `matrix`: the highest of each matrix, to each its share by its number of units.
    """
    noise = -torch.empty_like(scores).exponential_(generator=generator).log_()
    keys = scores.log()
    # Where scores are the same (random, or 0), chance decides.
    chosen = torch.where(torch.isneginf(keys), noise - 1e9, keys + noise if allocation == "gumbel" else keys)
    if allocation == "top" or allocation == "matrix":
        chosen = chosen + 1e-6 * noise
    if allocation != "matrix":
        return chosen.topk(count).indices.sort().values
    quotas = _shares([matrix.rows for matrix in synapses.matrices], count)
    parts = []
    for number, (matrix, quota) in enumerate(zip(synapses.matrices, quotas, strict=True)):
        end = synapses.matrices[number + 1].first if number + 1 < len(synapses.matrices) else len(synapses)
        parts.append(chosen[matrix.first : end].topk(quota).indices + matrix.first)
    return torch.cat(parts).sort().values


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Whole numbers in proportion to `sizes`, with the sum `count`, by largest remainders."""
    exact = [count * size / sum(sizes) for size in sizes]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares
