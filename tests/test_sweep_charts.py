"""What a sweep adds to the report: numbers against the functions they are drawn from, and the page in a browser."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from measured_rows import row

from evaluation.bounds import assouad_lower, laplace_tv, sharma_s1, sharma_s4
from evaluation.curve_points import Points
from evaluation.curves import fitted_curve
from evaluation.measurement import grouped, measurements
from evaluation.report import render
from evaluation.sweep_charts import crossing_of, decision_of, line_of, sweep_plots
from evaluation.tables import as_table
from icl_compiler.cli import main

SIZES = (16, 64, 256, 1024)
LABELS = 6


def rows(dataset="trec", seeds=(0,), budgets=(512, 1024)):
    """Gaps that fall to 0.05, query by query, as a sweep keeps them."""
    found = []
    spread = np.random.default_rng(0).uniform(0.5, 1.5, 200)
    for seed in seeds:
        for budget in budgets:
            for n in SIZES:
                gaps = spread * (0.05 + (0.9 + 0.1 * (budget == 512)) / np.sqrt(n))
                changes = {"dataset": dataset, "n_examples": n, "max_prompt_tokens": budget, "seed": seed}
                changes |= {"shots": "fit", "n_labels": LABELS, "n_queries": 200, "gaps": gaps.tolist()}
                changes |= {"reliability": [[50, 0.45, 0.4], [150, 0.9, 0.8]], "reference_seconds": 60.0}
                found.append(row(gap=float(gaps.mean()), margin=0.02, **changes))
    other = {"dataset": dataset, "n_examples": None, "max_prompt_tokens": None, "retriever": None}
    return [*found, row("floor", 0.05, 0.01, **other), row("zero shots", 0.8, **other)]


def one_group(given):
    measured = measurements(given)
    [group] = grouped(measured)
    return group, {id(each): raw for each, raw in zip(measured, given, strict=True)}


def test_the_line_is_that_of_the_head():
    group, _ = one_group(rows(seeds=(0, 1)))
    line = line_of(group)
    assert [each.n_examples for each in line] == list(SIZES)
    assert {(each.max_prompt_tokens, each.seed) for each in line} == {(1024, 0)}
    assert line[-1] is group.head


def traces():
    group, raw = one_group(rows())
    [plot, calibration] = sweep_plots(group, raw)
    return {trace["name"]: trace for trace in plot.figure["data"] if "name" in trace}, plot, calibration


def test_bounds_are_those_of_the_functions():
    by_name, plot, _ = traces()
    band = by_name["without prior, provable"]
    half = len(band["x"]) // 2
    for place in (0, 7, half - 1):
        n = band["x"][place]
        assert band["y"][place] == laplace_tv(n, LABELS + 1)
        assert band["y"][2 * half - 1 - place] == assouad_lower(n, LABELS + 1)
    orders = [trace for name, trace in by_name.items() if name.startswith("order ")]
    for trace, order in zip(
        orders,
        (
            lambda epsilon: sharma_s1(1, LABELS + 1, epsilon=epsilon, delta=0.05),
            lambda epsilon: sharma_s4(epsilon=epsilon, delta=0.05),
        ),
        strict=True,
    ):
        assert trace["line"]["dash"] in ("dash", "longdash")
        assert "constant unknown" in trace["name"]
        places = [(n, y) for n, y in zip(trace["x"], trace["y"], strict=True) if y < 1]
        assert len(places) > 10
        for n, y in places:
            assert order(y) == pytest.approx(n, rel=1e-6)
    assert "constant is unknown" in plot.caption


def test_the_curve_is_that_of_the_queries_and_ends_at_four_times_the_largest_size():
    by_name, plot, _ = traces()
    gaps = np.array([each["gaps"] for each in rows(budgets=(1024,))[: len(SIZES)]]).T
    curve = fitted_curve(Points.from_queries(np.array(SIZES), gaps), rng=np.random.default_rng(0))
    solid, dotted = by_name["fitted curve"], by_name["extrapolation: a guess"]
    assert (solid["x"][0], solid["x"][-1], dotted["x"][-1]) == (16, 1024, 4096)
    assert dotted["line"]["dash"] == "dot"
    assert dotted["y"][-1] == curve.predict(4096).gap
    assert "4.0 times the largest size measured" in dotted["hovertext"][-1]
    assert by_name["the prompt, measured"]["x"] == list(SIZES)
    assert "approximate" in plot.caption


def test_a_curve_pools_the_seeds_that_have_all_sizes():
    given = rows(seeds=(0, 1, 2), budgets=(1024,))
    rng = np.random.default_rng(1)
    given = [
        each | {"gaps": np.clip(np.array(each["gaps"]) + rng.normal(0, 0.03), 0, 1).tolist()}
        if "gaps" in each
        else each
        for each in given
    ]
    for each in given:
        if each["series"] == "program":
            each["reference"] = f"full fine-tuning, seed {each['seed']}, 1000 examples"
    given = [each for each in given if (each["seed"], each["n_examples"]) != (2, 64)]
    group, raw = one_group(given)
    [plot, _] = sweep_plots(group, raw)
    by_name = {trace["name"]: trace for trace in plot.figure["data"] if "name" in trace}
    gaps = np.array([[each["gaps"] for each in given if each["seed"] == seed and "gaps" in each] for seed in (0, 1)])
    points = Points.from_seeds(np.array(SIZES), gaps.transpose(0, 2, 1))
    curve = fitted_curve(points, rng=np.random.default_rng(0))
    assert by_name["extrapolation: a guess"]["y"][-1] == curve.predict(4096).gap
    assert by_name["the prompt, measured"]["x"] == [*SIZES, *SIZES]
    assert "curve, of 2 seeds," in plot.caption
    assert {row.seed for row in line_of(group)} == {group.head.seed} == {0}


def test_three_sizes_get_no_curve():
    group, raw = one_group([each for each in rows() if each["n_examples"] != 64])
    names = [trace.get("name") for trace in sweep_plots(group, raw)[0].figure["data"]]
    assert "fitted curve" not in names
    assert "without prior, provable" in names


def test_calibration_shows_its_bins():
    _, _, plot = traces()
    [_, points] = plot.figure["data"]
    assert (points["x"], points["y"]) == ([0.45, 0.9], [0.4, 0.8])


def test_the_verdict_stands_in_the_page():
    group, _ = one_group(rows())
    decision = decision_of(group, 0.15)
    assert decision is not None and decision.verdict is not None
    assert (decision.verdict.advice, decision.verdict.n) == ("prompt", 256)
    page = render(rows(), epsilon=0.15).replace("\N{NO-BREAK SPACE}", " ")
    assert decision.sentences[0] in page
    two = render([*rows(), *rows("mr")], epsilon=0.01)
    assert two.count("<strong>fine-tune</strong>") == 2
    assert '"gaps"' not in page


def test_the_crossing_of_prompt_and_tuning():
    """Errors of the prompt stay at 0.3, those of fine-tuning fall below that between 64 and 256 examples."""
    changes = zip(rows(budgets=(1024,)), (0.6, 0.4, 0.2, 0.1), strict=False)
    given = [
        each
        | {"correct": "0" * 60 + "1" * 140, "reference_examples": each["n_examples"]}
        | {"reference_correct": "0" * round(200 * error) + "1" * (200 - round(200 * error))}
        for each, error in changes
    ]
    group, raw = one_group(given)
    said = crossing_of(group, raw)
    n = int(re.search(r"better from (\d+) examples on", said)[1])
    assert said.startswith("By the fitted curves of the error, fine-tuning on the same examples is better")
    assert 64 < n < 256, "between the sizes where the measured errors change their order"
    assert said in render(given).replace("\N{NO-BREAK SPACE}", " ")
    assert crossing_of(*one_group([each | {"reference_examples": 1000} for each in given])) is None


def test_a_single_size_has_no_verdict():
    group, _ = one_group([row()])
    assert decision_of(group, 0.1) is None


def test_tables_hold_the_rows():
    given = rows()
    read = list(csv.DictReader(io.StringIO(as_table(given, "csv"))))
    assert [float(each["gap"]) for each in read] == [each["gap"] for each in given]
    assert read[-1]["max_prompt_tokens"] == ""
    assert "gaps" not in read[0]
    lines = as_table(given, "md").splitlines()
    assert len(lines) == 2 + len(given)
    assert len({line.count("|") for line in lines}) == 1


def test_the_commands_take_the_rows(tmp_path):
    file, page = tmp_path / "rows.jsonl", tmp_path / "report.html"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows()))
    judged = CliRunner().invoke(main, ["decide", str(file), "--epsilon", "0.15", "--json"])
    assert [(each["name"], each["advice"], each["n"]) for each in json.loads(judged.stdout)] == [
        ("trec, 512 tokens", "prompt", 256),
        ("trec, 1,024 tokens", "prompt", 256),
    ]
    made = CliRunner().invoke(main, ["report", str(file), "-o", str(page), "--format", "csv", "--epsilon", "0.15"])
    assert (made.exit_code, made.stderr) == (0, "")
    assert len(made.stdout.splitlines()) == 1 + len(rows())
    assert "Is a gap of 0.15 good enough?" in page.read_text()
    file.write_text('{"series": "program"}\nno row\n')
    broken = CliRunner().invoke(main, ["report", str(file), "--format", "md"])
    assert (broken.exit_code, "rows.jsonl, line 2: expected a JSON object" in broken.stderr) == (1, True)
    assert CliRunner().invoke(main, ["report", str(file)]).exit_code == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_of_a_sweep_in_a_browser(tmp_path, width):
    playwright = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "report.html"
    path.write_text(render([*rows(), *rows("mr", seeds=(0, 1))], title="A sweep"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 10")
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        titles = page.locator("h3").all_inner_texts()
        assert titles.count("The curve, and what theory says") == titles.count("Calibration of the prompt") == 2
        browser.close()
