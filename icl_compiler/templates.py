"""A prompt template: one Jinja file that says how the instruction, a query and an answer are written.

- A template is a file of `prompts/` (by name) or any file of the user's (by path). It defines the macros
  `instruction(labels)`, `query(text)` and `answer(label)`, and the variables `chat` and, if plain,
  `terminator`.
- Jinja runs in its sandbox: a template inside a downloaded program can format text and nothing else, and comes to
  an end. Texts are arguments of macros, never template source.
- `Template` knows text. `EncodedTemplate` knows tokens: each part is encoded once, and a prompt is a
  concatenation of parts, `head + (query + label word + separator) x shots + query`.
- A label word ends in a terminator (a newline, or the model's end of turn), so that no label word is a
  prefix of another.
- In a chat template the parts between the contents are found by writing a conversation of marked
  contents and cutting it at the marks; nothing about any one model's markup is known here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icl_compiler.errors import DataError, LabelError, TemplateError
from icl_compiler.tokenizer import Tokenizer

_MACROS = ("instruction", "query", "answer")
_MOST_STEPS = 100_000


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps foreign code out, with an end: rounds of loops and calls are counted."""

    intercepted_binops = frozenset({"**"})

    def __init__(self) -> None:
        super().__init__(keep_trailing_newline=True, trim_blocks=True, autoescape=False)
        self.filters["counted"] = self._counted
        self.steps = 0

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return super()._generate(source, *args, **kwargs)

    def _counted(self, rounds: Iterable[Any]) -> Iterator[Any]:
        for item in rounds:
            self._step()
            yield item

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        raise SecurityError(f"a template must not use {operator}")

    def _step(self) -> None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise SecurityError(f"it takes more than {_MOST_STEPS:,} steps; a template must come to an end")


_MARKS = tuple(f"icl-mark-{i}-" for i in range(5))


@dataclass(frozen=True)
class Template:
    """The text of a template file, with the name it goes by.

    >>> template = Template.from_name("classify")
    >>> print(template.query("Great  film!") + template.answer("positive"))
    Text: Great film!
    Label: positive
    """

    name: str
    source: str

    @classmethod
    def from_name(cls, name: str) -> "Template":
        """The template of `prompts/` called `name`, or the file at the path `name`.

        Raises:
            TemplateError: if there is neither, or if the file lacks a part.
        """
        bundled = {
            entry.name.removesuffix(".jinja"): entry
            for entry in files("prompts").iterdir()
            if entry.name.endswith(".jinja")
        }
        if name in bundled:
            return cls(name, bundled[name].read_text(encoding="utf-8"))._checked()
        path = Path(name)
        if not path.is_file():
            raise TemplateError(
                f"there is no template {name!r}: expected a file, or one of {', '.join(sorted(bundled))}"
            )
        try:
            return cls(path.stem, path.read_text(encoding="utf-8"))._checked()
        except UnicodeDecodeError as error:
            raise TemplateError(f"{name}: not UTF-8 ({error}); save the template as UTF-8") from error

    def with_instruction(self, name: str, text: str) -> "Template":
        """The template with another instruction.

        Args:
            name: by which the instruction goes.
            text: of the instruction, in Jinja; it may use `labels`. Blanks around it are cut.

        Raises:
            TemplateError: if `text` does not render.

        >>> template = Template.from_name("classify").with_instruction("short", "One of {{ labels | join(' or ') }}.")
        >>> template.name, template.instruction(["yes", "no"])
        ('classify, instruction short', 'One of yes or no.\\n')
        """
        end = "" if self.chat else '{{ "\\n" }}'  # the tokens of an instruction must not merge with the first query's
        macro = f"{{% macro instruction(labels) -%}}\n{text.strip()}{end}{{% endmacro %}}"
        return Template(f"{self.name}, instruction {name}", f"{self.source}\n{macro}\n")._checked()

    @property
    def chat(self) -> bool:
        """Whether prompts are conversations."""
        return bool(getattr(self._module, "chat", False))

    @property
    def terminator(self) -> str:
        """What ends a label word in a plain template."""
        return str(getattr(self._module, "terminator", ""))

    def instruction(self, labels: Sequence[str]) -> str:
        """The text before all shots; `labels` are those of the task, none for generation."""
        return self._write("instruction", list(labels))

    def query(self, text: str) -> str:
        """The text of a query, up to where the answer begins."""
        return self._write("query", text)

    def answer(self, label: str) -> str:
        """The text of an answer, without its terminator."""
        return self._write("answer", label)

    def _checked(self) -> "Template":
        for macro in _MACROS:
            if not callable(getattr(self._module, macro, None)):
                raise TemplateError(
                    f"template {self.name!r} defines no macro {macro!r}; expected the macros {', '.join(_MACROS)}"
                )
        if not self.chat and not self.terminator:
            raise TemplateError(
                f'template {self.name!r} has no terminator; add a line like {{% set terminator = "\\n" %}}, '
                "so that no label word is a prefix of another"
            )
        if not self.chat and not self.query("text").strip():
            raise TemplateError(f"template {self.name!r} writes an empty query")
        if self.query("one text") == self.query("another"):
            raise TemplateError(f"the macro 'query' of template {self.name!r} does not write its text")
        return self

    @cached_property
    def _sandbox(self) -> _Sandbox:
        return _Sandbox()

    @cached_property
    def _module(self) -> Any:
        try:
            return self._sandbox.from_string(self.source).module
        except Exception as error:  # a template is a foreign program: it may divide by zero
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise TemplateError(f"template {self.name!r}{where} does not render: {error}") from error

    def _write(self, macro: str, argument: object) -> str:
        try:
            self._sandbox.steps = 0
            return str(getattr(self._module, macro)(argument))
        except Exception as error:
            said = str(error) or type(error).__name__
            raise TemplateError(f"the macro {macro!r} of template {self.name!r} failed: {said}") from error


