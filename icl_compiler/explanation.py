"""A prompt taken apart, for people: each shot, its score, its tokens, and why it was chosen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from icl_compiler.program import Program, Prompt


class Shot(NamedTuple):
    """One shot of a prompt, as shown to the user."""

    row: int
    text: str
    label: str
    score: float
    rank: int
    tokens: int
    why: str


class Explanation(NamedTuple):
    """A prompt, taken apart.

    Attributes:
        prompt: as the model reads it; several one after the other, with a line between them.
        tokens: of all prompts together.
        budget: most tokens of one prompt.
        prompts: how many there are.
    """

    query: str
    prompt: str
    tokens: int
    budget: int
    shots: list[Shot]
    notes: list[str]
    prompts: int = 1


def explanation(program: "Program", text: str) -> Explanation:
    """The prompt, or prompts, of `program` for `text`, taken apart."""
    [prompts] = program.prompt_sets([text])
    settings, count = program.settings, len(prompts)
    shots = [
        shot._replace(why=f"{shot.why}; in prompt {number} of {count}" if count > 1 else shot.why)
        for number, prompt in enumerate(prompts, start=1)
        for shot in _shots(program, text, prompt)
    ]
    notes = []
    if prompts[0].selection.itself:
        notes.append(f"{prompts[0].selection.itself} row of the pool was left out because it is the query itself")
    if too_long := sum(prompt.selection.too_long for prompt in prompts):
        notes.append(f"{too_long} candidates were skipped because they did not fit the budget any more")
    if program.reranker is not None:
        notes.append(
            f"the best {program.reranker.candidates} by {settings.retriever} were put into another order, by how "
            "much such shots helped the model on held-out rows"
        )
    if count > 1:
        notes.append(f"{count} prompts are asked for each text, and the label probabilities averaged")
    if program.calibration.method != "none":
        notes.append(f"probabilities are calibrated: {program.calibration.describe()}")
    if len(shots) < count * settings.shots:
        notes.append(f"{len(shots)} of at most {count * settings.shots} shots: no more fit, or there are no more")
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    return Explanation(text, written(program, prompts), tokens, settings.budget, shots, notes, count)


def written(program: "Program", prompts: "Sequence[Prompt]") -> str:
    """All prompts for one text, as the model reads them."""
    texts = [program.template.tokenizer.decode(prompt.tokens) for prompt in prompts]
    return "".join(
        f"\n\n----- prompt {number} of {len(texts)} -----\n{text}" if number > 1 else text
        for number, text in enumerate(texts, start=1)
    )


def short(text: str, width: int = 60) -> str:
    """`text`, cut where it is longer than `width` characters.

    >>> short("where is my parcel", 9)
    'where is…'
    """
    return text if len(text) <= width else text[: width - 1] + "…"


def _shots(program: "Program", text: str, prompt: "Prompt") -> list[Shot]:
    chosen, data = prompt.selection, program.pool.data
    by = f"{program.settings.retriever} ({program.retriever.score_meaning})"
    tokens = np.diff(program.pool.offsets)
    block = "one of the fixed block"
    if program.blocks is not None:
        block += f" {program.blocks.nearest([text])[0] + 1} of {len(program.blocks)}"
    return [
        Shot(
            row,
            data.texts[row],
            data.answers[row],
            score,
            rank,
            int(tokens[row]),
            f"rank {rank} of {len(data):,} rows by {by}" if rank else block,
        )
        for row, rank, score in zip(chosen.rows, chosen.ranks, chosen.scores, strict=True)
    ]
