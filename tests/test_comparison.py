"""Two measurements on the same queries: against plain intervals, Student's formula, and simulated draws."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import t as student

from evaluation.comparison import choose_line, compare_lines
from evaluation.intervals import betting, betting_p_value, confidence_sequence
from icl_compiler.cli import main
from icl_compiler.errors import EvaluationError

RNG = np.random.default_rng(0)
HARDNESS = RNG.uniform(0.1, 0.9, 200)
TEXTS = [f"query {i}" for i in range(200)]


def line(gaps, texts=TEXTS, **more):
    return {"series": "program", "texts": list(texts), "gaps": list(gaps), "n_examples": 64, **more}


WORSE, BETTER = HARDNESS, np.clip(HARDNESS - RNG.uniform(0.0, 0.1, 200), 0, 1)


def test_pairs_tell_what_two_intervals_do_not():
    found = compare_lines(line(WORSE), line(BETTER))
    [gap] = found.differences
    expected = BETTER.mean() - WORSE.mean()
    assert gap.difference == pytest.approx(expected)
    assert gap.low < expected < gap.high < 0
    assert gap.p_value < 0.01
    assert betting(BETTER).high > betting(WORSE).low, "side by side the intervals overlap"
    assert found.sentences[0].startswith("B is closer: its gap is smaller by 0.0")
    turned = compare_lines(line(BETTER), line(WORSE))
    assert turned.sentences[0].startswith("A is closer: the gap of B is larger by 0.0")
    assert (turned.differences[0].low, turned.differences[0].high) == pytest.approx((-gap.high, -gap.low), abs=1e-5)
    same = compare_lines(line(WORSE), line(np.roll(WORSE, 1)))
    assert same.sentences[0].startswith("Undecided")
    assert same.differences[0].p_value > 0.05


def test_queries_are_paired_by_text_whatever_their_order():
    order = np.random.default_rng(1).permutation(200)[:150]
    texts = [TEXTS[i] for i in order]
    found = compare_lines(line(WORSE), line(BETTER[order], texts))
    assert found.queries == (150, 200, 150)
    assert found.differences[0].difference == pytest.approx((BETTER - WORSE)[order].mean())
    twice = compare_lines(line([0.1, 0.2, 0.3], ["a", "a", "b"]), line([0.5, 0.6, 0.9], ["a", "b", "a"]))
    assert twice.differences[0].difference == pytest.approx((0.4 + 0.7 + 0.3) / 3)


def test_accuracy_and_loss():
    right = RNG.random(200) < 0.5
    better = right | (RNG.random(200) < 0.3)
    losses = RNG.exponential(1.0, 200)
    differences = RNG.normal(-0.1, 0.3, 200)
    a = line(WORSE, correct=right.tolist(), losses=losses.tolist())
    b = line(BETTER, correct=better.tolist(), losses=(losses + differences).tolist())
    _, accuracy, loss = compare_lines(a, b, level=0.9).differences
    assert (accuracy.measure, accuracy.exact) == ("accuracy", True)
    assert 0 < accuracy.low < better.mean() - right.mean() < accuracy.high
    assert (loss.measure, loss.exact) == ("log-loss", False)
    half = student.ppf(0.95, 199) * differences.std(ddof=1) / math.sqrt(200)
    assert (loss.low, loss.high) == pytest.approx((differences.mean() - half, differences.mean() + half))


@pytest.mark.parametrize("anytime", [False, True])
def test_the_p_value_is_that_of_the_interval_and_errs_no_more_often_than_it_says(anytime):
    rng = np.random.default_rng(2)
    errors = 0
    for _ in range(300):
        values = (rng.random(120) < 0.3).astype(float)
        low, high = betting(values)
        if anytime:
            low, high = (ends[-1] for ends in confidence_sequence(values))
        for mean in rng.uniform(0.1, 0.6, 3):
            if min(abs(mean - low), abs(mean - high)) > 0.001:
                p_value = betting_p_value(values, mean=float(mean), anytime=anytime)
                assert (p_value <= 0.05) == (not low <= mean <= high)
        errors += betting_p_value(values, mean=0.3, anytime=anytime) <= 0.05
    assert errors <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_queries_asked_until_a_decision_keep_their_order():
    a, b = line(WORSE[:48], TEXTS[:48], queries_max=200), line(BETTER[:80], TEXTS[:80], queries_max=200)
    found = compare_lines(a | {"losses": [1.0] * 48}, b | {"losses": [2.0] * 80})
    sequence = confidence_sequence((BETTER[:48] - WORSE[:48] + 1) / 2)
    [gap] = found.differences
    assert (gap.low, gap.high) == pytest.approx((2 * sequence.lows[-1] - 1, 2 * sequence.highs[-1] - 1))
    assert "the intervals hold whenever one stops" in found.sentences[-1]
    with pytest.raises(EvaluationError, match="in another order in each file"):
        compare_lines(a, line(BETTER[:80][::-1], TEXTS[:80][::-1], queries_max=200))


def test_what_cannot_be_compared_says_why():
    for given, other, said in (
        (line(WORSE), line(BETTER, [f"other {i}" for i in range(200)]), "0 queries are in both, of 200 and 200"),
        (line(WORSE), {"series": "program", "gaps": [0.1]}, "has no texts, by which queries are paired"),
        (line(WORSE), line(BETTER[:7], TEXTS), "should have a number in `gaps` for each of its texts"),
    ):
        with pytest.raises(EvaluationError, match=said):
            compare_lines(given, other)
    several = [line(WORSE), line(BETTER, n_examples=256)]
    assert choose_line(several, "program", 256, "a")["n_examples"] == 256
    for lines, series, n, said in (
        (several, "program", None, "a has program with 64, 256 examples; choose one"),
        (several, "program", 8, "a has no line of program with 8 examples; there are program"),
        (several, "floor", None, "a has no line of floor; there are program"),
        ([*several, several[0]], "program", 64, "a has 2 lines of program with the same number of examples"),
    ):
        with pytest.raises(EvaluationError, match=said):
            choose_line(lines, series, n, "a")


def test_the_command(tmp_path):
    vote = line(BETTER) | {"series": "neighbours' vote", "reference": "full, seed 0"}
    lines = [line(WORSE, reference="full, seed 0"), vote]
    (tmp_path / "a").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "b").write_text(json.dumps(line(BETTER, reference="full, seed 1")))

    def icl(*arguments):
        return CliRunner().invoke(main, ["compare", *map(str, arguments)], prog_name="icl")

    shown = icl(tmp_path / "a", tmp_path / "b").stdout
    assert "200 queries in both, of 200 in A and 200 in B" in shown
    assert "They are of other references: A full, seed 0, B full, seed 1." in shown
    beside = json.loads(icl(tmp_path / "a", "--with", "neighbours' vote", "--json").stdout)
    assert beside["differences"][0]["difference"] == pytest.approx(BETTER.mean() - WORSE.mean())
    assert icl(tmp_path / "a").exit_code == 2
    (tmp_path / "c").write_text("no JSON")
    assert "line 1: expected a JSON object" in icl(tmp_path / "a", tmp_path / "c").stderr
