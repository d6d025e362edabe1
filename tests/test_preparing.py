"""Prompts made in batches: each is its program's own, whoever waits beside it."""

import asyncio
from pathlib import Path

import pytest
from serving_toys import program_folder

from icl_compiler.artifact import load_program
from icl_compiler.errors import BudgetError
from icl_compiler.program import Program, Prompt
from serving.preparing import Preparer

TEXTS = [f"where is parcel {n}" for n in range(150)]


@pytest.fixture
def programs(tmp_path: Path) -> list[Program]:
    return [load_program(program_folder(tmp_path / str(shots), shots=shots)) for shots in (1, 3)]


async def gathered(asked: list[tuple[Program, str]]) -> list[Prompt | BaseException]:
    preparer = Preparer()
    try:
        return await asyncio.gather(*(preparer.prompts(*each) for each in asked), return_exceptions=True)
    finally:
        preparer.close()


def test_each_prompt_is_that_of_its_own_program_in_few_batches(
    programs: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [programs[n % 2].prompt_sets([text])[0] for n, text in enumerate(TEXTS)]
    batches: list[int] = []
    prompts = Program.prompt_sets
    monkeypatch.setattr(Program, "prompt_sets", lambda self, texts: batches.append(len(texts)) or prompts(self, texts))
    assert asyncio.run(gathered([(programs[n % 2], text) for n, text in enumerate(TEXTS)])) == wanted
    assert sum(batches) == 150
    assert max(batches) == 64
    assert len(batches) <= 6


def test_a_text_that_is_too_long_spoils_no_other(programs: list[Program]) -> None:
    texts = [*TEXTS[:5], "x" * 700, *TEXTS[5:10]]
    found = asyncio.run(gathered([(programs[1], text) for text in texts]))
    assert isinstance(found.pop(5), BudgetError)
    assert found == programs[1].prompt_sets(TEXTS[:10])


def test_whoever_leaves_is_not_missed(programs: list[Program]) -> None:
    async def run() -> Prompt:
        preparer = Preparer()
        gone = [asyncio.create_task(preparer.prompts(programs[0], text)) for text in ("a", "x" * 700, "b")]
        stays = asyncio.create_task(preparer.prompts(programs[0], TEXTS[0]))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        try:
            return await stays
        finally:
            preparer.close()

    assert asyncio.run(run()) == programs[0].prompt_sets(TEXTS[:1])[0]
