"""Rows of an evaluation on the echo backend: scoring noise, and engines that give only bounds."""

import json
from pathlib import Path

import numpy as np
import pytest
from toys import RoundedEcho, TopEcho, customers

from evaluation.cli import measure_sizes
from evaluation.evaluate import NOISE_QUERIES, Answers, Evaluation, evaluate, predictor_of
from evaluation.measurement import measurements
from evaluation.reference.trainer import Reference
from evaluation.summary import summary_lines
from icl_compiler.backends.backend import Backend
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import ModelError
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program
from icl_compiler.templates import Template

ASKED = ("where is the card", "my parcel is lost", "a late refund")
TEXTS = tuple(f"{text} {i}" for i in range(15) for text in ASKED)
TEST = Dataset(TEXTS, ("card", "parcel", "refund") * 15, "classification", "test")
NOISE = ("scoring noise",)


@pytest.fixture
def program() -> Program:
    return compile_program(customers(), model="echo", retriever="bm25", shots=3, budget=10_000)


def zero_shot_answers(data: Dataset = TEST) -> Answers:
    """A reference that answers as the program without shots does."""
    program = compile_program(customers(), model="echo", retriever="uniform", shots=0, budget=10_000)
    template = Template.from_name("classify")
    reference = Reference(Path("r"), program.labels, template, "by hand", "echo", 0, 12, "", ())
    return Answers(reference, PromptedPredictor(program, EchoBackend()).predict(data.texts), ())


def measured(program: Program, backend: Backend, data: Dataset = TEST, **more: object) -> Evaluation:
    more = {"series": NOISE, **more}
    return evaluate(program, backend, zero_shot_answers(data), data, dataset_name="toy", **more)  # type: ignore[arg-type]


def test_the_noise_is_measured_in_other_batches_and_against_float32(program: Program) -> None:
    bars = []
    found = measured(
        program, RoundedEcho(), float32_backend=EchoBackend, progress=lambda name, total: bars.append((name, total))
    )
    main, batches, rounding = found.rows
    assert [row.get("noise_against") for row in found.rows] == [None, "other batches", "float32"]
    assert batches["gap"] == 0
    # The rounding takes half of the first label's probability.
    exact = PromptedPredictor(program, EchoBackend()).predict(TEXTS[:NOISE_QUERIES])
    assert rounding["gap"] == pytest.approx(exact.probabilities[:, 0].mean() / 2)
    assert batches["n_queries"] == rounding["n_queries"] == NOISE_QUERIES < main["n_queries"] == len(TEXTS)
    assert batches["prompt_tokens_per_query"] == pytest.approx(exact.prompt_tokens.mean())
    assert "accuracy" not in batches
    assert not {"gap_truncation", "noise_against"} & main.keys()
    assert found.warnings == []
    assert bars[-2:] == [("scoring noise, other batches", 32), ("scoring noise, float32", 32)]
    lines = summary_lines(found.rows)
    assert [line.split("  ")[0] for line in lines[2:4]] == ["scoring noise, other batches", "scoring noise, float32"]


def test_what_each_query_showed_is_kept(program: Program) -> None:
    [each] = measured(program, EchoBackend(), series=()).per_query
    said = PromptedPredictor(program, EchoBackend()).predict(TEXTS)
    right = [said.probabilities[i, said.labels.index(label)] for i, label in enumerate(TEST.answers)]
    assert each["texts"] == list(TEXTS)
    np.testing.assert_allclose(each["losses"], -np.log(right))
    bounded = measured(program, TopEcho(1), series=())
    [each] = bounded.per_query
    assert each["gap_truncation"] == bounded.rows[0]["gap_truncation"] > 0
    assert "losses" not in each


def test_other_batches_are_compared_query_by_query(program: Program) -> None:
    """A backend that depends on nothing but the prompt has no noise, in whatever order it is asked."""
    [_, noise] = measured(program, EchoBackend()).rows
    assert noise["gap"] == 0
    laws = PromptedPredictor(program, EchoBackend()).predict(TEXTS).probabilities
    assert np.ptp(laws, axis=0).max() > 0.1, "the queries differ, so that another order would show"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("the weights of 'm' are not on this machine"), "the weights of 'm' are not on this machine"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_float32_that_cannot_be_had_is_a_warning(program: Program, error: Exception, said: str) -> None:
    def fail() -> Backend:
        raise error

    found = measured(program, EchoBackend(), float32_backend=fail)
    assert [row.get("noise_against") for row in found.rows] == [None, "other batches"]
    assert found.warnings == [f"the scoring noise against float32 was not measured: {said}"]


