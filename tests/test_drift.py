"""Drift: baselines against brute force, false alarms and delays by simulation, the state against a second window."""

import threading
import time

import numpy as np
import pytest
from hashed_words import HashedWords
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, entropy
from toys import customers

from evaluation.intervals import confidence_sequence
from icl_compiler.backends.backend import Usage
from icl_compiler.compile import compile_program, with_reranker
from icl_compiler.data import Dataset
from icl_compiler.errors import ServingError
from icl_compiler.predictor import Predictions
from icl_compiler.registry import RETRIEVERS
from icl_compiler.reranker import FEATURES, Reranker
from serving import drift
from serving.drift import Baseline, Distance, DriftMonitor, Shadow, ShadowGap, ShareDetector

LABELS = ("no", "yes")
EVEN = Baseline(np.array([0.5, 0.5]), Distance(0.8, 0.4, 0.05))
SURE, UNSURE = np.array([0.9, 0.05]), np.array([0.4, 0.35])


@pytest.fixture(autouse=True, scope="module")
def encoder_without_a_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrievers.encoder.SentenceEncoder.encode", HashedWords().encode)
        yield


def texts_about(topics, rows, seed):
    """For each topic `rows` texts of 20 words, drawn from the topic's own five."""
    rng = np.random.default_rng(seed)
    words = {topic: [f"{topic}word{i}" for i in range(5)] for topic in topics}
    return [" ".join(rng.choice(words[topic], 20)) for topic in topics for _ in range(rows)]


