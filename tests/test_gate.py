"""Who is let through: host names, origins, keys with their rights, and how often."""

import os
from pathlib import Path

import pytest

from serving.gate import LOCAL_NAMES, Gate
from serving.keys import KeyRing
from serving.openai_api import RequestError

HOSTS = (*LOCAL_NAMES, "Models.Example.org")
KNOWN = (
    "127.0.0.1", "127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8080", "models.example.org:443",
)  # fmt: skip
UNKNOWN = (
    "", ":8080", "evil.example", "evil.example:8080", "localhost.evil.example", "evil.example:80:localhost",
    "127.0.0.1.evil.example:8080", "[::2]:8080", "::1", "example.org", "xlocalhost",
)  # fmt: skip


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.mark.parametrize("host", KNOWN)
def test_a_name_of_this_machine_is_known(host: str) -> None:
    assert Gate(None, hosts=HOSTS).knows_host(host)


@pytest.mark.parametrize("host", UNKNOWN)
def test_another_name_is_not(host: str, ring: KeyRing) -> None:
    assert not Gate(None, hosts=HOSTS).knows_host(host)
    assert Gate(ring, hosts=None).knows_host(host)  # keys protect, whatever the name


@pytest.mark.parametrize("origin", [None, "http://127.0.0.1:8080", "http://localhost:3000", "https://[::1]"])
def test_pages_of_this_machine_may_ask(origin: str | None) -> None:
    assert Gate(None, hosts=HOSTS).knows_origin(origin)


@pytest.mark.parametrize("origin", ["", "null", "https://evil.example", "http://127.0.0.1.evil.example", "file://"])
def test_other_pages_may_not(origin: str, ring: KeyRing) -> None:
    assert not Gate(None, hosts=HOSTS).knows_origin(origin)
    assert Gate(ring, hosts=None).knows_origin(origin)  # no page has somebody's key


def test_without_keys_everybody_here_may_do_everything() -> None:
    gate = Gate(None, hosts=HOSTS)
    for right in ("query", "feedback", "admin"):
        assert gate.key(None, right).name == "everybody on this machine"


def refused(gate: Gate, authorization: str | None, right: str = "query") -> RequestError:
    with pytest.raises(RequestError) as found:
        gate.key(authorization, right)
    return found.value


def test_keys_and_their_rights(ring: KeyRing) -> None:
    secrets = {right: ring.add(right, [right]) for right in ("query", "feedback", "admin")}
    gate = Gate(ring, hosts=None)
    for name, secret in secrets.items():
        for right in secrets:
            if name in (right, "admin"):
                assert gate.key(f"Bearer {secret}", right).name == name
            else:
                error = refused(gate, f"Bearer {secret}", right)
                assert (error.status, error.code) == (403, None)
                assert secret not in str(error)
    assert gate.key(f"bearer   {secrets['query']} ", "query").name == "query"


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Basic abc", "{secret}", "Bearer icl-guessed", "Bearer é\udcff"]
)
def test_no_key_or_an_unknown_one(given: str | None, ring: KeyRing) -> None:
    secret = ring.add("ann", ["admin"])
    error = refused(Gate(ring, hosts=None), given and given.format(secret=secret))
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert "icl-" not in str(error)


def test_a_key_is_held_to_its_rate(ring: KeyRing) -> None:
    now = [1000.0]
    gate = Gate(ring, hosts=None, clock=lambda: now[0])
    slow, quick = (f"Bearer {ring.add(name, ['query'], rate)}" for name, rate in (("slow", 2), ("quick", None)))
    gate.key(slow, "query")
    error = refused(gate, slow)
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limit_exceeded", 30.0)
    for _ in range(100):
        gate.key(quick, "query")
    now[0] += 30
    gate.key(slow, "query")


def test_a_request_without_its_right_costs_nothing(ring: KeyRing) -> None:
    gate = Gate(ring, hosts=None, clock=lambda: 0.0)
    key = f"Bearer {ring.add('ann', ['query'], 1)}"
    for _ in range(3):
        assert refused(gate, key, "admin").status == 403
    gate.key(key, "query")


def test_a_revoked_key_ends_at_once(ring: KeyRing) -> None:
    key = f"Bearer {ring.add('ann', ['query'])}"
    ring.add("bob", ["query"])
    gate = Gate(KeyRing.load(ring._path), hosts=None)
    gate.key(key, "query")
    ring.revoke("ann")
    assert refused(gate, key).status == 401


def test_where_the_keys_cannot_be_read_nobody_is_let_in_and_nobody_is_told_where_they_are(
    ring: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"Bearer {ring.add('ann', ['query'])}"
    gate = Gate(ring, hosts=None)
    content = ring._path.read_bytes()
    ring._path.unlink()
    error = refused(gate, key)
    assert error.status == 503
    assert str(ring._path) not in str(error)
    assert str(ring._path) in caplog.text
    ring._path.write_bytes(content)
    os.chmod(ring._path, 0o600)  # noqa: PTH101 - says it in one line
    assert gate.key(key, "query").name == "ann"
