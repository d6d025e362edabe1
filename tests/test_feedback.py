"""Corrections on disk: nothing that was acknowledged is lost, nothing is half written, and the record stays."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, in_a_new_process

from icl_compiler import feedback as storing
from icl_compiler.data import normalise_text
from icl_compiler.errors import ServingError
from icl_compiler.feedback import Correction, FeedbackStore, NoSuchCorrectionError, read_corrections

VERSION = "0123456789ab"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "corrections.db"


@pytest.fixture
def store(file):
    with FeedbackStore(file) as opened:
        yield opened


def add(store, text="where is it?", label="track", program="p", by="ann"):
    return store.add(program, text, label, by=by, version=VERSION)


def sql(file, statement, *values):
    """What SQLite itself says, without our code."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


# Kept


KILLED = """
import json, os, sys
from itertools import count
from pathlib import Path
from threading import Thread
from icl_compiler.feedback import FeedbackStore

store = FeedbackStore(Path(sys.argv[1]))

def work(thread):
    for i in count():
        made = store.add("p", f"text {thread} {i} 🤖", "label", by="ann", version="0123456789ab")
        os.write(1, (json.dumps(made) + "\\n").encode())

threads = [Thread(target=work, args=(thread,)) for thread in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(file):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE)
    lines = [child.stdout.readline() for _ in range(1000)]
    child.kill()
    lines += child.stdout.read().splitlines(keepends=True)
    assert child.wait() == -signal.SIGKILL
    acknowledged = [Correction(*json.loads(line)) for line in lines if line.endswith(b"\n")]
    assert len(acknowledged) >= 1000
    with FeedbackStore(file) as store:
        kept = store.page("p", limit=100_000)
        events = store.events(limit=100_000)
        assert add(store).id > max(made.id for made in acknowledged)
    assert set(acknowledged) <= set(kept)
    assert [event.correction for event in events] == [made.id for made in kept]
    assert sql(file, "PRAGMA integrity_check") == [("ok",)]


def test_the_disk_is_waited_for(store):
    """A killed process does not tell; a lost current would."""
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_threads_share_the_wait_for_the_disk(store, file):
    said = []
    store._db.set_trace_callback(said.append)
    with ThreadPoolExecutor(32) as threads:
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # holds the first one up until the others wait
            made = [threads.submit(add, store, f"text {i}") for i in range(32)]
            time.sleep(0.5)
            other.execute("COMMIT")
        assert sorted(each.result().text for each in made) == sorted(f"text {i}" for i in range(32))
    assert 1 <= said.count("COMMIT") <= 8
    assert store.page("p") == sorted(each.result() for each in made)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_kept_as_it_is(text, store, file):
    made = add(store, text, label=text, program=text, by=text)
    assert (made.text, made.label, made.program, made.by) == (text,) * 4
    assert store.page(text) == store.active(text) == read_corrections(file, text) == [made]


@pytest.mark.parametrize("field", ["text", "label", "program", "by"])
def test_half_a_character_is_refused(field, store):
    with pytest.raises(ServingError, match=r"holds half a character \('\\ud83d', a surrogate"):
        add(store, **{field: "a\ud83d"})
    with pytest.raises(ServingError, match="half a character"):
        store.record("reloaded", "p", by="ann", detail="\udc00")
    assert store.page(None) == []


# Undone


TEXTS = st.sampled_from(["Where is it?", "where  IS it?", "my card", "MY CARD", "other"])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("pq"), TEXTS, st.sampled_from(["x", "y"])),
        st.tuples(st.just("undo"), st.integers(1, 12)),
    ),
    max_size=20,
)


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS)
def test_what_is_active_is_what_a_list_would_say(actions):
    rows, record = [], []
    with tempfile.TemporaryDirectory() as folder, FeedbackStore(Path(folder, "c.db")) as store:
        for kind, *values in actions:
            if kind == "add":
                program, text, label = values
                rows.append([program, text, label, False])
                assert add(store, text, label, program).id == len(rows)
                record.append(("added", program, len(rows)))
            elif values[0] <= len(rows):
                row = rows[values[0] - 1]
                assert store.undo(values[0], by="bob").undone_by == "bob"
                record += [("undone", row[0], values[0])] * (not row[3])
                row[3] = True
            else:
                with pytest.raises(NoSuchCorrectionError, match=f"no correction {values[0]}"):
                    store.undo(values[0], by="bob")
        for program in "pq":
            wanted = [
                number
                for number, (of, text, _, undone) in enumerate(rows, start=1)
                if of == program
                and not undone
                and not any(
                    of == p and not gone and normalise_text(t) == normalise_text(text)
                    for p, t, _, gone in rows[number:]
                )
            ]
            assert [correction.id for correction in store.active(program)] == wanted
            assert [(c.text, c.label, c.undone is not None) for c in store.page(program)] == [
                tuple(row[1:]) for row in rows if row[0] == program
            ]
        assert [(event.what, event.program, event.correction) for event in store.events()] == record


def test_undone_twice_it_stays_as_it_was(store):
    made = add(store)
    once = store.undo(made.id, by="bob")
    assert once == made._replace(undone=once.undone, undone_by="bob")
    assert store.undo(made.id, by="eve") == once
    assert [(event.what, event.by) for event in store.events()] == [("added", "ann"), ("undone", "bob")]


@pytest.mark.parametrize("number", [0, -1, 2, 2**63, 2**200])
def test_numbers_that_no_correction_has(number, store):
    add(store)
    with pytest.raises(LookupError, match=f"there is no correction {number};"):
        store.undo(number, by="bob")
    assert len(store.page("p", after=number)) == (number < 1)
    assert len(store.events(limit=number)) == min(max(number, 0), 1)


def test_pages(store):
    made = [add(store, f"text {i}", program="pq"[i % 2]) for i in range(10)]
    assert store.page("p", after=made[2].id, limit=2) == [made[4], made[6]]
    assert store.page(None, after=made[7].id) == made[8:]
    assert [event.correction for event in store.events(after=3, limit=2)] == [4, 5]


# The record


def test_the_record_cannot_be_changed(store, file):
    add(store)
    store.record("rolled back", "p", by="eve", detail="to 0123456789ab")
    before = store.events()
    assert [(event.what, event.by, event.correction, event.detail) for event in before] == [
        ("added", "ann", 1, ""),
        ("rolled back", "eve", None, "to 0123456789ab"),
    ]
    for attempt in (
        "UPDATE events SET who = 'nobody'",
        "UPDATE OR IGNORE events SET what = 'x' WHERE id = 1",
        "DELETE FROM events WHERE id = 2",
        "INSERT OR REPLACE INTO events SELECT id, time, 'nobody', what, program, correction, detail FROM events",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="events are kept"):
            sql(file, attempt)
    assert store.events() == before


def test_a_correction_and_its_event_are_written_together(store, file):
    sql(file, "CREATE TRIGGER refuse BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'not today'); END")
    with pytest.raises(ServingError, match="not today"):
        add(store)
    assert store.page(None) == []
    sql(file, "DROP TRIGGER refuse")
    assert [add(store)] == store.page(None)


# Two processes


def test_one_process_writes(store, file):
    made = add(store)
    with pytest.raises(ServingError, match=r"corrections\.db is in use by another `icl serve`; stop that one, or name"):
        FeedbackStore(file)
    store.close()
    store.close()
    with FeedbackStore(file) as again:
        assert again.page(None) == [made]


READ = """
import json, sys
from pathlib import Path
from icl_compiler.feedback import read_corrections
print(json.dumps(read_corrections(Path(sys.argv[1]), "p")))
"""


def test_another_process_reads_meanwhile_and_afterwards(store, file):
    add(store, "where is it?", "card")
    made = [add(store, "Where is it?", "track"), add(store, "my card", "card")]
    add(store, "not of this program", program="q")
    store.undo(add(store, "wrong").id, by="ann")
    assert in_a_new_process(READ, file) == [list(each) for each in made]
    store.close()
    assert in_a_new_process(READ, file) == [list(each) for each in made]


def test_a_file_that_another_program_holds_is_waited_for_and_named(store, file):
    store._db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            ServingError, match=r"\(database is locked\): another program holds the file locked; end it"
        ):
            add(store)
    assert [add(store)] == store.page(None)


def test_what_comes_after_the_end_is_refused(store):
    store.close()
    with pytest.raises(ServingError, match="are closed: the endpoint is ending"):
        add(store)
    with pytest.raises(ServingError, match="closed database"):
        store.page(None)


# Files and disks that do not serve


FULL = """
import json, resource, sys
from pathlib import Path
from icl_compiler.errors import ServingError
from icl_compiler.feedback import FeedbackStore

