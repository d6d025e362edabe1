"""The search: a planted best is found, every variant is told of, and nothing is paid for twice."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import CountingEcho, TopEcho, customers, plain_template

from icl_compiler import encoders
from icl_compiler.backends.backend import Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.calibration.calibrating import held_out_of, with_voters
from icl_compiler.calibration.choosing import fit_and_choose
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError, LabelError
from icl_compiler.optimise.judges import Asker, LabelJudge, TargetJudge
from icl_compiler.optimise.levels import optimise
from icl_compiler.optimise.score_log import ScoreLog
from icl_compiler.optimise.search import Space, search
from icl_compiler.optimise.variants import Variant, Variants
from icl_compiler.predictor import Predictions, PromptedPredictor

SPACE = Space(
    ("uniform", "bm25", "coverage"), (0, 1, 2, 4), ("best-last", "best-first", "random"), (0, 1), ("classify",)
)


def words_with_labels(rows=90):
    """Texts whose one telling word is that of their label; by words the right label is found, by chance it is not."""
    labels = ("card", "parcel", "refund")
    rng = np.random.default_rng(0)
    texts = [f"{labels[i % 3]} x{rng.integers(10**6)}" for i in range(rows)]
    return Dataset(tuple(texts), tuple(labels[i % 3] for i in range(rows)), "classification", "words")


def variants(data=None, **settings):
    wanted = {"retriever": "uniform", "shots": 4, "budget": 400} | settings
    return Variants(compile_program(data or words_with_labels(), model="echo", **wanted))


def judged(made, backend=None, log=None, **settings):
    rows = np.random.default_rng(0).permutation(made.askable(["classify"]))
    asker = Asker(backend or CountingEcho(), ScoreLog(log), **settings)
    return LabelJudge(asker, made.base, rows, calibration="normalise")


def test_the_planted_retriever_wins_with_as_many_shots_as_help():
    made, backend = variants(), CountingEcho()
    found = search(made, judged(made, backend), SPACE, budget=600)
    assert found.variant == Variant("bm25", 4, "best-last", 0, "classify")
    assert sum(backend.prompts.values()) <= 600
    assert set(backend.prompts.values()) == {1}


def test_the_trace_tells_of_every_variant_in_every_race():
    made = variants()
    trace = search(made, judged(made), SPACE, budget=600).trace
    assert list(dict.fromkeys(row["race"] for row in trace)) == [
        "retriever",
        "shots",
        "order, labels and template",
        "final",
    ]
    first = [row for row in trace if row["race"] == "retriever"]
    assert [row["retriever"] for row in first] == ["uniform", "bm25", "coverage"]
    assert {row["shots"] for row in trace if row["race"] == "shots"} == {0, 1, 2, 4}
    for name in {row["race"] for row in trace}:
        ran = [row for row in trace if row["race"] == name]
        assert [row["candidate"] for row in ran] == list(range(len(ran)))
        [winner] = [row for row in ran if row["round"] is None]
        assert winner["why"] == "the winner"
        assert all(row["risk"] >= winner["risk"] for row in ran if row["queries"] == winner["queries"])
        assert all(row["low"] <= row["risk"] <= row["high"] for row in ran if row["queries"] > 1)
    json.dumps(trace, allow_nan=False)


def test_the_risk_told_is_that_of_the_variant():
    made = variants()
    judge = judged(made)
    trace = search(made, judge, SPACE, budget=10**6).trace
    for row in trace:
        variant = Variant(*(row[name] for name in Variant._fields))
        program = made.program(variant)
        texts = [program.pool.data.texts[i] for i in judge.rows[: row["queries"]]]
        laws = np.exp(EchoBackend().label_logprobs([p.tokens for p in program.prompts(texts)], program.label_words)[0])
        right = [program.labels.index(program.pool.data.answers[i]) for i in judge.rows[: row["queries"]]]
        expected = -np.log(laws[range(len(right)), right] / laws.sum(axis=1)).mean()
        assert row["risk"] == pytest.approx(expected, abs=1e-4)


def test_a_variant_is_the_program_that_would_have_been_compiled(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    made = variants(customers(), budget=2000)
    for variant in (
        Variant("dense", 3, "best-last", 0, "classify"),
        Variant("votek", 2, "best-first", 0, "classify"),
        Variant("bm25", 1, "best-last", 0, "generate"),
    ):
        own = compile_program(
            customers(), model="echo", retriever=variant.retriever, shots=variant.shots, budget=2000,
            template=variant.template,
        )  # fmt: skip
        built = made.program(variant)
        assert built.settings == replace(own.settings, order=variant.order)
        asked = ["my card is late", customers().texts[0]]
        assert [p.tokens for p in built.prompts(asked)] == [p.tokens for p in own.prompts(asked)]


def test_without_shots_there_is_one_variant_a_template():
    made = variants()
    trace = search(made, judged(made), SPACE._replace(shots=(0,)), budget=600).trace
    assert [row["race"] for row in trace if row["shots"] == 0].count("shots") == 1
    assert variants(shots=0).own == Variant("uniform", 0, "best-first", 0, "classify")
    assert variants(shots=0, retriever="bm25").own == variants(shots=0).own


def test_what_cannot_be_made_is_told_and_left_out(tmp_path):
    made = variants()
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text(plain_template(answer=" same").source, encoding="utf-8")
    found = search(made, judged(made), SPACE._replace(templates=("classify", str(wrong))), budget=600)
    [row] = [row for row in found.trace if row["template"] == str(wrong)]
    assert (row["queries"], row["why"][:13]) == (0, "not tried: th")
    assert found.variant.template == "classify"


def test_a_killed_search_goes_on_and_asks_nothing_twice(tmp_path):
    log = tmp_path / "log.jsonl"
    made = variants()
    first, second, whole = CountingEcho(dies_after=100), CountingEcho(), CountingEcho()
    with pytest.raises(KeyboardInterrupt):
        search(made, judged(made, first, log), SPACE, budget=600)
    again = search(made, judged(made, second, log), SPACE, budget=600)
    assert again == search(made, judged(made, whole), SPACE, budget=600)
    assert first.prompts + second.prompts == whole.prompts
    assert set(whole.prompts.values()) == {1}
    assert sum(first.prompts.values()) >= 100


def test_when_the_time_is_up_the_best_so_far_is_taken():
    made, backend = variants(), CountingEcho()
    over = search(made, judged(made, backend, deadline=time.monotonic() - 1), SPACE, budget=600)
    assert over.variant == made.own
    assert not backend.prompts
    assert {row["why"] for row in over.trace} == {"the winner", "not tried: the time was up"}


def test_rows_too_long_to_be_asked_are_no_queries():
    long = Dataset(
        (*words_with_labels().texts, "y" * 350), (*words_with_labels().answers, "card"), "classification", "w"
    )
    made = variants(long)
    assert made.askable(["classify"]).tolist() == list(range(90))
    search(made, judged(made), SPACE, budget=200)


def test_as_many_shots_are_tried_as_the_budget_holds():
    made = variants()
    packed = made.program(Variant("uniform", 99, "best-first", 0, "classify")).prompts(["card x123456"])
    assert made.most_shots() == pytest.approx(len(packed[0].selection.rows), abs=1)
    assert variants(words_with_labels(3), budget=10**6).most_shots() == 3


def pairs():
    """The target is the text again, of one of a few words."""
    words = [f"word{i % 7} {i}" for i in range(60)]
    return Dataset(tuple(words), tuple(words), "generation", "pairs")


@pytest.fixture
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def test_a_variant_is_judged_by_what_it_adds_to_the_neighbours(encoder_without_a_model):
    made = variants()
    rows = np.random.default_rng(0).permutation(90)
    judge = LabelJudge(Asker(EchoBackend(), ScoreLog(None)), made.base, rows)
    variant = Variant("bm25", 2, "best-last", 0, "classify")
    program = made.program(variant)
    # The same queries by the other way to the same numbers: the calibration's own way of asking.
    asked = with_voters(program)
    prompts = asked.prompts([program.pool.data.texts[row] for row in rows[:50]])
    scores = EchoBackend().label_logprobs([prompt.tokens for prompt in prompts], program.label_words)
    expected = fit_and_choose(held_out_of(asked, rows[:50].tolist(), prompts, scores), ["mixture"]).candidates[-1]
    assert expected.name == "mixture"
    assert judge.losses(variant, program, 50).mean() == pytest.approx(expected.risk)
    few = np.exp(scores.logprobs[:5])
    right = [program.labels.index(program.pool.data.answers[row]) for row in rows[:5]]
    assert judge.losses(variant, program, 5) == pytest.approx(-np.log(few[range(5), right] / few.sum(axis=1)))


def test_towards_a_reference_a_variant_is_judged_by_its_total_variation(encoder_without_a_model):
    made = variants()
    rows = np.random.default_rng(0).permutation(90)[:40]

    class Reference:
        labels = made.base.labels

        def predict(self, texts, *, progress=None):
            laws = np.stack([np.where([label in text for label in self.labels], 0.9, 0.05) for text in texts])
            return Predictions(self.labels, laws, np.zeros(len(texts), dtype=np.int64), Usage(0, 0, 0), 0.0)

    reference = Reference()
    judge = LabelJudge(Asker(EchoBackend(), ScoreLog(None)), made.base, rows, reference=reference)
    variant = Variant("bm25", 2, "best-last", 0, "classify")
    held_out = judge.held_out(variant, made.program(variant), 40)
    assert judge.risk == "TV to the reference"
    expected = fit_and_choose(held_out, ["mixture"]).candidates[-1].risk
    assert judge.losses(variant, made.program(variant), 40).mean() == pytest.approx(expected)


class Blind(EchoBackend):
    """A model that says the same of every prompt."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        scores = super().label_logprobs(prompts, label_words)
        return scores._replace(logprobs=np.full_like(scores.logprobs, np.log(0.2)))


