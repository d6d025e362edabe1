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
from jaxtyping import Bool, Float, Float32, Int32, Int64

from icl_compiler.backends.backend import Usage
from icl_compiler.calibration.law import NO_CALIBRATION, Calibration, Evidence, Law
from icl_compiler.calibration.votes import Voters, voters_of
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import BudgetError, EnsembleError
from icl_compiler.explanation import Explanation, explanation, short
from icl_compiler.layouts import Blocks, Expected, Layout
from icl_compiler.reading import Reading
from icl_compiler.reranker import Reranker, features
from icl_compiler.selection import (
    Order,
    Selection,
    arranged,
    candidates,
    dealt_out,
    in_rounds,
    joined,
    pack,
    random_keys,
)
from icl_compiler.templates import EncodedTemplate
from retrievers.bm25 import BM25
from retrievers.dense import Dense
from retrievers.joined import Joined
from retrievers.retriever import Hits, Retriever

SAME_FOR_ALL = ("uniform", "votek", "static")
"""Retrievers that find the same rows for every text."""
_SPARE = 8  # rows more than vote, of which some may be the query itself


@dataclass(frozen=True)
class Settings:
    """How a program was compiled.

    Attributes:
        model: the base model the prompts are for.
        encoder: the model of sentence embeddings; with `+base` the base model's reading stands beside it.
        retriever: name in the table of retrievers.
        shots: most shots in a prompt.
        budget: most tokens in a prompt, its longest possible label word included.
        order: of the shots in a prompt.
        seed: of every random choice.
        per_label: candidates are taken in rounds of so many of each label; 0 where labels do not matter.
        layout: whether prompts begin with a fixed block of shots (see `layouts`).
        clusters: how many blocks were asked for.
        cache_block: tokens of a block of the engine's prefix cache.
        block_share: share of the shots, and of the tokens for them, that the fixed block takes in `mixed`.
        ensembles: prompts for each text, each with other shots, whose laws are averaged.
    """

    model: str
    encoder: str
    retriever: str
    shots: int
    budget: int
    order: Order
    seed: int
    per_label: int = 0
    layout: Layout = "per-query"
    clusters: int = 0
    cache_block: int = 16
    block_share: float = 0.5
    ensembles: int = 1


class Pool(NamedTuple):
    """The demonstrations, with the tokens of each as a shot, concatenated."""

    data: Dataset
    tokens: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " rows_and_end"]


