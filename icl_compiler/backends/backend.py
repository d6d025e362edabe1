"""The seam between the compiler and the engines: what a backend must answer.

- Prompts and label words are token ids; a backend knows no text.
- `label_logprobs` is exact for label words of any length: `log P(word | prompt)`, the product over its tokens
  at temperature 1, without truncation or penalties.
- An engine that gives only the k likeliest tokens cannot be exact; its answer then carries lower and upper bounds,
  and says so (`LabelScores.upper`).
- Every answer says what it cost: tokens in the prompts, tokens really computed, forward passes. Hidden model
  calls are a defect.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from icl_compiler.errors import BackendError, ContextLengthError
from icl_compiler.tokenizer import TokenIds

Progress = Callable[[int], object]
"""Called with the number of prompts finished since the last call."""


class Usage(NamedTuple):
    """What an answer cost."""

    prompt_tokens: int
    """Tokens in the prompts as written."""
    computed_tokens: int
    """Tokens that went through the model: shared prefixes once, label words as a tree."""
    forwards: int
    """Forward passes of the model, or requests to a server."""

    def plus(self, other: "Usage") -> "Usage":
        """The sum of two costs.

        >>> Usage(1, 2, 3).plus(Usage(1, 1, 1))
        Usage(prompt_tokens=2, computed_tokens=3, forwards=4)
        """
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))


class LabelScores(NamedTuple):
    """Log-probabilities of label words, in nats, and their cost."""

    logprobs: Float[np.ndarray, "prompts labels"]
    """Exact where `upper` is `None`, else lower bounds; `-inf` where nothing is known from below."""
    usage: Usage
    upper: Float[np.ndarray, "prompts labels"] | None = None
    """Upper bounds, of an engine that gives only the k likeliest tokens."""

    def averaged(self, prompts: int) -> "LabelScores":
        """The mean law of each `prompts` prompts that follow one another.

        The mean of probabilities, not of logarithms: it is a law of the labels and "other" again, bounds stay bounds,
        and one prompt that gives a label nothing is no veto. Its log-loss is at most the mean log-loss of its parts.

        >>> LabelScores(np.log([[0.5, 0.25], [0.25, 0.5]]), Usage(8, 8, 1)).averaged(2).logprobs.round(3).tolist()
        [[-0.981, -0.981]]
        """
        if prompts == 1:
            return self

        def mean(logprobs: Float[np.ndarray, "prompts labels"]) -> Float[np.ndarray, "queries labels"]:
            sets = logprobs.reshape(-1, prompts, logprobs.shape[1])
            averaged: Float[np.ndarray, "queries labels"] = np.logaddexp.reduce(sets, axis=1) - np.log(prompts)
            return averaged

        return LabelScores(mean(self.logprobs), self.usage, None if self.upper is None else mean(self.upper))


class Generation(NamedTuple):
    """One sampled continuation."""

    tokens: list[int]
    """The tokens, the terminator included if it was reached."""
    logprobs: list[float]
    """Log-probability of each token, in nats, at temperature 1."""
    finished: bool
    """Whether the terminator was reached within `max_new_tokens`."""


class Generations(NamedTuple):
    """Continuations of every prompt, and what all of them cost together."""

    items: list[Generation]
    """All samples of the first prompt, then all of the second, and so on."""
    usage: Usage


class SequenceScores(NamedTuple):
    """Log-probabilities of given continuations, in nats, and their cost."""

    logprobs: list[Float[np.ndarray, " _"]]
    """For each continuation the log-probability of each of its tokens, after the prompt and the tokens before it."""
    usage: Usage


@runtime_checkable
class Backend(Protocol):
    """An engine that runs a frozen language model."""

    @property
    def model(self) -> str:
        """The model's name, as the user gave it."""

    @property
    def device(self) -> str:
        """Where and in which number format it runs, in words: `cpu, bfloat16`."""

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, label word included, that the model can read."""

    def label_logprobs(
        self,
        prompts: Sequence[TokenIds],
        label_words: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> LabelScores:
        """Exact log-probability of every label word after every prompt.

        Raises:
            ContextLengthError: if a prompt with its longest label word exceeds `max_prompt_tokens`.
            BackendError: if the engine fails.
        """

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

        The same `seed` gives the same continuations on the same engine and machine; from a server that puts requests
        together as they come, in numbers of few digits, only most of them: a token near a draw's edge may turn.
        """

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> SequenceScores:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`; no continuation is empty."""


def require_fit(prompts: Sequence[TokenIds], more: int, *, model: str, max_prompt_tokens: int) -> None:
    """Nothing, if every prompt holds something and fits the model's context with `more` tokens of an answer.

    Raises:
        ContextLengthError: if a prompt is too long.
        BackendError: if a prompt is empty.

    >>> require_fit([[5, 6]], 1, model="tiny", max_prompt_tokens=3)
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + more > max_prompt_tokens:
        raise ContextLengthError(
            f"a prompt of {longest} tokens and an answer of {more} exceed the context of {model!r}, "
            f"{max_prompt_tokens} tokens; compile with a smaller --budget"
        )
    if any(not len(prompt) for prompt in prompts):
        raise BackendError("a prompt is empty; a template must write something before the answer")


def require_pairs(prompts: Sequence[TokenIds], continuations: Sequence[TokenIds]) -> None:
    """Nothing, if each prompt has a continuation of one token or more.

    Raises:
        BackendError: if their numbers differ, or a continuation is empty.

    >>> require_pairs([[5, 6]], [[7]])
    """
    if len(prompts) != len(continuations):
        raise BackendError(
            f"{len(prompts)} prompts were given with {len(continuations)} continuations; give one to each prompt"
        )
    if not all(len(continuation) for continuation in continuations):
        raise BackendError("a continuation is empty; expected one token or more")
