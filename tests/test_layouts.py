"""Fixed blocks: the same beginning for all queries of a cluster, inside the budget, ending where a cache block ends."""

from itertools import pairwise

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, customers

from evaluation.evaluate import _with_random_shots
from icl_compiler.artifact import load_program, save_program
from icl_compiler.compile import compile_program, with_pool, without_rows
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, BudgetError, DataError
from icl_compiler.layouts import computed_tokens, fill
from icl_compiler.prefix_tree import common_prefix

WORDS = [
    "card",
    "parcel",
    "refund",
    "lost",
    "late",
    "stolen",
    "money",
    "where",
    "when",
    "why",
    "today",
    "soon",
    "never",
]
LAYOUTS = ("shared", "clustered", "mixed")
INSTRUCTION = len("Say which label fits the text. Labels: a, b, c.\n")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def messages(rows=150, seed=0):
    rng = np.random.default_rng(seed)
    texts = list(dict.fromkeys(" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) for _ in range(rows)))
    return Dataset(tuple(texts), tuple("abc"[len(text) % 3] for text in texts), "classification", "messages")


@pytest.fixture(autouse=True, scope="module")
def encoder_without_a_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icl_compiler.encoders.named_encoder", lambda name: HashedWords())
        yield


def program(layout, data=None, **settings):
    settings = {"retriever": "dense", "clusters": 4, "budget": 900, **settings}
    return compile_program(messages() if data is None else data, model="echo", layout=layout, **settings)


def begin(made, block):
    shots = [made.pool.tokens[slice(*made.pool.offsets[row : row + 2])] for row in made.blocks[block]]
    return [*made.template.head, *np.concatenate(shots).tolist()]


# The same beginning


@every_layout
def test_prompts_of_one_block_begin_with_exactly_its_tokens(layout):
    made = program(layout)
    queries = messages(40, seed=1).texts
    blocks = made.blocks.nearest(queries)
    assert len(made.blocks) == len(set(blocks.tolist())) == (1 if layout == "shared" else 4)
    assert all(len(made.blocks[block]) > 3 for block in range(len(made.blocks)))
    compared = 0
    for query, block, prompt in zip(queries, blocks.tolist(), made.prompts(queries), strict=True):
        if query in made.pool.data.texts:
            continue
        compared += 1
        head = begin(made, block)
        assert list(prompt.tokens[: len(head)]) == head
        assert prompt.selection.fixed == len(made.blocks[block])
        assert prompt.selection.rows[: prompt.selection.fixed] == made.blocks[block].tolist()
        own = prompt.selection.rows[prompt.selection.fixed :]
        assert len(set(prompt.selection.rows)) == len(prompt.selection.rows)
        assert bool(own) == (layout == "mixed")
        assert len(prompt.tokens) - len(head) < 60 or layout == "mixed"
    assert compared > 20


def test_a_query_goes_to_the_block_of_the_nearest_centre():
    made = program("clustered")
    queries = list(messages(40, seed=1).texts)
    nearest = (HashedWords().encode(queries) @ made.blocks.centres.T).argmax(axis=1)
    assert made.blocks.nearest(queries).tolist() == nearest.tolist()


@every_layout
def test_a_prompt_does_not_depend_on_the_other_queries(layout):
    made = program(layout)
    queries = [*messages(20, seed=2).texts, *NASTY[:5]]
    assert [prompt.tokens for prompt in made.prompts(queries)] == [made.prompts([q])[0].tokens for q in queries]


@every_layout
def test_sorted_prompts_of_a_block_stand_together(layout):
    """What batches and the line of the server rest on: their order is that of the tokens."""
    made = program(layout)
    queries = [text for text in messages(40, seed=1).texts if text not in made.pool.data.texts]
    prompts = [np.array(prompt.tokens) for prompt in made.prompts(queries)]
    order = sorted(range(len(queries)), key=lambda i: prompts[i].tolist())
    blocks = made.blocks.nearest(queries).tolist()
    changes = [(i, j) for i, j in pairwise(order) if blocks[i] != blocks[j]]
    assert len(changes) == len(set(blocks)) - 1
    for i, j in pairwise(order):
        if blocks[i] == blocks[j]:
            assert common_prefix(prompts[i], prompts[j]) >= len(begin(made, blocks[i]))


# Budgets and cache blocks


@settings(deadline=None, max_examples=40)
@given(
    budget=st.integers(80, 1200),
    layout=st.sampled_from(LAYOUTS),
    shots=st.none() | st.integers(0, 12),
    cache_block=st.sampled_from([1, 16, 128]),
    share=st.floats(0.1, 0.9),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=90),
)
def test_a_budget_is_never_exceeded(budget, layout, shots, cache_block, share, text):
    made = program(layout, budget=budget, shots=shots, cache_block=cache_block, block_share=share)
    longest = max(map(len, made.label_words))
    query = len(made.template.template.query(text).encode())
    if INSTRUCTION + query + longest > budget:
        with pytest.raises(BudgetError):
            made.prompts([text])
        return
    [prompt] = made.prompts([text])
    rows = prompt.selection.rows
    whole = sum(int(made.pool.offsets[row + 1] - made.pool.offsets[row]) for row in rows)
    assert len(prompt.tokens) == INSTRUCTION + whole + query
    assert len(prompt.tokens) + longest <= budget
    assert len(set(rows)) == len(rows) <= (budget if shots is None else shots)


def test_a_long_query_shortens_the_block_from_its_end():
    made = program("shared", budget=600)
    short, long = made.prompts(["x", "x" * 300])
    assert 0 < long.selection.fixed < short.selection.fixed
    assert long.selection.rows == short.selection.rows[: long.selection.fixed]
    assert long.selection.too_long == short.selection.fixed - long.selection.fixed


@pytest.mark.parametrize("cache_block", [16, 64, 128])
def test_blocks_end_where_cache_blocks_end(cache_block):
    made = program("clustered", messages(600), cache_block=cache_block, budget=1024)
    for block in range(len(made.blocks)):
        length = len(begin(made, block))
        assert length % cache_block <= 2
        assert length > 1024 - 2 * cache_block - 100


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(0, 9),
    st.integers(1, 64),
)
def test_filling_keeps_its_promises(tokens, head, room, shots, cache_block):
    sizes = np.array(tokens, dtype=np.int64)
    taken = fill(np.arange(len(tokens)), sizes, head=head, room=room, shots=shots, cache_block=cache_block)
    used = sum(tokens[row] for row in taken)
    assert used <= room
    assert len(set(taken)) == len(taken) <= shots
    # No exchange of one shot, and no one more, would leave fewer tokens behind the last whole cache block.
    plain = fill(np.arange(len(tokens)), sizes, head=head, room=room, shots=shots, cache_block=1)
    assert bool(plain) == (shots > 0 and min(tokens) <= room)


