"""Prompts against a second, slower way to write them; the promises of a budget; the leak of a query to itself."""

import json

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, customers, smollm2

from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import BudgetError, DataError
from icl_compiler.program import encode_pool
from icl_compiler.registry import RETRIEVERS
from icl_compiler.templates import EncodedTemplate, Template
from icl_compiler.tokenizer import ByteTokenizer

INSTRUCTION = "Say which label fits the text. Labels: card, parcel, refund.\n"
MIXED = Dataset(
    (*customers().texts, *(text for text in NASTY if text.strip())),
    (*customers().answers, *(["card", "parcel"] * 10)[: sum(1 for text in NASTY if text.strip())]),
    "classification",
    "mixed",
)
every_retriever = pytest.mark.parametrize("retriever", list(RETRIEVERS))


@pytest.fixture(autouse=True, scope="module")
def encoder_without_a_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icl_compiler.encoders.named_encoder", lambda name: HashedWords())
        yield


def echo_program(data=MIXED, **settings):
    return compile_program(data, model="echo", **{"budget": 10_000, **settings})


def written(program, rows, text):
    """The prompt as text, from the rows of the pool."""
    template, data = program.template.template, program.pool.data
    shots = "".join(template.query(data.texts[row]) + template.answer(data.answers[row]) + "\n" for row in rows)
    return INSTRUCTION + shots + template.query(text)


@every_retriever
def test_a_prompt_is_instruction_shots_and_query(retriever):
    program = echo_program(retriever=retriever, shots=5)
    queries = ["where is my parcel", *NASTY]
    for text, prompt in zip(queries, program.prompts(queries), strict=True):
        assert bytes(prompt.tokens).decode() == written(program, prompt.selection.rows, text)
        assert len(prompt.selection.rows) == 5


@pytest.mark.models
@pytest.mark.parametrize("template", ["classify", "classify_chat"])
def test_prompts_of_real_data_are_the_tokenisation_of_their_text(template, shared_data):
    lines = (shared_data / "banking77" / "train.jsonl").read_text(encoding="utf-8").splitlines()[::25]
    rows = [json.loads(line) for line in lines]
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    data = Dataset(tuple(texts[100:]), tuple(labels[100:]), "classification", "banking77")
    program = compile_program(data, retriever="bm25", template=template, budget=512, shots=8)
    own = program.template.template
    for text, (tokens, selection, _) in zip(texts[:100], program.prompts(texts[:100]), strict=True):
        pairs = [(data.texts[row], data.answers[row]) for row in selection.rows]
        if template == "classify":
            shots = "".join(own.query(shot) + own.answer(label) + own.terminator for shot, label in pairs)
            whole = own.instruction(program.labels) + shots + own.query(text)
        else:
            turns = [
                {"role": role, "content": content}
                for shot, label in pairs
                for role, content in (("user", own.query(shot)), ("assistant", own.answer(label)))
            ]
            system, user = {"role": "system", "content": own.instruction(program.labels)}, own.query(text)
            whole = smollm2().chat([system, *turns, {"role": "user", "content": user}], answer_next=True)
        assert [list(tokens)] == smollm2().encode([whole], special=True)
        assert len(tokens) + max(map(len, program.label_words)) <= 512


# Budgets


@settings(deadline=None, max_examples=80)
@given(
    budget=st.integers(70, 700),
    shots=st.integers(0, 20),
    retriever=st.sampled_from(list(RETRIEVERS)),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)
def test_a_budget_is_kept_by_whole_shots_or_refused(budget, shots, retriever, text):
    longest = len(" refund\n")
    try:
        program = echo_program(budget=budget, shots=shots, retriever=retriever)
    except BudgetError:
        assert len(INSTRUCTION) + longest >= budget
        return
    query = program.template.template.query(text)
    needed = len(INSTRUCTION) + len(query.encode()) + longest
    if needed > budget:
        with pytest.raises(BudgetError, match=f"{needed} in all, and the budget is {budget}"):
            program.prompts([text])
        return
    [prompt] = program.prompts([text])
    assert len(prompt.tokens) + longest <= budget
    assert len(prompt.selection.rows) <= shots
    # Neither instruction, shots nor query were cut.
    assert bytes(prompt.tokens).decode() == written(program, prompt.selection.rows, text)


def test_a_larger_budget_takes_more_and_a_smaller_one_skips_what_is_long():
    data = Dataset(("card", "card " * 30, "card " * 2), ("a", "b", "a"), "classification", "lengths")
    small = echo_program(data, budget=150, retriever="bm25").prompts(["card"])[0].selection
    large = echo_program(data, budget=1000, retriever="bm25").prompts(["card"])[0].selection
    assert (small.rows, small.too_long) == ([2], 1)
    assert (sorted(large.rows), large.too_long) == ([1, 2], 0)
    assert (small.itself, large.itself) == (1, 1)


