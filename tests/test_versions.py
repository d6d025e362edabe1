"""Copies of programs: exact, checked when used, no more than asked for; and the pins that outlive a restart."""

import json
import os
import shutil
import stat

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toys import customers

from icl_compiler.artifact import load_program, save_program
from icl_compiler.compile import compile_program
from icl_compiler.errors import ArtifactError, ServingError
from serving.versions import Versions, require_name, version_of, write_whole

EVIL = ("", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-rf", "_a", "a\n", "a\0", "é", "a b", "１", "a" * 101)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Five programs that differ in their number of shots."""
    folders = [tmp_path_factory.mktemp("made") / "program" for _ in range(5)]
    for shots, folder in enumerate(folders):
        save_program(compile_program(customers(), model="echo", retriever="uniform", shots=shots), folder)
    return folders


@pytest.fixture
def versions(tmp_path):
    return Versions(tmp_path / "state")


def digest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"][:12]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kept(versions, name="p"):
    return [each.version for each in versions.list(name)]


# Copies


def test_a_copy_is_the_program(versions, programs):
    version = versions.keep("p", programs[3])
    assert version == version_of(programs[3]) == digest(programs[3])
    assert contents(versions.folder("p", version)) == contents(programs[3])
    assert load_program(versions.folder("p", version)).settings.shots == 3


def test_what_is_there_is_not_copied_again_and_is_the_newest(versions, programs, monkeypatch):
    first, second = (versions.keep("p", folder) for folder in programs[:2])
    assert kept(versions) == [second, first]
    times = [each.kept for each in versions.list("p")]
    assert times == sorted(times, reverse=True)
    monkeypatch.setattr(shutil, "copytree", None)
    assert versions.keep("p", programs[0]) == first
    assert kept(versions) == [first, second]


def test_programs_of_other_names_are_apart(versions, programs):
    versions.keep("p", programs[0])
    assert kept(versions, "q") == []
    with pytest.raises(ServingError, match=r"no version '.*' of q was kept; there are: none"):
        versions.folder("q", digest(programs[0]))


def test_the_oldest_go_but_not_what_is_served(tmp_path, programs):
    made = [digest(folder) for folder in programs]
    versions = Versions(tmp_path, keep=2)
    for folder in programs[:2]:
        versions.keep("p", folder)
    versions.pin("p", made[0], instead_of=made[1])
    versions.keep("p", programs[2])
    # The pin was about another version, so its own is not needed any more.
    assert kept(versions) == [made[2], made[1]]
    versions.pin("p", made[1], instead_of=made[4])
    versions.keep("p", programs[3])
    versions.keep("p", programs[2])
    versions.keep("p", programs[4])
    assert kept(versions) == [made[4], made[2]]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == sorted([made[4], made[2], "pin.json"])


def test_the_pinned_one_stays_however_old(tmp_path, programs):
    made = [digest(folder) for folder in programs]
    versions = Versions(tmp_path, keep=1)
    versions.keep("p", programs[0])
    versions.pin("p", made[0], instead_of=made[1])
    versions.keep("p", programs[1])
    assert kept(versions) == [made[1], made[0]]
    with pytest.raises(ServingError, match="should be 1 or more, is 0"):
        Versions(tmp_path, keep=0)


def test_a_changed_program_is_not_kept(versions, programs, tmp_path):
    shutil.copytree(programs[0], tmp_path / "program")
    (tmp_path / "program" / "pool.jsonl").write_text("")
    with pytest.raises(ArtifactError, match=r"pool\.jsonl was changed after it was written"):
        versions.keep("p", tmp_path / "program")
    assert kept(versions) == []


def test_a_program_that_changes_under_the_copy_is_not_kept(versions, programs, tmp_path, monkeypatch):
    shutil.copytree(programs[0], tmp_path / "program")

    def meanwhile(source, target, **options):
        patch.undo()
        save_program(load_program(programs[1]), source)
        return shutil.copytree(source, target, **options)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ArtifactError, match="program was changed while it was copied; try again"),
    ):
        patch.setattr(shutil, "copytree", meanwhile)
        versions.keep("p", tmp_path / "program")
    assert contents(tmp_path / "state") == {}


