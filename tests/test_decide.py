"""Decisions from rows made by hand: verdicts by their intervals, curves that are known, costs computed on paper."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from measured_rows import VOTE, row

from evaluation.intervals import betting
from icl_compiler.cli import main

ROWS = Path(__file__).parents[1] / "benchmarks" / "rows" / "main_job.jsonl"


@pytest.fixture
def icl(tmp_path, monkeypatch):
    """Runs `icl decide` on rows."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments):
        text = rows if isinstance(rows, str) else "".join(json.dumps(each) + "\n" for each in rows)
        Path("rows.jsonl").write_text(text)
        return CliRunner().invoke(main, ["decide", "rows.jsonl", *map(str, arguments)], prog_name="icl")

    return run


@pytest.fixture
def decided(icl):
    def run(rows, *arguments):
        said = icl(rows, *arguments, "--json")
        assert (said.exit_code, said.stderr) == (0, ""), said.output
        return json.loads(said.stdout)

    return run


def line(gaps, **changes):
    return [row(gap=gap, n_examples=n, **changes) for n, gap in gaps.items()]


FLOOR = row("floor", 0.05, 0.02, prompt_tokens_per_query=31.0)
WITHIN = line({16: 0.3, 64: 0.06, 256: 0.05})


@pytest.mark.parametrize(
    ("gaps", "epsilon", "answer", "n", "further"),
    [
        ({16: 0.3, 64: 0.06, 256: 0.05}, 0.1, "within", 64, None),
        ({16: 0.3, 64: 0.06, 256: 0.05}, 0.02, "undecided", 256, 1),
        ({16: 0.05, 64: 0.2}, 0.1, "not within", 64, None),
        # At 0.08 +- 0.03 on 217 queries the end is 0.03 away and has to come to 0.02: 217 * 2.25 in all.
        ({64: 0.08}, 0.1, "undecided", 64, math.ceil(217 * 2.25) - 217),
    ],
)
def test_verdicts(gaps, epsilon, answer, n, further, decided):
    (found,) = decided([FLOOR, *reversed(line(gaps))], "--epsilon", epsilon)
    assert (found["answer"], found["n"], found["further_queries"]) == (answer, n, further)
    assert found["sizes"] == sorted(gaps)


def test_sentences(icl):
    said = icl([FLOOR, *WITHIN])
    assert said.exit_code == 0
    assert said.stdout == (
        "banking77\n"
        "  Prompt: with 64 examples and at every larger size measured, up to 256, the gap\n"
        "  is at most 0.1; with 64 it is 0.060 [0.030, 0.090]. With 64 examples the gap\n"
        "  is at the floor, [0.030, 0.070], as far as 217 queries can tell: the prompt is\n"
        "  as close to the reference as a second fine-tuning, or not shown to be further\n"
        "  away.\n"
        "  The verdict on 0.1 is wrong with probability at most 5 %, if the queries were\n"
        "  drawn at random and nothing was chosen on them.\n"
        "  3 sizes measured, and a curve needs 4: `icl evaluate --examples N`, several\n"
        "  times, measures more.\n"
    )


def test_a_floor_is_that_of_the_same_reference_queries_and_level(decided):
    for other in ({"reference": "LoRA"}, {"data_sha256": "0"}, {"level": 0.9}, {"dataset": "mr"}, {"gap_low": None}):
        (found,) = decided([FLOOR | other, *WITHIN])
        assert found["floor"] is None
        assert found["sentences"][2].startswith("No floor with an interval of 95 % is among the rows")
    other = FLOOR | {"model": "larger", "gap_high": 0.06}
    assert decided([other, FLOOR, *WITHIN])[0]["floor"] == [0.03, 0.07]
    assert decided([other, *WITHIN])[0]["floor"] == [0.03, 0.06]


