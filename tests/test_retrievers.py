"""What every retriever promises, for every name of the table: a new one needs no new test."""

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, customers, in_a_new_process

from icl_compiler.registry import RETRIEVERS, resolve
from retrievers.retriever import Encoder, Resources, Retriever

POOL = [*customers().texts, *NASTY, "the parcel is late", "!?"]
QUERIES = ["my card is lost", "", "the parcel is late", "zzz unknown words", *NASTY]
every_retriever = pytest.mark.parametrize("name", list(RETRIEVERS))


def fitted(name, texts, seed=0):
    retriever = resolve("retriever", RETRIEVERS, name)(Resources(seed=seed, encoder=HashedWords()))
    retriever.fit(texts)
    return retriever


def lists(hits):
    return hits.ids.tolist(), hits.scores.tolist()


@every_retriever
def test_it_is_a_retriever_and_says_what_its_scores_mean(name):
    assert isinstance(HashedWords(), Encoder)
    retriever = fitted(name, POOL)
    assert isinstance(retriever, Retriever)
    assert retriever.score_meaning.strip()


@every_retriever
@pytest.mark.parametrize("k", [1, 5, len(POOL) - 1, len(POOL), len(POOL) + 1, 1000])
def test_results_are_rows_once_each_best_first(name, k):
    ids, scores = fitted(name, POOL).search(QUERIES, k)
    assert ids.shape == scores.shape == (len(QUERIES), min(k, len(POOL)))
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    assert ids.min() >= 0
    assert ids.max() < len(POOL)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@every_retriever
def test_fewer_results_are_the_best_of_more_results(name):
    retriever = fitted(name, POOL)
    all_ids, all_scores = retriever.search(QUERIES, len(POOL))
    for k in range(1, len(POOL)):
        ids, scores = retriever.search(QUERIES, k)
        # Of equal scores at the end, any may be taken.
        assert scores.tolist() == all_scores[:, :k].tolist()
        for query in range(len(QUERIES)):
            score_of = dict(zip(all_ids[query].tolist(), all_scores[query].tolist(), strict=True))
            assert [score_of[row] for row in ids[query].tolist()] == scores[query].tolist()


@every_retriever
def test_a_result_does_not_depend_on_the_other_queries(name):
    retriever = fitted(name, POOL)
    together = retriever.search(QUERIES * 3, 7)
    for row, query in enumerate(QUERIES * 3):
        alone = retriever.search([query], 7)
        assert alone.ids[0].tolist() == together.ids[row].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-6, atol=1e-6)


@every_retriever
@pytest.mark.parametrize("pool", [[], ["only one"], [""], ["!"]], ids=repr)
def test_pools_of_no_row_or_one(name, pool, tmp_path):
    retriever = fitted(name, pool)
    assert retriever.search(["query", ""], 5).ids.tolist() == [list(range(len(pool)))] * 2
    retriever.save(tmp_path)
    again = fitted(name, ["something", "else"])
    again.load(tmp_path)
    assert lists(again.search(["query", ""], 5)) == lists(retriever.search(["query", ""], 5))


@every_retriever
def test_no_rows_asked_for(name):
    ids, scores = fitted(name, POOL).search(QUERIES, 0)
    assert ids.shape == scores.shape == (len(QUERIES), 0)
    assert fitted(name, []).search([], 0).ids.shape == (0, 0)


@every_retriever
def test_copies_of_a_row_are_rows_of_their_own(name):
    retriever = fitted(name, ["a b"] * 6 + ["c d"] * 3 + ["", ""])
    for k in (1, 4, 11, 12):
        ids, scores = retriever.search(["a b", "c", "nothing of it", ""], k)
        assert all(len(set(row)) == min(k, 11) for row in ids.tolist())
        assert (np.diff(scores, axis=1) <= 0).all()
        assert np.isfinite(scores).all()


@every_retriever
def test_no_queries(name):
    ids, scores = fitted(name, POOL).search([], 5)
    assert ids.shape == scores.shape == (0, 5)


@every_retriever
def test_the_same_input_gives_the_same_result(name):
    first, second = fitted(name, POOL, seed=7), fitted(name, POOL, seed=7)
    assert lists(first.search(QUERIES, 9)) == lists(second.search(QUERIES, 9))
    assert lists(first.search(QUERIES, 9)) == lists(first.search(QUERIES, 9))


@every_retriever
def test_a_second_fit_replaces_the_first(name):
    retriever = fitted(name, ["something", "quite", "different"])
    retriever.fit(POOL)
    assert lists(retriever.search(QUERIES, 9)) == lists(fitted(name, POOL).search(QUERIES, 9))


@every_retriever
@settings(deadline=None, max_examples=25)
@given(
    pool=st.lists(st.text(max_size=8), max_size=8),
    queries=st.lists(st.text(max_size=8), max_size=3),
    k=st.integers(1, 9),
)
def test_any_text_can_be_pool_and_query(name, pool, queries, k):
    ids, scores = fitted(name, pool).search(queries, k)
    assert ids.shape == scores.shape == (len(queries), min(k, len(pool)))
    assert all(len(set(row)) == len(row) and set(row) <= set(range(len(pool))) for row in ids.tolist())


NEW_PROCESS = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "3"  # before they are read
from pathlib import Path
from hashed_words import HashedWords
from icl_compiler.registry import RETRIEVERS, resolve
from retrievers.retriever import Resources
from test_retrievers import POOL, QUERIES

found = {}
for name in RETRIEVERS:
    made = resolve("retriever", RETRIEVERS, name)(Resources(seed=0, encoder=HashedWords()))
    made.load(Path(sys.argv[1], name))
    hits = made.search(QUERIES, 9)
    made.fit(POOL)
    Path(sys.argv[2], name).mkdir()
    made.save(Path(sys.argv[2], name))
    found[name] = [hits.ids.tolist(), hits.scores.tolist()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Every retriever saved here, then loaded, asked, fitted and saved in a process with other hashes and threads."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    for name in RETRIEVERS:
        (here / name).mkdir()
        fitted(name, POOL).save(here / name)
    return here, there, in_a_new_process(NEW_PROCESS, here, there, hash_seed=12345)


@every_retriever
def test_a_new_process_finds_the_same(name, elsewhere):
    _, _, found = elsewhere
    assert tuple(found[name]) == lists(fitted(name, POOL).search(QUERIES, 9))


@every_retriever
def test_another_process_writes_the_same_bytes(name, elsewhere):
    here, there, _ = elsewhere

    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(here / name) == contents(there / name) != {}
