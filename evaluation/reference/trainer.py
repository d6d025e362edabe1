"""From a dataset to a reference on disk, and from there to a predictor.

manifest.json    method, base model, data, seed, settings, curve, hashes
template.jinja   the template the model was trained with
texts.npz        a number for each text that it was trained on or stopped on, to know them again
...              what the method learned: of full fine-tuning an ordinary checkpoint, of the others what differs from it
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt64

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import Check, LoopSettings, Report
from evaluation.reference.method import Method, Task, method_class, name_of
from evaluation.reference.objective import TrainingExample, count_tokens
from evaluation.reference.rsr.rsr import RSR
from icl_compiler.artifact import new_folder, read_manifest, require_replaceable, write_manifest
from icl_compiler.compile import DEFAULT_TEMPLATES, load_tokenizer
from icl_compiler.data import Dataset, normalise_text
from icl_compiler.errors import ArtifactError, ContextLengthError, LabelError, TrainingError
from icl_compiler.models import locate
from icl_compiler.predictor import Predictor, PromptedPredictor
from icl_compiler.templates import EncodedTemplate, Template

_TEXTS = "texts.npz"
HELD_OUT = 0.1
"""Share of the rows that is held out where nothing else is said."""
_MOST_HELD_OUT = 200  # rows, which are asked again and again


@dataclass(frozen=True)
class Reference:
    """A fine-tuned model on disk, described.

    Attributes:
        folder: where it lies.
        labels: in the order of all probabilities; none if it generates text.
        method: in words.
        method_name: in `method.METHODS`.
        curve: every look at the held-out examples while it was trained.
    """

    folder: Path
    labels: tuple[str, ...]
    template: Template
    method: str
    base_model: str
    seed: int
    examples: int
    data_hash: str
    curve: tuple[Check, ...]
    method_name: str = "full"

    @property
    def description(self) -> str:
        """In words: `full fine-tuning, seed 0, 1,000 examples`."""
        return f"{self.method}, seed {self.seed}, {self.examples:,} examples"

    def predictor(self, *, dtype: str = "auto") -> Predictor:
        """The reference as a predictor of its labels.

        Raises:
            LabelError: if it generates text.
        """
        if not self.labels:
            raise LabelError(
                f"the reference {str(self.folder)!r} generates text, it has no labels; `icl merge` makes a checkpoint "
                "of it, for vLLM"
            )
        predictor: Predictor = self._how.predictor(self, dtype)
        return predictor

    def writer(self, *, dtype: str = "auto") -> PromptedPredictor:
        """The reference as what generates its texts: its template without shots, before the fine-tuned model.

        Raises:
            LabelError: if it has labels.
        """
        if self.labels:
            raise LabelError(f"the reference {str(self.folder)!r} answers with labels, it does not generate text")
        writer: PromptedPredictor = self._how.predictor(self, dtype)
        return writer

    def learned_from(self, texts: Sequence[str]) -> int | None:
        """How many of `texts` stand among the rows it was trained on or stopped on, compared by `normalise_text`.

        `None` for a reference of a version before 0.7, which does not know.
        """
        known = self._texts()
        return None if known is None else int(np.isin(_text_keys(texts), np.concatenate(known)).sum())

    def trained_on(self, texts: Sequence[str]) -> Bool[np.ndarray, " texts"] | None:
        """Which of `texts` it was trained on; those it only stopped on are not among them. `None` as above."""
        known = self._texts()
        return None if known is None else np.isin(_text_keys(texts), known[0])

    def _texts(self) -> tuple[UInt64[np.ndarray, " trained"], UInt64[np.ndarray, " held_out"]] | None:
        file = self.folder / _TEXTS
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as kept:
            return kept["trained"], kept["held_out"]

    def network(self) -> Any:
        """The fine-tuned model, a `transformers.PreTrainedModel` in float32 on the processor."""
        return self._how.network(self.folder, read_manifest(self.folder, kind="reference"))

    def merge(self, output: Path) -> None:
        """Write base model and what was learned in one: a checkpoint with its tokenizer, in bfloat16, for vLLM.

        It appears complete or not at all.

        Raises:
            ArtifactError: if `output` is there already, or cannot be written.
            ModelError: if the method leaves no model (a linear probe).
        """
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ArtifactError(f"{output} exists; choose another name, or remove it yourself")
        with new_folder(output) as draft:
            self._how.merge(self, draft)
            _save_tokenizer(str(self.folder), draft)

    @property
    def _how(self) -> Any:
        return method_class(self.method_name)


def finetune(
    data: Dataset,
    folder: Path,
    *,
    model: str = "smollm2-135m",
    method: Method | None = None,
    template: str | None = None,
    held_out: float = HELD_OUT,
    validation: Dataset | None = None,
    settings: LoopSettings | None = None,
    report: Report | None = None,
    checkpoint_every_s: float = 120.0,
) -> Reference:
    """Fine-tune `model` on `data`, labels or targets, and save it as `folder`, with the best held-out loss.

    A training that is killed is taken up again by the same call: its state lies beside `folder` until it is done.

    Args:
        method: one of `method.METHODS`, with its settings; `RSR` by default.
        held_out: share of the rows that is never trained on, for early stopping; at most 200 rows.
        validation: data of which at most 200 rows are held out, in place of rows of `data`; rows of `data` whose text
            stands there are not trained on.
        settings: of the loop; by default the method's own learning rate, and else what `LoopSettings` says.

    Raises:
        TrainingError: if there is too little data, or the loss is not finite.
        DataError: if the validation data are for another task.
        LabelError: if they have labels that `data` lacks.
        ArtifactError: if `folder` is something else than a reference, or cannot be written.
    """
    method = method or RSR()
    settings = settings or LoopSettings(learning_rate=method.learning_rate)
    labels = data.labels if data.task == "classification" else ()
    if model == "echo":
        raise TrainingError("the model 'echo' has no weights to train; name a real one with --model")
    require_replaceable(folder, kind="reference")
    if validation is None:
        trained, stopped_on = split_for_training(data, held_out, seed=settings.seed)
    else:
        trained, stopped_on = _beside(validation, data, labels, seed=settings.seed)
    if labels:
        _require_labels(data, trained)
    text_template = Template.from_name(template or DEFAULT_TEMPLATES[data.task])
    tokenizer = load_tokenizer(model)
    encoded = EncodedTemplate.build(text_template, tokenizer, labels)
    encoded.label_words()
    examples, held_out_examples = training_examples(encoded, trained), training_examples(encoded, stopped_on)
    asked = {"method": name_of(method), **vars(method), "loop": asdict(settings), "model": model}
    asked |= {"data": data.content_hash, "held_out": held_out, "template": text_template.source}
    if validation is not None:
        asked |= {"held_out": None, "validation": validation.content_hash}
    target = folder.resolve()
    checkpoint = Checkpoint(target.with_name(f".{target.name}.training"), json.dumps(asked), every_s=checkpoint_every_s)
    task = Task(
        model,
        examples,
        held_out_examples,
        labels,
        trained.answers,
        stopped_on.answers,
        encoded,
        checkpoint,
    )
    _require_fit([*task.train, *task.held_out], _context(model), model)
    torch.manual_seed(settings.seed)
    fitted = method.fit(task, settings, report)
    with new_folder(folder) as draft:
        fitted.save(draft)
        _save_tokenizer(locate(model), draft)
        (draft / "template.jinja").write_text(text_template.source, encoding="utf-8")
        with (draft / _TEXTS).open("wb") as file:
            np.savez(file, trained=_text_keys(trained.texts), held_out=_text_keys(stopped_on.texts))
        write_manifest(
            draft,
            {
                "kind": "reference",
                "method": method.description,
                "how": {"name": name_of(method), **vars(method)},
                "base_model": model,
                "labels": list(labels),
                "template": text_template.name,
                "settings": {**asdict(settings), "held_out": held_out if validation is None else validation.source},
                "trained_parameters": fitted.trained_parameters,
                "data": {"rows": len(trained), "held_out_rows": len(stopped_on), "sha256": data.content_hash},
                "curve": [check._asdict() for check in fitted.curve],
                **fitted.facts,
            },
        )
    checkpoint.remove()
    return load_reference(folder)


def split_for_training(data: Dataset, held_out: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """What is trained on, and what is held out: the share `held_out` of the rows, at most 200.

    Raises:
        TrainingError: if one of them is empty.
    """
    rows = min(_MOST_HELD_OUT, round(len(data) * held_out))
    if rows < 1 or rows >= len(data):
        raise TrainingError(
            f"a held-out share of {held_out:g} leaves {rows} of {len(data)} rows to stop on; expected at least one, "
            "and some to train on"
        )
    return data.split(rows, seed=seed)


def _beside(validation: Dataset, data: Dataset, labels: Sequence[str], *, seed: int) -> tuple[Dataset, Dataset]:
    """What of `data` is trained on, and what of `validation` is held out."""
    validation.require_like(data.task, labels, of=data.source)
    trained, _ = data.without_texts(validation.texts)
    if not len(validation):
        raise TrainingError(f"{validation.source} has no rows to stop on; give at least one, or leave it out")
    if not len(trained):
        raise TrainingError(
            f"all {len(data)} rows of {data.source} stand in {validation.source} too, so none is left to train on; "
            "give other rows to stop on"
        )
    few = len(validation) <= _MOST_HELD_OUT
    return trained, validation if few else validation.split(_MOST_HELD_OUT, seed=seed)[1]


def load_reference(folder: Path) -> Reference:
    """Read the description of a reference, after checking every file.

    Raises:
        ArtifactError: if a file was changed, is missing, or is of a newer format.
    """
    manifest = read_manifest(folder, kind="reference")
    return Reference(
        folder,
        tuple(manifest["labels"]),
        Template(manifest["template"], (folder / "template.jinja").read_text(encoding="utf-8")),
        manifest["method"],
        manifest["base_model"],
        manifest["settings"]["seed"],
        manifest["data"]["rows"],
        manifest["data"]["sha256"],
        tuple(Check(**check) for check in manifest["curve"]),
        manifest.get("how", {"name": "full"})["name"],  # until 0.3.0 there was no other
    )


def training_examples(encoded: EncodedTemplate, data: Dataset) -> list[TrainingExample]:
    """Each row of `data` as a prompt without shots, and its answer."""
    pairs = zip(encoded.queries(data.texts), encoded.answers(data.answers), strict=True)
    return [TrainingExample([*encoded.head, *query], answer) for query, answer in pairs]


def _text_keys(texts: Sequence[str]) -> UInt64[np.ndarray, " texts"]:
    """A number of 64 bits for each text, the same for texts that differ in blanks and capitals only."""
    digests = (hashlib.sha256(normalise_text(text).encode("utf-8", "surrogatepass")).digest() for text in texts)
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)


def _require_fit(examples: Sequence[TrainingExample], context: int, model: str) -> None:
    lengths = count_tokens(examples)
    if lengths.max() > context:
        raise ContextLengthError(
            f"{int((lengths > context).sum())} of the texts exceed the context of {model!r}, {context} tokens; "
            f"the longest has {lengths.max()} with its answer. Shorten them, or leave them out"
        )


def _require_labels(data: Dataset, trained: Dataset) -> None:
    missing = sorted(set(data.answers) - set(trained.answers))
    if missing:
        names = ", ".join(map(repr, missing[:5]))
        raise TrainingError(
            f"{len(missing)} labels have no example left to train on ({names}); give more examples of them, "
            "or a smaller held-out share"
        )


def _context(model: str) -> int:
    from transformers import AutoConfig

    context: int = AutoConfig.from_pretrained(locate(model)).get_text_config().max_position_embeddings
    return context


def _save_tokenizer(location: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(location).save_pretrained(folder)


def same_labels(first: Sequence[str], second: Sequence[str]) -> str | None:
    """What distinguishes two label sets, in words; `None` if nothing does.

    >>> same_labels(("a", "b"), ("b", "c"))
    "only the first has 'a'; only the second has 'c'"
    >>> same_labels(("a", "b"), ("b", "a")) is None
    True
    """
    parts = []
    for words, left, right in (("first", first, second), ("second", second, first)):
        if only := sorted(set(left) - set(right)):
            shown = ", ".join(map(repr, only[:5])) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            parts.append(f"only the {words} has {shown}")
    return "; ".join(parts) or None