def test_every_program_has_its_own_verdict(decided):
    better = line({16: 0.05}, retriever="mmr", max_prompt_tokens=2048)
    found = decided([*WITHIN, *better, *line({16: 0.05}, dataset="mr")])
    assert [each["name"] for each in found] == ["banking77, dense, 1,024 tokens", "banking77, mmr, 2,048 tokens", "mr"]
    assert [each["n"] for each in found] == [64, 16, 16]
    assert [any("2 verdicts are about this dataset" in said for said in each["sentences"]) for each in found] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (line({16: 0.3}, margin=None), "the row with the gap 0.300 does not say its interval (gap_low)"),
        (line({16: 0.3}, level=None), "the row with the gap 0.300 does not say its level (level)"),
        (line({16: 0.3}, n_queries=None), "the row with the gap 0.300 does not say its number of queries (n_queries)"),
        ([row(n_examples=None)], "the row with the gap 0.210 does not say its number of examples (n_examples)"),
        (line({16: 0.3}) + line({64: 0.3}, level=0.9), "the intervals are of 90 % and 95 %, and a verdict needs one"),
        (line({16: 0.3}) + line({16: 0.2}), "two rows with 16 examples differ, with gaps of 0.300 and 0.200"),
        ([row(gap_low=0.3, gap_high=0.2)], "an interval of gaps should be within [0, 1], low end first"),
    ],
)
def test_rows_that_support_no_verdict(rows, said, icl, decided):
    result = icl(rows)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"banking77: No verdict: {said}" in result.stderr
    # They spoil no other verdict.
    found = decided([*rows, *line({16: 0.05}, dataset="mr")])
    assert [(each["name"], each["answer"]) for each in found] == [("banking77", None), ("mr", "within")]
    assert said in found[0]["sentences"][0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([FLOOR, row(gap=None)], "there is no gap of a program among the rows; measure it: icl evaluate PROGRAM"),
        (json.dumps(row()) + '\n{"series": "pro', "rows.jsonl, row 2, is no JSON object"),
        ("", "rows.jsonl is empty"),
        ([row(), row(gap=1.5)], "rows.jsonl, row 2: gap should be in [0, 1], is 1.5"),
        ([{"text": "hi", "label": "a"}], "rows.jsonl, row 1: series should be one of 'program'"),
    ],
)
def test_files_that_are_refused(rows, said, icl):
    result = icl(rows)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_the_same_row_twice_counts_once(decided):
    assert decided([FLOOR, *WITHIN, *WITHIN]) == decided([FLOOR, *WITHIN])


def test_a_curve_that_is_known(decided):
    gaps = {n: 0.02 + 0.4 / math.sqrt(n) for n in (16, 64, 256, 1024)}
    (found,) = decided(line(gaps, margin=0.001))
    # 0.4 / 0.08 squared.
    assert found["curve"]["examples_until_epsilon"]["n"] == pytest.approx(25, abs=1)
    assert found["curve"]["floor"] == pytest.approx(0.02, abs=1e-4)
    assert any("(power; approximate) gets to 0.1 with 25 examples [2" in said for said in found["sentences"])
    (found,) = decided(line(gaps, margin=0.001), "--epsilon", 0.026)
    assert any("4,4" in said and "no measurement supports this" in said for said in found["sentences"])
    (found,) = decided(line(gaps, margin=0.001), "--epsilon", 0.01)
    assert any("does not get to 0.01: it levels off at 0.020 [0.0" in said for said in found["sentences"])
    # Wide intervals leave the floor open.
    assert decided(line(gaps, margin=0.05))[0]["curve"]["floor_is_unidentified"]
    assert not decided(line(gaps, margin=0.001))[0]["curve"]["floor_is_unidentified"]
    (found,) = decided(line(gaps, margin=0.0))
    assert found["answer"] == "within"
    assert any(said.startswith("No curve: standard errors should be above 0") for said in found["sentences"])


@pytest.mark.parametrize(
    ("gap", "within", "closer"), [(0.01, True, True), (0.06, True, False), (0.08, False, False), (0.3, False, False)]
)
def test_the_vote_alone_may_do(gap, within, closer, decided):
    # The prompt is 0.05 +- 0.03.
    (found,) = decided([FLOOR, *WITHIN, row(VOTE, gap, 0.005 if gap < 0.05 else 0.03)])
    said = " ".join(found["sentences"])
    assert ("vote of the nearest neighbours alone is within 0.1" in said) == within
    assert ("is closer to the reference than the prompt" in said) == closer


