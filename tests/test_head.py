from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.reference.head import Head, Probe
from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import Task
from evaluation.reference.objective import TrainingExample
from evaluation.reference.trainer import finetune
from icl_compiler.backends.hf_model import FrozenModel
from icl_compiler.backends.hf_states import last_states
from icl_compiler.data import Dataset
from icl_compiler.errors import ContextLengthError, ModelError, TrainingError
from icl_compiler.models import locate

STREAM = np.random.default_rng(0)
PROMPTS = [[3, 4, *STREAM.integers(10, 90, size=STREAM.integers(1, 12)).tolist()] for _ in range(400)]
LOOP = LoopSettings(learning_rate=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@torch.no_grad()
def states_by_hand(model: str, prompts: list[list[int]]) -> np.ndarray:
    """Each prompt alone, with what transformers calls the last hidden state."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return np.stack(
        [network(torch.tensor([p]), output_hidden_states=True).hidden_states[-1][0, -1].numpy() for p in prompts]
    )


def test_features_are_those_of_each_prompt_alone(tiny: str) -> None:
    prompts = [*PROMPTS, PROMPTS[0]]
    states, usage = last_states(FrozenModel(tiny, "float32"), prompts)
    np.testing.assert_allclose(states, states_by_hand(tiny, prompts), atol=1e-4)
    assert usage.forwards > 1
    assert usage.prompt_tokens == sum(map(len, prompts)) > usage.computed_tokens


@pytest.mark.parametrize("labels", [("no", "maybe"), ("no", "maybe", "aye")])
def test_is_the_logistic_regression_that_the_held_out_examples_choose(
    labels: tuple[str, ...], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "bfloat16", False)
    monkeypatch.setattr("icl_compiler.backends.hf_model._choose_dtype", lambda dtype, gpu: torch.float32)
    noise = np.random.default_rng(1).binomial(1, 0.2, size=len(PROMPTS))
    answers = [labels[(prompt[-1] // 30 + i) % len(labels)] for prompt, i in zip(PROMPTS, noise, strict=True)]
    examples = [TrainingExample(prompt, [9]) for prompt in PROMPTS]
    task = Task(tiny, examples[:300], examples[300:], labels, tuple(answers[:300]), tuple(answers[300:]))
    reports: list[tuple[object, ...]] = []
    fitted = Head().fit(task, LOOP, lambda *report: reports.append(report))
    states = states_by_hand(tiny, PROMPTS)
    solvers = [
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=10_000, tol=1e-8)).fit(
            states[:300], answers[:300]
        )
        for C in (1e-4, 1e-3, 1e-2, 1e-1, 1, 10)
    ]
    for part, column in ((slice(300), "train_loss"), (slice(300, None), "held_out_loss")):
        expected = [log_loss(answers[part], s.predict_proba(states[part]), labels=sorted(labels)) for s in solvers]
        np.testing.assert_allclose([getattr(check, column) for check in fitted.curve], expected, rtol=2e-3)
    best = int(np.argmin(expected))
    assert 0 < best < 5, "neither end of the grid, so that the choice is one"
    assert fitted.facts == {"inverse_penalty": [1e-4, 1e-3, 1e-2, 1e-1, 1, 10][best]}
    assert fitted.trained_parameters == solvers[0][1].coef_.size + solvers[0][1].intercept_.size
    assert [report[:2] for report in reports] == [(step, 6) for step in range(1, 7)]
    fitted.save(tmp_path)
    said = np.exp(Probe.load(tmp_path).logprobs(states[300:]))
    order = [list(solvers[best].classes_).index(label) for label in labels]
    np.testing.assert_allclose(said, solvers[best].predict_proba(states[300:])[:, order], atol=1e-3)


@pytest.mark.models
def test_a_saved_probe_predicts_as_when_it_was_chosen(tmp_path: Path) -> None:
    tiny = save_tiny_model(tmp_path / "tiny", vocabulary=49152, scale=0.1)
    AutoTokenizer.from_pretrained(locate("smollm2-135m")).save_pretrained(tiny)
    words = {"colour": ("red", "blue", "green", "black"), "animal": ("dog", "cat", "cow", "fox")}
    answers = tuple(["colour", "animal"][i % 2] for i in range(140))
    texts = tuple(f"{i} {words[answer][i // 2 % 4]}" for i, answer in enumerate(answers))
    data = Dataset(texts, answers, "classification", "words")
    reference = finetune(data, tmp_path / "head", model=str(tiny), method=Head())
    assert reference.method == "linear probe"
    _, held_out = data.split(14, seed=0)
    said = reference.predictor().predict(held_out.texts)
    np.testing.assert_allclose(said.probabilities.sum(axis=1), 1, atol=1e-12)
    right = [said.labels.index(answer) for answer in held_out.answers]
    loss = -np.log(said.probabilities[np.arange(14), right]).mean()
    assert loss == pytest.approx(min(check.held_out_loss for check in reference.curve), rel=1e-3)
    assert loss < 0.4 < np.log(2)
    with pytest.raises(ContextLengthError, match="256 tokens"):
        reference.predictor().predict(["dog " * 300])


def test_nothing_to_tell_apart_and_nothing_to_load(tiny: str, tmp_path: Path) -> None:
    examples = [TrainingExample(prompt, [9]) for prompt in PROMPTS[:4]]
    with pytest.raises(TrainingError, match="there are 1, 1 of them"):
        Head().fit(Task(tiny, examples[:3], examples[3:], ("a",), ("a",) * 3, ("a",)), LOOP)
    with pytest.raises(TrainingError, match="there are 2, 1 of them"):
        Head().fit(Task(tiny, examples[:3], examples[3:], ("a", "b"), ("a",) * 3, ("b",)), LOOP)
    with pytest.raises(ModelError, match="no fine-tuned model to load"):
        Head.network(tmp_path, {"base_model": tiny})
