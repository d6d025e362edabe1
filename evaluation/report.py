"""Rows of measurements in, one self-contained HTML page out: the answer, then the plots, then the tables.

- Rows only. No model code runs here, so that a report can be made again from its JSONL, anywhere.
- Self-contained: plotly's JavaScript stands in the page once, a content security policy forbids the page to
  load anything, and only our own scripts run (they carry a nonce, drawn from the content: same input, same
  bytes). Texts of users are hostile: the template escapes all of them.
- A value that was not measured is `None` in the row and "not measured" on the page, never NaN.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.charts import plots
from evaluation.decide import Decision
from evaluation.formatting import amount, brackets, joined, levels_in_words, share
from evaluation.measurement import Group, Measurement, Row, checked, grouped, measurements
from evaluation.sentences import answer, headline, sentences, status
from evaluation.sweep_charts import crossing_of, decision_of, sweep_plots
from evaluation.tables import PER_QUERY
from icl_compiler.errors import EvaluationError

if TYPE_CHECKING:
    from markupsafe import Markup

# The hues of Okabe and Ito, darkened or lightened until they stand out from the page (at least 3:1).
PALETTES = {
    "light": {
        "page": "#ffffff",
        "card": "#f5f7f9",
        "ink": "#15191e",
        "muted": "#555d66",
        "rule": "#d5dae0",
        "program": "#0067a5",
        "uncalibrated": "#3f7fae",
        "random-shots": "#c04d00",
        "zero-shots": "#96407f",
        "shuffled-labels": "#7a6200",
        "neighbours-vote": "#007a59",
        "floor": "#3a4149",
        "scoring-noise": "#7d858d",
        "warning": "#8a4b00",
    },
    "dark": {
        "page": "#14171a",
        "card": "#1d2125",
        "ink": "#e9ecef",
        "muted": "#a9b1ba",
        "rule": "#3a4148",
        "program": "#5cb8f2",
        "uncalibrated": "#8fa9e6",
        "random-shots": "#f58b4c",
        "zero-shots": "#e49ccb",
        "shuffled-labels": "#e0c64a",
        "neighbours-vote": "#35c79d",
        "floor": "#c9d0d6",
        "scoring-noise": "#8d959d",
        "warning": "#f0b35e",
    },
}
WIDEST_OPEN_TABLE = 40  # longer tables start folded


def render(
    rows: Sequence[Row],
    *,
    worst: Sequence[Row] = (),
    commands: Sequence[str] = (),
    warnings: Sequence[str] = (),
    title: str = "Prompt or fine-tune?",
    epsilon: float = 0.1,
) -> str:
    """The report as one HTML page that loads nothing from anywhere.

    Args:
        rows: measurements, as read from JSONL. See `Measurement` for the keys; all but `series` may be None.
        worst: the queries with the largest gap: text, label, program_label, program_probability,
            reference_label, reference_probability, tv, prompt.
        commands: what to type to get the same rows again.
        warnings: sentences shown near the top.
        title: the name of the page.
        epsilon: largest gap that is good enough, for the verdicts of a sweep.

    Raises:
        EvaluationError: if there are no rows, or a row is not usable.

    >>> page = render([{"series": "program", "gap": 0.21, "accuracy": None}], title="<Toy>")
    >>> "<title>&lt;Toy&gt;</title>" in page, "not measured" in page
    (True, True)
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    measured = measurements(rows)
    groups = grouped(measured)
    read = {id(row): given for row, given in zip(measured, rows, strict=True)}
    raw = [json.dumps(_plain(row), ensure_ascii=False) for row in rows]
    folded = [_worst(query, number) for number, query in enumerate(worst, start=1)]
    content = json.dumps([raw, folded, list(commands), list(warnings), title])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "amount": amount, "label": _label, "prose": _prose}
    environment.globals["brackets"] = brackets
    parts = [
        (group, headline(group), status(group), sentences(group), plots(group) + sweep_plots(group, read))
        for group in groups
    ]
    decisions = [decision_of(group, epsilon) for group in groups]
    return environment.get_template("report.html.jinja").render(
        title=title,
        answer=_answer(groups, decisions, epsilon),
        parts=parts,
        decisions=decisions,
        crossings=[crossing_of(group, read) for group in groups],
        epsilon=epsilon,
        figures=[plot.figure for *_, shown in parts for plot in shown],
        rows=measured,
        levels=levels_in_words(measured),
        provenance=_provenance(measured),
        raw=raw,
        worst=sorted(folded, key=lambda query: -(query["tv"] or 0.0)),
        commands=commands,
        warnings=warnings,
        palettes=PALETTES,
        widest_open_table=WIDEST_OPEN_TABLE,
        nonce=sha256(content.encode(errors="replace")).hexdigest()[:32],
        plotly=get_plotlyjs(),
    )


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    *,
    worst: Sequence[Row] = (),
    commands: Sequence[str] = (),
    warnings: Sequence[str] = (),
    title: str = "Prompt or fine-tune?",
    epsilon: float = 0.1,
) -> None:
    """Write the page of `render` to a file, whole or not at all.

    Raises:
        EvaluationError: as `render`; or if the file cannot be written there.

    >>> write_report("no/such/folder/report.html", [{"series": "program", "gap": 0.21}])
    Traceback (most recent call last):
        ...
    icl_compiler.errors.EvaluationError: cannot write no/such/folder/report.html: there is no folder
    no/such/folder; make it first, or name another
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise EvaluationError(f"cannot write {path}: there is no folder {path.parent}; make it first, or name another")
    page = render(rows, worst=worst, commands=commands, warnings=warnings, title=title, epsilon=epsilon)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(page.encode(errors="replace"))
        unfinished.replace(path)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _answer(groups: Sequence[Group], decisions: Sequence[Decision | None], epsilon: float) -> str:
    """The answer in one line; with verdicts on several groups, what each advises."""
    advice: dict[str, list[str]] = {}
    for group, decision in zip(groups, decisions, strict=True):
        if decision is not None and decision.verdict is not None:
            advice.setdefault(decision.verdict.advice, []).append(group.name)
    if len(groups) == 1 or not advice:
        return answer(groups)
    said = [f"{each} on {joined(names)}" for each, names in advice.items()]
    return f"For a gap of {epsilon:g}: {'; '.join(said)}. {answer(groups)}"


def _provenance(rows: Sequence[Measurement]) -> list[dict[str, object]]:
    names = ("dataset", "data_sha256", "model", "reference", "seed", "machine", "commit", "version")
    return [
        dict(zip(names, facts, strict=True))
        for facts in dict.fromkeys(tuple(getattr(row, name) for name in names) for row in rows)
    ]


def _plain(row: Row) -> dict[str, object]:
    """The row with plain Python numbers, None where not finite (strict JSON), and nothing of single queries."""
    return {str(name): _plain_value(value) for name, value in row.items() if name not in PER_QUERY}


def _plain_value(value: object) -> object:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _worst(query: Row, number: int) -> dict[str, Any]:
    names = ("text", "prompt", "label", "program_label", "reference_label")
    numbers = ("tv", "program_probability", "reference_probability")
    return {name: _plain_value(query.get(name)) for name in names} | {
        name: checked(query.get(name), name, "float", f"worst query {number}") for name in numbers
    }


def _label(value: object) -> str:
    """A label as text: 0 and False are labels, an empty one must be seen."""
    return "not known" if value is None else str(value) or "“” (empty)"


def _prose(text: str) -> "Markup":
    """Escaped; percent signs and intervals stay on the line of their number, and `what is typed` is set as code."""
    from markupsafe import Markup, escape

    unbroken = re.sub(r"(?<=\d) (?=%)|(?<=\d,) (?=-?\d\.\d+\])", "\N{NO-BREAK SPACE}", text)
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(unbroken))))
