"""LoReFT, low-rank linear subspace fine-tuning of representations (arXiv 2404.03592, equation 4).

    h' = h + R^T (W h + b - R h),   R in R^{r x d} with orthonormal rows, W in R^{r x d}, b in R^r

- After chosen layers, at the first tokens of the prompt and at the last ones: those of the template's fixed end.
  `icl_compiler/backends/hf_loreft.py` says which tokens these are, and edits.
- W starts as R and b as 0, so that training starts from the base model. (pyreft starts from a random W.)
- Kept are A = W - R, b and R, multiplied out: nothing is orthogonalised when a reference is read. What is trained is
  computed by the same steps, so that the same numbers come out before saving and after reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrizations

from evaluation.reference.loop import LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from icl_compiler.artifact import read_manifest
from icl_compiler.backends.hf_loreft import Edit, EditedTokens, Editor, edit_network
from icl_compiler.errors import TrainingError
from icl_compiler.models import load_causal_lm
from icl_compiler.templates import EncodedTemplate

if TYPE_CHECKING:
    from evaluation.reference.trainer import Reference

_FILE = "loreft.safetensors"
_TEXTS = ("x", "1", "?", "é", "one two.")


@dataclass(frozen=True)
class LoReFT(Method):
    """Low-rank edits of the residual stream, at few tokens of the prompt.

    Attributes:
        rank: of each edit.
        layers: after which layers, counted from 0; `None`: after all.
        first: how many tokens from the beginning of the prompt are edited.
        last: how many tokens from its end are edited, at most those of the template's fixed end.
        tied: whether first and last tokens share their edits.
    """

    rank: int = 4
    layers: tuple[int, ...] | None = None
    first: int = 5
    last: int = 5
    tied: bool = True

    learning_rate: ClassVar[float] = 4e-3

    @property
    def description(self) -> str:
        """In words."""
        return f"LoReFT of rank {self.rank}"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train the edits; what is kept is a file of them.

        Raises:
            TrainingError: if the model has no such layer, the rank is larger than its width, or no token is edited.
        """
        place = self._place(task.template)
        model = task.load(task.frozen_dtype).requires_grad_(False)
        config = model.config.get_text_config()
        layers = self._layers(config.num_hidden_layers)
        if not 1 <= self.rank <= config.hidden_size:
            raise TrainingError(f"the rank should be from 1 to {config.hidden_size}, is now {self.rank}")
        edits = {layer: _Learned(place.groups, self.rank, config.hidden_size).to(task.device) for layer in layers}
        model.loreft = nn.ModuleList(edits.values())
        editor = Editor(place, edits)
        editor.edit_layers(model)
        objective = task.objective(model, frontier=layers[0], watch=editor.see)
        curve = task.run_loop(objective, loop, report)

        def save(folder: Path) -> None:
            with torch.no_grad():
                save_edits({layer: edit(torch.device("cpu")) for layer, edit in edits.items()}, folder)

        return Fitted(curve, sum(p.numel() for p in objective.parameters()), save, {"edited": vars(place)})

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The base model with its residual stream edited."""
        network = load_causal_lm(manifest["base_model"], torch.float32)
        edit_network(network, edited_tokens(manifest), load_edits(folder))
        return network

    @classmethod
    def merge(cls, reference: "Reference", folder: Path) -> None:
        """Write a checkpoint that vLLM serves through the plug-in of this package; transformers does not know it."""
        from icl_compiler.backends.vllm_loreft import save_checkpoint

        manifest = read_manifest(reference.folder, kind="reference")
        base = load_causal_lm(reference.base_model, torch.bfloat16)
        save_checkpoint(base, edited_tokens(manifest), load_edits(reference.folder), folder)

    def _place(self, template: EncodedTemplate | None) -> EditedTokens:
        if template is None:
            raise TrainingError("LoReFT edits the fixed end of a template, and the task has none")
        end = query_end(template)
        last = min(self.last, len(end))
        # No more than every prompt has: an answer is not edited.
        first = min(self.first, len(template.head) + len(end))
        if first < 0 or last < 0 or first + last == 0:
            raise TrainingError(
                f"LoReFT would edit the first {first} and the last {last} tokens of a prompt, of which its template "
                f"{template.template.name!r} ends in {len(end)} fixed ones; expected at least one token"
            )
        return EditedTokens(first, last, len(template.head), end, self.tied)

    def _layers(self, count: int) -> list[int]:
        layers = sorted(set(range(count) if self.layers is None else self.layers))
        if not layers or layers[0] < 0 or layers[-1] >= count:
            raise TrainingError(f"layers to edit should be from 0 to {count - 1} for this model, are now {self.layers}")
        return layers


def query_end(template: EncodedTemplate) -> tuple[int, ...]:
    """The tokens in which every query ends, whatever its text."""
    first, *others = template.queries(_TEXTS)
    size = 0
    while size < len(first) and all(ids[-size - 1 :] == first[-size - 1 :] for ids in others):
        size += 1
    return tuple(first[len(first) - size :])


def edited_tokens(manifest: Mapping[str, Any]) -> EditedTokens:
    """Which tokens a reference edits, by its manifest."""
    facts = manifest["edited"]
    return EditedTokens(**{**facts, "end": tuple(facts["end"])})


def save_edits(edits: Mapping[int, Edit], folder: Path) -> None:
    """Write edits as `loreft.safetensors`."""
    from safetensors.torch import save

    tensors = {f"{layer}.{name}": part for layer, edit in edits.items() for name, part in edit._asdict().items()}
    (folder / _FILE).write_bytes(save({name: part.contiguous() for name, part in tensors.items()}))


def load_edits(folder: Path) -> dict[int, Edit]:
    """Read what `save_edits` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(folder / _FILE)
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {layer: Edit(*(tensors[f"{layer}.{name}"] for name in Edit._fields)) for layer in layers}


class _Learned(nn.Module):
    """The edits of one layer while they are trained; the rows of `r` stay orthonormal by its parametrisation."""

    r: torch.Tensor

    def __init__(self, groups: int, rank: int, width: int) -> None:
        super().__init__()
        start = torch.stack([nn.init.orthogonal_(torch.empty(rank, width)) for _ in range(groups)])
        self.r = nn.Parameter(start)
        self.w = nn.Parameter(start.clone())
        self.b = nn.Parameter(torch.zeros(groups, rank))
        parametrizations.orthogonal(self, "r")

    def forward(self, device: torch.device) -> Edit:
        with torch.autocast(self.b.device.type, enabled=False):
            r = self.r
            return Edit((self.w - r).to(device), self.b.to(device), r.to(device))
