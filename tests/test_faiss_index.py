"""The three kinds of index against every cosine computed by numpy; their files, their determinism, their limits."""

import faiss
import numpy as np
import pytest
from toys import in_a_new_process

from retrievers import faiss_index
from retrievers.faiss_index import load_index, nearest, new_index, save_index, vectors_of

ROWS, WIDTH = 3000, 32
KINDS = {"exact": "IndexFlatIP", "graph": "IndexHNSWFlat", "lists": "IndexIVFFlat"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def points(rows, seed=0):
    """Vectors of length 1 around sixty centres, as sentences stand around their topics."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(60, WIDTH))
    made = centres[rng.integers(60, size=rows)] + 0.7 * rng.normal(size=(rows, WIDTH))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def limit(patch, kind, rows=ROWS):
    """Make `kind` the index for so many rows."""
    patch.setattr(faiss_index, "_EXACT_ROWS", rows if kind == "exact" else rows - 1)
    patch.setattr(faiss_index, "_GRAPH_ROWS", rows if kind == "graph" else rows - 1)


@pytest.fixture
def made(kind, monkeypatch):
    limit(monkeypatch, kind)
    return new_index(points(ROWS), seed=0)


@every_kind
def test_the_number_of_rows_chooses_the_index(kind, made):
    assert type(made).__name__ == KINDS[kind]
    assert made.ntotal == ROWS


@every_kind
def test_recall_and_exact_scores(kind, made):
    queries, rows = points(200, seed=1), points(ROWS)
    cosines = queries.astype(np.float64) @ rows.T.astype(np.float64)
    best = np.argsort(-cosines, axis=1)[:, :10]
    ids, scores = nearest(made, queries, 10)
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), best.tolist(), strict=True)])
    assert found == 1 if kind == "exact" else found >= 0.95
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, ids, axis=1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in ids.tolist())


@every_kind
def test_all_rows_are_found_where_all_are_asked_for(kind, made):
    ids, scores = nearest(made, points(3, seed=1), ROWS + 5)
    assert (np.sort(ids, axis=1) == np.arange(ROWS)).all()
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("copies", [2, 100])
@every_kind
def test_copies_of_a_row_are_rows_of_their_own(kind, copies, monkeypatch):
    limit(monkeypatch, kind, rows=500)
    different = points(500 // copies)
    index = new_index(np.repeat(different, copies, axis=0), seed=0)
    # Copies fill the links of a graph, which then leads nowhere else.
    assert type(index).__name__ == KINDS["lists" if (kind, copies) == ("graph", 100) else kind]
    ids, scores = nearest(index, different, copies)
    assert (ids == np.arange(500).reshape(-1, copies)).all()
    assert (np.ptp(scores, axis=1) == 0).all()
    assert (np.sort(nearest(index, different[:1], 500).ids) == np.arange(500)).all()
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "lists"])
def test_the_first_of_more_equal_rows_than_faiss_was_asked_for(kind, monkeypatch):
    limit(monkeypatch, kind)
    vectors = points(ROWS)
    copies = np.random.default_rng(0).permutation(ROWS)[:2000]
    vectors[copies] = vectors[copies[0]]
    hits = nearest(new_index(vectors, seed=0), vectors[copies[:2]], 700)
    assert hits.ids.tolist() == [sorted(copies.tolist())[:700]] * 2


@every_kind
def test_a_score_is_the_same_alone_and_among_others(kind, made):
    queries = points(64, seed=1)
    together = nearest(made, queries, 10)
    for query in range(64):
        ids, scores = nearest(made, queries[query : query + 1], 10)
        assert ids[0].tolist() == together.ids[query].tolist()
        assert scores[0].tolist() == together.scores[query].tolist()


@every_kind
def test_blocks_of_queries_change_nothing(kind, made, monkeypatch):
    queries = points(50, seed=1)
    whole = nearest(made, queries, 10)
    monkeypatch.setattr(faiss_index, "_FLOATS", 1)
    monkeypatch.setattr(faiss_index, "_PAIRS", 200)
    one_by_one = nearest(made, queries, 10)
    assert (whole.ids.tolist(), whole.scores.tolist()) == (one_by_one.ids.tolist(), one_by_one.scores.tolist())


@every_kind
def test_the_vectors_of_rows(kind, made):
    ids = np.array([[5, 2999], [0, 5]])
    assert vectors_of(made, ids).tolist() == points(ROWS)[ids].tolist()


@every_kind
def test_kept_and_read_again(kind, made, tmp_path):
    save_index(made, tmp_path)
    again = load_index(tmp_path)
    ids, scores = nearest(made, points(50, seed=1), 10)
    ids_again, scores_again = nearest(again, points(50, seed=1), 10)
    assert ids.tolist() == ids_again.tolist()
    assert scores.tolist() == scores_again.tolist()
    assert vectors_of(again, ids[:2]).tolist() == vectors_of(made, ids[:2]).tolist()
    assert type(again) is type(made)


ELSEWHERE = """
import os, sys
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = sys.argv[3]
from pathlib import Path
import pytest
from test_faiss_index import ROWS, limit, points
from retrievers.faiss_index import nearest, new_index, save_index
with pytest.MonkeyPatch.context() as patch:
    limit(patch, sys.argv[1])
    index = new_index(points(ROWS), seed=0)
save_index(index, Path(sys.argv[2]))
print([part.tolist() for part in nearest(index, points(50, seed=1), 10)])
"""


@every_kind
def test_another_process_with_other_threads_makes_the_same_bytes(kind, made, tmp_path):
    save_index(made, tmp_path)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for threads in (1, 3):
        there = tmp_path / f"{threads}"
        there.mkdir()
        ids, scores = in_a_new_process(ELSEWHERE, kind, there, threads)
        assert {path.name: path.read_bytes() for path in there.iterdir()} == expected
        assert [ids, scores] == [part.tolist() for part in nearest(made, points(50, seed=1), 10)]


def test_the_seed_counts_where_something_is_drawn(monkeypatch):
    limit(monkeypatch, "lists")
    first, second = (new_index(points(ROWS), seed=seed) for seed in (0, 1))
    assert first.quantizer.reconstruct(0).tolist() != second.quantizer.reconstruct(0).tolist()
    assert new_index(points(ROWS), seed=-1).ntotal == ROWS


def test_the_number_of_threads_is_put_back():
    before = faiss.omp_get_max_threads()
    with pytest.raises(KeyError), faiss_index.one_thread():
        assert faiss.omp_get_max_threads() == 1
        raise KeyError
    assert faiss.omp_get_max_threads() == before


def test_no_rows_and_no_queries():
    empty = new_index(np.empty((0, 0), dtype=np.float32), seed=0)
    assert nearest(empty, points(2), 5).ids.shape == (2, 0)
    assert nearest(new_index(points(10), seed=0), points(0), 5).ids.shape == (0, 5)


def test_vectors_of_another_encoder_are_refused_in_words():
    with pytest.raises(ValueError, match="holds vectors of 32 numbers, and the encoder gives 16"):
        nearest(new_index(points(10), seed=0), points(2)[:, :16], 5)


def test_files_that_are_no_index_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_index(tmp_path)
    np.save(tmp_path / "vectors.npy", np.zeros(5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"vectors.npy holds float32 of shape \(5,\), expected rows of float32"):
        load_index(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"index\.faiss is damaged"):
        load_index(tmp_path)
    faiss.write_index(faiss.IndexFlatL2(4), str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match=r"index\.faiss holds a IndexFlatL2, which is not an index of ours"):
        load_index(tmp_path)