@dataclass(frozen=True)
class EncodedTemplate:
    """A template in the tokens of one model.

    Attributes:
        head: ids before the first shot; the instruction is in it.
        separator: ids between an answer and the next query.
    """

    template: Template
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    head: tuple[int, ...]
    separator: tuple[int, ...]
    _query_context: str
    _query_tail: tuple[int, ...]
    _answer_context: str
    _terminator: str

    @classmethod
    def build(cls, template: Template, tokenizer: Tokenizer, labels: Sequence[str]) -> "EncodedTemplate":
        """Encode the fixed parts of `template`.

        Raises:
            TemplateError: if the model has no chat template, or one that cannot be cut into turns.
        """
        instruction = template.instruction(labels)
        if not template.chat:
            query = template.query("x")
            context = "\n" if instruction.endswith("\n") else instruction
            [whole] = tokenizer.encode([instruction + query])
            [after] = tokenizer.encode([query], context=context)
            return cls(
                template,
                tokenizer,
                tuple(labels),
                head=(*tokenizer.bos, *_cut(whole, after, instruction)),
                separator=(),
                _query_context=context,
                _query_tail=(),
                _answer_context=query,
                _terminator=template.terminator,
            )
        conversation, before, middle, between = _turns(tokenizer, instruction)
        [whole, head, tail, gap] = tokenizer.encode([conversation, before, middle, between], special=True)
        contents = tokenizer.encode(_MARKS, context="\n")
        expected = list(head)
        for content, joint in zip(contents, (tail, gap, tail, gap, tail), strict=True):
            expected += [*content, *joint]
        if whole != expected:
            raise TemplateError(
                "the model's tokenizer merges the markup of its chat template with what stands in the turns; "
                "use a plain template, such as `--template classify`"
            )
        end = next((i for i, token in enumerate(gap) if token in tokenizer.special_ids), None)
        if end is None:
            raise TemplateError(
                "the model's chat template ends an answer without a special token; use a plain template, "
                "such as `--template classify`"
            )
        return cls(
            template,
            tokenizer,
            tuple(labels),
            head=tuple(head),
            separator=tuple(gap[end + 1 :]),
            _query_context="\n",
            _query_tail=tuple(tail),
            _answer_context="\n",
            _terminator=tokenizer.decode(gap[: end + 1]),
        )

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as a query, up to where its answer begins.

        Raises:
            DataError: if a text holds half a character, which UTF-8 cannot write.
        """
        for text in texts:
            _require_encodable(text)
        written = [self.template.query(text) for text in texts]
        if self.template.chat:
            written = [text.strip() for text in written]
        encoded = self.tokenizer.encode(written, context=self._query_context)
        return [[*ids, *self._query_tail] for ids in encoded]

    def answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each answer (label or target) with its terminator: the label words.

        Raises:
            TemplateError: if an answer contains the terminator.
        """
        written = [self.template.answer(answer) for answer in answers]
        for answer, text in zip(answers, written, strict=True):
            if self._terminator in text:
                raise TemplateError(
                    f"the answer {answer!r} contains the terminator {self._terminator!r} of template "
                    f"{self.template.name!r}; rename it, or use a template with another terminator"
                )
        if not self.template.chat:
            return self._before_query([text + self._terminator for text in written], self._answer_context)
        [end] = self.tokenizer.encode([self._terminator], special=True)
        contents = self.tokenizer.encode([text.strip() for text in written], context=self._answer_context)
        return [[*ids, *end] for ids in contents]

    @property
    def terminator_ids(self) -> list[int]:
        """The tokens that end an answer."""
        if not self.template.chat:
            return self._before_query([self._terminator], "x")[0]
        return self.tokenizer.encode([self._terminator], special=True)[0]

    def label_words(self) -> list[list[int]]:
        """Ids of each label's word, in the order of `labels`, checked to be prefix-free.

        Raises:
            LabelError: if one label word is the same as, or a prefix of, another.
        """
        words = self.answers(self.labels)
        order = sorted(range(len(words)), key=lambda i: words[i])
        for first, second in pairwise(order):
            if words[second][: len(words[first])] == words[first]:
                same = "the same as" if words[first] == words[second] else "a prefix of"
                raise LabelError(
                    f"the label word of {self.labels[first]!r} is {same} that of {self.labels[second]!r} "
                    f"in template {self.template.name!r}; rename one of them"
                )
        return words

    def _before_query(self, texts: Sequence[str], context: str) -> list[list[int]]:
        """Ids of each text as it stands after `context` and before a query of a plain template."""
        [after] = self.queries(["x"])
        whole = self.tokenizer.encode([text + self.template.query("x") for text in texts], context=context)
        return [_cut(ids, after, text) for ids, text in zip(whole, texts, strict=True)]


