"""One evaluation of a program that writes texts: as `evaluation.evaluate`, with samples in place of label laws.

- The references write once; every series is compared with what they wrote.
- Baselines: random shots, shuffled targets, zero shots, and the texts of the neighbours, repeated without a language
  model: a law of a few texts, whose total variation from the reference is exact without samples.
- The scoring noise is the program's own samples, read again by the same engine.
- Where queries were asked until a decision, every interval is one that holds whenever one stops.
- Accuracy is the share of greedy outputs that are the target, blanks aside.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from evaluation.asking import AskedTexts
from evaluation.evaluate import (
    NOISE_QUERIES,
    Evaluation,
    ProgressFor,
    Row,
    accuracy_columns,
    common_columns,
    gap_columns,
    predictor_of,
    query_columns,
    require_comparable_references,
    without_test_rows,
)
from evaluation.formatting import counted
from evaluation.gap import Gap
from evaluation.neighbours import NeighboursVote
from evaluation.reference.trainer import Reference
from evaluation.texts import Lengths, TextGap, Written, point_gap, reading_noise, text_gap, write
from icl_compiler.backends.backend import Backend
from icl_compiler.calibration.votes import Vote
from icl_compiler.compile import load_tokenizer
from icl_compiler.data import Dataset
from icl_compiler.encoders import without_base
from icl_compiler.errors import EvaluationError
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program

TEXT_SERIES = ("random shots", "shuffled labels", "zero shots")
SATURATED = 0.9
"""Above this, the total variation of whole answers hardly tells one gap from another."""


@dataclass(frozen=True)
class TextAnswers:
    """What the references wrote to the queries: once, compared with every program."""

    reference: Reference
    first: Written
    floors: tuple[tuple[Reference, Written], ...]


def require_comparable_texts(program: Program, references: Sequence[Reference], data: Dataset) -> None:
    """Find out before the models run what would end the evaluation.

    Raises:
        EvaluationError: if a reference has labels, or data have; if two models cut text into other tokens, or end an
            answer otherwise.
        BudgetError: if a text is too long for the program.
    """
    require_comparable_references(references)
    for reference in references:
        if reference.labels:
            raise EvaluationError(
                f"this program generates texts, and the reference {reference.folder} answers with labels; fine-tune "
                "one on the same targets (icl finetune --target-column)"
            )
    if data.task != "generation":
        raise EvaluationError(
            f"this program generates texts, and {data.source} has labels; name the column of the targets "
            "(--target-column)"
        )
    for reference in references:
        same = load_tokenizer(reference.base_model).fingerprint == program.template.tokenizer.fingerprint
        if not same:
            raise EvaluationError(
                f"{program.settings.model} and {reference.base_model}, which the reference {reference.folder} is made "
                "of, cut text into other tokens; the gap of texts is measured token by token, between models with one "
                "tokenizer"
            )
    program.prompts(data.texts)


def ask_for_texts(
    references: Sequence[Reference],
    data: Dataset,
    lengths: Lengths,
    *,
    seed: int,
    dtype: str = "auto",
    asked: AskedTexts | None = None,
    progress: ProgressFor | None = None,
) -> TextAnswers:
    """What the references write to the texts of `data`; the first is the one to approximate.

    Args:
        asked: what the first of them has written to these texts already.
    """
    written = [] if asked is None else [asked.reference]
    for place, reference in list(enumerate(references))[len(written) :]:
        report = progress(f"reference, seed {reference.seed}", len(data)) if progress else None
        writer = reference.writer(dtype=dtype)
        written.append(write(writer, data.texts, lengths, seed=seed + (place > 0), progress=report))
    return TextAnswers(references[0], written[0], tuple(zip(references[1:], written[1:], strict=True)))


def evaluate_texts(
    program: Program,
    backend: Backend,
    answers: TextAnswers,
    data: Dataset,
    lengths: Lengths,
    *,
    dataset_name: str,
    seed: int,
    level: float = 0.95,
    worst: int = 10,
    series: Collection[str] = (),
    asked: AskedTexts | None = None,
    progress: ProgressFor | None = None,
) -> Evaluation:
    """Measure `program` on `backend` against what the references wrote to `data`.

    Args:
        seed: the one that the references were asked with; the program's samples are drawn with the next one.
        series: what is measured beside the program, of `evaluate.BASELINES`.
        asked: what the program has written to `data` already, query after query until a decision.

    Raises:
        EvaluationError: if the program ends an answer otherwise than the reference.
    """
    first = answers.first
    if program.template.terminator_ids != first.writer.program.template.terminator_ids:
        raise EvaluationError(
            f"the program ends an answer with {program.template.template.terminator!r}, the reference with "
            f"{first.writer.program.template.template.terminator!r}; use one --template for both"
        )
    program, warnings = without_test_rows(program, data)
    common = common_columns(program, backend, answers, data, dataset_name, level) | lengths._asdict()
    anytime = asked is not None
    if asked is not None:
        common |= {"data_sha256": asked.drawn.content_hash, "queries_max": len(asked.drawn)}
    per_query: list[Row] = []

    def row(series: str, outputs: Sequence[str], compared: Gap, columns: Row, **more: object) -> Row:
        what = {"series": series, **common, **more}
        correct = _same(outputs, data.answers)
        per_query.append(what | query_columns(compared, correct, data))
        return {
            **what,
            **gap_columns(compared, len(data)),
            **accuracy_columns(correct, level, anytime=anytime),
            "agreement": float(_same(outputs, first.outputs).mean()),
            **columns,
        }

    def written_row(series: str, written: Written, **more: object) -> Row:
        found = text_gap(written, first, lengths, level=level, anytime=anytime)
        return row(series, written.outputs, found.gap, _columns(written, found), **more)

    def ask(name: str) -> Written:
        writer = predictor_of(name, program, backend)
        assert isinstance(writer, PromptedPredictor)  # the vote is no writer, and is not asked here
        report = progress(name, len(data)) if progress else None
        return write(writer, data.texts, lengths, seed=seed + 1, progress=report)

    ours = ask("program") if asked is None else asked.ours
    shots = float(np.mean([len(prompt.selection.rows) for prompt in ours.prompts]))
    reference_accuracy = float(_same(first.outputs, data.answers).mean())
    ratios = None if asked is None else asked.ratios
    found = text_gap(ours, first, lengths, level=level, ratios=ratios, anytime=anytime)
    of_program: Row = {"shots_per_query": shots, "reference_accuracy": reference_accuracy}
    if asked is not None:
        of_program |= {"epsilon": asked.epsilon, "decision": asked.stopped.answer, "queries_asked": len(data)}
    rows = [row("program", ours.outputs, found.gap, _columns(ours, found), **of_program)]
    rows += [written_row(name, ask(name)) for name in TEXT_SERIES if name in series]
    if "neighbours' vote" in series:
        laws, outputs = _neighbours(program, data.texts, lengths)
        rows.append(row("neighbours' vote", outputs, point_gap(laws, first, level=level, anytime=anytime), {}))
    if "floor" in series:
        for reference, second in answers.floors:
            rows.append(written_row("floor", second, reference_seed=reference.seed))
    if "scoring noise" in series:
        noise = reading_noise(ours, NOISE_QUERIES, lengths, level=level, anytime=anytime)
        columns = gap_columns(noise, len(noise.per_query))
        rows.append({"series": "scoring noise", "noise_against": "the same, read", **common, **columns})
    if found.gap.mean > SATURATED:
        warnings.append(
            f"with {counted(len(program.pool.data), 'example')}, whole answers of up to {lengths.max_new_tokens} "
            "tokens differ nearly always, so that their gap is close to 1 and tells little; look at the gap of single "
            "tokens, or measure fewer (--max-new-tokens)"
        )
    shown = [
        {
            "text": data.texts[i],
            "label": data.answers[i],
            "program_label": ours.outputs[i],
            "reference_label": first.outputs[i],
            "tv": float(found.gap.per_query[i]),
            "prompt": program.template.tokenizer.decode(ours.prompts[i].tokens),
        }
        for i in np.argsort(-found.gap.per_query, kind="stable")[:worst].tolist()
    ]
    return Evaluation(rows, shown, warnings, per_query)


def _columns(written: Written, found: TextGap) -> Row:
    count = len(written.prompts)
    return {
        "gap_coupling": found.coupling,
        "gap_chain": found.chain,
        "token_gap": found.token,
        "token_gap_low": found.token_interval.low,
        "token_gap_high": found.token_interval.high,
        "finished": found.finished,
        "prompt_tokens_per_query": float(np.mean([len(prompt.tokens) for prompt in written.prompts])),
        "output_tokens_per_query": float(np.mean([len(item.tokens) for item in written.greedy])),
        "computed_tokens_per_query": written.usage.computed_tokens / count,
        "seconds_per_query": written.seconds / count,
    }


def _neighbours(
    program: Program, texts: Sequence[str], lengths: Lengths
) -> tuple[list[list[tuple[tuple[int, ...], float]]], list[str]]:
    """The targets of the nearest rows, each with its share of them, and the most frequent one, of each text."""
    pool = replace(program.pool.data, task="classification")
    fitted = program.retriever if program.settings.retriever == "dense" and program.reading is None else None
    encoder = without_base(program.settings.encoder)
    said = NeighboursVote(pool, encoder=encoder, vote=Vote(8), retriever=fitted).predict(texts)
    laws = []
    for shares in said.probabilities:
        rows = np.flatnonzero(shares).tolist()
        law: dict[tuple[int, ...], float] = {}
        for row, ids in zip(rows, program.template.answers([said.labels[row] for row in rows]), strict=True):
            cut = tuple(ids[: lengths.max_new_tokens])
            law[cut] = law.get(cut, 0.0) + float(shares[row])
        laws.append(list(law.items()))
    return laws, [said.labels[row] for row in said.best]


def _same(outputs: Sequence[str], targets: Sequence[str]) -> Bool[np.ndarray, " texts"]:
    pairs = zip(outputs, targets, strict=True)
    return np.array([" ".join(output.split()) == " ".join(target.split()) for output, target in pairs], dtype=bool)