def test_each_damaged_file_is_seen_and_repaired(versions, programs):
    version = versions.keep("p", programs[2])
    copy = versions.folder("p", version)
    for name, content in contents(copy).items():
        for damaged in (content[:-1] + b"!", None):
            if damaged is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(damaged)
            with pytest.raises(ArtifactError):
                versions.folder("p", version)
            with pytest.raises(ArtifactError):
                versions.pin("p", version, instead_of="0" * 12)
            assert versions.keep("p", programs[2]) == version
            assert contents(versions.folder("p", version)) == contents(programs[2])


def test_a_copy_under_the_name_of_another_is_refused(versions, programs):
    first, second = (versions.folder("p", versions.keep("p", folder)) for folder in programs[:2])
    shutil.rmtree(first)
    second.rename(first)
    with pytest.raises(ArtifactError, match="is another version than its name says"):
        versions.folder("p", first.name)


# Pins


def test_a_pin_outlives_a_restart_and_ends_with_what_it_replaced(tmp_path, programs):
    old, new, newest = (Versions(tmp_path).keep("p", folder) for folder in programs[:3])
    assert Versions(tmp_path).pinned("p", new) is None
    Versions(tmp_path).pin("p", old, instead_of=new)
    assert Versions(tmp_path).pinned("p", new) == old
    assert Versions(tmp_path).pinned("p", newest) is None
    assert Versions(tmp_path).pinned("q", new) is None
    Versions(tmp_path).unpin("p")
    Versions(tmp_path).unpin("p")
    assert Versions(tmp_path).pinned("p", new) is None


def test_only_what_was_kept_can_be_pinned(versions, programs):
    version = versions.keep("p", programs[0])
    with pytest.raises(ServingError, match=rf"no version 'f{{12}}' of p was kept; there are: {version}$"):
        versions.pin("p", "f" * 12, instead_of=version)
    assert versions.pinned("p", version) is None


@pytest.mark.parametrize("content", ["", "[]", '{"version": "0"}', "null", '{"version": '])
def test_a_damaged_pin_is_not_passed_over(content, versions, programs):
    version = versions.keep("p", programs[0])
    pin = versions.folder("p", version).parent / "pin.json"
    pin.write_text(content)
    with pytest.raises(
        ServingError, match=r"pin\.json is damaged .*; remove it to serve the program that was compiled"
    ):
        versions.pinned("p", version)


# Names


@pytest.mark.parametrize("name", ["a", "0", "banking77-v1.2_x", "a..b", "a-", "A" * 100])
def test_names(name):
    assert require_name(name) == name


@given(name=st.one_of(st.text(), st.text(alphabet="aZ09._-/\\~\0\n ", max_size=5)))
@example(name="a\n")
def test_a_name_is_one_plain_folder_or_refused(name):
    try:
        require_name(name)
    except ServingError:
        return
    assert name.isascii()
    assert name[0].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert os.path.normpath(os.path.join("/state", name)) == f"/state/{name}"  # noqa: PTH118
    assert name not in (".", "..")


@pytest.mark.parametrize("name", EVIL)
def test_evil_names_and_versions_reach_no_file(name, versions, programs, tmp_path):
    version = versions.keep("p", programs[0])
    before = contents(tmp_path)
    for call in (
        lambda: require_name(name),
        lambda: versions.keep(name, programs[0]),
        lambda: versions.folder(name, version),
        lambda: versions.list(name),
        lambda: versions.pin(name, version, instead_of=version),
        lambda: versions.pinned(name, version),
        lambda: versions.unpin(name),
    ):
        with pytest.raises(ServingError, match=r"the name .* is none: expected 1 to 100 of"):
            call()
    for elsewhere in (name, f"../p/{version}", f"{version}/", f"{version}\n"):
        with pytest.raises(ServingError, match=r"no version .* of p was kept"):
            versions.folder("p", elsewhere)
        with pytest.raises(ServingError, match=r"no version .* of p was kept"):
            versions.pin("p", elsewhere, instead_of=version)
    assert contents(tmp_path) == before


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o644)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.close(-1))
        with pytest.raises(ServingError, match="file cannot be written: Bad file descriptor"):
            write_whole(file, "new")
    assert contents(tmp_path) == {"file": b"old"}
    write_whole(file, "neü\n")
    assert contents(tmp_path) == {"file": "neü\n".encode()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ServingError, match="cannot be written: No such file"):
        write_whole(tmp_path / "nowhere" / "file", "new")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_keeps_the_file_that_root_writes(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    os.chown(file, 65534, 65533)
    write_whole(file, "new")
    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65533)
