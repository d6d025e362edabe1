"""Who may do what, how often, and under which name the endpoint may be called.

- With keys: a request needs one that has the right for it, and no more of them a minute than the key allows.
- Without keys (on loopback only): everybody on this machine may do everything. The `Host` must then be a name of this
  machine: a web page whose own name was made to lead here would else reach the endpoint through a browser. And so must
  the `Origin`, which browsers add to what a page sends: any page may post to any address, if without a body of JSON.
"""

import logging
import time
from collections.abc import Callable, Collection
from typing import Literal

from icl_compiler.errors import ServingError
from serving.keys import Key, KeyRing, RateLimiter
from serving.openai_api import RequestError

log = logging.getLogger("icl.serve")

Right = Literal["query", "feedback", "admin"]
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_NOBODY = Key("everybody on this machine", "", ("query", "feedback", "admin"), None, "")


class Gate:
    """Lets requests through.

    Args:
        ring: the keys; `None` for none.
        hosts: under which names (without port) requests may come; `None` for any.
    """

    def __init__(
        self, ring: KeyRing | None, *, hosts: Collection[str] | None, clock: Callable[[], float] = time.monotonic
    ):
        self._ring = ring
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._limiter = RateLimiter()
        self._clock = clock

    def knows_host(self, host: str) -> bool:
        """Whether a request with this `Host` may be answered."""
        name = host.lower()
        if not name.endswith("]"):
            name = name.rpartition(":")[0] or name
        return self._hosts is None or name in self._hosts

    def knows_origin(self, origin: str | None) -> bool:
        """Whether a request with this `Origin` may be answered; without one, no page has sent it."""
        return origin is None or self.knows_host(origin.partition("://")[2])

    def key(self, authorization: str | None, right: Right) -> Key:
        """The key of a request.

        Raises:
            RequestError: 401 without a known key, 403 if it has not the right, 429 if it was used too often; 503 if the
                keys cannot be read, of which strangers are told no more than that.
        """
        if self._ring is None:
            return _NOBODY
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise RequestError("give a key: `Authorization: Bearer KEY`", status=401, code="invalid_api_key")
        try:
            self._ring.refresh()
        except ServingError as error:
            log.error("nobody is let in: %s", error)
            raise RequestError("the keys cannot be read; the endpoint's log says why", status=503) from error
        key = self._ring.find(secret.strip())
        if key is None:
            raise RequestError("this key is not known here", status=401, code="invalid_api_key")
        if not key.may(right):
            raise RequestError(
                f"the key {key.name!r} has the rights {', '.join(key.rights)}, and this takes {right!r}",
                status=403,
            )
        if wait := self._limiter.allow(key, self._clock()):
            often = f"the key {key.name!r} may ask {key.per_minute} times a minute"
            raise RequestError(often, status=429, code="rate_limit_exceeded", retry_after_s=wait)
        return key