def test_float32_is_opened_only_for_the_noise(program: Program) -> None:
    def fail() -> Backend:
        raise AssertionError

    assert len(measured(program, EchoBackend(), series=("zero shots",), float32_backend=fail).rows) == 2


def test_the_command_opens_float32_where_the_engine_rounds(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("evaluation.float32.float32_backend", lambda model: opened.append(model) or EchoBackend())

    def kinds(engine: Backend) -> list[object]:
        results = measure_sizes(
            program, engine, zero_shot_answers(), TEST, [6, 12],
            dataset_name="toy", level=0.95, series=NOISE, progress=lambda name, total: None,
        )  # fmt: skip
        return [row["noise_against"] for result in results for row in result.rows if row["series"] == "scoring noise"]

    monkeypatch.setattr(RoundedEcho, "model", "smollm2-135m")
    assert kinds(RoundedEcho()) == ["other batches", "float32"]
    assert opened == ["echo"]
    assert kinds(EchoBackend()) == ["other batches"]
    assert len(opened) == 1


def test_an_engine_that_gives_bounds_gives_a_gap_within_bounds(program: Program) -> None:
    series = ("zero shots", "scoring noise")
    exact = measured(program, EchoBackend(), series=series).rows
    found = measured(program, TopEcho(1), series=series, float32_backend=EchoBackend)
    for row, known in zip(found.rows, [*exact, exact[-1]], strict=True):
        assert row["gap_low"] <= known["gap_low"] <= known["gap_high"] <= row["gap_high"]
        assert abs(row["gap"] - known["gap"]) <= row["gap_truncation"] / 2 + 1e-12
        assert 0 < row["gap_truncation"] < 1
    [warning] = found.warnings
    low, high = (found.rows[0]["gap"] + sign * found.rows[0]["gap_truncation"] / 2 for sign in (-1, 1))
    assert warning.startswith("with 12 examples, the engine gave only its likeliest tokens, so that gaps are known")
    assert f"(program {low:.3f} to {high:.3f}; zero shots " in warning
    assert "; scoring noise, float32 0.000 to " in warning
    assert json.loads(json.dumps(found.rows)) == found.rows
    assert measurements(found.rows)[0].gap_truncation == found.rows[0]["gap_truncation"]


def test_an_engine_whose_likeliest_tokens_are_all_labels_is_exact(program: Program) -> None:
    found = measured(program, TopEcho(3))
    assert found.warnings == []
    assert all("gap_truncation" not in row for row in found.rows)
    assert [row["gap"] for row in found.rows] == [row["gap"] for row in measured(program, EchoBackend()).rows]


def test_shuffled_labels_stand_at_the_same_shots(program: Program) -> None:
    shuffled = predictor_of("shuffled labels", program, EchoBackend()).program
    for ours, others in zip(program.prompts(TEXTS), shuffled.prompts(TEXTS), strict=True):
        assert ours.selection.rows == others.selection.rows
    before, after = program.pool.data.answers, shuffled.pool.data.answers
    assert sorted(before) == sorted(after)
    assert before != after
    assert [shot.label for shot in shuffled.explain(TEXTS[0]).shots] == [
        after[row] for row in program.prompts(TEXTS)[0].selection.rows
    ]
    [_, row] = measured(program, EchoBackend(), series=("shuffled labels",)).rows
    assert (row["series"], row["n_labels"]) == ("shuffled labels", 3)


@pytest.mark.parametrize(
    ("both", "said"),
    [
        (1, "1 row of the pool stands in the test data too and was removed"),
        (2, "2 rows of the pool stand in the test data too and were removed"),
    ],
)
def test_rows_that_stand_in_both_are_counted(program: Program, both: int, said: str) -> None:
    texts = (*customers().texts[:both], "what is this")
    data = Dataset(texts, ("card",) * (both + 1), "classification", "test")
    assert measured(program, EchoBackend(), data, series=()).warnings[0].startswith(said)
