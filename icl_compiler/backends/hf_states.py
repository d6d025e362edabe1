"""What a frozen model knows at the end of a prompt: its last hidden state there, after the final norm."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from icl_compiler.backends.backend import Progress, Usage
from icl_compiler.backends.hf_model import FrozenModel
from icl_compiler.prefix_tree import PrefixTree, plan_batches
from icl_compiler.tokenizer import TokenIds


def last_states(
    model: FrozenModel, prompts: Sequence[TokenIds], progress: Progress | None = None
) -> tuple[Float[np.ndarray, "prompts width"], Usage]:
    """The hidden state from which the model would predict the next token, and what it cost.

    A batch is a tree of tokens: what prompts share at their beginning is computed once.
    """
    arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    order = np.array(sorted(range(len(arrays)), key=lambda i: arrays[i].tolist()), dtype=np.int64)
    states = np.empty((len(arrays), model.network.config.get_text_config().hidden_size))
    computed = forwards = 0
    limit = 8192 if model.on_gpu else 512
    for batch in plan_batches([arrays[i] for i in order], extra=0, limit=limit):
        rows = order[batch.start : batch.stop]
        tree = PrefixTree.build([arrays[i] for i in rows]).padded()
        hidden = model.run(tree.tokens, tree.positions, torch.from_numpy(tree.ancestors)[None, None], None)
        states[rows] = model.pick(hidden, tree.ends).float().cpu().numpy()
        computed += len(tree.tokens)
        forwards += 1
        if progress is not None:
            progress(len(rows))
    return states, Usage(sum(len(prompt) for prompt in prompts), computed, forwards)
