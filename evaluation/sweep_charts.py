"""The plots that a sweep adds to a report: the fitted curve beside the bounds, and the calibration of the prompt.

- The curve is that of the head's program: its rows that differ in their number of examples only, and those of other
  seeds where they have every size. Beyond the sizes measured it is dotted, with its band, and ends at four times the
  largest.
- The bounds are about a learner without prior, on a single query: a yardstick, not limits of a prompt. The paper's
  orders have no constant; they are drawn with 1, dashed, and called so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from evaluation.bounds import assouad_lower, laplace_tv, sharma_s1, sharma_s4
from evaluation.charts import Figure, Plot, colour, error_bars, marker, new_figure
from evaluation.crossover import crossover
from evaluation.curve_points import Points
from evaluation.curves import BASELESS, FittedCurve, fitted_curve
from evaluation.decide import ENOUGH_SIZES, SETTINGS, Decision, decide
from evaluation.formatting import counted, share
from evaluation.intervals import Interval
from evaluation.measurement import Group, Measurement, Row
from evaluation.seeds import without_seed
from icl_compiler.errors import EvaluationError

_PLACES = 41


def line_of(group: Group) -> list[Measurement]:
    """The rows of the head's program, by their number of examples; none without a head."""
    return next(iter(lines_of(group)), [])


def lines_of(group: Group) -> list[list[Measurement]]:
    """The rows of the head's program for each seed that has all sizes of the head's, which comes first."""
    head = group.head
    if head is None:
        return []
    found: dict[int | None, dict[int, Measurement]] = {head.seed: {}}
    for row in group.rows:
        measured = row.series == "program" and row.gap is not None and row.n_examples
        if measured and _settings(row) == _settings(head):
            found.setdefault(row.seed, {})[row.n_examples or 0] = row
    sizes = sorted(found[head.seed])
    return [[by_size[n] for n in sizes] for by_size in found.values() if set(sizes) <= set(by_size)]


def _settings(row: Measurement) -> list[object]:
    """What makes it another program; its seed, which the reference names too, does not."""
    kept = [getattr(row, field) for field in SETTINGS if field not in ("seed", "reference")]
    return [*kept, without_seed(row.reference)]


def decision_of(group: Group, epsilon: float) -> Decision | None:
    """The verdict on the head's program; `None` where only one number of examples is measured."""
    lines = lines_of(group)
    if not lines or len(lines[0]) < 2:
        return None
    beside = [row for row in group.rows if row.series in ("floor", "neighbours' vote")]
    try:
        return decide([row for line in lines for row in line] + beside, epsilon=epsilon)[0]
    except EvaluationError:
        return None


def crossing_of(group: Group, raw: Mapping[int, Row]) -> str | None:
    """Where fine-tuning on the prompt's own examples becomes better than the prompt, in words; `None` if not measured.

    From fitted curves of the error, so from four sizes on, of a sweep with references on the same examples.
    """
    lines = lines_of(group)
    line = next(iter(lines), [])
    if len(line) < ENOUGH_SIZES or len({row.reference_examples for row in line}) < len(line):
        return None
    sizes = np.array([row.n_examples for row in line])
    fits = []
    for name in ("correct", "reference_correct"):
        wrong = _of_queries(lines, raw, name)
        if wrong is None:
            return None
        points = Points.from_seeds(sizes, wrong)
        fits.append(fitted_curve(points, rng=np.random.default_rng(0), level=line[0].level or 0.95))
    if misfits := [fit.misfit for fit in fits if fit.misfit]:
        return (
            "From where on fine-tuning on the same examples is better is open: a curve fitted to the error does not "
            f"fit, {misfits[0]}."
        )
    found = crossover(*fits)
    if found.n is None:
        better = "the prompt" if found.first_is_lower else "fine-tuning"
        known = "" if found.low is None else f"; the interval of where they cross begins at {found.low:,} examples"
        said = f"The fitted curves of the error do not cross: {better} on the same examples has the lower one{known}."
    else:
        better = "fine-tuning on the same examples" if found.first_is_lower else "the prompt"
        high = "never" if found.high is None else f"{found.high:,}"
        said = f"By the fitted curves of the error, {better} is better from {counted(found.n, 'example')} on "
        said += f"[{found.low or found.n:,}, {high}] (approximate)."
    return f"{said} {found.warning}." if found.warning else said


