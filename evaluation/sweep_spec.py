"""What a sweep is to measure: a YAML file or a mapping, checked in full before anything runs.

- Every list multiplies: datasets x seeds x levels x retrievers x sizes x budgets x shots x calibrations are as many
  prompts.
- What is not named is the level's own, as of `icl compile`; what is named, a search leaves as it is.
- A key or a name that is not known is an error that names the nearest one: a sweep runs for hours, and a setting that
  was silently left out would be noticed at its end.
- A scalar stands for a list of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from icl_compiler.errors import SpecError
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS
from icl_compiler.registry import BACKENDS, CALIBRATIONS, METHODS, RETRIEVERS, did_you_mean

BASELINES = ("random shots", "shuffled labels", "zero shots", "neighbours' vote", "floor")
"""What may be measured beside the prompt; of these, all by default."""
LEVELS = {f"O{number}": number for number in DEFAULT_RETRIEVERS}
"""Levels of `icl compile`, by their names in a sweep."""
Size = int | Literal["all"]
Shots = int | Literal["fit"]
_SPLITS = tuple(f".{ending}" for ending in ("jsonl", "csv", "tsv", "json", "parquet"))


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset: two sources of `load_dataset`, and the name that rows carry."""

    name: str
    train: str
    test: str
    text_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class ReferenceSpec:
    """How references are trained, as of `icl finetune`; or a folder that it wrote.

    Attributes:
        settings: of the method, as they would be typed.
        examples: rows to train on, a nested, label-balanced draw; `None` is all.
        folder: one that is trained already; nothing else is then given.
    """

    method: str = "rsr"
    settings: tuple[tuple[str, str], ...] = ()
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float | None = None
    examples: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class SweepSpec:
    """A sweep, checked.

    Attributes:
        sizes: numbers of examples in the pool; "all" is every row of the training data.
        budgets: context lengths, in tokens, the answer included.
        levels: how hard to look for a good prompt, of `LEVELS`.
        search_queries: most prompts that the search of one cell asks the model; by default the level's own.
        retrievers: by default the level's own, and at a level that searches the one it finds. A level of random shots
            takes none of these.
        shots: most shots in a prompt; "fit" is as many as the budget takes, or as a search finds best.
        calibrations: of the prompt's probabilities, on rows of its own pool; "auto" is that of lowest held-out risk. By
            default none, and "auto" at a level that searches.
        seeds: of the examples drawn, and of the reference each prompt is compared with.
        queries: test rows asked, drawn at random, the same everywhere; `None` is all of them.
        rows_of: version of this package whose rows are gone on with, as if nothing had changed since; by default this.
        reference_on: whether references learn from all training data, or from the examples that the prompt has.
    """

    datasets: tuple[DatasetSpec, ...]
    sizes: tuple[Size, ...] = (16, 64, 256, "all")
    budgets: tuple[int, ...] = (1024,)
    levels: tuple[str, ...] = ("O1",)
    search_queries: int | None = None
    retrievers: tuple[str, ...] = ()
    shots: tuple[Shots, ...] = ("fit",)
    calibrations: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    references: tuple[ReferenceSpec, ...] = (ReferenceSpec(),)
    reference_on: Literal["all", "n"] = "all"
    queries: int | None = None
    baselines: tuple[str, ...] = BASELINES
    model: str = "smollm2-135m"
    template: str | None = None
    level: float = 0.95
    backend: str | None = None
    server: str | None = None
    in_flight: int | None = None
    dtype: str = "auto"
    rows_of: str | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, object], *, root: Path, where: str = "the sweep") -> "SweepSpec":
        """Check what was read from YAML, or put together from options.

        Args:
            root: folder that relative paths of datasets start from.
            where: begins every message.

        Raises:
            SpecError: if a key is unknown, a value not of its kind, or a dataset not where it should be.

        >>> SweepSpec.from_mapping({"datasets": "hf:mr", "size": 16}, root=Path())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        icl_compiler.errors.SpecError: the sweep: unknown key 'size'. Did you mean 'sizes'? Available: datasets, ...
        """
        _known(given, [each.name for each in fields(cls)], where)
        if not given.get("datasets"):
            raise SpecError(f"{where}: it names no datasets; give at least one, a folder with train and test")
        read: dict[str, Any] = {}
        for key, value in given.items():
            read[key] = _READERS[key](value, f"{where}: {key}", root)
        spec = cls(**read)
        names = [dataset.name for dataset in spec.datasets]
        if len(set(names)) < len(names):
            raise SpecError(f"{where}: two datasets have the same name, of {', '.join(names)}; give each its own")
        if spec.reference_on == "n" and any(each.folder or each.examples for each in spec.references):
            raise SpecError(
                f"{where}: reference_on: n trains each reference on the examples of its prompt, so that neither "
                "`folder` nor `examples` can be given for it"
            )
        if any(each.folder for each in spec.references) and len(spec.seeds) > 1:
            raise SpecError(f"{where}: a reference that is trained already has one seed, and the sweep has several")
        return spec

    @classmethod
    def from_yaml(cls, path: Path, changes: Mapping[str, object], *, root: Path) -> "SweepSpec":
        """Read a YAML file; `changes` take the place of what it says.

        Raises:
            SpecError: if it cannot be read, or as `from_mapping`.
        """
        import yaml

        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SpecError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise SpecError(f"{path} should hold keys such as `datasets:` and `sizes:`, holds {_kind(found)}")
        return cls.from_mapping({**found, **changes}, root=root, where=str(path))


