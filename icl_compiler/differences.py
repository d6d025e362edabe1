"""What a program is, in words, and how two differ.

- Settings, template, labels, calibration and pool are compared as they stand; what the two do with them is compared by
  the shots that both choose for some texts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from icl_compiler.data import normalise_text
from icl_compiler.errors import ICLError
from icl_compiler.program import Program

_SAMPLE = 20


class Differences(NamedTuple):
    """How two programs differ.

    Attributes:
        facts: of what differs, by its name, both values.
        sentences: about labels, rows and shots.
    """

    facts: dict[str, tuple[Any, Any]]
    sentences: list[str]

    @property
    def differ(self) -> bool:
        """Whether anything does."""
        return bool(self.facts or self.sentences)


def facts(program: Program) -> dict[str, Any]:
    """How a program was made, by the names of its settings."""
    told = {"task": program.task, **asdict(program.settings)}
    told |= {"template": program.template.template.name, "calibration": program.calibration.describe()}
    if program.reranker is not None:
        told["reranker"] = program.reranker.describe()
    told["rows"] = len(program.pool.data)
    return told | ({"labels": len(program.labels)} if program.labels else {})


def differences(first: Program, second: Program, queries: Sequence[str] = ()) -> Differences:
    """How `second` differs from `first`.

    Args:
        queries: texts whose shots are compared; by default 20 of the first one's pool.
    """
    one, other = facts(first), facts(second)
    found = {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    }
    told = []
    if first.template.template.source != second.template.template.source and "template" not in found:
        told.append(f"the template {one['template']!r} has another text")
    if first.template.tokenizer.fingerprint != second.template.tokenizer.fingerprint:
        told.append("the tokenizers differ")
    told += _labels(first.labels, second.labels)
    told += _rows(first, second)
    told += _shots(first, second, queries or _sample(first))
    return Differences(found, told)


def _labels(first: Sequence[str], second: Sequence[str]) -> list[str]:
    only = [(name, [label for label in a if label not in b]) for name, a, b in _both(first, second)]
    return [f"labels of {name} only: {', '.join(labels)}" for name, labels in only if labels]


def _rows(first: Program, second: Program) -> list[str]:
    answers = [dict(zip(p.pool.data.texts, p.pool.data.answers, strict=True)) for p in (first, second)]
    told = []
    for name, a, b in _both(*answers):
        if lone := [text for text in a if text not in b]:
            told.append(f"{len(lone):,} of {len(a):,} texts stand in {name}'s pool only, such as {_short(lone[0])}")
    changed = [text for text, answer in answers[0].items() if answers[1].get(text, answer) != answer]
    if changed:
        text = changed[0]
        told.append(
            f"{len(changed):,} texts have another answer, such as {_short(text)}: {answers[0][text]} in A, "
            f"{answers[1][text]} in B"
        )
    return told


def _shots(first: Program, second: Program, queries: Sequence[str]) -> list[str]:
    same, shared, total = 0, 0, 0
    for query in queries:
        try:
            [a], [b] = first.prompt_sets([query]), second.prompt_sets([query])
        except ICLError as error:
            return [f"their shots cannot be compared: {error}"]
        chosen = [
            {normalise_text(program.pool.data.texts[row]) for prompt in prompts for row in prompt.selection.rows}
            for program, prompts in ((first, a), (second, b))
        ]
        same += [prompt.tokens for prompt in a] == [prompt.tokens for prompt in b]
        shared += len(chosen[0] & chosen[1])
        total += len(chosen[0] | chosen[1])
    if not queries or same == len(queries):
        return []
    common = f"; of all shots that either takes, both take {shared / total:.0%}" if total else ""
    return [f"{same} of {len(queries)} texts have the same prompt{common}"]


def _sample(program: Program) -> list[str]:
    texts = program.pool.data.texts
    step = max(1, len(texts) // _SAMPLE)
    return list(texts[::step][:_SAMPLE])


def _both(first: Any, second: Any) -> list[tuple[str, Any, Any]]:
    return [("A", first, second), ("B", second, first)]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:59] + "…")
