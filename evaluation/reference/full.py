"""Full fine-tuning: all weights, or those of the upper layers.

Weights in float32, products in bfloat16 where the processor has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.reference.loop import LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from icl_compiler.errors import TrainingError
from icl_compiler.models import load_causal_lm


@dataclass(frozen=True)
class Full(Method):
    """All weights from a layer on.

    Attributes:
        first_layer: the lowest layer that is trained, with all above it and the last norm; 0 trains everything,
            embeddings too.
    """

    first_layer: int = 0

    @property
    def description(self) -> str:
        """In words."""
        return "full fine-tuning" if self.first_layer == 0 else f"fine-tuning from layer {self.first_layer} on"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train; what is kept is an ordinary checkpoint in bfloat16.

        Raises:
            TrainingError: if the model has no such layer.
        """
        model = task.load(torch.float32)
        parameters = unfreeze(model, self.first_layer)
        objective = task.objective(model, frontier=self.first_layer)
        curve = task.run_loop(objective, loop, report)

        def save(folder: Path) -> None:
            model.to(torch.bfloat16).save_pretrained(folder)

        return Fitted(curve, parameters, save)

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The fine-tuned model."""
        return load_causal_lm(str(folder), torch.float32)


def unfreeze(model: Any, first_layer: int) -> int:
    """Let the weights from `first_layer` on move, and no others; how many numbers these are.

    Raises:
        TrainingError: if the model has no such layer.
    """
    layers = model.base_model.layers
    if not 0 <= first_layer < len(layers):
        raise TrainingError(f"--first-layer should be from 0 to {len(layers) - 1} for this model, is now {first_layer}")
    model.requires_grad_(first_layer == 0)
    if first_layer:
        for module in [*layers[first_layer:], model.base_model.norm]:
            module.requires_grad_(True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
