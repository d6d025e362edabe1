"""From a dataset to a reference on disk, and from there to a predictor.

manifest.json        method, base model, data, seed, settings, curve, hashes
template.jinja       the template the model was trained with
model.safetensors ...  an ordinary checkpoint with its tokenizer: `transformers` and vLLM load the folder
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.reference.full import FullFineTuning, TrainingExample, count_tokens
from evaluation.reference.loop import Check, LoopSettings, Report, train
from icl_compiler.artifact import new_folder, read_manifest, require_replaceable, write_manifest
from icl_compiler.compile import DEFAULT_TEMPLATES, load_tokenizer, zero_shot_program
from icl_compiler.data import Dataset
from icl_compiler.errors import ContextLengthError, TrainingError
from icl_compiler.models import load_causal_lm, locate
from icl_compiler.predictor import PromptedPredictor, open_backend
from icl_compiler.templates import EncodedTemplate, Template


@dataclass(frozen=True)
class Reference:
    """A fine-tuned model on disk, described.

    Attributes:
        folder: an ordinary checkpoint.
        labels: in the order of all probabilities.
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

    @property
    def description(self) -> str:
        """In words: `full fine-tuning, seed 0, 1,000 examples`."""
        return f"{self.method}, seed {self.seed}, {self.examples:,} examples"

    def predictor(self, *, dtype: str = "auto") -> PromptedPredictor:
        """The reference as a predictor: its template without shots, before the fine-tuned model."""
        program = zero_shot_program(self.labels, self.template, model=str(self.folder))
        return PromptedPredictor(program, open_backend("transformers", str(self.folder), dtype=dtype))


def finetune(
    data: Dataset,
    folder: Path,
    *,
    model: str = "smollm2-135m",
    template: str | None = None,
    first_layer: int = 0,
    held_out: float = 0.1,
    settings: LoopSettings | None = None,
    report: Report | None = None,
) -> Reference:
    """Fine-tune `model` on `data` and save it as `folder`, with the best held-out loss.

    Args:
        first_layer: the lowest layer that is trained; 0 trains the whole model.
        held_out: share of the rows that is never trained on, for early stopping; at most 200 rows.

    Raises:
        TrainingError: if there is too little data, or the loss is not finite.
        ArtifactError: if `folder` is something else than a reference, or cannot be written.
    """
    settings = settings or LoopSettings()
    if data.task != "classification":
        raise TrainingError("references are trained on labels; this dataset has targets")
    if model == "echo":
        raise TrainingError("the model 'echo' has no weights to train; name a real one with --model")
    require_replaceable(folder, kind="reference")
    rows = min(200, round(len(data) * held_out))
    if rows < 1 or rows >= len(data):
        raise TrainingError(
            f"a held-out share of {held_out:g} leaves {rows} of {len(data)} rows to stop on; expected at least one, "
            "and some to train on"
        )
    trained, stopped_on = data.split(rows, seed=settings.seed)
    _require_labels(data, trained)
    text_template = Template.from_name(template or DEFAULT_TEMPLATES[data.task])
    tokenizer = load_tokenizer(model)
    encoded = EncodedTemplate.build(text_template, tokenizer, data.labels)
    encoded.label_words()
    torch.manual_seed(settings.seed)
    network: Any = load_causal_lm(model, torch.float32)
    training, stopping = _examples(encoded, trained), _examples(encoded, stopped_on)
    _require_fit([*training, *stopping], network.config.get_text_config().max_position_embeddings, model)
    gpu = torch.cuda.is_available()
    network.to("cuda" if gpu else "cpu").train()
    method = FullFineTuning(
        network,
        training,
        stopping,
        first_layer=first_layer,
        bfloat16=gpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    )
    curve = train(method, examples=len(trained), held_out=len(stopped_on), settings=settings, report=report)
    name = "full fine-tuning" if first_layer == 0 else f"fine-tuning from layer {first_layer} on"
    with new_folder(folder) as draft:
        network.to(torch.bfloat16).save_pretrained(draft)
        _save_tokenizer(locate(model), draft)
        (draft / "template.jinja").write_text(text_template.source, encoding="utf-8")
        write_manifest(
            draft,
            {
                "kind": "reference",
                "method": name,
                "base_model": model,
                "labels": list(data.labels),
                "template": text_template.name,
                "settings": {**asdict(settings), "first_layer": first_layer, "held_out": held_out},
                "data": {"rows": len(trained), "held_out_rows": len(stopped_on), "sha256": data.content_hash},
                "curve": [check._asdict() for check in curve],
            },
        )
    return load_reference(folder)


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
    )


def _examples(encoded: EncodedTemplate, data: Dataset) -> list[TrainingExample]:
    pairs = zip(encoded.queries(data.texts), encoded.answers(data.answers), strict=True)
    return [TrainingExample([*encoded.head, *query], answer) for query, answer in pairs]


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
