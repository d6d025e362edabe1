import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_vllm import CONTEXT, DROP, FakeVLLM, Json, Trouble, law, logprob
from hypothesis import given
from hypothesis import strategies as st
from real_vllm import RealVLLM

from icl_compiler.backends.backend import Backend
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.backends.label_walk import LabelWalk
from icl_compiler.backends.vllm_protocol import group_questions
from icl_compiler.backends.vllm_server import VLLMServerBackend
from icl_compiler.cli import main
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import BackendError, ContextLengthError, ModelError
from icl_compiler.messages import train_test

WORDS = [[5, 9], [5, 7, 9], [6, 9], [11, 12, 13, 9], [11, 12, 14, 9], [8, 9]]
QUESTIONS = 9  # about one prompt, for WORDS
# What is computed beside a prompt changes its rounding, most where AMX multiplies: 0.33 of 19 nats were seen.
BFLOAT16_NOISE = {"atol": 0.3, "rtol": 0.02}
TESTS = Path(__file__).parent


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        yield server


def backend_of(server: FakeVLLM, **settings: Any) -> VLLMServerBackend:
    return VLLMServerBackend("fake", server=server.url, **{"patience": 5.0, "timeout": 5.0, **settings})


def some_prompts(count: int, *, seed: int = 0, length: int = 12) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 60, (count, length)).tolist()


def table(prompts: list[list[int]], words: list[list[int]] = WORDS) -> np.ndarray[Any, Any]:
    return np.array([[logprob(prompt, word) for word in words] for prompt in prompts])


