"""Datasets of Hugging Face `datasets`, in and out.

- In: a `datasets.Dataset` is read as its folder on disk is, by the same code: columns are guessed or named, class
  numbers become class names, blank and double rows are dropped and counted.
- Out: the pool of a program, and predictions. Labels are a `ClassLabel` with the program's labels in their order, so
  that column `i` of the probabilities belongs to class number `i`.
- What is written here is read back by `from_datasets`, and by `icl compile` from the folder of `save_to_disk`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icl_compiler.arrow_readers import dataset_table
from icl_compiler.data import Dataset, labelled
from icl_compiler.errors import InputError
from icl_compiler.predictor import Predictions
from icl_compiler.program import Program
from icl_compiler.table import listed

if TYPE_CHECKING:
    import datasets


def from_datasets(
    dataset: "datasets.Dataset",
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    need_answers: bool = True,
    where: Sequence[str] = (),
) -> Dataset:
    """The labelled texts of a `datasets.Dataset`, for `compile_program`; arguments as of `load_dataset`.

    Raises:
        InputError: if it is something else: several splits, or a stream.
        DataError, DataFormatError, ColumnError, LabelError: as `load_dataset`.

    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"text": ["hi", "bye"], "label": [1, 0]})
    >>> from_datasets(rows.cast_column("label", datasets.ClassLabel(names=["part", "greet"]))).answers
    ('greet', 'part')
    """
    import datasets

    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(
            f"expected one split, this holds several: {listed(list(dataset))}; name one, as in data['train']"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            f"expected a datasets.Dataset, found a {type(dataset).__name__}; "
            "datasets.Dataset.from_list(list(...)) makes one of rows, or of a stream's first rows (.take)"
        )
    if not len(dataset):
        raise InputError("the datasets.Dataset holds no rows")
    name = "the datasets.Dataset"
    table = dataset_table(name, dataset, missing="null")
    return labelled(table, name, text_column, label_column, target_column, need_answers, where)


def pool_dataset(program: Program) -> "datasets.Dataset":
    """The rows that shots come from, in their order: `text`, and `label` (a `ClassLabel`) or `target`."""
    import datasets

    data = program.pool.data
    if program.task == "generation":
        return datasets.Dataset.from_dict({"text": data.texts, "target": data.answers})
    columns = {"text": data.texts, "label": [program.labels.index(answer) for answer in data.answers]}
    return datasets.Dataset.from_dict(columns, features=_features(program.labels))


def predictions_dataset(texts: Sequence[str], said: Predictions) -> "datasets.Dataset":
    """What a predictor said of `texts`, a row a text: `text`, `label` (the likeliest), `probabilities`, `other`,
    `prompt_tokens`; and `at_most`, upper bounds, where the probabilities are lower ones.

    Raises:
        InputError: if these are not as many texts as predictions.

    >>> from icl_compiler.backends.backend import Usage
    >>> import numpy as np
    >>> said = Predictions(("no", "yes"), np.array([[0.25, 0.5]]), np.array([7]), Usage(7, 7, 1), 0.1)
    >>> predictions_dataset(["hi"], said)[0]
    {'text': 'hi', 'label': 1, 'probabilities': [0.25, 0.5], 'other': 0.25, 'prompt_tokens': 7}
    """
    import datasets

    if len(texts) != len(said.probabilities):
        raise InputError(f"expected one prediction a text, found {len(texts)} texts and {len(said.probabilities)}")
    law = datasets.List(datasets.Value("float64"), length=len(said.labels))
    features = {"probabilities": law, "other": datasets.Value("float64"), "prompt_tokens": datasets.Value("int64")}
    columns: dict[str, Any] = {
        "text": list(texts),
        "label": said.best.tolist(),
        "probabilities": said.probabilities.tolist(),
        "other": said.other.tolist(),
        "prompt_tokens": said.prompt_tokens.tolist(),
    }
    if said.upper is not None:
        columns["at_most"], features["at_most"] = said.upper.tolist(), law
    return datasets.Dataset.from_dict(columns, features=_features(said.labels, **features))


def _features(labels: Sequence[str], **more: Any) -> Any:
    import datasets

    return datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(labels)), **more}
    )
