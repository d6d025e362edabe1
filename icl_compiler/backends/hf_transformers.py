"""The frozen model in this process, through Hugging Face `transformers`.

- Prompts are sorted, so that those which share their first tokens stand together; a batch is one tree of
  tokens (`prefix_tree.py`) and one forward pass: shared prefixes are computed once, label words hang below
  their prompt as branches. A tree is padded by a sixteenth at most: kernels are kept for every shape that was
  ever computed, so that few shapes keep memory flat.
- The keys and values of the first prompt of a batch stay in the cache; the next batch, or the next call, goes
  on from what it shares with them. Memory grows with the tokens of a batch, never with the number of queries.
- Answers of many prompts are written together (`hf_decoding.py`), as many as their keys and values leave room for.
- A long unbranched beginning is computed apart, without a mask: attention kernels are faster where they know
  that the mask is causal.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from icl_compiler.backends.backend import (
    Generation,
    Generations,
    LabelScores,
    Progress,
    SequenceScores,
    Usage,
    require_fit,
    require_pairs,
)
from icl_compiler.backends.hf_decoding import Begun, KeysAndValues, Sampling, continue_prompts
from icl_compiler.backends.hf_model import FrozenModel
from icl_compiler.errors import BackendError
from icl_compiler.prefix_tree import PrefixTree, WordTree, common_prefix, plan_batches
from icl_compiler.tokenizer import TokenIds

_NO_WORDS = WordTree.build([[0]])


class TransformersBackend:
    """A causal language model of `transformers`, with exact label scoring.

    Args:
        model: an embedded model (`icl models list`), a folder, or a name on the model hub.
        dtype: `auto` is bfloat16 where the processor computes in it, else float32.
        tree_tokens: about how many new tokens one forward pass takes; more uses more memory.
        network: the model itself, where it is loaded already; `model` then is what messages call it.
    """

    def __init__(self, model: str, dtype: str = "auto", *, tree_tokens: int | None = None, network: Any = None) -> None:
        self.model = model
        self._model = FrozenModel(model, dtype, network=network)
        self.device = self._model.device
        self.max_prompt_tokens = self._model.max_tokens
        self._tree_tokens = tree_tokens or (8192 if self._model.on_gpu else 512)
        self._causal_from = 2048 if self._model.on_gpu else 768
        self._cache_bytes, self._most_samples = (2**32, 512) if self._model.on_gpu else (2**28, 64)
        self._cache = _Cache(self._model.network.config)

    @property
    def network(self) -> Any:
        """The model itself, a `transformers.PreTrainedModel`."""
        return self._model.network

    def label_logprobs(
        self,
        prompts: Sequence[TokenIds],
        label_words: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> LabelScores:
        """Exact log-probability of every label word after every prompt, in nats.

        Raises:
            ContextLengthError: if a prompt with its longest label word does not fit the model's context.
            BackendError: if the model's numbers are not finite.
        """
        words = WordTree.build(label_words)
        self._require_fit(prompts, max(len(word) for word in label_words))
        distinct = _Distinct.build(prompts)
        result = np.empty((len(distinct.arrays), len(label_words)))
        computed = forwards = 0
        order = np.concatenate(words.word_edges)
        starts = np.cumsum([0, *(len(edges) for edges in words.word_edges[:-1])])
        node_row = np.searchsorted(words.predicting, words.edge_nodes)
        for batch in plan_batches(distinct.arrays, extra=len(words), limit=self._tree_tokens):
            part = [distinct.arrays[i] for i in batch]
            passed = self._forward(part, words, [len(prompt) - 1 for prompt in part])
            for prompt, row in enumerate(batch):
                states = self._model.pick(passed.hidden, passed.rows_below(prompt, words))
                edges = self._model.logprobs_at(states, node_row, words.edge_tokens)
                result[row] = np.add.reduceat(edges[order], starts)
            self._keep_first(passed)
            computed += passed.computed_tokens
            forwards += passed.forwards
            if progress is not None:
                progress(sum(distinct.counts[i] for i in batch))
        self._require_finite(result)
        usage = Usage(sum(len(prompt) for prompt in prompts), computed, forwards)
        return LabelScores(result[distinct.position], usage)

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> SequenceScores:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, in nats.

        Raises:
            ContextLengthError: if a prompt with its continuation does not fit the model's context.
            BackendError: if a continuation is empty, or the model's numbers are not finite.
        """
        require_pairs(prompts, continuations)
        for prompt, continuation in zip(prompts, continuations, strict=True):
            self._require_fit([prompt], len(continuation))
        whole = [np.array([*p, *c[:-1]], dtype=np.int64) for p, c in zip(prompts, continuations, strict=True)]
        order = sorted(range(len(whole)), key=lambda i: whole[i].tolist())
        scores = [np.empty(0)] * len(whole)
        computed = forwards = 0
        for batch in plan_batches([whole[i] for i in order], extra=0, limit=self._tree_tokens):
            items = [order[i] for i in batch]
            needed = [len(prompts[i]) - 1 for i in items]
            passed = self._forward([whole[i] for i in items], _NO_WORDS, needed)
            for place, (item, first) in enumerate(zip(items, needed, strict=True)):
                states = self._model.pick(passed.hidden, passed.tree.paths[place][first - passed.start :])
                tokens = np.array(continuations[item], dtype=np.int64)
                scores[item] = self._model.logprobs_at(states, np.arange(len(tokens)), tokens)
                self._require_finite(scores[item])
            self._keep_first(passed)
            computed += passed.computed_tokens
            forwards += passed.forwards
            if progress is not None:
                progress(len(items))
        return SequenceScores(scores, Usage(sum(len(prompt) for prompt in prompts), computed, forwards))

    def generate(
        self,
        prompts: Sequence[TokenIds],
        terminator: TokenIds,
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """`samples` continuations of every prompt, up to `terminator`; temperature 0 takes the likeliest token.

        Each sample has a random stream of its own, so that it does not depend on its neighbours. A prompt is
        computed once for all its samples.

        Raises:
            ContextLengthError: if a prompt with `max_new_tokens` more does not fit the model's context.
        """
        self._require_fit(prompts, max_new_tokens)
        arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        order = sorted(range(len(arrays)), key=lambda i: arrays[i].tolist())
        how = Sampling(list(terminator), max_new_tokens, temperature)
        items: list[list[Generation]] = [[] for _ in prompts]
        usage = Usage(sum(len(prompt) for prompt in prompts), 0, 0)
        for first in range(0, samples, self._most_samples):
            some = range(first, min(first + self._most_samples, samples))
            for rows in self._together([arrays[i] for i in order], len(some) * max_new_tokens, len(some)):
                group = [order[row] for row in rows]
                begun, reading = self._begin([arrays[i] for i in group])
                streams = [[np.random.default_rng([seed, i, sample]) for sample in some] for i in group]
                written, writing = continue_prompts(self._model, begun, streams, how)
                for i, answers in zip(group, written, strict=True):
                    items[i] += answers
                usage = usage.plus(reading).plus(writing)
                if progress is not None and not first:
                    progress(len(group))
        return Generations([item for answers in items for item in answers], usage)

    def _together(self, arrays: Sequence[Int[np.ndarray, " _"]], more: int, samples: int) -> Iterator[range]:
        """Which prompts are continued together, each by `more` tokens in all its `samples`: those that memory takes."""
        most_tokens = self._cache_bytes // self._model.cache_bytes_per_token
        first = longest = 0
        for row, array in enumerate(arrays):
            longest = max(longest, len(array) + more)
            count = row + 1 - first
            if count > 1 and (count * longest > most_tokens or count * samples > self._most_samples):
                yield range(first, row)
                first, longest = row, len(array) + more
        if arrays:
            yield range(first, len(arrays))

    def _begin(self, arrays: Sequence[Int[np.ndarray, " _"]]) -> tuple[list[Begun], Usage]:
        """Read sorted prompts."""
        begun, usage = [], Usage(0, 0, 0)
        for batch in plan_batches(arrays, extra=0, limit=self._tree_tokens):
            part = [arrays[i] for i in batch]
            passed = self._forward(part, _NO_WORDS, [len(array) - 1 for array in part])
            states = self._model.pick(passed.hidden, passed.tree.ends)
            for array, path, state in zip(part, passed.tree.paths, states, strict=True):
                nodes = np.concatenate([np.arange(passed.start), passed.start + path])
                begun.append(Begun(array, self._cache.at(nodes), state))
            self._keep_first(passed)
            usage = usage.plus(Usage(0, passed.computed_tokens, passed.forwards))
        return begun, usage

    def _forward(self, sequences: Sequence[Int[np.ndarray, " _"]], words: WordTree, needed: Sequence[int]) -> "_Pass":
        """One forward pass over a batch of sorted sequences, with `words` below the end of each.

        `needed[i]` is the first position of sequence `i` whose hidden state is asked for. All tokens are left in
        the cache.
        """
        first = sequences[0]
        trunk = min(common_prefix(first, sequences[-1]), *needed)
        start = self._cache.keep(first[:trunk])
        forwards, computed = 1, 0
        if trunk - start > self._causal_from:
            self._model.run(first[start:trunk], np.arange(start, trunk), None, self._cache.kv)
            self._cache.tokens = first[:trunk]
            forwards, computed, start = 2, trunk - start, trunk
        tree = PrefixTree.build(sequences, start=start)
        full = tree.with_words(words).padded()
        mask = torch.ones(1, 1, len(full.tokens), start + len(full.tokens), dtype=torch.bool)
        mask[0, 0, :, start:] = torch.from_numpy(full.ancestors)
        hidden = self._model.run(full.tokens, full.positions, mask, self._cache.kv)
        return _Pass(hidden, tree, start, len(full.tokens), first, computed + len(full.tokens), forwards)

    def _keep_first(self, passed: "_Pass") -> None:
        """Of all that a pass left in the cache, keep the first sequence."""
        kept = len(passed.first) - passed.start
        self._cache.crop(passed.added - kept, passed.first)

    def _require_fit(self, prompts: Sequence[TokenIds], more: int) -> None:
        require_fit(prompts, more, model=self.model, max_prompt_tokens=self.max_prompt_tokens)

    def _require_finite(self, logprobs: Float[np.ndarray, "..."]) -> None:
        if not np.isfinite(logprobs).all():
            raise BackendError(
                f"the model {self.model!r} gave log-probabilities that are not finite; "
                "try --dtype float32, and check that the weights are complete"
            )


class _Pass(NamedTuple):
    """A forward pass: hidden states of the new nodes, and where in them each sequence stands."""

    hidden: torch.Tensor
    tree: PrefixTree
    start: int
    added: int
    """Nodes that the pass put into the cache behind its first `start` tokens."""
    first: Int[np.ndarray, " _"]
    computed_tokens: int
    forwards: int

    def rows_below(self, sequence: int, words: WordTree) -> Int[np.ndarray, " predicting"]:
        """Rows of `hidden` at the predicting nodes of the words below one sequence."""
        copy = len(self.tree.tokens) + sequence * len(words)
        return np.where(words.predicting < 0, self.tree.ends[sequence], copy + words.predicting)


class _Distinct(NamedTuple):
    """Prompts, each once, sorted."""

    arrays: list[Int[np.ndarray, " _"]]
    counts: list[int]
    position: Int[np.ndarray, " prompts"]

    @classmethod
    def build(cls, prompts: Sequence[TokenIds]) -> "_Distinct":
        keys = [tuple(int(token) for token in prompt) for prompt in prompts]
        order = {key: i for i, key in enumerate(sorted(set(keys)))}
        position = np.array([order[key] for key in keys], dtype=np.int64)
        counts = np.bincount(position, minlength=len(order)).tolist()
        return cls([np.array(key, dtype=np.int64) for key in order], counts, position)


class _Cache:
    """Keys and values of one token sequence, the beginning of the prompts to come."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self._new: Callable[[], Any] = lambda: DynamicCache(config=config)
        self.kv = self._new()
        self.tokens = np.empty(0, dtype=np.int64)

    def keep(self, prefix: Int[np.ndarray, " _"]) -> int:
        """Drop what does not begin `prefix`; how many tokens are left."""
        if self.kv.get_seq_length() != len(self.tokens):  # a pass was interrupted
            self.crop(0, self.tokens[:0])
        shared = common_prefix(self.tokens, prefix)
        self.crop(len(self.tokens) - shared, prefix[:shared])
        return shared

    def at(self, places: Int[np.ndarray, " places"]) -> list[KeysAndValues]:
        """Keys and values of each layer at some of the tokens."""
        layers = self.kv.layers
        index = torch.from_numpy(places).to(layers[0].keys.device)
        return [(layer.keys[0].index_select(1, index), layer.values[0].index_select(1, index)) for layer in layers]

    def crop(self, count: int, tokens: Int[np.ndarray, " _"]) -> None:
        """Drop the last `count` tokens; `tokens` are those that remain."""
        if not len(tokens):
            self.kv = self._new()
        elif count:
            self.kv.crop(-count)
        self.tokens = tokens