def test_rows_that_were_asked_in_turn(decided):
    asked = {"epsilon": 0.1, "decision": "within", "queries_asked": 217, "queries_max": 1000, "n_labels": 5}
    (found,) = decided([FLOOR, row(gap=0.05, n_examples=64, **asked)], "--epsilon", 0.09)
    assert found["answer"] == "within"
    assert any(
        "Within 0.1: decided after 217 of at most 1,000 queries, 783 saved." in each for each in found["sentences"]
    )
    # 6 outcomes, as in the rows: the labels and "other".
    assert found["without_prior"] == math.ceil(math.log((2**6 - 2) / 0.05) / (2 * 0.09**2))
    (found,) = decided([row(gap=0.09, n_examples=64, **asked | {"decision": "undecided", "queries_asked": 1000})])
    assert any("Not decided whether it is within 0.1, after all 1,000 queries." in each for each in found["sentences"])


def test_gaps_known_within_bounds_say_so(decided):
    said = "The engine gave only its likeliest tokens"
    for truncation in (None, 0.02):
        (found,) = decided([FLOOR, *WITHIN[:-1], WITHIN[-1] | {"gap_truncation": truncation}])
        assert any(each.startswith(said) for each in found["sentences"]) == (truncation is not None)


def test_what_a_learner_without_prior_needs(decided, icl):
    # 78 outcomes: a union bound over all events.
    expected = math.ceil(math.log((2**78 - 2) / 0.05) / (2 * 0.1**2))
    assert decided(WITHIN, "--labels", 77)[0]["without_prior"] == expected
    result = icl([*WITHIN, *line({16: 0.05}, dataset="mr")], "--labels", 77)
    assert result.exit_code == 2
    assert "--labels is the number of one dataset" in result.stderr


PRICES = ("--prompt-price", 1, "--tuned-price", 1, "--tuning-cost", 7)


def test_break_even(decided):
    # 731 tokens against 31: 700 a query, at 1 a million; after 10,000 queries both have cost the same.
    # The tokens are those of n*, not of the most examples.
    (found,) = decided([FLOOR, *WITHIN[:-1], WITHIN[-1] | {"prompt_tokens_per_query": 900.0}], *PRICES)
    assert found["break_even"]["queries"] == 10_001
    # An answer of the tuned model costs as much more as its prompt costs less.
    assert decided([FLOOR, *WITHIN], *PRICES, "--answer-price", 0, 0.0007)[0]["break_even"]["queries"] is None
    # Without a floor, the prompt with zero shots says how long a query is: 131 tokens, 600 saved.
    zero = row("zero shots", 0.8, prompt_tokens_per_query=131.0)
    assert decided([zero, *WITHIN], *PRICES)[0]["break_even"]["queries"] == math.floor(7 / 0.0006) + 1


def test_break_even_without_tokens_or_prices(decided, icl):
    (found,) = decided(WITHIN, *PRICES)
    assert found["answer"] == "within"
    assert found["sentences"][-1].startswith("No break-even: the rows do not say how many tokens a query has")
    result = icl(WITHIN, "--prompt-price", 1)
    assert result.exit_code == 2
    assert "a break-even needs --prompt-price, --tuned-price and --tuning-cost" in result.stderr


def test_rows_of_the_benchmark():
    said = CliRunner().invoke(main, ["decide", str(ROWS), "--json"])
    found = json.loads(said.stdout)
    assert [each["name"] for each in found] == ["banking77", "mr", "subj", "clinc150_oos"]
    assert {(each["answer"], each["against_floor"]) for each in found} == {("not within", "above")}


def seeds(gaps, **changes):
    """A line of each seed, whose gaps of 200 queries have the means given, each query its own."""
    ease = np.linspace(0.5, 1.5, 200)
    return [
        row(gap=gap, n_examples=n, seed=seed, n_queries=200, **changes)
        | {"reference": f"RSR, seed {seed}, 900 examples", "gaps": (gap * ease[:: 1 - 2 * (seed % 2)]).tolist()}
        for seed, line in gaps.items()
        for n, gap in line.items()
    ]


