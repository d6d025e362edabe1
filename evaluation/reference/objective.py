"""What every reference learns: the negative log-likelihood of the answer after the prompt without shots.

- A batch is a tree of tokens (`icl_compiler/prefix_tree.py`): the instruction that all examples share is computed
  once a step, and there is no padding but in the attention (`tree_attention.py`). The gradient is the same.
- What stands below the *frontier*, the lowest layer that is trained, is computed once per example and kept, so that
  from the second epoch on it costs nothing; on the disk (`frozen_part.py`) if it takes gigabytes.
- Products are computed in bfloat16 (autocast) where the processor has it; the residual stream stays in float32.
- The output layer, over the whole vocabulary, is computed at the answer's positions only.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evaluation.reference.frozen_part import FrozenOutputs
from evaluation.reference.tree_attention import TREE_ATTENTION, Branches
from icl_compiler.prefix_tree import PrefixTree

LOGIT_ROWS = 64
"""Tokens whose logits are held in float32 at a time: a vocabulary is wide."""

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


class TrainingExample(NamedTuple):
    """A prompt without shots, and the answer to be learned, terminator included."""

    prompt: Sequence[int]
    answer: Sequence[int]


class AnswerLogits(NamedTuple):
    """What a model says at each token of some answers.

    Attributes:
        logits: over the vocabulary, of any precision; losses are computed in float32.
        targets: the token that is right.
        lengths: tokens of each answer; their sum is the number of rows.
    """

    logits: Float[torch.Tensor, "tokens vocabulary"]
    targets: Int[torch.Tensor, " tokens"]
    lengths: list[int]

    def losses(self) -> Float[torch.Tensor, " answers"]:
        """Negative log-likelihood of each answer, in nats."""
        pieces = zip(torch.split(self.logits, LOGIT_ROWS), torch.split(self.targets, LOGIT_ROWS), strict=True)
        parts = [torch.nn.functional.cross_entropy(rows.float(), right, reduction="none") for rows, right in pieces]
        return torch.stack([part.sum() for part in torch.split(torch.cat(parts), self.lengths)])


class AnswerLoss:
    """The loss of a causal language model of `transformers` on examples; its trainable parameters are what moves.

    Args:
        model: may hold modules of a method in place of its own, as long as it has `base_model.layers`.
        frontier: the lowest layer with anything trainable. Nothing below it may change.
        bfloat16: whether products are computed in bfloat16.
        watch: told of each batch before it is computed: tokens `(1, nodes)`, positions `(1, nodes)` and who sees whom
            `(1, 1, nodes, nodes)`.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[TrainingExample],
        held_out: Sequence[TrainingExample],
        *,
        frontier: int = 0,
        bfloat16: bool = True,
        watch: Watch | None = None,
    ) -> None:
        self._model = model
        self._watch = watch
        self._bfloat16 = bfloat16
        self._device = next(model.parameters()).device
        self._examples = {False: train, True: held_out}
        self.frontier = frontier
        self._lower, self._upper = _split(model.base_model, frontier)
        self._kept = {}
        if frontier:
            width = model.get_input_embeddings().embedding_dim
            dtype = torch.bfloat16 if bfloat16 else torch.float32
            for is_held_out, examples in self._examples.items():
                lengths = [len(example.prompt) + len(example.answer) - 1 for example in examples]
                self._kept[is_held_out] = FrozenOutputs(lengths, width, dtype)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that move."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def losses(self, rows: Sequence[int], *, held_out: bool) -> torch.Tensor:
        """Negative log-likelihood, in nats, of each example's answer."""
        return self.logits(rows, held_out=held_out).losses()

    def logits(self, rows: Sequence[int], *, held_out: bool) -> AnswerLogits:
        """What the model says at the tokens of each example's answer."""
        examples = [self._examples[held_out][row] for row in rows]
        sequences = [[*example.prompt, *example.answer[:-1]] for example in examples]
        tree = PrefixTree.build(sequences).padded()  # kernels are made for every new size
        predicting = [path[len(e.prompt) - 1 :] for e, path in zip(examples, tree.paths, strict=True)]
        positions = torch.from_numpy(tree.positions)[None].to(self._device)
        mask = torch.from_numpy(tree.ancestors)[None, None].to(self._device)
        if self._watch is not None:
            self._watch(torch.from_numpy(tree.tokens)[None].to(self._device), positions, mask)
        config = self._model.base_model.config
        branches = Branches.of(tree) if config._attn_implementation == TREE_ATTENTION else None
        told = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
        told |= {} if branches is None else {"tree": branches}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            inputs = self._lower_output(tree, rows, held_out, told) if self.frontier else self._embedded(tree)
            hidden = self._upper(inputs_embeds=inputs, **told).last_hidden_state[0]
            states = hidden[torch.from_numpy(np.concatenate(predicting)).to(self._device)]
            logits = self._model.get_output_embeddings()(states)
        targets = torch.tensor([token for e in examples for token in e.answer], device=self._device)
        return AnswerLogits(logits.float(), targets, [len(example.answer) for example in examples])

    def _embedded(self, tree: PrefixTree) -> torch.Tensor:
        ids = torch.from_numpy(tree.tokens)[None].to(self._device)
        vectors: torch.Tensor = self._model.get_input_embeddings()(ids)
        return vectors.float()

    @torch.no_grad()
    def _lower_output(
        self, tree: PrefixTree, rows: Sequence[int], held_out: bool, told: Mapping[str, Any]
    ) -> torch.Tensor:
        """What the frozen layers give at each node; computed the first time an example is seen, then kept."""
        kept = self._kept[held_out]
        paths = [torch.from_numpy(path).to(self._device) for path in tree.paths]
        if any(row not in kept for row in rows):
            output = self._lower(inputs_embeds=self._embedded(tree), **told).last_hidden_state[0]
            for row, path in zip(rows, paths, strict=True):
                kept[row] = output[path]
        joined = torch.zeros(len(tree.tokens), kept[rows[0]].shape[-1], device=self._device)
        for row, path in zip(rows, paths, strict=True):
            joined[path] = kept[row].to(self._device).float()
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
