"""The echo's law by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.backends.backend import Backend, Usage
from icl_compiler.backends.echo import EchoBackend

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def test_it_is_a_backend():
    assert isinstance(EchoBackend("echo", "auto"), Backend)


def test_label_logprobs_by_hand():
    # [1, 2] stands twice, [2, 1, 2] once (overlaps count), [3] never: 3, 2 and 1 of 1 + 3 + 2 + 1.
    finished = []
    scores = EchoBackend().label_logprobs([[1, 2, 1, 2], []], [[1, 2], [2, 1, 2], [3]], progress=finished.append)
    expected = [[math.log(3 / 7), math.log(2 / 7), math.log(1 / 7)], [math.log(1 / 4)] * 3]
    np.testing.assert_allclose(scores.logprobs, expected, rtol=1e-12)
    assert scores.usage == Usage(prompt_tokens=4, computed_tokens=4, forwards=2)
    assert sum(finished) == 2


@settings(deadline=None)
@given(st.lists(TOKENS, max_size=4), st.lists(TOKENS.filter(len), min_size=1, max_size=4))
def test_label_logprobs_by_counting_in_strings(prompts, words):
    scores = EchoBackend().label_logprobs(prompts, words)
    assert scores.logprobs.shape == (len(prompts), len(words))
    for prompt, row in zip(prompts, np.exp(scores.logprobs), strict=True):
        text = "".join(map(str, prompt))
        counts = [sum(text.startswith("".join(map(str, word)), i) for i in range(len(text))) for word in words]
        np.testing.assert_allclose(row, [(1 + n) / (1 + sum(counts) + len(words)) for n in counts], rtol=1e-12)
        assert row.sum() < 1


def test_prompts_may_be_arrays_and_tuples():
    given_as = [np.array([1, 2]).tolist(), (1, 2)]
    first, second = EchoBackend().label_logprobs(given_as, [(1,), [2]]).logprobs
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(("length", "expected"), [(2, [3, 4]), (9, [1, 2, 3, 4])])
def test_generate_repeats_the_end_of_the_prompt(length, expected):
    [item] = EchoBackend().generate([[1, 2, 3, 4]], [10], max_new_tokens=length).items
    assert (item.tokens, item.logprobs, item.finished) == (expected, [0.0] * len(expected), False)
