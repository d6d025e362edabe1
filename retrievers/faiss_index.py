"""The nearest of many vectors of length 1, by `faiss`: which index for how many rows, and its files.

- Up to 50,000 rows every row is compared, which is exact. Up to 500,000 a graph of neighbours is walked (HNSW,
  Malkov & Yashunin 2018). Beyond that the rows lie in 4·√rows lists by k-means, and the eighth of the lists
  nearest to the query is read, at most 64 of them (IVF, Jégou et al. 2011). Of the ten nearest of 16,000 real texts
  (MiniLM) they find 0.99 and 0.97; the tests hold both to 0.95.
- An approximate index may reach fewer rows than it is asked for; those queries are then compared with every row.
- Copies of a row fill each other's links, and a graph of more copies than links leads nowhere else; a pool with such
  rows gets lists.
- Scores are computed here again, each by itself, for the rows found and some more. So they do not depend on the
  number of threads, nor on the other queries of a batch, and equal vectors have equal scores, in the order of rows.
- An index is built on one thread: on several, the graph would depend on which of them comes first. That takes
  longer (0.2 ms a row for a graph of 16,000), and far less than encoding the texts did.
- Only the approximate indices are kept as files of faiss; an exact one is its vectors.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from jaxtyping import Float32, Int64

from retrievers.retriever import Hits

_EXACT_ROWS = 50_000
_GRAPH_ROWS = 500_000
_LINKS, _WIDTH_OF_BUILD, _WIDTH_OF_WALK = 32, 64, 128
_LISTS_PER_ROOT, _SHARE_OF_LISTS, _MOST_LISTS = 4, 8, 64
_SPARE, _ROUNDING = 8, 1e-6  # faiss may see rows of nearly equal scores in another order
_PAIRS, _FLOATS = 1 << 21, 1 << 20  # of queries and rows, and of vectors, in memory at once
_FILE, _VECTORS = "index.faiss", "vectors.npy"


def new_index(vectors: Float32[np.ndarray, "rows width"], *, seed: int) -> Any:
    """An index of faiss over `vectors`, which have length 1; the same vectors and seed give the same one."""
    import faiss

    rows, width = vectors.shape
    if rows <= _EXACT_ROWS:
        return _exact(vectors)
    index: Any
    with one_thread():
        if rows <= _GRAPH_ROWS and max(Counter(map(crc32, vectors)).values()) <= _LINKS:
            index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = _WIDTH_OF_BUILD, _WIDTH_OF_WALK
            index.add(vectors)
            return index
        lists = _LISTS_PER_ROOT * math.isqrt(rows)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed % 2**31
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
        index.nprobe = min(math.ceil(lists / _SHARE_OF_LISTS), _MOST_LISTS)
        index.train(vectors)
        index.add(vectors)
        index.make_direct_map()
    return index


def nearest(index: Any, queries: Float32[np.ndarray, "queries width"], k: int, *, spare: int = _SPARE) -> Hits:
    """The `k` rows with the highest cosine to each query, equal ones in the order of the rows; all if there are fewer.

    Args:
        spare: how many rows are scored beyond those; where all of them are as near as the last of the `k`, more are.

    Raises:
        ValueError: if the queries are of another width than the rows.
    """
    rows, width = index.ntotal, index.d
    k, asked = min(k, rows), min(k + spare, rows)
    ids = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    if not k or not len(queries):
        return Hits(ids, scores)
    if queries.shape[1] != width:
        raise ValueError(
            f"the index holds vectors of {width} numbers, and the encoder gives {queries.shape[1]}: "
            "it is not the encoder that the index was made with"
        )
    last = np.empty(len(queries), dtype=np.float32)
    step = max(1, _PAIRS // asked)
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        found = _search(index, part, asked)
        cosines = _cosines(index, part, found)
        order = np.lexsort((found, -cosines), axis=1)
        block = slice(start, start + len(part))
        ids[block] = np.take_along_axis(found, order[:, :k], axis=1)
        scores[block] = np.take_along_axis(cosines, order[:, :k], axis=1)
        last[block] = cosines.min(axis=1)
    unclear = (scores[:, -1] - last < _ROUNDING) & (asked < rows)
    if unclear.any():
        ids[unclear], scores[unclear] = nearest(index, queries[unclear], k, spare=4 * spare)
    return Hits(ids, scores)


def vectors_of(index: Any, ids: Int64[np.ndarray, "queries k"]) -> Float32[np.ndarray, "queries k width"]:
    """The vectors of these rows of `index`."""
    vectors: Float32[np.ndarray, "queries k width"] = index.reconstruct_batch(ids.ravel()).reshape(*ids.shape, index.d)
    return vectors


def save_index(index: Any, folder: Path) -> None:
    """Write `index` into `folder`; the same index gives the same bytes."""
    import faiss

    if isinstance(index, faiss.IndexFlat):
        vectors = index.reconstruct_n(0, index.ntotal) if index.ntotal else np.empty((0, 0), dtype=np.float32)
        np.save(folder / _VECTORS, vectors, allow_pickle=False)
    else:
        faiss.write_index(index, str(folder / _FILE))


def load_index(folder: Path) -> Any:
    """Read what `save_index` wrote.

    Raises:
        ValueError: if the file there is not an index, or not one of ours.
        FileNotFoundError: if there is none.
    """
    import faiss

    file = folder / _FILE
    if not file.exists():
        vectors = np.load(folder / _VECTORS, allow_pickle=False)
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise ValueError(f"{_VECTORS} holds {vectors.dtype} of shape {vectors.shape}, expected rows of float32")
        return _exact(vectors)
    try:
        index: Any = faiss.read_index(str(file))
    except RuntimeError as error:
        raise ValueError(f"{_FILE} is damaged: faiss does not read it") from error
    ours = isinstance(index, faiss.IndexHNSWFlat | faiss.IndexIVFFlat)
    if not ours or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"{_FILE} holds a {type(index).__name__}, which is not an index of ours")
    return index


@contextmanager
def one_thread() -> Iterator[None]:
    """In the block faiss computes on one thread, in one order, whatever the machine."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _exact(vectors: Float32[np.ndarray, "rows width"]) -> Any:
    import faiss

    index = faiss.IndexFlatIP(max(1, vectors.shape[1]))
    if len(vectors):
        index.add(vectors)
    return index


def _search(index: Any, queries: Float32[np.ndarray, "queries width"], k: int) -> Int64[np.ndarray, "queries k"]:
    import faiss

    ids: Int64[np.ndarray, "queries k"] = index.search(queries, k)[1]
    short = (ids < 0).any(axis=1)
    if short.any():
        if isinstance(index, faiss.IndexIVF):
            every_list: Any = faiss.SearchParametersIVF()
            every_list.nprobe = index.nlist
            ids[short] = index.search(queries[short], k, params=every_list)[1]
        else:
            ids[short] = index.storage.search(queries[short], k)[1]
    return ids


def _cosines(
    index: Any, queries: Float32[np.ndarray, "queries width"], ids: Int64[np.ndarray, "queries k"]
) -> Float32[np.ndarray, "queries k"]:
    cosines = np.empty(ids.shape, dtype=np.float32)
    step = max(1, _FLOATS // (ids.shape[1] * index.d))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        cosines[block] = np.vecdot(vectors_of(index, ids[block]), queries[block, None])
    return cosines
