"""What a frozen model knows of a prompt: its hidden states after the final norm, at the end or over a part of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from icl_compiler.backends.backend import Progress, Usage
from icl_compiler.backends.hf_model import FrozenModel
from icl_compiler.prefix_tree import PrefixTree, plan_batches
from icl_compiler.tokenizer import TokenIds


def last_states(
    model: FrozenModel, prompts: Sequence[TokenIds], progress: Progress | None = None
) -> tuple[Float[np.ndarray, "prompts width"], Usage]:
    """The hidden state from which the model would predict the next token, and what it cost."""
    states = np.empty((len(prompts), model.network.config.get_text_config().hidden_size))
    computed = forwards = 0
    for rows, tree, hidden in _passes(model, prompts, progress):
        states[rows] = model.pick(hidden, tree.ends).float().cpu().numpy()
        computed += len(tree.tokens)
        forwards += 1
    return states, Usage(sum(len(prompt) for prompt in prompts), computed, forwards)


def reading_states(
    model: FrozenModel, prompts: Sequence[TokenIds], begins: Sequence[int], layer: int, progress: Progress | None = None
) -> Float[np.ndarray, "prompts both"]:
    """Two hidden states of each prompt, side by side, of one forward pass.

    First the mean after so many layers, over the tokens from place `begins[i]` on, one at least; then the last one.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["hidden"] = output[0] if isinstance(output, tuple) else output

    states = np.empty((len(prompts), 2 * model.network.config.get_text_config().hidden_size))
    hook = model.network.base_model.layers[layer - 1].register_forward_hook(keep)
    try:
        for rows, tree, hidden in _passes(model, prompts, progress):
            nodes = [path[begins[row] :] for row, path in zip(rows.tolist(), tree.paths, strict=True)]
            inner = model.pick(seen["hidden"].reshape(hidden.shape), np.concatenate(nodes))
            found = inner.float().cpu().numpy().astype(np.float64)
            counts = np.array([len(some) for some in nodes])
            means = np.add.reduceat(found, np.cumsum(counts) - counts) / counts[:, None]
            states[rows] = np.hstack([means, model.pick(hidden, tree.ends).float().cpu().numpy()])
    finally:
        hook.remove()
    return states


class _Pass(NamedTuple):
    """The prompts of one forward pass, as a tree of tokens: what they share at their beginning is computed once."""

    rows: Int[np.ndarray, " some"]
    tree: PrefixTree
    hidden: torch.Tensor


def _passes(model: FrozenModel, prompts: Sequence[TokenIds], progress: Progress | None) -> Iterator[_Pass]:
    arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    order = np.array(sorted(range(len(arrays)), key=lambda i: arrays[i].tolist()), dtype=np.int64)
    limit = 8192 if model.on_gpu else 512
    for batch in plan_batches([arrays[i] for i in order], extra=0, limit=limit):
        rows = order[batch.start : batch.stop]
        tree = PrefixTree.build([arrays[i] for i in rows]).padded()
        yield _Pass(
            rows, tree, model.run(tree.tokens, tree.positions, torch.from_numpy(tree.ancestors)[None, None], None)
        )
        if progress is not None:
            progress(len(rows))
