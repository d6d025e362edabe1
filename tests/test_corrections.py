"""Corrections put into a program, against the program compiled anew."""

from pathlib import Path

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import customers

from icl_compiler import encoders
from icl_compiler.compile import compile_program
from icl_compiler.corrections import Corrector
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import LabelError, TemplateError
from icl_compiler.program import Program
from retrievers.dense import Dense
from retrievers.joined import Joined
from retrievers.retriever import Resources

QUERIES = ["the card is late", "my parcel", "refund please", "  THE card is   lost "]


@pytest.fixture(autouse=True)
def words_for_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def compiled(data: Dataset, retriever: str = "dense") -> Program:
    return compile_program(data, model="echo", retriever=retriever, shots=4, budget=600)


def prompts(program: Program) -> list[tuple[int, ...]]:
    return [prompt.tokens for prompt in program.prompts(QUERIES)]


corrections = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([*customers().texts, *QUERIES, "The CARD is lost"]), st.text("abc ", min_size=1)),
        st.sampled_from(customers().labels),
    ).filter(lambda pair: pair[0].strip()),
    max_size=6,
)


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid", "uniform"])
@given(given_ones=corrections)
@settings(max_examples=20, deadline=None)
def test_as_if_compiled_with_them(retriever: str, given_ones: list[tuple[str, str]]) -> None:
    data = customers()
    right = {normalise_text(text): answer for text, answer in given_ones}
    first = {}
    for text, _ in given_ones:
        first.setdefault(normalise_text(text), None)
    last = {normalise_text(text): text for text, _ in given_ones}
    known = {normalise_text(text) for text in data.texts}
    texts = (*data.texts, *(last[key] for key in first if key not in known))
    old = dict(zip(map(normalise_text, data.texts), data.answers, strict=True))
    answers = tuple(right.get(normalise_text(text), old.get(normalise_text(text), "")) for text in texts)
    anew = compiled(Dataset(texts, answers, "classification", "anew"), retriever)
    found = Corrector(compiled(data, retriever)).corrected(given_ones)
    assert found.pool.data.texts == texts and found.pool.data.answers == answers
    assert found.pool.tokens.tolist() == anew.pool.tokens.tolist()
    assert found.pool.offsets.tolist() == anew.pool.offsets.tolist()
    object.__setattr__(anew, "without_itself", False)
    assert prompts(found) == prompts(anew)


def test_who_asks_again_gets_the_correction() -> None:
    program = compiled(customers())
    text = "where is my cat"
    corrected = Corrector(program).corrected([(text, "refund")])
    [prompt] = corrected.prompts([text])
    assert corrected.pool.data.texts[prompt.selection.rows[-1]] == text
    assert prompts(program) == prompts(compiled(customers()))  # the program itself is as it was


def test_flags() -> None:
    corrector = Corrector(compiled(customers()))
    now = corrector.corrected([("the bus is late", "parcel")])
    [same] = corrector.flags(now, "My card was  stolen", "card")
    assert (same.kind, same.similarity) == ("duplicate", 1)
    [other] = corrector.flags(now, "my card was stolen", "refund")
    assert (other.kind, other.label) == ("contradiction", "card")
    kinds = {flag.text: flag.kind for flag in corrector.flags(now, "the bus is late!", "parcel")}
    assert kinds == {"the bus is late": "near_duplicate"}
    assert corrector.flags(now, "a rose is a rose", "card") == []


def test_answers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"'cards' is no label of this program. Did you mean 'card'"):
        Corrector(compiled(customers())).corrected([("a text", "cards")])
    words = Dataset(("dog",), ("Hund",), "generation", "words")
    template = tmp_path / "words.jinja"
    template.write_text(
        '{% set terminator = ";" %}{% macro instruction(labels) %}{% endmacro %}'
        "{% macro query(text) %}{{ text }}:{% endmacro %}{% macro answer(target) %}{{ target }}{% endmacro %}"
    )
    short = compile_program(words, model="echo", template=str(template), retriever="bm25", shots=1, budget=600)
    with pytest.raises(TemplateError, match="contains the terminator ';'"):
        Corrector(short).corrected([("cat", "Katze; Kater")])


@given(
    texts=st.lists(st.text("abcd ", min_size=1), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    k=st.integers(1, 40),
)
@settings(max_examples=50, deadline=None)
def test_two_indices_are_one(texts: list[str], cut: int, k: int) -> None:
    def fitted(part: list[str]) -> Dense:
        retriever = Dense(Resources(seed=0, encoder=HashedWords()))
        retriever.fit(part)
        return retriever

    cut = min(cut, len(texts) - 1) or 1
    if cut >= len(texts):
        return
    whole, joined = fitted(texts), Joined(fitted(texts[:cut]), fitted(texts[cut:]), rows=cut)
    one, two = whole.search(["ab", "d c"], k), joined.search(["ab", "d c"], k)
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.scores, two.scores)


def test_a_joined_index_is_not_kept(tmp_path: Path) -> None:
    retriever = Dense(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(["a", "b"])
    with pytest.raises(TypeError, match="make one index of all rows"):
        Joined(retriever, retriever, rows=2).save(tmp_path)
