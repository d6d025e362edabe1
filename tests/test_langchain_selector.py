"""The example selector inside LangChain's own templates."""

import asyncio
import subprocess
import sys

import pytest
from toys import customers

from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import InputError, LabelError

pytest.importorskip("langchain_core", reason="needs LangChain: pip install 'icl-compiler[langchain]'")

from langchain_core.example_selectors import BaseExampleSelector
from langchain_core.prompts import ChatPromptTemplate, FewShotChatMessagePromptTemplate, FewShotPromptTemplate
from langchain_core.prompts import PromptTemplate as TextTemplate

from icl_compiler.adapters.langchain_selector import ProgramExampleSelector


def compiled(data=None, **settings):
    settings = {"model": "echo", "retriever": "bm25", "shots": 3, "budget": 2000, **settings}
    return compile_program(data or customers(), **settings)


def template(selector):
    return FewShotPromptTemplate(
        example_selector=selector,
        example_prompt=TextTemplate.from_template("Text: {text}\nLabel: {label}"),
        prefix="Say which label fits the text. Labels: card, parcel, refund.",
        suffix="Text: {text}\nLabel:",
        input_variables=["text"],
        example_separator="\n",
    )


def test_a_few_shot_prompt_is_that_of_the_program():
    program = compiled()
    prompt = template(ProgramExampleSelector(program))
    for query in ("where is my parcel now", "a card"):
        assert prompt.format(text=query) == program.explain(query).prompt
        assert asyncio.run(prompt.aformat(text=query)) == program.explain(query).prompt


def test_in_a_chat():
    turn = ChatPromptTemplate.from_messages([("human", "{message}"), ("ai", "{intent}")])
    selector = ProgramExampleSelector(compiled(shots=1), text_key="message", answer_key="intent")
    shots = FewShotChatMessagePromptTemplate(
        example_selector=selector, example_prompt=turn, input_variables=["message"]
    )
    chat = ChatPromptTemplate.from_messages([shots, ("human", "{message}")])
    said = [(message.type, message.content) for message in chat.invoke({"message": "a refund was"}).to_messages()]
    assert said == [("human", "a refund was promised"), ("ai", "refund"), ("human", "a refund was")]


def test_added_examples_are_chosen():
    program = compiled(shots=1)
    selector = ProgramExampleSelector(program)
    assert isinstance(selector, BaseExampleSelector)
    selector.add_example({"text": "zebra crossing", "label": "refund"})
    asyncio.run(selector.aadd_example({"text": "yellow submarine", "label": "card"}))
    assert selector.select_examples({"text": "the zebra"}) == [{"text": "zebra crossing", "label": "refund"}]
    assert selector.select_examples({"text": "a submarine"}) == [{"text": "yellow submarine", "label": "card"}]
    assert selector.select_examples({"text": "zebra crossing"})[0]["text"] != "zebra crossing"
    selector.add_example({"text": "Zebra  crossing", "label": "parcel"})
    assert selector.select_examples({"text": "the zebra"})[0]["label"] == "parcel"
    assert len(program.pool.data) == 12
    for example, error in (({"text": "x", "label": "dog"}, LabelError), ({"text": "x"}, InputError),
                           ({"text": 3, "label": "card"}, InputError)):  # fmt: skip
        with pytest.raises(error):
            selector.add_example(example)
    assert len(selector.program.pool.data) == 14


def test_a_query_under_another_name_is_told():
    with pytest.raises(InputError, match=r"no 'text' among 'query'"):
        ProgramExampleSelector(compiled()).select_examples({"query": "where"})


def test_targets_are_examples_too():
    pairs = Dataset(("one cat", "two dogs"), ("eine Katze", "zwei Hunde"), "generation", "pairs")
    selector = ProgramExampleSelector(compiled(pairs, shots=1), answer_key="german")
    selector.add_example({"text": "three birds", "german": "drei Voegel"})
    assert selector.select_examples({"text": "birds"}) == [{"text": "three birds", "german": "drei Voegel"}]


def test_without_langchain_the_remedy_is_named():
    code = """
import sys
sys.modules["langchain_core"] = None
from icl_compiler.errors import ICLError
try:
    import icl_compiler.adapters.langchain_selector
except ICLError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'icl-compiler[langchain]'" in done.stdout, done.stderr
