"""Programs that differ from one in a few settings, made cheaply: a template is encoded once, an index is built once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from icl_compiler.compile import laid_out, new_retriever, with_reranker
from icl_compiler.data import Dataset
from icl_compiler.encoders import encoder_of
from icl_compiler.errors import BudgetError
from icl_compiler.layouts import Layout
from icl_compiler.program import SAME_FOR_ALL, Pool, Program, encode_pool
from icl_compiler.selection import Order
from icl_compiler.templates import EncodedTemplate, Template
from retrievers.retriever import Retriever
from retrievers.static import Static


class Variant(NamedTuple):
    """The settings that are searched; see `icl_compiler.program.Settings`.

    >>> str(Variant("bm25", 4, "best-last", 1, "classify")), str(Variant("uniform", 0, "best-first", 0, "classify"))
    ('bm25, 4 shots, best-last, 1 per label, classify', 'no shots, classify')
    """

    retriever: str
    shots: int
    order: Order
    per_label: int
    template: str
    instruction: str = ""
    """Name of one that stands in place of the template's own."""
    rerank: bool = False
    ensembles: int = 1
    rows: tuple[int, ...] = ()
    """Of a static set that was chosen."""
    layout: Layout | None = None
    """In place of the base's own."""

    def __str__(self) -> str:
        written = f"{self.template}{', instruction ' * bool(self.instruction)}{self.instruction}"
        if not self.shots:
            return f"no shots, {written}"
        labels = f", {self.per_label} per label" if self.per_label else ""
        found = f"{self.retriever}{' reranked' * self.rerank}"
        if self.rows:
            found += f" set {' '.join(map(str, self.rows))}"
        several = f"{self.ensembles} prompts of " * (self.ensembles > 1)
        written += f", {self.layout}" if self.layout else ""
        return f"{found}, {several}{self.shots} shot{'s' * (self.shots != 1)}, {self.order}{labels}, {written}"

    def found_by(self, retriever: str) -> "Variant":
        """The same with another retriever, and the order that goes with it."""
        return self._replace(retriever=retriever, order="best-first" if retriever in SAME_FOR_ALL else "best-last")

    def distinct(self) -> "Variant":
        """One for all that write the same prompts: without shots nothing depends on how they would be found."""
        return (
            self if self.shots else self.found_by("uniform")._replace(per_label=0, rerank=False, ensembles=1, rows=())
        )


class _Encoded(NamedTuple):
    """A template, the rows of the pool in it, and how many tokens each held-out row would have as a shot."""

    template: EncodedTemplate
    pool: Pool
    sizes: Int64[np.ndarray, " rows"]


class Variants:
    """The variants of `base`: all have its model, pool, budget, layout and seed.

    Attributes:
        held_out: the data whose rows are asked: the base's pool, or validation data.
        instructions: Jinja texts by their names.
        reranker: of the variants that have one; learned for one retriever.
    """

    def __init__(self, base: Program, held_out: Dataset | None = None) -> None:
        self.base = base
        self.held_out = base.pool.data if held_out is None else held_out
        self.instructions: dict[str, str] = {}
        self.reranker = base.reranker
        self._indexes: dict[str, Retriever] = {base.settings.retriever: base.retriever}
        self._programs: dict[Variant, Program] = {}
        self._templates = {(base.template.template.name, ""): self._encoded(base.template, base.pool)}

    @property
    def own(self) -> Variant:
        """That of the base."""
        settings, template = self.base.settings, self.base.template.template.name
        own = Variant(settings.retriever, settings.shots, settings.order, settings.per_label, template)
        return own._replace(rerank=self.reranker is not None, ensembles=settings.ensembles).distinct()

    def program(self, variant: Variant) -> Program:
        """The program.

        Raises:
            TemplateError: if the template does not suit the model.
            LabelError: if one of its label words is a prefix of another.
        """
        if variant not in self._programs:
            encoded, pool, _ = self._template(variant.template, variant.instruction)
            settings = replace(
                self.base.settings, retriever=variant.retriever, shots=variant.shots, order=variant.order,
                per_label=variant.per_label, ensembles=variant.ensembles,
                layout=variant.layout or self.base.settings.layout,
            )  # fmt: skip
            index = self.index(variant.retriever, variant.rows)
            program = replace(
                self.base, settings=settings, template=encoded, pool=pool, retriever=index,
                blocks=None, expected=None, reranker=None,
            )  # fmt: skip
            if variant.rerank and self.reranker is not None:
                program = with_reranker(program, self.reranker)
            self._programs[variant] = program if settings.layout == "per-query" else laid_out(program)
        return self._programs[variant]

    def most_shots(self) -> int:
        """How many shots of middling length fit the budget, beside such a query; at least 1."""
        sizes = np.diff(self.base.pool.offsets)
        middle = max(1, int(np.median(sizes)))
        room = self.base.settings.budget - len(self.base.template.head) - middle
        return min(max(1, room // middle), len(sizes))

    def require_askable(self, variant: Variant, rows: Int64[np.ndarray, " queries"]) -> None:
        """Nothing, if each of these held-out rows fits the budget as a query.

        Raises:
            BudgetError: if one does not.
        """
        program = self.program(variant)
        answer = max((len(word) for word in program.label_words), default=0)
        _, _, sizes = self._template(variant.template, variant.instruction)
        longest = int(sizes[rows].max()) + len(program.template.head) + answer
        budget = self.base.settings.budget
        if longest > budget:
            raise BudgetError(f"a prompt without shots has up to {longest} tokens, and the budget is {budget}")

    def askable(self, templates: Sequence[str]) -> Int64[np.ndarray, " rows"]:
        """Held-out rows that are no longer, in any of these templates, than what the budget holds without shots."""
        fits = np.ones(len(self.held_out), dtype=bool)
        for name in templates:
            encoded, _, sizes = self._template(name, "")
            answer = max((len(word) for word in encoded.label_words()), default=0)
            fits &= sizes + len(encoded.head) + answer <= self.base.settings.budget
        return np.flatnonzero(fits).astype(np.int64)

    def _encoded(self, template: EncodedTemplate, pool: Pool) -> "_Encoded":
        held_out = pool if self.held_out is pool.data else encode_pool(template, self.held_out)
        return _Encoded(template, pool, np.diff(held_out.offsets))

    def _template(self, name: str, instruction: str) -> "_Encoded":
        if (name, instruction) not in self._templates:
            base = self.base.template
            own = base.template if name == base.template.name else Template.from_name(name)
            text = own.with_instruction(instruction, self.instructions[instruction]) if instruction else own
            encoded = EncodedTemplate.build(text, base.tokenizer, base.labels)
            encoded.label_words()
            self._templates[name, instruction] = self._encoded(encoded, encode_pool(encoded, self.base.pool.data))
        return self._templates[name, instruction]

    def index(self, name: str, rows: Sequence[int] = ()) -> Retriever:
        """The retriever of this name over the pool; of `static` that with the set of these `rows`."""
        if rows or name not in self._indexes:
            settings, texts = self.base.settings, self.base.pool.data.texts
            index = new_retriever(name, encoder=encoder_of(self.base), seed=settings.seed)
            if rows and isinstance(index, Static):
                index.choose([texts[row] for row in rows])
            index.fit(texts)
            if rows:
                return index
            self._indexes[name] = index
        return self._indexes[name]
