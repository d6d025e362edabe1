"""A vLLM server asked by tasks: exact laws, patience with what passes, a clear error for what does not."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from threading import Timer
from typing import Any, TypeVar

import numpy as np
import pytest
from fake_vllm import DROP, FakeVLLM, Json, Trouble, law, logprob
from serving_toys import wait_until

from icl_compiler.backends.vllm_protocol import RefusedError, label_walk
from icl_compiler.backends.vllm_server import VLLMServerBackend
from icl_compiler.errors import BackendError, ModelError
from serving.upstream import Engine, Scores, UnreachableError, Upstream, together

T = TypeVar("T")
WORDS = [[5, 9], [5, 7, 9], [6, 9], [11, 12, 13, 9], [11, 12, 14, 9], [8, 9]]
PROMPT = list(range(12))


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        yield server


def using(url: str, work: Callable[[Upstream], Awaitable[T]], **settings: Any) -> T:
    """What `work` makes of a server."""

    async def run() -> T:
        upstream = Upstream(url, **{"patience_s": 3.0, "timeout_s": 5.0} | settings)
        try:
            return await work(upstream)
        finally:
            await upstream.close()

    return asyncio.run(run())


async def scored(engine: Engine, prompt: list[int] = PROMPT, *, top: int | None = None) -> Scores:
    walk = label_walk(WORDS)
    return await engine.label_logprobs(prompt, walk, engine.ability.groups(walk), top=top)


async def score(upstream: Upstream) -> Scores:
    return await scored(await upstream.engine("fake"))


def table(prompt: list[int] = PROMPT) -> np.ndarray[Any, Any]:
    return np.array([logprob(prompt, word) for word in WORDS])


def test_the_engine_and_the_backend_agree(fake: FakeVLLM) -> None:
    prompts = np.random.default_rng(0).integers(0, 60, (5, 18)).tolist()

    async def work(upstream: Upstream) -> list[Scores]:
        engine = await upstream.engine("fake")
        assert (engine.served, engine.max_prompt_tokens, engine.ability.exact) == ("fake", 100, True)
        return [await scored(engine, prompt) for prompt in prompts]

    ours = using(fake.url, work)
    with FakeVLLM() as another:  # whose cache is as empty
        theirs = VLLMServerBackend("fake", server=another.url).label_logprobs(prompts, WORDS)
    np.testing.assert_array_equal([scores.lower for scores in ours], theirs.logprobs)
    assert [scores.upper for scores in ours] == [None] * 5
    examination = 1
    assert sum(scores.computed_tokens for scores in ours) + examination == theirs.usage.computed_tokens
    assert [scores.cached_tokens for scores in ours] == [0] * 5
    assert [scores.cached_tokens for scores in using(fake.url, work)] == [16] * 5  # of 18, in blocks of 4


def test_the_likeliest_labels_cost_less(fake: FakeVLLM) -> None:
    prompts = np.random.default_rng(1).integers(0, 60, (30, 10)).tolist()

    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        for top, share in ((1, 0.6), (3, 0.9)):
            fake.bodies.clear()
            for prompt in prompts:
                exact = table(prompt)
                found = await scored(engine, prompt, top=top)
                best = np.argsort(-exact)[:top]
                np.testing.assert_allclose(found.lower[best], exact[best], atol=1e-12)
                assert found.upper is None or np.all((found.lower <= exact + 1e-9) & (exact <= found.upper + 1e-9))
                assert np.array_equal(np.argsort(-found.lower, kind="stable")[:top], best)
            assert sum(fake.prompts.values()) < share * 30 * len(label_walk(WORDS).questions)

    using(fake.url, work)


def test_an_old_server_gives_bounds(fake: FakeVLLM) -> None:
    fake.knows_ids = "ignores"
    scores = using(fake.url, score)
    assert scores.upper is not None
    exact = table()
    assert np.all((scores.lower <= exact + 1e-9) & (exact <= scores.upper + 1e-9))
    assert not np.array_equal(scores.lower, scores.upper)


PASSING = {
    "busy": [Trouble(429), Trouble(503, b"<html>")],
    "dropped": [DROP, DROP],
    "a defect that passes": [Trouble(500), Trouble(500)],
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for(trouble: list[Trouble], fake: FakeVLLM) -> None:
    seen: list[str] = []

    async def work(upstream: Upstream) -> Scores:
        engine = await upstream.engine("fake")
        fake.trouble.extend(trouble)
        seen.clear()
        return await scored(engine)

    np.testing.assert_allclose(using(fake.url, work, observe=seen.append).lower, table(), atol=1e-12)
    assert seen == ["retried", "retried", "ok", "ok"]


def test_the_pause_that_the_server_names_is_kept(fake: FakeVLLM) -> None:
    fake.trouble.append(Trouble(503, Retry_After="1"))
    started = time.monotonic()
    using(fake.url, score)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("named", ["60", "tomorrow", "-1", "1e9", ""])
def test_a_pause_longer_than_our_patience_is_not_waited_for(named: str, fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.trouble.extend([Trouble(503, {"error": {"message": "loading"}}, Retry_After=named)] * 100)
        await scored(engine)

    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"does not answer \(503: loading\)"):
        using(fake.url, work, patience_s=0.3)
    assert time.monotonic() - started < 3


def test_a_server_that_comes_back_within_our_patience(fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> Scores:
        engine = await upstream.engine("fake")
        fake.stop()
        assert not await upstream.alive()
        with pytest.raises(UnreachableError, match="no server answers"):
            await upstream.engine("fake")
        again = []
        Timer(0.5, lambda: again.append(FakeVLLM(port=fake.port))).start()
        try:
            found = await scored(engine)
            assert await upstream.alive()
        finally:
            again[0].stop()
        return found

    np.testing.assert_allclose(using(fake.url, work).lower, table(), atol=1e-12)


def test_patience_ends(fake: FakeVLLM) -> None:
    seen: list[str] = []

    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.stop()
        await scored(engine)

    with pytest.raises(UnreachableError, match=rf"the server at {fake.url} does not answer \(Connect"):
        using(fake.url, work, patience_s=0.5, observe=seen.append)
    assert seen.count("failed") == 1
    assert "retried" in seen


REFUSALS = {
    "a bad request": ([Trouble(400, {"error": {"message": "too long"}})], "answered 400: too long"),
    "no key": ([Trouble(401, {"error": "Unauthorized"})], r"wants another key \(401\): set VLLM_API_KEY"),
    "a defect that stays": ([Trouble(500, b"<html>oh")] * 3, "answered 500: <html>oh"),
}


@pytest.mark.parametrize(("trouble", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_an_error_at_once(trouble: list[Trouble], said: str, fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        before = fake.attempts
        fake.trouble.extend(trouble)
        with pytest.raises(RefusedError, match=said):
            await scored(engine)
        assert fake.attempts - before == len(trouble)

    using(fake.url, work)


class Raw(Trouble):
    """A success with any bytes in it."""

    def __init__(self, body: bytes, **headers: str) -> None:
        super().__init__(200, body, **headers)


GARBAGE = {
    "nothing": b"",
    "no JSON": b"hello",
    "a page": b"<!doctype html><title>Welcome to nginx</title>",
    "half of it": b'{"choices": [{"index": 0, "logpr',
    "a list": b"[1, 2]",
    "null": b"null",
    "no text": b"\xff\xfe\x00\xd8",
    "no choices": b"{}",
    "too few choices": b'{"choices": [], "usage": {}}',
    "choices of another kind": b'{"choices": 5, "usage": {}}',
    "no log-probabilities": b'{"choices": [{"index": 0, "logprobs": null}], "usage": {}}',
    "no index": b'{"choices": [{"logprobs": null}], "usage": {}}',
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_an_error_that_names_the_server(body: bytes, fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.trouble.append(Raw(body))
        with pytest.raises(BackendError, match=rf"{fake.url}.* answered") as found:
            await scored(engine)
        assert not isinstance(found.value, UnreachableError)
        fake.trouble.append(Raw(body))
        with pytest.raises(BackendError, match=fake.url):
            await upstream.engine("fake")

    using(fake.url, work)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1.0, None, "-1"])
def test_numbers_that_are_no_log_probabilities(bad: Any, fake: FakeVLLM) -> None:
    def spoil(answer: Json) -> Json:
        tops = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return answer | {"choices": [answer["choices"][0] | {"logprobs": {"top_logprobs": [dict.fromkeys(tops, bad)]}}]}

    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.spoil = spoil
        with pytest.raises(BackendError, match=r"gave log-probabilities that are none|answered what no vLLM"):
            await scored(engine)

    using(fake.url, work)


@pytest.mark.parametrize("cached", [-5, 0.5, "x", float("nan")])
def test_a_cost_that_cannot_be(cached: Any, fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        usage = {"prompt_tokens_details": {"cached_tokens": cached}}
        fake.spoil = lambda answer: answer | {"usage": usage}
        with pytest.raises(BackendError, match="answered what no vLLM answers"):
            await scored(engine)

    using(fake.url, work)


def test_the_first_request_is_answered_before_the_others_are_made(fake: FakeVLLM) -> None:
    using(fake.url, score)
    [_, first, *others] = fake.bodies
    assert first["prompt"] == [PROMPT]
    assert all(prompt[:12] == PROMPT and len(prompt) > 12 for body in others for prompt in body["prompt"])
    assert not {"prompt_logprobs", "echo"} & {name for body in fake.bodies for name in body}


def test_no_more_connections_than_allowed(fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.delay = 0.02
        await together([scored(engine, [*PROMPT, n]) for n in range(20)])

    using(fake.url, work, connections=3)
    assert fake.most_in_flight == 3


def test_whoever_is_cancelled_takes_his_request_back(fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.delay = 30
        asked = asyncio.create_task(scored(engine))
        await asyncio.to_thread(wait_until, lambda: fake.in_flight == 1)
        asked.cancel()
        await asyncio.to_thread(wait_until, lambda: fake.in_flight == 0)
        assert fake.broken_off == 1

    using(fake.url, work)


def test_one_failure_ends_its_siblings(fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.delay = 0.1
        fake.trouble.append(Trouble(400))
        with pytest.raises(RefusedError):
            await together([scored(engine, [*PROMPT, n]) for n in range(4)])
        await asyncio.to_thread(wait_until, lambda: fake.in_flight == 0)

    using(fake.url, work)
    assert len(fake.bodies) < 1 + 4 * 2


def read(url: str, *, most: int = 1000, max_tokens: int = 5, **settings: Any) -> list[Json]:
    async def work(upstream: Upstream) -> list[Json]:
        engine = await upstream.engine("fake")
        found = []
        async with aclosing(engine.generate(PROMPT, {"max_tokens": max_tokens})) as events:
            async for event in events:
                found.append(event)
                if len(found) == most:
                    break
        return found

    return using(url, work, **settings)


def test_a_text_grows(fake: FakeVLLM) -> None:
    *events, usage = read(fake.url)
    tokens: list[int] = []
    for _ in range(5):
        tokens.append(int(law((*PROMPT, *tokens)).argmax()))
    assert [event["choices"][0]["text"] for event in events] == [chr(token) for token in tokens]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
    [_, body] = fake.bodies
    assert body["stream_options"] == {"include_usage": True}
    assert body["return_tokens_as_token_ids"] is False


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_a_text_that_has_not_begun_is_asked_for_again(trouble: list[Trouble], fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> list[Json]:
        engine = await upstream.engine("fake")
        fake.trouble.extend(trouble)
        return [event async for event in engine.generate(PROMPT, {"max_tokens": 2})]

    assert len(using(fake.url, work)) == 3


def cut(after: int, last: Json | Trouble) -> Callable[[Json], Json]:
    """Spoils a stream after so many events."""
    left = [after]

    def spoil(event: Json) -> Json:
        left[0] -= 1
        if left[0] >= 0:
            return event
        if isinstance(last, Trouble):
            raise last
        return last

    return spoil


def test_a_text_that_is_cut_off_is_not_asked_for_again(fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> list[str]:
        engine = await upstream.engine("fake")
        fake.spoil = cut(2, DROP)
        said = []
        with pytest.raises(UnreachableError, match=r"vanished|ended in the middle of a text"):
            async for event in engine.generate(PROMPT, {"max_tokens": 5}):
                said.append(event["choices"][0]["text"])
        return said

    assert len(using(fake.url, work)) == 2
    assert len(fake.bodies) == 2


@pytest.mark.parametrize("last", [{"error": {"message": "out of memory"}}, 5, None], ids=str)
def test_an_error_in_the_middle_of_a_text(last: Any, fake: FakeVLLM) -> None:
    async def work(upstream: Upstream) -> None:
        engine = await upstream.engine("fake")
        fake.spoil = cut(1, last)
        async for _ in engine.generate(PROMPT, {"max_tokens": 5}):
            pass

    with pytest.raises(BackendError, match=rf"{fake.url} (broke off: .*out of memory|answered what no vLLM answers)"):
        using(fake.url, work)


def test_an_answer_cut_off_before_a_text_began_is_asked_for_again(fake: FakeVLLM) -> None:
    """Such as a refusal whose body never comes."""

    async def work(upstream: Upstream) -> list[Json]:
        engine = await upstream.engine("fake")
        fake.trouble.append(Trouble(503, b"half", Content_Length="1000", Connection="close"))
        return [event async for event in engine.generate(PROMPT, {"max_tokens": 2})]

    assert len(using(fake.url, work, timeout_s=0.5)) == 3


def test_whoever_leaves_a_text_ends_it(fake: FakeVLLM) -> None:
    fake.between = 0.2
    assert len(read(fake.url, most=2, max_tokens=50)) == 2
    wait_until(lambda: fake.broken_off == 1)
    assert fake.streamed <= 3


def test_a_model_that_is_not_there(fake: FakeVLLM) -> None:
    with pytest.raises(ModelError, match=r"has 'fake', expected 'mine/model'"):
        using(fake.url, lambda upstream: upstream.engine("mine/model"))


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_whose_gateway_says_to_come_again_may_be_there_later(status: int, fake: FakeVLLM) -> None:
    """Else `icl serve` would end, instead of trying again."""
    fake.gateway = status
    with pytest.raises(UnreachableError, match=f"answered {status}: <html>Bad"):
        using(fake.url, lambda upstream: upstream.engine("fake"))


def test_keys() -> None:
    with FakeVLLM(key="secret") as server:
        np.testing.assert_allclose(using(server.url, score, key="secret").lower, table(), atol=1e-12)
        with pytest.raises(BackendError, match="wants another key"):
            using(server.url, score)
        assert not using(server.url, lambda upstream: upstream.alive())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "", "ftp://here", "http://", "http://[::1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(BackendError, match=r"is no URL of a server; expected one like http://127"):
        Upstream(url)


def test_a_url_with_the_version_at_its_end(fake: FakeVLLM) -> None:
    np.testing.assert_allclose(using(f"{fake.url}/v1/", score).lower, table(), atol=1e-12)
