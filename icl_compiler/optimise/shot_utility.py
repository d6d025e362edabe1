"""Learn which shots help: the model is asked about held-out rows with one shot each, and a reranker is fitted.

- A shot is worth the log-probability of the right answer behind it alone (EPR, Rubin et al. 2022, arXiv 2112.08633,
  equation 3), one prompt each. Of the candidates that a reranker will see, a few are drawn at random for every query,
  so that near and far ones are known from one budget.
- What is predicted is how much a candidate gives more than the others of the same query: how hard the query is does not
  count. Ridge regression; its penalty has the lowest error on queries left out (five folds).
- A row that helped other queries may help this one: its mean advantage, as if it had given nothing four times more.
  In training the query's own answer is left out of that mean.
- Queries here are none of those by which variants are judged: the caller keeps them apart.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from icl_compiler.compile import with_dense
from icl_compiler.errors import DataError
from icl_compiler.optimise.judges import Judge
from icl_compiler.program import SAME_FOR_ALL, Program
from icl_compiler.reranker import Reranker
from icl_compiler.selection import candidates, joined

SHOTS_PER_QUERY = 8
"""Single shots that are tried for each query."""
LEAST_QUERIES = 10
_LEAST_CANDIDATES = 32
_SHRUNK = 4.0
_FOLDS = 5
_PENALTIES = np.logspace(-3, 4, 15)


class Learned(NamedTuple):
    """A reranker, and how it was learned.

    Attributes:
        told: a row for the trace, with the correlation of predicted and measured advantages on queries that were left
            out, in [-1, 1].
    """

    reranker: Reranker
    told: dict[str, Any]


class Utilities(NamedTuple):
    """What single shots are worth, for each query a few.

    Attributes:
        rows: of the shots.
        seen: what a reranker sees of them.
        worth: log-probability of the right answer, in nats.
    """

    rows: Int64[np.ndarray, "queries shots"]
    seen: Float[np.ndarray, "queries shots seen"]
    worth: Float[np.ndarray, "queries shots"]


def learn_reranker(program: Program, judge: Judge, rows: Int64[np.ndarray, " queries"], *, seed: int) -> Learned:
    """The reranker of `program`, from single shots for these `rows` of its pool.

    Raises:
        DataError: if the program has the same shots for all texts, if there are fewer than ten queries, or fewer than
            two candidates for a query.
        OutOfTime: if the time is up before all were asked.
    """
    if program.settings.retriever in SAME_FOR_ALL:
        raise DataError(f"{program.settings.retriever} finds the same shots for all texts, none to choose among")
    if len(rows) < LEAST_QUERIES:
        raise DataError(f"{len(rows)} queries are too few to learn a reranker from, expected {LEAST_QUERIES} or more")
    program = with_dense(program)
    wanted = max(_LEAST_CANDIDATES, candidates(program.settings.shots, len(program.pool.data)))
    wanted = min(wanted, len(program.pool.data))
    tried = _measured(program, judge, rows, wanted, np.random.default_rng(seed))
    weights, correlation = fit(tried)
    reranker = Reranker(wanted, weights, _helpful(tried, len(program.pool.data)))
    told: dict[str, Any] = {
        "note": f"reranker: {reranker.describe()}; learned from {tried.worth.size:,} single shots for {len(rows)} rows "
        f"that no race asks; on rows left out, what it predicts and what was measured correlate by {correlation:.2f}",
        "prompts": tried.worth.size,
        "correlation": round(correlation, 4),
    }
    return Learned(reranker, told)


def fit(tried: Utilities) -> tuple[Float[np.ndarray, " features"], float]:
    """Weights of the features, and the correlation of what they predict with what was measured, on queries left out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict

    queries, shots = tried.worth.shape
    features = np.concatenate([tried.seen, _helpful_to_others(tried)[:, :, None]], axis=2)
    x = (features - features.mean(axis=1, keepdims=True)).reshape(queries * shots, -1)
    y = (tried.worth - tried.worth.mean(axis=1, keepdims=True)).ravel()
    scale = x.std(axis=0)
    scale[scale < 1e-9] = np.inf  # what never differs says nothing
    x = x / scale
    group = np.repeat(np.arange(queries), shots)
    folds = list(GroupKFold(_FOLDS).split(x, y, group))
    model = RidgeCV(_PENALTIES, fit_intercept=False, cv=folds, scoring="neg_mean_squared_error").fit(x, y)
    predicted = cross_val_predict(RidgeCV([model.alpha_], fit_intercept=False), x, y, cv=folds)
    spread = float(predicted.std() * y.std())
    correlation = float(((predicted - predicted.mean()) * (y - y.mean())).mean() / spread) if spread > 1e-12 else 0.0
    return model.coef_.astype(np.float64) / scale, correlation


def _measured(
    program: Program, judge: Judge, rows: Int64[np.ndarray, " queries"], wanted: int, draw: np.random.Generator
) -> Utilities:
    """Ask the model about single shots."""
    data, template, pool = program.pool.data, program.template, program.pool
    texts = [data.texts[row] for row in rows.tolist()]
    hits = program.found(texts, wanted)
    seen, itself = program.seen(texts, hits)
    ids = np.broadcast_to(hits.ids, itself.shape)
    queries = template.queries(texts)
    answer = max((len(word) for word in program.label_words), default=0)
    room = program.settings.budget - len(template.head) - answer - np.array([len(query) for query in queries])
    free = ~itself & (np.diff(pool.offsets)[ids] <= room[:, None])
    count = min(SHOTS_PER_QUERY, int(free.sum(axis=1).min()))
    if count < 2:
        raise DataError("fewer than two candidates fit beside a query, so that nothing can be put into another order")
    places = np.sort(np.argsort(np.where(free, draw.random(free.shape), 2.0), axis=1)[:, :count], axis=1)
    shots = np.take_along_axis(ids, places, axis=1)
    prompts = [
        [*template.head, *joined(pool.tokens, pool.offsets, shots[i, j : j + 1]).tolist(), *query]
        for i, query in enumerate(queries)
        for j in range(count)
    ]
    worth = judge.likelihoods(program, prompts, np.repeat(rows, count)).reshape(len(rows), count)
    return Utilities(shots, np.take_along_axis(seen, places[:, :, None], axis=1), worth)


def _advantages(tried: Utilities) -> Float[np.ndarray, "queries shots"]:
    advantages: Float[np.ndarray, "queries shots"] = tried.worth - tried.worth.mean(axis=1, keepdims=True)
    return advantages


def _helpful(tried: Utilities, rows: int) -> Float[np.ndarray, " rows"]:
    given = np.bincount(tried.rows.ravel(), _advantages(tried).ravel(), rows)
    return given / (np.bincount(tried.rows.ravel(), minlength=rows) + _SHRUNK)


def _helpful_to_others(tried: Utilities) -> Float[np.ndarray, "queries shots"]:
    """How helpful each shot was for all queries but this one; no row stands twice in a query's shots."""
    own, rows = _advantages(tried), int(tried.rows.max()) + 1
    given = np.bincount(tried.rows.ravel(), own.ravel(), rows)[tried.rows] - own
    times = np.bincount(tried.rows.ravel(), minlength=rows)[tried.rows] - 1
    helpful: Float[np.ndarray, "queries shots"] = given / (times + _SHRUNK)
    return helpful
