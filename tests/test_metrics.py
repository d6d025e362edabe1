"""What is exposed, read by the client's own parser, and the dashboard, whose expressions name exactly that."""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import metrics as module
from serving.drift import DriftState, GapInterval
from serving.metrics import Metrics

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana.json"
DRIFTED = DriftState(2000, 0.6, 0.7, 0.3, np.array([0.25, 0.75]), 0.25, 0.2, 0.5, 0.4, ("unlike", "entropy"))
NOTHING = DriftState(0, None, None, None, None, None, None, None, None, ())


def served():
    metrics = Metrics()
    metrics.serve("shop", version="v1", base_model="echo", pool_rows=12, labels=("card", "parcel"))
    return metrics


def used():
    """Metrics of which every method was called."""
    metrics = served()
    metrics.request("shop", "/v1/classify", 200, 0.02)
    for stage in get_args(module.Stage):
        metrics.stage("shop", stage, 0.01)
    metrics.waiting(3)
    for reason in get_args(module.Rejection):
        metrics.rejected(reason)
    for outcome in get_args(module.Upstream):
        metrics.upstream("http://model:8000", outcome)
    metrics.tokens("shop", prompt=100, cached=80, completion=1)
    metrics.answer("shop", "card")
    for event in get_args(module.Feedback):
        metrics.feedback("shop", event)
    metrics.pool_rows("shop", 13)
    for outcome in get_args(module.Reload):
        metrics.reload("shop", outcome)
    metrics.drift("shop", DRIFTED)
    metrics.shadow("shop", GapInterval(0.2, 0.1, 0.3, 50), 4)
    return metrics


