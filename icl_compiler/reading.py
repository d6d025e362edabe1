"""What the base model makes of a text, as a vector: an encoder that knows the task, beside one of sentences.

v(x) = (h(x) - mean) / scale, each coordinate by itself, for two hidden states h, side by side, each of length 1

- x is read in the prompt without shots, so that the model knows the task. The first h is the mean over the tokens of
  the query after three fifths of the layers: what the text is about. The second is the last state, where the answer
  would begin: what the model would say. Either alone is worse on some tasks (docs/compiling.md has figures).
- Mean and standard deviation are those of the pool. "kNN prompting" (Xu et al. 2023, arXiv 2303.13824) compares the law
  of the next token, which is computed from the second h.
- It is computed in float32, whatever the engine computes in: in bfloat16 it would depend on the company that a text is
  read in which rows are near it.
- Of a prompt of more than 512 tokens the middle is left out.
"""

import sys
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from icl_compiler.errors import ModelError
from icl_compiler.models import cache_folder, locate
from icl_compiler.templates import EncodedTemplate
from icl_compiler.tokenizer import TokenIds
from retrievers.encoder import CachedEncoder, folder_of, model_identity, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from icl_compiler.backends.hf_model import FrozenModel

DEPTH = 0.6
"""Share of the layers after which the mean is taken."""
VECTORS = 2
"""That stand side by side."""
MOST_TOKENS = 512
"""Of a prompt that is read."""
_FEW = 100  # texts; more take some seconds
_ROUNDING = 1e-5  # of a hidden state in float32, read in other company


@dataclass(frozen=True, eq=False)
class Reading:
    """The base model as an encoder.

    Attributes:
        model: its name.
        template: of the prompt without shots.
        mean: of each coordinate of both states, over the pool.
        scale: its standard deviation there; 1 where that is 0, or what rounding makes of it.
    """

    model: str
    template: EncodedTemplate
    mean: Float32[np.ndarray, " width"]
    scale: Float32[np.ndarray, " width"]

    @classmethod
    def fitted_to(cls, texts: "Sequence[str]", model: str, template: EncodedTemplate) -> "Reading":
        """The one whose mean and scale are those of `texts`, one at least.

        Raises:
            ModelError: if the model cannot be loaded here.
        """
        if model == "echo":
            raise ModelError("the model 'echo' makes nothing of a text; leave 'base' out of the encoder's name")
        states = _states(model).encode(_keys(template, texts)).astype(np.float64)
        mean, scale = states.mean(axis=0), states.std(axis=0)
        scale[scale <= _ROUNDING * (1 + np.abs(mean))] = 1
        return cls(model, template, mean.astype(np.float32), scale.astype(np.float32))

    def fitted(self, texts: "Sequence[str]") -> "Reading":
        """The same for another pool."""
        return Reading.fitted_to(texts, self.model, self.template)

    def encode(self, texts: "Sequence[str]") -> Float32[np.ndarray, "texts width"]:
        """Two vectors of length 1 per text, scaled to length 1 together."""
        if not len(texts):
            return np.empty((0, len(self.mean)), dtype=np.float32)
        both = (_states(self.model).encode(_keys(self.template, texts)) - self.mean) / self.scale
        return np.hstack([unit(part) for part in np.split(both, VECTORS, axis=1)]) * np.float32(VECTORS**-0.5)

    def tokens(self, texts: "Sequence[str]") -> int:
        """How many tokens the base model reads for the vectors of these texts, each once."""
        return sum(len(prompt) for _, prompt in _prompts(self.template, list(dict.fromkeys(texts))))

    def remember(self, texts: int) -> None:
        """Keep the states of so many texts in memory at most."""
        _states(self.model).remembered = texts


def read_ahead(texts: "Sequence[str]", model: str, template: EncodedTemplate, *, until: float) -> bool:
    """Read the texts and remember them; whether that was done before `until`, of `time.monotonic`."""
    keys, block = _keys(template, texts), _States.block
    for start in range(0, len(keys), block):
        if time.monotonic() >= until:
            return False
        _states(model).encode(keys[start : start + block])
    return True


def shortened(prompt: TokenIds, most: int = MOST_TOKENS) -> list[int]:
    """The prompt, without its middle where it is longer than `most`.

    >>> shortened([1, 2, 3, 4, 5], 4), shortened([1, 2, 3], 4)
    ([1, 2, 4, 5], [1, 2, 3])
    """
    half = most // 2
    return list(prompt) if len(prompt) <= most else [*prompt[:half], *prompt[-half:]]


def _keys(template: EncodedTemplate, texts: "Sequence[str]") -> list[str]:
    """The prompts without shots, as texts that a cache knows them by: where the query begins, and the tokens."""
    return [" ".join(map(str, [begin, *prompt])) for begin, prompt in _prompts(template, texts)]


def _prompts(template: EncodedTemplate, texts: "Sequence[str]") -> list[tuple[int, list[int]]]:
    """The prompts without shots: where the query begins in each, and its tokens."""
    begin = min(len(template.head), MOST_TOKENS // 2)
    return [(begin, shortened([*template.head, *query])) for query in template.queries(texts)]


@cache
def _states(model: str) -> "_States":
    return _States(model)


class _States(CachedEncoder):
    """Both hidden states of a prompt; the model is loaded for the first one."""

    block = 1000

    def __init__(self, model: str) -> None:
        super().__init__(cache=cache_folder() / "vectors")
        self._model = model

    def _computed(self, texts: list[str]) -> Float32[np.ndarray, "texts width"]:
        from tqdm import tqdm

        from icl_compiler.backends.hf_states import reading_states

        begins, prompts = zip(*((begin, tokens) for begin, *tokens in map(_numbers, texts)), strict=True)
        hidden = len(prompts) <= _FEW or not sys.stderr.isatty()
        with tqdm(total=len(prompts), desc="reading the rows", unit="row", leave=False, disable=hidden) as bar:
            layer = max(1, round(DEPTH * len(self._network.network.base_model.layers)))
            return reading_states(self._network, prompts, begins, layer, bar.update).astype(np.float32)

    def _identity(self) -> str | None:
        folder = folder_of(locate(self._model, kind="language model"))
        return (
            None
            if folder is None
            else f"hidden states, mean {DEPTH:.3f} deep and last, of {model_identity(Path(folder), 'transformers')}"
        )

    @cached_property
    def _network(self) -> "FrozenModel":
        from icl_compiler.backends.hf_model import FrozenModel

        return FrozenModel(self._model, "float32")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]
