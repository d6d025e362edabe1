"""The frozen model in this process, through Hugging Face `transformers`.

- Prompts are sorted, so that those which share their first tokens stand together; a batch is one tree of
  tokens (`prefix_tree.py`) and one forward pass: shared prefixes are computed once, label words hang below
  their prompt as branches, and there is no padding.
- The keys and values of the first prompt of a batch stay in the cache; the next batch, or the next call, goes
  on from what it shares with them. Memory grows with the tokens of a batch, never with the number of queries.
- A long unbranched beginning is computed apart, without a mask: attention kernels are faster where they know
  that the mask is causal.
- In bfloat16 a logit near 20 is rounded to the nearest 0.125. The logits that matter (the likeliest tokens,
  and those of the label words) are therefore computed again in float32 from the same hidden state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from icl_compiler.backends.backend import Generation, Generations, LabelScores, Progress, Usage
from icl_compiler.errors import BackendError, ContextLengthError, ModelError
from icl_compiler.models import load_causal_lm
from icl_compiler.prefix_tree import PrefixTree, WordTree, common_prefix, plan_batches
from icl_compiler.tokenizer import TokenIds

_REFINED_TOKENS = 32
_HEAD_ROWS = 128
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class TransformersBackend:
    """A causal language model of `transformers`, with exact label scoring.

    Args:
        model: an embedded model (`icl models list`), a folder, or a name on the model hub.
        dtype: `auto` is bfloat16 where the processor computes in it, else float32.
        tree_tokens: about how many new tokens one forward pass takes; more uses more memory.
    """

    def __init__(self, model: str, dtype: str = "auto", *, tree_tokens: int | None = None) -> None:
        self.model = model
        gpu = torch.cuda.is_available()
        self._dtype = _choose_dtype(dtype, gpu=gpu)
        self._device = torch.device("cuda" if gpu else "cpu")
        self.device = f"{self._device.type}, {str(self._dtype).removeprefix('torch.')}"
        self._lm: Any = load_causal_lm(model, self._dtype)
        self._lm.to(self._device).eval()
        config = self._lm.config.get_text_config()
        _require_full_attention(model, config)
        self.max_prompt_tokens: int = config.max_position_embeddings
        self._tree_tokens = tree_tokens or (8192 if gpu else 512)
        self._causal_from = 2048 if gpu else 768
        self._head: Any = self._lm.get_output_embeddings()
        self._cache = _Cache(self._lm)
        self._plain_head = self._logits_are_head_of_hidden()

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
        for batch in plan_batches(distinct.arrays, extra=len(words), limit=self._tree_tokens):
            part = [distinct.arrays[i] for i in batch]
            hidden, cost = self._forward(part, words)
            edges = self._edge_logprobs(hidden, words)
            result[batch.start : batch.stop] = np.add.reduceat(edges[:, order], starts, axis=1)
            computed += cost.computed_tokens
            forwards += cost.forwards
            if progress is not None:
                progress(sum(distinct.counts[i] for i in batch))
        if not np.isfinite(result).all():
            raise BackendError(
                f"the model {self.model!r} gave log-probabilities that are not finite; "
                "try --dtype float32, and check that the weights are complete"
            )
        usage = Usage(sum(len(prompt) for prompt in prompts), computed, forwards)
        return LabelScores(result[distinct.position], usage)

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[Float[np.ndarray, " tokens"]], Usage]:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, in nats.

        Raises:
            ContextLengthError: if a prompt with its continuation does not fit the model's context.
        """
        if len(prompts) != len(continuations):
            raise BackendError(f"{len(prompts)} prompts were given with {len(continuations)} continuations")
        scores = []
        usage = Usage(0, 0, 0)
        for prompt, continuation in zip(prompts, continuations, strict=True):
            self._require_fit([prompt], len(continuation))
            words = WordTree.build([continuation])
            hidden, cost = self._forward([np.asarray(prompt, dtype=np.int64)], words)
            scores.append(self._edge_logprobs(hidden, words)[0])
            usage = usage.plus(Usage(len(prompt), cost.computed_tokens, cost.forwards))
            if progress is not None:
                progress(1)
        return scores, usage

    def generate(
        self,
        prompts: Sequence[TokenIds],
        terminator: TokenIds,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """One continuation of every prompt, up to `terminator`; temperature 0 takes the likeliest token.

        Each prompt has a random stream of its own, so that its sample does not depend on its neighbours.

        Raises:
            ContextLengthError: if a prompt with `max_new_tokens` more does not fit the model's context.
        """
        self._require_fit(prompts, max_new_tokens)
        arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        order = sorted(range(len(arrays)), key=lambda i: arrays[i].tolist())
        items: list[Generation | None] = [None] * len(arrays)
        computed = forwards = 0
        nothing = WordTree.build([[0]])
        sorted_arrays = [arrays[i] for i in order]
        for batch in plan_batches(sorted_arrays, extra=max_new_tokens, limit=self._tree_tokens):
            rows = [order[i] for i in batch]
            part = [sorted_arrays[i] for i in batch]
            hidden, cost = self._forward(part, nothing, keep_tree=True)
            streams = [np.random.default_rng([seed, row]) for row in rows]
            finished, steps = self._decode(hidden[:, 0], cost, streams, list(terminator), max_new_tokens, temperature)
            computed += cost.computed_tokens + steps.computed_tokens
            forwards += cost.forwards + steps.forwards
            for row, item in zip(rows, finished, strict=True):
                items[row] = item
            if progress is not None:
                progress(len(rows))
        done = [item for item in items if item is not None]
        return Generations(done, Usage(sum(len(prompt) for prompt in prompts), computed, forwards))

    @torch.inference_mode()
    def _forward(
        self, prompts: Sequence[Int[np.ndarray, " _"]], words: WordTree, *, keep_tree: bool = False
    ) -> "tuple[torch.Tensor, _Cost]":
        """Hidden states `(prompts, predicting nodes, width)` of a batch of prompts, sorted."""
        trunk = min(common_prefix(prompts[0], prompt) for prompt in (prompts[0], prompts[-1]))
        trunk = min(trunk, min(len(prompt) for prompt in prompts) - 1)
        start = self._cache.keep(prompts[0][:trunk])
        forwards, computed = 1, trunk - start
        if trunk - start > self._causal_from:
            self._run(prompts[0][start:trunk], np.arange(start, trunk), None)
            self._cache.tokens = prompts[0][:trunk]
            start = trunk
            forwards = 2
        else:
            computed = 0
        tree = PrefixTree.build(prompts, start=start)
        full = tree.with_words(words)
        mask = torch.ones(1, 1, len(full.tokens), start + len(full.tokens), dtype=torch.bool)
        mask[0, 0, :, start:] = torch.from_numpy(full.ancestors)
        hidden = self._run(full.tokens, full.positions, mask)
        computed += len(full.tokens)
        predicting = words.predicting
        copies = len(tree.tokens) + np.arange(len(prompts))[:, None] * len(words)
        rows = np.where(predicting < 0, tree.ends[:, None], copies + predicting)
        picked = hidden[torch.from_numpy(rows.ravel()).to(self._device)].view(*rows.shape, -1)
        first_path = len(prompts[0]) - start
        if keep_tree:
            visible = torch.ones(len(prompts), start + len(tree.tokens), dtype=torch.bool)
            visible[:, start:] = torch.from_numpy(tree.ancestors[tree.ends])
            positions = np.array([len(prompt) for prompt in prompts])
            return picked, _Cost(0, computed, forwards, visible, positions, prompts[0])
        self._cache.crop(len(full.tokens) - first_path, prompts[0])
        return picked, _Cost(0, computed, forwards, None, None, prompts[0])

    def _run(
        self, tokens: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One forward pass on the cache: hidden states `(n, width)`."""
        output = self._lm.base_model(
            input_ids=torch.from_numpy(tokens)[None].to(self._device),
            position_ids=torch.from_numpy(positions)[None].to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
            past_key_values=self._cache.kv,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _edge_logprobs(self, hidden: torch.Tensor, words: WordTree) -> Float[np.ndarray, "prompts edges"]:
        """Log-probability of each edge's token at its node, for every prompt."""
        node_row = np.searchsorted(words.predicting, words.edge_nodes)
        tokens = torch.from_numpy(words.edge_tokens).to(self._device)
        rows = torch.from_numpy(node_row).to(self._device)
        return np.stack([self._at(states, rows, tokens).cpu().numpy().astype(np.float64) for states in hidden])

    def _at(self, states: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of `tokens[i]` after the state `rows[i]`."""
        pieces = []
        for begin in range(0, len(states), _HEAD_ROWS):
            inside = (rows >= begin) & (rows < begin + _HEAD_ROWS)
            logits = self._logits(states[begin : begin + _HEAD_ROWS], rows[inside] - begin, tokens[inside])
            normaliser = logits.logsumexp(dim=-1)
            pieces.append((inside, logits[rows[inside] - begin, tokens[inside]] - normaliser[rows[inside] - begin]))
        result = torch.empty(len(tokens), device=self._device)
        for inside, values in pieces:
            result[inside] = values
        return result

    def _logits(self, states: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits in float32; the likeliest tokens and `(rows, tokens)` are exact for the given states."""
        logits: torch.Tensor = self._head(states).float()
        if self._dtype == torch.float32 or not self._plain_head:
            return logits
        weight, bias = self._head.weight, self._head.bias
        exact = states.float()
        likely = logits.topk(min(_REFINED_TOKENS, logits.shape[-1]), dim=-1).indices
        refined = torch.einsum("nd,nkd->nk", exact, weight[likely].float())
        wanted = (exact[rows] * weight[tokens].float()).sum(-1)
        if bias is not None:
            refined += bias[likely].float()
            wanted += bias[tokens].float()
        logits.scatter_(1, likely, refined)
        logits[rows, tokens] = wanted
        return logits

    @torch.inference_mode()
    def _decode(
        self,
        states: torch.Tensor,
        cost: "_Cost",
        streams: Sequence[np.random.Generator],
        terminator: list[int],
        max_new_tokens: int,
        temperature: float,
    ) -> tuple[list[Generation], Usage]:
        """Continue every sequence of a tree that is in the cache, all of them one token a step."""
        assert cost.visible is not None and cost.positions is not None
        visible, positions = cost.visible, cost.positions
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in streams]
        active = list(range(len(streams)))
        computed = forwards = 0
        none = torch.empty(0, dtype=torch.long, device=self._device)
        added = visible.shape[1] - len(cost.first)
        for _ in range(max_new_tokens):
            logprobs = torch.log_softmax(self._logits(states, none, none), dim=-1).cpu().double().numpy()
            for row, sequence in enumerate(active):
                token = _sample(logprobs[row], temperature, streams[sequence])
                found[sequence][0].append(token)
                found[sequence][1].append(float(logprobs[row, token]))
            active = [s for s in active if found[s][0][-len(terminator) :] != terminator]
            if not active or len(found[active[0]][0]) == max_new_tokens:
                break
            step = len(found[active[0]][0]) - 1
            own = torch.zeros(len(streams), len(active), dtype=torch.bool)
            own[active, range(len(active))] = True
            visible = torch.cat([visible, own], dim=1)
            tokens = np.array([found[s][0][-1] for s in active], dtype=np.int64)
            states = self._run(tokens, positions[active] + step, visible[active][None, None])
            added += len(active)
            computed += len(active)
            forwards += 1
        self._cache.crop(added, cost.first)
        items = [Generation(t, lp, t[-len(terminator) :] == terminator) for t, lp in found]
        return items, Usage(0, computed, forwards)

    def _require_fit(self, prompts: Sequence[TokenIds], more: int) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + more > self.max_prompt_tokens:
            raise ContextLengthError(
                f"a prompt of {longest} tokens and an answer of {more} exceed the context of {self.model!r}, "
                f"{self.max_prompt_tokens} tokens; compile with a smaller --budget"
            )
        if any(not len(prompt) for prompt in prompts):
            raise BackendError("a prompt is empty; a template must write something before the answer")

    @torch.inference_mode()
    def _logits_are_head_of_hidden(self) -> bool:
        """Whether the logits are the output layer on the last hidden state, without scaling or capping."""
        ids = torch.arange(4, device=self._device)[None]
        hidden = self._lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.equal(self._head(hidden), self._lm(input_ids=ids, use_cache=False).logits))


class _Cost(NamedTuple):
    """What a forward pass cost, and, for generation, what each sequence may attend to in the cache."""

    prompt_tokens: int
    computed_tokens: int
    forwards: int
    visible: torch.Tensor | None
    positions: Int[np.ndarray, " sequences"] | None
    first: Int[np.ndarray, " _"]


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

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._new: Callable[[], Any] = lambda: DynamicCache(config=model.config)
        self.kv = self._new()
        self.tokens = np.empty(0, dtype=np.int64)

    def keep(self, prefix: Int[np.ndarray, " _"]) -> int:
        """Drop what does not begin `prefix`; how many tokens are left."""
        shared = common_prefix(self.tokens, prefix)
        self.crop(len(self.tokens) - shared, prefix[:shared])
        return shared

    def crop(self, count: int, tokens: Int[np.ndarray, " _"]) -> None:
        """Drop the last `count` tokens; `tokens` are those that remain."""
        if not len(tokens):
            self.kv = self._new()
        elif count:
            self.kv.crop(-count)
        self.tokens = tokens


def _choose_dtype(name: str, *, gpu: bool) -> torch.dtype:
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise ModelError(f"unknown dtype {name!r}; expected auto, {', '.join(_DTYPES)}")
    fast = torch.cuda.is_bf16_supported() if gpu else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def _require_full_attention(model: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"the transformers backend scores models whose every layer attends to the whole prompt; "
            f"{model!r} has layers of the kinds {', '.join(sorted(kinds))}"
        )


def _sample(logprobs: Float[np.ndarray, " tokens"], temperature: float, stream: np.random.Generator) -> int:
    if temperature == 0:
        return int(logprobs.argmax())
    scaled = logprobs / temperature
    weights = np.exp(scaled - scaled.max())
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))
