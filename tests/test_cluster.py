"""Clusters: each row is where its centre is, the query's own cluster comes first, the nearest of it first."""

import numpy as np
import pytest
from hashed_words import HashedWords
from test_votek import Places
from toys import customers

from retrievers.cluster import Cluster, k_means
from retrievers.retriever import Resources

ROWS = 400


def blobs(seed=0):
    """Twenty directions, each with as many rows as a cluster has on average, and the direction of each row."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(20), 20))
    made = np.eye(20, 24)[which] + 0.1 * rng.normal(size=(ROWS, 24))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32), which


def fitted(vectors, seed=0):
    retriever = Cluster(Resources(seed=seed, encoder=Places(vectors)))
    retriever.fit([str(row) for row in range(len(vectors))])
    return retriever


def test_each_row_belongs_to_the_nearest_centre():
    vectors, _ = blobs()
    centres, clusters = k_means(vectors, seed=0)
    assert centres.shape == (20, 24)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    cosines = vectors @ centres.T
    np.testing.assert_allclose(cosines[np.arange(ROWS), clusters], cosines.max(axis=1), atol=1e-6)
    # A centre is the direction of the sum of its rows: k-means has arrived.
    for cluster in np.unique(clusters):
        total = vectors[clusters == cluster].sum(axis=0)
        np.testing.assert_allclose(centres[cluster], total / np.linalg.norm(total), atol=0.05)


def test_rows_come_cluster_by_cluster_and_the_nearest_first():
    vectors, _ = blobs()
    retriever = fitted(vectors)
    centres, clusters = k_means(vectors, seed=0)
    queries = [str(row) for row in range(0, ROWS, 37)]
    for k in (1, 15, 60, ROWS):
        hits = retriever.search(queries, k)
        for query, ids, scores in zip(queries, *hits, strict=True):
            vector = vectors[int(query)].astype(float)
            centre_rank = {cluster: rank for rank, cluster in enumerate(np.argsort(-(centres @ vector)).tolist())}
            rank = np.array([centre_rank[cluster] for cluster in clusters.tolist()])
            expected = vectors.astype(float) @ vector - 2 * rank
            np.testing.assert_allclose(scores, np.sort(expected)[::-1][:k], atol=1e-5)
            np.testing.assert_allclose(scores, expected[ids], atol=1e-5)


def test_the_query_s_theme_is_kept_where_clusters_are_plain():
    vectors, which = blobs()
    hits = fitted(vectors).search([str(row) for row in range(ROWS)], 10)
    assert np.mean(which[hits.ids] == which[:, None]) > 0.9


@pytest.mark.parametrize(("rows", "clusters"), [(0, 0), (1, 1), (2, 1), (3, 2), (12, 3), (400, 20)])
def test_how_many_clusters(rows, clusters):
    centres, where = k_means(blobs()[0][:rows], seed=0)
    assert (len(centres), len(where)) == (clusters, rows)


def test_the_seed_counts():
    vectors, _ = blobs()
    assert k_means(vectors, seed=5)[0].tolist() == k_means(vectors, seed=5)[0].tolist()
    assert k_means(vectors, seed=5)[0].tolist() != k_means(vectors, seed=6)[0].tolist()
    assert len(k_means(vectors, seed=-1)[0]) == len(k_means(vectors, seed=2**40)[0]) == 20


def test_fewer_different_rows_than_clusters():
    vectors = HashedWords().encode(["a b"] * 30)
    retriever = Cluster(Resources(seed=0, encoder=HashedWords()))
    retriever.fit(["a b"] * 30)
    assert len(np.unique(k_means(vectors, seed=0)[1])) >= 1
    assert sorted(retriever.search([customers().texts[0]], 30).ids[0].tolist()) == list(range(30))