def pool_of(topics=30, rows=10):
    texts = texts_about([f"topic{i}" for i in range(topics)], rows, seed=0)
    return Dataset(tuple(texts), ("yes", "no", "yes") * (len(texts) // 3), "classification", "topics")


def echo_program(data, **options):
    return compile_program(data, model="echo", **{"budget": 100_000, "shots": 4, "retriever": "dense", **options})


# Baselines


def test_the_baseline_is_that_of_brute_force():
    data = pool_of()
    # Two rows that differ in case and blanks only are not each other's nearest row.
    data = Dataset((*data.texts, data.texts[7].upper() + " "), (*data.answers, "no"), "classification", "topics")
    baseline = Baseline.of(echo_program(data))
    np.testing.assert_allclose(baseline.label_share, [101 / 301, 200 / 301])
    vectors = HashedWords().encode(data.texts).astype(np.float64)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    cosines[7, 300] = cosines[300, 7] = -1
    nearest = np.sort(cosines.max(axis=1))
    assert baseline.distance.mean == pytest.approx(nearest.mean(), abs=1e-6)
    assert baseline.distance.threshold == pytest.approx(nearest[2], abs=1e-6)
    remote = (nearest <= nearest[2] + 1e-6).sum()
    assert baseline.distance.tolerated == pytest.approx(max(0.05, beta.isf(0.001, remote + 1, 301 - remote)))


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_which_retrievers_say_how_near_a_row_is(retriever):
    program = echo_program(pool_of(), retriever=retriever)
    distance = Baseline.of(program).distance
    if retriever in ("uniform", "votek", "static", "coverage"):
        assert distance is None
        return
    alike = texts_about([f"topic{i}" for i in range(30)], 10, seed=1)
    other = texts_about([f"matter{i}" for i in range(30)], 10, seed=1)
    unlike = [(program.retriever.search(texts, 1).scores <= distance.threshold).mean() for texts in (alike, other)]
    assert unlike[0] <= distance.tolerated
    assert unlike[1] > 0.75


def test_the_shots_of_a_reranked_program_do_not_say_how_near_a_row_is():
    program = echo_program(pool_of())
    assert Baseline.of(program).distance is not None
    reranked = with_reranker(program, Reranker(32, np.zeros(len(FEATURES)), np.zeros(len(program.pool.data))))
    assert Baseline.of(reranked).distance is None


def test_a_score_that_random_letters_reach_says_nothing():
    rng = np.random.default_rng(0)
    texts = tuple(" ".join(f"word{i}" for i in rng.integers(200, size=8)) for _ in range(300))
    distances = [
        Baseline.of(
            echo_program(Dataset(texts, ("yes", "no") * 150, "classification", "words"), retriever=name)
        ).distance
        for name in ("bm25", "coverage")
    ]
    assert [distance is None for distance in distances] == [False, True]


def test_one_seed_gives_one_baseline():
    program = echo_program(pool_of(topics=60))  # more rows than are looked at
    assert Baseline.of(program).distance == Baseline.of(program).distance
    assert Baseline.of(program).distance != Baseline.of(program, seed=1).distance


@pytest.mark.parametrize(
    ("data", "shots"),
    [
        pytest.param(customers(), 4, id="twelve rows"),
        pytest.param(pool_of(), 0, id="no shots"),
        pytest.param(Dataset(("a b",) * 300, ("yes", "no") * 150, "classification", "same"), 4, id="one text"),
    ],
)
def test_no_distance_where_none_is_known(data, shots):
    assert Baseline.of(echo_program(data, shots=shots)).distance is None


def test_a_program_that_generates_has_a_distance_and_no_labels():
    data = pool_of()
    program = echo_program(Dataset(data.texts, data.texts, "generation", "topics"))
    monitor = DriftMonitor(program.labels, Baseline.of(program), window=100)
    for _ in range(200):
        monitor.observe(-1.0, np.empty(0))
    state = monitor.state()
    assert (state.unlike_share, state.label_share, state.entropy, state.alarms) == (1, None, None, ("unlike",))


# False alarms and delays


@pytest.mark.parametrize("tolerated", [0.05, 0.3])
def test_alarms_of_the_detector_are_as_rare_as_stated(tolerated, monkeypatch):
    monkeypatch.setattr(drift, "FALSE_ALARM_EVERY", 1000)
    detector = ShareDetector(tolerated)
    events = np.random.default_rng(0).random(150_000) < tolerated  # the largest share that is no drift
    alarms = sum(map(detector.observe, events.tolist()))
    assert 150 / 10 < alarms < 150


def test_no_drift_for_20_000_queries_raises_no_alarm():
    # As far from the pool and from the first window as is tolerated; 6 % of such streams may alarm.
    alarmed = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(LABELS, EVEN)
        for query, (unlike, yes, sure) in enumerate(rng.random((20_000, 3))):
            later = query >= 1000
            law = SURE if sure < (0.47 if later else 0.55) else UNSURE
            monitor.observe(0.3 if unlike < 0.05 else 0.7, law[::-1] if yes < (0.6 if later else 0.5) else law)
            if query % 250 == 249 and monitor.state().alarms:
                alarmed += 1
                break
    assert alarmed == 0


@pytest.mark.parametrize(("share", "within"), [(0.2, 400), (0.4, 100), (1.0, 10)])
@pytest.mark.parametrize("begin", [0, 5300])
def test_unlike_queries_alarm_soon_whenever_they_begin(share, within, begin):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(LABELS, EVEN)
        for unlike in rng.random(begin) < 0.01:
            monitor.observe(0.3 if unlike else 0.7, SURE)
        assert "unlike" not in monitor.state().alarms
        for unlike in rng.random(within) < share:
            monitor.observe(0.3 if unlike else 0.7, SURE)
        assert "unlike" in monitor.state().alarms


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("labels", (0.5, 0.5), (0.8, 0.5)), ("entropy", (0.5, 0.8), (0.5, 0.2))],
)
def test_other_answers_alarm_by_the_end_of_the_next_full_window(kind, before, after):
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(LABELS, EVEN)
    alarms = []
    for queries, (no, sure) in ((3300, before), (1700, after), (3000, before)):
        for draw in rng.random((queries, 2)):
            law = SURE if draw[1] < sure else UNSURE
            monitor.observe(0.7, law if draw[0] < no else law[::-1])
        alarms.append(monitor.state().alarms)
    assert alarms == [(), (kind,), ()]