class Prompt(NamedTuple):
    """A prompt and where it came from."""

    tokens: tuple[int, ...]
    selection: Selection
    voters: Voters | None = None
    """Of this query, where the program's calibration counts votes."""


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
    blocks: Blocks | None = None
    expected: Expected | None = None
    without_itself: bool = True
    """Whether a row of the pool with the query's own text is left out: always where a program is measured."""
    calibration: Calibration = NO_CALIBRATION
    """From the model's log-probabilities of the labels to the answer's law."""
    voters: Retriever | None = None
    """A dense index of the pool, where nearness counts (votes, reranking) and `retriever` is another one."""
    reranker: Reranker | None = None
    """Puts the retriever's candidates into another order; `dense` is there then."""
    reading: Reading | None = None
    """What the base model makes of a text, where that is a part of the encoder."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of all probabilities; none for generation."""
        return self.template.labels

    @cached_property
    def label_words(self) -> list[list[int]]:
        """The tokens of each label word."""
        return self.template.label_words()

    def reading_cost(self, texts: Sequence[str]) -> Usage:
        """What the base model reads before the prompts of these texts are made; nothing where it is no encoder."""
        if self.reading is None:
            return Usage(0, 0, 0)
        return Usage(0, self.reading.tokens(texts), 0)

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """The one prompt for each text.

        Raises:
            BudgetError: if the instruction, a text and its longest label word alone exceed the budget.
            EnsembleError: if a text has several prompts.
        """
        if self.settings.ensembles > 1:
            raise EnsembleError(
                f"this program asks {self.settings.ensembles} prompts for each text and averages the answers "
                "(--ensembles), and here a text can have one; compile it without"
            )
        return [prompt for [prompt] in self.prompt_sets(texts)]

    def prompt_sets(self, texts: Sequence[str]) -> list[list[Prompt]]:
        """All prompts for each text: one, or as many as `ensembles` says, among which the candidates are dealt out.

        Raises:
            BudgetError: if the instruction, a text and its longest label word alone exceed the budget.
        """
        if not texts:
            return []
        count = self.settings.ensembles
        queries = self.template.queries(texts)
        room = self._room(texts, queries)
        fixed = self._fixed(texts, room)
        room -= [len(begin.tokens) for begin in fixed]
        hits, near = self._search(texts)
        found = _Found(*self._ranked(texts, hits))
        itself = self._is_itself(found.ids, texts)
        barred = itself | self._stands_in(found.ids, fixed) if self.blocks else itself
        dealt = np.zeros(barred.shape, dtype=np.int64)
        if count > 1:
            kinds = self._label_of_row[found.ids] if self.settings.per_label else np.zeros_like(found.ids)
            dealt = dealt_out(kinds, barred, count)
        voters = self._voters(texts, near)
        each = [
            self._written(texts, queries, fixed, found, itself, barred | (dealt != number), room, voters)
            for number in range(count)
        ]
        return [list(prompts) for prompts in zip(*each, strict=True)]

    def _written(
        self,
        texts: Sequence[str],
        queries: Sequence[Sequence[int]],
        fixed: Sequence["_Beginning"],
        found: "_Found",
        itself: Bool[np.ndarray, "texts candidates"],
        barred: Bool[np.ndarray, "texts candidates"],
        room: Int64[np.ndarray, " texts"],
        voters: Voters | None,
    ) -> list[Prompt]:
        """A prompt for each text, of the candidates that are not `barred`."""
        ids, scores, ranks = found
        shots = np.array([self.settings.shots - len(begin.rows) for begin in fixed], dtype=np.int64)
        packed = pack(self._shot_tokens[ids], barred, room=room, shots=shots)
        query, place = packed.taken.nonzero()
        rows = ids[query, place]
        order = arranged(query, place, self.settings.order, **self._keys(texts, rows, query))
        rows, place = rows[order], place[order]
        ends = np.cumsum(packed.taken.sum(axis=1))
        token_ends = np.append(0, np.cumsum(self._shot_tokens[rows]))[np.append(0, ends)].tolist()
        tokens = joined(self.pool.tokens, self.pool.offsets, rows).tolist()
        rows_of, ranks_of, scores_of = (part.tolist() for part in (rows, ranks[query, place], scores[query, place]))
        left_out = (packed.passed & itself).sum(axis=1).tolist()
        too_long = (packed.passed & ~barred).sum(axis=1).tolist()
        begins = [0, *ends.tolist()]
        prompts = []
        for i, (words, begin) in enumerate(zip(queries, fixed, strict=True)):
            part = slice(begins[i], begins[i + 1])
            none = [0] * len(begin.rows)
            selection = Selection(
                [*begin.rows, *rows_of[part]],
                [*none, *ranks_of[part]],
                [*map(float, none), *scores_of[part]],
                too_long[i] + begin.too_long,
                left_out[i] + begin.itself,
                len(none),
            )
            shown = tokens[token_ends[i] : token_ends[i + 1]]
            written = (*self.template.head, *begin.tokens, *shown, *words)
            prompts.append(Prompt(written, selection, voters and voters.take(np.array([i]))))
        return prompts

    def around(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """The tokens of `prompt`, with `text` for its query."""
        [query] = self.template.queries([text])
        shots = joined(self.pool.tokens, self.pool.offsets, np.array(prompt.selection.rows, dtype=np.int64))
        return (*self.template.head, *shots.tolist(), *query)

    def law(
        self,
        prompts: Sequence[Prompt],
        logprobs: Float[np.ndarray, "prompts labels"],
        upper: Float[np.ndarray, "prompts labels"] | None = None,
    ) -> Law:
        """The calibrated law of the answers to `prompts`, from what the model says of the labels.

        Args:
            logprobs: of the label words, in nats; lower bounds where `upper` is given.
        """
        given = [prompt.voters for prompt in prompts if prompt.voters is not None]
        return self.calibration.law(Evidence(logprobs, upper, Voters.joined(given) if given else None))

    def explain(self, text: str) -> Explanation:
        """The prompt for `text`, with each shot, its score, its tokens, and why it was chosen."""
        return explanation(self, text)

    @property
    def dense(self) -> Dense | Joined | None:
        """What finds the rows that are near in meaning, if the program has such an index."""
        indices = (index for index in (self.retriever, self.voters) if isinstance(index, Dense | Joined))
        return next(indices, None)

    def found(self, texts: Sequence[str], k: int) -> Hits:
        """What the retriever finds for each text, before anything else is done with it."""
        return self.retriever.search([""] if self.settings.retriever in SAME_FOR_ALL else texts, k)

    def seen(
        self, texts: Sequence[str], hits: Hits
    ) -> tuple[Float[np.ndarray, "texts candidates seen"], Bool[np.ndarray, "texts candidates"]]:
        """What a reranker sees of the candidates of each text, and which of them are the text itself.

        Raises:
            ValueError: if the program has no dense index.
        """
        if self.dense is None:
            raise ValueError("a reranker sees cosines, and the program has no dense index")
        ids, scores = (np.broadcast_to(part, (len(texts), part.shape[1])) for part in hits)
        itself = self._same(ids, texts)
        told = features(
            scores=scores,
            cosines=self.dense.cosines(texts, ids),
            word_scores=self._words.scores_of(texts, ids),
            labels=self._label_of_row[ids] if self.labels else None,
            tokens=self._shot_tokens[ids],
            barred=itself,
        )
        return told, itself

    def _search(self, texts: Sequence[str]) -> tuple[Hits, Hits]:
        """The candidates for shots as the retriever ranks them, and for votes; of one search where that gives both."""
        k, voters = self._candidates, self.calibration.neighbours
        voters += _SPARE if voters else 0
        near = hits = Hits(np.empty((len(texts), 0), dtype=np.int64), np.empty((len(texts), 0), dtype=np.float32))
        if voters and self.dense is self.retriever:
            both = self.retriever.search(texts, max(k, voters))
            return both.best(k), both.best(voters)
        if voters and self.dense is not None:
            near = self.dense.search(texts, voters)
        if k:
            same = self.settings.retriever in SAME_FOR_ALL
            hits = self.found(texts, len(self.pool.data) if same and self.settings.per_label else k)
        return hits, near

    @cached_property
    def _candidates(self) -> int:
        """How many rows are found for the shots of a text."""
        rows = len(self.pool.data)
        k = candidates(self.settings.ensembles * self._shots_per_query, rows, per_label=self.settings.per_label)
        if k and self.reranker is not None:
            k = min(rows, max(k, self.reranker.candidates))
        return min(rows, k + int(self.blocks.sizes.max())) if k and self.blocks is not None else k

    def _voters(self, texts: Sequence[str], near: Hits) -> Voters | None:
        """Who may vote on each text: the rows near in meaning, or the anchors of the calibration."""
        if self.calibration.vote is None:
            return None
        if self.calibration.anchors is not None:
            anchors = np.broadcast_to(self.calibration.anchors.rows, (len(texts), len(self.calibration.anchors.rows)))
            near = Hits(anchors, np.zeros(anchors.shape, dtype=np.float32))
        return voters_of(near, self._label_of_row, self._is_itself(near.ids, texts))

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
                f"the prompt for {short(texts[first])!r} has {head} tokens of instruction, {lengths[first]} of query "
                f"and up to {answer} of answer, {budget - room[first]} in all, and the budget is "
                f"{budget}; compile with a larger --budget, or shorten the text"
            )
        return room

    def _fixed(self, texts: Sequence[str], room: Int64[np.ndarray, " texts"]) -> list["_Beginning"]:
        """The block that the prompt of each text begins with: without the text itself, and what fits of it."""
        if self.blocks is None:
            return [_Beginning([], [], 0, 0)] * len(texts)
        block_of = self.blocks.nearest(texts)
        fixed: dict[int, _Beginning] = {}
        for block in np.unique(block_of).tolist():
            rows, mine = self.blocks[block], np.flatnonzero(block_of == block)
            itself = self._is_itself(np.broadcast_to(rows, (len(mine), len(rows))), [texts[i] for i in mine])
            kinds: dict[tuple[bytes, int], _Beginning] = {}
            for i, same in zip(mine.tolist(), itself, strict=True):
                kept = rows[~same]
                fits = int(np.searchsorted(np.cumsum(self._shot_tokens[kept]), room[i], side="right"))
                key = same.tobytes(), fits
                if key not in kinds:
                    taken = kept[:fits]
                    tokens = joined(self.pool.tokens, self.pool.offsets, taken).tolist()
                    kinds[key] = _Beginning(taken.tolist(), tokens, len(kept) - fits, int(same.sum()))
                fixed[i] = kinds[key]
        return [fixed[i] for i in range(len(texts))]

    def _stands_in(
        self, rows: Int64[np.ndarray, "texts candidates"], fixed: Sequence["_Beginning"]
    ) -> Bool[np.ndarray, "texts candidates"]:
        """Which of these rows stand in the block of their text already."""
        return np.array([np.isin(of_text, begin.rows) for of_text, begin in zip(rows, fixed, strict=True)], dtype=bool)

    @cached_property
    def _shots_per_query(self) -> int:
        """How many shots are at most chosen for a text, beside those of its block."""
        if self.blocks is None:
            return self.settings.shots
        if self.settings.layout != "mixed" or not len(self.pool.data):
            return 0
        tokens = [int(self._shot_tokens[self.blocks[block]].sum()) for block in range(len(self.blocks))]
        room = self.settings.budget - len(self.template.head) - self._longest_answer - min(tokens)
        most = room // int(self._shot_tokens.min())
        return max(0, min(self.settings.shots - int(self.blocks.sizes.min()), most))

    @cached_property
    def _words(self) -> BM25:
        """The words of the pool; indexed when a reranker first wants them."""
        if isinstance(self.retriever, BM25):
            return self.retriever
        index = BM25()
        index.fit(self.pool.data.texts)
        return index

    def _ranked(
        self, texts: Sequence[str], hits: Hits
    ) -> tuple[
        Int64[np.ndarray, "texts candidates"],
        Float32[np.ndarray, "texts candidates"],
        Int64[np.ndarray, "texts candidates"],
    ]:
        """Candidates for each text in the order in which they are tried, their scores, and the retriever's ranks."""
        ids, scores = hits
        ranks = np.broadcast_to(np.arange(1, ids.shape[1] + 1), ids.shape)
        if self.reranker is not None and ids.shape[1]:
            seen, itself = self.seen(texts, hits)
            order = self.reranker.order(np.broadcast_to(ids, itself.shape), seen, itself)
            ids, scores, ranks = (
                np.take_along_axis(np.broadcast_to(each, order.shape), order, axis=1) for each in (ids, scores, ranks)
            )
        per_label = self.settings.per_label
        if per_label and ids.shape[1] > self._candidates:  # the whole pool, the same for all texts
            order = in_rounds(self._label_of_row[ids], per_label)[:, : self._candidates]
            ids, scores, ranks = (np.take_along_axis(each, order, axis=1) for each in (ids, scores, ranks))
        shape = len(texts), ids.shape[1]
        ids, scores, ranks = (np.broadcast_to(each, shape) for each in (ids, scores, ranks))
        if per_label:
            order = in_rounds(self._label_of_row[ids], per_label, self._is_itself(ids, texts))
            ids, scores, ranks = (np.take_along_axis(each, order, axis=1) for each in (ids, scores, ranks))
        return ids, scores, ranks

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
        """Which of these rows are the text they are for, and must not be shown."""
        return self._same(rows, texts) if self.without_itself else np.zeros(rows.shape, dtype=bool)

    def _same(
        self, rows: Int64[np.ndarray, "texts candidates"], texts: Sequence[str]
    ) -> Bool[np.ndarray, "texts candidates"]:
        """Which of these rows have the text they are for."""
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


class _Found(NamedTuple):
    """Candidates in the order in which they are tried, their scores, and the retriever's ranks."""

    ids: Int64[np.ndarray, "texts candidates"]
    scores: Float32[np.ndarray, "texts candidates"]
    ranks: Int64[np.ndarray, "texts candidates"]


class _Beginning(NamedTuple):
    """What stands of a fixed block in one prompt."""

    rows: list[int]
    tokens: list[int]
    too_long: int
    itself: int


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