def add(text):
    return store.add("p", text, "label", by="ann", version="0123456789ab")

store = FeedbackStore(Path(sys.argv[1]))
add("before")
most = Path(sys.argv[1] + "-wal").stat().st_size + 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
kept, failures = ["before"], []
for i in range(20):
    try:
        kept.append(add(f"{i} " + "x" * 20_000).text)
    except ServingError as error:
        failures.append(str(error))
assert [correction.text for correction in store.page("p")] == kept
assert [event.correction for event in store.events()] == [correction.id for correction in store.active("p")]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
kept.append(add("after").text)
print(json.dumps([kept, failures]))
"""


def test_a_file_that_may_not_grow_leaves_a_store_that_answers(file):
    kept, failures = in_a_new_process(FULL, file)
    assert failures
    assert all("the disk is full or failing, or the file may not grow; make room" in said for said in failures)
    assert kept[0] == "before"
    assert kept[-1] == "after"
    assert [correction.text for correction in read_corrections(file, "p")] == kept
    assert sql(file, "PRAGMA integrity_check") == [("ok",)]


def test_a_database_that_may_not_grow(store):
    add(store)
    store._db.execute(f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(ServingError, match=r"\(database or disk is full\): the disk is full"):
        add(store, "x" * 20_000)
    assert len(store.page(None)) == 1


def no_database(path):
    path.write_text("id,text,label\n" * 100)


def of_something_else(path):
    sql(path, "CREATE TABLE bookmarks (url TEXT)")


def newer(path):
    FeedbackStore(path).close()
    sql(path, f"PRAGMA user_version = {storing.SCHEMA + 1}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_database, r"file is not a database\): expected a file that `icl serve` made"),
        (of_something_else, "is a database of something else, expected one of `icl serve`"),
        (newer, f"has format {storing.SCHEMA + 1}, and this version of icl-compiler reads up to {storing.SCHEMA}"),
    ],
)
def test_files_that_hold_something_else_are_refused_and_left_alone(spoil, said, file):
    spoil(file)
    before = file.read_bytes()
    with pytest.raises(ServingError, match=said):
        FeedbackStore(file)
    with pytest.raises(ServingError, match=said):
        read_corrections(file, "p")
    assert file.read_bytes() == before


def test_places_where_no_file_can_be(tmp_path, file):
    with pytest.raises(ServingError, match="unable to open database file"):
        FeedbackStore(tmp_path)
    file.write_text("")
    with pytest.raises(ServingError, match=r"cannot be opened: (Not a directory|File exists)"):
        FeedbackStore(file / "corrections.db")
    with pytest.raises(ServingError, match=r"there is no file .*nowhere: expected one that `icl serve`"):
        read_corrections(tmp_path / "nowhere", "p")
    with FeedbackStore(tmp_path / "new" / "folder" / "c.db") as store:
        add(store)


def test_a_damaged_file_is_said_to_be(file):
    with FeedbackStore(file) as store:
        add(store, "x" * 100_000)
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(ServingError, match="the file is damaged; put a copy in its place"):
        read_corrections(file, "p")


@contextmanager
def as_a_user():
    """Root may write everything; as long as this lasts, we are somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("mode", "folder_mode", "said"), [(0o444, 0o777, "attempt to write a readonly database"), (0o444, 0o555, "denied")]
)
def test_a_file_that_may_not_be_written_is_refused_at_the_start(mode, folder_mode, said):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "c.db")
        FeedbackStore(file).close()
        Path(f"{file}.lock").unlink()
        file.chmod(mode)
        Path(name).chmod(folder_mode)
        with as_a_user(), pytest.raises(ServingError, match=said):
            FeedbackStore(file)
        Path(name).chmod(0o700)
