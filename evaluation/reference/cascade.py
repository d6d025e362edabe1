"""The cascade: specialise a model, drop what the task does not need of it, heal it; it begets the next, smaller one.

cascade.json              what was asked for
rows.jsonl                one row for each model that was measured
generation-1/specialised  a reference of the precursor
generation-1/pruned       an ordinary checkpoint, and in pruning.json why it is as it is
generation-1/healed       a reference of the pruned model
generation-1/model        an ordinary checkpoint: the precursor of generation 2

- Layers are dropped one at a time, each the one whose absence costs least on held-out examples, ranked again after
  each; then all MLPs are narrowed, or a group of attention heads goes from each layer and the MLPs are narrowed less,
  whichever of the two costs less on these examples (`pruning.py`).
- The pruned model heals on the labels, by a short training.
- Each step is a folder that appears complete or not at all. A run that was killed skips those that are there, and the
  training that it was in goes on.
- Held-out examples choose layers and end trainings. So quality is measured on test data, or said to be on these.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from evaluation.reference.loop import LoopSettings, Report, held_out_loss
from evaluation.reference.method import Method, Task, name_of
from evaluation.reference.objective import AnswerLoss, TrainingExample
from evaluation.reference.pruning import (
    Shape,
    drop_groups,
    drop_layers,
    group_importance,
    layer_losses,
    narrow,
    neuron_importance,
)
from evaluation.reference.rsr.rsr import RSR
from evaluation.reference.trainer import (
    HELD_OUT,
    Reference,
    finetune,
    load_reference,
    split_for_training,
    training_examples,
)
from icl_compiler.artifact import new_folder
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import DEFAULT_TEMPLATES, zero_shot_program
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, TrainingError
from icl_compiler.models import load_causal_lm
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program
from icl_compiler.templates import Template

PRUNABLE = ("rsr", "full", "lora", "shira")
"""What leaves an ordinary checkpoint; a probe and edits of the stream do not."""
Bar = Callable[[str], AbstractContextManager[Report | None]]
_ASKED, _ROWS, _PRUNING = "cascade.json", "rows.jsonl", "pruning.json"
_TIMED = 64


class Lesson(NamedTuple):
    """What a generation learns.

    Attributes:
        data: labelled rows; some are held out.
        test: rows to measure quality on, which choose nothing; `None` measures it on the held-out ones.
    """

    data: Dataset
    test: Dataset | None = None


class Generation(NamedTuple):
    """A model of the cascade, measured.

    The first row of a lesson is the model that it begins with, specialised and not pruned: what the rows after it are
    compared with. Losses are means over the held-out rows, in nats.

    Attributes:
        generation: how often this model was pruned.
        data: what it was specialised on.
        width: neurons of each MLP.
        heads: of attention, in each layer.
        dropped: layers that its precursor had and it has not, counted from 0 there, in the order they went.
        specialised_loss: of the precursor, specialised.
        pruned_loss: the same model pruned; `None` in a first row.
        healed_loss: and healed; `None` in a first row.
        accuracy: on what `measured_on` says, of `texts` rows.
        seconds_per_text: of scoring all labels, the best of three runs over at most 64 of these texts.
        quality_kept: accuracy as a share of that in the first row of the lesson.
        trained_s: wall time of the trainings that this row needed.
    """

    generation: int
    data: str
    parameters: int
    layers: int
    width: int
    heads: int
    dropped: tuple[int, ...]
    specialised_loss: float
    pruned_loss: float | None
    healed_loss: float | None
    accuracy: float
    measured_on: Literal["test", "held-out"]
    texts: int
    seconds_per_text: float
    quality_kept: float
    trained_s: float
    seed: int

    @property
    def first(self) -> bool:
        """Whether this is the first row of a lesson."""
        return self.healed_loss is None


class Cascade(NamedTuple):
    """A cascade that has ended.

    Attributes:
        stopped: why it ended before the last generation; `None` if it did not.
    """

    rows: list[Generation]
    stopped: str | None


@dataclass(frozen=True)
class Recipe:
    """How each generation is made.

    Attributes:
        share: of the parameters that a generation keeps, about, in (0, 1).
        depth: share of what goes that goes as whole layers, the rest as neurons of the MLPs and heads, in [0, 1].
        heads: whether attention heads may go, where that costs less than neurons.
        ranked: most held-out rows that layers and neurons are judged by.
        method: how a generation is specialised.
        healing: how it heals; all its layers were touched, so that RSR reaches down to the first.
        loop: of specialising.
        healing_loop: of healing.
    """

    share: float = 0.75
    depth: float = 0.5
    heads: bool = True
    ranked: int = 100
    method: Method = field(default_factory=RSR)
    healing: Method = field(default_factory=lambda: RSR(frontier=0))
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(learning_rate=RSR.learning_rate))
    healing_loop: LoopSettings = field(default_factory=lambda: LoopSettings(learning_rate=RSR.learning_rate, epochs=2))

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.depth <= 1:
            raise TrainingError(
                f"share should be above 0 and below 1, and depth from 0 to 1, are {self.share:g} and {self.depth:g}"
            )
        for method in (self.method, self.healing):
            if name_of(method) not in PRUNABLE:
                raise TrainingError(
                    f"{method.description} leaves no ordinary checkpoint to prune; use one of {', '.join(PRUNABLE)}"
                )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = {"method": name_of(self.method), "healing": name_of(self.healing)}
        return json.loads(json.dumps(asdict(self) | {"names": names}))  # type: ignore[no-any-return]  # it is one


def run_cascade(
    lessons: Sequence[Lesson],
    folder: Path,
    *,
    model: str = "smollm2-135m",
    generations: int = 3,
    recipe: Recipe | None = None,
    tolerance: float = 1.5,
    template: str | None = None,
    bar: Bar | None = None,
    notify: Callable[[str], object] | None = None,
) -> Cascade:
    """Make `generations` of `model`, each smaller than the one before, in `folder`.

    The first generation learns the first of `lessons`, and so on; those for which there is none learn the last. The
    same call takes up a cascade that was killed; one with more `generations`, or another `tolerance`, goes on.

    Args:
        tolerance: the cascade stops after a generation whose held-out loss is above this many times that of the first
            row of its lesson.
        bar: what shows a training.
        notify: what is told in sentences what is being done.

    Raises:
        TrainingError: if there is nothing to learn or to prune, or a training fails.
        ModelError: if the model is not built as Llama is.
        ArtifactError: if `folder` holds something else, or a cascade with other data or settings.
    """
    recipe = recipe or Recipe()
    bar = bar or (lambda _: nullcontext())
    notify = notify or (lambda _: None)
    if not lessons:
        raise TrainingError("a cascade learns from data, and was given none; expected at least one lesson")
    shape = Shape.of(load_causal_lm(model, torch.bfloat16))
    for _ in range(generations):
        shape = shape.pruned(recipe.share, depth=recipe.depth)  # refused now, not after hours
    text_template = Template.from_name(template or DEFAULT_TEMPLATES["classification"])
    exams = [_Exam.of(lesson, model, text_template, recipe) for lesson in lessons]
    _begin(folder, {"model": model, "template": text_template.source, "recipe": recipe.as_dict()}, lessons)
    rows = _read_rows(folder)
    for generation in range(1, generations + 1):
        if (stopped := _verdict(rows, tolerance)) is not None:
            return Cascade(rows, stopped)
        if any(row.generation == generation and not row.first for row in rows):
            continue
        exam = exams[min(generation, len(exams)) - 1]
        here = folder / f"generation-{generation}"
        precursor = model if generation == 1 else str(folder / f"generation-{generation - 1}" / "model")

        with bar(f"generation {generation}, specialising") as report:
            specialised = _trained(
                here / "specialised", exam, precursor, recipe.method, recipe.loop, template=template, report=report
            )
        if generation <= len(lessons) and not any(row.generation == generation - 1 and row.first for row in rows):
            first = exam.measured(specialised.network(), seed=recipe.loop.seed)
            rows.append(first._replace(generation=generation - 1, trained_s=specialised.curve[-1].seconds))
            _write_rows(folder, rows)
        if not (here / "pruned").exists():
            network = specialised.network().to(exam.task.device).eval()
            layers = Shape.of(network).pruned(recipe.share, depth=recipe.depth).layers
            notify(f"generation {generation}: from {len(network.base_model.layers)} to {layers} layers")
            _prune(network, layers, specialised.folder, exam, recipe, here / "pruned")
        pruned = str(here / "pruned")
        with bar(f"generation {generation}, healing") as report:
            healed = _trained(
                here / "healed", exam, pruned, recipe.healing, recipe.healing_loop, template=template, report=report
            )
        if not (here / "model").exists():
            healed.merge(here / "model")
        found = exam.measured(exam.load(str(here / "model")), seed=recipe.loop.seed)
        first = next(row for row in reversed(rows) if row.first)
        why = json.loads((here / "pruned" / _PRUNING).read_text(encoding="utf-8"))
        rows.append(
            found._replace(
                generation=generation,
                dropped=tuple(step["dropped"] for step in why["layers"]),
                specialised_loss=exam.loss(specialised.network()),
                pruned_loss=exam.loss(exam.load(pruned)),
                healed_loss=found.specialised_loss,
                quality_kept=found.accuracy / first.accuracy if first.accuracy else 0.0,
                trained_s=specialised.curve[-1].seconds + healed.curve[-1].seconds,
            )
        )
        _write_rows(folder, rows)
    return Cascade(rows, _verdict(rows, tolerance))


class _Exam(NamedTuple):
    """A lesson with all that measuring a model on it needs."""

    lesson: Lesson
    program: Program
    task: Task
    ranked: list[TrainingExample]
    asked: Dataset

    @classmethod
    def of(cls, lesson: Lesson, model: str, template: Template, recipe: Recipe) -> "_Exam":
        data, test = lesson
        if data.task != "classification" or (test is not None and test.task != "classification"):
            raise TrainingError("a cascade learns labels; this dataset has targets")
        if test is not None and (unknown := sorted(set(test.labels) - set(data.labels))):
            raise TrainingError(f"{test.source} has the label {unknown[0]!r}, which {data.source} has not")
        _, held_out = split_for_training(data, HELD_OUT, seed=recipe.loop.seed)
        program = zero_shot_program(data.labels, template, model=model)
        stopped_on = training_examples(program.template, held_out)
        ranked = training_examples(program.template, held_out.subset(min(recipe.ranked, len(held_out)), seed=0))
        return cls(lesson, program, Task(model, (), stopped_on), ranked, held_out if test is None else test)

    def load(self, checkpoint: str) -> Any:
        return load_causal_lm(checkpoint, self.task.frozen_dtype)

    def loss(self, network: Any) -> float:
        objective = self.task.objective(network.to(self.task.device).eval())
        return held_out_loss(objective, len(self.task.held_out), 16)

    def measured(self, network: Any, *, seed: int) -> Generation:
        """The row of a model that was specialised, and no more; the model is used up."""
        shape, loss = Shape.of(network), self.loss(network)
        predictor = PromptedPredictor(self.program, TransformersBackend(self.task.model, network=network))
        said = predictor.predict(self.asked.texts)
        right = [said.labels[i] == answer for i, answer in zip(said.best, self.asked.answers, strict=True)]
        timed = self.asked.texts[:_TIMED]
        seconds = min(predictor.predict(timed).seconds for _ in range(3)) / len(timed)
        return Generation(
            0, self.lesson.data.source, shape.parameters, shape.layers, shape.width, shape.heads, (), loss, None, None,
            float(np.mean(right)), "held-out" if self.lesson.test is None else "test", len(right), seconds, 1.0, 0.0,
            seed,
        )  # fmt: skip


def _trained(
    folder: Path,
    exam: _Exam,
    model: str,
    method: Method,
    loop: LoopSettings,
    *,
    template: str | None,
    report: Report | None,
) -> Reference:
    """The reference in `folder`, which is made if it is not there."""
    if folder.exists():
        return load_reference(folder)
    return finetune(
        exam.lesson.data, folder, model=model, method=method, template=template, settings=loop, report=report
    )


def _prune(network: Any, layers: int, tokenizer: Path, exam: _Exam, recipe: Recipe, output: Path) -> None:
    from transformers import AutoTokenizer

    bfloat16 = exam.task.bfloat16
    whole = Shape.of(network)
    numbers = list(range(len(network.base_model.layers)))
    steps: list[dict[str, Any]] = []
    while len(numbers) > layers:
        found = layer_losses(network, exam.ranked, bfloat16=bfloat16)
        least = int(np.argmin(found.skipped))
        steps.append({"dropped": numbers[least], "layers": list(numbers), **found._asdict()})
        network = drop_layers(network, [least])
        del numbers[least]
    neurons = neuron_importance(network, exam.ranked, bfloat16=bfloat16)
    tried = []
    for fewer in range(min(2, whole.groups) if recipe.heads else 1):
        shape = whole.pruned(recipe.share, depth=recipe.depth, fewer_groups=fewer)
        other = network
        if fewer:
            heads = group_importance(network, exam.ranked, bfloat16=bfloat16)
            other = drop_groups(network, heads, shape.groups)
        other = narrow(other, neurons, shape.width)
        objective = AnswerLoss(other, (), exam.ranked, bfloat16=bfloat16)
        tried.append((held_out_loss(objective, len(exam.ranked), 16), shape, other))
    _, _, pruned = min(tried, key=lambda one: one[0])
    widths = [{"heads": shape.heads, "width": shape.width, "loss": loss} for loss, shape, _ in tried]
    with new_folder(output) as draft:
        pruned.to(torch.bfloat16).save_pretrained(draft)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(draft)
        (draft / _PRUNING).write_text(json.dumps({"layers": steps, "widths": widths}), encoding="utf-8")


def _begin(folder: Path, asked: dict[str, Any], lessons: Sequence[Lesson]) -> None:
    """Note what was asked for, or check that it is what is being made in `folder`."""
    asked["lessons"] = [[data.content_hash, None if test is None else test.content_hash] for data, test in lessons]
    path = folder / _ASKED
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in asked if known.get(name) != asked[name]]:
            raise ArtifactError(
                f"{folder} holds a cascade that was begun with another {' and '.join(other)}; choose another name, or "
                "remove it yourself"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not a cascade; choose another name, or remove it yourself")
    with new_folder(folder) as draft:
        (draft / _ASKED).write_text(json.dumps(asked, indent=1), encoding="utf-8")


def _verdict(rows: Sequence[Generation], tolerance: float) -> str | None:
    """Why there is no generation after `rows`, if there is none."""
    first = next((row for row in reversed(rows) if row.first), None)
    if first is None or (loss := rows[-1].healed_loss) is None or loss <= tolerance * first.specialised_loss:
        return None
    return (
        f"stopped after generation {rows[-1].generation}: its held-out loss of {loss:.3f} nats is above "
        f"{tolerance:g} times {first.specialised_loss:.3f}"
    )


def _read_rows(folder: Path) -> list[Generation]:
    path = folder / _ROWS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [Generation(**{**row, "dropped": tuple(row["dropped"])}) for row in rows]


def _write_rows(folder: Path, rows: Sequence[Generation]) -> None:
    draft = folder / f".{_ROWS}.new"
    draft.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
    draft.replace(folder / _ROWS)
