"""What the vLLM backends share about generated text: seeds, and where a continuation ends."""

from collections.abc import Sequence

import numpy as np

from icl_compiler.backends.backend import Generation


def seed_of(seed: int, row: int) -> int:
    """A seed for a prompt, of 62 bits: those of neighbours are far apart, as vLLM counts up for further samples.

    >>> seed_of(0, 0) != seed_of(0, 1)
    True
    """
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]) >> 2


def until(terminator: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> Generation:
    """The continuation up to the first place where `terminator` is complete.

    >>> until([1, 2], [5, 1, 2, 7], [-0.1, -0.2, -0.3, -0.4])
    Generation(tokens=[5, 1, 2], logprobs=[-0.1, -0.2, -0.3], finished=True)
    """
    end = list(terminator)
    for stop in range(len(end), len(tokens) + 1):
        if list(tokens[stop - len(end) : stop]) == end:
            return Generation(list(tokens[:stop]), list(logprobs[:stop]), True)
    return Generation(list(tokens), list(logprobs), False)
