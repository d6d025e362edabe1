"""What a method of fine-tuning is: how it trains, what it keeps, how that is read again.

A method is a frozen dataclass of its own settings; `METHODS` in `icl_compiler/registry.py` names them. What all have
in common (splits, template, folder, manifest) stands in `trainer.py`, the loss in `objective.py`, the loop in
`loop.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import torch

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import Check, LoopSettings, Report, train
from evaluation.reference.objective import AnswerLoss, TrainingExample, Watch
from evaluation.reference.tree_attention import attend_by_branches
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import zero_shot_program
from icl_compiler.errors import TrainingError
from icl_compiler.models import load_causal_lm
from icl_compiler.predictor import Predictor, PromptedPredictor
from icl_compiler.registry import METHODS, did_you_mean, resolve
from icl_compiler.templates import EncodedTemplate

if TYPE_CHECKING:
    from evaluation.reference.trainer import Reference


@dataclass(frozen=True)
class Task:
    """What is to be learned, by which model, on which device.

    Attributes:
        model: an embedded model, a folder, or a name on the model hub.
        labels: of a classification, in the order of all probabilities; each example's label stands in `answers`, and
            in `held_out_answers`.
        template: what the prompts were written with.
        checkpoint: where a training that is killed is taken up again.
    """

    model: str
    train: Sequence[TrainingExample]
    held_out: Sequence[TrainingExample]
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    held_out_answers: tuple[str, ...] = ()
    template: EncodedTemplate | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    gpu: bool = field(default_factory=torch.cuda.is_available)

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def bfloat16(self) -> bool:
        """Whether products are computed in bfloat16: where the processor does."""
        return self.gpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    @property
    def frozen_dtype(self) -> torch.dtype:
        """In which weights that do not move are best held."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def load(self, dtype: torch.dtype) -> Any:
        """The base model on the device, ready to train; nothing of it is frozen."""
        network: Any = load_causal_lm(self.model, dtype)
        if not self.gpu:
            attend_by_branches(network)
        return network.to(self.device).train()

    def objective(self, model: Any, *, frontier: int = 0, watch: Watch | None = None) -> AnswerLoss:
        """The loss of `model`, of which nothing below layer `frontier` moves; `watch` as of `AnswerLoss`."""
        return AnswerLoss(model, self.train, self.held_out, frontier=frontier, bfloat16=self.bfloat16, watch=watch)

    def run_loop(self, objective: AnswerLoss, loop: LoopSettings, report: Report | None = None) -> list[Check]:
        """Train all that may move by the common loop, and leave it at its best held-out loss; the curve."""
        return train(
            objective,
            examples=len(self.train),
            held_out=len(self.held_out),
            settings=loop,
            report=report,
            checkpoint=self.checkpoint,
        )


class Fitted(NamedTuple):
    """What training gave.

    Attributes:
        curve: every look at the held-out examples.
        trained_parameters: how many numbers could move.
        save: writes what was learned into an empty folder.
        facts: more for the manifest, if the method has more to say.
    """

    curve: list[Check]
    trained_parameters: int
    save: Callable[[Path], None]
    facts: Mapping[str, Any] = {}


@runtime_checkable
class Method(Protocol):
    """A way to fine-tune; a frozen dataclass of its settings.

    Attributes:
        learning_rate: of AdamW, where the user names none.
    """

    learning_rate: ClassVar[float] = 2e-4

    @property
    def description(self) -> str:
        """In words, as it stands in reports: `full fine-tuning`."""

    def fit(self, task: Task, loop: LoopSettings, report: Report | None = None) -> Fitted:
        """Train the base model of `task`, and end at the best held-out loss."""

    @staticmethod
    def network(folder: Path, manifest: Mapping[str, Any]) -> Any:
        """The model with what was learned, from what `Fitted.save` wrote; weights in float32, on the processor."""

    @classmethod
    def predictor(cls, reference: "Reference", dtype: str) -> Predictor:
        """The reference's template without shots, before the fine-tuned model."""
        program = zero_shot_program(reference.labels, reference.template, model=reference.base_model)
        folder = str(reference.folder)
        return PromptedPredictor(program, TransformersBackend(folder, dtype, network=reference.network()))

    @classmethod
    def merge(cls, reference: "Reference", folder: Path) -> None:
        """Write the fine-tuned model into an empty folder as a checkpoint that vLLM serves, in bfloat16."""
        reference.network().to(torch.bfloat16).save_pretrained(folder)


def name_of(method: Method) -> str:
    """The name of a method in `METHODS`.

    >>> from evaluation.reference.full import Full
    >>> name_of(Full())
    'full'
    """
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    return next(name for name, known in METHODS.items() if known == path)


def method_class(name: str) -> Any:
    """The class of a method, a `Method` (a protocol with values, of which a class cannot be checked to be one).

    Raises:
        RegistryError: if there is no such method.
        MissingDependencyError: if it needs a package that is not installed.
    """
    return resolve("method", METHODS, name, trusted=False)


def make_method(name: str, settings: Mapping[str, str]) -> Method:
    """A method with settings as they are typed: numbers and lists as in JSON, anything else is text.

    >>> make_method("full", {"first_layer": "20"})
    Full(first_layer=20)

    Raises:
        RegistryError: if there is no such method.
        TrainingError: if it has no such setting, or the value is none for it.
    """
    kind = method_class(name)
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in fields(kind)}
    values = {}
    for key, text in settings.items():
        if key not in known:
            has = did_you_mean(key, known) if known else "It has none."
            raise TrainingError(f"the method {name!r} has no setting {key!r}. {has}")
        values[key] = _read(key, text, known[key])
    method: Method = kind(**values)
    return method


def _read(key: str, text: str, kind: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = tuple(value) if isinstance(value, list) else value
    if get_origin(kind) is Literal:
        fits = value in get_args(kind)
    else:
        allowed = [get_origin(part) or part for part in get_args(kind) or (kind,)]
        if float in allowed and type(value) is int:
            value = float(value)
        fits = type(value) in allowed
    if not fits:
        raise TrainingError(f"{key} should be {_words(kind)}, is {text!r}")
    return value


def _words(kind: Any) -> str:
    """A type for people: `int | None` is a whole number or null."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "a list, as [1, 2]"
    return " or ".join(_words(part) for part in get_args(kind)) or names[kind]
