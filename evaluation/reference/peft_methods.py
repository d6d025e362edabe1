"""LoRA and SHiRA by peft: a few trained numbers beside the frozen weights of every linear layer but the output layer.

- The base model is frozen, in bfloat16 where the processor computes in it; what is trained is float32.
- What is saved is peft's own: `PeftModel.from_pretrained(base, folder)` reads it, and vLLM serves LoRA by
  `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`.
- peft sizes SHiRA by a whole number r, of r (m + n) entries in an m x n matrix. Here r is a fraction, so that any share
  is met: each mask holds the nearest whole number of entries, and is filled up with zeros when it is saved.
- Each mask is drawn on its own, from torch's stream, so that the same seed draws it again. peft draws the same
  one for all matrices of a shape.
- There is no dropout: a batch is a tree in which examples share tokens, and would share what is dropped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from evaluation.reference.loop import LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from icl_compiler.errors import MissingDependencyError, ModelError, TrainingError
from icl_compiler.models import load_causal_lm

_LINEAR: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class LoRA(Method):
    """y = W x + (alpha / rank) B A x, with W frozen and B = 0 at first (arXiv 2106.09685, section 4.1).

    Attributes:
        rank: rows of A, columns of B; at least 1.
        alpha: scale of the change; above 0.
    """

    rank: int = 8
    alpha: int = 16

    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise TrainingError(
                f"LoRA's rank should be at least 1 and its alpha above 0, are now {self.rank} and {self.alpha}"
            )

    @property
    def description(self) -> str:
        """In words."""
        return f"LoRA, rank {self.rank}"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train A and B; what is kept is peft's adapter.

        Raises:
            MissingDependencyError: if peft is not installed.
        """
        peft = _peft()
        adapted = peft.get_peft_model(
            task.load(task.frozen_dtype), peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, **_LINEAR)
        )
        return _fitted(adapted, task, loop, report)

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The base model with B A added to its weights.

        Raises:
            MissingDependencyError: if peft is not installed.
            ModelError: if the base model is not there, or not the one that was adapted.
        """
        return _merged(folder, manifest["base_model"])


@dataclass(frozen=True)
class SHiRA(Method):
    """y = (W + S) x, with W frozen and S zero but for random entries of each matrix (arXiv 2406.13175, section 3).

    Attributes:
        share: trained numbers, of all parameters of the model; in (0, 1).
    """

    share: float = 0.02

    learning_rate: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise TrainingError(f"SHiRA's share of the parameters should lie between 0 and 1, is now {self.share:g}")

    @property
    def description(self) -> str:
        """In words."""
        return f"SHiRA, {100 * self.share:g} % of the parameters"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train the entries of a random mask; what is kept is peft's adapter.

        Raises:
            MissingDependencyError: if peft is not installed.
            TrainingError: if a matrix has fewer entries than its part of the share.
        """
        peft = _peft()
        model = task.load(task.frozen_dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        config = peft.ShiraConfig(r=1, **_LINEAR)
        config.mask_fn = None
        adapted = peft.get_peft_model(model, config)
        layers = [layer for layer in model.modules() if hasattr(layer, "shira_weight")]
        shapes = [layer.get_base_layer().weight.shape for layer in layers]
        a_rank = sum(sum(shape) for shape in shapes) / parameters
        largest = min(math.prod(shape) // sum(shape) for shape in shapes)
        config.r = math.ceil(self.share / a_rank)
        if config.r > largest:
            raise TrainingError(
                f"SHiRA's share of the parameters should be at most {largest * a_rank:.3f} for this model, "
                f"is now {self.share:g}"
            )
        for layer, shape in zip(layers, shapes, strict=True):
            entries = torch.randperm(math.prod(shape))[: round(self.share / a_rank * sum(shape))].sort().values
            layer.shira_indices["default"] = torch.stack(torch.unravel_index(entries, shape)).int()
            layer.shira_weight["default"] = torch.nn.Parameter(torch.zeros(len(entries), device=task.device))
        fitted = _fitted(adapted, task, loop, report)
        for layer, shape in zip(layers, shapes, strict=True):
            for values in (layer.shira_indices, layer.shira_weight):
                missing = config.r * sum(shape) - values["default"].shape[-1]
                values["default"] = torch.nn.functional.pad(values["default"].detach(), (0, missing))
        return fitted

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The base model with S added to its weights.

        Raises:
            MissingDependencyError: if peft is not installed.
            ModelError: if the base model is not there, or not the one that was adapted.
        """
        return _merged(folder, manifest["base_model"])


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"LoRA and SHiRA need the package {error.name!r}: pip install 'icl-compiler[lora]'"
        ) from error
    # Off is the default, of which torch warns until it is said.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return peft


def _fitted(adapted: Any, task: Task, loop: LoopSettings, report: Report | None) -> Fitted:
    from safetensors.torch import save_file

    objective = task.objective(adapted.get_base_model())
    curve = task.run_loop(objective, loop, report)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = task.model
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes from process to process
    config.inference_mode = True

    def save(folder: Path) -> None:
        config.save_pretrained(str(folder))
        # peft's own save_pretrained would write a README.md beside it.
        tensors = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
        save_file(tensors, folder / "adapter_model.safetensors")

    return Fitted(curve, sum(parameter.numel() for parameter in objective.parameters()), save)


def _merged(folder: Path, base_model: str) -> Any:
    peft = _peft()
    base = load_causal_lm(base_model, torch.float32)
    try:
        return peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the adapter in {str(folder)!r} does not fit the model {base_model!r}; expected the weights that it was "
            f"trained on: {str(error).splitlines()[0]}"
        ) from error
