"""Many prompts continued together by a model of `transformers`, a token of each sample a step.

- A step reads all weights, however many samples it continues: what costs is the number of steps.
- Each row of a batch is a prompt, whose samples share its keys and values. A step adds a token of each sample to the
  row; a sample sees the prompt and its own tokens.
- Rows of which every sample has come to its end leave the batch where they are a quarter of it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from icl_compiler.backends.backend import Generation, Usage
from icl_compiler.backends.hf_model import FrozenModel

KeysAndValues = tuple[Float[torch.Tensor, "heads _ size"], Float[torch.Tensor, "heads _ size"]]


class Begun(NamedTuple):
    """A prompt that the model has read.

    Attributes:
        tokens: of the prompt.
        layers: keys and values of each layer at these tokens.
        state: hidden state of the last token.
    """

    tokens: Int[np.ndarray, " length"]
    layers: list[KeysAndValues]
    state: Float[torch.Tensor, " width"]


class Sampling(NamedTuple):
    """How an answer is drawn, and where it ends; temperature 0 takes the likeliest token."""

    terminator: list[int]
    max_new_tokens: int
    temperature: float

    def token(self, logprobs: Float[np.ndarray, " vocabulary"], stream: np.random.Generator) -> int:
        """The next token."""
        if self.temperature == 0:
            return int(logprobs.argmax())
        scaled = logprobs / self.temperature
        weights = np.exp(scaled - scaled.max())
        cumulative = np.cumsum(weights)
        return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))

    def finished(self, tokens: list[int]) -> bool:
        """Whether the terminator is reached."""
        return tokens[-len(self.terminator) :] == self.terminator


def continue_prompts(
    model: FrozenModel, prompts: Sequence[Begun], streams: Sequence[Sequence[np.random.Generator]], how: Sampling
) -> tuple[list[list[Generation]], Usage]:
    """The samples of each prompt, one for each of its streams (of which each prompt has as many), and their cost."""
    samples = len(streams[0])
    found: list[list[tuple[list[int], list[float]]]] = [[([], []) for _ in each] for each in streams]
    batch = _Batch.of(model, prompts, samples, how.max_new_tokens)
    rows = list(range(len(prompts)))
    states = torch.stack([prompt.state for prompt in prompts]).repeat_interleave(samples, dim=0)
    computed = forwards = 0
    for step in range(how.max_new_tokens):
        laws = model.next_logprobs(states).reshape(len(rows), samples, -1)
        for row, of_row in zip(rows, laws, strict=True):
            for (tokens, scores), stream, logprobs in zip(found[row], streams[row], of_row, strict=True):
                if not how.finished(tokens):
                    tokens.append(how.token(logprobs, stream))
                    scores.append(float(logprobs[tokens[-1]]))
        going = [not all(how.finished(tokens) for tokens, _ in found[row]) for row in rows]
        if not any(going) or step + 1 == how.max_new_tokens:
            break
        if sum(going) <= 3 * len(rows) / 4:
            batch = batch.take(np.flatnonzero(going))
            rows = [row for row, on in zip(rows, going, strict=True) if on]
        states = batch.step(np.array([[tokens[-1] for tokens, _ in found[row]] for row in rows], dtype=np.int64))
        computed += len(states)
        forwards += 1
    items = [[Generation(t, logprobs, how.finished(t)) for t, logprobs in each] for each in found]
    return items, Usage(0, computed, forwards)


class _Batch:
    """What the model has read: prompts, each a row that is padded behind its end, and their samples behind that."""

    def __init__(
        self,
        model: FrozenModel,
        layers: list[Any],
        tokens: Int[torch.Tensor, "rows columns"],
        visible: Bool[torch.Tensor, "rows samples columns"],
        positions: Int[np.ndarray, " rows"],
    ) -> None:
        from transformers.cache_utils import Cache

        self._model, self._layers, self._tokens = model, layers, tokens
        self._visible, self._positions = visible, positions
        self._cache: Any = Cache(layers=layers)
        self._cache.tokens = tokens  # for hooks that ask what was read

    @classmethod
    def of(cls, model: FrozenModel, prompts: Sequence[Begun], samples: int, most: int) -> "_Batch":
        """The prompts, with room for `most` tokens of each of their `samples`."""
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        longest = int(lengths.max())
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.tokens)] = torch.from_numpy(prompt.tokens)
        room = longest + samples * most
        layers = []
        for number in range(len(prompts[0].layers)):
            keys, values = zip(*(prompt.layers[number] for prompt in prompts), strict=True)
            layers.append(_roomy()(_padded(keys, room), _padded(values, room), longest))
        visible = torch.arange(longest) < torch.from_numpy(lengths)[:, None]
        return cls(model, layers, tokens, visible[:, None].expand(-1, samples, -1), lengths)

    def take(self, rows: Int[np.ndarray, " some"]) -> "_Batch":
        """Some of the rows."""
        places = torch.from_numpy(rows)
        layers = [layer.take(places) for layer in self._layers]
        return _Batch(self._model, layers, self._tokens[places], self._visible[places], self._positions[rows])

    def step(self, tokens: Int[np.ndarray, "rows samples"]) -> Float[torch.Tensor, "rows*samples width"]:
        """The hidden states of the next token of each sample, which from now on are in the cache."""
        rows, samples = tokens.shape
        own = torch.eye(samples, dtype=torch.bool).expand(rows, -1, -1)
        self._visible = torch.cat([self._visible, own], dim=2)
        self._tokens = torch.cat([self._tokens, torch.from_numpy(tokens)], dim=1)
        positions = np.repeat(self._positions[:, None], samples, axis=1)
        self._positions = self._positions + 1
        return self._model.run(tokens, positions, self._visible[:, None], self._cache).flatten(0, 1)


def _padded(parts: Sequence[torch.Tensor], room: int) -> torch.Tensor:
    """Keys or values of several prompts as the rows of one array with `room` for so many tokens."""
    heads, _, size = parts[0].shape
    rows = parts[0].new_zeros(len(parts), heads, room, size)
    for row, part in zip(rows, parts, strict=True):
        row[:, : part.shape[1]] = part
    return rows


@cache
def _roomy() -> Any:
    """The kind of a cache's layer that has room for what is to come, so that a step copies nothing."""
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[misc]
        def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._all_keys, self._all_values = keys, values
            self._show(used)

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            start = self.keys.shape[2]
            self._show(start + key_states.shape[2])
            self.keys[:, :, start:] = key_states
            self.values[:, :, start:] = value_states
            return self.keys, self.values

        def take(self, rows: torch.Tensor) -> Any:
            places = rows.to(self._all_keys.device)
            return Roomy(self._all_keys[places], self._all_values[places], self.keys.shape[2])

        def _show(self, used: int) -> None:
            self.keys, self.values = self._all_keys[:, :, :used], self._all_values[:, :, :used]

    return Roomy
