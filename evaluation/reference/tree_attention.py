"""Attention over a tree of tokens, branch by branch.

A training batch is one tree (`icl_compiler/prefix_tree.py`): a trunk that all examples share, and a branch for each.
With a mask, attention compares every token with every other one, though a branch sees the trunk and itself only. Here
the trunk is computed once, and each branch beside the others, as rows of a padded array. What is computed is the same.
On a processor that saves 3 to 18 % of a step, more where texts are longer (`benchmarks/training_step.py`).

It is an attention of `transformers` by the name of `TREE_ATTENTION`, which models take by `attend_by_branches`.
Where a model is not told of a tree, it is its `sdpa`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch.nn.functional import scaled_dot_product_attention

from icl_compiler.prefix_tree import PrefixTree, common_prefix

TREE_ATTENTION = "icl_tree"
_ROUND = 16
_LEAST_SAVED = 2
"""By how much fewer comparisons there must be; the rest is gathering."""


class Branches(NamedTuple):
    """A tree as its trunk and its branches; branches are padded to the same length.

    Attributes:
        trunk: how many nodes, the first ones, all sequences share.
        queries: nodes of each branch; each node stands in one branch only.
        keys: nodes that a branch sees, trunk first.
        sees: which of `keys` each of `queries` sees.
        places: where in the branches, laid out flat, a node stands that is no padding.
        nodes: and which node it is.
    """

    trunk: int
    queries: Int[torch.Tensor, "branches longest"]
    keys: Int[torch.Tensor, "branches seen"]
    sees: Bool[torch.Tensor, "branches 1 longest seen"]
    places: Int[torch.Tensor, " nodes"]
    nodes: Int[torch.Tensor, " nodes"]

    @classmethod
    def of(cls, tree: PrefixTree) -> "Branches | None":
        """The branches of `tree`; `None` where computing them apart would save little.

        >>> branches = Branches.of(PrefixTree.build([[9, row, *range(20)] for row in range(8)]))
        >>> branches.trunk, branches.queries.shape, branches.keys.shape
        (1, torch.Size([8, 32]), torch.Size([8, 32]))
        >>> Branches.of(PrefixTree.build([[1], [2], range(3, 90)])) is None
        True
        """
        paths = sorted(tree.paths, key=lambda path: path.tolist())
        trunk = common_prefix(paths[0], paths[-1])
        before = [trunk, *(common_prefix(one, other) for one, other in pairwise(paths))]
        longest = _rounded(max(len(path) - first for path, first in zip(paths, before, strict=True)))
        seen = _rounded(max(map(len, paths)))
        if len(paths) * longest * seen * _LEAST_SAVED > len(tree.tokens) ** 2:
            return None
        queries, keys = np.zeros((len(paths), longest), dtype=np.int64), np.zeros((len(paths), seen), dtype=np.int64)
        sees = np.zeros((len(paths), 1, longest, seen), dtype=bool)
        sees[..., 0] = True  # else a row of padding would see nothing
        real = np.zeros(queries.shape, dtype=bool)
        for row, (path, first) in enumerate(zip(paths, before, strict=True)):
            own = len(path) - first
            queries[row, :own], keys[row, : len(path)], real[row, :own] = path[first:], path, True
            sees[row, 0, :own, : len(path)] = np.tri(own, len(path), first, dtype=bool)
        places = np.flatnonzero(real)
        return cls(trunk, *map(torch.from_numpy, (queries, keys, sees, places, queries.ravel()[places])))


def _rounded(size: int) -> int:
    """Up to a multiple: kernels are made, and kept, for every new shape of a product."""
    return -(-size // _ROUND) * _ROUND


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    tree: Branches | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of one sequence of nodes, as `transformers` calls it.

    Args:
        query, key, value: `(1, heads, nodes, width of a head)`; there may be fewer heads of keys and values.
        tree: the branches, if the nodes are a tree that is worth it.

    Returns:
        The output, `(1, nodes, heads, width of a head)`; 0 at nodes of padding. There are no weights.
    """
    if tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)  # type: ignore[no-any-return]
    groups = query.shape[1] // key.shape[1]
    trunk, keys, values = (part[:, :, : tree.trunk] for part in (query, key, value))
    parts = [
        scaled_dot_product_attention(
            trunk, _repeated(keys, groups), _repeated(values, groups), is_causal=True, scale=scaling
        )[0].transpose(0, 1)
    ]
    found = _along(query, key, value, tree, scaling)
    parts.append(query.new_zeros(query.shape[2] - tree.trunk, query.shape[1], query.shape[3]))
    return torch.cat(parts).index_copy(0, tree.nodes, found)[None], None


def _along(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Branches, scaling: float | None
) -> torch.Tensor:
    """The output at `tree.nodes`, `(nodes, heads, width of a head)`."""
    asking, seen, given = (
        part[0].transpose(0, 1)[nodes].transpose(1, 2).float()
        for part, nodes in ((query, tree.queries), (key, tree.keys), (value, tree.keys))
    )
    groups = query.shape[1] // key.shape[1]
    # In short rows the kernel of `scaled_dot_product_attention` takes four times as long, most of it going backward.
    scores = (asking * (scaling or query.shape[-1] ** -0.5)) @ _repeated(seen, groups).transpose(2, 3)
    laws = scores.masked_fill(~tree.sees, -torch.inf).softmax(dim=-1)
    found = (laws @ _repeated(given, groups)).to(query.dtype)
    return found.transpose(1, 2).flatten(0, 1)[tree.places]


def _repeated(part: torch.Tensor, groups: int) -> torch.Tensor:
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


def attend_by_branches(model: Any) -> None:
    """Let `model`, of `transformers`, attend branch by branch where it is told of a tree."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    model.set_attn_implementation(TREE_ATTENTION)
