"""Task-specific modules: which of the units that move belong together, by what they serve.

- The *aspects* of a task are its labels, or groups of labels or examples that use the same words: at most 16, for each
  costs a batch. Groups are k-means clusters of tf-idf vectors of the prompts' tokens, so that the words of the
  instruction, which all share, do not count.
- The matrix of gradient norms (unit x aspect) is co-clustered (Dhillon 2001): units and aspects fall into modules
  together. Aspects keep their module; a unit that enters later goes where the aspects are that it serves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from evaluation.reference.objective import TrainingExample

MOST_ASPECTS = 16


class Modules(NamedTuple):
    """The module of every unit, and of every aspect, from 0."""

    units: Int[np.ndarray, " units"]
    aspects: Int[np.ndarray, " aspects"]


def aspects_of(
    examples: Sequence[TrainingExample], labels: Sequence[str] = (), *, seed: int
) -> Int[np.ndarray, " examples"]:
    """The aspect of each example, from 0.

    Args:
        labels: of the examples, or none; examples of one label are of one aspect.

    >>> aspects_of([TrainingExample([5], [1])] * 3, ["b", "a", "b"], seed=0).tolist()
    [1, 0, 1]
    """
    groups = np.unique(labels, return_inverse=True)[1] if len(labels) else np.arange(len(examples))
    count = int(groups.max()) + 1
    if count <= MOST_ASPECTS:
        return groups
    from scipy.sparse import csr_array
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfTransformer

    tokens = np.concatenate([np.asarray(example.prompt, dtype=np.int32) for example in examples])
    rows = np.repeat(groups.astype(np.int32), [len(example.prompt) for example in examples])
    counts = csr_array((np.ones(len(tokens)), (rows, tokens)), shape=(count, int(tokens.max()) + 1))
    clusters = KMeans(MOST_ASPECTS, n_init=3, random_state=seed).fit_predict(TfidfTransformer().fit_transform(counts))
    return np.unique(clusters, return_inverse=True)[1][groups]


def co_cluster(norms: Float[np.ndarray, "units aspects"], count: int, *, seed: int) -> Modules:
    """`count` modules of units and aspects, so that units have little gradient from other modules' aspects.

    Args:
        norms: of the gradient by each unit on examples of each aspect, at least 0.
        count: at least 2, at most the number of units and of aspects.

    >>> co_cluster(np.array([[9.0, 0.1], [0.1, 9.0], [8.0, 0.1]]), 2, seed=0).units.tolist() in ([0, 1, 0], [1, 0, 1])
    True
    """
    from sklearn.cluster import SpectralCoclustering

    found = SpectralCoclustering(count, random_state=seed).fit(_without_zeros(norms))
    return Modules(found.row_labels_.astype(np.int64), found.column_labels_.astype(np.int64))


def modules_of(
    norms: Float[np.ndarray, "units aspects"], aspects: Int[np.ndarray, " aspects"]
) -> Int[np.ndarray, " units"]:
    """The module of each unit, where those of the aspects are known: the one whose aspects it serves most.

    >>> modules_of(np.array([[5.0, 0.0, 1.0], [0.0, 2.0, 8.0]]), np.array([1, 0, 0])).tolist()
    [1, 0]
    """
    served = norms / _without_zeros(norms).sum(axis=0)
    known = np.unique(aspects)
    found: Int[np.ndarray, " units"] = known[
        np.stack([served[:, aspects == module].mean(axis=1) for module in known]).argmax(axis=0)
    ]
    return found


def _without_zeros(norms: Float[np.ndarray, "units aspects"]) -> Float[np.ndarray, "units aspects"]:
    """The same, with something in every row and column, as sums are divided by."""
    return norms.astype(np.float64) + max(1e-9 * float(norms.mean()), 1e-30)
