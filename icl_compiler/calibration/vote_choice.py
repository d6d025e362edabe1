"""Which vote of the neighbours is best: by the log-loss of rows of a pool, each left out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from icl_compiler.calibration.held_out import log_loss
from icl_compiler.calibration.votes import Vote, Voters, law_of_votes, smoothed, voters_of
from icl_compiler.data import normalise_text
from retrievers.retriever import Retriever

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
VOTES = tuple(Vote(k, sharpness) for k in _COUNTS for sharpness in (0.0, 10.0, 20.0, 40.0, 80.0))
"""What is tried: so many rows, alike or by exp(sharpness * cosine)."""
LEFT_OUT = 1000
"""Rows of the pool that are left out, each in turn; of a larger pool that many at random."""
MOST = _COUNTS[-1]
"""Voters."""
_SPARE = 8  # rows more than vote, of which some may have the query's own text
_SURE = 0.01  # of a law is spread over all labels before its log-loss is taken: nobody is sure after a few votes


def drawn_rows(rows: int) -> Int64[np.ndarray, " drawn"]:
    """Those of a pool that are left out, each in turn."""
    every = np.arange(rows)
    return every if rows <= LEFT_OUT else np.random.default_rng(0).permutation(every)[:LEFT_OUT]


def voters_among(
    index: Retriever,
    texts: Sequence[str],
    answers: Int64[np.ndarray, " rows"],
    queries: Sequence[str],
    most: int = MOST,
) -> Voters:
    """Who may vote on each query: the rows nearest to it, without those that have its own text.

    Args:
        index: of the pool.
        texts: of the pool, as `normalise_text` gives them.
        answers: number of the label of each.
        most: voters wanted.
    """
    hits = index.search(queries, min(most + _SPARE, len(texts)))
    asked = [normalise_text(query) for query in queries]
    same = [[texts[row] == query for row in ids] for query, ids in zip(asked, hits.ids.tolist(), strict=True)]
    return voters_of(hits, answers, np.array(same, dtype=bool).reshape(hits.ids.shape))


def best_vote(voters: Voters, answers: Int64[np.ndarray, " queries"], labels: int) -> Vote:
    """The vote of lowest log-loss, of equal ones the first of `VOTES`; a single row votes where there are no others.

    >>> voters = Voters(np.array([[0, 1, 1], [1, 0, 0]] * 4), np.array([[0.9, 0.5, 0.5]] * 8))
    >>> best_vote(voters, np.array([0, 1] * 4), 2), best_vote(voters, np.array([1, 0] * 4), 2)
    (Vote(k=1, sharpness=0.0, smoothing=0.0), Vote(k=3, sharpness=0.0, smoothing=0.0))
    """
    tried = [vote for vote in VOTES if vote.k <= voters.labels.shape[1]] or [VOTES[0]]
    return min(tried, key=lambda vote: losses_of_vote(voters, vote, answers, labels).mean())


def losses_of_vote(
    voters: Voters, vote: Vote, answers: Int64[np.ndarray, " queries"], labels: int
) -> Float[np.ndarray, " queries"]:
    """The log-loss of each row's own label, in nats; at most log(100 labels), as a hundredth is spread over all."""
    return log_loss(smoothed(law_of_votes(voters, vote, labels), _SURE), np.eye(labels)[answers])