def test_is_a_backend(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    assert isinstance(backend, Backend)
    assert backend.device == f"vLLM 0.0.0 at {fake.url}"
    assert backend.max_prompt_tokens == CONTEXT


def test_label_words_are_scored_exactly(fake: FakeVLLM) -> None:
    prompts = some_prompts(20)
    scores = backend_of(fake).label_logprobs(prompts, WORDS)
    np.testing.assert_allclose(scores.logprobs, table(prompts), atol=1e-12)
    assert scores.upper is None
    assert not {"prompt_logprobs", "echo"} & {name for body in fake.bodies for name in body}
    assert {(body["max_tokens"], body["temperature"]) for body in fake.bodies} == {(1, 0)}


def test_a_whole_vocabulary_sums_to_one(fake: FakeVLLM) -> None:
    scores = backend_of(fake).label_logprobs([[3, 4, 5]], [[token] for token in range(60)])
    assert np.exp(scores.logprobs).sum() == pytest.approx(1)


def test_more_tokens_than_one_question_may_hold() -> None:
    words = [[token % 60, token // 60, 9] for token in range(400)]
    walk = LabelWalk.build(words, ids_per_question=20)
    assert len(walk.questions) == 3 + 60 + 400
    assert max(len(question.ids) for question in walk.questions) == 20


def test_nothing_to_score(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    assert backend.label_logprobs([], WORDS).logprobs.shape == (0, len(WORDS))
    assert backend.sequence_logprobs([], []).logprobs == []
    assert backend.generate([], [9], max_new_tokens=3).items == []
    assert fake.bodies == []


def test_each_prompt_is_asked_about_once_and_its_first_question_before_the_others(fake: FakeVLLM) -> None:
    prompts = some_prompts(6)
    seen: list[int] = []
    usage = backend_of(fake).label_logprobs([*prompts, *prompts[:3]], WORDS, progress=seen.append).usage
    probe, *asked = fake.bodies
    assert len(probe["prompt"]) == 1
    assert len(asked) == 2 * len(prompts)
    assert set(fake.prompts.values()) == {1}
    assert usage.forwards == len(fake.prompts) == 1 + QUESTIONS * len(prompts)
    assert usage.prompt_tokens == 9 * 12
    assert sum(seen) == 9
    first = {tuple(body["prompt"][0]): n for n, body in enumerate(asked) if len(body["prompt"]) == 1}
    for n, body in enumerate(asked):
        assert first[tuple(body["prompt"][0][:12])] <= n


def test_the_server_is_examined_once(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    for count in (1, 2, 3):
        backend.label_logprobs(some_prompts(count), [[5], [6]])
    assert len(fake.bodies) == 1 + 1 + 2 + 3


@pytest.mark.parametrize("tells_cached", [True, False])
def test_computed_tokens_are_those_that_the_server_did_not_have(tells_cached: bool) -> None:
    with FakeVLLM(tells_cached=tells_cached) as server:
        [prompt] = some_prompts(1, length=18)
        usage = backend_of(server).label_logprobs([prompt], WORDS).usage
    examination, question, suffixes, cached = 1, 18, [1, 2, 1, 1, 2, 3, 3, 1], 16
    later = sum(18 + suffix - (cached if tells_cached else 0) for suffix in suffixes)
    assert usage.computed_tokens == examination + question + later


word_lists = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=1, max_size=40)


@given(words=word_lists, most_ids=st.integers(1, 20), most_prompts=st.integers(1, 10))
def test_groups_hold_every_question_once_within_the_limits(
    words: list[list[int]], most_ids: int, most_prompts: int
) -> None:
    questions = LabelWalk.build(words, ids_per_question=128).questions
    groups = group_questions(questions, most_ids=most_ids, most_prompts=most_prompts)
    assert sorted(n for group in groups for n in group) == list(range(len(questions)))
    assert groups[0] == (0,)
    for group in groups:
        ids = {token for n in group for token in questions[n].ids}
        assert len(group) <= most_prompts
        assert len(ids) <= most_ids or len(group) == 1


def test_many_small_questions_are_few_requests() -> None:
    words = [[first, second, 1] for first in range(2, 12) for second in range(20, 25)]
    questions = LabelWalk.build(words, ids_per_question=128).questions
    assert len(questions) == 1 + 10 + 50
    assert len(group_questions(questions)) == 1 + 2


def test_500_prompts_at_16_in_flight() -> None:
    prompts = some_prompts(500)
    seen: list[int] = []
    with FakeVLLM(delay=0.005) as server:
        scores = backend_of(server, in_flight=16).label_logprobs(prompts, WORDS, progress=seen.append)
        assert 4 <= server.most_in_flight <= 16
        assert set(server.prompts.values()) == {1}
    np.testing.assert_allclose(scores.logprobs, table(prompts), atol=1e-12)
    assert sum(seen) == 500


def test_no_more_is_written_than_is_on_its_way() -> None:
    drawn = Counter[str]()

    class Watched(list[int]):
        def __iter__(self) -> Iterator[int]:
            drawn["now"] += 1
            return super().__iter__()

    def watch(done: int) -> None:
        drawn["done"] += done
        drawn["most"] = max(drawn["most"], drawn["now"] - drawn["done"])

    with FakeVLLM() as server:
        prompts = [Watched(prompt) for prompt in some_prompts(60)]
        backend_of(server, in_flight=4).generate(prompts, [9], max_new_tokens=2, progress=watch)
    assert drawn["done"] == 60
    assert drawn["most"] <= 4


def test_two_threads_share_a_backend(fake: FakeVLLM) -> None:
    backend = backend_of(fake, in_flight=3)
    prompts = some_prompts(30)
    found: dict[int, Any] = {}

    def score(half: int) -> None:
        found[half] = backend.label_logprobs(prompts[half::2], WORDS).logprobs

    threads = [Thread(target=score, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in (0, 1):
        np.testing.assert_allclose(found[half], table(prompts[half::2]), atol=1e-12)
    assert fake.most_in_flight <= 3


PASSING = {
    "too many requests": [Trouble(429, {"error": {"message": "slow down"}})] * 3,
    "overloaded": [Trouble(503)],
    "a proxy without its server": [Trouble(502, b"<html>Bad Gateway</html>")],
    "dropped connections": [DROP] * 3,
    "a defect that passes": [Trouble(500, {"error": {"message": "EngineCore encountered an issue"}})],
    "all of them": [Trouble(429), DROP, Trouble(503), Trouble(500)],
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for(fake: FakeVLLM, trouble: list[Trouble]) -> None:
    prompts = some_prompts(5)
    fake.trouble.extend(trouble)
    scores = backend_of(fake).label_logprobs(prompts, WORDS)
    np.testing.assert_allclose(scores.logprobs, table(prompts), atol=1e-12)
    assert set(fake.prompts.values()) == {1}


def test_the_pause_that_the_server_names_is_kept(fake: FakeVLLM) -> None:
    fake.trouble.append(Trouble(429, Retry_After="2"))
    started = time.monotonic()
    backend_of(fake).label_logprobs([[1, 2]], [[5]])
    assert time.monotonic() - started >= 2


def test_a_server_that_starts_again_is_waited_for() -> None:
    prompts = some_prompts(40)
    servers = [FakeVLLM(delay=0.01)]

    def restart(_: int, done: list[int] = []) -> None:  # noqa: B006 - counts the calls
        done.append(1)
        if len(done) == 10:
            servers[0].stop()
            Thread(target=lambda: (time.sleep(1), servers.append(FakeVLLM(port=servers[0].port)))).start()

    try:
        scores = backend_of(servers[0]).label_logprobs(prompts, WORDS, progress=restart)
    finally:
        servers[-1].stop()
    assert len(servers) == 2
    np.testing.assert_allclose(scores.logprobs, table(prompts), atol=1e-12)


def test_patience_ends() -> None:
    server = FakeVLLM()
    seen: list[int] = []

    def stop_after_three(done: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            server.stop()

    started = time.monotonic()
    with pytest.raises(BackendError) as caught:
        backend_of(server, patience=1.0, in_flight=1).label_logprobs(some_prompts(9), WORDS, progress=stop_after_three)
    assert time.monotonic() - started < 10
    said = str(caught.value)
    assert f"the server at {server.url} answered no request for 1 s" in said
    assert "3 of 9 prompts were finished; start one with `icl vllm fake`" in said


def test_a_defect_that_stays_is_an_error_before_patience_ends(fake: FakeVLLM) -> None:
    fake.trouble.extend([Trouble(500, {"error": {"message": "shape mismatch"}})] * 100)
    with pytest.raises(BackendError, match="answered 500: shape mismatch"):
        backend_of(fake, patience=60.0).label_logprobs([[1, 2]], [[5]])


def test_a_refusal_is_an_error_at_once_in_the_words_of_the_server(fake: FakeVLLM) -> None:
    with pytest.raises(BackendError, match=r"/v1/completions answered 400: Token id 1000 is out of vocabulary"):
        backend_of(fake).label_logprobs([[1, 1000]], [[5]])
    assert fake.attempts == 2  # the examination, of the first token; the question


def spoiled(path: str, value: object) -> Callable[[Json], Json]:
    """Replaces the part of an answer that is at `path`."""

    def spoil(answer: Json) -> Json:
        *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        place: Any = answer
        for step in way:
            place = place[step]
        if last == "*":
            place.update(dict.fromkeys(place, value))
        else:
            place[last] = value
        return answer

    return spoil


NONSENSE = {
    "no choices": (spoiled("choices", []), "0 choices, expected 1"),
    "no log-probabilities": (spoiled("choices/0/logprobs", None), "answered what no vLLM answers"),
    "none for the first token": (spoiled("choices/0/logprobs/top_logprobs/0", {}), "no log-probabilities"),
    "text for tokens": (spoiled("choices/0/logprobs/top_logprobs/0", {" yes": -1.0}), "' yes' is not written like"),
    "not a number": (spoiled("choices/0/logprobs/top_logprobs/0/*", float("nan")), "that are none .nan"),
    "infinite": (spoiled("choices/0/logprobs/top_logprobs/0/*", float("-inf")), "that are none .-inf"),
    "null": (spoiled("choices/0/logprobs/top_logprobs/0/*", None), "that are none .None"),
    "logits": (spoiled("choices/0/logprobs/top_logprobs/0/*", 17.5), "started without --logprobs-mode"),
    "no usage": (spoiled("usage", None), "answered what no vLLM answers"),
}


@pytest.mark.parametrize(("spoil", "said"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_an_error(fake: FakeVLLM, spoil: Callable[[Json], Json], said: str) -> None:
    backend = backend_of(fake)
    backend.label_logprobs([[1]], [[5]])
    fake.spoil = spoil
    with pytest.raises(BackendError, match=said) as caught:
        backend.label_logprobs([[1, 2]], WORDS)
    assert fake.url in str(caught.value)


def test_an_answer_that_is_no_json(fake: FakeVLLM) -> None:
    fake.trouble.append(Trouble(200, b"<html>welcome</html>"))
    with pytest.raises(BackendError, match=r"answered '<html>welcome</html>', expected a JSON object"):
        backend_of(fake).label_logprobs([[1, 2]], [[5]])


@pytest.mark.parametrize(("knows_ids", "most"), [("ignores", 20), ("rejects", 20), ("ignores", 5), ("rejects", 3)])
def test_an_old_server_gives_bounds(knows_ids: Any, most: int) -> None:
    prompts = some_prompts(10)
    with FakeVLLM(knows_ids=knows_ids, max_logprobs=most) as server:
        scores = backend_of(server).label_logprobs(prompts, WORDS)
        assert {body["logprobs"] for body in server.bodies if len(body["prompt"]) > 1} == {most}
    truth = table(prompts)
    assert scores.upper is not None
    assert (scores.logprobs <= truth + 1e-12).all()
    assert (truth <= scores.upper + 1e-12).all()
    known = scores.logprobs == scores.upper
    np.testing.assert_allclose(scores.logprobs[known], truth[known], atol=1e-12)
    first = np.array(
        [[law(tuple(prompt)).argsort()[::-1].tolist().index(word[0]) for word in WORDS] for prompt in prompts]
    )
    assert not known[first >= most].any()


def test_an_old_server_scores_texts_only_of_likely_tokens() -> None:
    [prompt] = some_prompts(1)
    order = law(tuple(prompt)).argsort()[::-1].tolist()
    with FakeVLLM(knows_ids="ignores") as server:
        backend = backend_of(server)
        assert backend.sequence_logprobs([prompt], [order[:1]]).logprobs[0] == pytest.approx(law(tuple(prompt)).max())
        with pytest.raises(BackendError, match="its 20 likeliest tokens only, and a text to score holds others"):
            backend.sequence_logprobs([prompt], [order[30:31]])


def test_texts_are_scored_token_by_token(fake: FakeVLLM) -> None:
    prompts = some_prompts(4)
    continuations = [[5, 6, 7], [9], list(range(40)), [5, 5, 5]]
    seen: list[int] = []
    scores, usage = backend_of(fake).sequence_logprobs(prompts, continuations, progress=seen.append)
    for prompt, continuation, found in zip(prompts, continuations, scores, strict=True):
        expected = [law((*prompt, *continuation[:i]))[token] for i, token in enumerate(continuation)]
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (usage.prompt_tokens, usage.forwards, sum(seen)) == (48, 1 + 3 + 1 + 40 + 3, 4)
    with pytest.raises(BackendError, match="4 prompts were given with 1 continuations"):
        backend_of(fake).sequence_logprobs(prompts, [[5]])
    with pytest.raises(BackendError, match="a continuation is empty"):
        backend_of(fake).sequence_logprobs(prompts[:1], [[]])


def test_samples_are_those_of_their_seed_whoever_their_neighbours(fake: FakeVLLM) -> None:
    prompts = some_prompts(6)
    backend = backend_of(fake)
    found = backend.generate(prompts, [99], max_new_tokens=4, samples=3, seed=7)
    assert len(found.items) == 18
    again = backend.generate(prompts[:2], [99], max_new_tokens=4, samples=3, seed=7)
    assert again.items == found.items[:6]
    assert backend.generate(prompts[:2], [99], max_new_tokens=4, samples=3, seed=8).items != again.items
    assert len({tuple(item.tokens) for item in found.items}) == 18
    assert len({body["seed"] for body in fake.bodies[:6]}) == 6
    for i, item in enumerate(found.items):
        assert sum(item.logprobs) == pytest.approx(logprob(prompts[i // 3], item.tokens))
    assert found.usage.prompt_tokens == 72
    assert found.usage.computed_tokens == 72 + 18 * 3


def test_greedy_samples_are_copies(fake: FakeVLLM) -> None:
    [prompt] = some_prompts(1)
    found = backend_of(fake).generate([prompt], [99], max_new_tokens=3, samples=2, temperature=0.0).items
    assert found[0] == found[1]
    assert found[0].tokens[0] == law(tuple(prompt)).argmax()
    assert fake.bodies[0]["n"] == 1


def test_generation_ends_at_the_terminator(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    [prompt] = some_prompts(1)
    free = backend.generate([prompt], [99], max_new_tokens=6).items[0]
    assert not free.finished
    one = backend.generate([prompt], free.tokens[2:3], max_new_tokens=6).items[0]
    assert fake.bodies[-1]["stop_token_ids"] == free.tokens[2:3]
    two = backend.generate([prompt], free.tokens[2:4], max_new_tokens=6).items[0]
    assert fake.bodies[-1]["stop_token_ids"] == []
    for item, end in ((one, 3), (two, 4)):
        assert item.finished
        assert (item.tokens, item.logprobs) == (free.tokens[:end], free.logprobs[:end])


def test_too_long_a_prompt_is_refused_before_anything_is_sent(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    words = r"a prompt of 97 tokens and an answer of 4 exceed the context of 'fake', 100 tokens"
    with pytest.raises(ContextLengthError, match=words):
        backend.label_logprobs([[5] * 97], WORDS)
    with pytest.raises(ContextLengthError, match=words):
        backend.sequence_logprobs([[5] * 97], [[5] * 4])
    with pytest.raises(ContextLengthError, match=words):
        backend.generate([[5] * 97], [9], max_new_tokens=4)
    with pytest.raises(BackendError, match="a prompt is empty"):
        backend.label_logprobs([[]], WORDS)
    backend.label_logprobs([[5] * 96], WORDS)


def test_a_model_is_found_by_what_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model in ("other/name", str(tmp_path)):
        with FakeVLLM(model={"id": "nickname", "root": model}) as server:
            backend = VLLMServerBackend(model, server=f"{server.url}/v1/")
            backend.label_logprobs([[1, 2]], [[5]])
            assert (backend.model, server.bodies[-1]["model"]) == (model, "nickname")


def test_another_model_is_an_error(fake: FakeVLLM) -> None:
    with pytest.raises(ModelError, match=r"has 'fake', expected 'mine/model'; .* icl vllm mine/model"):
        VLLMServerBackend("mine/model", server=fake.url)
    with pytest.raises(ModelError, match=r"tell the server: icl vllm fake --dtype float32"):
        VLLMServerBackend("fake", "float32", server=fake.url)


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeVLLM(key="secret") as server:
        with pytest.raises(BackendError, match=r"wants another key \(401\): set VLLM_API_KEY"):
            backend_of(server)
        assert backend_of(server, api_key="secret").model == "fake"
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert backend_of(server).model == "fake"
        monkeypatch.setenv("VLLM_API_KEY", "wrong")
        with pytest.raises(BackendError, match="set VLLM_API_KEY"):
            backend_of(server)


def test_no_server_and_none_that_could_be() -> None:
    with FakeVLLM() as server:
        url = server.url
    with pytest.raises(BackendError, match=rf"no server answers at {url} .*; start one with `icl vllm fake`"):
        VLLMServerBackend("fake", server=url)
    with pytest.raises(BackendError, match="in_flight should be >= 1, is now 0"):
        VLLMServerBackend("fake", in_flight=0)
    for url in ("127.0.0.1:8000", "localhost", "", "ftp://here", "http://"):
        with pytest.raises(BackendError, match=r"is no URL of a server; expected one like http://127"):
            VLLMServerBackend("fake", server=url)


def test_ctrl_c_does_not_wait_for_answers() -> None:
    code = """
import sys
from icl_compiler.backends.vllm_server import VLLMServerBackend
backend = VLLMServerBackend("fake", server=sys.argv[1])
print("asking", flush=True)
backend.label_logprobs([[1, 2, 3]] * 3, [[5]])
"""
    with FakeVLLM(delay=60) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TESTS.parent
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"asking\n"
        while not server.in_flight:
            time.sleep(0.01)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
        assert time.monotonic() - started < 10
    assert b"KeyboardInterrupt" in said


@dataclass
class Prompts:
    """Prompts of a program over messages, and their label words."""

    prompts: list[tuple[int, ...]]
    words: list[list[int]]

    @cached_property
    def expected(self) -> np.ndarray[Any, Any]:
        scores = self.transformers.label_logprobs(self.prompts[:8], self.words)
        return np.exp(scores.logprobs)

    @cached_property
    def transformers(self) -> TransformersBackend:
        return TransformersBackend("smollm2-135m", "float32")


@pytest.fixture(scope="module")
def messages() -> Prompts:
    train, test = train_test(300, 40)
    data = Dataset(tuple(m.text for m in train), tuple(m.label for m in train), "classification", "messages")
    program = compile_program(data, retriever="bm25", shots=4)
    return Prompts(
        [prompt.tokens for prompt in program.prompts([m.text for m in test])], [*map(list, program.label_words)]
    )


def connect(real_vllm: RealVLLM) -> VLLMServerBackend:
    return VLLMServerBackend("smollm2-135m", server=real_vllm.process.url)


@pytest.mark.models
def test_real_labels_agree_with_transformers(real_vllm: RealVLLM, messages: Prompts) -> None:
    prompts = messages.prompts[:8]
    scores = connect(real_vllm).label_logprobs(prompts, messages.words)
    tv = 0.5 * np.abs(np.exp(scores.logprobs) - messages.expected).sum(axis=1)
    assert scores.upper is None
    assert tv.max() < 0.03
    assert tv.mean() < 0.01
    questions = len(LabelWalk.build(messages.words, ids_per_question=128).questions)
    assert scores.usage.forwards == 8 * questions + 1
    # Each prompt once, and for each question what does not fill a block of 32 tokens.
    assert scores.usage.computed_tokens <= sum(len(prompt) + questions * (31 + 4) for prompt in prompts)
    assert scores.usage.computed_tokens < sum(len(prompt) for prompt in prompts) * questions / 4


@pytest.mark.models
def test_real_texts_agree_with_transformers(real_vllm: RealVLLM, messages: Prompts) -> None:
    prompts, continuations = messages.prompts[:3], messages.words[:3]
    found = connect(real_vllm).sequence_logprobs(prompts, continuations).logprobs
    expected = messages.transformers.sequence_logprobs(prompts, continuations).logprobs
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.2)


@pytest.mark.models
def test_real_generation(real_vllm: RealVLLM, messages: Prompts) -> None:
    backend = connect(real_vllm)
    prompts = messages.prompts[:3]
    newline = messages.words[0][-1:]
    found = backend.generate(prompts, newline, max_new_tokens=8, samples=2, seed=3)
    again, other = (backend.generate(prompts, newline, max_new_tokens=8, samples=2, seed=s) for s in (3, 4))
    # Which prompts are computed together, and what the cache holds, differs from call to call, and bfloat16 with it.
    assert sum(a.tokens == b.tokens for a, b in zip(again.items, found.items, strict=True)) >= 3
    assert sum(a.tokens == b.tokens for a, b in zip(other.items, found.items, strict=True)) <= 3
    scored = backend.sequence_logprobs([p for p in prompts for _ in range(2)], [item.tokens for item in found.items])
    for item, logprobs in zip(found.items, scored.logprobs, strict=True):
        assert item.finished == (item.tokens[-1:] == newline)
        assert newline[0] not in item.tokens[:-1]
        np.testing.assert_allclose(item.logprobs, logprobs, **BFLOAT16_NOISE)
    greedy = backend.generate(prompts, [0], max_new_tokens=4, temperature=0.0).items
    theirs = messages.transformers.generate(prompts, [0], max_new_tokens=4, temperature=0.0).items
    assert sum(a.tokens == b.tokens for a, b in zip(greedy, theirs, strict=True)) >= 2


@pytest.mark.models
def test_the_command_asks_a_real_server(real_vllm: RealVLLM, messages: Prompts, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(["card", "refund"] * 4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = str(tmp_path / "program")
    made = CliRunner().invoke(main, ["compile", str(tmp_path / "data.jsonl"), "-o", program, "--retriever", "bm25"])
    assert made.exit_code == 0, made.output
    laws = []
    for where in (["--server", real_vllm.process.url, "--in-flight", "4"], ["--dtype", "float32"]):
        said = CliRunner().invoke(main, ["predict", program, "text 3", "text 4", *where])
        assert said.exit_code == 0, said.output
        laws.append([json.loads(line)["probabilities"] for line in said.stdout.splitlines()])
    for ours, theirs in zip(*laws, strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.models
def test_a_real_server_killed_in_the_middle_and_started_again(real_vllm: RealVLLM, messages: Prompts) -> None:
    backend = connect(real_vllm)
    words = messages.words[:4]
    undisturbed = backend.label_logprobs(messages.prompts, words)
    finished: list[int] = []
    restarting = Thread(target=real_vllm.start)

    def kill_after_ten(count: int) -> None:
        finished.append(count)
        if len(finished) == 10:
            real_vllm.process.kill()
            restarting.start()

    disturbed = backend.label_logprobs(messages.prompts, words, progress=kill_after_ten)
    restarting.join()
    assert sum(finished) == 40
    # Equal but for the noise of bfloat16: a number depends a little on what is computed beside it.
    np.testing.assert_allclose(disturbed.logprobs, undisturbed.logprobs, **BFLOAT16_NOISE)


def test_texts_that_cannot_be_scored_are_refused(fake: FakeVLLM) -> None:
    backend = backend_of(fake)
    with pytest.raises(BackendError, match="2 prompts were given with 1 continuations"):
        backend.sequence_logprobs([[3], [4]], [[5]])
    with pytest.raises(BackendError, match="a continuation is empty"):
        backend.sequence_logprobs([[3]], [[]])
    assert fake.bodies == []
