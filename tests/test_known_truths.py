import json
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom
from tiny_model import save_tiny_model
from toys import smollm2

from benchmarks import known_truths as bench
from benchmarks.truths import findings, laws, plot
from evaluation import bounds
from evaluation.tv import tv_distance


def expected_tv(law, n):
    # Each count is binomial, so that the mean is a sum over the counts that it can have.
    counts = np.arange(n + 1)
    return sum(binom.pmf(counts, n, p) @ np.abs(counts / n - p) for p in law) / 2


def test_the_tv_of_counting_has_its_closed_mean_within_the_provable_band():
    n, law = 16, laws.text(1, 4, 1, seed=3).law
    many = np.concatenate([laws.samples(law, n, seed=seed) for seed in range(2000)])
    found = tv_distance(laws.counted(many, 4), np.repeat(law, len(many), axis=0))
    exact = expected_tv(law[0], n)
    assert found.mean() == pytest.approx(exact, abs=5 * found.std() / len(many) ** 0.5)
    assert exact <= bounds.mean_tv(n, 4)


def test_samples_follow_the_law_word_after_word():
    truth = laws.text(2, 3, 2, seed=5)
    drawn = laws.samples(truth.law, 20_000, seed=0)
    for law, row in zip(truth.law, drawn, strict=True):
        assert np.bincount(row, minlength=9) / 20_000 == pytest.approx(law, abs=0.015)
    words = list(dict.fromkeys(answer.split()[0] for answer in truth.answers))
    assert truth.answers == tuple(f"{first} {second}" for first in words for second in words)


def test_laws_are_drawn_from_the_flat_dirichlet_law():
    # Its coordinates are Beta(1, V - 1): mean 1 / V, variance (V - 1) / (V^2 (V + 1)).
    first = np.concatenate([laws.text(32, 4, 1, seed=seed).law[:, 0] for seed in range(60)])
    assert first.mean() == pytest.approx(1 / 4, abs=0.02)
    assert first.var() == pytest.approx(3 / 80, abs=0.005)


def test_fewer_are_the_first_of_more():
    few, many = laws.text(2, 4, 2, seed=1), laws.text(8, 4, 2, seed=1)
    assert many.contexts[:2] == few.contexts
    assert np.array_equal(many.law[:2], few.law)
    assert np.array_equal(laws.samples(many.law, 50, seed=1)[:2, :7], laws.samples(few.law, 7, seed=1))
    rule = laws.rule(3, noise=0.2, seed=1)
    assert np.array_equal(laws.points(rule, 100, seed=1)[:9], laws.points(rule, 9, seed=1))


def test_word_by_word_is_the_mean_of_laws_given_the_samples():
    # By brute force: laws drawn from the prior, weighed by how likely they make the samples.
    drawn = np.array([[0, 3, 3]])
    prior = np.concatenate([laws.text(32, 2, 2, seed=seed).law for seed in range(400)])
    weights = prior[:, drawn[0]].prod(axis=1)
    assert laws.word_by_word(drawn, 2, 2)[0] == pytest.approx(weights @ prior / weights.sum(), abs=0.02)


def test_a_rule_has_its_margin_and_its_noise():
    rule = laws.rule(3, noise=0.1, seed=2)
    points = laws.points(rule, 5000, seed=7)
    assert np.linalg.norm(rule.weights) == pytest.approx(1)
    assert np.abs(points @ rule.weights).min() >= laws.MARGIN
    assert np.abs(points).max() == laws.MOST
    wrong = laws.labels(rule, points, seed=7) != (points @ rule.weights > 0)
    assert wrong.mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.models
def test_the_tokenizer_writes_contexts_and_words_as_one_token():
    assert {len(ids) for ids in smollm2().encode(laws.CONTEXTS, context="\n")} == {1}
    assert {len(ids) for ids in smollm2().encode([f" {word}" for word in laws.WORDS], context="x:")} == {1}


def run(path, *more):
    bench.main(["--model", "echo", "--rows", str(path), "--seeds", "2", *more])
    return bench.measured(path)


def test_a_run_is_taken_up_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    first = run(path, "--stages", "sequences", "linear", "--cells", "3")
    assert len(first) == 3
    both = run(path, "--stages", "sequences", "linear", "--cells", "5")
    assert both[:3] == first
    assert len({json.dumps(row["key"]) for row in both}) == len(both) == 8
    capsys.readouterr()


