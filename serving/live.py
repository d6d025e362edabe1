"""A program that is being served: its versions, and the corrections put into it, changed while requests run.

- What a request sees is an `Edition`, which never changes. A reload, a rollback or a correction makes another one and
  puts it in its place; requests under way end with the one they began with, so that none is lost.
- One change of a program at a time. Corrections that come while one is made are all in the next.
- If the new version cannot be served (its folder is damaged, its model is not there), the old one stays.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from icl_compiler.artifact import load_program
from icl_compiler.backends.label_walk import LabelWalk
from icl_compiler.backends.vllm_protocol import label_walk
from icl_compiler.corrections import Corrector, require_label
from icl_compiler.encoders import remember
from icl_compiler.errors import ContextLengthError, LabelError, ServingError, TemplateError
from icl_compiler.feedback import FeedbackStore
from icl_compiler.program import Program
from serving.upstream import Engine
from serving.versions import Versions, version_of

_REMEMBERED = 5000  # texts whose vectors are kept

FindEngine = Callable[[str], Awaitable[Engine]]
"""Gives the engine of a base model."""


class NoSuchVersionError(ServingError):
    """There is no such version to go back to."""


@dataclass(frozen=True, eq=False)
class Edition:
    """A version of a program with the corrections that stood when it was made.

    Attributes:
        program: with the corrections in its pool.
        corrector: the program without them.
        corrections: how many there are.
        left_out: how many have an answer that this version cannot give.
        note: what the user should know about the version, or nothing.
    """

    name: str
    version: str
    program: Program
    corrector: Corrector
    engine: Engine
    corrections: int = 0
    left_out: int = 0
    note: str = ""

    @cached_property
    def walk(self) -> LabelWalk:
        """The questions about the labels."""
        return label_walk(self.program.label_words)

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Which of them go into one request."""
        return self.engine.ability.groups(self.walk)


class LiveProgram:
    """One name, and the edition that is served under it; made by `open`."""

    def __init__(
        self, edition: Edition, folder: Path, *, versions: Versions, store: FeedbackStore, engine: FindEngine
    ) -> None:
        self.edition = edition
        self.loaded = time.time()
        self._folder = folder
        self._versions = versions
        self._store = store
        self._engine = engine
        self._changing = asyncio.Lock()
        self._next: asyncio.Task[Edition] | None = None

    @classmethod
    async def open(
        cls, name: str, folder: Path, *, versions: Versions, store: FeedbackStore, engine: FindEngine
    ) -> "LiveProgram":
        """Load the program in `folder`, or the version that a rollback put in its place.

        Raises:
            ArtifactError: if the folder holds no program that can be read.
            ModelError: if its base model is not there, or has a smaller context than the program's budget.
        """
        version = await asyncio.to_thread(versions.keep, name, folder)
        note = ""
        if (pinned := versions.pinned(name, version)) is not None:
            note = f"version {pinned} is served in place of {version}, since a rollback"
            version = pinned
        edition = await _edition(name, versions, version, note, store, engine)
        return cls(edition, folder, versions=versions, store=store, engine=engine)

    async def refresh(self) -> Edition:
        """The edition with all corrections that stand in the store now."""
        if self._next is None:
            self._next = asyncio.create_task(self._refresh())
        return await asyncio.shield(self._next)

    async def reload(self, *, by: str) -> Edition:
        """Serve what the program's folder holds now; a rollback ends with it.

        Raises:
            ArtifactError, ModelError: as `open`; the old version stays.
        """
        async with self._changing:
            name = self.edition.name
            version = await asyncio.to_thread(self._versions.keep, name, self._folder)
            edition = await _edition(name, self._versions, version, "", self._store, self._engine)
            return await self._take(edition, "reloaded", by, partial(self._versions.unpin, name))

    async def rollback(self, *, to: str | None, by: str) -> Edition:
        """Serve version `to`, by default the one that was kept before the one that is served.

        It is served until `reload` is asked for, or the program's folder holds another version at the next start.

        Raises:
            NoSuchVersionError: if there is none.
            ArtifactError, ModelError: as `open`; the old version stays.
        """
        async with self._changing:
            name, now = self.edition.name, self.edition.version
            kept = [version.version for version in await asyncio.to_thread(self._versions.list, name)]
            if to is None:
                older = kept[kept.index(now) + 1 :] if now in kept else kept
                if not older:
                    raise NoSuchVersionError(
                        f"no version of {name!r} older than {now} was kept, so there is none to go back to"
                    )
                to = older[0]
            elif to not in kept:
                raise NoSuchVersionError(f"version {to[:20]!r} of {name!r} was not kept; kept are {', '.join(kept)}")
            edition = await _edition(name, self._versions, to, f"a rollback from {now}", self._store, self._engine)
            current = await asyncio.to_thread(version_of, self._folder)
            return await self._take(
                edition, "rolled back", by, partial(self._versions.pin, name, to, instead_of=current)
            )

    async def description(self) -> dict[str, Any]:
        """What is served, and which versions are kept."""
        edition = self.edition
        kept = await asyncio.to_thread(self._versions.list, edition.name)
        return {
            "id": edition.name,
            "version": edition.version,
            "note": edition.note,
            "base_model": edition.engine.model,
            "pool_rows": len(edition.program.pool.data),
            "corrections": edition.corrections,
            "corrections_left_out": edition.left_out,
            "versions": [version._asdict() for version in kept],
        }

    async def _take(self, edition: Edition, what: str, by: str, settle: Callable[[], None]) -> Edition:
        """Serve `edition`, once that is recorded and settled for the next start."""
        detail = f"{self.edition.version} -> {edition.version}"
        await asyncio.to_thread(self._store.record, what, edition.name, by=by, detail=detail)
        await asyncio.to_thread(settle)
        self.edition, self.loaded = edition, time.time()
        return edition

    async def _refresh(self) -> Edition:
        async with self._changing:
            self._next = None  # from here on a new correction may be missed
            self.edition = await asyncio.to_thread(_corrected, self.edition, self._store)
            return self.edition


async def _edition(
    name: str, versions: Versions, version: str, note: str, store: FeedbackStore, engine: FindEngine
) -> Edition:
    folder = await asyncio.to_thread(versions.folder, name, version)
    program = await asyncio.to_thread(load_program, folder)
    found = await engine(program.settings.model)
    budget = program.settings.budget
    if budget > found.max_prompt_tokens:
        raise ContextLengthError(
            f"{name!r} was compiled for prompts of up to {budget:,} tokens, and {found.model!r} at {found.upstream.url}"
            f" takes {found.max_prompt_tokens:,}; start that with a larger --max-model-len, or compile with a smaller "
            "--budget"
        )
    # A server runs for months; the pool, and what comes now, is all that it needs to remember.
    remember(program, max(_REMEMBERED, 2 * len(program.pool.data)))
    edition = Edition(name, version, program, Corrector(program), found, note=note)
    edition = await asyncio.to_thread(_corrected, edition, store)
    if program.task == "classification":
        _ = edition.groups  # worked out before the first request, not during it
    return edition


def _corrected(edition: Edition, store: FeedbackStore) -> Edition:
    stand = store.active(edition.name)
    program = edition.corrector.program
    known = [(c.text, c.label) for c in stand if _can_answer(program, c.label)]
    corrected = edition.corrector.corrected(known)
    return replace(edition, program=corrected, corrections=len(known), left_out=len(stand) - len(known))


def _can_answer(program: Program, answer: str) -> bool:
    with suppress(LabelError, TemplateError):
        require_label(program, answer)
        return True
    return False
