"""Validation data are asked in place of the pool's rows, and what is fitted to them suits how labels come there."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from hashed_words import HashedWords
from toys import CountingEcho

from icl_compiler import encoders
from icl_compiler.artifact import load_program
from icl_compiler.calibration.calibrating import calibrate, score_held_out
from icl_compiler.cli import main
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import CalibrationError, DataError, LabelError
from icl_compiler.optimise.levels import optimise
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.tokenizer import ByteTokenizer

LABELS = ("card", "parcel", "refund")


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def unclear(labels, start=0):
    """Texts that do not tell their label."""
    texts = tuple(f"text number {start + i}" for i in range(len(labels)))
    return Dataset(texts, tuple(labels), "classification", "train.csv")


def balanced(rows=60):
    return unclear([LABELS[i % 3] for i in range(rows)])


def mostly_refunds(rows=60):
    """Nine in ten are refunds; none stands in `balanced`."""
    there = unclear(["refund" if i % 10 else LABELS[i // 10 % 3] for i in range(rows)], 1000)
    return Dataset(there.texts, there.answers, there.task, "dev.csv")


def program(data=None, **settings):
    return compile_program(data or balanced(), model="echo", **{"retriever": "uniform", "shots": 3} | settings)


def of_refund(made):
    said = PromptedPredictor(made, CountingEcho()).predict(["another text", "one more"])
    return said.probabilities[:, said.labels.index("refund")].mean()


def test_a_calibration_fits_how_labels_come_in_the_validation_data():
    plain = program()
    with_pool, _ = calibrate(plain, CountingEcho(), candidates=["bias"])
    fitted, choice = calibrate(plain, CountingEcho(), candidates=["bias"], validation=mostly_refunds())
    assert choice.queries == 60
    assert of_refund(with_pool) < 0.5
    assert of_refund(fitted) > 0.75


@pytest.mark.parametrize("level", [2, 3])
def test_a_search_asks_and_fits_them(level):
    engine, dev = CountingEcho(), mostly_refunds()
    found, trace = optimise(
        program(), engine, level=level, queries=200, calibrations=["bias"], fixed=frozenset({"instruction"}),
        validation=dev,
    )  # fmt: skip
    assert trace[0]["rows_of"] == "the validation data"
    assert trace[0]["rows"] == 60
    assert of_refund(found) > 0.75


def asked(held_out, data):
    return [data.texts[row] for row in held_out.rows.tolist()]


def test_the_answers_are_those_of_these_texts_by_the_program():
    plain, dev = program(retriever="bm25"), mostly_refunds(30)
    held_out = score_held_out(plain, CountingEcho(), queries=20, candidates=["temperature"], validation=dev)
    said = PromptedPredictor(plain, CountingEcho()).predict(asked(held_out, dev))
    np.testing.assert_allclose(np.exp(held_out.evidence.logprobs), said.probabilities)
    assert [LABELS[label] for label in held_out.labels] == [dev.answers[row] for row in held_out.rows.tolist()]


def test_a_row_that_stands_in_the_pool_too_is_asked_without_itself():
    data = balanced()
    plain = program(data, retriever="bm25", shots=60)
    inside = score_held_out(plain, CountingEcho(), queries=60, candidates=["mixture"])
    same = Dataset(data.texts, data.answers, data.task, "dev.csv")
    outside = score_held_out(plain, CountingEcho(), queries=60, candidates=["mixture"], validation=same)
    np.testing.assert_array_equal(inside.evidence.logprobs, outside.evidence.logprobs)
    np.testing.assert_array_equal(inside.evidence.voters.labels, outside.evidence.voters.labels)


def test_a_search_for_targets_asks_them_too():
    def pairs(first, source):
        texts = tuple(f"say x{first + i}" for i in range(20))
        return Dataset(texts, tuple(text.split()[1] for text in texts), "generation", source)

    asked = []

    class Hears(CountingEcho):
        def sequence_logprobs(self, prompts, words, **more):
            asked.extend(ByteTokenizer().decode(prompt).rsplit("say ", 1)[1].split()[0] for prompt in prompts)
            return super().sequence_logprobs(prompts, words, **more)

    base = compile_program(pairs(100, "train.csv"), model="echo", retriever="uniform", shots=2, budget=400)
    _, trace = optimise(base, Hears(), queries=60, validation=pairs(500, "dev.csv"))
    assert trace[0]["rows"] == 20
    assert set(asked) <= {f"x{500 + i}" for i in range(20)}
    assert len(asked) > 20


def test_what_does_not_suit_is_refused():
    plain = program()
    strange = unclear(["refund", "card", "loan", "lost"] * 10, 1000)
    for ask in (calibrate, optimise):
        with pytest.raises(LabelError, match=r"has the label 'loan' and 1 more, which train\.csv lacks"):
            ask(plain, CountingEcho(), validation=strange)
    with pytest.raises(DataError, match=r"is for generation, and train\.csv for classification"):
        calibrate(plain, CountingEcho(), validation=Dataset(("a",), ("b",), "generation", "dev.csv"))
    with pytest.raises(CalibrationError, match="9 held-out queries are too few"):
        calibrate(plain, CountingEcho(), validation=mostly_refunds(9))
    with pytest.raises(DataError, match=r"7 rows of dev\.csv can be asked within the budget"):
        optimise(plain, CountingEcho(), validation=mostly_refunds(7))
    with pytest.raises(CalibrationError, match="'knn' could not be fitted"):
        _, choice = calibrate(plain, CountingEcho(), candidates=["knn"], validation=mostly_refunds())
        choice.forced("knn")


def written(path, data):
    path.write_text("\n".join(["text,label", *(f"{t},{a}" for t, a in zip(data.texts, data.answers, strict=True))]))
    return path


def command(*arguments):
    return CliRunner().invoke(main, ["compile", *map(str, arguments)])


@pytest.mark.parametrize(
    "how", [["--calibration", "bias"], ["-O2", "--search-queries", "150", "--calibration", "bias"]]
)
def test_from_the_command_line(how, tmp_path):
    train, dev = written(tmp_path / "train.csv", balanced()), written(tmp_path / "dev.csv", mostly_refunds())
    others = mostly_refunds().take([row for row, label in enumerate(mostly_refunds().answers) if label != "refund"])
    test = written(tmp_path / "test.csv", others)
    arguments = ["-o", tmp_path / "p", "--model", "echo", "--retriever", "bm25", "--shots", 3, *how]
    done = command(train, *arguments, "--validation", dev, "--test", test)
    assert done.exit_code == 0, done.output
    assert re.search(r"4 rows of \S*dev.csv left out: in ", done.stderr)
    assert re.search(r"on 56 held-out (queries|rows of the validation data)", done.stdout)
    assert of_refund(load_program(tmp_path / "p")) > 0.75
    assert "will not be known" not in done.stderr
    done = command(train, *arguments, "--validation", dev, "--json")
    assert json.loads(done.stdout)["calibration"]["method"] == "bias"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "-O1 holds nothing out; --validation is for --calibration auto, and for -O2 and -O3"),
        (["--calibration", "knn"], "--calibration knn keeps what the model says of rows of DATA"),
        (["--calibration", "auto", "--validation", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_use_is_told(more, message, tmp_path):
    train, dev = written(tmp_path / "train.csv", balanced()), written(tmp_path / "dev.csv", mostly_refunds())
    done = command(train, "-o", tmp_path / "p", "--model", "echo", "--validation", dev, *more)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "p").exists()
