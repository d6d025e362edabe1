"""Token sequences as a tree: what they share is stored, and computed, once.

Exact label scoring rests on this. A batch of prompts, each followed by every label word, is a tree of tokens.
One forward pass over its nodes, with the ancestor relation as the attention mask and the depth as the
position, gives the same logits as one pass per prompt and label, and computes each distinct prefix once.

- Only inner nodes are computed: the last token of a label word predicts nothing that is asked for.
- Pure numpy; the engines turn `ancestors` into their own mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

from icl_compiler.tokenizer import TokenIds


@dataclass(frozen=True)
class WordTree:
    """The label words as a tree below one common root, the end of the prompt.

    Node `-1` is the root; nodes are numbered so that parents come before their children.

    Attributes:
        tokens: token of each inner node.
        parents: parent of each inner node, `-1` for the root.
        depths: distance of each inner node from the root, from 1.
        edge_nodes: for each edge (a node and a token that may follow it) the node, `-1` for the root.
        edge_tokens: for each edge its token.
        word_edges: for each word the edges it consists of; a word's log-probability is the sum over them.
    """

    tokens: Int[np.ndarray, " nodes"]
    parents: Int[np.ndarray, " nodes"]
    depths: Int[np.ndarray, " nodes"]
    edge_nodes: Int[np.ndarray, " edges"]
    edge_tokens: Int[np.ndarray, " edges"]
    word_edges: tuple[Int[np.ndarray, " _"], ...]

    @classmethod
    def build(cls, words: Sequence[TokenIds]) -> "WordTree":
        """The tree of `words`, none of them empty.

        >>> tree = WordTree.build([[5, 7, 1], [5, 8, 1]])
        >>> tree.tokens.tolist(), tree.parents.tolist()
        ([5, 7, 8], [-1, 0, 0])
        >>> list(zip(tree.edge_nodes.tolist(), tree.edge_tokens.tolist()))
        [(-1, 5), (0, 7), (1, 1), (0, 8), (2, 1)]
        """
        nodes: dict[tuple[int, ...], int] = {(): -1}
        edges: dict[tuple[int, ...], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        edge_nodes: list[int] = []
        edge_tokens: list[int] = []
        word_edges = []
        for word in words:
            if not len(word):
                raise ValueError("a label word has no tokens")
            path = tuple(int(token) for token in word)
            for end in range(1, len(path) + 1):
                if end < len(path) and path[:end] not in nodes:
                    nodes[path[:end]] = len(tokens)
                    tokens.append(path[end - 1])
                    parents.append(nodes[path[: end - 1]])
                    depths.append(end)
                if path[:end] not in edges:
                    edges[path[:end]] = len(edge_tokens)
                    edge_nodes.append(nodes[path[: end - 1]])
                    edge_tokens.append(path[end - 1])
            word_edges.append(np.array([edges[path[:end]] for end in range(1, len(path) + 1)], dtype=np.int64))
        return cls(
            np.array(tokens, dtype=np.int64),
            np.array(parents, dtype=np.int64),
            np.array(depths, dtype=np.int64),
            np.array(edge_nodes, dtype=np.int64),
            np.array(edge_tokens, dtype=np.int64),
            tuple(word_edges),
        )

    @property
    def predicting(self) -> Int[np.ndarray, " predicting"]:
        """The nodes whose next-token law is asked for, each once, ascending; `-1` is the root."""
        return np.unique(self.edge_nodes)

    def __len__(self) -> int:
        """How many nodes are computed per prompt."""
        return len(self.tokens)


@dataclass(frozen=True)
class PrefixTree:
    """Sequences merged by their common prefixes, below `start` tokens that stand elsewhere (a cache).

    Attributes:
        tokens: token of each node, parents before children.
        positions: position of each node in its sequence, counted from the start of the prompt.
        ancestors: `[i, j]` is true where node `j` is node `i` or an ancestor of it.
        ends: the last node of each sequence.
        paths: the nodes of each sequence.
    """

    tokens: Int[np.ndarray, " nodes"]
    positions: Int[np.ndarray, " nodes"]
    ancestors: Bool[np.ndarray, "nodes nodes"]
    ends: Int[np.ndarray, " sequences"]
    paths: tuple[Int[np.ndarray, " _"], ...]

    @classmethod
    def build(cls, sequences: Sequence[TokenIds | Int[np.ndarray, " length"]], *, start: int = 0) -> "PrefixTree":
        """Merge `sequences` from their token `start` on; before it they must agree.

        >>> tree = PrefixTree.build([[1, 2, 3], [1, 2, 4]])
        >>> tree.tokens.tolist(), tree.positions.tolist()
        ([1, 2, 3, 4], [0, 1, 2, 2])
        >>> tree.ancestors[3].tolist()
        [True, True, False, True]
        """
        arrays = [np.asarray(sequence, dtype=np.int64)[start:] for sequence in sequences]
        order = sorted(range(len(arrays)), key=lambda i: arrays[i].tolist())
        paths: list[Int[np.ndarray, " _"]] = [np.empty(0, dtype=np.int64)] * len(arrays)
        pieces, shares = [], []
        size = 0
        previous, previous_path = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for i in order:
            shared = common_prefix(previous, arrays[i])
            new = len(arrays[i]) - shared
            path = np.concatenate([previous_path[:shared], np.arange(size, size + new)])
            pieces.append(arrays[i][shared:])
            shares.append(shared)
            size += new
            paths[i] = previous_path = path
            previous = arrays[i]
        positions = np.empty(size, dtype=np.int64)
        ancestors = np.zeros((size, size), dtype=bool)
        for i, shared in zip(order, shares, strict=True):
            old, fresh = paths[i][:shared], paths[i][shared:]
            positions[fresh] = start + np.arange(shared, len(paths[i]))
            ancestors[np.ix_(fresh, old)] = True
            ancestors[np.ix_(fresh, fresh)] = np.tri(len(fresh), dtype=bool)
        return cls(
            np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64),
            positions,
            ancestors,
            np.array([path[-1] if len(path) else -1 for path in paths], dtype=np.int64),
            tuple(paths),
        )

    def with_words(self, words: WordTree) -> "PrefixTree":
        """The tree with a copy of `words` below the end of each sequence; the copies are its last nodes.

        Copy `q` has the nodes `len(tokens) + q * len(words) + node`.
        """
        if not len(words):
            return self
        size, copies, width = len(self.tokens), len(self.ends), len(words)
        total = size + copies * width
        ancestors = np.zeros((total, total), dtype=bool)
        ancestors[:size, :size] = self.ancestors
        inner = np.eye(width, dtype=bool)
        for node, parent in enumerate(words.parents):
            if parent >= 0:
                inner[node] |= inner[parent]
        for copy, end in enumerate(self.ends):
            rows = slice(size + copy * width, size + (copy + 1) * width)
            ancestors[rows, :size] = self.ancestors[end]
            ancestors[rows, rows] = inner
        return PrefixTree(
            np.concatenate([self.tokens, np.tile(words.tokens, copies)]),
            np.concatenate([self.positions, (self.positions[self.ends][:, None] + words.depths).ravel()]),
            ancestors,
            self.ends,
            self.paths,
        )

    def padded(self) -> "PrefixTree":
        """The tree with nodes that nobody sees behind it, so that its size is one of few: 16 between powers of two.

        >>> [len(PrefixTree.build([range(size)]).padded().tokens) for size in (16, 31, 33, 500)]
        [16, 31, 34, 512]
        """
        size = len(self.tokens)
        step = max(1, 2 ** (size.bit_length() - 5))
        more = -size % step
        ancestors = np.eye(size + more, dtype=bool)
        ancestors[:size, :size] = self.ancestors
        tokens, positions = np.pad(self.tokens, (0, more)), np.pad(self.positions, (0, more))
        return PrefixTree(tokens, positions, ancestors, self.ends, self.paths)


def common_prefix(first: Int[np.ndarray, " a"], second: Int[np.ndarray, " b"]) -> int:
    """How many leading tokens two sequences share.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def plan_batches(
    prompts: Sequence[Int[np.ndarray, " _"]], *, extra: int, limit: int, split_cost: int = 32
) -> list[range]:
    """Cut lexicographically sorted prompts into consecutive batches of at most about `limit` new nodes each.

    A prompt that is larger alone has a batch of its own. `extra` nodes are added per prompt (the label
    words). A full batch is cut where the neighbours share least, if that keeps a prefix of more than
    `split_cost` tokens in one piece.

    >>> a, b = np.arange(100), np.arange(200, 300)
    >>> plan_batches([a, np.append(a, 1), b, np.append(b, 1)], extra=2, limit=209)
    [range(0, 2), range(2, 4)]
    """
    shared = [common_prefix(a, b) for a, b in pairwise(prompts)]
    batches = []
    first, cached = 0, 0
    while first < len(prompts):
        nodes = len(prompts[first]) - cached + extra
        last = first + 1
        while last < len(prompts):
            nodes += len(prompts[last]) - shared[last - 1] + extra
            if nodes > limit:
                break
            last += 1
        if last < len(prompts) and last - first > 1:
            candidates = range(first + (last - first) // 2 + 1, last + 1)
            best = min(reversed(candidates), key=lambda cut: shared[cut - 1])
            if shared[last - 1] - shared[best - 1] > split_cost:
                last = best
        batches.append(range(first, last))
        if last < len(prompts):
            cached = min(shared[first:last])
        first = last
    return batches
