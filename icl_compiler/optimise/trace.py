"""The trace of a search as a table to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from icl_compiler.optimise.variants import Variant


def table(trace: Sequence[Mapping[str, Any]]) -> str:
    """What was tried, a line each under its race; the first row of a trace says how the search was made.

    >>> row = {"race": "shots", "candidate": 0, "retriever": "bm25", "shots": 1, "order": "best-last", "per_label": 0,
    ...        "template": "classify", "queries": 40, "risk": 0.5, "low": 0.25, "high": 0.75, "round": None,
    ...        "why": "the winner"}
    >>> how = {"level": 2, "risk": "log-loss", "rows": 40, "search_queries": 100, "prompts_asked": 80,
    ...        "time_was_up": False}
    >>> print(table([how, row]))
    -O2: log-loss on 40 held-out rows of the pool; 80 prompts asked of at most 100
    <BLANKLINE>
    race of shots                        queries   risk  [95 %]           left after
    0  bm25, 1 shot, best-last, classify      40  0.500  [0.250, 0.750]   the winner
    """
    how, *rows = trace
    asked = f"{how['prompts_asked']:,} prompts asked of at most {how['search_queries']:,}"
    late = ", until the time was up" if how["time_was_up"] else ""
    held_out = f"{how['rows']:,} held-out rows of {how.get('rows_of', 'the pool')}"
    lines = [f"-O{how['level']}: {how['risk']} on {held_out}; {asked}{late}"]
    raced = [row for row in rows if "race" in row]
    names = {id(row): f"{row.get('candidate', '-')}  {_variant(row)}" for row in raced}
    width = max([len(name) for name in names.values()], default=0)
    for race in dict.fromkeys(row["race"] for row in raced):
        lines += ["", f"{f'race of {race}':<{width}} queries   risk  [95 %]           left after"]
        for row in (row for row in raced if row["race"] == race):
            left = f"round {row['round']}: {row['why']}" if row.get("round") else row["why"]
            lines.append(f"{names[id(row)]:<{width}} {row['queries']:>7}{_measured(row)}  {left}")
    if notes := [row["note"] for row in rows if "note" in row]:
        lines += ["", *notes]
    if tried := [row for row in rows if "calibration" in row]:
        lines += ["", f"{'calibration':<{width}} queries   risk  [95 %]"]
        lines += [f"{row['calibration']:<{width}} {row['queries']:>7}{_measured(row)}  {row['why']}" for row in tried]
    return "\n".join(line.rstrip() for line in lines)


def _measured(row: Mapping[str, Any]) -> str:
    if row.get("risk") is None:
        return f"{'':>7}  {'':<15}"
    low, high = (f"{row[end]:.3f}" if row[end] is not None else "?" for end in ("low", "high"))
    return f"{row['risk']:>7.3f}  {f'[{low}, {high}]':<15}"


def _variant(row: Mapping[str, Any]) -> str:
    return str(Variant(**{name: row[name] for name in Variant._fields if name in row}))