def test_with_a_model_that_knows_nothing_the_program_is_the_vote(encoder_without_a_model):
    made = variants()
    program, trace = optimise(made.base, Blind(), queries=300)
    said = PromptedPredictor(program, Blind()).predict(["card x1", "parcel x2", "refund x3"])
    assert [said.labels[i] for i in said.best] == ["card", "parcel", "refund"]
    assert said.probabilities.max(axis=1).min() > 0.9
    assert program.calibration.method in ("mixture", "product")
    [chosen] = [row for row in trace if row.get("why", "").startswith("chosen: ")]
    assert chosen["calibration"] == program.calibration.method
    assert trace[0]["prompts_asked"] <= 300


class Reference:
    """Says the first label of every text."""

    labels = ("card", "parcel", "refund")

    def predict(self, texts, *, progress=None):
        nothing = np.zeros(len(texts), dtype=np.int64)
        return Predictions(self.labels, np.tile([1.0, 0, 0], (len(texts), 1)), nothing, Usage(0, 0, 0), 0.0)


def test_a_reference_is_approximated_in_place_of_the_labels(encoder_without_a_model):
    made = variants()
    program, trace = optimise(made.base, EchoBackend(), queries=300, reference=Reference())
    assert trace[0]["risk"] == "TV to the reference"
    said = PromptedPredictor(program, EchoBackend()).predict(["parcel x2", "refund x3"])
    assert said.probabilities[:, 0].min() > 0.6
    with pytest.raises(LabelError, match="other labels than the program"):
        optimise(variants(customers(), budget=900).base, EchoBackend(), reference=Others())


