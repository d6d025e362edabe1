"""The plots of a report: gap and accuracy against examples and prompt tokens.

- Figures are plain dictionaries in plotly's format, with colours as `var(--name)`: the page fills them in
  for light, dark and paper. A test passes them through plotly's own validation.
- Names read from rows are hostile: whatever reaches a legend or a hover text is escaped here.
"""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from evaluation.formatting import amount, counted, levels_in_words, share, with_interval
from evaluation.measurement import SERIES, Group, Measurement

# These do not depend on the number of examples in the pool: drawn as a level across the plot.
LEVELS = ("zero shots", "neighbours' vote", "floor", "scoring noise")
# The settings of a program that make it another line, as the legend names them.
_WORDS = {
    "optimisation": "-{}",
    "retriever": "{}",
    "max_prompt_tokens": "{:,} tokens",
    "shots": "shots {}",
    "calibration": "calibration {}",
}
DASHES = ("solid", "dash", "dot", "dashdot")
Figure = dict[str, Any]


class Plot(NamedTuple):
    """A figure with its title and what to see in it."""

    title: str
    caption: str
    figure: Figure


def plots(group: Group) -> list[Plot]:
    """The plots of one group: curves where the number of examples varies, else a dot for every series.

    >>> [plot.title for plot in plots(Group("mr", [Measurement("program", gap=0.21)]))]
    ['Gap to the fine-tuned model']
    """
    head = group.head
    found = []
    for value, meaning, here in (
        ("gap", "Distance from the fine-tuned reference: {} is closer.", group.rows),
        (
            "accuracy",
            "Share of queries answered with the true label: {} is better. The dotted line is the reference.",
            [row for row in group.rows if row.series not in ("floor", "scoring noise")],
        ),
    ):
        rows = [row for row in here if getattr(row, value) is not None]
        better = {"gap": ("lower", "further left"), "accuracy": ("higher", "further right")}[value]
        bars = f"{levels_in_words(rows)} intervals"
        if len({row.n_examples for row in rows if row.series == "program"} - {0, None}) > 1:
            rows, note = _at_budget(rows, head)
            caption = f"{meaning.format(better[0])}{note} Bars and bands are {bars}."
            found.append(Plot(f"{value.capitalize()} against number of examples", caption, _curve(rows, value)))
        elif rows:
            band = " The grey band is the floor." if any(row.series == "floor" for row in rows) else ""
            caption = f"{meaning.format(better[1])}{band} Bars are {bars}."
            title = {"gap": "Gap to the fine-tuned model", "accuracy": "Accuracy"}[value]
            found.append(Plot(title, caption, _dots(rows, value)))
    budgets = {row.max_prompt_tokens for row in group.rows if row.series == "program" and row.gap is not None}
    if head is not None and len(budgets - {None}) > 1:
        caption = "What a larger budget buys: tokens of the prompt, mean over queries. Bars and bands as above."
        found.insert(1, Plot("Gap against prompt tokens", caption, _budget_curve(group.rows, head)))
    return found


def _at_budget(rows: list[Measurement], head: Measurement | None) -> tuple[list[Measurement], str]:
    """The rows at the budget of the head, where there are several, and a remark that says so."""
    if head is None or len({row.max_prompt_tokens for row in rows if row.series == "program"}) < 2:
        return rows, ""
    having = {row.series for row in rows if row.max_prompt_tokens == head.max_prompt_tokens}
    kept = [row for row in rows if row.series not in having or row.max_prompt_tokens == head.max_prompt_tokens]
    return kept, f" At the largest budget, {head.max_prompt_tokens:,} tokens."


def _curve(rows: Sequence[Measurement], value: str) -> Figure:
    """`value` against the number of examples: a line for what depends on it, a level for what does not."""
    lines = _lines(rows)
    sizes = sorted({row.n_examples for row in rows if row.n_examples and row.series not in LEVELS})
    ends = (sizes[0] / 1.3, sizes[-1] * 1.3)
    traces: list[Figure] = []
    curves = []
    for name, line in lines.items():
        if line[0].series in LEVELS and len({row.n_examples for row in line}) == 1:
            traces += [trace for row in line for trace in _level(name, row, value, ends)]
        elif any(row.n_examples for row in line):
            curves.append((name, [row for row in line if row.n_examples]))
    if value == "accuracy":
        traces += _reference_line(rows, ends)
    step = 0.01 * math.log(ends[1] / ends[0])
    for place, (name, line) in enumerate(curves):
        shift = math.exp(step * (place - (len(curves) - 1) / 2))
        dash = DASHES[[line[0].series for _, line in curves[:place]].count(line[0].series) % 4]
        traces += _line(name, line, value, [shift * (row.n_examples or 0) for row in line], dash)
    x = {
        "type": "log",
        "title": {"text": "labelled examples"},
        "tickvals": sizes,
        "ticktext": [f"{n:,}" for n in sizes],
        "range": [math.log10(end) for end in ends],
    }
    return new_figure(traces, x, {"title": {"text": value}, "range": [0, _top(rows, value)]}, 460)