@pytest.mark.parametrize(
    ("yes", "law", "alarms"),
    [
        (0.58, [0.7, 0.2], ()),
        (0.65, [0.7, 0.2], ("labels",)),
        (0.5, [0.66, 0.24], ()),  # 0.04 of the largest entropy more
        (0.5, [0.62, 0.28], ("entropy",)),  # 0.07
    ],
)
def test_small_changes_are_tolerated_however_sure(yes, law, alarms):
    monitor = DriftMonitor(LABELS, EVEN, window=5000)
    for share, answer in ((0.5, [0.7, 0.2]), (yes, law)):
        for query in range(5000):
            monitor.observe(0.7, np.array(answer[::-1] if query < 5000 * share else answer))
    assert monitor.state().alarms == alarms


def test_an_alarm_of_unlike_stays_for_a_window():
    monitor = DriftMonitor(LABELS, EVEN, window=200)
    for nearest in [0.3] * 7 + [0.7] * 199:
        monitor.observe(nearest, SURE)
    assert monitor.state().alarms == ("unlike",)
    monitor.observe(0.7, SURE)
    assert monitor.state().alarms == ()


# The state


@settings(max_examples=25)
@given(st.integers(0, 450), st.integers(0, 2**32 - 1))
def test_the_state_is_that_of_the_last_window(queries, seed):
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet([0.3, 0.3, 0.3, 0.3], queries)[:, :3]
    nearest = [None if rng.random() < 0.1 else float(score) for score in rng.random(queries)]
    pool = np.array([0.5, 0.3, 0.2])
    monitor = DriftMonitor(("a", "b", "c"), Baseline(pool, Distance(0.8, 0.4, 0.05)), window=100)
    for score, law in zip(nearest, laws, strict=True):
        monitor.observe(score, law)
    state = monitor.state()
    assert state.queries == queries
    if not queries:
        assert (state.nearest, state.label_share, state.label_distance, state.entropy) == (None,) * 4
        return
    last = slice(max(0, queries - 100), queries)
    known = [score for score in nearest[last] if score is not None]
    if known:
        assert state.nearest == pytest.approx(sum(known) / len(known))
        assert state.unlike_share == pytest.approx(sum(score <= 0.4 for score in known) / len(known))

    def answers(part):
        return np.bincount(laws[part].argmax(axis=1), minlength=3) / len(laws[part])

    def nats(part):
        likeliest = laws[part].max(axis=1)
        return entropy(np.column_stack([likeliest, 1 - likeliest]), axis=1).mean()

    np.testing.assert_allclose(state.label_share, answers(last))
    assert state.label_distance == pytest.approx(np.maximum(answers(last) - pool, 0).sum())
    assert state.entropy == pytest.approx(nats(last), abs=1e-9)
    if queries < 100:
        assert state.label_change is state.first_entropy is None
    else:
        first = slice(0, 100)
        assert state.label_change == pytest.approx(np.maximum(answers(last) - answers(first), 0).sum())
        assert state.first_entropy == pytest.approx(nats(first), abs=1e-9)


@pytest.mark.parametrize("law", [[0.5], [0.5, np.nan], [-0.1, 0.5], [0.8, 0.8]])
def test_what_is_no_law_is_not_counted(law):
    monitor = DriftMonitor(LABELS, EVEN)
    with pytest.raises(ServingError, match="for a program of 2 labels; expected one each, none negative"):
        monitor.observe(0.7, np.array(law))
    assert monitor.state().queries == 0


def test_a_window_that_is_none():
    with pytest.raises(ServingError, match="should be 100 to 100,000 queries, is 99"):
        DriftMonitor(LABELS, EVEN, window=99)


# The gap to a reference


@settings(max_examples=30)
@given(st.integers(1, 300), st.sampled_from([(1, 4), (0.1, 0.5), (30, 30), (0.01, 0.01)]), st.integers(0, 2**32 - 1))
def test_the_interval_is_that_of_the_confidence_sequence(samples, law, seed):
    values = np.random.default_rng(seed).beta(*law, samples)
    shadow = ShadowGap(alpha=0.1)
    assert shadow.interval() == (None, 0, 1, 0)
    for value in values.tolist():
        shadow.observe(value)
    lows, highs = confidence_sequence(values, delta=0.1)
    mean, low, high, counted = shadow.interval()
    assert (low, high, counted) == (pytest.approx(lows[-1]), pytest.approx(highs[-1]), samples)
    assert mean == pytest.approx(values.mean())


