"""Full fine-tuning: the loss is the mean negative log-likelihood of the label word after the prompt without shots.

- Weights in float32, computation in bfloat16 (autocast) where the processor has it.
- `first_layer > 0` trains the layers from there on, with the last norm, and nothing below: what stands below is
  computed once per example and kept, so that from the second epoch on it costs nothing.
- A batch is a tree of tokens (`icl_compiler/prefix_tree.py`): the instruction that all examples share is computed
  once a step, and there is no padding. The gradient is the same.
- The output layer, over the whole vocabulary, is computed at the answer's positions only.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from icl_compiler.errors import TrainingError
from icl_compiler.prefix_tree import PrefixTree


class TrainingExample(NamedTuple):
    """A prompt without shots, and the answer to be learned, terminator included."""

    prompt: Sequence[int]
    answer: Sequence[int]


class FullFineTuning:
    """A causal language model of `transformers`, all of it or its upper layers trainable.

    Args:
        model: loaded in float32.
        first_layer: the lowest layer that is trained; 0 trains everything, embeddings too.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[TrainingExample],
        held_out: Sequence[TrainingExample],
        *,
        first_layer: int = 0,
        bfloat16: bool = True,
    ) -> None:
        layers = len(model.base_model.layers)
        if not 0 <= first_layer < layers:
            raise TrainingError(f"--first-layer should be from 0 to {layers - 1} for this model, is now {first_layer}")
        self._model = model
        self._bfloat16 = bfloat16
        self._device = next(model.parameters()).device
        self._examples = {False: train, True: held_out}
        self._lower, self._upper = _split(model.base_model, first_layer)
        for parameter in model.parameters():
            parameter.requires_grad_(first_layer == 0)
        if first_layer:
            for parameter in [*self._upper.layers.parameters(), *self._upper.norm.parameters()]:
                parameter.requires_grad_(True)
        self._first_layer = first_layer
        self._inputs: dict[tuple[bool, int], torch.Tensor] = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that move."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def losses(self, rows: Sequence[int], *, held_out: bool) -> torch.Tensor:
        """Negative log-likelihood, in nats, of each example's answer."""
        examples = [self._examples[held_out][row] for row in rows]
        sequences = [[*example.prompt, *example.answer[:-1]] for example in examples]
        tree = PrefixTree.build(sequences)
        predicting = [path[len(e.prompt) - 1 :] for e, path in zip(examples, tree.paths, strict=True)]
        positions = torch.from_numpy(tree.positions)[None].to(self._device)
        mask = torch.from_numpy(tree.ancestors)[None, None].to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            if self._first_layer:
                inputs = {"inputs_embeds": self._lower_output(tree, rows, held_out, positions, mask)}
            else:
                inputs = {"input_ids": torch.from_numpy(tree.tokens)[None].to(self._device)}
            hidden = self._upper(
                **inputs, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state[0]
            states = hidden[torch.from_numpy(np.concatenate(predicting)).to(self._device)]
            logits = self._model.get_output_embeddings()(states)
        targets = torch.tensor([token for e in examples for token in e.answer], device=self._device)
        token_losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        lengths = [len(example.answer) for example in examples]
        return torch.stack([part.sum() for part in torch.split(token_losses, lengths)])

    @torch.no_grad()
    def _lower_output(
        self,
        tree: PrefixTree,
        rows: Sequence[int],
        held_out: bool,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """What the frozen layers give at each node; computed the first time an example is seen, then kept."""
        if any((held_out, row) not in self._inputs for row in rows):
            ids = torch.from_numpy(tree.tokens)[None].to(self._device)
            output = self._lower(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state[0]
            for row, path in zip(rows, tree.paths, strict=True):
                self._inputs[held_out, row] = output[torch.from_numpy(path).to(self._device)].to(
                    torch.bfloat16 if self._bfloat16 else torch.float32
                )
        width = next(iter(self._inputs.values())).shape[-1]
        joined = torch.empty(len(tree.tokens), width, device=self._device)
        for row, path in zip(rows, tree.paths, strict=True):
            joined[torch.from_numpy(path).to(self._device)] = self._inputs[held_out, row].float()
        return joined[None]


def count_tokens(examples: Sequence[TrainingExample]) -> Int[np.ndarray, " examples"]:
    """Tokens of each example, prompt and answer."""
    return np.array([len(e.prompt) + len(e.answer) for e in examples], dtype=np.int64)


def _split(base: Any, layer: int) -> tuple[Any, Any]:
    """The model below `layer` and from it on, on the same weights."""
    lower, upper = _view(base), _view(base)
    lower.layers = torch.nn.ModuleList(list(base.layers)[:layer])
    lower.norm = torch.nn.Identity()
    upper.layers = torch.nn.ModuleList(list(base.layers)[layer:])
    return lower, upper


def _view(module: Any) -> Any:
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view
