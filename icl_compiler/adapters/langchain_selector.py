"""The shots of a program as LangChain's example selector, for a `FewShotPromptTemplate`.

- Which rows, and in which order, is the program's choice: its retriever, its number of shots, its budget. The budget is
  counted in the program's own template and tokenizer; LangChain writes the prompt in yours.
- `add_example` changes this selector's program alone, never a folder. A text that is known already gets the new label.
"""

from dataclasses import replace
from typing import Any

from icl_compiler.corrections import Corrector
from icl_compiler.errors import InputError, MissingDependencyError
from icl_compiler.program import Program
from icl_compiler.table import kind, listed

try:
    from langchain_core.example_selectors import BaseExampleSelector
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "the example selector needs LangChain: pip install 'icl-compiler[langchain]'"
    ) from error


class ProgramExampleSelector(BaseExampleSelector):
    """Chooses the examples that a program would show.

    Args:
        program: what chooses; for classification or generation.
        text_key: the input variable that holds the query, and the key of a text in an example.
        answer_key: the key of a label or target in an example.

    >>> from icl_compiler.compile import compile_program
    >>> from icl_compiler.data import Dataset
    >>> data = Dataset(("my card is gone", "where is my parcel"), ("card", "parcel"), "classification", "example")
    >>> selector = ProgramExampleSelector(compile_program(data, model="echo", retriever="bm25", shots=1))
    >>> selector.select_examples({"text": "a parcel"})
    [{'text': 'where is my parcel', 'label': 'parcel'}]
    """

    def __init__(self, program: Program, *, text_key: str = "text", answer_key: str = "label") -> None:
        self.program = program
        self.text_key = text_key
        self.answer_key = answer_key
        self._corrector = Corrector(program)
        self._added: list[tuple[str, str]] = []

    def add_example(self, example: dict[str, Any]) -> None:
        """Put a text with its label or target into the pool.

        Raises:
            InputError: if a key is missing, or what stands there is no text.
            LabelError: if the label is none of the program's.
        """
        added = [*self._added, (self._text(example, self.text_key), self._text(example, self.answer_key))]
        corrected = self._corrector.corrected(added)
        self.program = replace(corrected, without_itself=self.program.without_itself)
        self._added = added

    def select_examples(self, input_variables: dict[str, Any]) -> list[dict[str, Any]]:
        """The shots for the query, as the program orders them.

        Raises:
            InputError: if there is no such input variable, or it is no text.
            BudgetError: if the query alone exceeds the program's budget.
        """
        [prompt] = self.program.prompts([self._text(input_variables, self.text_key)])
        data = self.program.pool.data
        return [{self.text_key: data.texts[row], self.answer_key: data.answers[row]} for row in prompt.selection.rows]

    def _text(self, given: dict[str, Any], key: str) -> str:
        if key not in given:
            raise InputError(f"there is no {key!r} among {listed(list(given))}; text_key and answer_key name others")
        value = given[key]
        if not isinstance(value, str):
            raise InputError(f"{key!r} is {kind(value)}, expected a text")
        return value
