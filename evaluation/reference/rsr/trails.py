"""Pheromone trails: what earlier rounds, and other modules, learned about which units are worth it.

    evaporate, deposit   tau <- (1 - rho) tau + rho d
    diffuse              tau <- (1 - D) tau + D (1/4, 1/2, 1/4) over the layers, within a kind of matrix

`d_u` is the loss reduction credited to unit u in the round: the sum over steps of -<g_u, step_u>, scaled to a mean of 1
over the units that moved, at most `_MOST`; 0 where nothing moved. A trail is 1 to begin with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from evaluation.reference.rsr.synapses import Matrix

_MOST = 100.0


@dataclass(frozen=True)
class Trails:
    """How trails form.

    Attributes:
        evaporation: rho, from 0 (nothing is ever deposited) to 1 (only the last round counts).
        diffusion: D, from 0 to 1.
    """

    evaporation: float = 0.3
    diffusion: float = 0.1

    def after(
        self,
        trail: Float[torch.Tensor, " units"],
        active: Int[torch.Tensor, " active"],
        credit: Float[torch.Tensor, " active"],
        matrices: Sequence[Matrix],
    ) -> Float[torch.Tensor, " units"]:
        """The trails after a round in which `active` moved and earned `credit`.

        >>> both = [Matrix("layers.0.q", 0, "q", 2, False, 0), Matrix("layers.1.q", 1, "q", 2, False, 2)]
        >>> Trails(0.5, 0.0).after(torch.ones(4), torch.tensor([0, 1]), torch.tensor([3.0, 1.0]), both)
        tensor([1.2500, 0.7500, 0.5000, 0.5000])
        """
        earned = credit.clamp_min(0)
        deposit = torch.zeros_like(trail)
        deposit[active] = (earned / earned.mean().clamp_min(1e-30)).clamp_max(_MOST)
        mixed = (1 - self.evaporation) * trail + self.evaporation * deposit
        ends = [*(matrix.first for matrix in matrices[1:]), len(trail)]
        kinds: dict[str, list[slice]] = {}
        for matrix, end in zip(matrices, ends, strict=True):
            kinds.setdefault(matrix.kind, []).append(slice(matrix.first, end))
        for parts in kinds.values():
            layers = torch.stack([mixed[part] for part in parts])
            below = torch.cat([layers[:1], layers[:-1]])
            above = torch.cat([layers[1:], layers[-1:]])
            spread = (1 - self.diffusion) * layers + self.diffusion * (below / 4 + layers / 2 + above / 4)
            for part, values in zip(parts, spread, strict=True):
                mixed[part] = values
        return mixed
