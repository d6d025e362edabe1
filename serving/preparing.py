"""Prompts for many queries at once: whoever waits while some are made is in the next batch.

One thread makes them, since encoding and tokenising are quickest in batches, and the loop must stay free.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from icl_compiler.program import Program, Prompt

_MOST = 64  # texts in a batch, so that nobody waits for a thousand others


class Preparer:
    """Makes prompts, in batches, away from the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._waiting: list[tuple[Program, str, asyncio.Future[list[Prompt]]]] = []
        self._working: asyncio.Task[None] | None = None

    async def prompts(self, program: Program, text: str) -> list[Prompt]:
        """The prompt of `program` for `text`, or all of them (`--ensembles`).

        Raises:
            ICLError: if there is none, because the text is too long.
        """
        future: asyncio.Future[list[Prompt]] = asyncio.get_running_loop().create_future()
        self._waiting.append((program, text, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            program = self._waiting[0][0]
            mine = [item for item in self._waiting if item[0] is program]
            batch, rest = mine[:_MOST], mine[_MOST:]
            self._waiting = [item for item in self._waiting if item[0] is not program] + rest
            wanted = [(text, future) for _, text, future in batch if not future.done()]
            made = await loop.run_in_executor(self._executor, _prompts, program, [text for text, _ in wanted])
            for (_, future), found in zip(wanted, made, strict=True):
                if future.done():
                    continue
                if isinstance(found, Exception):
                    future.set_exception(found)
                    future.exception()  # if whoever waited is gone, asyncio would log it, with the text
                else:
                    future.set_result(found)


def _prompts(program: Program, texts: list[str]) -> list[list[Prompt] | Exception]:
    """The prompts for each text, or why there are none; one bad text spoils no other."""
    try:
        return list(program.prompt_sets(texts))
    except Exception as error:  # a defect of ours, too, must reach those who wait
        if len(texts) == 1:
            return [error]
    return [found for text in texts for found in _prompts(program, [text])]
