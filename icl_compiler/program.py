"""The compiled thing: it makes a prompt of tokens for any text.

A program holds the labels, the template, a pool of demonstrations with their tokens, a retriever over them,
and a budget. It needs the tokenizer of its model, never the model: prompts are made on any machine, whatever
engine then reads them. It is frozen: the same text gives the same prompt, in every process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import BudgetError
from icl_compiler.selection import Order, Selection, candidates, matches, pack
from icl_compiler.templates import EncodedTemplate
from retrievers.retriever import Retriever


@dataclass(frozen=True)
class Settings:
    """How a program was compiled.

    Attributes:
        model: the base model the prompts are for.
        encoder: the model of sentence embeddings.
        retriever: name in the table of retrievers.
        shots: most shots in a prompt.
        budget: most tokens in a prompt, its longest possible label word included.
        order: whether the best shot stands last or first.
        seed: of every random choice.
    """

    model: str
    encoder: str
    retriever: str
    shots: int
    budget: int
    order: Order
    seed: int


class Pool(NamedTuple):
    """The demonstrations, with the tokens of each as a shot, concatenated."""

    data: Dataset
    tokens: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " rows_and_end"]


class Prompt(NamedTuple):
    """A prompt and where it came from."""

    tokens: tuple[int, ...]
    selection: Selection


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
    """A prompt, taken apart."""

    query: str
    prompt: str
    tokens: int
    budget: int
    shots: list[Shot]
    notes: list[str]


@dataclass(frozen=True)
class Program:
    """Labels, template, pool, retriever and budget: texts in, prompts out.

    See `icl_compiler.compile.compile_program` for how one is made, `icl_compiler.artifact` for how it is
    kept.
    """

    settings: Settings
    task: Literal["classification", "generation"]
    template: EncodedTemplate
    pool: Pool
    retriever: Retriever
    without_itself: bool = True
    """Whether a row of the pool with the query's own text is left out: always where a program is measured."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of all probabilities; none for generation."""
        return self.template.labels

    @cached_property
    def label_words(self) -> list[list[int]]:
        """The tokens of each label word."""
        return self.template.label_words()

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """A prompt for each text.

        Raises:
            BudgetError: if the instruction, a text and its longest label word alone exceed the budget.
        """
        if not texts:
            return []
        k = candidates(self.settings.shots, len(self.pool.data))
        queries = self.template.queries(texts)
        hits = self.retriever.search(texts, k) if k else None
        head, answer = len(self.template.head), self._longest_answer
        prompts = []
        for i, (text, query) in enumerate(zip(texts, queries, strict=True)):
            room = self.settings.budget - head - len(query) - answer
            if room < 0:
                raise BudgetError(
                    f"the prompt for {_short(text)!r} has {head} tokens of instruction, {len(query)} of query "
                    f"and up to {answer} of answer, {head + len(query) + answer} in all, and the budget is "
                    f"{self.settings.budget}; compile with a larger --budget, or shorten the text"
                )
            if hits is None:
                selection = Selection([], [], [], 0, 0)
            else:
                ids = hits.ids[i]
                selection = pack(
                    ids,
                    hits.scores[i],
                    shot_tokens=self._shot_tokens,
                    is_query=self._is_itself(ids, text),
                    room=room,
                    shots=self.settings.shots,
                    order=self.settings.order,
                )
            shots = [token for row in selection.rows for token in self._shot(row)]
            prompts.append(Prompt((*self.template.head, *shots, *query), selection))
        return prompts

    def explain(self, text: str) -> Explanation:
        """The prompt for `text`, with each shot, its score, its tokens, and why it was chosen."""
        [prompt] = self.prompts([text])
        chosen = prompt.selection
        meaning = self.retriever.score_meaning
        rows = len(self.pool.data)
        shots = [
            Shot(
                row,
                self.pool.data.texts[row],
                self.pool.data.answers[row],
                score,
                rank,
                int(self._shot_tokens[row]),
                f"rank {rank} of {rows:,} rows by {self.settings.retriever} ({meaning})",
            )
            for row, rank, score in zip(chosen.rows, chosen.ranks, chosen.scores, strict=True)
        ]
        notes = []
        if chosen.itself:
            notes.append(f"{chosen.itself} row of the pool was left out because it is the query itself")
        if chosen.too_long:
            notes.append(f"{chosen.too_long} candidates were skipped because they did not fit the budget any more")
        if len(shots) < self.settings.shots:
            notes.append(f"{len(shots)} of at most {self.settings.shots} shots: no more fit, or there are no more")
        decoded = self.template.tokenizer.decode(prompt.tokens)
        return Explanation(text, decoded, len(prompt.tokens), self.settings.budget, shots, notes)

    @cached_property
    def _shot_tokens(self) -> Int64[np.ndarray, " rows"]:
        return np.diff(self.pool.offsets)

    def _is_itself(self, rows: Int64[np.ndarray, " rows"], text: str) -> Bool[np.ndarray, " rows"]:
        if not self.without_itself:
            return np.zeros(len(rows), dtype=bool)
        return matches([normalise_text(self.pool.data.texts[row]) for row in rows], normalise_text(text))

    @cached_property
    def _longest_answer(self) -> int:
        return max((len(word) for word in self.label_words), default=0)

    def _shot(self, row: int) -> list[int]:
        tokens: list[int] = self.pool.tokens[self.pool.offsets[row] : self.pool.offsets[row + 1]].tolist()
        return tokens


def encode_pool(template: EncodedTemplate, data: Dataset) -> Pool:
    """Encode every row of `data` as a shot: query, answer with its terminator, separator."""
    distinct = {answer: i for i, answer in enumerate(dict.fromkeys(data.answers))}
    words = template.answers(list(distinct))
    shots = [
        [*query, *words[distinct[answer]], *template.separator]
        for query, answer in zip(template.queries(data.texts), data.answers, strict=True)
    ]
    offsets = np.cumsum([0, *(len(shot) for shot in shots)], dtype=np.int64)
    tokens = np.array([token for shot in shots for token in shot], dtype=np.int32)
    return Pool(data, tokens, offsets)


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
