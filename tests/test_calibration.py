"""Calibrated programs: made, kept, asked; on the echo backend, whose law of the labels is known."""

import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import TopEcho, customers

from icl_compiler import compile as compiling
from icl_compiler import encoders, registry
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.calibration.calibrating import calibrate, held_out_of, score_held_out, with_voters
from icl_compiler.calibration.choosing import fit_and_choose
from icl_compiler.calibration.law import NO_CALIBRATION, Anchors, Calibration, Measured
from icl_compiler.calibration.votes import Vote
from icl_compiler.compile import compile_program, with_calibration, with_pool
from icl_compiler.corrections import Corrector
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, CalibrationError, LabelError
from icl_compiler.predictor import PromptedPredictor

ASKED = ("where is my lost card", "the parcel was late", "a refund for a card")
CALIBRATED = {
    "none": NO_CALIBRATION,
    "temperature": Calibration("temperature", scale=2.5, measured=Measured(200, "log-loss", 0.9, 0.5)),
    "bias": Calibration("bias", scale=0.1 + 0.2, offsets=np.array([0.1, -0.3, 1 / 3])),
    "mixture": Calibration("mixture", vote=Vote(3, 20.0, 0.1), weight=0.4),
    "product": Calibration("product", scale=0.5, vote=Vote(5), pooling="log", weight=1.5, other=-0.7),
    "knn": Calibration(
        "knn", vote=Vote(1), weight=0.6, anchors=Anchors(np.array([0, 5, 9]), np.log(np.eye(3) * 0.7 + 0.1))
    ),
}


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def program(retriever="dense", data=None, **settings):
    return compile_program(data or customers(), **{"model": "echo", "retriever": retriever, "shots": 3, **settings})


def said(asked, texts=ASKED, backend=None):
    return PromptedPredictor(asked, backend or EchoBackend()).predict(texts)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A program with a calibration


@pytest.mark.parametrize("retriever", ["dense", "bm25", "mmr"])
def test_votes_come_with_the_prompts_which_stay_as_they_were(retriever):
    plain = program(retriever)
    mixed = with_calibration(plain, CALIBRATED["mixture"])
    assert [prompt.tokens for prompt in mixed.prompts(ASKED)] == [prompt.tokens for prompt in plain.prompts(ASKED)]
    assert plain.prompts(ASKED)[0].voters is None
    vectors = HashedWords().encode([*plain.pool.data.texts, *ASKED])
    for prompt, query in zip(mixed.prompts(ASKED), vectors[len(plain.pool.data) :], strict=True):
        cosines = vectors[: len(plain.pool.data)] @ query
        order = np.argsort(-cosines, kind="stable")[:11]
        assert [plain.labels[i] for i in prompt.voters.labels[0]] == [plain.pool.data.answers[row] for row in order]
        np.testing.assert_allclose(prompt.voters.scores[0], cosines[order], rtol=1e-6)


def test_one_search_gives_shots_and_votes():
    mixed = with_calibration(program("dense"), CALIBRATED["mixture"])
    assert mixed.voters is None
    asked = []
    search = mixed.retriever.search
    mixed.retriever.search = lambda texts, k: asked.append(k) or search(texts, k)
    mixed.prompts(ASKED)
    assert asked == [12]  # candidates for 3 shots; the 11 voters are among them


def test_a_row_has_no_vote_on_itself():
    mixed = with_calibration(program(), CALIBRATED["mixture"])
    [prompt] = mixed.prompts([customers().texts[5]])
    assert prompt.voters.labels[0, 0] == -1
    assert (prompt.voters.labels[0, 1:] >= 0).all()
    anchored = with_calibration(program(), CALIBRATED["knn"])
    assert anchored.prompts([customers().texts[5]])[0].voters.labels.tolist() == [[0, -1, 2]]
    assert anchored.prompts([customers().texts[6]])[0].voters.labels.tolist() == [[0, 1, 2]]