def test_the_floor_is_compared_query_by_query(decided):
    """The two intervals overlap; every query says that the prompt is further away than a second fine-tuning."""
    rows, floors = seeds({0: {256: 0.2}}), seeds({0: {256: 0.15}}, series="floor")
    (found,) = decided([*rows, *floors])
    assert found["intervals"][-1][0] < found["floor"][1]
    assert found["against_floor"] == "above"
    assert 0 < found["beyond_floor"][0] < 0.05 < found["beyond_floor"][1]
    assert "query by query): a second fine-tuning is closer to the reference" in " ".join(found["sentences"])
    (without,) = decided([*rows, *({k: v for k, v in floor.items() if k != "gaps"} for floor in floors)])
    assert (without["against_floor"], without["beyond_floor"]) == ("at", None)


def test_seeds_that_asked_the_same_queries_have_one_verdict(decided):
    """The two seeds' gaps vary against each other, so that the mean of both is known better than either."""
    rows = seeds({0: {16: 0.2, 256: 0.05}, 1: {16: 0.3, 256: 0.09}})
    floors = seeds({0: {256: 0.01}, 1: {256: 0.03}}, series="floor")
    (found,) = decided([*rows, *floors])
    assert (found["name"], found["sizes"], found["answer"], found["n"]) == ("banking77", [16, 256], "within", 256)
    assert found["gaps"] == pytest.approx([0.25, 0.07])
    low, high = found["floor"]
    assert low < 0.02 < high
    assert found["against_floor"] == "above"
    said = " ".join(found["sentences"])
    assert "the mean gap over the seeds 0 and 1, of the examples drawn and of the reference; with 256 examples" in said
    assert "they have 0.050 [0.020, 0.080] and 0.090 [0.060, 0.120]" in said
    interval = betting(np.mean([each["gaps"] for each in rows if each["n_examples"] == 256], axis=0), delta=0.05)
    assert found["intervals"][1] == pytest.approx(list(interval), abs=0.01)
    alone = decided([each for each in rows if each["seed"] == 1])
    assert [each["answer"] for each in alone] == ["undecided"]
    assert found["intervals"][1][1] < alone[0]["intervals"][1][1]
    assert decided([*rows, *rows, *floors]) == [found]


@pytest.mark.parametrize(
    "change",
    [{"gaps": None}, {"gaps": [0.1] * 100}, {"n_examples": 512}, {"data_sha256": "other"}, {"gap_truncation": 0.02}],
)
def test_seeds_that_cannot_be_taken_together_have_their_own(decided, change):
    rows = seeds({0: {16: 0.2, 256: 0.08}, 1: {16: 0.3, 256: 0.1}})
    rows[-1] |= change
    assert 2 <= len(decided(rows)) <= 3


def test_a_curve_of_seeds_counts_how_they_differ(decided):
    gaps = {n: 0.05 + 1.2 / math.sqrt(n) for n in (16, 64, 256, 1024)}
    (alike,) = decided(seeds({0: gaps, 1: gaps}))
    (apart,) = decided(seeds({0: gaps, 1: {n: 1.3 * gap for n, gap in gaps.items()}}))
    assert alike["curve"]["form"] == apart["curve"]["form"]
    widths = [np.ptp(found["curve"]["floor_interval"]) for found in (alike, apart)]
    assert widths[0] < widths[1]


def test_gaps_that_are_none_are_refused(icl):
    said = icl([row() | {"gaps": [0.1, "much"]}])
    assert said.exit_code == 1
    assert "rows.jsonl, row 1: gaps should be a number or null, is 'much'" in " ".join(said.stderr.split())


def test_a_curve_that_does_not_fit_promises_nothing(decided, icl):
    rows = line({16: 0.91, 128: 0.84, 1024: 0.46, 9992: 0.35}, margin=0.03)
    (found,) = decided(rows)
    said = " ".join(found["sentences"])
    assert found["curve"]["misfit"] in said
    assert "does not fit: with 128 examples it says 0.7" in said
    assert "gets to 0.1" not in said
