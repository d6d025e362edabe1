"""What /metrics says: counts, times and the gauges of drift, in the text format of Prometheus.

- A server has a `Metrics` with a registry of its own, so that two of them in one process do not mix.
- Nobody outside can make series: a label value is a word that the code writes, or comes from what is served. A program
  that is not served is "unknown", an answer that is no label of its program "other". Routes are given as templates.
- Names are for good, dashboards and alerts hang on them: `deploy/grafana.json` shows every one of them.
"""

import threading
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serving.drift import Alarm, DriftState, GapInterval

Stage = Literal["retrieve", "queue", "model"]
Rejection = Literal["queue_full", "rate_limit", "deadline", "too_large", "unauthorised"]
Upstream = Literal["ok", "retried", "failed"]
Feedback = Literal["given", "flagged", "undone"]
Reload = Literal["ok", "failed"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _Served(NamedTuple):
    version: str
    base_model: str
    labels: frozenset[str]


class Metrics:
    """The metrics of one server. Safe for threads.

    >>> metrics = Metrics()
    >>> metrics.serve("banking", version="0a1b2c", base_model="echo", pool_rows=900, labels=("card", "parcel"))
    >>> metrics.request("a name from outside", "/v1/classify", 404, 0.001)
    >>> b'icl_requests_total{program="unknown",route="/v1/classify",status="404"} 1.0' in metrics.text()
    True
    """

    CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
    """Of `text()`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        seconds = partial(Histogram, registry=self._registry, buckets=_SECONDS)
        one = ["program"]
        self._requests = counter("icl_requests_total", "Requests answered", ["program", "route", "status"])
        self._request_seconds = seconds("icl_request_seconds", "Time of a request", ["program", "route"])
        self._stage_seconds = seconds("icl_stage_seconds", "Time of a part of a request", ["program", "stage"])
        self._queue = gauge("icl_queue_waiting", "Queries that wait for the model")
        self._in_flight = gauge("icl_in_flight", "Requests that are being answered")
        self._rejected = counter("icl_rejected_total", "Requests refused", ["reason"])
        self._upstream = counter(
            "icl_upstream_requests_total", "Requests to the model servers", ["upstream", "outcome"]
        )
        self._prompt = counter("icl_prompt_tokens_total", "Tokens of prompts, cached ones included", one)
        self._cached = counter("icl_cached_tokens_total", "Tokens of prompts that the model server had cached", one)
        self._completion = counter("icl_completion_tokens_total", "Tokens generated", one)
        self._answers = counter("icl_answers_total", "Queries answered, by likeliest label", ["program", "label"])
        self._feedback = counter("icl_feedback_total", "Corrections", ["program", "event"])
        self._info = gauge("icl_program_info", "1 for what is served", ["program", "version", "base_model"])
        self._rows = gauge("icl_pool_rows", "Rows in the pool, corrections included", one)
        self._reloads = counter("icl_reloads_total", "Attempts to change the version", ["program", "outcome"])
        self._alarm = gauge("icl_drift_alarm", "1 while an alarm is on", ["program", "kind"])
        self._drift = {
            field: gauge(f"icl_drift_{name}", what, one)
            for field, name, what in (
                ("nearest", "nearest_score", "Mean score of the nearest row of the pool"),
                ("unlike_share", "unlike_share", "Share of the queries that are unlike the pool"),
                ("label_distance", "label_distance", "TV between the labels answered and the pool's"),
                ("label_change", "label_change", "TV between the labels answered and those of the first window"),
                ("entropy", "entropy_nats", "Mean entropy of the likeliest label against all else"),
            )
        }
        self._gap = {
            field: gauge(name, what, one)
            for field, name, what in (
                ("mean", "icl_shadow_gap", "Mean TV to the reference"),
                ("low", "icl_shadow_gap_low", "Low end of its interval, valid at any time"),
                ("high", "icl_shadow_gap_high", "High end of its interval, valid at any time"),
            )
        }
        self._shadowed = counter("icl_shadow_samples_total", "Queries scored with the reference too", one)
        self._dropped = counter("icl_shadow_dropped_total", "Sampled queries not scored with the reference", one)
        self._lock = threading.Lock()
        self._served: dict[str, _Served] = {}
        self._seen: dict[tuple[Counter, str], int] = {}
        for reason in get_args(Rejection):
            self._rejected.labels(reason)

    def serve(
        self, program: str, *, version: str, base_model: str, pool_rows: int, labels: Collection[str] = ()
    ) -> None:
        """From now on `program` is served in this version; what was said of another version's drift is taken back."""
        with self._lock:
            old, new = self._served.get(program), _Served(version, base_model, frozenset(labels))
            if old and old != new:
                self._info.remove(program, old.version, old.base_model)
                for gauge in (*self._drift.values(), *self._gap.values()):
                    gauge.remove(program)
                for kind in get_args(Alarm):
                    self._alarm.remove(program, kind)
            self._served[program] = new
            self._info.labels(program, version, base_model).set(1)
        self.pool_rows(program, pool_rows)

    def request(self, program: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is the template of the matched route, never the path asked for."""
        self._requests.labels(self._name(program), route, status).inc()
        self._request_seconds.labels(self._name(program), route).observe(seconds)

    def stage(self, program: str, stage: Stage, seconds: float) -> None:
        """A part of a request took so long."""
        self._stage_seconds.labels(self._name(program), stage).observe(seconds)

    def waiting(self, queries: int) -> None:
        """So many queries wait for the model now."""
        self._queue.set(queries)

    def in_flight(self) -> AbstractContextManager[object]:
        """Counts a request while it is being answered: `with metrics.in_flight():`."""
        return self._in_flight.track_inprogress()

    def rejected(self, reason: Rejection) -> None:
        """A request was refused."""
        self._rejected.labels(reason).inc()

    def upstream(self, upstream: str, outcome: Upstream) -> None:
        """A request to a model server ended. `upstream` is its address as the server was started with."""
        self._upstream.labels(upstream, outcome).inc()

    def tokens(self, program: str, *, prompt: int, cached: int, completion: int) -> None:
        """What a query cost; `cached` of the `prompt` tokens were not computed."""
        for counter, count in ((self._prompt, prompt), (self._cached, cached), (self._completion, completion)):
            counter.labels(self._name(program)).inc(count)

    def answer(self, program: str, label: str | None) -> None:
        """A query was answered; `label` is the likeliest one, `None` for generated text."""
        served = self._served.get(program)
        self._answers.labels(self._name(program), label if served and label in served.labels else "other").inc()

    def feedback(self, program: str, event: Feedback) -> None:
        """A correction was given, given with a flag (both are counted), or undone."""
        self._feedback.labels(self._name(program), event).inc()

    def pool_rows(self, program: str, rows: int) -> None:
        """The pool has so many rows now."""
        self._rows.labels(self._name(program)).set(rows)

    def reload(self, program: str, outcome: Reload) -> None:
        """A reload or rollback was tried."""
        self._reloads.labels(self._name(program), outcome).inc()

    def drift(self, program: str, state: DriftState) -> None:
        """What the program's monitor says; what it does not know has no series."""
        for field, gauge in self._drift.items():
            _set(gauge, self._name(program), getattr(state, field))
        for kind in get_args(Alarm):
            self._alarm.labels(self._name(program), kind).set(kind in state.alarms)

    def shadow(self, program: str, gap: GapInterval, dropped: int) -> None:
        """What the program's shadow says; both numbers count from the start of that shadow."""
        for field, gauge in self._gap.items():
            _set(gauge, self._name(program), getattr(gap, field))
        with self._lock:
            for counter, now in ((self._shadowed, gap.samples), (self._dropped, dropped)):
                before = self._seen.get((counter, program), 0)
                # A smaller number is that of a new shadow.
                counter.labels(self._name(program)).inc(now - before if now >= before else now)
                self._seen[counter, program] = now

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _name(self, program: str) -> str:
        return program if program in self._served else "unknown"


def _set(gauge: Gauge, program: str, value: float | None) -> None:
    if value is None:
        gauge.remove(program)
    else:
        gauge.labels(program).set(value)
