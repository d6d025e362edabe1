"""Instructions to try in place of a template's own: those of `prompts/instructions`, and those that the model writes.

- The model is shown labelled rows and asked what the instruction was (APE, Zhou et al. 2022, arXiv 2211.01910, its
  forward template). The rows are none of those by which variants are judged. Small models write poor ones; the race
  decides.
- What the model wrote is text, never Jinja: it is quoted in the template.
"""

from collections.abc import Sequence
from importlib.resources import files
from itertools import takewhile

import numpy as np
from jaxtyping import Int64
from jinja2.sandbox import ImmutableSandboxedEnvironment

from icl_compiler.optimise.judges import Asker
from icl_compiler.optimise.score_log import Answer
from icl_compiler.program import Program
from icl_compiler.tokenizer import TokenIds

WRITTEN = 4
"""Instructions that the model is asked to write."""
_SHOWN = 6  # rows
_LONGEST = 60  # tokens
_TEMPERATURE = 0.9
_LABELS = '{% if labels and labels|length <= 20 %} Labels: {{ labels | join(", ") | replace("_", " ") }}.{% endif %}'


def bundled(task: str) -> dict[str, str]:
    """The instructions for a task, as Jinja texts by their names.

    >>> sorted(bundled("classification"))
    ['continue', 'expert', 'names', 'none']
    """
    found = (entry for entry in files("prompts").joinpath("instructions").iterdir() if entry.name.startswith(task))
    entries = sorted(found, key=lambda entry: entry.name)
    return {
        entry.name.removeprefix(f"{task}_").removesuffix(".jinja"): entry.read_text(encoding="utf-8")
        for entry in entries
    }


def written(program: Program, asker: Asker, rows: Int64[np.ndarray, " rows"], *, seed: int) -> dict[str, str]:
    """What the model takes for the instruction behind some of these rows of the pool, as Jinja texts by their names.

    At most `WRITTEN` different ones; each costs a model call.

    Raises:
        OutOfTime: if the time is up before all were asked.
        BackendError, ContextLengthError: if the engine cannot write them.
    """
    template, data = program.template, program.pool.data
    source = files("prompts").joinpath("instructions/ask.jinja").read_text(encoding="utf-8")
    form = ImmutableSandboxedEnvironment(trim_blocks=True, autoescape=False).from_string(source)  # nosec: no HTML
    draw = np.random.default_rng(seed)
    texts = []
    for _ in range(WRITTEN):
        shown = draw.choice(rows, size=min(_SHOWN, len(rows)), replace=False).tolist()
        texts.append(form.render(pairs=[(data.texts[row], data.answers[row]) for row in shown]))
    prompts = [[*template.tokenizer.bos, *ids] for ids in template.tokenizer.encode(texts)]
    [newline] = template.tokenizer.encode(["\n"], context="x")

    def ask(new: list[TokenIds]) -> list[Answer]:
        found = asker.backend.generate(new, newline, max_new_tokens=_LONGEST, temperature=_TEMPERATURE, seed=seed)
        return [[[float(token) for token in item.tokens]] for item in found.items]

    answers = asker.ask(f"instructions, seed {seed}, at most {_LONGEST}", prompts, ask)
    ends = template.tokenizer.special_ids
    tokens = [list(takewhile(lambda token: token not in ends, map(int, answer[0]))) for answer in answers]
    said = [
        template.tokenizer.decode(part) + "\n" * (len(part) < len(answer[0]))
        for part, answer in zip(tokens, answers, strict=True)
    ]
    return {f"written-{i}": text for i, text in enumerate(quoted(said), start=1)}


def quoted(said: Sequence[str]) -> list[str]:
    """The first line of each text that has one, as Jinja that writes exactly that, and the labels; none twice.

    >>> [text.removesuffix(_LABELS) for text in quoted([' Say "yes".\\nInput: a', "", "No end", 'Say "yes".\\n'])]
    ['{{ "Say \\\\"yes\\\\"." }}']
    """
    lines = [line.strip() for line, end, _ in (text.lstrip().partition("\n") for text in said) if end and line.strip()]
    marks = [line.encode("unicode_escape").decode().replace('"', '\\"') for line in dict.fromkeys(lines)]
    return [f'{{{{ "{mark}" }}}}{_LABELS}' for mark in marks]
