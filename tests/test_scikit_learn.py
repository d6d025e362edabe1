"""The classifier in scikit-learn's own hands: its checks, pipelines, searches, copies, and labels of all kinds."""

import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
from hashed_words import HashedWords
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from toys import TopEcho, customers, in_a_new_process, plain_template

from icl_compiler import encoders
from icl_compiler.adapters import scikit_learn
from icl_compiler.adapters.scikit_learn import PromptClassifier
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.calibration.calibrating import calibrate
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError, ICLError, InputError, LabelError
from icl_compiler.optimise.levels import optimise
from icl_compiler.predictor import PromptedPredictor

TEXTS, LABELS = customers().texts, customers().answers
ECHO = {"model": "echo", "retriever": "bm25", "shots": 3, "budget": 2000}
QUERIES = ["where is my parcel", "the card again", "money back please"]


def fitted(y=LABELS, **settings):
    return PromptClassifier(**{**ECHO, **settings}).fit(list(TEXTS), y)


def written(numbers):
    return [" ".join(f"{number:.6g}" for number in row) for row in numbers]


class OfNumbers(PromptClassifier):
    """Each row of numbers is a text of them: scikit-learn's checks know no texts."""

    def fit(self, X, y):
        return super().fit(written(validate_data(self, X)), y)

    def predict_law(self, X):
        check_is_fitted(self)
        return super().predict_law(written(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        tags.classifier_tags.poor_score = True
        return tags


@parametrize_with_checks(
    [PromptClassifier(**ECHO), OfNumbers(model="echo", retriever="uniform", shots=2, budget=10**6)]
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_probabilities_are_those_of_the_program_given_that_the_answer_is_a_label():
    classifier = fitted(random_state=5)
    data = Dataset(tuple(TEXTS), tuple(LABELS), "classification", "X")
    program = compile_program(data, model="echo", retriever="bm25", shots=3, budget=2000, seed=5)
    said = PromptedPredictor(program, EchoBackend()).predict(QUERIES)
    assert classifier.program_.prompts(QUERIES) == program.prompts(QUERIES)
    law = classifier.predict_law(QUERIES)
    assert (law.probabilities == said.probabilities).all()
    assert (law.other > 0.05).all()
    np.testing.assert_allclose(classifier.predict_proba(QUERIES), said.probabilities / (1 - said.other[:, None]))
    assert classifier.predict(QUERIES).tolist() == [said.labels[i] for i in said.best]


@pytest.mark.parametrize(
    ("card", "parcel", "refund"),
    [(0, 1, 2), (9, 10, 100), (-1, 0, 1), ("", "0", "None"), (1.0, 0.0, 2.0), ("no", "yes", "a b")],
)
def test_classes_of_any_kind_come_back_as_they_went_in(card, parcel, refund):
    names = {"card": card, "parcel": parcel, "refund": refund}
    y = [names[label] for label in LABELS]
    classifier = fitted(y)
    assert classifier.classes_.tolist() == sorted(names.values())
    assert classifier.label_words_ == [str(value) for value in sorted(names.values())]
    plain = fitted()
    mass = dict(zip(plain.classes_, plain.predict_proba(QUERIES).T, strict=True))
    same = PromptClassifier(**ECHO, label_words={value: label for label, value in names.items()}).fit(list(TEXTS), y)
    assert same.predict(QUERIES).tolist() == [names[label] for label in plain.predict(QUERIES)]
    for column, value in enumerate(same.classes_.tolist()):
        [label] = [label for label, other in names.items() if other == value]
        np.testing.assert_allclose(same.predict_proba(QUERIES)[:, column], mass[label])


def test_booleans_and_extension_types_are_classes():
    stolen = ["stolen" in text for text in TEXTS]
    classifier = fitted(stolen)
    assert classifier.label_words_ == ["False", "True"]
    assert classifier.predict(QUERIES).dtype == bool
    for kind in ("bool", "category", "boolean"):
        assert (fitted(pd.Series(stolen, dtype=kind)).predict(QUERIES) == classifier.predict(QUERIES)).all()


@pytest.mark.parametrize("given", [tuple, np.array, lambda t: np.array(t, dtype=object), pd.Series, pd.Index])
def test_texts_may_come_in_any_sequence(given):
    classifier = PromptClassifier(**ECHO).fit(given(list(TEXTS)), given(list(LABELS)))
    expected = fitted().predict_proba(QUERIES)
    assert (classifier.predict_proba(given(QUERIES)) == expected).all()
    assert type(classifier.program_.pool.data.texts[0]) is str


@pytest.mark.parametrize(
    ("X", "y", "said"),
    [
        ("one text", ["a"], "a list of texts, is a string"),
        ([], [], "is empty"),
        (["a", None], [0, 1], "row 1 of X is null"),
        (["a", float("nan")], [0, 1], "row 1 of X is a number"),
        (pd.DataFrame({"text": ["a", "b"]}), [0, 1], "has the shape"),
        ({"a": 0, "b": 1}, [0, 1], "is an object"),
        (None, [0, 1], "is null"),
        (["a", "b"], None, "requires y"),
        (["a", "b"], [0, 0], "one class only"),
        (["a", "b"], ["a", None], "sorted|nknown label type|NaN"),
        (["a", "b"], [0.5, 1.5], "nknown label type"),
        (["a", "b"], ["a", np.nan], "NaN|nknown label type"),
    ],
)
def test_what_is_no_text_or_no_class_is_refused(X, y, said):
    with pytest.raises(ValueError, match=said):
        PromptClassifier(**ECHO).fit(X, y)


def test_label_words_that_do_not_serve_are_refused():
    one_word = {"card": "a", "parcel": "a", "refund": "b"}
    cases = (({"card": "a"}, "no word for"), (one_word, "several classes"), (["card"], "a string for each class"))
    for words, said in cases:
        with pytest.raises(InputError, match=said):
            fitted(label_words=words)
    with pytest.raises(LabelError, match="same as"):
        fitted(["a b" if label == "card" else "a_b" for label in LABELS])


def test_settings_are_refused_in_fit():
    for settings in (
        {"shots": -1},
        {"shots": 1.5},
        {"retriever": "bm52"},
        {"budget": 5},
        {"examples": 99},
        {"level": 4},
        {"layout": "shard"},
        {"order": "best"},
        {"cache_block": 0},
        {"block_share": 1.0, "layout": "mixed"},
        {"ensembles": 0},
        {"ensembles": 2, "layout": "shared"},
    ):
        with pytest.raises((ICLError, ValueError, TypeError)):
            fitted(**settings)
    assert issubclass(InputError, DataError)


def test_numbers_of_a_grid_may_be_those_of_numpy(tmp_path):
    classifier = fitted(shots=np.int64(2), random_state=np.int64(3))
    save_program(classifier.program_, tmp_path / "program")
    assert load_program(tmp_path / "program").settings == classifier.program_.settings


def test_the_seed_is_that_of_the_command_line_or_drawn():
    def pool(seed):
        return fitted(random_state=seed, examples=6).program_.pool.data.texts

    assert pool(4) == customers().subset(6, seed=4).texts
    assert pool(0) == customers().subset(6, seed=0).texts
    assert pool(np.random.RandomState(1)) == pool(np.random.RandomState(1))
    assert len({pool(None) for _ in range(5)}) > 1


def test_a_row_that_stands_twice_is_taken_once():
    twice = PromptClassifier(**ECHO).fit([*TEXTS, *TEXTS], [*LABELS, *LABELS])
    assert twice.program_.pool.data.texts == TEXTS


def test_in_pipelines_searches_and_ensembles():
    X, y = np.array(TEXTS, dtype=object), np.array([LABELS.index(label) for label in LABELS])
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = make_pipeline(lower, PromptClassifier(**ECHO))
    upper = [text.upper() for text in QUERIES]
    assert (pipeline.fit(X, y).predict(upper) == PromptClassifier(**ECHO).fit(X, y).predict(QUERIES)).all()
    grid = {"promptclassifier__shots": [0, 3], "promptclassifier__retriever": ["uniform", "bm25"]}
    search = GridSearchCV(pipeline, grid, cv=3, scoring="neg_log_loss", error_score="raise").fit(X, y)
    scores = dict(zip(map(str, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
    alone = cross_val_score(PromptClassifier(**{**ECHO, "shots": 0}), X, y, cv=3, scoring="neg_log_loss")
    no_shots = [score for params, score in scores.items() if "'promptclassifier__shots': 0" in params]
    assert no_shots == pytest.approx([alone.mean()] * 2)
    assert search.best_params_["promptclassifier__shots"] == 3
    pair = VotingClassifier([("prompt", PromptClassifier(**ECHO)), ("most", DummyClassifier())], voting="soft")
    expected = (PromptClassifier(**ECHO).fit(X, y).predict_proba(X) + 1 / 3) / 2
    np.testing.assert_allclose(pair.fit(X, y).predict_proba(X), expected)
    calibrated = CalibratedClassifierCV(PromptClassifier(**ECHO), cv=2).fit(X, y)
    assert calibrated.predict_proba(QUERIES).shape == (3, 3)


def test_a_text_of_the_training_rows_is_no_shot_for_itself():
    X = list(TEXTS)
    whole = fitted(shots=20, order="by-label")
    for text, prompt in zip(X, whole.program_.prompts(X), strict=True):
        assert {TEXTS[row] for row in prompt.selection.rows} == set(TEXTS) - {text}
    # With all other rows for shots, grouped by label, this is what leaving one out by hand gives.
    # For probabilities, cross_val_predict makes numbers of the classes before it fits.
    words = dict(enumerate(whole.classes_.tolist()))
    one_out = PromptClassifier(**{**ECHO, "shots": 20, "order": "by-label", "label_words": words})
    left_out = cross_val_predict(one_out, X, LABELS, cv=KFold(len(X)), method="predict_proba")
    np.testing.assert_allclose(whole.predict_proba(X), left_out)


def test_copies_predict_the_same(tmp_path):
    classifier = fitted(retriever="uniform")
    expected = classifier.predict_proba(QUERIES)
    joblib.dump(classifier, tmp_path / "it.joblib")
    for copy in (pickle.loads(pickle.dumps(classifier)), joblib.load(tmp_path / "it.joblib")):
        assert (copy.predict_proba(QUERIES) == expected).all()
        assert copy.get_params() == classifier.get_params()
    assert b"EchoBackend" not in pickle.dumps(classifier)
    with pytest.raises(NotFittedError):
        clone(classifier).predict(QUERIES)
    code = "import json, sys, joblib; print(json.dumps(joblib.load(sys.argv[1]).predict_proba(sys.argv[2:]).tolist()))"
    assert in_a_new_process(code, tmp_path / "it.joblib", *QUERIES) == expected.tolist()


def test_several_processes_work_on_it():
    X, y = list(TEXTS), list(LABELS)
    alone = cross_val_score(PromptClassifier(**ECHO), X, y, cv=2)
    assert (cross_val_score(PromptClassifier(**ECHO), X, y, cv=2, n_jobs=2) == alone).all()


def test_a_backend_is_opened_once(monkeypatch):
    opened = []

    class Counted(EchoBackend):
        def __init__(self, *arguments):
            opened.append(arguments)

    monkeypatch.setattr(scikit_learn, "open_backend", lambda *arguments, **settings: Counted(*arguments))
    scikit_learn._opened.cache_clear()
    try:
        first, second = fitted(), fitted(shots=1)
        assert opened == []
        for classifier in (first, second, pickle.loads(pickle.dumps(first))):
            classifier.predict(QUERIES)
        cross_val_score(PromptClassifier(**ECHO), list(TEXTS), LABELS, cv=2)
        assert opened == [(None, "echo")]
    finally:
        scikit_learn._opened.cache_clear()


def test_bounds_are_told(monkeypatch):
    classifier = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = classifier.predict_proba(QUERIES)
    monkeypatch.setattr(scikit_learn, "_opened", lambda *_: TopEcho(1))
    with pytest.warns(UserWarning, match="0 of 3 texts"):
        bounded = classifier.predict_proba(QUERIES)
    assert (bounded.max(axis=1) == 1).all()
    assert (bounded.argmax(axis=1) == exact.argmax(axis=1)).all()
    monkeypatch.setattr(scikit_learn, "_opened", lambda *_: Silent())
    with pytest.warns(UserWarning, match="3 of 3 texts"):
        assert (classifier.predict_proba(QUERIES) == 1 / 3).all()


class Silent(EchoBackend):
    def label_logprobs(self, prompts, label_words, *, progress=None):
        exact = super().label_logprobs(prompts, label_words, progress=progress)
        return exact._replace(logprobs=np.full_like(exact.logprobs, -np.inf), upper=np.zeros_like(exact.logprobs))


@pytest.fixture
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def telling(rows=60):
    """Texts of which one word tells the class."""
    rng = np.random.default_rng(0)
    words = ("card", "parcel", "refund")
    return [f"{words[i % 3]} x{rng.integers(10**6)}" for i in range(rows)], [i % 3 for i in range(rows)]


def test_levels_are_those_of_the_command_line(encoder_without_a_model):
    X, y = telling()
    settings = {"model": "echo", "budget": 400, "shots": 4}
    assert [PromptClassifier(**settings, level=level).fit(X, y).program_.settings.retriever for level in (0, 1)] == [
        "uniform",
        "dense",
    ]
    found = PromptClassifier(**settings, level=2, search_queries=300, template="classify").fit(X, y)
    base = compile_program(
        Dataset(tuple(X), tuple(map(str, y)), "classification", "X"), retriever="dense", template="classify", **settings
    )
    fixed = frozenset({"shots", "template"})
    expected = optimise(base, EchoBackend(), fixed=fixed, queries=300)
    assert found.trace_ == expected.trace
    assert found.program_.settings == expected.program.settings
    assert found.program_.calibration.method == expected.program.calibration.method
    assert found.score(X, y) > 0.9
    copy = pickle.loads(pickle.dumps(found))
    assert (copy.predict_proba(X) == found.predict_proba(X)).all()


def test_layouts_and_averages_are_those_of_the_command_line(encoder_without_a_model, tmp_path):
    X, y = telling()
    data = Dataset(tuple(X), tuple(map(str, y)), "classification", "X")
    for settings in (
        {"layout": "shared", "cache_block": 32},
        {"layout": "mixed", "clusters": 3, "block_share": 0.25, "shots": 8},
        {"ensembles": 2, "shots": 3},
    ):
        asked = {"model": "echo", "budget": 700, "retriever": "bm25", **settings}
        found = PromptClassifier(**asked).fit(X, y)
        expected = compile_program(data, **asked)
        assert found.program_.settings == expected.settings
        assert found.program_.prompt_sets(X[:9]) == expected.prompt_sets(X[:9])
        save_program(found.program_, tmp_path / "program")
        again = clone(PromptClassifier.from_program(tmp_path / "program")).fit(X, list(map(str, y)))
        assert again.program_.settings == expected.settings
    search = {"budget": 700, "shots": 4, "retriever": "bm25", "level": 2, "search_queries": 400}
    found = PromptClassifier("echo", **search, search_layouts=True).fit(X, y)
    assert {row["layout"] for row in found.trace_ if row.get("race") == "layouts"} > {"shared", "mixed"}


def test_a_calibration_is_that_of_the_program(encoder_without_a_model, tmp_path):
    X, y = telling()
    settings = {"model": "echo", "budget": 400, "shots": 4, "retriever": "bm25"}
    plain = PromptClassifier(**settings).fit(X, y)
    cooled = PromptClassifier(**settings, calibration="temperature").fit(X, y)
    assert cooled.program_.calibration.method == "temperature"
    # One temperature for all: the odds of two classes are those of the model, to one power.
    odds, power = (np.log(np.divide(*each.predict_proba(X)[:, :2].T)) for each in (plain, cooled))
    np.testing.assert_allclose(power, odds * (power @ odds) / (odds @ odds), atol=1e-9)
    assert cooled.predict_law(X).other.max() < 1e-9
    best = PromptClassifier(**settings, calibration="best").fit(X, y)
    assert best.program_.calibration.method != "none"
    save_program(best.program_, tmp_path / "program")
    loaded = PromptClassifier.from_program(tmp_path / "program", label_words={0: "0", 1: "1", 2: "2"})
    assert (loaded.predict_proba(X) == best.predict_proba(X)).all()
    assert loaded.get_params()["calibration"] == best.program_.calibration.method
    with pytest.raises(InputError, match="Did you mean 'temperature'"):
        PromptClassifier(**settings, calibration="temperatur").fit(X, y)


def test_validation_is_asked_in_place_of_rows(encoder_without_a_model):
    X, y = telling()
    others = [text.replace(" x", " z") for text in X]
    settings = {"model": "echo", "budget": 400, "shots": 4, "retriever": "bm25"}
    data = Dataset(tuple(X), tuple(map(str, y)), "classification", "X")
    dev = Dataset(tuple(others), tuple(map(str, y)), "classification", "validation")
    base = compile_program(data, **settings)
    found = PromptClassifier(**settings, calibration="bias").fit(X, y, validation=(others, y))
    expected = calibrate(base, EchoBackend(), candidates=["bias"], validation=dev)[0]
    said = PromptedPredictor(expected, EchoBackend()).predict(others)
    assert (found.predict_law(others).probabilities == said.probabilities).all()
    mostly = ([text for text in others if "card" in text] * 2 + others[1:3], [0] * 40 + y[1:3])
    assert PromptClassifier(**settings, calibration="bias").fit(X, y, mostly).predict_proba(["what"])[0, 0] > 0.5
    searched = PromptClassifier(**settings, level=2, search_queries=200).fit(X, y, validation=(others, y))
    assert searched.trace_[0]["rows_of"] == "the validation data"
    for wrong, message in (
        (others, "validation should be a pair, texts and their classes, is a list"),
        ((others, [7] * 60), "validation has the class 7, which y has not"),
        ((others, y[:-1]), "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptClassifier(**settings, calibration="bias").fit(X, y, validation=wrong)
    with pytest.raises(InputError, match="level 1 without a calibration holds nothing out"):
        PromptClassifier(**settings).fit(X, y, validation=(others, y))


def test_from_a_folder(tmp_path):
    (tmp_path / "mine.jinja").write_text(plain_template("Mine.\n").source, encoding="utf-8")
    for template in (None, str(tmp_path / "mine.jinja")):
        classifier = fitted(template=template)
        save_program(classifier.program_, tmp_path / "program")
        loaded = PromptClassifier.from_program(tmp_path / "program")
        assert loaded.program_.prompts(QUERIES) == classifier.program_.prompts(QUERIES)
        assert (loaded.predict_proba(QUERIES) == classifier.predict_proba(QUERIES)).all()
        again = clone(loaded).fit(list(TEXTS), LABELS)
        assert again.program_.prompts(QUERIES) == classifier.program_.prompts(QUERIES)


def test_from_a_folder_with_other_classes(tmp_path):
    save_program(fitted([LABELS.index(label) for label in LABELS]).program_, tmp_path / "program")
    assert PromptClassifier.from_program(tmp_path / "program").classes_.tolist() == ["0", "4", "8"]
    loaded = PromptClassifier.from_program(tmp_path / "program", label_words={0: "0", 4: "4", 8: "8"})
    assert loaded.score(QUERIES, loaded.predict(QUERIES)) == 1
    assert loaded.predict(QUERIES).dtype == int
    with pytest.raises(InputError, match="'0', '4', '8'"):
        PromptClassifier.from_program(tmp_path / "program", label_words={0: "0", 1: "1"})
    targets = Dataset(("one", "two"), ("eins", "zwei"), "generation", "pairs")
    save_program(compile_program(targets, model="echo", retriever="uniform"), tmp_path / "targets")
    with pytest.raises(InputError, match="generates text"):
        PromptClassifier.from_program(tmp_path / "targets")
