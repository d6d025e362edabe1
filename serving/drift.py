"""Drift: are the queries that come still like the data a program was compiled from, and its answers as they were?

Three kinds of alarm, each false at most once in a million queries on average (`FALSE_ALARM_EVERY`), so within n queries
with a probability of at most n / 1,000,000 per kind. A test of fixed level, repeated after every query, would alarm
sooner or later for certain. No drift means that queries come independently from one law; a daily rhythm is drift.

- "unlike": more queries than tolerated are *unlike the pool*: their nearest row is no nearer than that of the remotest
  1 % of the pool's own rows. Looked at after every query, see `ShareDetector`; no window limits it, so clear drift is
  seen after tens of queries, whenever it begins. Tolerated are 5 % where 1 % is expected, since the rows of a pool
  were chosen and freed of duplicates and queries are not; more where a small pool hardly tells its remotest 1 %.
- "labels": the answers are shared out over the labels otherwise than in the first window, by more than a TV of 0.1.
  Looked at after every full window, at the level window / 1,000,000. Not compared with the pool's labels, from which
  answers differ without any drift (with SmolLM2 by 0.04 to 0.5): pools are often balanced, and prompted models lean
  to some labels. That distance is in the state, for people to judge.
- "entropy": how unsure the answers are, as the entropy of "the likeliest label, or anything else" (of the others not
  every request tells the probabilities). Its mean has moved from that of the first window by more than 5 % of the
  largest possible, ln 2; same schedule. Both miss what was there from the first query on; "unlike" does not.

"unlike" stays on until a window has passed without another alarm, the others until the next full window.

Scores are the retriever's own, and not every retriever's say how near a row is. A program has *no distance*, and no
alarm of "unlike", without shots, where over half of the pool's rows score alike or might (uniform and votek, which
answer every query alike; a dozen rows), and where random letters are not found unlike the pool (coverage, which scores
a row by what the rows before it leave: the nearest *other* row stands behind the row itself).

`Shadow` measures the gap between what is served and a reference, on a sample of the queries, beside the serving.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import entr

from evaluation.bounds import eps_tv
from evaluation.gap import gap
from evaluation.intervals import FIXED_BETS, GRID, LARGEST_BET, Interval, betting, clopper_pearson
from evaluation.tv import EXCESS, tv_distance
from icl_compiler.backends.backend import Usage
from icl_compiler.data import normalise_text
from icl_compiler.errors import ServingError
from icl_compiler.predictor import Predictions, Predictor
from icl_compiler.program import Program

Alarm = Literal["unlike", "labels", "entropy"]

FALSE_ALARM_EVERY = 1_000_000
TOLERATED, LABEL_SLACK, ENTROPY_SLACK = 0.05, 0.1, 0.05
# Rows of the pool that are asked for their nearest other row, among so many hits, and the share that counts as remote.
_ROWS, _DEPTH, _REMOTE = 500, 8, 0.01
_BATCH = 8  # texts that a reference is given at once


class Distance(NamedTuple):
    """How near the rows of a pool are to each other, by the retriever's own score (higher is nearer).

    Attributes:
        mean: score of a row's nearest other row.
        threshold: a query with at most this score is unlike the pool.
        tolerated: share of such queries that is no drift, in [0.05, 0.5].
    """

    mean: float
    threshold: float
    tolerated: float


@dataclass(frozen=True)
class Baseline:
    """What queries are compared with: `distance` is `None` if there is none, `label_share` without labels or rows."""

    label_share: Float[np.ndarray, " labels"] | None
    distance: Distance | None

    @classmethod
    def of(cls, program: Program, *, seed: int = 0) -> "Baseline":
        """The baseline of `program`, from 500 rows of its pool at most, which are searched for once."""
        counts = Counter(program.pool.data.answers)
        share = np.array([counts[label] for label in program.labels], dtype=np.float64)
        return cls(share / share.sum() if share.any() else None, _distance(program, np.random.default_rng(seed)))


class DriftState(NamedTuple):
    """What a monitor has seen; `None` where nothing can be said (yet).

    Attributes:
        queries: all so far; what follows is about the latest ones, the window.
        nearest: mean score of the nearest row.
        baseline_nearest: that of the pool's rows.
        unlike_share: of the queries that are unlike the pool.
        label_share: of each label among the likeliest labels.
        label_distance: TV from there to the pool's label share.
        label_change: TV from there to the first window's share.
        entropy: mean, nats, of the likeliest label against all else.
        first_entropy: that of the first window.
        alarms: that are on.
    """

    queries: int
    nearest: float | None
    baseline_nearest: float | None
    unlike_share: float | None
    label_share: Float[np.ndarray, " labels"] | None
    label_distance: float | None
    label_change: float | None
    entropy: float | None
    first_entropy: float | None
    alarms: tuple[Alarm, ...]


class _First(NamedTuple):
    label_share: Float[np.ndarray, " labels"]
    entropy: float
    interval: Interval  # of the entropy, as a share of the largest possible


class ShareDetector:
    """Raises an alarm when more than a `tolerated` share of events are of a kind; at any time, in constant memory.

    A Shiryaev-Roberts e-detector: the sum, over all moments at which drift may have begun, of the likelihood ratio
    since then of a larger share against the tolerated one; the mean for four larger shares. As long as each event is
    of the kind with a probability of at most `tolerated`, given those before, the sum less the number of events does
    not grow on average, so it takes `FALSE_ALARM_EVERY` events or more to reach that, on average.
    Source: Shin, Ramdas and Rinaldo 2022 (arXiv 2203.03532).

    >>> detector = ShareDetector(0.05)
    >>> [detector.observe(True) for _ in range(8)]
    [False, False, False, False, False, False, True, False]
    """

    def __init__(self, tolerated: float) -> None:
        larger = [tolerated + (1 - tolerated) * part for part in (1 / 16, 1 / 8, 1 / 4, 1 / 2)]
        self._if_event = [share / tolerated for share in larger]
        self._if_none = [(1 - share) / (1 - tolerated) for share in larger]
        self._sums = [0.0] * len(larger)

    def observe(self, event: bool) -> bool:
        """Whether this event (of the kind or not) raises the alarm; after that the detector begins anew."""
        ratios = self._if_event if event else self._if_none
        self._sums = [(before + 1) * ratio for before, ratio in zip(self._sums, ratios, strict=True)]
        if sum(self._sums) < FALSE_ALARM_EVERY * len(self._sums):
            return False
        self._sums = [0.0] * len(self._sums)
        return True


class DriftMonitor:
    """Watches the queries of one version of a program, in the memory of one window. Safe for threads.

    Args:
        labels: of the program; none for generation, of which only the distance is watched.
        window: queries, 100 to 100,000. Labels and entropy are compared once per window.

    Raises:
        ServingError: a window outside.

    >>> monitor = DriftMonitor(("no", "yes"), Baseline(np.array([0.5, 0.5]), Distance(0.8, 0.4, 0.05)))
    >>> for _ in range(40):
    ...     monitor.observe(0.3, np.array([0.25, 0.5]))
    >>> state = monitor.state()
    >>> state.unlike_share, state.label_distance, round(state.entropy, 2), state.alarms
    (1.0, 0.5, 0.69, ('unlike',))
    """

    def __init__(self, labels: Sequence[str], baseline: Baseline, window: int = 1000) -> None:
        if not 100 <= window <= 100_000:
            raise ServingError(f"the window of a drift monitor should be 100 to 100,000 queries, is {window}")
        self._labels, self._baseline, self._window = len(labels), baseline, window
        self._detector = ShareDetector(baseline.distance.tolerated) if baseline.distance else None
        self._lock = threading.Lock()
        # Rings: query i stands at i mod window.
        self._nearest, self._entropies = np.full(window, np.nan), np.zeros(window)
        self._likeliest = np.zeros(window, dtype=np.int64)
        self._queries = self._unlike_until = 0
        self._first: _First | None = None
        self._changed: list[Alarm] = []

    def observe(self, nearest: float | None, probabilities: Float[np.ndarray, " labels"]) -> None:
        """Count one query: some 15 microseconds, at the end of a window milliseconds.

        Args:
            nearest: the highest score of the shots in its prompt, `None` if there are none.
            probabilities: of each label, in the order of the labels; empty for generation. All but the largest may be
                lower bounds.

        Raises:
            ServingError: probabilities of another number of labels, or that are none; nothing is counted.
        """
        total = float(probabilities.sum())
        if len(probabilities) != self._labels or not (total <= 1 + EXCESS and probabilities.min(initial=0.0) >= 0):
            raise ServingError(
                f"{len(probabilities)} probabilities with sum {total} for a program of {self._labels} labels; expected "
                "one each, none negative, with a sum of at most 1"
            )
        likeliest = float(probabilities.max(initial=0.0))
        entropy = float(entr(likeliest) + entr(max(0.0, 1 - likeliest)))
        with self._lock:
            place = self._queries % self._window
            self._queries += 1
            self._nearest[place] = math.nan if nearest is None else nearest
            distance = self._baseline.distance
            if (
                self._detector
                and distance
                and nearest is not None
                and self._detector.observe(nearest <= distance.threshold)
            ):
                self._unlike_until = self._queries + self._window
            if self._labels:
                self._likeliest[place], self._entropies[place] = probabilities.argmax(), entropy
                if place == self._window - 1:
                    self._compare()

    def state(self) -> DriftState:
        """The window as it is now, and the alarms that are on."""
        distance, pool = self._baseline.distance, self._baseline.label_share
        with self._lock:
            known = self._nearest[~np.isnan(self._nearest)] if distance else np.empty(0)
            answered = self._queries > 0 and self._labels > 0
            share = self._share() if answered else None
            first = self._first
            return DriftState(
                self._queries,
                float(known.mean()) if len(known) else None,
                distance.mean if distance else None,
                float((known <= distance.threshold).mean()) if distance and len(known) else None,
                share,
                None if share is None or pool is None else _tv(share, pool),
                None if share is None or first is None else _tv(share, first.label_share),
                float(self._entropies[: self._queries].mean()) if answered else None,
                first.entropy if first else None,
                (*(("unlike",) if self._queries < self._unlike_until else ()), *self._changed),
            )

    def _share(self) -> Float[np.ndarray, " labels"]:
        seen = self._likeliest[: self._queries]
        return np.bincount(seen, minlength=self._labels) / len(seen)

    def _compare(self) -> None:
        level = self._window / FALSE_ALARM_EVERY
        share = self._share()
        shares_of_largest = np.minimum(self._entropies / math.log(2), 1.0)
        interval = betting(shares_of_largest, delta=level / 2)  # one of two
        if self._first is None:
            self._first = _First(share, float(self._entropies.mean()), interval)
            return
        # The difference of two empirical laws of n queries deviates as one of n / 2 queries does: both bounds of
        # `eps_tv` hold for it (Hoeffding's over all events; Jensen's and McDiarmid's).
        radius = eps_tv(self._window // 2, self._labels, delta=level)
        before = self._first.interval
        moved = max(interval.low - before.high, before.low - interval.high)
        self._changed = []
        if _tv(share, self._first.label_share) > LABEL_SLACK + radius:
            self._changed.append("labels")
        if moved > ENTROPY_SLACK:
            self._changed.append("entropy")


class GapInterval(NamedTuple):
    """A mean gap in [0, 1], `None` without samples, and the ends of its interval."""

    mean: float | None
    low: float
    high: float
    samples: int


class ShadowGap:
    """The mean of TVs that come one by one, with an interval that may be looked at at any time. Safe for threads.

    With probability 1 - `alpha` all intervals ever shown hold the mean, if the queries come independently from one
    law: they are those of `evaluation.intervals.confidence_sequence`, but the gamblers' wealth is kept instead of the
    values. So the memory is constant (0.4 MB), and a value takes some 100 microseconds.

    Raises:
        ServingError: an `alpha` outside (0, 1).

    >>> shadow = ShadowGap()
    >>> for tv in [0.2, 0.4] * 100:
    ...     shadow.observe(tv)
    >>> mean, low, high, samples = shadow.interval()
    >>> round(mean, 3), round(low, 2), round(high, 2), samples
    (0.3, 0.28, 0.32, 200)
    """

    def __init__(self, alpha: float = 0.05) -> None:
        if not 0 < alpha < 1:
            raise ServingError(f"alpha should be between 0 and 1 (0.05 for 95 %), is {alpha}")
        self._lock = threading.Lock()
        self._below, self._above = _LowEnd(2 / alpha), _LowEnd(2 / alpha)
        self._sum, self._samples, self._ends = 0.0, 0, Interval(0.0, 1.0)

    def observe(self, tv: float) -> None:
        """Add the TV of one query; anything else than a number in [0, 1] is a ServingError."""
        if not 0 <= tv <= 1:
            raise ServingError(f"a TV should be in [0, 1], is {tv}")
        with self._lock:
            low, high = self._below.after(tv), 1 - self._above.after(1 - tv)
            # Should the ends cross (the gap has moved, or with probability at most alpha), the last interval stays.
            self._ends = Interval(low, high) if low <= high else self._ends
            self._sum, self._samples = self._sum + tv, self._samples + 1

    def interval(self) -> GapInterval:
        """The mean so far and its interval."""
        with self._lock:
            return GapInterval(self._sum / self._samples if self._samples else None, *self._ends, self._samples)


class Shadow:
    """Scores a random sample of the queries with a reference too, in a thread of its own.

    `gap` is then about what is served and the reference: the TV over labels and "other" that `evaluation.gap`
    measures, whatever the order of the reference's labels. Safe for threads; `close` it in the end.

    Args:
        labels: of the program, in the order of its probabilities.
        rate: share of the queries to sample, in [0, 1].
        seed: of the sample.
        capacity: queries that may wait; beyond that they are dropped and counted.

    Raises:
        ServingError: a rate outside [0, 1], or a reference with other labels.
    """

    def __init__(
        self, labels: Sequence[str], reference: Predictor, *, rate: float, seed: int = 0, capacity: int = 256
    ) -> None:
        if not 0 <= rate <= 1:
            raise ServingError(f"the rate of a shadow is the share of queries it samples, 0 to 1, and is {rate}")
        if differ := set(labels) ^ set(reference.labels):
            raise ServingError(
                f"program and reference should have the same labels; {len(differ)} are of one of them only, as "
                f"{min(differ)!r}. Take a reference that was fine-tuned on the program's data"
            )
        self.gap = ShadowGap()
        self.dropped = 0
        """Sampled queries that were not scored: there was no room, or the reference failed."""
        self.failure: str | None = None
        """What the reference said when it failed last."""
        self._labels, self._reference, self._rate, self._capacity = tuple(labels), reference, rate, capacity
        self._rng = np.random.default_rng(seed)
        self._waiting: deque[tuple[str, Float[np.ndarray, " labels"]]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def draw(self) -> bool:
        """Whether the next query is in the sample; its whole law is to be `offer`ed then."""
        with self._changed:
            return self._rng.random() < self._rate

    def offer(self, text: str, probabilities: Float[np.ndarray, " labels"]) -> None:
        """Score this query of the sample, whose served law is `probabilities`; never waits for the reference."""
        with self._changed:
            if self._closed:
                return
            if len(self._waiting) == self._capacity:
                self.dropped += 1
                return
            self._waiting.append((text, np.array(probabilities, dtype=np.float64)))
            self._changed.notify()

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Stop, without those that wait; those in hand are waited for, at most `timeout_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            try:
                self._score([text for text, _ in batch], np.array([law for _, law in batch]))
            except Exception as error:  # of whatever engine the reference runs on: the serving goes on
                with self._changed:
                    self.dropped += len(batch)
                    self.failure = f"{type(error).__name__}: {error}"

    def _score(self, texts: list[str], served: Float[np.ndarray, "texts labels"]) -> None:
        tokens = np.zeros(len(texts), dtype=np.int64)
        ours = Predictions(self._labels, served, tokens, Usage(0, 0, 0), 0.0)
        for tv in gap(ours, self._reference.predict(texts)).per_query.tolist():
            self.gap.observe(tv)


class _LowEnd:
    """The low end of `confidence_sequence`, value by value: the largest mean against which wealth reached `target`."""

    def __init__(self, target: float) -> None:
        self._target, self._low = target, 0.0
        self._means = np.arange(1, GRID) / GRID
        self._fixed = np.array(FIXED_BETS)[:, None] / self._means
        self._wealth = np.full((1 + len(FIXED_BETS), len(self._means)), 0.5 / len(FIXED_BETS))
        self._wealth[0] = 0.5
        self._values, self._sum, self._squares = 0, 0.5, 0.25

    def after(self, value: float) -> float:
        self._values += 1
        bet = math.sqrt(2 * math.log(self._target) / (self._squares * math.log1p(self._values)))
        surplus = value - self._means
        with np.errstate(over="ignore", under="ignore"):
            self._wealth[0] *= 1 + np.minimum(bet, LARGEST_BET / self._means) * surplus
            self._wealth[1:] *= 1 + self._fixed * surplus
        self._wealth[self._wealth < 1e-200] = 0.0
        refused = np.flatnonzero(self._wealth.sum(axis=0) >= self._target)
        self._low = max(self._low, float(self._means[refused[-1]]) if len(refused) else 0.0)
        self._sum += value
        self._squares += (value - self._sum / (self._values + 1)) ** 2
        return self._low


def _distance(program: Program, rng: np.random.Generator) -> Distance | None:
    texts = program.pool.data.texts
    if not program.settings.shots or not texts or program.reranker is not None:  # then the nearest may be no shot
        return None
    queries = [texts[row] for row in rng.choice(len(texts), min(len(texts), _ROWS), replace=False)]
    hits = program.retriever.search(queries, _DEPTH)
    nearest = []
    for query, rows, scores in zip(queries, hits.ids.tolist(), hits.scores.tolist(), strict=True):
        own = normalise_text(query)
        others = (score for row, score in zip(rows, scores, strict=True) if normalise_text(texts[row]) != own)
        nearest += [next(others, math.nan)]
    ordered = np.sort(nearest)[: np.isfinite(nearest).sum()]
    if not len(ordered):
        return None
    threshold = float(ordered[max(1, int(_REMOTE * len(ordered))) - 1])
    remote = int((ordered <= threshold).sum())
    tolerated = max(TOLERATED, clopper_pearson(remote, len(ordered), delta=0.001, side="upper").high)
    # Always the same letters: encoders remember texts.
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(20, 8, 6))
    foreign = program.retriever.search([" ".join(map("".join, words)) for words in letters], 1).scores
    if tolerated > 0.5 or (foreign <= threshold).mean() <= 0.5:
        return None
    return Distance(float(ordered.mean()), threshold, tolerated)


def _tv(p: Float[np.ndarray, " labels"], q: Float[np.ndarray, " labels"]) -> float:
    return float(tv_distance(p[None], q[None])[0])
