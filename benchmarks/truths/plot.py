"""The panels of `findings.py` as one page that loads nothing: curves with intervals, bounds shaded, orders dashed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.truths.findings import PROMPTS, Panel

# The hues of Okabe and Ito: prompts, then what stands beside them.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6200", "#56b4e9", "#e69f00", "#555d66")
FINE = (", TV", "zero, words only")


def write(path: Path, panels: Sequence[Panel]) -> None:
    """Write the page."""
    from plotly.graph_objects import Figure

    parts = [Figure(figure(panel)).to_html(full_html=False, include_plotlyjs=not i) for i, panel in enumerate(panels)]
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Known truths</title>'
    path.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")


def figure(panel: Panel) -> dict[str, Any]:
    """One panel in plotly's format."""
    traces: list[dict[str, Any]] = []
    edges = [panel.provable.get(f"band, {edge}") for edge in ("low", "high")]
    if edges[0] and edges[1]:
        sizes = sorted(edges[0])
        x, y = sizes + sizes[::-1], [edges[0][n] for n in sizes] + [edges[1][n] for n in sizes[::-1]]
        band = {"x": x, "y": y, "fill": "toself", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        traces.append(band | {"fillcolor": "rgba(85, 93, 102, 0.18)", "name": "provable band, no prior"})
    dashes = [(name, values, "dot") for name, values in panel.provable.items() if not name.startswith("band")]
    dashes += [(f"order {name}, constant unknown, scaled", panel.scaled(name), "dash") for name in panel.orders]
    for place, (name, values, dash) in enumerate(dashes):
        stroke = {"dash": dash, "width": 1.5, "color": ("#8a9099", "#3a4149", "#b0863c", "#6b4fa0", "#a33")[place % 5]}
        sizes = sorted(values)
        traces.append({"x": sizes, "y": [values[n] for n in sizes], "name": name, "mode": "lines", "line": stroke})
    for place, (name, line) in enumerate(panel.lines.items()):
        trace = {"x": list(line.sizes), "y": line.mean().tolist(), "name": name, "mode": "lines+markers"}
        trace["error_y"] = {"type": "data", "array": [0.0 if r != r else r for r in line.radius().tolist()]}
        trace["line"] = {"color": COLOURS[place % len(COLOURS)], "width": 3 if name in PROMPTS else 1.5}
        traces.append(trace | ({"visible": "legendonly"} if name.endswith(FINE) else {}))
    axis = {"title": {"text": panel.axis}, "type": "log", "tickvals": panel.sizes, "ticktext": [*map(str, panel.sizes)]}
    layout = {"title": {"text": panel.title}, "template": "plotly_white", "height": 520, "xaxis": axis}
    return {"data": traces, "layout": layout | {"yaxis": {"title": {"text": panel.value}, "type": "log"}}}
