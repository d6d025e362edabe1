"""Rapid Synaptic Refinement as a method: its settings, and what it leaves on disk.

What is kept is a sparse difference: the units that moved (`synapses.py`), and what was added to each, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.reference.loop import LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from evaluation.reference.rsr.importance import Allocation, Importance
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.trails import Trails
from evaluation.reference.rsr.training import Plan, Refinement
from icl_compiler.errors import TrainingError
from icl_compiler.models import load_causal_lm

_FILE = "difference.safetensors"


@dataclass(frozen=True)
class RSR(Method):
    """Rapid Synaptic Refinement: a small, changing set of connections is trained, in rounds.

    Attributes:
        budget: share of the model's parameters that moves at a time, in (0, 1).
        frontier: lowest layer in which anything moves; what is below is computed once per example. By default two
            thirds of the layers are below.
        unit: numbers that move together, a divisor of the model's width; by default the width: whole rows and columns.
        rounds: of boosting.
        importance: what makes a unit important (`importance.py`).
        allocation: how units are chosen by it.
        replaced: share of the units that is replaced after the first round; it falls to 0 with a cosine. 0 keeps them.
        revert: whether a unit that is replaced gets its base back, or keeps what it learned.
        line_search: whether the step of each round is searched on the held-out examples.
        sampling: share of the examples that is kept for their residuals, and drawn from the rest; 0 takes all.
        trails: whether pheromone trails guide choice and rate.
        adaptive_rate: whether the rate follows the steps that the line search finds.
    """

    budget: float = 0.01
    frontier: int | None = None
    unit: int | None = None
    rounds: int = 6
    importance: Importance = "agreement"
    allocation: Allocation = "gumbel"
    replaced: float = 0.3
    revert: bool = False
    line_search: bool = True
    sampling: float = 0.0
    trails: bool = True
    adaptive_rate: bool = True

    def __post_init__(self) -> None:
        for name, share in (("budget", self.budget), ("replaced", self.replaced), ("sampling", self.sampling)):
            if not 0 <= share < 1:
                raise TrainingError(f"{name} should be a share, at least 0 and below 1, is {share:g}")
        if self.rounds < 1:
            raise TrainingError(f"rounds should be at least 1, is {self.rounds}")

    @property
    def description(self) -> str:
        """In words."""
        return f"RSR, {self.budget:.2%} of the parameters"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train.

        Raises:
            TrainingError: if the model does not fit the settings, or the loss is not finite.
        """
        model = task.load(task.frozen_dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        frontier = 2 * len(model.base_model.layers) // 3 if self.frontier is None else self.frontier
        synapses = Synapses(model, frontier=frontier, size=self.unit)
        count = round(self.budget * parameters / synapses.size)
        if not 0 < count <= len(synapses):
            raise TrainingError(
                f"a budget of {self.budget:g} is {count:,} units of {synapses.size} numbers, and from layer {frontier} "
                f"on there are {len(synapses):,}; expected at least 1 and at most these"
            )
        plan = Plan(
            count, self.rounds, self.importance, self.allocation, self.replaced, self.revert, self.line_search,
            self.sampling, Trails() if self.trails else None, 0.5, 0.25, self.adaptive_rate,
        )  # fmt: skip
        objective = task.objective(model, frontier=frontier)
        run = Refinement(synapses, objective, train=len(task.train), held_out=len(task.held_out), plan=plan, loop=loop)
        curve = run.run(report, task.checkpoint)
        units, change = run.best
        trained = len(synapses.touched) * synapses.size

        def save(folder: Path) -> None:
            from safetensors.torch import save as as_bytes

            tensors = {"units": units.cpu(), "change": change.cpu().contiguous()}
            (folder / _FILE).write_bytes(as_bytes(tensors))

        return Fitted(
            curve, trained, save, {"synapses": {"frontier": frontier, "size": synapses.size, "units": len(units)}}
        )

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The base model with the difference added."""
        from safetensors.torch import load

        model = load_causal_lm(manifest["base_model"], torch.float32)
        saved = load((folder / _FILE).read_bytes())
        facts = manifest["synapses"]
        Synapses(model, frontier=facts["frontier"], size=facts["size"]).add(saved["units"], saved["change"])
        return model
