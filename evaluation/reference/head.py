"""A linear probe: multinomial logistic regression on what the frozen model knows at the end of the prompt.

- The features are the last hidden state, after the final norm, at the last token of the prompt without shots: what the
  model would predict the answer from. Each is standardised by the training examples.
- scikit-learn's logistic regression, once for each strength of the penalty; the held-out log-loss chooses.
- It is no prompted model: it gives label probabilities by itself, and "other" has none.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax

from evaluation.reference.loop import Check, LoopSettings, Report
from evaluation.reference.method import Fitted, Method, Task
from evaluation.reference.trainer import Reference
from icl_compiler.backends.backend import Progress, require_fit
from icl_compiler.backends.hf_model import FrozenModel
from icl_compiler.backends.hf_states import last_states
from icl_compiler.compile import zero_shot_program
from icl_compiler.errors import ModelError, TrainingError
from icl_compiler.predictor import Predictions, Predictor
from icl_compiler.program import Program

_INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FILE = "head.safetensors"


@dataclass(frozen=True)
class Head(Method):
    """softmax(V (h - mean) / scale + b), where h is the frozen model's last hidden state."""

    @property
    def description(self) -> str:
        """In words."""
        return "linear probe"

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Solve for V and b at each strength of the penalty, and keep the best; `loop` has no say in it.

        The curve has one check for each C, the inverse of the penalty on |V|^2 / 2, from 1e-4 to 10.

        Raises:
            TrainingError: if there are fewer than two labels, or one has no example.
        """
        from sklearn.linear_model import LogisticRegression

        if len(task.labels) < 2 or set(task.answers) != set(task.labels):
            raise TrainingError(
                "a linear probe needs two labels or more, with an example of each to train on; "
                f"there are {len(task.labels)}, {len(set(task.answers))} of them with examples"
            )
        started = time.perf_counter()
        model = FrozenModel(task.model, network=task.load(task.frozen_dtype))
        seen, _ = last_states(model, [example.prompt for example in task.train])
        held_out, _ = last_states(model, [example.prompt for example in task.held_out])
        right = [task.labels.index(answer) for answer in task.answers]
        held_out_right = [task.labels.index(answer) for answer in task.held_out_answers]
        mean, scale = seen.mean(axis=0), seen.std(axis=0)
        scale[scale == 0] = 1
        solver = LogisticRegression(max_iter=1000, warm_start=True)
        curve: list[Check] = []
        probes: list[Probe] = []
        for step, strength in enumerate(_INVERSE_PENALTIES, start=1):
            solver.set_params(C=strength).fit((seen - mean) / scale, right)
            weight, bias = solver.coef_, solver.intercept_
            if len(task.labels) == 2:
                weight, bias = np.vstack([0 * weight, weight]), np.append(0, bias)
            probe = Probe(weight.copy(), bias.copy(), mean, scale)
            probes.append(probe)
            losses = probe.loss(seen, right), probe.loss(held_out, held_out_right)
            curve.append(Check(step, *losses, time.perf_counter() - started))
            if report is not None:
                report(step, len(_INVERSE_PENALTIES), losses[0], min(check.held_out_loss for check in curve))
        best = int(np.argmin([check.held_out_loss for check in curve]))
        facts = {"inverse_penalty": _INVERSE_PENALTIES[best]}
        return Fitted(curve, solver.coef_.size + solver.intercept_.size, probes[best].save, facts)

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """There is none.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"the reference {str(folder)!r} is a linear probe, which leaves the model {manifest['base_model']!r} as it "
            "is: there is no fine-tuned model to load, only a predictor"
        )

    @staticmethod
    def predictor(reference: Reference, dtype: str) -> Predictor:
        """The probe on the base model."""
        program = zero_shot_program(reference.labels, reference.template, model=reference.base_model)
        return HeadPredictor(program, FrozenModel(reference.base_model, dtype), Probe.load(reference.folder))


@dataclass(frozen=True)
class Probe:
    """The trained numbers.

    Attributes:
        weight: V.
        bias: b.
        mean: of each feature over the training examples.
        scale: its standard deviation over them; 1 where that is 0.
    """

    weight: Float[np.ndarray, "labels width"]
    bias: Float[np.ndarray, " labels"]
    mean: Float[np.ndarray, " width"]
    scale: Float[np.ndarray, " width"]

    @classmethod
    def load(cls, folder: Path) -> "Probe":
        """Read what `save` wrote."""
        return cls(**load_file(folder / _FILE))

    def save(self, folder: Path) -> None:
        """Write it to a file of `folder`."""
        save_file(asdict(self), folder / _FILE)

    def logprobs(self, states: Float[np.ndarray, "texts width"]) -> Float[np.ndarray, "texts labels"]:
        """Log-probability of each label, in nats.

        >>> Probe(np.eye(2), np.zeros(2), np.ones(2), np.ones(2)).logprobs(np.array([[1.0, 1.0]])).round(4)
        array([[-0.6931, -0.6931]])
        """
        logits = (states - self.mean) / self.scale @ self.weight.T + self.bias
        result: Float[np.ndarray, "texts labels"] = log_softmax(logits, axis=1)
        return result

    def loss(self, states: Float[np.ndarray, "texts width"], right: Sequence[int]) -> float:
        """Mean negative log-likelihood of the labels at the positions `right`, in nats."""
        return -float(self.logprobs(states)[np.arange(len(right)), right].mean())


@dataclass(frozen=True)
class HeadPredictor:
    """A linear probe at the end of a program's prompts."""

    program: Program
    model: FrozenModel
    probe: Probe

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the program."""
        return self.program.labels

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """The law of the label of every text.

        Raises:
            ContextLengthError: if a prompt does not fit the model's context.
        """
        started = time.perf_counter()
        prompts = [prompt.tokens for prompt in self.program.prompts(texts)]
        require_fit(prompts, 0, model=self.program.settings.model, max_prompt_tokens=self.model.max_tokens)
        states, usage = last_states(self.model, prompts, progress)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        return Predictions(
            self.labels, np.exp(self.probe.logprobs(states)), lengths, usage, time.perf_counter() - started
        )
