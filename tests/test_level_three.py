"""-O3: what helps is found and kept, what does not help is not, and all of it is told and survives the disk."""

import json
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import CountingEcho

from icl_compiler import encoders
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.backend import Generation, Generations, LabelScores, SequenceScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program, with_pool
from icl_compiler.corrections import Corrector
from icl_compiler.data import Dataset
from icl_compiler.optimise import judges, levels
from icl_compiler.optimise.level_three import set_apart
from icl_compiler.optimise.levels import optimise
from icl_compiler.optimise.shot_utility import Utilities, fit
from icl_compiler.optimise.trace import table
from icl_compiler.predictor import PromptedPredictor

FIXED = frozenset({"retriever", "shots", "order", "per_label", "template"})
LABELS = ("card", "parcel")
LONG = "z" * 20


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def letters(rows=120, seed=0):
    """Texts with the word of their label; a third of them is long."""
    rng = np.random.default_rng(seed)
    answers = tuple(LABELS[i % 2] for i in range(rows))
    long = rng.random(rows) < 1 / 3
    texts = (f"{a} x{rng.integers(10**6)}{LONG * bool(n)}" for a, n in zip(answers, long, strict=True))
    return Dataset(tuple(texts), answers, "classification", "letters")


def base(**settings):
    wanted = {"retriever": "bm25", "shots": 2, "budget": 400} | settings
    return compile_program(letters(), model="echo", **wanted)


