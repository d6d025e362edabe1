"""The waiting line: nobody too many, nobody forgotten, and those with the same prompt after each other."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.errors import ServingError
from serving import line as lining
from serving.line import BusyError, Line

PROMPTS = [(group,) * 40 + (member,) * 5 for group in range(3) for member in range(4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The line's clock, which stands still."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(lining, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


class Queries:
    """Queries in a line, each of which leaves it when told to."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[asyncio.Event] = []
        self.begun: list[int] = []
        self.inside: set[int] = set()

    def come(self, prompt: tuple[int, ...]) -> None:
        number, end = len(self.tasks), asyncio.Event()

        async def query() -> None:
            async with self.line.turn(prompt):
                self.begun.append(number)
                self.inside.add(number)
                try:
                    await end.wait()
                finally:
                    self.inside.remove(number)

        self.ends.append(end)
        self.tasks.append(asyncio.create_task(query()))

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_places_are_counted() -> None:
    line = Line(in_flight=2, waiting=3)
    with line.admission(2), line.admission(3):
        with (
            pytest.raises(BusyError, match=r"^5 queries are waiting or under way; try again in 1 s$"),
            line.admission(),
        ):
            pass
        assert line.admitted == 5
    with line.admission(5):
        pass
    with pytest.raises(BusyError), line.admission(6):
        pass
    assert line.admitted == 0


@pytest.mark.parametrize(("in_flight", "waiting"), [(0, 5), (1, -1)])
def test_a_line_without_places_is_refused(in_flight: int, waiting: int) -> None:
    with pytest.raises(ServingError, match=f"are now {in_flight} and {waiting}"):
        Line(in_flight=in_flight, waiting=waiting)


@pytest.mark.parametrize(("took", "queries", "seconds"), [(0.0, 4, 1), (3.0, 3, 5), (3.0, 4, 6), (1000.0, 4, 60)])
def test_the_wait_that_is_named_is_the_work_before_a_free_place(
    took: float, queries: int, seconds: int, clock: SimpleNamespace
) -> None:
    """Of two places, after queries of `took` seconds."""
    line = Line(in_flight=2, waiting=2)

    async def run() -> None:
        for _ in range(5):
            async with line.turn((1,)):
                clock.now += took

    asyncio.run(run())
    with line.admission(queries), pytest.raises(BusyError) as busy, line.admission(2):
        pass
    assert busy.value.retry_after_s == seconds


step = st.tuples(st.sampled_from(["come", "come", "end", "cancel", "go on", "go on"]), st.integers(0, 11))


@given(in_flight=st.integers(1, 3), steps=st.lists(step, min_size=5, max_size=40))
@settings(deadline=None, max_examples=300)
def test_no_place_is_lost_or_given_twice(in_flight: int, steps: list[tuple[str, int]]) -> None:
    """Whoever is cancelled, and whenever: also in the moment between being called and going in."""

    async def run() -> None:
        line = Line(in_flight=in_flight, waiting=100)
        queries = Queries(line)
        for what, which in steps:
            alive = [n for n, task in enumerate(queries.tasks) if not task.done()]
            if what == "come":
                queries.come(PROMPTS[which])
            elif what == "go on":
                await asyncio.sleep(0)
            elif what == "end" and queries.inside:
                queries.ends[sorted(queries.inside)[which % len(queries.inside)]].set()
            elif what == "cancel" and alive:
                queries.tasks[alive[which % len(alive)]].cancel()
            assert len(queries.inside) <= line.inside <= in_flight
        await queries.settle()
        alive = [n for n, task in enumerate(queries.tasks) if not task.done()]
        assert len(queries.inside) == line.inside == min(in_flight, len(alive))  # no place stays empty
        assert line.waiting == len(alive) - line.inside
        for end in queries.ends:
            end.set()
        await asyncio.gather(*queries.tasks, return_exceptions=True)
        assert (line.inside, line.waiting) == (0, 0)

    asyncio.run(run())


def served_in_order(line: Line, prompts: list[tuple[int, ...]], clock: SimpleNamespace, *, each_s: float) -> list[int]:
    """The order in which queries that all come at once have their turn, of which each takes a while."""

    async def run() -> list[int]:
        queries = Queries(line)
        for prompt in prompts:
            queries.come(prompt)
        for number in range(len(prompts)):
            await queries.settle()
            clock.now += each_s
            queries.ends[queries.begun[number]].set()
        await asyncio.gather(*queries.tasks)
        return queries.begun

    return asyncio.run(run())


def test_what_shares_its_beginning_goes_together(clock: SimpleNamespace) -> None:
    mixed = np.random.default_rng(0).permutation(PROMPTS * 2).tolist()
    order = served_in_order(Line(in_flight=1, waiting=100), [tuple(p) for p in mixed], clock, each_s=0.01)
    groups = [mixed[n][0] for n in order]
    changes = sum(before != after for before, after in pairwise(groups))
    assert changes == 2
    assert sorted(order) == list(range(24))
    same = [n for n in order if mixed[n][0] == groups[0]]
    assert same == sorted(same)  # those that share as much as others go in the order in which they came


def test_nobody_is_passed_over_for_long(clock: SimpleNamespace) -> None:
    """A lonely prompt among many that share: it waits a second, and whoever is inside then, and no more."""
    prompts = [PROMPTS[0], PROMPTS[-1], *[PROMPTS[0]] * 30]
    order = served_in_order(Line(in_flight=1, waiting=100), prompts, clock, each_s=0.3)
    assert order.index(1) == 4  # 0.3, 0.6, 0.9 and 1.2 s have passed


def test_with_room_for_all_nobody_waits() -> None:
    async def run() -> None:
        line = Line(in_flight=3, waiting=0)
        queries = Queries(line)
        for prompt in PROMPTS[:3]:
            queries.come(prompt)
        await queries.settle()
        assert queries.begun == [0, 1, 2]
        for end in queries.ends:
            end.set()
        await asyncio.gather(*queries.tasks)

    asyncio.run(run())


def test_an_error_inside_frees_the_place() -> None:
    async def run() -> None:
        line = Line(in_flight=1, waiting=0)
        for _ in range(2):
            with pytest.raises(KeyError), line.admission():
                async with line.turn((1, 2)):
                    raise KeyError
        assert (line.admitted, line.inside) == (0, 0)

    asyncio.run(run())