def test_the_echo_model_counts_as_laplace_does_and_a_document_tells_it(tmp_path, capsys):
    # Echo's law is (1 + count) / (1 + sum of these): among the words alone it is Laplace's estimate.
    path, document = tmp_path / "rows.jsonl", tmp_path / "truths.md"
    document.write_text(
        "before\n<!-- figures: begin -->\nformer figures\n<!-- figures: end -->\nafter\n", encoding="utf-8"
    )
    rows = run(path, "--stages", "categorical", "--fill", str(document), "--html", str(tmp_path / "plots.html"))
    assert len(rows) == 2 * 17
    for row in rows:
        assert row["gaps"]["own, words only"] == pytest.approx(row["gaps"]["Laplace"], abs=1e-6)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "former figures" not in text
    assert text.count("### categorical") == 4
    assert "### categorical" in capsys.readouterr().out
    assert (tmp_path / "plots.html").read_text(encoding="utf-8").count("plotly-graph-div") == 4


@pytest.mark.models
def test_a_fine_tuned_model_is_nearer_to_the_truth_than_before(tmp_path, monkeypatch):
    tiny = str(save_tiny_model(tmp_path / "tiny", vocabulary=49152, scale=0.1))
    smollm2()._tokenizer.save_pretrained(tiny)
    for name, value in {"FIRST_LAYER": 0, "EPOCHS": 50, "RATE": 1e-2}.items():
        monkeypatch.setattr(bench, name, value)
    prompts = bench.Prompts(bench.open_backend("transformers", tiny, dtype="float32"), tiny)
    gaps = bench.measure_text(bench.TextCell("reference", 3, 3, 1, 16, 0), prompts)["gaps"]
    assert np.mean(gaps["zero"]) > 0.95
    assert np.mean(gaps["fine-tuned"]) < 0.4
    assert set(gaps) >= {"own to fine-tuned", "all to fine-tuned"}
    assert all(len(each) == 3 for each in gaps.values())


def test_own_shots_are_those_of_the_query_and_all_are_there():
    pairs = [(place, word) for place, word in product(("river", "house", "road"), ("red", "blue", "red"))]
    prompts = bench.Prompts(bench.open_backend(None, "echo"), "echo")
    data = bench._dataset(pairs)
    own = prompts.program(data, ("red", "blue"), bench._by_words(), 3)
    shots = own.explain("house").shots
    assert sorted((shot.text, shot.label) for shot in shots) == sorted(pairs[3:6])
    every = prompts.program(data, ("red", "blue"), bench._random(0), 9).explain("house").shots
    assert sorted(shot.row for shot in every) == list(range(9))


def test_the_nearest_points_are_the_nearest():
    retriever = bench.NearestPoints()
    retriever.fit(["0 0", "-3 4", "60 60", "1 1"])
    hits = retriever.search(["1 2"], 3)
    assert hits.ids.tolist() == [[3, 0, 1]]
    assert hits.scores[0] == pytest.approx([-1, -(5**0.5), -(20**0.5)])


def line(sizes, exponent, *, floor=0.0, seeds=6, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    curve = floor + (0.6 - floor) * np.array(sizes, dtype=float) ** exponent
    return findings.Line(tuple(sizes), curve * np.exp(noise * rng.normal(size=(seeds, len(sizes)))))


def panel(**lines):
    sizes = lines["own"].sizes
    orders = {"S1": {n: n**-0.5 for n in sizes}}
    return findings.Panel("toy", "n", "TV to the truth", lines, {}, orders)


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def test_sentences_say_what_the_numbers_support():
    counting = line(SIZES, -0.5, seed=1)
    told = findings.sentence(panel(own=line(SIZES, -0.5), counting=counting), "own")
    assert "falls as n^-0.50" in told and "S1 is n^-0.50, inside" in told and "no floor above 0.01 is shown" in told
    flat = findings.sentence(panel(own=line(SIZES, -0.5, floor=0.3), counting=counting), "own")
    assert "outside that interval" in flat and "levels off at 0.3" in flat
    assert "worse at n = 2, 4, 8, 16, 32, 64, 128" in flat
    still = findings.sentence(panel(own=line(SIZES, 0.0, noise=0.1)), "own")
    assert "no fall or rise over n = 1 to 128 is shown" in still


def test_sentences_do_without_what_is_missing():
    one = findings.sentence(panel(own=line(SIZES, -0.5, seeds=1)), "own")
    assert one == '"own": no slope of the gap over n = 1 to 128, since there is one seed or one size only.'
    zeros = findings.Line((1, 2), np.array([[0.5, 0.0], [0.4, 0.0]]))
    assert findings.sentence(panel(own=zeros), "own").endswith("since it is 0 somewhere.")


def test_orders_go_through_the_first_point():
    shown = panel(own=line(SIZES, -0.3, noise=0.0))
    assert shown.scaled("S1")[1] == pytest.approx(0.6)
    assert shown.scaled("S1")[4] == pytest.approx(0.3)
    names = [trace["name"] for trace in plot.figure(shown)["data"]]
    assert names == ["order S1, constant unknown, scaled", "own"]
