"""What a method of fine-tuning is: how it trains, what it keeps, how that is read again.

A method is a frozen dataclass of its own settings; `METHODS` names them. What all have in common (splits, template,
folder, manifest) stands in `trainer.py`, the loss in `objective.py`, the loop in `loop.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from evaluation.reference.loop import Check, LoopSettings, Report
from evaluation.reference.objective import AnswerLoss, TrainingExample
from icl_compiler.models import load_causal_lm

METHODS: Mapping[str, str] = {
    "full": "evaluation.reference.full:Full",
}


@dataclass(frozen=True)
class Task:
    """What is to be learned, by which model, on which device.

    Attributes:
        model: an embedded model, a folder, or a name on the model hub.
        labels: of a classification, in the order of all probabilities; each example's label stands in `answers`.
    """

    model: str
    train: Sequence[TrainingExample]
    held_out: Sequence[TrainingExample]
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    gpu: bool = field(default_factory=torch.cuda.is_available)

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def bfloat16(self) -> bool:
        """Whether products are computed in bfloat16: where the processor does."""
        return self.gpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    @property
    def frozen_dtype(self) -> torch.dtype:
        """In which weights that do not move are best held."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def load(self, dtype: torch.dtype) -> Any:
        """The base model on the device, ready to train; nothing of it is frozen."""
        network: Any = load_causal_lm(self.model, dtype)
        return network.to(self.device).train()

    def objective(self, model: Any, *, frontier: int = 0) -> AnswerLoss:
        """The loss of `model`, of which nothing below layer `frontier` moves."""
        return AnswerLoss(model, self.train, self.held_out, frontier=frontier, bfloat16=self.bfloat16)


class Fitted(NamedTuple):
    """What training gave.

    Attributes:
        curve: every look at the held-out examples.
        trained_parameters: how many numbers could move.
        save: writes what was learned into an empty folder.
        facts: more for the manifest, if the method has more to say.
    """

    curve: list[Check]
    trained_parameters: int
    save: Callable[[Path], None]
    facts: Mapping[str, Any] = {}


@runtime_checkable
class Method(Protocol):
    """A way to fine-tune."""

    @property
    def description(self) -> str:
        """In words, as it stands in reports: `full fine-tuning`."""

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train the base model of `task`, and end at the best held-out loss."""

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The model with what was learned, from what `Fitted.save` wrote; weights in float32, on the processor."""


def name_of(method: Method) -> str:
    """The name of a method in `METHODS`.

    >>> from evaluation.reference.full import Full
    >>> name_of(Full())
    'full'
    """
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    return next(name for name, known in METHODS.items() if known == path)