def split_of(source: str, split: str) -> str:
    """The source of one split of a dataset: a file in the folder, a split of a saved one, or of one of the hub.

    Raises:
        SpecError: if the folder has none.

    >>> split_of("hf:mr", "test")
    'hf:mr:test'
    """
    if source.startswith("hf:"):
        return f"{source}:{split}"
    folder = Path(source)
    if not folder.is_dir():
        raise SpecError(f"there is no folder {source}; expected one with a file train and a file test")
    for ending in _SPLITS:
        if (folder / f"{split}{ending}").is_file():
            return str(folder / f"{split}{ending}")
    if (folder / split).is_dir():
        return f"{source}:{split}"
    raise SpecError(f"the folder {source} has no {split}{{{','.join(_SPLITS)}}}; name the files as {{train: , test: }}")


def _known(given: Mapping[str, object], names: Sequence[str], where: str) -> None:
    for key in given:
        if key not in names:
            raise SpecError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), names)}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{value!r}"


def _several(read: Callable[[object, str, Path], Any]) -> Callable[[object, str, Path], tuple[Any, ...]]:
    def reader(value: object, where: str, root: Path) -> tuple[Any, ...]:
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise SpecError(f"{where} is an empty list; give at least one, or leave the key out")
        found = tuple(read(each, where, root) for each in values)
        if len(set(found)) < len(found):
            raise SpecError(f"{where} names one thing twice: {', '.join(map(str, values))}")
        return found

    return reader


def _whole(least: int, *words: str) -> Callable[[object, str, Path], Any]:
    def reader(value: object, where: str, root: Path) -> Any:
        if value in words and isinstance(value, str):
            return value
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if type(value) is not int or value < least:
            also = f", or {' or '.join(words)}" if words else ""
            raise SpecError(f"{where} should be a whole number from {least} on{also}, is {_kind(value)}")
        return value

    return reader


def _number(low: float, high: float) -> Callable[[object, str, Path], float]:
    def reader(value: object, where: str, root: Path) -> float:
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else high
        except ValueError:
            number = high
        if not low < number < high:
            raise SpecError(f"{where} should be a number above {low:g} and below {high:g}, is {_kind(value)}")
        return number

    return reader


def _one_of(names: Sequence[str], *, paths: bool = False) -> Callable[[object, str, Path], str]:
    def reader(value: object, where: str, root: Path) -> str:
        if value not in names and not (paths and isinstance(value, str) and ":" in value):
            raise SpecError(f"{where}: unknown name {value!r}. {did_you_mean(str(value), names)}")
        return str(value)

    return reader