def test_after_the_gap_has_moved_the_last_interval_stays():
    shadow = ShadowGap()
    for value in [0.9] * 200 + [0.1] * 2000:
        shadow.observe(value)
    lows, highs = confidence_sequence(np.array([0.9] * 200 + [0.1] * 2000))
    assert shadow.interval()[1:3] == (pytest.approx(lows[-1]), pytest.approx(highs[-1]))
    with pytest.raises(ServingError, match=r"a TV should be in \[0, 1\], is nan"):
        shadow.observe(float("nan"))


class Reference:
    """Says "yes" with .7 and "no" with .2, in another order than the program; waits for `go`; fails on "bad"."""

    labels = ("yes", "no")

    def __init__(self, go=None):
        self.go, self.asked = go, []

    def predict(self, texts, *, progress=None):
        self.asked += texts
        assert self.go is None or self.go.wait(10)
        if "bad" in texts:
            raise RuntimeError("out of memory")
        law = np.tile([0.7, 0.2], (len(texts), 1))
        return Predictions(self.labels, law, np.ones(len(texts), dtype=np.int64), Usage(1, 1, 1), 0.0)


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_shadow_measures_the_gap_of_sampled_queries():
    shadow = Shadow(LABELS, Reference(), rate=1.0)
    # no, yes, other: .5 .5 0 and .2 .7 .1 against .2 .7 .1.
    shadow.offer("one", np.array([0.5, 0.5]))
    shadow.offer("two", np.array([0.2, 0.7]))
    eventually(lambda: shadow.gap.interval().samples == 2)
    shadow.close()
    assert shadow.gap.interval().mean == pytest.approx(0.15)
    assert (shadow.dropped, shadow.failure) == (0, None)


@pytest.mark.parametrize(("rate", "seed"), [(0.0, 0), (0.25, 0), (0.25, 1), (1.0, 0)])
def test_the_sample_is_that_of_the_seed(rate, seed):
    drawn = np.flatnonzero(np.random.default_rng(seed).random(400) < rate)
    reference = Reference()
    shadow = Shadow(LABELS, reference, rate=rate, seed=seed, capacity=1000)
    for i in range(400):
        if shadow.draw():
            shadow.offer(str(i), SURE)
    eventually(lambda: shadow.gap.interval().samples == len(drawn))
    shadow.close()
    assert reference.asked == [str(i) for i in drawn]


def test_a_slow_reference_never_holds_up_and_what_is_too_much_is_dropped():
    go = threading.Event()
    reference = Reference(go)
    shadow = Shadow(LABELS, reference, rate=1.0, capacity=3)
    shadow.offer("in hand", SURE)
    eventually(lambda: reference.asked == ["in hand"])
    for i in range(10):
        shadow.offer(str(i), SURE)
    assert shadow.dropped == 7
    go.set()
    eventually(lambda: shadow.gap.interval().samples == 4)
    shadow.close()
    shadow.offer("late", SURE)
    assert reference.asked == ["in hand", "0", "1", "2"]
    assert "shadow" not in {thread.name for thread in threading.enumerate()}


def test_a_reference_that_fails_is_asked_again():
    shadow = Shadow(LABELS, Reference(), rate=1.0)
    shadow.offer("bad", SURE)
    eventually(lambda: shadow.failure)
    shadow.offer("good", SURE)
    eventually(lambda: shadow.gap.interval().samples == 1)
    shadow.close()
    assert (shadow.dropped, shadow.failure) == (1, "RuntimeError: out of memory")


@pytest.mark.parametrize(
    ("labels", "rate", "said"),
    [
        (("no", "maybe"), 0.5, "the same labels; 2 are of one of them only, as 'maybe'"),
        (LABELS, 1.5, "0 to 1, and is 1.5"),
    ],
)
def test_what_no_shadow_is_made_of(labels, rate, said):
    with pytest.raises(ServingError, match=said):
        Shadow(labels, Reference(), rate=rate)
