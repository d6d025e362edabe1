"""Calibrated programs where their answers are read: the endpoint, and the rows of an evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_vllm import logprob
from hashed_words import HashedWords
from serving_toys import BYTES, fake_vllm, served, told
from toys import TopEcho, customers

from evaluation.evaluate import Answers, evaluate
from evaluation.measurement import measurements
from evaluation.reference.trainer import Reference
from evaluation.sentences import verdict_sentence
from icl_compiler import encoders
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.backend import LabelScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.calibration.law import Anchors, Calibration
from icl_compiler.calibration.votes import Vote
from icl_compiler.compile import compile_program, with_calibration
from icl_compiler.data import Dataset
from icl_compiler.predictor import PromptedPredictor

TEXT = "my money is late"
CALIBRATIONS = [
    Calibration("bias", scale=0.3, offsets=np.array([0.5, -0.5, 2.0])),
    Calibration("mixture", scale=2.0, vote=Vote(3, 10.0, 0.1), weight=0.5),
    Calibration("knn", vote=Vote(1), weight=0.5, anchors=Anchors(np.array([1, 6, 11]), np.log(np.eye(3) * 0.7 + 0.1))),
]


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


class Fake(EchoBackend):
    """The law behind the fake vLLM, asked directly."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        laws = [[float(logprob(tuple(prompt), word, BYTES)) for word in label_words] for prompt in prompts]
        return LabelScores(np.array(laws), Usage(0, 0, 0))


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=lambda each: each.method)
def test_the_endpoint_says_what_the_predictor_says(calibration, tmp_path):
    plain = compile_program(customers(), model="echo", retriever="bm25", shots=3, budget=600)
    save_program(with_calibration(plain, calibration), tmp_path / "p")
    said = PromptedPredictor(load_program(tmp_path / "p"), Fake()).predict([TEXT])
    law = dict(zip(said.labels, said.probabilities[0].tolist(), strict=True))
    assert max(abs(said.probabilities - said.uncalibrated.probabilities)[0]) > 0.05
    with fake_vllm() as engine, served({"p": tmp_path / "p"}, engine.url, tmp_path / "state") as (client, _):
        for top in (None, 1, 2):
            body = {"model": "p", "input": TEXT} | ({"top": top} if top else {})
            [row] = client.post("/v1/classify", json=body).json()["data"]
            likeliest = sorted(law, key=lambda label: -law[label])[:top]
            assert list(told(row)) == likeliest
            assert told(row) == pytest.approx({label: law[label] for label in likeliest}, rel=1e-6)
            assert "at_most" not in row["labels"][0]
        messages = [{"role": "user", "content": TEXT}]
        chat = client.post("/v1/chat/completions", json={"model": "p", "messages": messages}).json()
        assert chat["choices"][0]["message"]["content"] == max(law, key=law.__getitem__)
        explained = client.post("/v1/explain", json={"model": "p", "input": TEXT}).json()
        assert any("probabilities are calibrated" in note for note in explained["notes"])


def evaluated(program, backend, series=()):
    test = Dataset(
        ("where is the card 1", "my parcel is lost 2", "late refund 3") * 5, program.labels * 5, "classification", "t"
    )
    reference = Reference(Path("r"), program.labels, program.template.template, "by hand", "echo", 0, 12, "", ())
    plain = replace(program, calibration=Calibration())
    answers = Answers(reference, PromptedPredictor(plain, EchoBackend()).predict(test.texts), ())
    return test, evaluate(program, backend, answers, test, dataset_name="toy", series=series)


def test_rows_of_a_calibrated_program_stand_beside_those_without():
    class Counting(EchoBackend):
        asked = 0

        def label_logprobs(self, prompts, label_words, *, progress=None):
            self.asked += len(prompts)
            return super().label_logprobs(prompts, label_words, progress=progress)

    plain = compile_program(customers(), model="echo", retriever="bm25", shots=3, budget=10_000)
    backend = Counting()
    test, found = evaluated(with_calibration(plain, CALIBRATIONS[0]), backend, ("random shots", "shuffled labels"))
    assert backend.asked == 3 * len(test)  # program, two baselines, and nothing for the series without calibration
    rows = {row["series"]: row for row in found.rows}
    assert list(rows) == ["program", "uncalibrated", "random shots", "shuffled labels"]
    assert rows["program"]["calibration"] == "bias"
    assert rows["uncalibrated"]["gap"] == 0  # the reference is the program without its calibration
    assert rows["program"]["gap"] > 0.1
    assert rows["program"]["label_mass"] == pytest.approx(1)
    _, raw = evaluated(plain, EchoBackend(), ("random shots", "shuffled labels"))
    for row in raw.rows[1:]:
        assert row["gap"] == rows[row["series"]]["gap"]
    assert raw.rows[0]["calibration"] == "none"
    assert measurements(found.rows)[0].calibration == "bias"
    said = " ".join(verdict_sentence(found.rows))
    assert "The prompt without its calibration is closer to the reference" in said


def test_truncated_engines_give_bounds_of_calibrated_gaps():
    plain = compile_program(customers(), model="echo", retriever="bm25", shots=3, budget=10_000)
    program = with_calibration(plain, CALIBRATIONS[1])
    _, exact = evaluated(program, EchoBackend())
    _, bounded = evaluated(program, TopEcho(1))
    middle, half = bounded.rows[0]["gap"], bounded.rows[0]["gap_truncation"] / 2
    assert middle - half - 1e-9 <= exact.rows[0]["gap"] <= middle + half + 1e-9
