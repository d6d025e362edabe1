"""`icl bounds` against the values that were computed by hand and by simulation before any of this was written."""

import json
import math

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bounds_cli import Case, bounds_of
from icl_compiler.cli import main


def icl(*arguments):
    return CliRunner().invoke(main, ["bounds", *map(str, arguments)], prog_name="icl")


def found(*arguments):
    said = icl(*arguments, "--json")
    assert said.exit_code == 0, said.output
    document = json.loads(said.stdout)
    return {bound["name"]: bound for bound in document["bounds"]}, document


ONE = "the law of the answers in one context"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # "other" is one outcome more.
        (["--labels", 76], {ONE: 2819, "the best learner on its worst law": 1210, "ln(1 / delta) / eps^2": 300}),
        (["--labels", 5], {ONE: 357, "the probability of one label in one context": 185, "d / eps": 10}),
        (["--labels", 76, "--contexts", 100], {"m V / eps^2 ln(m / delta)": 5_852_695}),
        (["--vocabulary", 50_000, "--length", 1], {ONE: 1_277_492, "l ln V / eps^2 ln(1 / delta)": 3242}),
        (
            ["--vocabulary", 2, "--length", 1, "--contexts", 100],
            {"on average over 100 contexts": 3874, "in all 100 contexts at once": 41_500},
        ),
        (["--vocabulary", 2, "--length", 3, "--epsilon", 0.3], {"token by token": 1974}),
        (["--vocabulary", 50_000, "--length", 8], {"the probability of each single answer": 4513}),
    ],
)
def test_examples_for_an_epsilon(arguments, expected):
    rows, _ = found(*arguments)
    assert {name: rows[name]["examples"] for name in expected} == pytest.approx(expected, abs=1)


def test_no_learner_reaches_what_the_paper_promises():
    # 3,242 examples are the order for epsilon 0.1; every learner has an expected TV of 0.28 somewhere.
    rows, _ = found("--vocabulary", 50_000, "--length", 1, "--examples", 3242)
    assert rows["any learner on its worst law, in expectation"]["epsilon"] == pytest.approx(0.28, abs=0.005)
    assert rows["l ln V / eps^2 ln(1 / delta)"]["epsilon"] == pytest.approx(0.1, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 300), st.integers(1, 3), st.integers(1, 200), st.floats(0.02, 0.4), st.booleans())
def test_the_two_columns_agree(vocabulary, length, contexts, epsilon, labels):
    case = Case(vocabulary, 1, contexts, 0.05, vocabulary - 1) if labels else Case(vocabulary, length, contexts, 0.05)
    for bound in bounds_of(case):
        n = bound.examples(epsilon)
        assert bound.epsilon(n) <= epsilon + 1e-8
        assert n == 1 or bound.epsilon(n - 1) > epsilon - 1e-8


def test_a_dataset_brings_labels_rows_and_contexts(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("said,intent\na,x\nb,y\na,y\nc,x\nb,y\n")
    columns = ("--text-column", "said", "--label-column", "intent")
    rows, document = found(path, *columns)
    # One row is a duplicate, and one text has two labels.
    assert (document["labels"], document["examples"], document["contexts"]) == (2, 4, 3)
    assert rows[ONE]["epsilon"] == pytest.approx(math.sqrt(math.log(6 / 0.05) / 8))
    assert found(path, *columns, "--contexts", 2)[1]["contexts"] == 2


def test_the_table_fits_the_terminal_and_keeps_its_order():
    for arguments in (["--labels", 10**6, "--contexts", 10**9, "--examples", 10**15], ["--labels", 2]):
        said = icl(*arguments)
        assert said.exit_code == 0
        assert max(map(len, said.stdout.splitlines())) <= 80
        heads = [
            said.stdout.index(head) for head in ("Provable:", "Lower bounds:", "Order, constant unknown", "yardstick")
        ]
        assert heads == sorted(heads)


def test_what_is_beyond_reach_is_called_so():
    said = icl("--vocabulary", 50_000, "--length", 100, "--examples", 1000)
    lines = {line[2:50].strip(): line[50:].split() for line in said.stdout.splitlines()}
    assert lines[ONE] == lines["token by token"] == ["vacuous", "vacuous"]
    assert lines["any learner on its worst law, in expectation"] == [">", "1e+100", "0.500"]
    assert lines["l ln V / eps^2 ln(1 / delta)"][0] == "324,132"
    said = icl("--labels", 2, "--contexts", 10**12)
    assert "in all 1,000,000,000,000 contexts at once" in said.stdout
    assert "vacuous" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "name one case: DATA, or --labels, or --vocabulary and --length"),
        (["train.csv", "--labels", 3], 2, "name one case"),
        (["--length", 3], 2, "give --vocabulary and --length together"),
        (["--labels", 1], 2, "1 is not in the range"),
        (["--labels", 3, "--epsilon", "nan"], 2, "nan is no finite number"),
        (["--labels", 3, "--delta", 0], 2, "0.0 is not in the range 0<x<1"),
        (["--labels", 3, "--text-column", "x"], 2, "name columns of DATA"),
        (["no.csv"], 1, "there is no file no.csv"),
        (["pairs.jsonl"], 1, "has targets to generate, not labels"),
    ],
)
def test_bad_input(arguments, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"input": "a b", "output": "A B"}\n{"input": "c d", "output": "C D"}\n')
    result = icl(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]
    assert isinstance(result.exception, SystemExit)
