import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from measured_rows import PROGRAM, VOTE, row, sweep

from evaluation.measurement import SERIES
from evaluation.report import PALETTES, render, write_report
from evaluation.sentences import verdict_sentence
from evaluation.summary import summary_lines
from icl_compiler.errors import EvaluationError

HOSTILE = "</script><script>document.title = 'owned'</script><img src=http://evil.example/x onerror=alert(1)>"
WORST = [
    {
        "text": "charged twice " + HOSTILE,
        "label": 0,
        "program_label": HOSTILE,
        "program_probability": 0.717,
        "reference_label": "",
        "reference_probability": 0.939,
        "tv": 0.901,
        "prompt": "Classify.\n" + HOSTILE,
    },
    {"text": "why?", "label": None, "tv": 0.963},
]


class Page(HTMLParser):
    """The tags, the text that is seen, the cells of tables and the text of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.seen, self.cells, self.scripts, self.inside = [], [], [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside.discard(tag)

    def handle_data(self, data):
        if "script" in self.inside:
            self.scripts.append(data)
        elif "style" not in self.inside:
            self.seen.append(data)
            if self.inside & {"td", "th"}:
                self.cells[-1] += data

    @property
    def text(self):
        return " ".join("".join(self.seen).replace("\N{NO-BREAK SPACE}", " ").split())


# ---------------------------------------------------------------- the page


def test_page_is_a_complete_document():
    page = render([PROGRAM], worst=WORST, title="Toy")
    tags = Page(page).tags
    assert page.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in tags
    assert "<title>Toy</title>" in page
    assert [tag for tag, _ in tags].count("h1") == 1
    assert [tag for tag, _ in tags].count("table") == [tag for tag, _ in tags].count("caption")


def test_no_tag_loads_anything_from_anywhere():
    tags = Page(render([PROGRAM, *sweep("b")], worst=WORST, commands=["icl demo"], warnings=["w"])).tags
    for tag, attributes in tags:
        for name in ("src", "srcset", "data", "action", "poster", "background", "ping", "xlink:href"):
            assert name not in attributes, (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "url(" not in attributes.get("style", "")
    (policy,) = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")


def test_style_sheet_loads_nothing():
    (style,) = re.findall(r"<style>(.*?)</style>", render([PROGRAM]), flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_stands_in_the_page_once():
    assert render([PROGRAM, *sweep("b")]).count("* plotly.js v") == 1


def test_hostile_text_stays_text():
    names = ("dataset", "retriever", "model", "reference", "machine", "commit", "version", "data_sha256")
    rows = [PROGRAM | dict.fromkeys(names, HOSTILE), row(dataset="b" + HOSTILE, retriever="other")]
    page = render(rows, worst=WORST, commands=[HOSTILE], warnings=[HOSTILE], title=HOSTILE)
    tags = Page(page).tags
    assert [tag for tag, _ in tags].count("script") == 4  # figures, palettes, plotly, ours
    assert "img" not in [tag for tag, _ in tags]
    assert HOSTILE in "".join(Page(page).seen)


def test_every_number_of_a_row_is_shown():
    page = Page(render([PROGRAM]))
    cells = " | ".join(page.cells)
    assert "95 % intervals" in page.text
    for name, value in PROGRAM.items():
        if isinstance(value, float) and value < 1 and not name.startswith(("level", "seconds")):
            assert f"{value:.3f}" in cells, name
    for shown in ("512", "1,024", "15.2", "217", "731", "702", "0.513"):
        assert re.search(rf"(?<![\d.]){re.escape(shown)}(?![\d])", cells), shown
    for name in ("dataset", "retriever", "model", "reference", "machine", "commit", "version"):
        assert PROGRAM[name] in cells


def test_scoring_noise_and_bounds_are_told_in_the_table():
    noises = [row("scoring noise", 0.01, noise_against=kind) for kind in ("other batches", "float32")]
    page = Page(render([row(gap_truncation=0.037), *noises]))
    assert {"scoring noise, other batchesdense", "scoring noise, float32dense"} <= set(page.cells)
    assert [cell for cell in page.cells if "midpoint of bounds 0.037 apart" in cell]
    assert "midpoint of bounds" not in Page(render([row(), *noises])).text


def test_rows_stand_in_the_page_in_full_precision():
    page = Page(render([PROGRAM, row(gap=1 / 3)]))
    lines = [json.loads(line) for line in "".join(page.seen).splitlines() if line.startswith('{"series"')]
    assert lines[0] == PROGRAM
    assert lines[1]["gap"] == 1 / 3


def test_worst_queries_come_worst_first_with_folded_prompts():
    page = Page(render([PROGRAM], worst=WORST))
    assert page.text.index("0.963") < page.text.index("0.901")
    cells = [" ".join(cell.split()) for cell in page.cells]
    cells = cells[cells.index("reference says") + 1 :]
    assert cells[2] == "not known"  # no true label
    assert cells[7] == "0"  # a falsy label is a label
    assert cells[9].startswith("“” (empty)")
    assert ("summary", {}) in page.tags


def test_what_is_not_measured_is_said_and_never_nan():
    bare = dict.fromkeys(PROGRAM) | {"series": "program", "gap": float("nan"), "ece": float("inf")}
    for rows in ([bare], [bare, row("floor")], [row(accuracy=None, seed=None)], [{"series": "zero shots"}]):
        page = Page(render(rows, worst=[{"text": None, "tv": float("nan")}]))
        ours = [script for script in page.scripts if "plotly.js v" not in script]
        assert "not measured" in page.text
        for text in [page.text, *ours, *verdict_sentence(rows), *summary_lines(rows)]:
            assert not re.search(r"\b(nan|NaN|None|Infinity|inf)\b", text)


def test_commands_warnings_and_where_the_rows_come_from_are_shown():
    page = Page(render([PROGRAM], commands=["icl demo --seed 0"], warnings=["12 texts were in both."]))
    for text in ("icl demo --seed 0", "12 texts were in both.", "2 cores", "4f1c2ab", "9f2b9f2b9f2b…"):
        assert text in page.text


def test_several_datasets_are_counted():
    page = Page(render([row(), row("floor", 0.09), row(dataset="mr", gap=0.4)])).text
    assert "Of 2 gaps, 1 is above the floor and 1 is without a measured floor." in page


def test_same_input_gives_the_same_bytes():
    assert render(sweep(), worst=WORST) == render(sweep(), worst=WORST)


def test_a_worst_query_that_is_wrong_is_named():
    with pytest.raises(EvaluationError, match="worst query 1: tv should be a number or null, is 'x'"):
        render([PROGRAM], worst=[{"text": "t", "tv": "x"}])


# ---------------------------------------------------------------- the file


def test_file_holds_the_page(tmp_path):
    write_report(tmp_path / "report.html", [PROGRAM], title="Toy")
    assert (tmp_path / "report.html").read_text() == render([PROGRAM], title="Toy")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=re.escape(f"there is no folder {tmp_path / 'no'}")):
        write_report(tmp_path / "no" / "report.html", [PROGRAM])


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(EvaluationError, match=r"cannot write .*report\.html"):
        write_report(tmp_path / "report.html", [PROGRAM])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_old_report_survives_a_run_that_fails(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(EvaluationError):
        write_report(path, [])
    assert path.read_text() == "old"


def test_text_that_is_not_unicode_can_be_written(tmp_path):
    write_report(tmp_path / "report.html", [PROGRAM], worst=[{"text": "half a pair \ud83d", "tv": 0.5}])


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("palette", PALETTES.values(), ids=PALETTES)
def test_colours_stand_out_from_the_page(palette):
    """WCAG 2: at least 4.5 for text, 3 for marks."""

    def contrast(a, b):
        dark, light = sorted((luminance(palette[a]), luminance(palette[b])))
        return (light + 0.05) / (dark + 0.05)

    assert min(contrast(text, back) for text in ("ink", "muted", "warning") for back in ("page", "card")) >= 4.5
    marks = [series.replace("'", "").replace(" ", "-") for series in SERIES]
    assert min(contrast(mark, "page") for mark in marks) >= 3


# ---------------------------------------------------------------- a browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def opened(tmp_path):
    """Open a page in headless Chromium: the document after its scripts ran, and its console."""

    def open_page(page):
        (tmp_path / "report.html").write_text(page)
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom "
            "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
            "--enable-logging=stderr --virtual-time-budget=10000"
        )
        done = subprocess.run(
            [
                CHROMIUM,
                *options.split(),
                f"--user-data-dir={tmp_path / 'profile'}",
                (tmp_path / "report.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@needs_chromium
@pytest.mark.parametrize(
    ("rows", "plots"),
    [([row(), row(VOTE, 0.2), row("floor", 0.1)], 2), (sweep(budgets=(512, 1024)) + sweep("mr"), 5)],
    ids=["one", "sweep"],
)
def test_page_runs_and_draws_its_plots(opened, rows, plots):
    document, console = opened(render(rows, worst=WORST, title=HOSTILE))
    assert console == []
    assert document.count('class="cartesianlayer"') == plots
    assert document.count('<path class="point"') >= len(rows)
    assert 'fill="var(--' not in document  # all colours are filled in
    assert "<title>owned" not in document


@needs_chromium
def test_a_script_that_got_into_the_page_does_not_run(opened):
    """The second wall, behind the escaping. Also shows that the console of the test above is heard."""
    page = render([row()], title="Toy").replace("</body>", "<script>document.title = 'owned'</script></body>")
    document, console = opened(page)
    assert "<title>Toy</title>" in document
    assert any("Content Security Policy" in line for line in console)
