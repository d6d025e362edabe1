import json
import math
import re

import pytest
from measured_rows import VOTE, row, sweep

from evaluation.charts import plots
from evaluation.measurement import grouped, measurements
from evaluation.report import PALETTES


def figures(rows):
    return {plot.title: plot.figure for group in grouped(measurements(rows)) for plot in plots(group)}


def test_hostile_text_stays_text_in_the_figures():
    rows = [row(retriever="<a href='http://evil.example'>dense</a>"), row(retriever="bm25")]
    text = json.dumps(figures(rows))
    assert "<a " not in text
    assert "&lt;a " in text


def test_one_number_of_examples_gives_dots_several_give_curves():
    assert list(figures([row(), row("floor", 0.1)])) == ["Gap to the fine-tuned model", "Accuracy"]
    assert list(figures(sweep())) == ["Gap against number of examples", "Accuracy against number of examples"]
    assert "Gap against prompt tokens" in figures(sweep(budgets=(512, 1024)))


def test_curve_shows_the_rows_on_a_logarithmic_axis():
    figure = figures(sweep())["Gap against number of examples"]
    assert figure["layout"]["xaxis"]["type"] == "log"
    (line,) = [trace for trace in figure["data"] if trace.get("name") == "program"]
    assert line["y"] == [0.9 / math.log2(n) for n in (16, 64, 256)]
    assert line["x"] == pytest.approx([16, 64, 256])
    assert line["error_y"]["array"] == pytest.approx([0.03] * 3, abs=1e-6)
    bands = [trace["y"] for trace in figure["data"] if trace.get("fill") == "toself"]
    assert sorted(bands) == [[0.04, 0.04, 0.06, 0.06], [0.77, 0.77, 0.83, 0.83]]


def test_seeds_are_all_shown_and_the_line_goes_through_their_mean():
    figure = figures(sweep(seeds=(0, 1, 2)))["Gap against number of examples"]
    line, points = [trace for trace in figure["data"] if trace.get("name") == "program"]
    assert len(points["y"]) == 9
    assert line["y"] == pytest.approx([0.9 / math.log2(n) + 0.01 for n in (16, 64, 256)])


def test_a_floor_that_starts_at_zero_is_drawn():
    shapes = figures([row(), row("floor", 0.01, 0.01)])["Gap to the fine-tuned model"]["layout"]["shapes"]
    assert [(shape["x0"], shape["x1"]) for shape in shapes] == [(0.0, 0.02)]


NOISES = [row("scoring noise", 0.01, 0.01, noise_against=kind) for kind in ("other batches", "float32")]


@pytest.mark.parametrize("rows", [[row(), *NOISES], [*sweep(), *NOISES], [*sweep(budgets=(512, 1024)), *NOISES]])
def test_the_kinds_of_scoring_noise_have_a_line_each(rows):
    for title, figure in figures(rows).items():
        names = {trace["name"].removesuffix(" 0.01") for trace in figure["data"] if "noise" in trace.get("name", "")}
        wanted = (
            set()
            if title.startswith("Accuracy")
            else {f"scoring noise, {kind}" for kind in ("other batches", "float32")}
        )
        assert names == wanted
        hovers = {text.partition("<br>")[0] for trace in figure["data"] for text in trace.get("hovertext", [])}
        assert wanted <= hovers


@pytest.mark.parametrize(
    "rows", [[row(), row(VOTE)], [*sweep(budgets=(512, 1024)), *NOISES], sweep(budgets=(512, 1024), seeds=(0, 1))]
)
def test_figures_are_valid_for_plotly(rows):
    graph = pytest.importorskip("plotly.graph_objects")
    for figure in figures(rows).values():
        plain = json.loads(re.sub(r"var\(--[\w-]+\)", "#000000", json.dumps(figure)))
        graph.Figure(data=plain["data"], layout=plain["layout"])
        names = re.findall(r"var\(--([\w-]+)\)", json.dumps(figure))
        assert set(names) <= set(PALETTES["light"])


def test_levels_are_lines_and_the_highest_is_judged():
    own = {"O0": "uniform", "O1": "dense", "O2": "searched"}
    rows = [
        row(gap=gap, n_examples=n, optimisation=level, retriever=own[level])
        for level, gap in zip(own, (0.5, 0.3, 0.4), strict=True)
        for n in (16, 64)
    ]
    [group] = grouped(measurements(rows))
    assert group.head.optimisation == "O2"
    curve = figures(rows)["Gap against number of examples"]
    assert [trace["name"] for trace in curve["data"]] == ["program, -O0", "program, -O1", "program, -O2"]
    rows += [row(gap=0.2, n_examples=n, optimisation="O1", retriever="bm25") for n in (16, 64)]
    curve = figures(rows)["Gap against number of examples"]
    assert {trace["name"] for trace in curve["data"]} >= {"program, -O1, bm25", "program, -O1, dense"}
