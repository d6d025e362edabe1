"""The trees against their definitions: a node is a distinct prefix, its ancestors are the prefixes of that prefix."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.prefix_tree import PrefixTree, WordTree, common_prefix, plan_batches

SEQUENCE = st.lists(st.integers(0, 2), min_size=1, max_size=7)
SEQUENCES = st.lists(SEQUENCE, min_size=1, max_size=8)
WORDS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6)


def prefixes(sequence, start=0):
    return [tuple(sequence[:end]) for end in range(start + 1, len(sequence) + 1)]


@settings(deadline=None)
@given(WORDS)
def test_word_tree(words):
    tree = WordTree.build(words)
    inner = list(dict.fromkeys(prefix for word in words for prefix in prefixes(word)[:-1]))
    assert len(tree) == len(inner)
    # Spell each node from its parents: what comes out must be the inner prefixes, parents first.
    spelled = []
    for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
        assert -1 <= parent < node
        spelled.append((*(spelled[parent] if parent >= 0 else ()), token))
    assert sorted(spelled) == sorted(inner)
    assert tree.depths.tolist() == [len(prefix) for prefix in spelled]
    # An edge is a distinct prefix too, split into its beginning and its last token.
    edges = [
        (*(spelled[node] if node >= 0 else ()), token)
        for node, token in zip(tree.edge_nodes.tolist(), tree.edge_tokens.tolist(), strict=True)
    ]
    assert sorted(edges) == sorted({prefix for word in words for prefix in prefixes(word)})
    for word, path in zip(words, tree.word_edges, strict=True):
        assert [edges[edge] for edge in path.tolist()] == prefixes(word)
    assert tree.predicting.tolist() == sorted(set(tree.edge_nodes.tolist()))


def test_a_word_without_tokens_is_refused():
    with pytest.raises(ValueError, match="a label word has no tokens"):
        WordTree.build([[1], []])


def definition(tree, spelled):
    """Ancestors as they are defined: the nodes whose sequence begins that of the node."""
    return [[node[: len(other)] == other for other in spelled] for node in spelled]


@settings(deadline=None)
@given(SEQUENCES, st.data())
def test_prefix_tree(sequences, data):
    shared = min(common_prefix(np.array(sequences[0]), np.array(other)) for other in sequences)
    start = data.draw(st.integers(0, min(shared, min(map(len, sequences)) - 1)))
    tree = PrefixTree.build(sequences, start=start)
    spelled: list[tuple[int, ...]] = [()] * len(tree.tokens)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        for node, prefix in zip(path.tolist(), prefixes(sequence, start), strict=True):
            assert spelled[node] in ((), prefix)
            spelled[node] = prefix
    distinct = {prefix for sequence in sequences for prefix in prefixes(sequence, start)}
    assert len(tree.tokens) == len(distinct)
    assert set(spelled) == distinct
    assert tree.tokens.tolist() == [prefix[-1] for prefix in spelled]
    assert tree.positions.tolist() == [len(prefix) - 1 for prefix in spelled]
    assert tree.ends.tolist() == [spelled.index(tuple(sequence)) for sequence in sequences]
    assert tree.ancestors.tolist() == definition(tree, spelled)
    # Parents come before their children: a causal engine may read the nodes in this order.
    assert not np.triu(tree.ancestors, 1).any()


@settings(deadline=None)
@given(SEQUENCES, WORDS)
def test_words_below_the_ends(sequences, words):
    tree, inner = PrefixTree.build(sequences), WordTree.build(words)
    full = tree.with_words(inner)
    size, width = len(tree.tokens), len(inner)
    assert len(full.tokens) == size + len(sequences) * width
    word_paths = [inner_path(inner, node) for node in range(width)]
    for copy, sequence in enumerate(sequences):
        for node, path in enumerate(word_paths):
            row = size + copy * width + node
            mine = [size + copy * width + above for above in path]
            assert full.tokens[row] == inner.tokens[node]
            assert full.positions[row] == len(sequence) + len(path) - 1
            assert np.flatnonzero(full.ancestors[row]).tolist() == sorted([*tree.paths[copy].tolist(), *mine])
    assert np.array_equal(full.ancestors[:size, :size], tree.ancestors)
    assert not full.ancestors[:size, size:].any()


def inner_path(tree, node):
    return [] if node < 0 else [*inner_path(tree, int(tree.parents[node])), node]


@pytest.mark.parametrize("size", [1, 15, 33, 100, 481, 700])
def test_nobody_sees_what_a_tree_is_padded_with(size):
    tree = PrefixTree.build([list(range(size)), [*range(size // 2), -1]])
    padded = tree.padded()
    real, total = len(tree.tokens), len(padded.tokens)
    assert real <= total <= real * 17 / 16
    assert (padded.ancestors[:real, :real] == tree.ancestors).all()
    assert not padded.ancestors[:real, real:].any() and not padded.ancestors[real:, :real].any()
    assert padded.ancestors[real:, real:].any(axis=1).all()  # a softmax over nothing would not be finite


def test_trees_of_many_sizes_have_few_sizes_when_padded():
    sizes = {len(PrefixTree.build([range(size)]).padded().tokens) for size in range(256, 512)}
    assert len(sizes) <= 17


def test_no_sequences_no_nodes():
    tree = PrefixTree.build([])
    assert len(tree.tokens) == len(tree.ends) == 0
    assert tree.ancestors.shape == (0, 0)


@settings(deadline=None)
@given(SEQUENCE, SEQUENCE)
def test_common_prefix(first, second):
    expected = max(n for n in range(min(len(first), len(second)) + 1) if first[:n] == second[:n])
    assert common_prefix(np.array(first), np.array(second)) == expected


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), max_size=25),
    st.integers(0, 5),
    st.integers(1, 60),
    st.integers(0, 8),
)
def test_batches_cover_all_prompts_in_order_within_the_limit(prompts, extra, limit, split_cost):
    arrays = [np.array(prompt) for prompt in sorted(prompts)]
    batches = plan_batches(arrays, extra=extra, limit=limit, split_cost=split_cost)
    assert [i for batch in batches for i in batch] == list(range(len(prompts)))
    assert all(batches)
    cached: set[tuple[int, ...]] = set()
    for batch in batches:
        new = {prefix for i in batch for prefix in prefixes(arrays[i].tolist())} - cached
        assert len(batch) == 1 or len(new) + extra * len(batch) <= limit
        cached = set(prefixes(arrays[batch[0]].tolist()))


def test_batches_are_not_smaller_than_they_must_be():
    prompts = [np.array([0, 0, 0, i]) for i in range(10)]
    # 4 new tokens for the first prompt, 1 for each other, 2 for the words of each.
    assert plan_batches(prompts, extra=2, limit=3 + 3 * 10, split_cost=32) == [range(10)]
    # The first three stay in the cache: afterwards each prompt costs 3.
    assert plan_batches(prompts, extra=2, limit=15, split_cost=32) == [range(4), range(4, 9), range(9, 10)]


def test_a_full_batch_is_cut_where_neighbours_share_least():
    def family(first, size):
        return [np.array([first] * 50 + [i]) for i in range(size)]

    prompts = [*family(0, 3), *family(1, 3)]
    limit = 53 + 52
    # The limit falls into the second family; cut there, its 50 tokens would be computed twice.
    assert [len(b) for b in plan_batches(prompts, extra=0, limit=limit, split_cost=32)] == [3, 3]
    assert [len(b) for b in plan_batches(prompts, extra=0, limit=limit, split_cost=60)] == [5, 1]
    assert all(first.stop == second.start for first, second in pairwise(plan_batches(prompts, extra=0, limit=limit)))
