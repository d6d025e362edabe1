"""The waiting line in front of an engine: how many may be inside, how many may wait, who comes next.

- Bounded: whoever comes when the line is full is told so at once, with the time after which a place should be free.
- The next one is the one whose prompt shares most with the one that went before, in the engine's cache as long as it
  is fresh. Nobody is passed over for more than a second.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from icl_compiler.errors import ServingError
from icl_compiler.prefix_tree import common_prefix

_BLOCK = 16  # tokens; what is shared counts in whole blocks, as in vLLM's cache
_PASSED_OVER_S = 1.0
_SOONEST_S, _LATEST_S = 1, 60
_MEMORY = 0.9


class BusyError(ServingError):
    """The line is full.

    Attributes:
        retry_after_s: seconds after which a place should be free.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiter:
    prompt: Int[np.ndarray, " tokens"]
    since: float
    called: "asyncio.Future[None]"


class Line:
    """Who may ask the engine.

    Args:
        in_flight: most queries that are inside at once.
        waiting: most queries admitted beyond those.
    """

    def __init__(self, *, in_flight: int, waiting: int) -> None:
        if in_flight < 1 or waiting < 0:
            raise ServingError(f"in_flight should be >= 1 and waiting >= 0, are now {in_flight} and {waiting}")
        self.places = in_flight + waiting
        self.admitted = self.inside = 0
        self._in_flight = in_flight
        self._waiters: list[_Waiter] = []
        self._last: Int[np.ndarray, " tokens"] = np.empty(0, dtype=np.int64)
        self._mean_s = 0.0

    @contextmanager
    def admission(self, queries: int = 1) -> Iterator[None]:
        """A place in the line for `queries`, or the word that there is none.

        Raises:
            BusyError: if there are too many already.
        """
        if self.admitted + queries > self.places:
            wait = self.admitted * self._mean_s / self._in_flight
            seconds = min(max(math.ceil(wait), _SOONEST_S), _LATEST_S)
            raise BusyError(f"{self.admitted} queries are waiting or under way; try again in {seconds} s", seconds)
        self.admitted += queries
        try:
            yield
        finally:
            self.admitted -= queries

    @asynccontextmanager
    async def turn(self, prompt: tuple[int, ...]) -> AsyncIterator[None]:
        """Wait until the query with this prompt may ask."""
        tokens = np.array(prompt, dtype=np.int64)
        if self.inside < self._in_flight:
            self.inside += 1
        else:
            waiter = _Waiter(tokens, time.monotonic(), asyncio.get_running_loop().create_future())
            self._waiters.append(waiter)
            try:
                await waiter.called
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif not waiter.called.cancelled():  # called, and gone at the same moment
                    self._leave()
                raise
        self._last = tokens
        started = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
            self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * took if self._mean_s else took
            self._leave()

    @property
    def waiting(self) -> int:
        """How many are waiting for their turn."""
        return len(self._waiters)

    def _leave(self) -> None:
        self._waiters = [waiter for waiter in self._waiters if not waiter.called.cancelled()]
        if not self._waiters:
            self.inside -= 1
            return
        place = 0
        if time.monotonic() - self._waiters[0].since < _PASSED_OVER_S:
            shared = [common_prefix(waiter.prompt, self._last) // _BLOCK for waiter in self._waiters]
            place = shared.index(max(shared))
        self._waiters.pop(place).called.set_result(None)
