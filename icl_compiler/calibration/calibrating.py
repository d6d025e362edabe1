"""Calibrate a program: ask the model about held-out rows, fit, choose. The only part that runs a model.

It costs one prompt for each held-out query, 21 more for each of `contextual` and `domain-context`, one for `pmi`; what
a query costs later does not change, but for the search of its voters.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from icl_compiler.backends.backend import Backend, LabelScores, Progress
from icl_compiler.calibration.choosing import Choice, fit_and_choose
from icl_compiler.calibration.held_out import HeldOut
from icl_compiler.calibration.law import Calibration, Evidence, softmax
from icl_compiler.calibration.methods import MOST_VOTERS
from icl_compiler.calibration.votes import Vote, Voters
from icl_compiler.compile import with_calibration
from icl_compiler.data import Dataset
from icl_compiler.errors import LabelError
from icl_compiler.predictor import Predictor
from icl_compiler.program import Program, Prompt
from icl_compiler.registry import CALIBRATIONS
from icl_compiler.tokenizer import TokenIds

QUERIES = 200
"""Held-out queries, if nothing else is said."""
_PRIOR_PROMPTS = 21
_CONTENT_FREE = ("N/A", "[MASK]", "")
WITH_VOTERS = ("mixture", "product")
"""Calibrations that count votes of neighbours."""
WITH_OWN_PROMPTS = ("pmi", "contextual", "domain-context")
"""Calibrations for which the model is asked more than the held-out queries."""


def calibrate(
    program: Program,
    backend: Backend,
    *,
    queries: int = QUERIES,
    candidates: Sequence[str] | None = None,
    reference: Predictor | None = None,
    among: Sequence[int] | None = None,
    validation: Dataset | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Program, Choice]:
    """The program with the calibration of lowest held-out risk among `candidates` (default: all), and why it is that.

    Args:
        queries: how many rows of the pool are asked, drawn uniformly; all where there are fewer.
        reference: whose law is to be approximated; without one, the right labels are.
        among: rows that may be asked about, all by default. A reference answers rows that it was trained on more surely
            than others, and is to be approximated on others.
        validation: data whose rows are asked in place of the pool's.

    Raises:
        LabelError: if the program generates text, or reference or validation data have other labels.
        CalibrationError: if there are too few rows.
    """
    held_out = score_held_out(
        program,
        backend,
        queries=queries,
        candidates=candidates,
        reference=reference,
        among=among,
        validation=validation,
        seed=seed,
        progress=progress,
    )
    choice = fit_and_choose(held_out, candidates)
    return with_calibration(program, choice.calibration), choice


def score_held_out(
    program: Program,
    backend: Backend,
    *,
    queries: int = QUERIES,
    candidates: Sequence[str] | None = None,
    reference: Predictor | None = None,
    among: Sequence[int] | None = None,
    validation: Dataset | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeldOut:
    """Ask the model, and the reference if there is one, about held-out rows; see `calibrate`."""
    if program.task != "classification":
        raise LabelError("this program generates text, it has no labels whose probabilities could be calibrated")
    require_same_labels(program, reference)
    data = held_out_data(program, validation)
    names = tuple(CALIBRATIONS) if candidates is None else tuple(candidates)
    draw = np.random.default_rng(seed)
    there = np.arange(len(data)) if among is None else np.asarray(among)
    rows = np.sort(draw.choice(there, size=min(queries, len(there)), replace=False))
    texts = [data.texts[row] for row in rows.tolist()]
    asked = with_voters(program) if set(names) & set(WITH_VOTERS) else program
    sets = asked.prompt_sets(texts)
    extra = {name: _prior_prompts(name, program, sets, texts, draw) for name in names}
    first = [prompt.tokens for prompts in sets for prompt in prompts]
    every = first + [tokens for some in extra.values() for tokens in some]
    scores = backend.label_logprobs(every, program.label_words, progress=progress)
    laws = softmax(Evidence(scores.logprobs, scores.upper).middle)[len(first) :]
    priors, start = {}, 0
    for name, some in extra.items():
        if some:
            priors[name] = laws[start : start + len(some)].mean(axis=0)
        start += len(some)
    of_reference = None
    if reference is not None:
        said = reference.predict(texts)
        of_reference = said.probabilities[:, [said.labels.index(label) for label in program.labels]]
    upper = None if scores.upper is None else scores.upper[: len(first)]
    own = LabelScores(scores.logprobs[: len(first)], scores.usage, upper).averaged(program.settings.ensembles)
    found = held_out_of(asked, rows.tolist(), [prompts[0] for prompts in sets], own, validation)
    return replace(found, priors=priors, reference=of_reference, usage=scores.usage)


def require_same_labels(program: Program, reference: Predictor | None) -> None:
    """Refuse a reference with other labels than the program's.

    Raises:
        LabelError: if it has.
    """
    if reference is not None and set(reference.labels) != set(program.labels):
        raise LabelError(
            "the reference has other labels than the program; calibrate against one trained on the same data"
        )


def with_voters(program: Program) -> Program:
    """The program, whose prompts bring all voters that a calibration may want; a dense index is made where none is."""
    return with_calibration(program, Calibration("mixture", vote=Vote(MOST_VOTERS)))


def held_out_data(program: Program, validation: Dataset | None) -> Dataset:
    """Of which rows are held out: validation data that suit the program, if there are some, else its pool.

    Raises:
        DataError: if the program is of another task.
        LabelError: if the validation data have labels that the program lacks.
    """
    if validation is None:
        return program.pool.data
    validation.require_like(program.task, program.labels, of=program.pool.data.source)
    return validation


def held_out_of(
    program: Program,
    rows: Sequence[int],
    prompts: Sequence[Prompt],
    scores: LabelScores,
    validation: Dataset | None = None,
) -> HeldOut:
    """Held-out queries from what is there already: the prompts for these rows, and their first scores.

    The votes are known if the prompts are of `with_voters(program)`.
    """
    number = {label: i for i, label in enumerate(program.labels)}
    answers = held_out_data(program, validation).answers
    labels = np.array([number[answers[row]] for row in rows], dtype=np.int64)
    given = [prompt.voters for prompt in prompts if prompt.voters is not None]
    voters = Voters.joined(given) if given else None
    upper = None if scores.upper is None else scores.upper[: len(rows)]
    evidence = Evidence(scores.logprobs[: len(rows)], upper, voters)
    numbers = np.array(rows, dtype=np.int64)
    return HeldOut(numbers, labels, evidence, usage=scores.usage, of_pool=validation is None)


def _prior_prompts(
    name: str, program: Program, sets: Sequence[Sequence[Prompt]], texts: Sequence[str], draw: np.random.Generator
) -> list[TokenIds]:
    """The prompts that say what the model answers whatever the query."""
    if name == "pmi":
        [query] = program.template.queries([""])
        return [(*program.template.head, *query)]
    if name not in ("contextual", "domain-context"):
        return []
    words = [word for text in program.pool.data.texts for word in text.split()] or [""]
    found: list[TokenIds] = []
    for number, place in enumerate(np.linspace(0, len(sets) - 1, min(_PRIOR_PROMPTS, len(sets))).astype(int).tolist()):
        length = max(1, len(texts[place].split()))
        random = " ".join(words[i] for i in draw.integers(len(words), size=length).tolist())
        text = random if name == "domain-context" else _CONTENT_FREE[number % len(_CONTENT_FREE)]
        found += [program.around(prompt, text) for prompt in sets[place]]
    return found
