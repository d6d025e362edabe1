"""The compiled thing: it makes a prompt of tokens for any text.

A program holds the labels, the template, a pool of demonstrations with their tokens, a retriever over them,
and a budget. It needs the tokenizer of its model, never the model: prompts are made on any machine, whatever
engine then reads them. It is frozen: the same text gives the same prompt, in every process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import BudgetError
from icl_compiler.selection import Order, Selection, arranged, candidates, in_rounds, joined, pack, random_keys
from icl_compiler.templates import EncodedTemplate
from retrievers.retriever import Retriever

SAME_FOR_ALL = ("uniform", "votek")
"""Retrievers that find the same rows for every text."""


@dataclass(frozen=True)
class Settings:
    """How a program was compiled.

    Attributes:
        model: the base model the prompts are for.
        encoder: the model of sentence embeddings.
        retriever: name in the table of retrievers.
        shots: most shots in a prompt.
        budget: most tokens in a prompt, its longest possible label word included.
        order: of the shots in a prompt.
        seed: of every random choice.
        per_label: candidates are taken in rounds of so many of each label; 0 where labels do not matter.
    """

    model: str
    encoder: str
    retriever: str
    shots: int
    budget: int
    order: Order
    seed: int
    per_label: int = 0


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
        queries = self.template.queries(texts)
        room = self._room(texts, queries)
        ids, scores, ranks = self._ranked(texts)
        itself = self._is_itself(ids, texts)
        shots = np.full(len(texts), self.settings.shots, dtype=np.int64)
        packed = pack(self._shot_tokens[ids], itself, room=room, shots=shots)
        query, place = packed.taken.nonzero()
        rows = ids[query, place]
        order = arranged(query, place, self.settings.order, **self._keys(texts, rows, query))
        rows, place = rows[order], place[order]
        ends = np.cumsum(packed.taken.sum(axis=1))
        token_ends = np.append(0, np.cumsum(self._shot_tokens[rows]))[np.append(0, ends)].tolist()
        tokens = joined(self.pool.tokens, self.pool.offsets, rows).tolist()
        rows_of, ranks_of, scores_of = (part.tolist() for part in (rows, ranks[query, place], scores[query, place]))
        left_out = (packed.passed & itself).sum(axis=1).tolist()
        too_long = (packed.passed & ~itself).sum(axis=1).tolist()
        begins = [0, *ends.tolist()]
        prompts = []
        for i, words in enumerate(queries):
            part = slice(begins[i], begins[i + 1])
            selection = Selection(rows_of[part], ranks_of[part], scores_of[part], too_long[i], left_out[i])
            shown = tokens[token_ends[i] : token_ends[i + 1]]
            prompts.append(Prompt((*self.template.head, *shown, *words), selection))
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

    def _room(self, texts: Sequence[str], queries: Sequence[Sequence[int]]) -> Int64[np.ndarray, " texts"]:
        """The tokens left for shots beside each of `queries`."""
        head, answer, budget = len(self.template.head), self._longest_answer, self.settings.budget
        lengths = np.array([len(query) for query in queries], dtype=np.int64)
        room: Int64[np.ndarray, " texts"] = budget - head - answer - lengths
        if (room < 0).any():
            first = int((room < 0).argmax())
            raise BudgetError(
                f"the prompt for {_short(texts[first])!r} has {head} tokens of instruction, {lengths[first]} of query "
                f"and up to {answer} of answer, {budget - room[first]} in all, and the budget is "
                f"{budget}; compile with a larger --budget, or shorten the text"
            )
        return room

    def _ranked(
        self, texts: Sequence[str]
    ) -> tuple[
        Int64[np.ndarray, "texts candidates"],
        Float32[np.ndarray, "texts candidates"],
        Int64[np.ndarray, "texts candidates"],
    ]:
        """Candidates for each text in the order in which they are tried, their scores, and the retriever's ranks."""
        rows, per_label = len(self.pool.data), self.settings.per_label
        k = candidates(self.settings.shots, rows, per_label=per_label)
        if not k:
            nothing = np.empty((len(texts), 0), dtype=np.int64)
            return nothing, nothing.astype(np.float32), nothing
        same = self.settings.retriever in SAME_FOR_ALL
        ids, scores = self.retriever.search([""] if same else texts, rows if same and per_label else k)
        ranks = np.broadcast_to(np.arange(1, ids.shape[1] + 1), ids.shape)
        if per_label:
            order = in_rounds(self._label_of_row[ids], per_label)[:, :k]
            ids, scores, ranks = (np.take_along_axis(each, order, axis=1) for each in (ids, scores, ranks))
        shape = len(texts), ids.shape[1]
        return np.broadcast_to(ids, shape), np.broadcast_to(scores, shape), np.broadcast_to(ranks, shape)

    def _keys(
        self, texts: Sequence[str], rows: Int64[np.ndarray, " shots"], queries: Int64[np.ndarray, " shots"]
    ) -> dict[str, Any]:
        """What `arranged` wants to know of the shots, besides their places."""
        if self.settings.order == "random":
            return {"keys": random_keys(texts, rows, queries, seed=self.settings.seed)}
        return {"labels": self._label_of_row[rows]} if self.settings.order == "by-label" else {}

    @cached_property
    def _label_of_row(self) -> Int64[np.ndarray, " rows"]:
        number = {label: i for i, label in enumerate(self.labels)}
        return np.array([number[answer] for answer in self.pool.data.answers], dtype=np.int64)

    def _is_itself(
        self, rows: Int64[np.ndarray, "texts candidates"], texts: Sequence[str]
    ) -> Bool[np.ndarray, "texts candidates"]:
        """Which of these rows are the text they are for."""
        if not self.without_itself:
            return np.zeros(rows.shape, dtype=bool)
        hashes, known = self._hashes
        distinct = np.unique(rows)
        for row in distinct[~known[distinct]].tolist():
            hashes[row] = hash(normalise_text(self.pool.data.texts[row]))
            known[row] = True
        asked = [normalise_text(text) for text in texts]
        same: Bool[np.ndarray, "texts candidates"] = hashes[rows] == np.array([hash(text) for text in asked])[:, None]
        for i, j in zip(*(found.tolist() for found in same.nonzero()), strict=True):
            same[i, j] = normalise_text(self.pool.data.texts[rows[i, j]]) == asked[i]
        return same

    @cached_property
    def _hashes(self) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """A hash of the text of each row, for those that were a candidate before; where hashes agree, texts decide."""
        return np.zeros(len(self.pool.data), dtype=np.int64), np.zeros(len(self.pool.data), dtype=bool)

    @cached_property
    def _longest_answer(self) -> int:
        return max((len(word) for word in self.label_words), default=0)


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