# No query stands in its own prompt


@every_layout
def test_a_query_never_retrieves_itself_even_from_a_block(layout):
    made = program(layout)
    texts = made.pool.data.texts
    block_of = made.blocks.nearest([f" {text.upper()} " for text in texts]).tolist()
    inside = 0
    for row, text in enumerate(texts):
        [prompt] = made.prompts([f" {text.upper()} "])
        assert row not in prompt.selection.rows
        block = made.blocks[block_of[row]].tolist()
        if row in block:
            inside += 1
            assert prompt.selection.itself >= 1
            fixed = prompt.selection.rows[: prompt.selection.fixed]
            assert fixed == [other for other in block if other != row][: len(fixed)]
            assert len(fixed) >= len(block) - 2
    assert inside > 5


@every_layout
def test_test_texts_leave_the_blocks_with_the_pool(layout):
    made = program(layout)
    gone = [made.pool.data.texts[row] for row in made.blocks[0]]
    cut, dropped = without_rows(made, gone)
    assert dropped == len(gone)
    assert not {cut.pool.data.texts[row] for row in cut.blocks.rows} & set(gone)
    fresh = program(layout, cut.pool.data)
    queries = messages(10, seed=3).texts
    assert [p.tokens for p in cut.prompts(queries)] == [p.tokens for p in fresh.prompts(queries)]
    assert cut.expected == fresh.expected