class Others(Reference):
    labels = ("a", "b", "c")


def test_an_engine_that_gives_bounds_is_judged_by_their_middle(encoder_without_a_model, tmp_path):
    log = tmp_path / "log"
    program, trace = optimise(variants().base, TopEcho(1), queries=200, log=log)
    assert "-Infinity" in log.read_text()
    again, same = optimise(variants().base, TopEcho(1), queries=200, log=log)  # bounds of -inf are read back
    assert (again.settings, same) == (program.settings, trace)


def test_one_calibration_can_be_asked_for(encoder_without_a_model):
    program, _ = optimise(variants().base, EchoBackend(), queries=300, calibrations=["temperature"])
    assert program.calibration.method == "temperature"
    program, _ = optimise(variants().base, EchoBackend(), queries=300, calibrations=["none"])
    assert program.calibration.method == "none"


def test_too_few_rows_are_refused_and_few_queries_are_not(encoder_without_a_model):
    with pytest.raises(DataError, match="7 rows of words can be asked within the budget, and a search holds out 8"):
        optimise(variants(words_with_labels(7)).base, EchoBackend())
    program, trace = optimise(variants().base, EchoBackend(), queries=5)
    assert program.calibration.method == "none"
    assert trace[0]["prompts_asked"] <= 5


def test_what_is_named_is_not_searched(encoder_without_a_model):
    names = {"retriever", "shots", "order", "per_label", "template"}
    for free in names:
        _, trace = optimise(variants().base, EchoBackend(), queries=200, fixed=frozenset(names - {free}))
        raced = [row for row in trace if "race" in row]
        assert {name for name in names if len({row[name] for row in raced}) > 1} <= {free, "order", "per_label"}, free
    program, trace = optimise(variants().base, EchoBackend(), queries=200, fixed=frozenset(names))
    assert [row for row in trace if "race" in row] == []
    assert program.settings == variants().base.settings


@pytest.mark.parametrize("metric", ["likelihood", "exact-match"])
def test_targets_are_judged_by_likelihood_or_by_what_is_said(metric, tmp_path):
    made = variants(pairs())
    rows = np.arange(40)
    judge = TargetJudge(Asker(EchoBackend(), ScoreLog(tmp_path / "log")), made.base, rows, metric)
    variant = Variant("bm25", 2, "best-last", 0, "generate")
    program = made.program(variant)
    losses = judge.losses(variant, program, 40)
    prompts = [prompt.tokens for prompt in program.prompts(program.pool.data.texts[:40])]
    targets = program.template.answers(program.pool.data.answers[:40])
    if metric == "likelihood":
        expected = [-x.mean() for x in EchoBackend().sequence_logprobs(prompts, targets).logprobs]
        assert losses == pytest.approx(expected)
    else:
        assert set(losses) <= {0.0, 1.0}
    space = Space(("uniform", "bm25"), (0, 1, 2), ("best-last",), (0,), ("generate",))
    assert search(made, judge, space, budget=400).trace
