"""The levels of `icl compile`, and what each of them does.

    -O0   random shots, the same for every text
    -O1   the nearest shots by meaning; no model runs
    -O2   retriever, number, order and balance of shots and template are searched on held-out rows of the pool
    -O3   -O2, and then instructions, a learned reranker and averages over prompts: see `level_three`

- From -O2 on the base model's own reading of a text may stand beside the sentence encoder: see `encoders`.
- What the user names is not searched: `--retriever bm25 -O2` looks for the best program with bm25.
- `--retriever static` has the search choose one set for all texts (`static_sets`); it is not tried unless it is named.
- -O2 starts from -O1, and compares with it once more at the end.
- From -O2 on a program of labels is calibrated with what the search has asked already; those of model and votes are
  among the candidates, so that the neighbours alone are.
- Held-out rows are all rows of the pool that can be a query, each asked without itself, or those of validation data;
  in one random order.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from icl_compiler.backends.backend import Backend, Progress
from icl_compiler.calibration.calibrating import QUERIES as CALIBRATION_QUERIES
from icl_compiler.calibration.calibrating import held_out_data
from icl_compiler.calibration.choosing import LEAST_QUERIES, fit_and_choose
from icl_compiler.compile import laid_out, with_calibration
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError
from icl_compiler.optimise.encoder_choice import choose_encoder
from icl_compiler.optimise.judges import Asker, Judge, LabelJudge, Metric, TargetJudge
from icl_compiler.optimise.layout_choice import cheapest_layout
from icl_compiler.optimise.level_three import OF_LEVEL_2, level_3, set_apart
from icl_compiler.optimise.racing import OutOfTime
from icl_compiler.optimise.score_log import ScoreLog
from icl_compiler.optimise.search import Races, Space
from icl_compiler.optimise.static_sets import choose_set
from icl_compiler.optimise.variants import Variant, Variants
from icl_compiler.predictor import Predictor
from icl_compiler.program import Program
from icl_compiler.registry import RETRIEVERS
from icl_compiler.selection import Order

DEFAULT_RETRIEVERS = {0: "uniform", 1: "dense", 2: "dense", 3: "dense"}
TEMPLATES = {"classification": ("classify", "classify_chat"), "generation": ("generate",)}
QUERIES = {2: 1500, 3: 3000}
"""Model calls of a search, if nothing else is said, by its level."""
LEAST_ROWS = 8
OF_LAYOUTS = 0.25
"""Share of a search that is for its layouts, where they are searched."""
OF_READING = 0.5
"""Share of a time limit after which no more rows are read to choose an encoder."""
OF_STATIC = 0.6
"""Share of what -O2 may ask that goes into a static set, where one is wanted."""


class Optimised(NamedTuple):
    """The program that was found, and what was tried: first how, then a row for each variant in each race."""

    program: Program
    trace: list[dict[str, Any]]


def optimise(
    base: Program,
    backend: Backend,
    *,
    level: Literal[2, 3] = 2,
    fixed: frozenset[str] = frozenset(),
    queries: int | None = None,
    time_limit_s: float = float("inf"),
    calibrations: Sequence[str] | None = None,
    reference: Predictor | None = None,
    among: Sequence[int] | None = None,
    validation: Dataset | None = None,
    metric: Metric = "likelihood",
    layouts: bool = False,
    log: Path | None = None,
    progress: Progress | None = None,
) -> Optimised:
    """The best program that a search finds around `base`.

    Args:
        level: -O2 or -O3.
        fixed: names of settings that stay as they are in `base`: `encoder`, or those of `Variant`.
        queries: most model calls, one for each prompt that is scored; by default those of `QUERIES`.
        time_limit_s: after which the best so far is taken. What it is then depends on the machine.
        calibrations: of which the best is taken, and with which variants are judged if it is one; by default all that
            need no further prompts.
        reference: whose law is to be approximated, in place of the right labels.
        among: held-out rows that may be asked about, all by default; see `calibrate`.
        validation: data whose rows are held out, in place of the pool's.
        metric: for targets; labels are judged by log-loss.
        layouts: whether the layout is searched too (`layout_choice`), for a quarter of `queries` at most.
        log: file that keeps what the model says, so that a search that was killed goes on; see `ScoreLog`.

    Raises:
        DataError: if there are too few rows to hold some out.
        LabelError: if reference or validation data have other labels.
        CalibrationError: if none of the calibrations can be fitted to what was asked.
    """
    queries = QUERIES[level] if queries is None else queries
    started = time.monotonic()
    of_encoder: list[dict[str, Any]] = []
    if "encoder" not in fixed:
        base, of_encoder = choose_encoder(base, backend, queries=queries, until=started + OF_READING * time_limit_s)
    answers = ScoreLog(log)
    asker = Asker(backend, answers, deadline=started + time_limit_s, progress=progress)
    held_out = held_out_data(base, validation)
    variants = Variants(base, held_out)
    space = _space(variants, fixed)
    rows = variants.askable([variants.own.template])
    if among is not None:
        rows = np.intersect1d(rows, among)
    if len(rows) < LEAST_ROWS:
        raise DataError(
            f"{len(rows)} rows of {held_out.source} can be asked within the budget, and a search holds out "
            f"{LEAST_ROWS} at least; give more rows, or compile with -O1"
        )
    draw = np.random.default_rng(base.settings.seed)
    rows, learned_from = draw.permutation(rows), rows[:0]
    if level == 3 and validation is None:
        rows, learned_from = set_apart(rows, queries)
    elif level == 3:  # the pool is free to be learned from, but for what is asked
        asked = {held_out.texts[row] for row in rows.tolist()}
        others = [row for row, text in enumerate(base.pool.data.texts) if text not in asked]
        free = np.intersect1d(Variants(base).askable([variants.own.template]), others)
        _, learned_from = set_apart(draw.permutation(free), queries)
    judge: Judge
    if base.labels:
        after = calibrations[0] if calibrations is not None and len(calibrations) == 1 else "mixture"
        judge = LabelJudge(asker, base, rows, calibration=after, reference=reference, validation=validation)
    else:
        judge = TargetJudge(asker, base, rows, metric, validation=validation)
    most = queries - int(OF_LAYOUTS * queries) if layouts else queries
    first = int(OF_LEVEL_2 * most) if level == 3 else most
    chosen = int(OF_STATIC * first) if base.settings.retriever == "static" else 0
    races = Races(variants, judge, first - chosen)
    if level == 3:
        asker.deadline = started + OF_LEVEL_2 * time_limit_s
    found = races.level_2(space)
    if found.retriever == "static":
        races.left += chosen
        found = choose_set(races, found)
    if level == 3:
        asker.deadline = started + time_limit_s
        races.left += most - first
        found = level_3(races, found, asker, learned_from, fixed=fixed)
    if layouts:
        races.left += queries - most
        found = cheapest_layout(races, found)
    program, trace = laid_out(variants.program(found)), races.trace
    if isinstance(judge, LabelJudge):
        left = queries - answers.asked
        program, told = _calibrated(program, judge, found, calibrations, left)
        trace = [*trace, *told]
    how = {
        "level": level,
        "risk": judge.risk,
        "rows": len(rows),
        "rows_of": "the pool" if validation is None else "the validation data",
        "search_queries": queries,
        "prompts_asked": answers.asked,
        "time_was_up": any("time was up" in row.get("why", row.get("note", "")) for row in trace),
        "model": backend.model,
        "device": backend.device,
        "seed": base.settings.seed,
    }
    return Optimised(program, [how, *of_encoder, *trace])


def _calibrated(
    program: Program, judge: LabelJudge, variant: Variant, names: Sequence[str] | None, left: int
) -> tuple[Program, list[dict[str, Any]]]:
    """The program, calibrated with what it was asked already, and up to 200 queries of what is `left`."""
    asked = judge.asked(variant)
    wanted = min(len(judge.rows), max(asked, min(CALIBRATION_QUERIES, asked + left // variant.ensembles)))
    try:
        held_out = judge.held_out(variant, program, wanted)
    except OutOfTime:
        if asked < LEAST_QUERIES:
            return program, [{"calibration": "none", "queries": asked, "why": "chosen: the time was up"}]
        held_out = judge.held_out(variant, program, asked)
    if len(held_out.rows) < LEAST_QUERIES:
        return program, [{"calibration": "none", "queries": asked, "why": "chosen: too few queries for another one"}]
    choice = fit_and_choose(held_out, names)
    if names is not None and len(names) == 1:
        choice = choice.forced(names[0])
    told = [
        {
            "calibration": each.name,
            "queries": choice.queries,
            "risk": round(each.risk, 4),
            "low": round(each.risk_low, 4),
            "high": round(each.risk_high, 4),
            "why": f"chosen: {choice.why}" if each.name == choice.calibration.method else "",
        }
        for each in choice.candidates
    ]
    return with_calibration(program, choice.calibration), told


def _space(variants: Variants, fixed: frozenset[str]) -> Space:
    """All values of the settings that are not `fixed`."""
    own = variants.own
    settings = variants.base.settings
    powers = [0, *(2**i for i in range((variants.most_shots() - 1).bit_length() + 1))]
    labelled = bool(variants.base.labels)
    return Space(
        retrievers=[settings.retriever] if "retriever" in fixed else [name for name in RETRIEVERS if name != "static"],
        shots=[settings.shots] if "shots" in fixed else powers,
        orders=[own.order] if "order" in fixed else [o for o in get_args(Order) if labelled or o != "by-label"],
        per_label=[own.per_label] if "per_label" in fixed or not labelled else [0, 1],
        templates=[own.template] if "template" in fixed else TEMPLATES[variants.base.task],
    )


SEARCHES: Mapping[int, Callable[..., Optimised]] = {2: optimise, 3: partial(optimise, level=3)}
"""What each level searches with, called as `optimise`; the levels that are not here run no model."""