def sweep_plots(group: Group, raw: Mapping[int, Row]) -> list[Plot]:
    """What a sweep adds to the plots of a group; `raw` are its rows as they were read, by the `id` of each."""
    lines = lines_of(group)
    line = next(iter(lines), [])
    found = []
    if len(line) >= 2 and all(row.gap_low is not None and row.gap_high is not None for row in line):
        curve = _curve(lines, raw)
        labels = next((row.n_labels for row in group.rows if row.n_labels), None)
        if curve is not None or labels is not None:
            found.append(_against_bounds(group, lines, curve, labels))
    head = group.head
    bins = raw[id(head)].get("reliability") if head is not None else None
    if isinstance(bins, Sequence) and bins:
        found.append(_reliability(cast(Measurement, head), cast(Sequence[Sequence[Any]], bins)))
    return found


def _of_queries(
    lines: Sequence[Sequence[Measurement]], raw: Mapping[int, Row], name: str
) -> Float[np.ndarray, "seeds queries sizes"] | None:
    """What the rows say of every query, bits as errors: of all seeds, or else of the head's alone."""
    for some in (lines, lines[:1]):
        found = [[raw[id(row)].get(name) for row in line] for line in some]
        kept = [[each for each in one if isinstance(each, list | str) and len(each) > 1] for one in found]
        if len({len(each) for one in kept for each in one}) == 1 and list(map(len, kept)) == list(map(len, found)):
            numbers = [[[bit == "0" for bit in x] if isinstance(x, str) else x for x in one] for one in kept]
            return np.array(numbers, dtype=np.float64).transpose(0, 2, 1)
    return None


def _curve(lines: Sequence[Sequence[Measurement]], raw: Mapping[int, Row]) -> FittedCurve | None:
    line = lines[0]
    if len(line) < ENOUGH_SIZES:
        return None
    sizes = np.array([row.n_examples for row in line])
    level = line[0].level or 0.95
    try:
        of_queries = _of_queries(lines, raw, "gaps")
        if of_queries is not None:
            points = Points.from_seeds(sizes, of_queries)
        else:
            gaps, lows, highs = (
                np.array([getattr(row, name) for row in line]) for name in ("gap", "gap_low", "gap_high")
            )
            points = Points.from_intervals(sizes, gaps, lows, highs, level=level)
        return fitted_curve(points, rng=np.random.default_rng(0), level=level)
    except (EvaluationError, ValueError):  # gaps that are no numbers
        return None


def _against_bounds(
    group: Group, lines: Sequence[Sequence[Measurement]], curve: FittedCurve | None, labels: int | None
) -> Plot:
    line = lines[0]
    sizes = [cast(int, row.n_examples) for row in line]
    last = sizes[-1] * BASELESS
    end = float(last) if curve else sizes[-1] * 1.3
    ends = (sizes[0] / 1.3, end)
    traces: list[Figure] = []
    words = ""
    if labels is not None:
        traces += _bounds(labels + 1, ends, 1 - (line[0].level or 0.95))
        words = (
            f' The grey band is what a learner without prior reaches on one query with {labels:,} labels and "other", '
            "provably: above its lower end on the worst law, below its upper end on all. The dashed lines are the "
            "orders of arXiv 2506.08060, whose constant is unknown (here 1). All of that is a yardstick: a frozen "
            "model has a prior, and may lie on either side."
        )
    if curve is not None:
        traces += _fit(curve, sizes, end)
        form = curve.fit.curve.form
        seeds = 1 if curve.points.per_seed is None else len(curve.points.per_seed)
        pooled = f", of {seeds} seeds," if seeds > 1 else ""
        words = (
            f" The line is a {form} curve{pooled} with its {100 * curve.level:g} % bootstrap band (approximate); "
            f"dotted, it is a guess.{f' It does not fit: {curve.misfit}.' if curve.misfit else ''}{words}"
        )
    measured = [row for each in lines for row in each]
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [row.n_examples for row in measured],
            "y": [row.gap for row in measured],
            "error_y": error_bars(measured, "gap") | {"color": colour(line[0])},
            "marker": marker(line[0], 11),
            "name": "the prompt, measured",
            "showlegend": curve is None,
            "hovertext": [
                f"{counted(cast(int, row.n_examples), 'example')}<br>gap {share(row.gap, 3)}<br>seed {row.seed}"
                for row in measured
            ],
            "hoverinfo": "text",
        }
    )
    floor = group.beside("floor")
    if floor is not None:
        traces.append(_straight(ends, cast(float, floor.gap), f"floor {share(floor.gap)}", "var(--floor)", "solid"))
    x = {
        "type": "log",
        "title": {"text": "labelled examples"},
        "tickvals": sizes + ([last] if curve else []),
        "ticktext": [f"{n:,}" for n in sizes] + ([f"{last:,}"] if curve else []),
        "range": [math.log10(place) for place in ends],
    }
    caption = f"The gap of the prompt the verdict speaks of, against the number of examples.{words}"
    y = {"title": {"text": "gap, or total variation"}, "range": [0, 1.02]}
    return Plot("The curve, and what theory says", caption, new_figure(traces, x, y, 540))


