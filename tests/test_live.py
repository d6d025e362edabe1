"""One name and what is served under it: versions and corrections change while others look on."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_toys import program_folder, translations
from toys import customers, plain_template

from icl_compiler.artifact import load_program
from icl_compiler.backends.vllm_protocol import Ability
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, ContextLengthError, ServingError
from icl_compiler.feedback import FeedbackStore
from serving.live import LiveProgram, NoSuchVersionError
from serving.upstream import Engine, Upstream
from serving.versions import Versions, version_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "corrections.sqlite") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return program_folder(tmp_path / "shop")


async def engine(model: str) -> Engine:
    return Engine(Upstream("http://127.0.0.1:1"), model, model, 700, Ability(0))


async def opened(folder: Path, store: FeedbackStore) -> LiveProgram:
    versions = Versions(folder.parent / "versions", keep=9)
    return await LiveProgram.open("shop", folder, versions=versions, store=store, engine=engine)


def give(store: FeedbackStore, text: str, label: str) -> None:
    store.add("shop", text, label, by="ann", version="0" * 12)


def rows(live: LiveProgram) -> dict[str, str]:
    data = live.edition.program.pool.data
    return dict(zip(data.texts, data.answers, strict=True))


def without(label: str) -> Dataset:
    data = customers()
    return data.take([row for row, answer in enumerate(data.answers) if answer != label])


def test_corrections_that_stand_are_in_the_pool(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        give(store, "THE card is lost ", "parcel")
        live = await opened(folder, store)
        first = live.edition
        assert rows(live)["the card is lost"] == "parcel"
        give(store, "fourteen of them", "refund")
        edition = await live.refresh()
        assert edition is live.edition
        assert rows(live)["fourteen of them"] == "refund"
        assert (edition.corrections, edition.left_out, edition.version) == (2, 0, version_of(folder))
        store.undo(1, by="ann")
        await live.refresh()
        assert rows(live) == dict(zip(customers().texts, customers().answers, strict=True)) | {
            "fourteen of them": "refund"
        }
        assert len(first.program.pool.data) == 12  # whoever holds an edition keeps it as it was

    asyncio.run(run())


def test_many_corrections_at_once_are_few_changes_and_each_waits_for_its_own(
    folder: Path, store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    active = store.active
    monkeypatch.setattr(store, "active", lambda name: made.append(name) or active(name))

    async def correct(live: LiveProgram, number: int) -> None:
        await asyncio.to_thread(give, store, f"text {number}", "card")
        assert f"text {number}" in (await live.refresh()).program.pool.data.texts

    async def run() -> None:
        live = await opened(folder, store)
        await asyncio.gather(*(correct(live, number) for number in range(60)))
        assert live.edition.corrections == 60

    asyncio.run(run())
    assert len(made) < 30


def test_reload_takes_what_the_folder_holds(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        old = live.edition.version
        give(store, "my card was stolen", "refund")
        give(store, "who are you", "card")
        program_folder(folder, without("card"))
        edition = await live.reload(by="bob")
        assert edition is live.edition
        assert edition.version == version_of(folder) != old
        assert edition.program.labels == ("parcel", "refund")
        assert (edition.corrections, edition.left_out) == (1, 1)  # "card" is no label any more
        assert rows(live)["my card was stolen"] == "refund"
        [event] = [event for event in store.events() if event.what == "reloaded"]
        assert (event.by, event.detail) == ("bob", f"{old} -> {edition.version}")

    asyncio.run(run())


def test_an_answer_that_the_template_cannot_write_is_left_out(folder: Path, store: FeedbackStore) -> None:
    """Else one correction would keep the program from ever being served again."""
    template = folder.parent / "lines.jinja"
    template.write_text(plain_template(end=";").source)
    program_folder(folder, translations(), template=str(template))

    async def run() -> None:
        give(store, "sun", "Sonne")
        give(store, "star", "Stern;Gestirn")
        live = await opened(folder, store)
        assert rows(live)["sun"] == "Sonne"
        assert (live.edition.corrections, live.edition.left_out) == (1, 1)

    asyncio.run(run())


def test_rollback_and_reload(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        made = [live.edition.version]
        for shots in (1, 2):
            program_folder(folder, shots=shots)
            made.append((await live.reload(by="bob")).version)
        give(store, "fifteen", "card")
        edition = await live.rollback(to=None, by="bob")
        assert edition.version == made[1]
        assert edition.program.settings.shots == 1
        assert rows(live)["fifteen"] == "card"
        assert (await live.rollback(to=None, by="bob")).version == made[0]
        with pytest.raises(NoSuchVersionError, match=f"no version of 'shop' older than {made[0]} was kept"):
            await live.rollback(to=None, by="bob")
        assert (await live.rollback(to=made[1], by="bob")).version == made[1]
        with pytest.raises(NoSuchVersionError, match=f"'012345678901' of 'shop' was not kept; kept are {made[2]}, "):
            await live.rollback(to="012345678901", by="bob")
        assert live.edition.version == made[1]

        again = await opened(folder, store)  # a restart
        assert again.edition.version == made[1]
        assert again.edition.note == f"version {made[1]} is served in place of {made[2]}, since a rollback"
        assert (await again.reload(by="bob")).version == made[2]
        assert (await opened(folder, store)).edition.version == made[2]

    asyncio.run(run())


def test_what_is_compiled_after_a_rollback_is_served_at_the_next_start(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        program_folder(folder, shots=1)
        await live.reload(by="bob")
        await live.rollback(to=None, by="bob")
        program_folder(folder, shots=2)
        assert (await opened(folder, store)).edition.program.settings.shots == 2

    asyncio.run(run())


def test_without_an_older_version_there_is_no_way_back(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        with pytest.raises(NoSuchVersionError, match="no version of 'shop' older"):
            await live.rollback(to=None, by="bob")

    asyncio.run(run())


def test_a_damaged_folder_leaves_the_old_version(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        old = live.edition
        pool = folder / "pool.jsonl"
        pool.write_bytes(pool.read_bytes() + b"\n")
        with pytest.raises(ArtifactError, match=r"pool\.jsonl was changed"):
            await live.reload(by="bob")
        assert live.edition is old
        with pytest.raises(ArtifactError, match=r"pool\.jsonl was changed"):
            await opened(folder, store)

    asyncio.run(run())


def test_a_version_too_large_for_the_engine_leaves_the_old_one(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        old = live.edition
        program_folder(folder, budget=701)
        with pytest.raises(ContextLengthError, match=r"of up to 701 tokens, and 'echo' at .* takes 700;"):
            await live.reload(by="bob")
        assert live.edition is old
        program_folder(folder, budget=700)
        await live.reload(by="bob")

    asyncio.run(run())


def test_a_program_compiled_in_the_middle_of_a_reload_is_not_taken_for_the_one_before(
    folder: Path, store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        program_folder(folder, shots=1)
        kept = version_of(folder)
        keep = Versions.keep

        def keep_and_compile(self: Versions, name: str, program: Path) -> str:
            version = keep(self, name, program)
            program_folder(folder, shots=2)
            return version

        monkeypatch.setattr(Versions, "keep", keep_and_compile)
        edition = await live.reload(by="bob")
        assert (edition.version, edition.program.settings.shots) == (kept, 1)

    asyncio.run(run())


@pytest.mark.parametrize("change", ["reload", "rollback"])
def test_a_change_that_cannot_be_recorded_is_not_made(
    change: str, folder: Path, store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ServingError("the disk is full")

    async def run() -> None:
        live = await opened(folder, store)
        program_folder(folder, shots=1)
        await live.reload(by="bob")
        program_folder(folder, shots=2)
        old = live.edition
        with monkeypatch.context() as patched:
            patched.setattr(store, "record", full)
            with pytest.raises(ServingError, match="the disk is full"):
                await (live.reload(by="bob") if change == "reload" else live.rollback(to=None, by="bob"))
        assert live.edition is old
        assert (await opened(folder, store)).edition.program.settings.shots == 2  # and nothing is pinned

    asyncio.run(run())


def test_changes_at_once_happen_one_after_another(folder: Path, store: FeedbackStore) -> None:
    async def run() -> None:
        live = await opened(folder, store)
        first = live.edition.version
        program_folder(folder, shots=1)
        changes = [live.reload(by="a"), live.reload(by="b"), live.rollback(to=first, by="c"), live.reload(by="d")]
        for number in range(5):
            give(store, f"text {number}", "card")
            changes.append(live.refresh())
        await asyncio.gather(*changes)
        assert live.edition.version == version_of(folder)
        assert live.edition.program.settings == load_program(folder).settings
        assert live.edition.corrections == 5
        told = [event.detail for event in store.events() if event.what in ("reloaded", "rolled back")]
        versions = [change.split(" -> ") for change in told]
        assert len(versions) == 4
        assert [before for before, _ in versions] == [first, *(after for _, after in versions[:-1])]

    asyncio.run(run())