def samples(metrics):
    """Value by name and labels, without the times at which series began."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def said_of(metrics, name):
    return {key[1:]: value for key, value in samples(metrics).items() if key[0] == name}


def test_what_is_counted():
    seen = samples(used())
    assert seen["icl_requests_total", "program=shop", "route=/v1/classify", "status=200"] == 1
    assert seen["icl_request_seconds_sum", "program=shop", "route=/v1/classify"] == 0.02
    assert seen["icl_request_seconds_bucket", "le=0.01", "program=shop", "route=/v1/classify"] == 0
    assert seen["icl_request_seconds_bucket", "le=0.025", "program=shop", "route=/v1/classify"] == 1
    assert seen["icl_stage_seconds_count", "program=shop", "stage=queue"] == 1
    assert seen["icl_queue_waiting",] == 3
    assert seen["icl_rejected_total", "reason=deadline"] == 1
    assert seen["icl_upstream_requests_total", "outcome=retried", "upstream=http://model:8000"] == 1
    counted = [seen[f"icl_{kind}_tokens_total", "program=shop"] for kind in ("prompt", "cached", "completion")]
    assert counted == [100, 80, 1]
    assert seen["icl_answers_total", "label=card", "program=shop"] == 1
    assert seen["icl_feedback_total", "event=flagged", "program=shop"] == 1
    assert seen["icl_program_info", "base_model=echo", "program=shop", "version=v1"] == 1
    assert seen["icl_pool_rows", "program=shop"] == 13
    assert seen["icl_reloads_total", "outcome=failed", "program=shop"] == 1
    alarms = [seen["icl_drift_alarm", f"kind={kind}", "program=shop"] for kind in ("unlike", "labels", "entropy")]
    assert alarms == [1, 0, 1]
    drift = ("nearest_score", "unlike_share", "label_distance", "label_change", "entropy_nats")
    assert [seen[f"icl_drift_{name}", "program=shop"] for name in drift] == [0.6, 0.3, 0.25, 0.2, 0.5]
    assert [seen[f"icl_shadow_gap{end}", "program=shop"] for end in ("", "_low", "_high")] == [0.2, 0.1, 0.3]


def test_nobody_outside_can_make_series():
    metrics = used()
    metrics.request("name 0", "/v1/classify", 404, 0.01)
    metrics.answer("shop", "label 0")
    before = len(samples(metrics))
    for i in range(1, 50):
        metrics.request(f"name {i}", "/v1/classify", 404, 0.01)
        metrics.answer("shop", f"label {i}")
    assert len(samples(metrics)) == before
    assert said_of(metrics, "icl_requests_total")["program=unknown", "route=/v1/classify", "status=404"] == 50
    assert said_of(metrics, "icl_answers_total")["label=other", "program=shop"] == 50


@pytest.mark.parametrize(
    "call",
    [
        lambda metrics, name: metrics.stage(name, "model", 0.1),
        lambda metrics, name: metrics.tokens(name, prompt=1, cached=0, completion=0),
        lambda metrics, name: metrics.answer(name, "card"),
        lambda metrics, name: metrics.feedback(name, "given"),
        lambda metrics, name: metrics.pool_rows(name, 1),
        lambda metrics, name: metrics.reload(name, "ok"),
        lambda metrics, name: metrics.drift(name, DRIFTED),
        lambda metrics, name: metrics.shadow(name, GapInterval(0.2, 0.1, 0.3, 50), 4),
    ],
)
def test_no_method_takes_a_name_that_is_not_served(call):
    metrics = used()
    call(metrics, "evil")
    assert b"evil" not in metrics.text()


def test_two_servers_do_not_mix():
    one, two = used(), Metrics()
    assert said_of(one, "icl_requests_total") != {}
    assert said_of(two, "icl_requests_total") == {}


def test_another_version_takes_back_what_was_said_of_the_old_one():
    metrics = used()
    metrics.serve("shop", version="v2", base_model="echo", pool_rows=20, labels=("card", "refund"))
    assert said_of(metrics, "icl_program_info") == {("base_model=echo", "program=shop", "version=v2"): 1}
    assert said_of(metrics, "icl_pool_rows") == {("program=shop",): 20}
    seen = samples(metrics)
    assert [key for key in seen if re.match("icl_(drift|shadow_gap)", key[0])] == []
    assert seen["icl_requests_total", "program=shop", "route=/v1/classify", "status=200"] == 1


def test_what_a_monitor_does_not_know_has_no_series():
    metrics = used()
    metrics.drift("shop", NOTHING)
    metrics.shadow("shop", GapInterval(None, 0.0, 1.0, 0), 0)
    names = {key[0] for key in samples(metrics) if key[0].startswith(("icl_drift", "icl_shadow"))}
    ends, counts = (
        {"icl_shadow_gap_low", "icl_shadow_gap_high"},
        {"icl_shadow_samples_total", "icl_shadow_dropped_total"},
    )
    assert names == {"icl_drift_alarm", *ends, *counts}
    assert set(said_of(metrics, "icl_drift_alarm").values()) == {0}


def test_the_samples_of_a_shadow_are_counted_once_and_those_of_the_next_added():
    metrics = served()
    for scored, dropped in ((50, 4), (50, 4), (60, 4), (10, 1)):
        metrics.shadow("shop", GapInterval(0.2, 0.1, 0.3, scored), dropped)
    assert said_of(metrics, "icl_shadow_samples_total") == {("program=shop",): 70}
    assert said_of(metrics, "icl_shadow_dropped_total") == {("program=shop",): 5}


def test_requests_in_flight():
    metrics = served()
    with pytest.raises(OSError), metrics.in_flight():
        assert said_of(metrics, "icl_in_flight") == {(): 1}
        raise OSError
    assert said_of(metrics, "icl_in_flight") == {(): 0}


def expressions():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    yield from (variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query")
    yield from (target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))


def test_the_dashboard_names_what_is_exposed_and_all_of_it():
    exposed = {}
    for name, *labels in samples(used()):
        exposed[name] = {"le", *exposed.get(name, ())} if name.endswith("_bucket") else {*exposed.get(name, ())}
        exposed[name] |= {label.partition("=")[0] for label in labels}
    shown = set()
    for expression in expressions():
        names = set(re.findall(r"\bicl_\w+", expression))
        assert names <= exposed.keys(), expression
        shown |= names
        for name, selector in re.findall(r"\b(icl_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= exposed[name], expression
        for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
            assert set(re.findall(r"\w+", grouped)) <= set.union(*(exposed[name] for name in names)), expression
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in exposed} == {
        re.sub("_(bucket|sum|count)$", "", name) for name in shown
    }


def test_the_panels_of_the_dashboard_do_not_overlap():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
