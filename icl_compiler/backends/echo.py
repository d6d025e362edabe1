"""A backend without a model: its label law is a known function of the prompt.

`P(word | prompt) = (1 + how often the word stands in the prompt) / (1 + sum over words of (1 + how often))`,
and what is missing to one is the mass of all other continuations. So the gap between a program on this
backend and a reference can be computed by hand, and every command can be tried in a second without weights
(`--model echo`).
"""

from collections.abc import Sequence

import numpy as np

from icl_compiler.backends.backend import Generation, Generations, LabelScores, Progress, SequenceScores, Usage
from icl_compiler.tokenizer import TokenIds


class EchoBackend:
    """Counts label words.

    >>> backend = EchoBackend()
    >>> scores = backend.label_logprobs([[7, 1, 7, 1]], [[7, 1], [8, 1]])
    >>> np.exp(scores.logprobs).round(3)
    array([[0.6, 0.2]])
    """

    model = "echo"
    device = "no model"
    max_prompt_tokens = 1_000_000

    def __init__(self, model: str = "echo", dtype: str = "auto") -> None:
        pass

    def label_logprobs(
        self,
        prompts: Sequence[TokenIds],
        label_words: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> LabelScores:
        """See the module: smoothed counts of each label word in each prompt."""
        counts = np.array([[1 + _count(prompt, word) for word in label_words] for prompt in prompts], dtype=float)
        counts = counts.reshape(len(prompts), len(label_words))
        if progress is not None:
            progress(len(prompts))
        tokens = sum(len(prompt) for prompt in prompts)
        return LabelScores(
            np.log(counts / (1 + counts.sum(axis=1, keepdims=True))), Usage(tokens, tokens, len(prompts))
        )

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
        """The last `max_new_tokens` tokens of the prompt again."""
        items = [
            Generation(list(prompt[-max_new_tokens:]), [0.0] * min(max_new_tokens, len(prompt)), False)
            for prompt in prompts
            for _ in range(samples)
        ]
        tokens = sum(len(prompt) for prompt in prompts)
        return Generations(items, Usage(tokens, tokens, len(prompts)))

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> SequenceScores:
        """A token is as probable as it was frequent before: (count + 1 / 65,536) / (tokens before + 1).

        >>> scores = EchoBackend().sequence_logprobs([[7, 7, 8]], [[7, 8]])
        >>> np.exp(scores.logprobs[0]).round(3)
        array([0.5, 0.2])
        """
        scores = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            before, law = list(prompt), []
            for token in continuation:
                law.append((before.count(token) + 2**-16) / (len(before) + 1))
                before.append(token)
            scores.append(np.log(law))
            if progress is not None:
                progress(1)
        tokens = sum(len(prompt) for prompt in prompts)
        return SequenceScores(scores, Usage(tokens, tokens, len(prompts)))


def _count(prompt: TokenIds, word: TokenIds) -> int:
    prompt, word = list(prompt), list(word)
    return sum(prompt[i : i + len(word)] == word for i in range(len(prompt) - len(word) + 1))