# On disk


@every_layout
@pytest.mark.parametrize("retriever", ["dense", "bm25"])
def test_a_program_with_blocks_reloads_to_the_same_prompts_and_bytes(layout, retriever, tmp_path):
    made = program(layout, retriever=retriever)
    save_program(made, tmp_path / "first")
    save_program(program(layout, retriever=retriever), tmp_path / "second")
    loaded = load_program(tmp_path / "first")
    queries = messages(20, seed=4).texts
    assert [prompt.tokens for prompt in loaded.prompts(queries)] == [p.tokens for p in made.prompts(queries)]
    assert (loaded.settings, loaded.expected) == (made.settings, made.expected)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second


def test_blocks_of_another_pool_are_refused(tmp_path):
    made = program("shared")
    object.__setattr__(made.blocks, "rows", made.blocks.rows + 1000)
    save_program(made, tmp_path / "program")
    with pytest.raises(ArtifactError, match="a block holds a row that is none of the"):
        load_program(tmp_path / "program")


# What is to be expected


def test_tokens_computed_with_a_cache_are_those_of_vllm():
    a, b = list(range(100)), [*range(32), *range(200, 240)]
    assert computed_tokens([a, a, b, b[:33], b[:32]], cache_block=16).tolist() == [100, 4, 40, 1, 16]
    assert computed_tokens([b], cache_block=16, held=[a[:40]]).tolist() == [40]
    assert computed_tokens([a[1:]], cache_block=16, held=[a]).tolist() == [99]
    assert computed_tokens([], cache_block=16).tolist() == []


def test_fixed_blocks_are_expected_to_save_most_tokens():
    plain = compile_program(messages(600), model="echo", shots=16, budget=1024)
    for layout in ("shared", "clustered"):
        made = program(layout, messages(600), budget=1024)
        assert made.expected.computed_tokens * 3 < plain.expected.computed_tokens
        # Held against prompts nobody had seen.
        queries = [text for text in messages(80, seed=9).texts if text not in made.pool.data.texts]
        held = [begin(made, block) for block in range(len(made.blocks))]
        found = computed_tokens([p.tokens for p in made.prompts(queries)], cache_block=16, held=held)
        assert found.mean() == pytest.approx(made.expected.computed_tokens, rel=0.15)
    assert program("mixed").expected.prompt_tokens <= 900


def test_shots_are_the_most_in_the_whole_prompt():
    assert {p.selection.fixed for p in program("clustered", shots=6).prompts(["card late", "refund"])} == {6}
    [prompt] = program("mixed", shots=8, block_share=0.5).prompts(["card late soon"])
    assert (prompt.selection.fixed, len(prompt.selection.rows)) == (4, 8)
    assert program("mixed", shots=0).prompts(["card"])[0].selection.rows == []


def test_an_explanation_names_the_block():
    shown = program("mixed").explain("card late soon")
    assert shown.shots[0].why.startswith("one of the fixed block ")
    assert shown.shots[0].why.endswith(" of 4")
    assert "by dense (cosine similarity)" in shown.shots[-1].why


@every_layout
def test_pools_of_no_row_one_and_copies(layout):
    assert program(layout, examples=0).prompts(["x"])[0].selection.rows == []
    one = program(layout, customers().take([0]))
    assert one.prompts(["x"])[0].selection.rows == [0]
    copies = Dataset(("same words",) * 9 + ("other",) * 9, tuple("abcabcabc" * 2), "classification", "copies")
    assert len(program(layout, copies, shots=18).prompts(["x"])[0].selection.rows) == 18


def test_random_shots_instead_stand_in_no_block():
    made = _with_random_shots(program("clustered", retriever="dense", shots=5))
    assert made.prompts(["x"])[0].selection.fixed == 0
    assert with_pool(made, customers().take([0, 4, 8])).blocks is None


@pytest.mark.parametrize("wrong", [{"clusters": 0}, {"cache_block": 0}, {"block_share": 1.0}, {"block_share": 0.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(DataError, match="should be >= 1 and block_share lie between 0 and 1"):
        program("mixed", **wrong)