def _bounds(outcomes: int, ends: tuple[float, float], delta: float) -> list[Figure]:
    places = np.unique(np.geomspace(max(1.0, ends[0]), ends[1], _PLACES).round()).astype(int).tolist()
    lower = [assouad_lower(n, outcomes) for n in places]
    upper = [laplace_tv(n, outcomes) for n in places]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [*places, *reversed(places)],
        "y": [*upper, *reversed(lower)],
        "fill": "toself",
        "fillcolor": "var(--muted)",
        "opacity": 0.18,
        "line": {"width": 0, "color": "var(--muted)"},
        "name": "without prior, provable",
        "hoverinfo": "skip",
    }
    orders = []
    for name, at_half, dash in (
        ("V ln(1/δ)/ε²", sharma_s1(1, outcomes, epsilon=0.5, delta=delta), "dash"),
        ("ln(1/δ)/ε²", sharma_s4(epsilon=0.5, delta=delta), "longdash"),
    ):
        scale = at_half / 4  # both orders are a constant over eps^2
        y = [min(1.0, math.sqrt(scale / n)) for n in places]
        orders.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": places,
                "y": y,
                "line": {"color": "var(--muted)", "width": 2, "dash": dash},
                "name": f"order {name} (constant unknown)",
                "hoverinfo": "skip",
            }
        )
    return [band, *orders]


def _fit(curve: FittedCurve, sizes: Sequence[int], end: float) -> list[Figure]:
    traces: list[Figure] = []
    for begin, stop, dash, named in ((sizes[0], sizes[-1], "solid", True), (sizes[-1], end, "dot", False)):
        places = np.unique(np.geomspace(begin, stop, _PLACES).round()).astype(int).tolist()
        said = [curve.predict(n) for n in places]
        colour_of = "var(--program)"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [*places, *reversed(places)],
                "y": [*(each.interval.high for each in said), *(each.interval.low for each in reversed(said))],
                "fill": "toself",
                "fillcolor": colour_of,
                "opacity": 0.16 if named else 0.08,
                "line": {"width": 0, "color": colour_of},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": places,
                "y": [each.gap for each in said],
                "line": {"color": colour_of, "width": 2.5, "dash": dash},
                "name": "fitted curve" if named else "extrapolation: a guess",
                "hovertext": [
                    f"{counted(n, 'example')}<br>{share(each.gap, 3)} {_brackets(each.interval)}"
                    + (f"<br>{each.warning}" if each.warning else "")
                    for n, each in zip(places, said, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    return traces


def _brackets(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _reliability(head: Measurement, bins: Sequence[Sequence[Any]]) -> Plot:
    counts, confidences, right = zip(*bins, strict=True)
    ideal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
        "name": "calibrated",
        "hoverinfo": "skip",
    }
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(confidences),
        "y": list(right),
        "line": {"color": colour(head), "width": 1.5},
        "marker": marker(head, 8) | {"size": [8 + 24 * math.sqrt(count / sum(counts)) for count in counts]},
        "name": "the prompt",
        "hovertext": [
            f"{counted(int(count), 'query', 'queries')}<br>says {said:.2f}<br>right {share(found)}"
            for count, said, found in bins
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
    }
    axis = {"range": [0, 1.02]}
    caption = (
        "Queries by the probability of the likeliest label, in ten bins: how often it is right. On the dotted line the "
        f"prompt is calibrated, below it is too sure of itself. The expected calibration error is {share(head.ece, 3)}."
    )
    x, y = axis | {"title": {"text": "probability of its answer"}}, axis | {"title": {"text": "share that is right"}}
    return Plot("Calibration of the prompt", caption, new_figure([ideal, points], x, y, 420))


def _straight(ends: tuple[float, float], at: float, name: str, shade: str, dash: str) -> Figure:
    line = {"color": shade, "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "x": list(ends), "y": [at, at], "line": line, "name": name}