def _budget_curve(rows: Sequence[Measurement], head: Measurement) -> Figure:
    rows = [row for row in rows if row.gap is not None]
    programs = [
        row
        for row in rows
        if row.series == "program"
        and row.max_prompt_tokens
        and all(getattr(row, name) == getattr(head, name) for name in {"reference", *_WORDS} - {"max_prompt_tokens"})
    ]
    sizes = sorted({row.n_examples for row in programs if row.n_examples is not None})
    if len(sizes) > 4:  # more lines than that are a tangle: the ends and two between
        sizes = [sizes[round(place * (len(sizes) - 1) / 3)] for place in range(4)]
    tokens = [row.prompt_tokens_per_query or float(row.max_prompt_tokens or 1) for row in programs]
    ends = (max(min(tokens), 1) / 1.3, max(tokens) * 1.3)
    traces: list[Figure] = []
    for series in LEVELS:
        level = [row for row in rows if row.series == series]
        if len({row.n_examples for row in level}) == 1:
            traces += [trace for row in level for trace in _level(_title(row), row, "gap", ends)]
    for place, n in enumerate(reversed(sizes)):
        line = sorted((row for row in programs if row.n_examples == n), key=lambda row: row.max_prompt_tokens or 0)
        x = [row.prompt_tokens_per_query or float(row.max_prompt_tokens or 1) for row in line]
        traces += _line(f"program, {counted(n, 'example')}", line, "gap", x, DASHES[place])
    axis = {
        "type": "log",
        "title": {"text": "prompt tokens per query"},
        "range": [math.log10(end) for end in ends],
    }
    ticks = [2**power for power in range(4, 22) if ends[0] <= 2**power <= ends[1]]
    axis |= {"tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]} if len(ticks) > 1 else {}
    return new_figure(traces, axis, {"title": {"text": "gap"}, "range": [0, _top(rows, "gap")]}, 460)


def _dots(rows: Sequence[Measurement], value: str) -> Figure:
    """One dot and its interval for every series, the program on top."""
    lines = {}
    for name, line in _lines(rows).items():
        for row in line:
            sizes = {row.n_examples for row in line}
            more = [counted(row.n_examples, "example")] if len(sizes) > 1 and row.n_examples is not None else []
            more += [f"seed {row.seed}"] if len({row.seed for row in line}) > 1 else []
            lines[", ".join([name, *map(html.escape, more)])] = row
    traces: list[Figure] = []
    for name, row in reversed(lines.items()):
        x = getattr(row, value)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [x],
                "y": [name],
                "text": [share(x)],
                "textposition": "top center" if x > 0.03 else "top right",
                "textfont": {"size": 13, "color": "var(--ink)"},
                "error_x": error_bars([row], value) | {"color": colour(row)},
                "marker": marker(row, 13),
                "name": name,
                "hovertext": [_hover(row, value)],
                "hoverinfo": "text",
                "cliponaxis": False,
            }
        )
    if value == "gap":
        title = "gap (0 the same, 1 no overlap)"
        marks = [("floor", row.gap_low, row.gap_high) for row in rows if row.series == "floor"][:1]
    else:
        title = "accuracy"
        levels = sorted({row.reference_accuracy for row in rows if row.reference_accuracy is not None})
        marks = [(f"reference {share(level)}", level, level) for level in levels]
    top = _top(rows, value)
    spans = [(text, low, high) for text, low, high in marks if low is not None and high is not None]
    axis = {"type": "category", "automargin": True, "showgrid": False, "range": [-0.6, len(lines) - 0.3]}
    figure = new_figure(traces, {"title": {"text": title}, "range": [0, top]}, axis, 110 + 52 * len(lines))
    figure["layout"] |= {
        "showlegend": False,
        "shapes": [_span(low, high) for _, low, high in spans],
        "annotations": [_mark(text, (low + high) / 2, top) for text, low, high in spans[:1]],
    }
    # A phone has no room beside the plot: the names go into it, above their dots, with the numbers.
    names = [
        {"text": f"{name}  <b>{share(getattr(row, value))}</b>", "y": place, "yshift": 17, "x": 0}
        | {"xref": "paper", "xanchor": "left", "showarrow": False, "font": {"size": 13}}
        for place, (name, row) in enumerate(reversed(lines.items()))
    ]
    figure["narrow"] = {
        "traces": {"mode": "markers"},
        "layout": {
            "margin": {"l": 10},
            "yaxis": {"showticklabels": False, "ticks": ""},
            "annotations": figure["layout"]["annotations"] + names,
        },
    }
    return figure


