"""Keys: never on disk, gone when revoked; limits that hold to the request; and the command that makes them."""

import base64
import json
import math
import stat
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from icl_compiler.cli import main
from icl_compiler.errors import ServingError
from serving.keys import Key, KeyRing, RateLimiter

DAY = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def key(per_minute, name="ann"):
    return Key(name, sha256(name.encode()).hexdigest(), ("query",), per_minute, DAY)


# Keys


def test_the_file_holds_the_hash_and_not_the_key(file):
    secret = KeyRing(file).add("ann", ["feedback", "query"], 60)
    assert len(base64.urlsafe_b64decode(secret.removeprefix("icl-") + "=")) == 32
    assert secret[4:] not in file.read_text()
    [entry] = json.loads(file.read_text())["keys"]
    assert entry["hash"] == sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = KeyRing.load(file).find(secret)
    assert (found.name, found.rights, found.per_minute) == ("ann", ("query", "feedback"), 60)


def test_only_whole_keys_are_found(file):
    ring = KeyRing(file)
    secrets = {ring.add(name, ["query"]): name for name in ("ann", "bob", "eve")}
    assert len(secrets) == 3
    assert {secret: ring.find(secret).name for secret in secrets} == secrets
    for secret in secrets:
        others = (secret[:-1], secret + "A", secret.upper(), secret[4:], sha256(secret.encode()).hexdigest())
        assert [ring.find(other) for other in (*others, "", "é", "\udc80")] == [None] * 8


def test_a_running_server_sees_what_another_process_did(file):
    ours, theirs = KeyRing(file), KeyRing(file)
    first = ours.add("ann", ["query"])
    second = theirs.add("bob", ["admin"])
    assert ours.find(second) is None
    ours.refresh()
    assert [ours.find(secret).name for secret in (first, second)] == ["ann", "bob"]
    theirs.revoke("ann")
    ours.refresh()
    assert ours.find(first) is None
    assert ours.find(second).may("feedback")


def test_a_file_that_did_not_change_is_not_read(file, monkeypatch):
    ring = KeyRing(file)
    secret = ring.add("ann", ["query"])
    monkeypatch.setattr(json, "loads", None)
    ring.refresh()
    assert ring.find(secret)


def test_many_who_add_at_once_lose_nothing(file):
    with ThreadPoolExecutor(8) as threads:
        secrets = list(threads.map(lambda i: KeyRing(file).add(f"key{i}", ["query"]), range(24)))
    ring = KeyRing.load(file)
    assert [ring.find(secret).name for secret in secrets] == [f"key{i}" for i in range(24)]


def test_who_may_write_the_file_may_make_keys(file):
    ring = KeyRing(file)
    secret = ring.add("ann", ["query"])
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        with pytest.raises(ServingError, match=f"may be written by others .mode {mode:o}.*; run: chmod 600 "):
            KeyRing.load(file)
    file.chmod(0o644)
    assert KeyRing.load(file).find(secret)


ENTRY = key(5)._asdict()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"keys": 5}',
        *(
            json.dumps({"keys": [entry]})
            for entry in (
                5,
                {},
                {**ENTRY, "more": 1},
                {**ENTRY, "name": "../x"},
                {**ENTRY, "name": 5},
                {**ENTRY, "hash": "00"},
                {**ENTRY, "hash": "x" * 64},
                {**ENTRY, "hash": None},
                {**ENTRY, "rights": []},
                {**ENTRY, "rights": "query"},
                {**ENTRY, "rights": ["everything"]},
                {**ENTRY, "per_minute": 0},
                {**ENTRY, "per_minute": True},
                {**ENTRY, "per_minute": "5"},
            )
        ),
    ],
)
def test_a_file_that_holds_something_else_changes_nothing(content, file):
    ring = KeyRing(file)
    secret = ring.add("ann", ["query"])
    file.write_text(content)
    for _ in range(2):
        with pytest.raises(ServingError, match="does not hold keys as `icl keys` writes them"):
            ring.refresh()
    with pytest.raises(ServingError, match="does not hold keys"):
        ring.add("bob", ["query"])
    assert file.read_text() == content
    assert ring.find(secret)
    file.write_text(json.dumps({"keys": [ENTRY]}))
    ring.refresh()
    assert ring.find(secret) is None
    assert ring.keys == [key(5)]


