"""Rapid Synaptic Refinement as a method: its settings, and what it leaves on disk.

What is kept is a sparse difference: the units that moved (`synapses.py`), and what was added to each, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from evaluation.reference.loop import LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from evaluation.reference.rsr.importance import Allocation, Importance
from evaluation.reference.rsr.modules import MOST_ASPECTS, aspects_of
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.trails import Trails
from evaluation.reference.rsr.training import Plan, Refinement, Schedule, replaced_after
from evaluation.reference.rsr.workers import Outcome, Workers, train_together
from icl_compiler.errors import TrainingError
from icl_compiler.models import load_causal_lm

_FILE = "difference.safetensors"
_LONGEST_PIECE = 64


@dataclass(frozen=True)
class RSR(Method):
    """Rapid Synaptic Refinement: a small set of connections is trained, in rounds.

    What earned nothing in its ablation (`docs/references.md`) is there, and off.

    Attributes:
        budget: share of the model's parameters that may ever move, in (0, 1); at a time fewer do, where units
            are replaced.
        frontier: lowest layer in which anything moves; what is below is computed once per example. By default two
            thirds of the layers are below.
        unit: numbers that move together, a divisor of the model's width; by default the largest up to 64, a piece of a
            row or column. The width moves whole rows and columns.
        rounds: of boosting; by default one an epoch.
        importance: what makes a unit important (`importance.py`).
        allocation: how units are chosen by it.
        replaced: share of the units that is replaced after the first round; it falls to 0 with a cosine. 0 keeps them.
        revert: whether a unit that is replaced gets its base back, or keeps what it learned.
        line_search: whether the step of each round is searched on the held-out examples.
        sampling: share of the examples that is kept for their residuals, and drawn from the rest; 0 takes all.
        trails: whether pheromone trails guide choice and rate.
        adaptive_rate: whether the rate follows the steps that the line search finds.
        modules: into which the units are parted by the labels they serve, each with its own step and rate; at most the
            number of labels, or 16. 1 leaves them together.
        workers: processes that train together, each with its share of the cores.
        schedule: what they share in a step: the batch (`data`, the same as one worker would do), the batch with steps
            of their own (`local`), or the modules, one each (`modules`).
        exchange_every: steps after which workers with steps of their own put together what they learned.
    """

    budget: float = 0.02
    frontier: int | None = None
    unit: int | None = None
    rounds: int | None = None
    importance: Importance = "random"
    allocation: Allocation = "gumbel"
    replaced: float = 0.0
    revert: bool = True
    line_search: bool = True
    sampling: float = 0.0
    trails: bool = False
    adaptive_rate: bool = True
    modules: int = 1
    workers: int = 1
    schedule: Schedule = "data"
    exchange_every: int = 10

    learning_rate: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        for name, share in (("budget", self.budget), ("replaced", self.replaced), ("sampling", self.sampling)):
            if not 0 <= share < 1:
                raise TrainingError(f"{name} should be a share, at least 0 and below 1, is {share:g}")
        for name in ("rounds", "modules", "workers", "exchange_every"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise TrainingError(f"{name} should be at least 1, is {count}")
        if self.modules > MOST_ASPECTS:
            raise TrainingError(f"modules should be at most {MOST_ASPECTS}, is {self.modules}")
        if self.schedule == "modules" and self.modules != self.workers:
            raise TrainingError(
                f"with schedule=modules each worker trains one module, and there are {self.workers} workers for "
                f"{self.modules} modules; give both the same number"
            )

    @property
    def description(self) -> str:
        """In words."""
        return f"RSR, {self.budget:.2%} of the parameters"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train.

        Raises:
            TrainingError: if the model does not fit the settings, or the loss is not finite.
        """
        outcome = self.train(task, loop, report) if self.workers == 1 else train_together(self, task, loop, report)[0]
        units, change = torch.from_numpy(outcome.units), torch.from_numpy(outcome.change)

        def save(folder: Path) -> None:
            from safetensors.torch import save as as_bytes

            tensors = {"units": units, "change": change}
            (folder / _FILE).write_bytes(as_bytes(tensors))

        facts = {"frontier": outcome.frontier, "size": outcome.size, "units": len(units)}
        return Fitted(outcome.curve, outcome.touched * outcome.size, save, {"synapses": facts})

    def train(
        self, task: Task, loop: LoopSettings, report: Report | None = None, workers: Workers | None = None
    ) -> Outcome:
        """Train in this process, alone or as one of several workers.

        Raises:
            TrainingError: as `fit`.
        """
        workers = workers or Workers()
        aspects = None
        if self.modules > 1:
            aspects = workers.agree(aspects_of(task.train, task.answers, seed=loop.seed))
            if (groups := int(aspects.max()) + 1) < self.modules:
                raise TrainingError(f"modules should be at most the number of labels, {groups}; is {self.modules}")
        model = task.load(task.frozen_dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        frontier = 2 * len(model.base_model.layers) // 3 if self.frontier is None else self.frontier
        synapses = Synapses(model, frontier=frontier, size=self.unit or _piece(model))
        most = int(self.budget * parameters / synapses.size)
        rounds = min(self.rounds or loop.epochs, loop.steps(len(task.train)))
        count = int(most / (1 + sum(replaced_after(self.replaced, rounds))))
        if not 0 < count <= most <= len(synapses):
            raise TrainingError(
                f"a budget of {self.budget:g} is {most:,} units of {synapses.size} numbers, and from layer {frontier} "
                f"on there are {len(synapses):,}; expected at least one at a time and at most these: set another "
                "budget or a lower --first-layer"
            )
        plan = Plan(
            count, rounds, self.importance, self.allocation, self.replaced, self.revert,
            self.line_search, self.sampling, Trails() if self.trails else None, 0.5, 0.25, self.adaptive_rate,
            self.modules, self.schedule, self.exchange_every,
        )  # fmt: skip
        objective = task.objective(model, frontier=frontier)
        run = Refinement(
            synapses,
            objective,
            train=len(task.train),
            held_out=len(task.held_out),
            plan=plan,
            loop=loop,
            workers=workers,
            aspects=aspects,
        )
        curve = run.run(report, task.checkpoint)
        units, change = (found.cpu().numpy() for found in run.best)
        return Outcome(curve, units, change, len(synapses.touched), frontier, synapses.size)

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The base model with the difference added."""
        from safetensors.torch import load

        model = load_causal_lm(manifest["base_model"], torch.float32)
        saved = load((folder / _FILE).read_bytes())
        facts = manifest["synapses"]
        Synapses(model, frontier=facts["frontier"], size=facts["size"]).add(saved["units"], saved["change"])
        return model


def _piece(model: Any) -> int:
    """The largest divisor of the model's width that is at most `_LONGEST_PIECE`."""
    width: int = model.get_input_embeddings().embedding_dim
    return next(size for size in range(min(_LONGEST_PIECE, width), 0, -1) if width % size == 0)
