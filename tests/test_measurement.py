import json
from pathlib import Path

import pytest
from measured_rows import PROGRAM

from evaluation.measurement import Measurement, measurements
from evaluation.report import render
from evaluation.sentences import verdict_sentence
from evaluation.summary import summary_lines
from icl_compiler.errors import EvaluationError


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    changed = PROGRAM | {"gap": numpy.float32(0.25), "n_examples": numpy.int64(512)}
    row = Measurement.from_row(changed)
    assert (row.gap, row.n_examples) == (0.25, 512)
    assert type(row.n_examples) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"series": "vote"}, "row 2: series should be one of 'program', .* is 'vote'"),
        ({"gap": "0.2"}, "row 2: gap should be a number or null, is '0.2'"),
        ({"gap": 1.7}, r"row 2: gap should be in \[0, 1\], is 1.7"),
        ({"n_examples": 1.5}, "row 2: n_examples should be a whole number, is 1.5"),
        ({"n_queries": -1}, "row 2: n_queries should be >= 0, is -1"),
        ({"ece": True}, "row 2: ece should be a number or null, is True"),
    ],
)
def test_a_row_that_is_wrong_is_named(change, message):
    with pytest.raises(EvaluationError, match=message):
        measurements([PROGRAM, PROGRAM | change])


def test_rows_of_older_versions_are_read_as_they_were():
    file = Path(__file__).parents[1] / "benchmarks" / "rows" / "main_job.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    old = [row for row in rows if row["version"] == "0.1.0" and "noise_against" not in row]
    assert (
        {row.noise_against for row in measurements(old)} == {row.gap_truncation for row in measurements(old)} == {None}
    )
    assert "scoring noise" in {row.title for row in measurements(old)}
    assert len(summary_lines(old)) == len(old) + 2
    assert not any("noise" in sentence or "bounds" in sentence for sentence in verdict_sentence(old))


@pytest.mark.parametrize("function", [measurements, render, summary_lines, verdict_sentence])
def test_no_rows_is_an_error_with_a_sentence(function):
    with pytest.raises(EvaluationError, match="there are no rows to report on"):
        function([])
