"""Corrections: texts with their right answers, put into the pool of a program that stands already.

- A row of the same text (case and blanks aside) gets the right answer; every other text becomes a new row.
- Only what changes is computed. Where a score depends on one row alone (dense retrieval) the new rows get an index of
  their own beside the old one (`retrievers/joined.py`); every other retriever is fitted again.
- In a corrected program a query may retrieve itself: whoever asks again about a corrected text gets the correction.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from icl_compiler.compile import new_retriever, refitted
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.encoders import encoder_of
from icl_compiler.errors import LabelError
from icl_compiler.program import Pool, Program, encode_pool
from icl_compiler.registry import did_you_mean
from retrievers.dense import Dense
from retrievers.joined import Joined
from retrievers.retriever import Retriever

_NEIGHBOURS = 8
_NEARLY = 0.9
_COMPARED = 2000  # characters; comparing takes time in their square


Kind = Literal["duplicate", "near_duplicate", "contradiction"]


class Flag(NamedTuple):
    """A row that makes a correction doubtful, or needless."""

    kind: Kind
    text: str
    label: str
    similarity: float
    """Of the two texts, by characters, in [0, 1]."""


def amended(data: Dataset, corrections: Iterable[tuple[str, str]]) -> Dataset:
    """`data` with these texts and right answers; of one text, the last counts.

    >>> data = Dataset(("hi", "bye"), ("part", "part"), "classification", "example")
    >>> amended(data, [("Hi", "greet"), ("hello", "greet")]).answers
    ('greet', 'part', 'greet')
    """
    right = {normalise_text(text): (text, answer) for text, answer in corrections}
    keys = [normalise_text(text) for text in data.texts]
    answers = [right[key][1] if key in right else old for key, old in zip(keys, data.answers, strict=True)]
    known = set(keys)
    new = [pair for key, pair in right.items() if key not in known]
    return replace(
        data,
        texts=(*data.texts, *(text for text, _ in new)),
        answers=(*answers, *(answer for _, answer in new)),
    )


class Corrector:
    """A program, and what it becomes with corrections."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def corrected(self, corrections: Iterable[tuple[str, str]]) -> Program:
        """The program with these texts and right answers in its pool; of one text, the last counts.

        Raises:
            LabelError: if an answer is none of the program's labels.
            TemplateError: if an answer cannot be written, because it holds the terminator.
        """
        program = replace(self.program, without_itself=False)
        answers = {normalise_text(text): (text, answer) for text, answer in corrections}
        for _, answer in answers.values():
            require_label(program, answer)
        changed = {row: answer for key, (_, answer) in answers.items() for row in self._rows.get(key, ())}
        new = [pair for key, pair in answers.items() if key not in self._rows]
        if changed:
            program = replace(program, pool=_with_answers(program, changed))
        return _with_rows(program, new) if new else program

    def flags(self, now: Program, text: str, answer: str) -> list[Flag]:
        """What in the pool of `now`, this program with corrections, is (nearly) the same text.

        A row of nearly the same text with another answer is a contradiction.
        """
        key = normalise_text(text)
        data = now.pool.data
        neighbours = now.retriever.search([text], min(_NEIGHBOURS, len(data))).ids[0].tolist() if len(data) else []
        flags = []
        for row in dict.fromkeys([*self._rows.get(key, ()), *neighbours]):
            other = normalise_text(data.texts[row])
            similarity = _similarity(key, other)
            if similarity < _NEARLY:
                continue
            same: Kind = "duplicate" if key == other else "near_duplicate"
            kind = same if data.answers[row] == answer else "contradiction"
            flags.append(Flag(kind, data.texts[row], data.answers[row], similarity))
        return sorted(flags, key=lambda flag: -flag.similarity)

    @cached_property
    def _rows(self) -> Mapping[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, text in enumerate(self.program.pool.data.texts):
            rows.setdefault(normalise_text(text), []).append(row)
        return rows


def require_label(program: Program, answer: str) -> None:
    """Nothing, if `answer` may be the answer of `program`.

    Raises:
        LabelError: if it is none of its labels.
        TemplateError: if it holds the terminator of the template.
    """
    if program.task == "classification":
        if answer not in program.labels:
            shown = f"{answer[:60]!r} is no label of this program. "
            raise LabelError(shown + did_you_mean(answer[:200], program.labels))
    else:
        program.template.answers([answer])


def _similarity(first: str, second: str) -> float:
    if first == second:
        return 1.0
    matcher = SequenceMatcher(None, first[:_COMPARED], second[:_COMPARED], autojunk=False)
    if min(matcher.real_quick_ratio(), matcher.quick_ratio()) < _NEARLY:  # upper bounds, which cost less
        return 0.0
    return matcher.ratio()


def _with_answers(program: Program, changed: Mapping[int, str]) -> Pool:
    """The pool with other answers in some rows, which only these rows' tokens feel."""
    data, tokens, offsets = program.pool
    rows = sorted(changed)
    new = encode_pool(program.template, replace(data.take(rows), answers=tuple(changed[row] for row in rows)))
    answers = list(data.answers)
    pieces, end = [], 0
    lengths = np.diff(offsets)
    for place, row in enumerate(rows):
        answers[row] = changed[row]
        shot = new.tokens[new.offsets[place] : new.offsets[place + 1]]
        pieces += [tokens[end : offsets[row]], shot]
        lengths[row] = len(shot)
        end = offsets[row + 1]
    pieces.append(tokens[end:])
    whole = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Pool(replace(data, answers=tuple(answers)), np.concatenate(pieces), whole)


def _with_rows(program: Program, new: Sequence[tuple[str, str]]) -> Program:
    data, tokens, offsets = program.pool
    texts, answers = tuple(text for text, _ in new), tuple(answer for _, answer in new)
    more = encode_pool(program.template, replace(data, texts=texts, answers=answers))
    whole = replace(data, texts=data.texts + texts, answers=data.answers + answers)
    pool = Pool(whole, np.concatenate([tokens, more.tokens]), np.concatenate([offsets, offsets[-1] + more.offsets[1:]]))
    settings = program.settings
    voters = program.voters
    found: Retriever
    if isinstance(program.retriever, Dense):
        retriever = new_retriever(settings.retriever, encoder=encoder_of(program), seed=settings.seed)
        retriever.fit(texts)
        found = Joined(program.retriever, retriever, rows=len(data))
    else:
        found = refitted(program, whole.texts)
    if voters is not None:
        more_voters = new_retriever("dense", encoder=encoder_of(program), seed=settings.seed)
        more_voters.fit(texts)
        voters = Joined(voters, more_voters, rows=len(data))
    return replace(program, pool=pool, retriever=found, voters=voters)
