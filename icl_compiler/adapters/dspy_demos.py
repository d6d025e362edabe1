"""The shots of a program as demos of a DSPy `Predict`.

- `dspy_demos` gives those for one text, as `predict(text=..., demos=dspy_demos(program, text))` takes them.
- `write_dspy_state` writes one fixed set and the program's instruction as the JSON that `Predict.load` reads: for the
  retrievers that find the same rows for every text (uniform, votek), or for the text that is named. How the fields of
  the signature are described is left to the signature that loads it.
- DSPy itself is not needed here. Which shots fit is decided by the program's budget, counted in its own template.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from icl_compiler.errors import ArtifactError, InputError
from icl_compiler.program import SAME_FOR_ALL, Program


def dspy_demos(
    program: Program, text: str, *, text_field: str = "text", answer_field: str = "label"
) -> list[dict[str, str]]:
    """The demos for `text`, in the order of the prompt; the fields are those of your signature.

    Raises:
        BudgetError: if the text alone exceeds the program's budget.

    >>> from icl_compiler.compile import compile_program
    >>> from icl_compiler.data import Dataset
    >>> data = Dataset(("my card is gone", "where is my parcel"), ("card", "parcel"), "classification", "example")
    >>> dspy_demos(compile_program(data, model="echo", retriever="bm25", shots=1), "a parcel")
    [{'text': 'where is my parcel', 'label': 'parcel'}]
    """
    [prompt] = program.prompts([text])
    data = program.pool.data
    return [{text_field: data.texts[row], answer_field: data.answers[row]} for row in prompt.selection.rows]


def write_dspy_state(
    program: Program,
    path: str | Path,
    *,
    text: str | None = None,
    text_field: str = "text",
    answer_field: str = "label",
) -> None:
    """Write the demos for `text`, or those of every text, to the `.json` file at `path`.

    `dspy.Predict("text -> label").load(path)` reads it.

    Raises:
        InputError: if no `text` is named and the program finds other shots for every text, or `path` is no `.json`.
        BudgetError: if the text alone exceeds the program's budget.
        ArtifactError: if the file cannot be written; what stood there stands there still.
    """
    path, retriever = Path(path), program.settings.retriever
    if path.suffix != ".json":
        raise InputError(f"DSPy loads a file that ends in .json, and {path} ends in {path.suffix or 'no suffix'}")
    if text is None and retriever not in SAME_FOR_ALL:
        raise InputError(
            f"{retriever} finds other shots for every text; name the text, compile with one of "
            f"{', '.join(SAME_FOR_ALL)}, or hand over dspy_demos(program, text) with each call"
        )
    demos = dspy_demos(program, text or "", text_field=text_field, answer_field=answer_field)
    state: dict[str, Any] = {
        "traces": [],
        "train": [],
        "demos": demos,
        "signature": {"instructions": program.template.template.instruction(program.labels).strip(), "fields": []},
        "lm": None,
        "metadata": {"dependency_versions": {}},
    }
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            draft = Path(scratch, path.name)
            draft.write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
            draft.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
