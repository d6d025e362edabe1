import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scoring
from benchmarks.peers import contender, environments
from benchmarks.scoring import Bench, Marks, Setting, Text

WORDS = [Text([7, 9], " yes\n"), Text([8, 9], " no\n")]
SETTING = Setting("mr", 4, [Text([1, 2, 3], "a"), Text([1, 2, 4], "b")], WORDS, [Text([5], "c")])
FACTS = {"model": "m", "dtype": "bfloat16", "machine": "2 cores", "seed": 0, "commit": "abc", "date": "2026-01-01"}


def result(seconds, logprobs=((-1.0, -2.0), (-0.5, -3.0)), *, prompt_tokens=6, relative=False, peak=900.0):
    return {
        "queries": len(logprobs),
        "seconds": seconds,
        "forwards": 2 * len(logprobs),
        "computed_tokens": 20,
        "prompt_tokens": prompt_tokens,
        "logprobs": [list(each) for each in logprobs],
        "version": "1.0",
        "setting": "batch size 1",
        "relative": relative,
        "threads": 2,
        "loaded_memory_mib": 700.0,
        "peak_memory_mib": peak,
    }


MARKS = Marks([result(2.0), result(4.0), result(3.0)], [result(1.0), result(3.0), result(2.4)], result(9.0))


def test_rows_have_all_keys_in_order():
    for name in scoring.SCRIPTS:
        row = scoring.make_row(SETTING, name, result(6.0), MARKS, FACTS)
        assert tuple(row) == scoring.KEYS
        json.dumps(row, allow_nan=False)


def test_the_ratio_to_the_limit_is_the_median_of_paired_ratios():
    ours = scoring.make_row(SETTING, "icl", scoring.median_of(MARKS.icl), MARKS, FACTS)
    assert ours["ratio_to_limit"] == pytest.approx(0.75)  # of 1/2, 3/4 and 2.4/3
    assert ours["seconds"] == 3.0
    assert ours["repetitions"] == [2.0, 4.0, 3.0]
    assert ours["icl_speedup"] == 1.0


def test_fewer_queries_are_compared_per_token_of_their_prompts():
    slow = result(12.0, logprobs=[(-1.0, -2.0)], prompt_tokens=3)
    row = scoring.make_row(SETTING, "lm-eval", slow, MARKS, FACTS)
    assert row["queries"] == 1
    assert row["icl_speedup"] == pytest.approx((12 / 3) / (3 / 6))
    assert row["ratio_to_limit"] == pytest.approx((2.4 / 6) / (12 / 3))
    assert row["computed_tokens_per_query"] == 20


def test_median_takes_the_largest_memory():
    assert scoring.median_of([result(1.0, peak=5.0), result(2.0, peak=7.0)])["peak_memory_mib"] == 7.0


def test_agreement_is_on_the_queries_both_did():
    one, two = result(1.0, [(-1.0, -2.0)]), result(1.0, [(-1.25, -2.0), (-9.0, -1.0)])
    most, tv = scoring.agreement(one, two)
    first, second = (np.exp([p, -2.0]) / np.exp([p, -2.0]).sum() for p in (-1.0, -1.25))
    assert most == 0.25
    assert tv == pytest.approx(abs(first[0] - second[0]))


def test_a_constant_per_prompt_is_no_difference_where_only_ranks_are_known():
    shifted = [(-101.0, -102.0), (-50.5, -53.0)]
    most, tv = scoring.agreement(result(1.0, shifted, relative=True), result(1.0))
    assert (most, tv) == pytest.approx((0, 0), abs=1e-9)
    assert scoring.agreement(result(1.0, shifted), result(1.0))[0] == 100


def test_an_underflow_is_a_probability_of_zero():
    most, tv = scoring.agreement(result(1.0, [(-1.0, None)]), result(1.0, [(-1.5, -2.0)]))
    assert most == 0.5
    assert tv == pytest.approx(1 / (1 + math.exp(0.5)))


def test_limit_has_no_answers_to_agree():
    assert scoring.agreement(result(1.0, [(), ()]), result(1.0)) is None


def test_unshared_tokens_are_those_of_the_tree():
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [5, 6, 7]]
    assert scoring.unshared(prompts, [[7, 8, 9], [7, 5, 9]]) == [[1, 2, 3, 7, 8, 5], [4, 7, 8, 5], [5, 6, 7, 7, 8, 5]]


def test_what_stands_there_is_not_measured_again(tmp_path):
    path = tmp_path / "rows" / "scoring.jsonl"
    assert scoring.rows_of(path) == []
    for name in ("icl", "skorch"):
        scoring.keep(path, scoring.make_row(SETTING, name, result(6.0), MARKS, FACTS))
    rows = scoring.rows_of(path)
    names = list(scoring.SCRIPTS)
    assert scoring.missing(rows, SETTING, names, "abc") == ["limit", "brute force", "lm-eval", "openicl"]
    assert scoring.missing(rows, SETTING, names, "abc+") == names
    assert scoring.missing(rows, SETTING._replace(shots=16), names, "abc") == names


def test_a_finished_setting_starts_no_process(tmp_path, monkeypatch, capsys):
    path = tmp_path / "scoring.jsonl"
    for name in scoring.SCRIPTS:
        scoring.keep(path, scoring.make_row(SETTING, name, result(6.0), MARKS, FACTS))
    monkeypatch.setattr(Bench, "answer", lambda *_: pytest.fail("measured again"))
    bench = Bench("folder", "bfloat16", 60.0, "abc")
    assert scoring.race([SETTING], list(scoring.SCRIPTS), bench, path, FACTS) == 0
    assert len(scoring.rows_of(path)) == len(scoring.SCRIPTS)
    assert capsys.readouterr().out.startswith("| dataset |")


