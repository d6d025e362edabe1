"""Copies of the programs that were served, so that one can be taken back, also after a restart.

    FOLDER/NAME/VERSION/   a copy of the program
    FOLDER/NAME/pin.json   the version to serve in place of the one in the program's own folder

- A copy is written beside its place and renamed, and checked against its hashes whenever it is used.
- A pin holds as long as the program's own folder holds what it replaces: who compiles anew, wants that served.
- Whoever loads the copy that `keep` made, and not the program's own folder, serves the version that it names.
"""

import builtins
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from icl_compiler.artifact import new_folder, read_manifest
from icl_compiler.errors import ArtifactError, ServingError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[0-9a-f]{12}")
_MANIFEST = "manifest.json"


class Version(NamedTuple):
    """A copy, and when it was kept last: UTC in ISO 8601."""

    version: str
    kept: str


def require_name(name: str) -> str:
    """`name`, if it can stand in an address and as a folder.

    Raises:
        ServingError: if it cannot.

    >>> require_name("banking77-v1.2")
    'banking77-v1.2'
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"the name {name!r} is none: expected 1 to 100 of the characters A-Z a-z 0-9 . _ -, "
            "the first a letter or a digit"
        )
    return name


def version_of(folder: Path) -> str:
    """The first 12 hexadecimal digits of the program's hash, after checking every file.

    Raises:
        ArtifactError: if `folder` is no program, or was changed.
    """
    read_manifest(folder, kind="program")
    digest: str = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
    return digest[:12]


class Versions:
    """The copies in `folder`, at most `keep` (1 or more) of a program, and those in use. Threads may share it.

    Raises:
        ServingError: if `keep` is less than 1. Methods raise it for a name or a version that is none.
    """

    def __init__(self, folder: Path, *, keep: int = 5) -> None:
        if keep < 1:
            raise ServingError(f"the number of versions to keep should be 1 or more, is {keep}")
        self._folder = folder
        self._most = keep
        self._alone = Lock()

    def keep(self, name: str, program: Path) -> str:
        """Copy the program, unless that version is there, and return its version; it counts as the newest now.

        A copy that was damaged is replaced. Of more copies than are to be kept the oldest go, but never this one,
        or the one that is pinned in its place.

        Raises:
            ArtifactError: if `program` is none or was changed, or the copy cannot be written.
        """
        place = self._place(name)
        with self._alone:
            version = version_of(program)
            if not _holds(place / version, version):
                with new_folder(place / version) as draft:
                    shutil.copytree(program, draft, dirs_exist_ok=True)
                    if not _holds(draft, version):
                        raise ArtifactError(f"{program} was changed while it was copied; try again")
            now = time.time_ns()
            os.utime(place / version, ns=(now, now))
            newest = [kept.version for kept in self.list(name)[: self._most]]
            for copy in _copies(place):
                if copy.name not in (*newest, version, self.pinned(name, version)):
                    (copy / _MANIFEST).unlink(missing_ok=True)  # what is left of it is no copy
                    shutil.rmtree(copy, ignore_errors=True)
        return version

    def folder(self, name: str, version: str) -> Path:
        """The copy of this version, after checking every file.

        Raises:
            ArtifactError: if it was changed.
        """
        copy = self._place(name) / version
        if not _VERSION.fullmatch(version) or not copy.is_dir():
            kept = ", ".join(each.version for each in self.list(name)) or "none"
            raise ServingError(f"no version {version!r} of {name} was kept; there are: {kept}")
        if version_of(copy) != version:
            raise ArtifactError(f"{copy} is another version than its name says; remove it")
        return copy

    def list(self, name: str) -> builtins.list[Version]:
        """The copies, the one that was kept last first."""
        copies = [copy for copy in _copies(self._place(name)) if (copy / _MANIFEST).is_file()]
        times = {copy: copy.stat().st_mtime_ns for copy in copies}
        return [
            Version(copy.name, datetime.fromtimestamp(times[copy] / 1e9, UTC).isoformat(timespec="milliseconds"))
            for copy in sorted(copies, key=times.__getitem__, reverse=True)
        ]

    def pin(self, name: str, version: str, *, instead_of: str) -> None:
        """From now on serve `version`, as long as the program's own folder holds `instead_of`.

        Raises:
            ArtifactError: if the copy was changed.
        """
        self.folder(name, version)
        pin = {"version": version, "instead_of": instead_of}
        write_whole(self._place(name) / "pin.json", json.dumps(pin) + "\n")

    def pinned(self, name: str, current: str) -> str | None:
        """The version to serve in place of `current`, which the program's own folder holds; None means `current`."""
        path = self._place(name) / "pin.json"
        try:
            pin = json.loads(path.read_text(encoding="utf-8"))
            version, instead_of = str(pin["version"]), pin["instead_of"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"{path} is damaged ({error}); remove it to serve the program that was compiled last"
            ) from error
        return version if instead_of == current else None

    def unpin(self, name: str) -> None:
        """Serve what the program's own folder holds."""
        (self._place(name) / "pin.json").unlink(missing_ok=True)

    def _place(self, name: str) -> Path:
        return self._folder / require_name(name)


def write_whole(path: Path, text: str) -> None:
    """Put `text` in place of the file, complete or not at all, for its owner alone to read (mode 0600).

    The owner of a file that was there keeps it, also where root writes.

    Raises:
        ServingError: if it cannot be written; what was there is there still.
    """
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                with suppress(FileNotFoundError, PermissionError):
                    was = path.stat()
                    os.chown(handle, was.st_uid, was.st_gid)
                os.fsync(handle)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink()
            raise
    except OSError as error:
        raise ServingError(f"{path} cannot be written: {error.strerror or error}") from error


def _copies(place: Path) -> list[Path]:
    """Everything that is named like a version, also what is left of one."""
    return [path for path in place.glob("*") if _VERSION.fullmatch(path.name)]


def _holds(folder: Path, version: str) -> bool:
    try:
        return version_of(folder) == version
    except ArtifactError:
        return False
