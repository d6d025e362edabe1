"""A program on the echo backend, whose probabilities are counted by hand."""

import numpy as np
import pytest
from toys import TopEcho, customers

from icl_compiler.backends.backend import Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import LabelError, ModelError, RegistryError
from icl_compiler.predictor import Predictions, Predictor, PromptedPredictor, open_backend


def echo_of(data, **settings):
    settings = {"retriever": "uniform", "budget": 10_000, **settings}
    return PromptedPredictor(compile_program(data, model="echo", **settings), EchoBackend())


def test_probabilities_are_counted_in_the_prompt():
    predictor = echo_of(customers(), shots=12)
    assert isinstance(predictor, Predictor)
    done = []
    said = predictor.predict(["where is it", "late"], progress=done.append)
    # All twelve shots stand in both prompts: each label word four times, and once at the end of a message.
    np.testing.assert_allclose(said.probabilities, np.full((2, 3), 6 / 19))
    np.testing.assert_allclose(said.other, 1 / 19)
    assert said.labels == predictor.labels == ("card", "parcel", "refund")
    assert said.prompt_tokens.tolist() == [len(p.tokens) for p in predictor.program.prompts(["where is it", "late"])]
    assert said.usage == Usage(sum(said.prompt_tokens), sum(said.prompt_tokens), 2)
    assert said.seconds > 0
    assert sum(done) == 2


def test_without_shots_every_label_is_equally_likely():
    said = echo_of(customers(), shots=0).predict(["x"])
    np.testing.assert_allclose(said.probabilities, 1 / 4)
    np.testing.assert_allclose(said.other, 1 / 4)


def test_falsy_labels_are_labels():
    labels = ("", "0", "False")
    data = Dataset(tuple(f"text number {i}!" for i in range(9)), labels * 3, "classification", "falsy")
    predictor = echo_of(data, shots=9)
    said = predictor.predict(["no"])
    assert said.labels == labels
    assert [bytes(word).decode() for word in predictor.program.label_words] == [" \n", " 0\n", " False\n"]
    [prompt] = predictor.program.prompts(["no"])
    text = bytes(prompt.tokens).decode()
    counts = [text.count(f"Label:{word}") for word in (" \n", " 0\n", " False\n")]
    assert counts == [3, 3, 3]
    np.testing.assert_allclose(said.probabilities, [[4 / 13] * 3])
    assert said.labels[said.best[0]] == ""


def test_no_texts():
    said = echo_of(customers()).predict([])
    assert said.probabilities.shape == (0, 3)
    assert said.best.shape == said.other.shape == said.prompt_tokens.shape == (0,)


def test_best_and_other():
    law = np.array([[0.2, 0.5], [0.6, 0.4 + 1e-12]])
    said = Predictions(("a", "b"), law, np.array([1, 1]), Usage(2, 2, 2), 0.0)
    assert said.best.tolist() == [1, 0]
    np.testing.assert_allclose(said.other, [0.3, 0], atol=1e-15)
    assert (said.other >= 0).all()


def test_an_engine_that_gives_only_its_likeliest_tokens():
    program = compile_program(customers(), model="echo", retriever="bm25", shots=2, budget=10_000)
    exact = PromptedPredictor(program, EchoBackend()).predict(["where is the card", "the parcel is late"])
    said = PromptedPredictor(program, TopEcho(1)).predict(["where is the card", "the parcel is late"])
    assert exact.upper is None
    assert ((said.probabilities <= exact.probabilities) & (exact.probabilities <= said.upper)).all()
    assert (said.upper == said.probabilities).sum(axis=1).tolist() == [1, 1]
    assert said.best.tolist() == exact.best.tolist()
    np.testing.assert_allclose(said.other, 1 - exact.probabilities.max(axis=1))
    assert (said.other > exact.other).all()


def test_a_program_that_generates_has_no_labels():
    data = Dataset(("a", "b"), ("long answer", "another"), "generation", "pairs")
    with pytest.raises(LabelError, match="this program generates text, it has no labels"):
        echo_of(data).predict(["x"])


def test_open_backend():
    assert isinstance(open_backend("transformers", "echo"), EchoBackend)
    assert isinstance(open_backend("echo", "anything"), EchoBackend)
    with pytest.raises(RegistryError, match=r"unknown backend 'transformer'\. Did you mean 'transformers'"):
        open_backend("transformer", "smollm2-135m")
    with pytest.raises(ModelError, match="there is no model 'smollm2'"):
        open_backend("transformers", "smollm2")
