"""What the table of the layouts says, against counts by hand."""

import pytest

from benchmarks.layouts import paired, table


def row(layout, computed, correct, **more):
    return {
        "dataset": "mr", "layout": layout, "blocks": 1, "shots_per_query": 16.0, "prompt_tokens_per_query": 500.0,
        "computed_tokens_per_query": computed, "predicted_tokens_per_query": computed, "queries_per_second": 2.0,
        "accuracy": sum(correct) / len(correct), "correct": correct, **more,
    }  # fmt: skip


def test_two_accuracies_are_compared_query_by_query():
    better, worse = [1] * 10, [0] * 6 + [1] * 4
    difference, p = paired(better, worse)
    assert difference.startswith("+0.60 [")
    low, high = (float(end) for end in difference[7:-1].split(","))
    assert -1 <= low < 0.6 < high <= 1
    assert float(p) == pytest.approx(2 / 2**6, abs=0.005)  # six won, none lost
    assert paired(worse, worse)[1] == "1.00"


def test_a_layout_stands_beside_shots_of_the_query_s_own():
    lines = table([row("per-query", 400.0, [1, 0, 1]), row("clustered", 20.0, [1, 1, 1])]).splitlines()
    assert len(lines) == 4
    assert "| clustered | 1 | 16.0 | 500 | 20 | 20 | 20.0 | 2.00 | 1.00 | +0.33 [" in lines[3]
    assert lines[2].count("|") == lines[3].count("|") == lines[0].count("|")