def test_what_cannot_be_added(file):
    ring = KeyRing(file)
    for name, rights, per_minute, said in (
        ("a b", ["query"], None, "the name 'a b' is none"),
        ("ann", [], None, "one or more of query, feedback, admin"),
        ("ann", ["query", "root"], None, "one or more of query, feedback, admin; found .*root"),
        ("ann", ["query"], 0, "1 or more requests a minute, or any number; found 0"),
    ):
        with pytest.raises(ServingError, match=said):
            ring.add(name, rights, per_minute)
    assert not file.exists()
    ring.add("ann", ["query"])
    with pytest.raises(ServingError, match="there is a key 'ann' already"):
        ring.add("ann", ["query"])
    with pytest.raises(ServingError, match=r"there is no key 'an'\. Did you mean 'ann'"):
        ring.revoke("an")
    with pytest.raises(ServingError, match="cannot be written: No such file"):
        KeyRing(file.parent / "nowhere" / "keys.json").add("ann", ["query"])


# Limits


@given(
    per_minute=st.integers(1, 100_000),
    start=st.floats(0, 1e9),
    gaps=st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_a_limit_holds_over_every_stretch_of_time(per_minute, start, gaps):
    limiter, now, went = RateLimiter(), start, []
    for gap in gaps:
        now += gap
        if limiter.allow(key(per_minute), now) == 0:
            went.append(now)
    for first in range(len(went)):
        for last in range(first, len(went)):
            most = max(1, per_minute / 6) + (went[last] - went[first]) * per_minute / 60
            assert last - first + 1 <= most * (1 + 1e-6) + 1e-6


@given(per_minute=st.integers(1, 5000), start=st.floats(0, 1e9))
def test_who_waits_as_told_may_go_and_not_a_moment_before(per_minute, start):
    limiter, now = RateLimiter(), start
    burst = 0
    while (wait := limiter.allow(key(per_minute), now)) == 0:
        burst += 1
    assert abs(burst - max(1, per_minute // 6)) <= 1
    for _ in range(5):
        assert limiter.allow(key(per_minute), math.nextafter(now + wait, 0)) > 0
        now += wait
        assert limiter.allow(key(per_minute), now) == 0
        wait = limiter.allow(key(per_minute), now)
        assert wait == pytest.approx(60 / per_minute, rel=1e-3, abs=1e-5)


def test_a_minute_of_impatience():
    limiter = RateLimiter()
    went = sum(limiter.allow(key(30), now / 10) == 0 for now in range(600))
    assert went == 5 + 29  # a sixth at once, then one every 2 s; the one at 60 s comes after the end


def test_an_hour_of_rest_saves_nothing_up():
    limiter = RateLimiter()
    for now in (0.0, 3600.0):
        assert [limiter.allow(key(60), now) for _ in range(11)] == [0.0] * 10 + [1.0]


def test_keys_do_not_share_a_limit_and_may_have_none():
    limiter = RateLimiter()
    assert [limiter.allow(key(1, name), 0.0) for name in ("ann", "bob", "ann")] == [0.0, 0.0, 60.0]
    assert {limiter.allow(key(None), 0.0) for _ in range(100)} == {0.0}


def test_threads_get_no_more_than_one_would():
    limiter = RateLimiter()
    with ThreadPoolExecutor(8) as threads:
        waits = list(threads.map(lambda _: limiter.allow(key(600), 7.0), range(400)))
    assert waits.count(0.0) == 100


# The command


def icl(*arguments):
    return CliRunner().invoke(main, ["keys", *map(str, arguments)], prog_name="icl")


def test_the_command_prints_the_key_alone(file):
    said = icl("add", "ann", "--file", file, "--rights", "query", "--per-minute", 90)
    assert said.exit_code == 0
    assert said.stderr == "the key of ann (query) is in force, and shown only now\n"
    found = KeyRing.load(file).find(said.stdout.removesuffix("\n"))
    assert (found.name, found.rights, found.per_minute) == ("ann", ("query",), 90)
    icl("add", "bob", "--file", file)
    listed = icl("list", "--file", file)
    assert [line.split()[:3] for line in listed.stdout.splitlines()] == [
        ["ann", "query", "90"],
        ["bob", "query,feedback", "no"],
    ]
    rows = json.loads(icl("list", "--file", file, "--json").stdout)
    assert [set(row) for row in rows] == [{"name", "rights", "per_minute", "created"}] * 2
    assert icl("revoke", "ann", "--file", file).stderr == "the key of ann is revoked\n"
    assert [each.name for each in KeyRing.load(file).keys] == ["bob"]


def test_the_command_fails_in_sentences(file):
    for arguments, code, said in (
        (("list",), 1, f"there is no file {file}; `icl keys add NAME --file {file}` makes one"),
        (("revoke", "ann"), 1, "there is no file"),
        (("add", "a/b"), 1, "the name 'a/b' is none"),
        (("add", "ann", "--rights", "query,root"), 1, "found ['query', 'root']"),
        (("add", "ann", "--per-minute", "0"), 2, "0 is not in the range"),
    ):
        result = icl(*arguments, "--file", file)
        assert result.exit_code == code
        assert result.stdout == ""
        assert said in result.stderr
        assert not file.exists()