def test_a_query_too_long_for_the_budget_is_named():
    with pytest.raises(
        BudgetError, match=r"the prompt for 'zz+…' has 61 tokens of instruction, 213 of query and up to 8"
    ):
        echo_program(budget=200).prompts(["short", "z" * 200])


# Which shots


@every_retriever
def test_a_query_never_retrieves_itself(retriever):
    program = echo_program(retriever=retriever, shots=30, budget=100_000)
    pool = program.pool.data
    for disguise in (str, str.upper, lambda text: f"  {text.replace(' ', chr(10))}\t"):
        queries = [disguise(text) for text in customers().texts]
        for query, prompt in zip(queries, program.prompts(queries), strict=True):
            same = [row for row, text in enumerate(pool.texts) if normalise_text(text) == normalise_text(query)]
            assert len(same) == 1
            assert sorted(prompt.selection.rows) == [row for row in range(len(pool)) if row not in same]
            assert prompt.selection.itself == 1


@pytest.mark.parametrize("retriever", ["dense", "mmr", "dpp"])
@pytest.mark.parametrize("per_label", [0, 1, 2])
def test_a_row_of_the_pool_is_asked_as_if_it_were_not_in_it(retriever, per_label):
    """Or else its shots tell its label: that which gives up its turn to a row that is not shown."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(25)]
    texts = [" ".join(rng.choice(words, size=5).tolist()) for _ in range(80)]
    data = Dataset(tuple(texts), tuple(rng.choice(["a", "b"], size=80).tolist()), "classification", "words")
    how = {"retriever": retriever, "per_label": per_label, "shots": 6}
    prompts = echo_program(data, **how).prompts(texts[:20])
    for row, prompt in enumerate(prompts):
        others = [i for i in range(80) if i != row]
        [alone] = echo_program(data.take(others), **how).prompts([texts[row]])
        assert prompt.tokens == alone.tokens


@pytest.mark.parametrize("retriever", ["bm25", "dense"])
def test_the_best_shot_stands_last(retriever):
    selection = echo_program(retriever=retriever, shots=4).prompts(["where is my lost card"])[0].selection
    assert selection.ranks == [4, 3, 2, 1]
    assert selection.scores == sorted(selection.scores)
    assert selection.scores[0] < selection.scores[-1]


@every_retriever
@pytest.mark.parametrize("order", ["best-first", "random", "by-label"])
def test_another_order_has_the_same_shots(retriever, order):
    program, other = (echo_program(retriever=retriever, shots=5, order=each) for each in ("best-last", order))
    for text in ("where is my card", "the parcel is late"):
        [best_last], [prompt] = program.prompts([text]), other.prompts([text])
        shots, usual = (list(zip(*p.selection[:3], strict=True)) for p in (prompt, best_last))
        assert sorted(shots) == sorted(usual)
        assert bytes(prompt.tokens).decode() == written(other, prompt.selection.rows, text)
        if order == "best-first":
            assert shots == usual[::-1]
        if order == "by-label":
            labels = [other.pool.data.answers[row] for row in prompt.selection.rows]
            assert len([i for i in range(1, 5) if labels[i] != labels[i - 1]]) == len(set(labels)) - 1
            assert shots[-1] == usual[-1]


def test_a_random_order_is_drawn_by_the_text_and_the_seed():
    texts = [f"where is my card {i}" for i in range(20)]

    def orders(seed):
        return [prompt.selection.ranks for prompt in echo_program(shots=4, order="random", seed=seed).prompts(texts)]

    assert orders(0) == orders(0)
    assert len({tuple(ranks) for ranks in orders(0)}) > 5
    assert orders(0) != orders(1)


def test_every_label_has_its_turn():
    data = customers()
    near = echo_program(data, retriever="bm25", shots=3).prompts(["the card"])[0].selection
    turns = echo_program(data, retriever="bm25", shots=3, per_label=1).prompts(["the card"])[0].selection
    assert sorted({data.answers[row] for row in near.rows}) != sorted(data.labels)
    assert sorted(data.answers[row] for row in turns.rows) == sorted(data.labels)
    assert turns.rows[-1] == near.rows[-1]
    # The ranks are still those of the retriever.
    ranked = echo_program(data, retriever="bm25", shots=12).prompts(["the card"])[0].selection
    rank_of = dict(zip(ranked.rows, ranked.ranks, strict=True))
    assert turns.ranks == [rank_of[row] for row in turns.rows]


def test_a_balanced_random_set():
    rare = Dataset(
        tuple(f"text {i}" for i in range(300)), ("rare",) * 4 + ("often",) * 296, "classification", "unbalanced"
    )
    program = echo_program(rare, retriever="uniform", shots=8, per_label=1)
    first, second = program.prompts(["x", "y"])
    assert first.selection == second.selection
    assert [rare.answers[row] for row in first.selection.rows].count("rare") == 4


def test_targets_have_no_labels_to_order_by():
    pairs = Dataset(("one", "two"), ("eins", "zwei"), "generation", "pairs")
    for wanted in ({"order": "by-label"}, {"per_label": 1}):
        with pytest.raises(DataError, match="pairs has targets, and no labels that shots could be ordered"):
            echo_program(pairs, **wanted)


def test_random_shots_are_the_same_beginning_for_all_queries():
    program = echo_program(retriever="uniform", shots=4)
    few, many = (
        program.prompts(["first query", "second"]),
        echo_program(retriever="uniform", shots=8).prompts(["third"]),
    )
    assert few[0].selection == few[1].selection
    assert few[0].selection.ranks == [1, 2, 3, 4]
    assert many[0].selection.rows[:4] == few[0].selection.rows


@every_retriever
def test_a_prompt_does_not_depend_on_the_other_queries(retriever):
    program = echo_program(retriever=retriever, shots=3)
    queries = ["where is my card", *NASTY]
    assert [prompt.tokens for prompt in program.prompts(queries)] == [
        program.prompts([query])[0].tokens for query in queries
    ]
    assert program.prompts([]) == []


@every_retriever
def test_more_shots_than_there_are_rows(retriever):
    program = echo_program(customers(), retriever=retriever, shots=100)
    assert sorted(program.prompts(["x"])[0].selection.rows) == list(range(12))


def test_no_shots():
    [prompt] = echo_program(shots=0).prompts(["where is it"])
    assert bytes(prompt.tokens).decode() == INSTRUCTION + "Text: where is it\nLabel:"
    assert prompt.selection.rows == []


def test_falsy_labels_stand_in_the_prompt():
    data = Dataset(("nought", "nothing", "never"), ("0", "", "False"), "classification", "falsy")
    [prompt] = echo_program(data, retriever="uniform").prompts(["x"])
    text = bytes(prompt.tokens).decode()
    for line in ("Text: nought\nLabel: 0\n", "Text: nothing\nLabel: \n", "Text: never\nLabel: False\n"):
        assert line in text


def test_a_text_without_its_other_half():
    with pytest.raises(DataError, match="holds half a character"):
        echo_program().prompts(["fine", "\udcff"])


def test_a_generating_program_shows_targets():
    data = Dataset(("one", "two"), ("eins", "zwei\ndrei"), "generation", "pairs")
    program = echo_program(data, retriever="uniform", shots=2)
    text = bytes(program.prompts(["three"])[0].tokens).decode()
    assert "Input: one\nOutput: eins\n" in text
    assert "Input: two\nOutput: zwei drei\n" in text
    assert text.endswith("Input: three\nOutput:")
    assert program.labels == ()
    assert program.label_words == []


# Explained


def test_an_explanation_is_the_prompt_taken_apart():
    program = echo_program(retriever="bm25", shots=3)
    text = "my card was stolen"
    shown, [prompt] = program.explain(text), program.prompts([text])
    assert (shown.query, shown.budget, shown.tokens) == (text, 10_000, len(prompt.tokens))
    assert shown.prompt.encode() == bytes(prompt.tokens)
    assert [shot.row for shot in shown.shots] == prompt.selection.rows
    assert [shot.score for shot in shown.shots] == prompt.selection.scores
    for shot in shown.shots:
        assert (shot.text, shot.label) == (MIXED.texts[shot.row], MIXED.answers[shot.row])
        line = f"Text: {' '.join(shot.text.split())}\nLabel: {shot.label}\n"
        assert line in shown.prompt
        assert shot.tokens == len(line.encode())
        assert shot.why == f"rank {shot.rank} of {len(MIXED)} rows by bm25 (BM25 score)"
    assert [shot.rank for shot in shown.shots] == [4, 3, 2]
    assert shown.notes == ["1 row of the pool was left out because it is the query itself"]


def test_notes_say_why_there_are_few_shots():
    program = echo_program(customers(), retriever="uniform", shots=12, budget=200)
    notes = program.explain("x").notes
    assert notes == [
        f"{12 - len(program.prompts(['x'])[0].selection.rows)} candidates were skipped because they did not fit the "
        "budget any more",
        f"{len(program.prompts(['x'])[0].selection.rows)} of at most 12 shots: no more fit, or there are no more",
    ]


def test_the_pool_is_its_shots_one_after_another():
    encoded = EncodedTemplate.build(Template.from_name("classify"), ByteTokenizer(), ("card", "parcel", "refund"))
    pool = encode_pool(encoded, customers())
    shots = [
        f"Text: {text}\nLabel: {label}\n".encode()
        for text, label in zip(customers().texts, customers().answers, strict=True)
    ]
    assert bytes(pool.tokens.tolist()) == b"".join(shots)
    assert pool.offsets.tolist() == [sum(map(len, shots[:i])) for i in range(len(shots) + 1)]
    empty = encode_pool(encoded, customers().take([]))
    assert (empty.tokens.tolist(), empty.offsets.tolist()) == ([], [0])