def test_predictions_are_calibrated_and_keep_what_the_model_said():
    plain = program()
    raw = said(plain)
    assert raw.uncalibrated is None
    tempered = said(with_calibration(plain, CALIBRATED["temperature"]))
    expected = raw.probabilities**2.5
    np.testing.assert_allclose(tempered.probabilities, expected / expected.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(tempered.uncalibrated.probabilities, raw.probabilities)
    assert tempered.usage == raw.usage
    np.testing.assert_allclose(tempered.other, 0, atol=1e-12)


def test_a_query_does_not_depend_on_the_others():
    for calibration in CALIBRATED.values():
        asked = with_calibration(program(), calibration)
        together = said(asked).probabilities
        alone = np.concatenate([said(asked, [text]).probabilities for text in ASKED])
        np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_bounds_stay_bounds():
    asked = with_calibration(program(), CALIBRATED["mixture"])
    exact, bounded = said(asked), said(asked, backend=TopEcho(1))
    assert (bounded.probabilities <= exact.probabilities + 1e-9).all()
    assert (bounded.upper >= exact.probabilities - 1e-9).all()
    assert (bounded.upper > bounded.probabilities).any()


def test_show_says_so():
    asked = with_calibration(program(), CALIBRATED["temperature"])
    line = (
        "probabilities are calibrated: temperature (temperature 0.40): log-loss 0.500 in place of 0.900 on 200 held-out"
    )
    assert [note for note in asked.explain("a card").notes if "calibrated" in note] == [f"{line} queries"]
    assert not any("calibrated" in note for note in program().explain("a card").notes)


# On the disk


@pytest.mark.parametrize("retriever", ["dense", "bm25"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_program_reloads_to_the_same_numbers_and_bytes(name, retriever, tmp_path):
    asked = with_calibration(program(retriever), CALIBRATED[name])
    save_program(asked, tmp_path / "one")
    loaded = load_program(tmp_path / "one")
    np.testing.assert_array_equal(said(loaded).probabilities, said(asked).probabilities)
    assert loaded.calibration.describe() == asked.calibration.describe()
    save_program(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert any(name.startswith("voters/") for name in contents(tmp_path / "one")) == (
        retriever == "bm25" and name in ("mixture", "product")
    )


def forge(folder, change):
    """Change the manifest as whoever knows the format could."""
    from hashlib import sha256

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    manifest["sha256"] = sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_program_of_format_1_loads(tmp_path):
    save_program(program(), tmp_path / "p")
    forge(tmp_path / "p", lambda manifest: (manifest.update(format=1), manifest.pop("calibration")))
    np.testing.assert_array_equal(said(load_program(tmp_path / "p")).probabilities, said(program()).probabilities)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "foreign_code:calibration"},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"scale": None},
        {"other": float("inf")},
        {"weight": 1.5},
        {"pooling": "cubic"},
        {"vote": {"k": 0, "sharpness": 0.0, "smoothing": 0.0}},
        {"vote": {"k": 3, "sharpness": 0.0, "smoothing": 0.0, "run": "this"}},
        {"vote": None},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(change, tmp_path):
    save_program(with_calibration(program(), CALIBRATED["mixture"]), tmp_path / "p")
    forge(tmp_path / "p", lambda manifest: manifest["calibration"].update(change))
    with pytest.raises(ArtifactError, match="does not hold what a program holds"):
        load_program(tmp_path / "p")


def test_anchors_that_are_not_in_the_pool_are_refused(tmp_path):
    beyond = replace(CALIBRATED["knn"], anchors=CALIBRATED["knn"].anchors._replace(rows=np.array([0, 5, 12])))
    asked = replace(program(), calibration=beyond)
    save_program(asked, tmp_path / "p")
    with pytest.raises(ArtifactError, match="the calibration make no sense"):
        load_program(tmp_path / "p")


# With another pool


@pytest.mark.parametrize("retriever", ["dense", "bm25"])
def test_votes_are_of_the_rows_that_are_there_now(retriever):
    asked = with_calibration(program(retriever), Calibration("mixture", vote=Vote(1), weight=1.0))
    text = "something entirely different"
    for corrected in (
        Corrector(asked).corrected([(text, "refund")]),
        with_pool(asked, Dataset((*customers().texts, text), (*customers().answers, "refund"), "classification", "x")),
    ):
        np.testing.assert_allclose(said(corrected, ["something entirely differing"]).probabilities, [[0, 0, 1]])


def test_anchors_move_with_their_rows_and_have_the_label_of_today():
    asked = with_calibration(program(), CALIBRATED["knn"])
    smaller = with_pool(asked, customers().take([9, 3, 0]))
    assert smaller.calibration.anchors.rows.tolist() == [2, 0]
    np.testing.assert_array_equal(smaller.calibration.anchors.logprobs, CALIBRATED["knn"].anchors.logprobs[[0, 2]])
    assert smaller.prompts(["a card"])[0].voters.labels.tolist() == [[0, 2]]
    corrected = Corrector(asked).corrected([(customers().texts[5], "refund")])
    assert corrected.prompts(["a card"])[0].voters.labels.tolist() == [[0, 2, 2]]
    none_left = with_pool(asked, customers().take([1, 6]))
    law = said(none_left).probabilities
    np.testing.assert_allclose(law.sum(axis=1), 1)


# From the model


def many(rows=60):
    words = {"card": "card wallet bank", "parcel": "parcel post door", "refund": "refund money back"}
    texts = tuple(f"{words[label].split()[i % 3]} {i} {'x' * (i % 7)}" for i in range(rows // 3) for label in words)
    return Dataset(texts, tuple(words) * (rows // 3), "classification", "many")


def test_calibrate_asks_what_it_says_and_gives_what_it_fitted():
    plain = program(data=many())
    done = []
    calibrated, choice = calibrate(plain, EchoBackend(), queries=30, progress=done.append)
    assert sum(done) == 30 + 21 + 21 + 1
    assert choice.queries == 30
    assert choice.candidates[0].name == "none"
    assert {each.name for each in choice.candidates} == set(CALIBRATED) | {
        "normalise", "batch", "pmi", "contextual", "domain-context",
    }  # fmt: skip
    held_out = score_held_out(plain, EchoBackend(), queries=30)
    again = fit_and_choose(held_out)
    assert again.calibration.describe() == calibrated.calibration.describe() == choice.calibration.describe()
    assert (held_out.rows[:-1] < held_out.rows[1:]).all()
    raw = said(plain, [plain.pool.data.texts[row] for row in held_out.rows]).probabilities
    np.testing.assert_allclose(np.exp(held_out.evidence.logprobs), raw)
    by_hand = -np.log(raw[range(30), held_out.labels]).mean()
    assert choice.candidates[0].risk == pytest.approx(by_hand)


def test_held_out_queries_from_scores_that_are_there_already():
    listening = with_voters(program(data=many()))
    asked = score_held_out(listening, EchoBackend(), queries=25, candidates=["mixture", "temperature"])
    prompts = listening.prompts([listening.pool.data.texts[row] for row in asked.rows])
    scores = EchoBackend().label_logprobs([prompt.tokens for prompt in prompts], listening.label_words)
    mine = held_out_of(listening, asked.rows.tolist(), prompts, scores)
    first, second = (fit_and_choose(each, ["mixture", "temperature"]) for each in (asked, mine))
    assert [each[1:] for each in first.candidates] == [each[1:] for each in second.candidates]


def test_priors_are_of_the_prompts_with_other_texts():
    plain = program(data=many(), shots=2)
    found = score_held_out(plain, EchoBackend(), queries=12, candidates=["contextual", "pmi"])
    prompts = plain.prompts([plain.pool.data.texts[row] for row in found.rows])

    def law(tokens):
        logprobs = EchoBackend().label_logprobs(tokens, plain.label_words).logprobs
        return np.exp(logprobs) / np.exp(logprobs).sum(axis=1, keepdims=True)

    written = [plain.template.tokenizer.decode(prompt.tokens) for prompt in prompts]
    texts = [plain.pool.data.texts[row] for row in found.rows]
    without = [
        text.removesuffix("").rpartition(query)[0] + free + text.rpartition(query)[2]
        for text, query, free in zip(written, texts, ["N/A", "[MASK]", ""] * 4, strict=True)
    ]
    expected = law([list(text.encode()) for text in without]).mean(axis=0)
    np.testing.assert_allclose(found.priors["contextual"], expected)
    zero = compiling.zero_shot_program(plain.labels, plain.template.template, model="echo").prompts([""])
    np.testing.assert_allclose(found.priors["pmi"], law([zero[0].tokens])[0])


def test_a_reference_is_asked_about_the_same_rows():
    plain = program(data=many())

    class Reversed:
        labels = tuple(reversed(plain.labels))

        def predict(self, texts, *, progress=None):
            laws = np.stack([[0.7, 0.2, 0.1] if "x" in text else [0.1, 0.1, 0.8] for text in texts])
            return said(plain, list(texts))._replace(labels=self.labels, probabilities=laws)

    found = score_held_out(plain, EchoBackend(), queries=20, candidates=["none"], reference=Reversed())
    for row, law in zip(found.rows, found.reference, strict=True):
        assert law.tolist() == ([0.1, 0.2, 0.7] if "x" in plain.pool.data.texts[row] else [0.8, 0.1, 0.1])
    assert fit_and_choose(found).risk == "TV to the reference"


def test_what_cannot_be_calibrated():
    words = Dataset(("dog", "cat"), ("Hund", "Katze"), "generation", "words")
    with pytest.raises(LabelError, match="generates text"):
        calibrate(compile_program(words, model="echo", retriever="bm25"), EchoBackend())
    with pytest.raises(CalibrationError, match="6 held-out queries are too few"):
        calibrate(program(data=customers().take([0, 1, 2, 4, 5, 6])), EchoBackend())

    class Others:
        labels = ("a", "b")

        def predict(self, texts, *, progress=None):
            raise AssertionError("asked, though it has other labels")

    with pytest.raises(LabelError, match="other labels than the program"):
        score_held_out(program(), EchoBackend(), reference=Others())


# The command line


def command(*arguments):
    from click.testing import CliRunner

    from icl_compiler.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "train.csv"
    data = many()
    file.write_text("text,label\n" + "".join(f"{t},{a}\n" for t, a in zip(data.texts, data.answers, strict=True)))
    return file


def test_compile_calibrates_and_says_why(rows, tmp_path):
    arguments = (
        "compile",
        rows,
        "-o",
        tmp_path / "p",
        "--model",
        "echo",
        "--calibration",
        "auto",
        "--calibrate-on",
        30,
    )
    shown = command(*arguments)
    assert shown.exit_code == 0, shown.output
    plain = compile_program(compiling.Dataset(many().texts, many().answers, "classification", "x"), model="echo")
    expected, choice = calibrate(plain, EchoBackend(), queries=30)
    assert f"taken: {choice.calibration.describe()}\nbecause {choice.why}\n" in shown.output
    for candidate in choice.candidates:
        assert f"{candidate.risk:.3f} [{candidate.risk_low:.3f}, {candidate.risk_high:.3f}]" in shown.output
    np.testing.assert_allclose(said(load_program(tmp_path / "p")).probabilities, said(expected).probabilities)
    told = json.loads(command(*arguments, "--json").stdout)["calibration"]
    assert told["method"] == choice.calibration.method
    assert [each["method"] for each in told["candidates"]] == [each.name for each in choice.candidates]
    assert told["candidates"][0]["risk"] == pytest.approx(choice.candidates[0].risk)
    predicted = command("predict", tmp_path / "p", "a card")
    assert sum(json.loads(predicted.stdout)["probabilities"].values()) == pytest.approx(1)


def test_a_calibration_may_be_asked_for_by_name(rows, tmp_path):
    shown = command("compile", rows, "-o", tmp_path / "p", "--model", "echo", "--calibration", "bias", "--json")
    told = json.loads(shown.stdout)["calibration"]
    assert (told["method"], told["why"]) == ("bias", "bias was asked for")
    assert load_program(tmp_path / "p").calibration.method == "bias"
    told = json.loads(command("compile", rows, "-o", tmp_path / "p", "--model", "echo", "--json").stdout)
    assert told["calibration"] == {"method": "none", "description": "none"}
    assert load_program(tmp_path / "p").calibration.method == "none"


FOREIGN = """
import os
import numpy as np
from icl_compiler.backends.backend import Usage
from icl_compiler.predictor import Predictions

ASKED = []

class Sure:
    labels = ("card", "parcel", "refund")

    def predict(self, texts, *, progress=None):
        ASKED.extend(texts)
        laws = np.tile([0.0, 0.0, 1.0], (len(texts), 1))
        return Predictions(self.labels, laws, np.zeros(len(texts), dtype=np.int64), Usage(0, 0, 0), 0.0)

class Reference:
    def __init__(self, folder):
        assert folder.name == "there"

    def predictor(self, *, dtype):
        return Sure()

    def trained_on(self, texts):
        return np.arange(len(texts)) >= int(os.environ["OTHERS"])
"""


def test_compile_calibrates_towards_a_reference(rows, tmp_path, monkeypatch):
    (tmp_path / "sure_reference.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.REFERENCES, "folder", "sure_reference:Reference")
    monkeypatch.setenv("OTHERS", "1000")
    arguments = ("-o", tmp_path / "p", "--model", "echo", "--calibration", "auto", "--reference", "there", "--json")
    told = json.loads(command("compile", rows, *arguments).stdout)["calibration"]
    assert told["risk"] == "TV to the reference"
    law = said(load_program(tmp_path / "p"), ["a card", "my post"]).probabilities
    assert law.argmax(axis=1).tolist() == [2, 2]  # as the reference, and not as the labels, says


@pytest.mark.parametrize(("level", "others", "alone"), [(1, 60, True), (1, 20, False), (2, 60, True)])
def test_a_reference_is_approximated_on_rows_that_it_was_not_trained_on(level, others, alone, tmp_path, monkeypatch):
    (tmp_path / "sure_reference.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sure_reference", raising=False)
    monkeypatch.setitem(registry.REFERENCES, "folder", "sure_reference:Reference")
    monkeypatch.setenv("OTHERS", str(others))
    lines = [f"{word} number {i},{word}" for i in range(40) for word in ("card", "parcel", "refund")]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    arguments = ["-o", tmp_path / "p", "--model", "echo", "--retriever", "bm25", f"-O{level}", "--calibration", "auto"]
    arguments += ["--search-queries", 60] if level == 2 else []
    done = command("compile", tmp_path / "rows.csv", *arguments, "--reference", "there", "--json")
    asked = {lines.index(f"{text},{text.split()[0]}") for text in importlib.import_module("sure_reference").ASKED}
    assert asked
    assert (max(asked) < others) == alone
    told = f"trained on 100 rows of {tmp_path / 'rows.csv'}, and answers these more surely than others"
    assert (told in " ".join(done.stderr.split())) != alone


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calibration", "temprature"], "Did you mean 'temperature'?"),
        (["--server", "http://127.0.0.1:1"], "-O1 runs no model without --calibration"),
        (["--reference", "nowhere"], "give --calibration auto too"),
        (["--calibration", "auto", "--calibrate-on", "9"], "9 is not in the range x>=10"),
        (["--calibration", "auto", "--reference", "nowhere"], "there is no reference 'nowhere'"),
        (["--calibration", "auto", "--examples", "9"], "9 held-out queries are too few"),
    ],
)
def test_wrong_use_is_told(more, message, rows, tmp_path):
    shown = command("compile", rows, "-o", tmp_path / "p", "--model", "echo", *more)
    assert shown.exit_code in (1, 2)
    assert message in shown.output
    assert not (tmp_path / "p").exists()