def _cut(ids: list[int], after: list[int], text: str) -> list[int]:
    """`ids` without `after` at their end; `text` is what the rest of them stands for."""
    size = len(ids) - len(after)
    if ids[size:] != after:
        raise TemplateError(
            f"the tokenizer merges {text[-20:]!r} with the query after it; end that part of the template "
            "with a newline, and start the query with a letter"
        )
    return ids[:size]


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text {text[:60]!a} holds half a character ({text[error.start]!a}, a surrogate without its "
            "partner), which no tokenizer takes; repair it"
        ) from error


def _turns(tokenizer: Tokenizer, instruction: str) -> tuple[str, str, str, str]:
    """A conversation, and its text before a query, between query and answer, and from there to the next."""
    system = [{"role": "system", "content": instruction}] if instruction.strip() else []
    roles = ("user", "assistant", "user", "assistant", "user")
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    conversation = text = tokenizer.chat([*system, *turns], answer_next=True)
    parts = []
    for mark in _MARKS:
        part, found, text = text.partition(mark)
        if not found:
            raise TemplateError("the model's chat template drops or rewrites turns; use a plain template")
        parts.append(part)
    before, *rest = [*parts, text]
    if rest[0] != rest[2] or rest[0] != rest[4] or rest[1] != rest[3]:
        raise TemplateError("the model's chat template writes its turns unequally; use a plain template")
    return conversation, before, rest[0], rest[1]