def test_a_peer_that_fails_leaves_the_others_their_rows(tmp_path, monkeypatch, capsys):
    def answer(bench, job):
        if job.contender == "skorch":
            raise RuntimeError("skorch failed")
        return result(1.0) if len(job.sizes) == 1 else {"seconds_by_size": {"1": 2.0, "512": 1.0}}

    monkeypatch.setattr(Bench, "answer", answer)
    path = tmp_path / "scoring.jsonl"
    bench = Bench("folder", "bfloat16", 60.0, "abc")
    assert scoring.race([SETTING], list(scoring.SCRIPTS), bench, path, FACTS) == 1
    assert [row["contender"] for row in scoring.rows_of(path)] == [name for name in scoring.SCRIPTS if name != "skorch"]
    assert "skorch failed" in capsys.readouterr().err


def test_openicl_gets_no_batches_that_outlast_the_cap(monkeypatch):
    asked = []
    monkeypatch.setattr(Bench, "fastest", lambda bench, job, sizes: asked.append((job, list(sizes))) or 1)
    many = SETTING._replace(label_words=[Text([i, 9], str(i)) for i in range(77)], warm_up=SETTING.prompts * 8)
    bench = Bench("folder", "bfloat16", 60.0, "abc")
    for setting in (SETTING._replace(warm_up=many.warm_up), many):
        for name in ("lm-eval", "openicl"):
            bench.size_for(name, setting)
    pairs = [len(job.prompts) * len(job.label_words) for job, _ in asked]
    assert pairs == [scoring.TRIAL_PAIRS] * 4
    assert [sizes for _, sizes in asked] == [[1, 4, 16], [1, 4, 16], [1, 4, 16], [1]]


def test_table_has_a_line_for_each_row():
    rows = [scoring.make_row(SETTING, name, result(6.0), MARKS, FACTS) for name in ("icl", "brute force")]
    head, rule, first, second = scoring.table(rows).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| mr | 2 | 4 | icl | batch size 1 | 2 | 0.333 |")
    assert second.endswith("|  |  |")


def test_exactness_is_told_with_its_bar():
    row = {"dataset": "mr", "labels": 2, "shots": 4, "queries": 3, "contender": "icl", "dtype": "float32"}
    row |= {"against": "brute force, float32", "max_difference": 2e-4, "bar": 1e-4}
    told = "mr, 2 labels, 4 shots, 3 queries: icl (float32) is 0.0002 off brute force, float32"
    assert scoring.told(row) == f"{told}, OUTSIDE the bar of 0.0001"
    assert scoring.told(row | {"max_difference": 1e-5, "bar": None}).startswith("mr, 2 labels")
    assert "bar" not in scoring.told(row | {"bar": None})


def test_a_job_survives_its_file(tmp_path):
    job = Bench("folder", "bfloat16", 60.0, "abc").job("icl", SETTING, cap_s=None)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job.__dict__))
    assert contender.Job.read(path) == job


class Clocked(contender.Contender):
    """Each prompt takes a second."""

    def __init__(self, monkeypatch, at_once):
        self.now, self.at_once, self.asked = 0.0, at_once, []
        monkeypatch.setattr(contender.time, "perf_counter", lambda: self.now)

    def use(self, size):
        return self.at_once

    def score(self, prompts, label_words):
        self.asked.append(len(prompts))
        self.now += len(prompts)
        return [[-math.inf] * len(label_words) for _ in prompts]


@pytest.mark.parametrize(
    ("at_once", "cap_s", "queries"),
    [(1, 5.0, 6), (1, 0.0, 3), (1, None, 20), (4, 5.0, 8), (None, 5.0, 5), (None, None, 20)],
)
def test_no_query_is_begun_after_the_cap(monkeypatch, at_once, cap_s, queries):
    clocked = Clocked(monkeypatch, at_once)
    prompts = [Text([1, i], "") for i in range(20)]
    job = contender.Job("x", "m", "float32", prompts, WORDS, prompts[:2], cap_s, 3, [1])
    counts = contender.Counter.__new__(contender.Counter)
    found = contender._measure(job, clocked, counts)
    assert (found["queries"], found["seconds"], found["prompt_tokens"]) == (queries, queries, 2 * queries)
    assert found["logprobs"] == [[None, None]] * queries


def test_a_trial_takes_the_faster_of_two_rounds(monkeypatch):
    clocked = Clocked(monkeypatch, 4)
    job = contender.Job("x", "m", "float32", [Text([1], "")] * 8, WORDS, [], None, 3, [1, 4])
    assert contender._trial(job, clocked) == {1: 8.0, 4: 8.0}
    assert clocked.asked == [1] + [4, 4] * 4


def test_peers_run_on_our_torch_and_transformers():
    def pins(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and line[0] != "#")

    ours, theirs = pins(environments.CONSTRAINTS), pins(environments.REQUIREMENTS)
    same = ("transformers", "tokenizers", "safetensors", "accelerate", "numpy")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    assert environments.pip_commands()[0] == ["install", f"torch=={ours['torch']}"]


def test_every_contender_has_its_script():
    folder = Path(scoring.HERE, "peers")
    assert {path.name for path in folder.glob("*_peer.py")} == set(scoring.SCRIPTS.values())