def _optimisation(value: object, where: str, root: Path) -> str:
    return _one_of(list(LEVELS))(f"O{str(value).removeprefix('-').removeprefix('O')}", where, root)


def _text(value: object, where: str, root: Path) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where} should be text, is {_kind(value)}")
    return value


def _dataset(value: object, where: str, root: Path) -> DatasetSpec:
    if isinstance(value, str):
        source = value if value.startswith("hf:") else str(root / value)
        name = value.removeprefix("hf:") if value.startswith("hf:") else Path(source).resolve().name
        return DatasetSpec(name, split_of(source, "train"), split_of(source, "test"))
    if not isinstance(value, dict):
        raise SpecError(f"{where}: a dataset is a folder, or {{name: , train: , test: }}, is {_kind(value)}")
    _known(value, [each.name for each in fields(DatasetSpec)], where)
    for key in ("name", "train", "test"):
        _text(value.get(key), f"{where}: {key}", root)
    sources = {key: value[key] if value[key].startswith("hf:") else str(root / value[key]) for key in ("train", "test")}
    return DatasetSpec(**(value | sources))


def _reference(value: object, where: str, root: Path) -> ReferenceSpec:
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict):
        raise SpecError(f"{where}: a reference is a method, or {{method: , settings: , ...}}, is {_kind(value)}")
    _known(value, list(_REFERENCE_READERS), where)
    if "folder" in value and len(value) > 1:
        others = ", ".join(key for key in value if key != "folder")
        raise SpecError(f"{where}: a reference with a `folder` is trained already; leave out {others}")
    read = {key: _REFERENCE_READERS[key](each, f"{where}: {key}", root) for key, each in value.items()}
    spec = ReferenceSpec(**read)
    if spec.folder is None:
        from evaluation.reference.method import make_method
        from icl_compiler.errors import ICLError

        try:
            make_method(spec.method, dict(spec.settings))
        except ICLError as error:
            raise SpecError(f"{where}: {error}") from error
    return spec


def _settings(value: object, where: str, root: Path) -> tuple[tuple[str, str], ...]:
    import json

    if not isinstance(value, dict):
        raise SpecError(f"{where} should be keys and values, is {_kind(value)}")
    return tuple((str(key), each if isinstance(each, str) else json.dumps(each)) for key, each in sorted(value.items()))


def _all_or_count(value: object, where: str, root: Path) -> int | None:
    found = _whole(1, "all")(value, where, root)
    return None if found == "all" else int(found)


_REFERENCE_READERS: Mapping[str, Callable[[object, str, Path], Any]] = {
    "method": _one_of(list(METHODS)),
    "settings": _settings,
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "learning_rate": _number(0.0, 1.0),
    "examples": _all_or_count,
    "folder": _text,
}
_READERS: Mapping[str, Callable[[object, str, Path], Any]] = {
    "datasets": _several(_dataset),
    "sizes": _several(_whole(1, "all")),
    "budgets": _several(_whole(1)),
    "levels": _several(_optimisation),
    "search_queries": _whole(1),
    "retrievers": _several(_one_of(list(RETRIEVERS), paths=True)),
    "shots": _several(_whole(1, "fit")),
    "calibrations": _several(_one_of(("auto", *CALIBRATIONS))),
    "seeds": _several(_whole(0)),
    "references": _several(_reference),
    "reference_on": _one_of(("all", "n")),
    "queries": _all_or_count,
    "baselines": lambda value, where, root: () if value == [] else _several(_one_of(BASELINES))(value, where, root),
    "model": _text,
    "template": _text,
    "level": _number(0.0, 1.0),
    "backend": _one_of(list(BACKENDS), paths=True),
    "server": _text,
    "in_flight": _whole(1),
    "dtype": _one_of(("auto", "bfloat16", "float32")),
    "rows_of": _text,
}