def _mark(text: str, x: float, top: float) -> Figure:
    side = "right" if x > 0.75 * top else "left" if x < 0.1 * top else "center"
    place = {"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": side}
    return place | {"text": text, "showarrow": False, "font": {"size": 13, "color": "var(--muted)"}}


def _span(low: float, high: float) -> Figure:
    place = {"yref": "paper", "y0": 0, "y1": 1, "x0": low, "x1": high, "layer": "below"}
    if low == high:
        return place | {"type": "line", "line": {"color": "var(--floor)", "width": 2, "dash": "dot"}}
    return place | {"type": "rect", "line": {"width": 0}, "fillcolor": "var(--floor)", "opacity": 0.13}


def _lines(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The rows of each line of a plot by its name, escaped: the title and what else tells it from others.

    Seeds share a line. A setting is named only where it tells lines apart that those before it do not, and a reference
    only where two rows differ in nothing else.
    """
    lines: dict[str, list[Measurement]] = {}
    for series in SERIES:
        members = [row for row in rows if row.series == series]
        differing: list[str] = []
        for name in _WORDS:
            varies = len({getattr(row, name) for row in members} - {None}) > 1
            if varies and _parts(members, [*differing, name]) > _parts(members, differing):
                differing.append(name)
        words = _WORDS
        if _parts(members, ["n_examples", "seed", "title", *_WORDS]) < len(members):
            words = words | {"reference": "{}"}
            differing += ["reference"] if len({row.reference for row in members} - {None}) > 1 else []
        for row in sorted(members, key=lambda row: row.n_examples or 0):
            values = [words[name].format(getattr(row, name)) for name in differing if getattr(row, name)]
            name = ", ".join(html.escape(part, quote=False) for part in (row.title, *values))
            lines.setdefault(name, []).append(row)
    return lines


def _parts(rows: Sequence[Measurement], names: Sequence[str]) -> int:
    """How many kinds of rows there are, by these of their settings."""
    return len({tuple(getattr(row, name) for name in names) for row in rows})


def _line(name: str, rows: Sequence[Measurement], value: str, x: Sequence[float], dash: str) -> list[Figure]:
    """Points with their intervals, and the line through the means of those (seeds) at one place."""
    places: dict[object, list[tuple[float, float]]] = {}
    for row, at in zip(rows, x, strict=True):
        places.setdefault((row.n_examples, row.max_prompt_tokens), []).append((at, getattr(row, value)))
    means = [[sum(column) / len(points) for column in zip(*points, strict=True)] for points in places.values()]
    stroke = {"color": colour(rows[0]), "width": 2.5, "dash": dash}
    named = {"name": name, "legendgroup": name, "legendrank": _rank(rows[0])}
    points: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": [getattr(row, value) for row in rows],
        "line": stroke,
        "error_y": error_bars(rows, value) | {"color": colour(rows[0])},
        "marker": marker(rows[0], 11),
        "hovertext": [_hover(row, value) for row in rows],
        "hoverinfo": "text",
    } | named
    if len(means) == len(rows):
        return [points]
    through = {"type": "scatter", "mode": "lines", "line": stroke, "hoverinfo": "skip"} | named
    through |= {"x": [mean[0] for mean in means], "y": [mean[1] for mean in means]}
    return [through, points | {"mode": "markers", "showlegend": False}]


def _level(name: str, row: Measurement, value: str, ends: tuple[float, float]) -> list[Figure]:
    """A level across the plot with its interval as a band."""
    at, low, high = (getattr(row, value + end) for end in ("", "_low", "_high"))
    x = [ends[0] * (ends[1] / ends[0]) ** (step / 24) for step in range(25)]  # places to hover over
    dashes = {
        "floor": "solid",
        "zero shots": "dash",
        "neighbours' vote": "dashdot",
        "scoring noise, float32": "longdash",
    }
    line: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": [at] * len(x),
        "line": {"color": colour(row), "width": 2, "dash": dashes.get(row.title, "dot")},
        "name": f"{name} {share(at)}",
        "legendgroup": name,
        "legendrank": _rank(row),
        "hovertext": [_hover(row, value)] * len(x),
        "hoverinfo": "text",
    }
    if low is None or high is None:
        return [line]
    band: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": [ends[0], ends[1], ends[1], ends[0]],
        "y": [low, low, high, high],
        "fill": "toself",
        "fillcolor": colour(row),
        "opacity": 0.13,
        "line": {"width": 0, "color": colour(row)},
        "legendgroup": name,
        "showlegend": False,
        "hoverinfo": "skip",
    }
    return [band, line]


def _reference_line(rows: Sequence[Measurement], ends: tuple[float, float]) -> list[Figure]:
    """The accuracy of the reference: a level, or a line where it was trained on the same examples."""
    known = {row.n_examples: row.reference_accuracy for row in rows if row.series == "program" and row.n_examples}
    found = sorted((n, accuracy) for n, accuracy in known.items() if n and accuracy is not None)
    if not found:
        return []
    if len({accuracy for _, accuracy in found}) == 1:
        found = [(end, found[0][1]) for end in ends]  # type: ignore[misc]  # ends of the axis are no counts
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [n for n, _ in found],
            "y": [accuracy for _, accuracy in found],
            "line": {"color": "var(--floor)", "width": 2, "dash": "dot"},
            "name": "reference",
            "legendrank": 1,
            "hovertext": [f"reference<br>accuracy {accuracy:.3f}" for _, accuracy in found],
            "hoverinfo": "text",
        }
    ]


def error_bars(rows: Sequence[Measurement], value: str) -> Figure:
    """The intervals of `value`, as bars around points."""

    def lengths(end: str, sign: int) -> list[float]:
        ends = [(getattr(row, value), getattr(row, f"{value}_{end}")) for row in rows]
        return [max(0.0, sign * (bound - at)) if bound is not None else 0.0 for at, bound in ends]

    return {
        "type": "data",
        "symmetric": False,
        "array": lengths("high", 1),
        "arrayminus": lengths("low", -1),
        "thickness": 2,
        "width": 5,
    }


def marker(row: Measurement, size: int) -> Figure:
    """The symbol of a series, `size` pixels wide."""
    thin = SERIES[row.series][1] == "line-ns"
    edge = {"width": 3 if thin else 1.5, "color": colour(row) if thin else "var(--page)"}
    return {"size": size, "symbol": SERIES[row.series][1], "color": colour(row), "line": edge}


def _hover(row: Measurement, value: str) -> str:
    at, low, high = (getattr(row, value + end) for end in ("", "_low", "_high"))
    facts = [row.title, f"{value} {with_interval(at, low, high, 3)}"]
    facts += [counted(row.n_examples, "example")] if row.n_examples is not None else []
    facts += [f"budget {row.max_prompt_tokens:,} tokens"] if row.max_prompt_tokens is not None else []
    facts += [f"{amount(row.shots_per_query)} shots per query"] if row.shots_per_query is not None else []
    facts += [f"level {row.optimisation}"] if row.optimisation else []
    facts += [f"found: {row.found}"] if row.found else [f"retriever {row.retriever}"] if row.retriever else []
    facts += [counted(row.neighbours, "neighbour")] if row.neighbours is not None else []
    facts += [counted(row.n_queries, "query", "queries")] if row.n_queries is not None else []
    facts += [f"seed {row.seed}"] if row.seed is not None else []
    return "<br>".join(html.escape(fact, quote=False) for fact in facts)


def _title(row: Measurement) -> str:
    return html.escape(row.title, quote=False)


def _rank(row: Measurement) -> int:
    return 2 + list(SERIES).index(row.series)


def colour(row: Measurement) -> str:
    """The colour of a series, which the page fills in."""
    return f"var(--{row.series.replace(chr(39), '').replace(' ', '-')})"


def _top(rows: Sequence[Measurement], value: str) -> float:
    highs = [getattr(row, value + end) for row in rows for end in ("", "_high")]
    highest: float = max(high for high in highs if high is not None)
    return 1.02 if value == "accuracy" else min(1.02, max(0.05, 1.1 * highest))


def new_figure(traces: list[Figure], x: Figure, y: Figure, height: int) -> Figure:
    """Traces with axes, in the look of the report; `height` in pixels."""
    axis = {
        "gridcolor": "var(--rule)",
        "linecolor": "var(--muted)",
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "var(--rule)",
        "fixedrange": True,
    }
    layout = {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 28, "b": 58},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--ink)"},
        "xaxis": axis | x,
        "yaxis": axis | y,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--muted)", "align": "left"},
        "hovermode": "closest",
        "dragmode": False,
    }
    return {"data": traces, "layout": layout}