class Reader(CountingEcho):
    """A model that reads its prompt: `said` gives the weight of each label from the text."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        super().label_logprobs(prompts, label_words)
        texts = [bytes(prompt).decode() for prompt in prompts]
        weights = np.array([[1.0 + self.said(text, label) for label in LABELS] for text in texts])
        weights += 0.1 * np.array([[crc32(text[-30:].encode()) % 7, 0] for text in texts])  # the query's own bent
        return LabelScores(np.log(weights / (0.5 + weights.sum(axis=1, keepdims=True))), Usage(1, 1, 1))

    def said(self, text, label):
        return 0


class ListensToLongShots(Reader):
    """Believes shots that are long, and no others."""

    def said(self, text, label):
        shots = text.split("Text: ")[1:-1]
        return 9 * sum(LONG in shot and shot.endswith(f"Label: {label}\n") for shot in shots)


class ReadsWhatItIsTold(Reader):
    """Answers with the word of the text if its instruction holds `telling`, which it might write itself."""

    telling = "expert annotator"

    def said(self, text, label):
        return 20 * (self.telling in text.split("Text: ")[0] and f" {label} " in text.split("Text:")[-1])

    def generate(self, prompts, terminator, *, max_new_tokens, samples=1, temperature=1.0, seed=0, progress=None):
        said = list(b' Look at the "first" {{ word }}.\n')
        assert b"The instruction was:" in bytes(prompts[0])
        return Generations([Generation(said, [0.0] * len(said), True) for _ in prompts], Usage(1, 1, 1))


class WritesWell(ReadsWhatItIsTold):
    telling = 'Look at the "first" {{ word }}. Labels: card, parcel.\n'


def searched(backend, *, log=None, queries=1500, program=None, fixed=FIXED):
    return optimise(program or base(), backend, level=3, fixed=fixed, queries=queries, calibrations=["none"], log=log)


def accuracy(program, backend):
    asked = letters(60, seed=9)
    said = PromptedPredictor(program, backend).predict(asked.texts)
    return np.mean([said.labels[i] == answer for i, answer in zip(said.best, asked.answers, strict=True)])


def test_a_reranker_learns_which_shots_the_model_believes():
    program, trace = searched(ListensToLongShots())
    assert program.reranker is not None
    texts = program.pool.data.texts
    asked = letters(30, seed=5).texts
    for prompt in program.prompts(asked):
        assert all(LONG in texts[row] for row in prompt.selection.rows)
    assert sum(LONG in texts[row] for p in base().prompts(asked) for row in p.selection.rows) < 50
    [learned] = [row for row in trace if "correlation" in row]
    assert learned["correlation"] > 0.8
    assert "bm25 reranked, 2 shots" in table(trace)
    assert trace[0]["prompts_asked"] <= 1500


@pytest.mark.parametrize(("backend", "name"), [(ReadsWhatItIsTold, "expert"), (WritesWell, "written-1")])
def test_an_instruction_that_helps_is_found_or_written(backend, name):
    program, trace = searched(backend())
    assert program.template.template.name == f"classify, instruction {name}"
    assert backend.telling in program.explain("card x1").prompt
    raced = [row["instruction"] for row in trace if row.get("race") == "instruction"]
    assert sorted(raced) == sorted(["", "expert", "continue", "names", "none", "written-1"])
    assert any(f"instruction {name}: " in row.get("note", "") for row in trace)
    assert accuracy(program, backend()) == 1


def test_what_is_no_better_is_not_taken():
    program, trace = searched(Reader())
    assert program.reranker is None
    assert program.settings == base().settings
    assert program.template.template == base().template.template
    assert {"instruction", "reranker"} <= {row.get("race") for row in trace}


def test_a_killed_search_goes_on_and_asks_nothing_twice(tmp_path):
    log = tmp_path / "log.jsonl"
    first, second, whole = ListensToLongShots(dies_after=700), ListensToLongShots(), ListensToLongShots()
    with pytest.raises(KeyboardInterrupt):
        searched(first, log=log)
    again, trace = searched(second, log=log)
    once, expected = searched(whole)
    assert trace == expected
    assert again.reranker.describe() == once.reranker.describe()
    assert first.prompts + second.prompts == whole.prompts
    assert set(whole.prompts.values()) == {1}


def test_the_reranker_survives_the_disk_another_pool_and_corrections(tmp_path):
    program, trace = searched(ListensToLongShots())
    save_program(program, tmp_path / "p", trace=trace)
    loaded = load_program(tmp_path / "p")
    asked = letters(10, seed=3).texts
    expected = [prompt.tokens for prompt in program.prompts(asked)]
    assert [prompt.tokens for prompt in loaded.prompts(asked)] == expected
    assert "put into another order" in " ".join(loaded.explain(asked[0]).notes)
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["reranker"]["weights"]["log_tokens"] > 0
    kept = np.flatnonzero([row % 3 > 0 for row in range(120)])
    fewer = with_pool(loaded, loaded.pool.data.take(kept.tolist()))
    assert fewer.reranker.helpful == pytest.approx(loaded.reranker.helpful[kept])
    assert all(LONG in fewer.pool.data.texts[row] for p in fewer.prompts(asked) for row in p.selection.rows)
    corrected = Corrector(loaded).corrected([("card x1", "parcel")])  # of no use to anybody but whoever asks it again
    assert corrected.prompts(["card x1"])[0].selection.rows[-1] == 120
    assert 120 not in corrected.prompts(["card x2"])[0].selection.rows


def test_the_weights_are_those_of_least_squares_on_differences():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(200, 6, 6))
    weights = np.array([0.5, -1.0, 0.0, 2.0, 0.0, 0.25])
    hardness = rng.normal(size=(200, 1)) * 10
    worth = seen @ weights + hardness + rng.normal(size=(200, 6)) * 0.01
    rows = np.arange(1200).reshape(200, 6)  # no shot twice: nothing to know of rows
    found, correlation = fit(Utilities(rows, seen, worth))
    assert found[:6] == pytest.approx(weights, abs=0.01)
    assert found[6] == 0
    assert correlation > 0.99


def test_a_row_that_helps_whoever_asks_is_known():
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(20)[:8] for _ in range(100)])
    worth = (rows < 5) * 2.0 + rng.normal(size=rows.shape) * 0.1
    found, correlation = fit(Utilities(rows, rng.normal(size=(*rows.shape, 6)), worth))
    assert found[6] > 0.5
    assert correlation > 0.9


def test_half_of_the_time_is_left_for_what_comes_after_level_2(monkeypatch):
    backend = ListensToLongShots()
    clock = SimpleNamespace(monotonic=lambda: float(sum(backend.prompts.values())))  # a second a prompt
    for module in (judges, levels):
        monkeypatch.setattr(module, "time", clock)
    _, trace = optimise(base(), backend, level=3, queries=10**5, time_limit_s=1200.0, calibrations=["none"])
    last_of_2 = max(i for i, row in enumerate(trace) if row.get("race") in ("shots", "order, labels and template"))
    assert trace[0]["time_was_up"]
    assert any(row.get("race") == "instruction" and row["queries"] > 10 for row in trace[last_of_2:])
    assert sum(backend.prompts.values()) < 1300


def test_no_row_is_both_learned_from_and_judged_by():
    judged, learned = set_apart(np.arange(1000), 3000)
    assert len(learned) == 750 // 8
    assert not set(judged.tolist()) & set(learned.tolist())
    assert len(set_apart(np.arange(40), 3000).learned) == 10


class CopiesLongShots(EchoBackend):
    """Believes the target of a long shot, and no other."""

    def sequence_logprobs(self, prompts, continuations, *, progress=None):
        found = []
        for prompt, word in zip(prompts, continuations, strict=True):
            shots = bytes(prompt).decode().split("Input: ")[1:-1]
            helps = any(LONG in shot and shot.endswith(f"Output:{bytes(word).decode()}") for shot in shots)
            bent = 0.1 * (crc32(bytes(prompt)[-30:]) % 7)
            found.append(np.full(len(word), -bent - (1 if helps else 3)))
        return SequenceScores(found, Usage(1, 1, 1))


def test_targets_to_generate_are_reranked_too():
    rows = letters()
    data = Dataset(rows.texts, rows.answers, "generation", "targets")
    start = compile_program(data, model="echo", retriever="bm25", shots=1, budget=400)
    program, trace = searched(CopiesLongShots(), program=start)
    assert program.reranker is not None
    shown = [
        program.pool.data.texts[row] for p in program.prompts(letters(30, seed=5).texts) for row in p.selection.rows
    ]
    assert all(LONG in text for text in shown)
    assert {row["ensembles"] for row in trace if "race" in row} == {1}


def test_too_few_rows_learn_no_reranker_and_say_so():
    few = compile_program(letters(20), model="echo", retriever="bm25", shots=2, budget=400)
    program, trace = searched(ListensToLongShots(), program=few)
    assert program.reranker is None
    assert any("5 queries are too few to learn a reranker" in row.get("note", "") for row in trace)
    same = base(retriever="uniform")
    _, trace = searched(ListensToLongShots(), program=same)
    assert any("uniform finds the same shots for all texts" in row.get("note", "") for row in trace)
