import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import brute_force, brute_force_table, save_tiny_model

from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.errors import BackendError, ContextLengthError, ModelError
from icl_compiler.messages import train_test

WORDS = [[5, 9], [5, 7, 9], [6, 9], [11, 12, 13, 9], [11, 12, 14, 9], [8, 9]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def related_prompts(seed: int, count: int = 12) -> list[list[int]]:
    """Prompts that share beginnings of all lengths, some of them twice, one a prefix of another."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(20, 97, 30).tolist()]
    while len(prompts) < count:
        begun = prompts[rng.integers(len(prompts))]
        cut = int(rng.integers(1, len(begun) + 1))
        prompts.append([*begun[:cut], *rng.integers(20, 97, int(rng.integers(0, 20))).tolist()])
    return [*prompts, prompts[3]]


@pytest.mark.parametrize("tree_tokens", [1, 40, 512])
@pytest.mark.parametrize("causal_from", [4, 10_000])
def test_equals_one_forward_per_label(tiny: Path, tree_tokens: int, causal_from: int) -> None:
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=tree_tokens)
    backend._causal_from = causal_from
    for seed in range(3):
        prompts = related_prompts(seed)
        scores = backend.label_logprobs(prompts, WORDS)
        np.testing.assert_allclose(scores.logprobs, brute_force_table(backend.network, prompts, WORDS), atol=1e-5)
        assert scores.usage.prompt_tokens == sum(map(len, prompts))


def test_one_word_of_one_token(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompts = related_prompts(5)
    scores = backend.label_logprobs(prompts, [[7], [8]])
    np.testing.assert_allclose(scores.logprobs, brute_force_table(backend.network, prompts, [[7], [8]]), atol=1e-5)


def test_probabilities_of_a_whole_vocabulary_sum_to_one(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    scores = backend.label_logprobs([[3, 4, 5]], [[token] for token in range(97)])
    assert np.exp(scores.logprobs).sum() == pytest.approx(1, abs=1e-5)


def test_shared_prefix_is_computed_once(tiny: Path) -> None:
    rng = np.random.default_rng(0)
    shots = rng.integers(20, 97, 150).tolist()
    queries = [rng.integers(20, 97, 10).tolist() for _ in range(200)]
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=128)
    usage = backend.label_logprobs([shots + query for query in queries], WORDS).usage
    inner = len({tuple(word[:end]) for word in WORDS for end in range(1, len(word))})
    needed = sum(len(query) + inner for query in queries)
    assert usage.computed_tokens - len(shots) <= 1.05 * needed


def test_memory_grows_with_a_batch_and_not_with_the_queries(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=256)
    forward = backend._model.run
    peaks: list[int] = []

    def watched(tokens: Any, positions: Any, mask: Any, cache: Any) -> torch.Tensor:
        peaks.append(cache.get_seq_length() + len(tokens))
        return forward(tokens, positions, mask, cache)

    monkeypatch.setattr(backend._model, "run", watched)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(20, 97, rng.integers(20, 60)).tolist() for _ in range(1000)]
    for count in (100, 1000):
        backend.label_logprobs(prompts[:count], WORDS)
        assert max(peaks) <= 256 + 60
    assert len(peaks) > 100


def test_next_call_goes_on_from_the_last(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    shots = list(range(20, 90)) * 2
    first = backend.label_logprobs([[*shots, 3]], [[7], [8]])
    second = backend.label_logprobs([[*shots, 4, 5]], [[7], [8]])
    assert first.usage.computed_tokens == len(shots) + 1 + 3  # 141 nodes padded to 144
    assert second.usage.computed_tokens == 2
    np.testing.assert_allclose(
        second.logprobs, brute_force_table(backend.network, [[*shots, 4, 5]], [[7], [8]]), atol=1e-5
    )


def test_progress_counts_every_prompt(tiny: Path) -> None:
    seen: list[int] = []
    prompts = related_prompts(1)
    TransformersBackend(str(tiny), "float32", tree_tokens=50).label_logprobs(prompts, WORDS, progress=seen.append)
    assert sum(seen) == len(prompts)
    assert len(seen) > 1


def test_sequence_logprobs_token_by_token(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompts = related_prompts(2)[:4]
    continuations = [[5, 6, 7], [9], [30, 31, 32, 33, 34], [5, 5]]
    scores, usage = backend.sequence_logprobs(prompts, continuations)
    for prompt, continuation, found in zip(prompts, continuations, scores, strict=True):
        assert found.shape == (len(continuation),)
        assert found.sum() == pytest.approx(brute_force(backend.network, prompt, continuation), abs=1e-5)
    assert usage.forwards == 1
    assert usage.computed_tokens <= usage.prompt_tokens + sum(map(len, continuations)) - 4


@pytest.mark.parametrize("tree_tokens", [1, 40, 512])
def test_sequences_that_share_their_beginnings(tiny: Path, tree_tokens: int) -> None:
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=tree_tokens)
    prompts = related_prompts(4)
    continuations = [[5, 6, 7][: 1 + i % 3] for i in range(len(prompts))]
    scores = backend.sequence_logprobs(prompts, continuations).logprobs
    for prompt, continuation, found in zip(prompts, continuations, scores, strict=True):
        assert found.sum() == pytest.approx(brute_force(backend.network, prompt, continuation), abs=1e-5)


def test_sequence_scores_refuse_what_has_no_meaning(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    with pytest.raises(BackendError, match="2 prompts were given with 1 continuations"):
        backend.sequence_logprobs([[3], [4]], [[5]])
    with pytest.raises(BackendError, match="a continuation is empty"):
        backend.sequence_logprobs([[3]], [[]])


def test_an_interrupted_call_leaves_no_trace(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompts = related_prompts(6)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._model, "logprobs_at", interrupt)
        with pytest.raises(KeyboardInterrupt):
            backend.label_logprobs(prompts, WORDS)
    found = backend.label_logprobs(prompts, WORDS).logprobs
    np.testing.assert_allclose(found, brute_force_table(backend.network, prompts, WORDS), atol=1e-5)


def test_greedy_generation_equals_transformers(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=64)
    prompts = related_prompts(3, count=6)
    found = backend.generate(prompts, [1000], max_new_tokens=9, temperature=0.0)
    for prompt, item in zip(prompts, found.items, strict=True):
        expected = backend.network.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert item.tokens == expected[0, len(prompt) :].tolist()
        assert not item.finished
        assert sum(item.logprobs) == pytest.approx(brute_force(backend.network, prompt, item.tokens), abs=1e-4)


def test_generation_stops_at_the_terminator(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    free = backend.generate([[3, 4]], [1000], max_new_tokens=6, temperature=0.0).items[0]
    stopped = backend.generate([[3, 4]], free.tokens[2:4], max_new_tokens=6, temperature=0.0).items[0]
    assert stopped.finished
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]


@pytest.mark.parametrize("most_samples", [2, 3, 64])
@pytest.mark.parametrize("cache_tokens", [1, 120, 10_000])
def test_answers_do_not_depend_on_what_is_written_beside_them(tiny: Path, most_samples: int, cache_tokens: int) -> None:
    backend = TransformersBackend(str(tiny), "float32", tree_tokens=40)
    backend._most_samples = most_samples
    backend._cache_bytes = cache_tokens * backend._model.cache_bytes_per_token
    prompts = related_prompts(11)
    drawn = backend.generate(prompts, [7], max_new_tokens=30, samples=3, seed=5)
    lengths = [len(item.tokens) for item in drawn.items]
    assert min(lengths) < 10 and max(lengths) == 30  # some leave their batch early
    for i, item in enumerate(drawn.items):
        assert item.finished == (item.tokens[-1] == 7)
        expected = brute_force(backend.network, prompts[i // 3], item.tokens)
        assert sum(item.logprobs) == pytest.approx(expected, abs=1e-3)
    alone = TransformersBackend(str(tiny), "float32").generate(prompts[:1], [7], max_new_tokens=30, samples=3, seed=5)
    assert [item.tokens for item in alone.items] == [item.tokens for item in drawn.items[:3]]


def test_a_step_continues_many_prompts(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompts = related_prompts(13, count=15)
    found = backend.generate(prompts, [1000], max_new_tokens=8, samples=4)
    assert found.usage.forwards <= 7 + len(prompts)
    assert found.usage.computed_tokens <= sum(map(len, prompts)) * 17 / 16 + 7 * len(found.items)


def test_samples_follow_the_law_and_their_seed_not_their_neighbours(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompt = [3, 4, 5]
    together = backend.generate([prompt] * 2000, [1000], max_new_tokens=1, seed=3)
    again = backend.generate([prompt] * 50, [1000], max_new_tokens=1, seed=3)
    assert [item.tokens for item in again.items] == [item.tokens for item in together.items[:50]]
    law = np.exp(backend.label_logprobs([prompt], [[token] for token in range(97)]).logprobs[0])
    counts = np.bincount([item.tokens[0] for item in together.items], minlength=97)
    # Each count is binomial; five standard deviations, over 97 tokens, fail once in 20,000 runs.
    assert (np.abs(counts - 2000 * law) <= 5 * np.sqrt(2000 * law * (1 - law)) + 1).all()


def test_samples_of_one_prompt_share_its_computation(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    prompts = related_prompts(7, count=4)
    found = backend.generate(prompts, [7], max_new_tokens=4, samples=5, seed=1)
    assert len(found.items) == 5 * len(prompts)
    assert found.usage.computed_tokens <= sum(map(len, prompts)) + 3 * len(found.items)
    for i, item in enumerate(found.items):
        expected = brute_force(backend.network, prompts[i // 5], item.tokens)
        assert sum(item.logprobs) == pytest.approx(expected, abs=1e-4)
    assert len({tuple(item.tokens) for item in found.items[:5]}) > 1


def test_too_long_a_prompt_is_refused_with_the_numbers(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    with pytest.raises(ContextLengthError, match=r"300 tokens and an answer of 4 exceed the context .* 256 tokens"):
        backend.label_logprobs([[5] * 300], WORDS)


def test_weights_that_are_not_numbers_are_an_error(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "float32")
    with torch.no_grad():
        backend.network.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(BackendError, match="not finite"):
        backend.label_logprobs([[7]], WORDS)


def test_a_model_with_windowed_layers_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["sliding_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sliding_attention"):
        TransformersBackend(str(tmp_path))


@pytest.mark.models
@pytest.mark.parametrize(("name", "queries"), [("banking77", 1), ("mr", 4)])
def test_real_model_real_labels_against_brute_force(shared_data: Path, name: str, queries: int) -> None:
    train, test = (load_dataset(shared_data / name / f"{part}.jsonl") for part in ("train", "test"))
    program = compile_program(train, retriever="bm25", shots=2, examples=500)
    prompts = [prompt.tokens for prompt in program.prompts(test.texts[:queries])]
    backend = TransformersBackend("smollm2-135m", "float32")
    found = backend.label_logprobs(prompts, program.label_words).logprobs
    expected = brute_force_table(backend.network, prompts, program.label_words)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.models
def test_bfloat16_is_close_to_float32() -> None:
    train, test = train_test(300, 6)
    data = Dataset(tuple(m.text for m in train), tuple(m.label for m in train), "classification", "messages")
    program = compile_program(data, retriever="bm25", shots=6)
    prompts = [prompt.tokens for prompt in program.prompts([m.text for m in test])]
    laws = [
        np.exp(TransformersBackend("smollm2-135m", dtype).label_logprobs(prompts, program.label_words).logprobs)
        for dtype in ("float32", "bfloat16")
    ]
    assert 0.5 * np.abs(laws[0] - laws[1]).sum(axis=1).mean() < 0.01


def test_the_residual_stream_stays_in_float32_where_that_is_possible(tiny: Path) -> None:
    backend = TransformersBackend(str(tiny), "bfloat16")
    assert backend.device == "cpu, bfloat16 (residual float32)"
    assert backend._model.run(np.arange(5), np.arange(5), None, None).dtype == torch.float32
    assert TransformersBackend(str(tiny), "float32").device == "cpu, float32"
