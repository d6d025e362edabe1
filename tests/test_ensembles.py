"""Several prompts for a text: dealt out by rank, averaged, counted, and refused where one can be asked."""

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import CountingEcho, TopEcho, customers

from icl_compiler import compile as compiling
from icl_compiler import encoders
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.backend import LabelScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.calibration.calibrating import calibrate, score_held_out
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError, EnsembleError
from icl_compiler.optimise.levels import optimise
from icl_compiler.optimise.racing import race
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.selection import dealt_out


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def program(data=None, **settings):
    wanted = {"model": "echo", "retriever": "bm25", "shots": 2, "budget": 900, "ensembles": 3} | settings
    return compile_program(data or customers(), **wanted)


ASKED = ["my card is gone", "where is the parcel now", customers().texts[0]]


def test_the_nearest_are_dealt_out_by_rank_without_the_query_itself():
    for text, prompts in zip(ASKED, program().prompt_sets(ASKED), strict=True):
        [whole] = program(ensembles=1, shots=6, order="best-first").prompts([text])
        by_rank = [prompt.selection.rows[::-1] for prompt in prompts]  # the best stands last
        assert by_rank == [whole.selection.rows[number::3] for number in range(3)]


def test_the_answer_is_the_mean_law_and_costs_all_prompts():
    several, backend = program(), CountingEcho()
    said = PromptedPredictor(several, backend).predict(ASKED)
    sets = several.prompt_sets(ASKED)
    laws = [
        np.exp(EchoBackend().label_logprobs([prompt.tokens for prompt in prompts], several.label_words).logprobs)
        for prompts in sets
    ]
    assert said.probabilities == pytest.approx(np.array([law.mean(axis=0) for law in laws]))
    assert said.other == pytest.approx([np.mean(1 - law.sum(axis=1)) for law in laws])
    assert said.prompt_tokens.tolist() == [sum(len(prompt.tokens) for prompt in prompts) for prompts in sets]
    assert sum(backend.prompts.values()) == 9
    counted = []
    PromptedPredictor(several, EchoBackend()).predict(ASKED, progress=counted.append)
    assert sum(counted) == 3


def test_bounds_stay_bounds():
    exact = PromptedPredictor(program(), EchoBackend()).predict(ASKED).probabilities
    said = PromptedPredictor(program(), TopEcho(1)).predict(ASKED)
    assert (said.probabilities <= exact + 1e-12).all()
    assert (exact <= said.upper + 1e-12).all()
    assert (said.probabilities < said.upper).any()


def test_each_prompt_has_its_share_of_every_label():
    for prompts in program(per_label=1, shots=3, ensembles=2).prompt_sets(ASKED):
        for prompt in prompts:
            assert {customers().answers[row] for row in prompt.selection.rows} == set(customers().labels)


def test_dealing_by_brute_force():
    rng = np.random.default_rng(0)
    kinds, barred = rng.integers(3, size=(20, 15)), rng.random((20, 15)) < 0.3
    found = dealt_out(kinds, barred, 2)
    for i in range(20):
        turns = dict.fromkeys(range(3), 0)
        for j in range(15):
            expected = -1
            if not barred[i, j]:
                expected = turns[kinds[i, j]] % 2
                turns[kinds[i, j]] += 1
            assert found[i, j] == expected


def test_a_calibration_is_fitted_to_the_mean_law():
    data = Dataset(customers().texts * 3, customers().answers * 3, "classification", "thrice")
    several = program(data)
    asked = score_held_out(several, EchoBackend(), candidates=["temperature", "contextual"])
    said = PromptedPredictor(several, EchoBackend()).predict([data.texts[row] for row in asked.rows])
    assert np.exp(asked.evidence.logprobs) == pytest.approx(said.probabilities)
    calibrated, choice = calibrate(several, EchoBackend(), candidates=["temperature"])
    calibrated = compiling.with_calibration(calibrated, choice.forced("temperature").calibration)
    after = PromptedPredictor(calibrated, EchoBackend()).predict(ASKED)
    powers = PromptedPredictor(several, EchoBackend()).predict(ASKED).probabilities ** calibrated.calibration.scale
    assert after.probabilities == pytest.approx(powers / powers.sum(axis=1, keepdims=True))


def test_it_is_told_and_survives_the_disk(tmp_path):
    several = program()
    save_program(several, tmp_path / "p")
    loaded = load_program(tmp_path / "p")
    assert loaded.prompt_sets(ASKED) == several.prompt_sets(ASKED)
    told = loaded.explain(ASKED[0])
    assert (told.prompts, len(told.shots)) == (3, 6)
    assert told.tokens == sum(len(prompt.tokens) for prompt in several.prompt_sets(ASKED[:1])[0])
    assert told.prompt.count("my card is gone") == 3
    assert told.shots[-1].why.endswith("in prompt 3 of 3")
    assert several.expected.prompt_tokens > 2 * program(ensembles=1).expected.prompt_tokens


def test_it_is_refused_where_one_prompt_can_be_asked():
    with pytest.raises(EnsembleError, match="asks 3 prompts for each text"):
        program().prompts(ASKED)
    for settings in ({"layout": "shared"}, {"shots": 0}):
        with pytest.raises(EnsembleError, match="all 3 prompts of a text would be the same"):
            program(**settings)
    with pytest.raises(DataError, match="ensembles should be >= 1"):
        program(ensembles=0)
    targets = Dataset(("a", "b"), ("a", "b"), "generation", "targets")
    with pytest.raises(EnsembleError, match="only the probabilities of labels"):
        program(targets)


class LastShot(CountingEcho):
    """Repeats the label of the last shot, and is sure of it."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        super().label_logprobs(prompts, label_words)
        said = [bytes(prompt).decode().split("Label: ")[-1].split("\n")[0] for prompt in prompts]
        laws = np.array(
            [[0.9 if bytes(word).decode().strip() == one else 0.05 for word in label_words] for one in said]
        )
        return LabelScores(np.log(laws), Usage(1, 1, 1))


def noisy(rows=160):
    """Of the rows with a word a third has another label than most."""
    rng = np.random.default_rng(0)
    labels = ("card", "parcel")
    right = [labels[i % 2] for i in range(rows)]
    answers = [labels[(i + (rng.random() < 0.33)) % 2] for i in range(rows)]
    texts = tuple(f"{label}ed x{rng.integers(10**6)}" for label in right)
    return Dataset(texts, tuple(answers), "classification", "noisy")


def test_o3_takes_the_average_where_one_prompt_is_too_sure_of_itself():
    base = program(noisy(), ensembles=1, shots=4)
    fixed = frozenset({"retriever", "shots", "order", "per_label", "template", "instruction", "rerank"})
    backend = LastShot()
    found, trace = optimise(base, backend, level=3, fixed=fixed, queries=2000, calibrations=["none"])
    assert (found.settings.ensembles, found.settings.shots) == (4, 1)
    raced = {row["ensembles"]: row for row in trace if row.get("race") == "ensembles"}
    assert set(raced) == {1, 2, 4}
    assert raced[4]["risk"] < raced[2]["risk"] < raced[1]["risk"]
    assert sum(backend.prompts.values()) == trace[0]["prompts_asked"] <= 2000


def test_a_race_pays_for_every_prompt_of_a_query():
    table = np.random.default_rng(0).random((2, 50)) + np.array([[0.0], [0.02]])
    found = race(lambda i, n: table[i, :n], 2, queries=50, budget=100, costs=[1, 4])
    assert found.calls == 5 * found.standings[0].queries == 100
