"""A program as a scikit-learn classifier: `fit` compiles, `predict_proba` asks the frozen model.

- `fit` runs the model only for levels 2 and 3, which search, and for a `calibration`.
- Columns of `predict_proba` are `classes_`, and rows sum to 1. A calibrated program's law is taken as it is; where mass
  is left for "other" (answers that are no label), the law is that of the answer given that it is a label: each row
  divided by its sum. So "other" is never predicted; `predict_law` says how much of it there was.
- Classes are what `y` holds (strings, integers, booleans ...), label words are strings: `str(class)`, or what
  `label_words` says. `0`, `False` and `""` are classes like others. Parts of scikit-learn number the classes before
  they call `fit` (`VotingClassifier`, `StackingClassifier`, `cross_val_predict` of probabilities): the words are lost
  then, and `label_words={0: "card", 1: "parcel"}`, in the order of the sorted classes, brings them back.
- A row of the training texts is never a shot for itself, so `predict` of training texts leaves each of them out.
- Whatever runs the model is opened once a process, when it is first asked, and shared by all classifiers with the same
  model; one of them asks at a time. It is no part of a pickle. A fitted program is, as the files that `save_program`
  writes.
- Arguments are checked in `fit`, as scikit-learn asks; the base classes make this the one module that imports
  scikit-learn at its top.
"""

import warnings
from collections.abc import Mapping, Set
from contextlib import suppress
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import assert_all_finite, check_consistent_length, check_random_state, check_scalar, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from icl_compiler.artifact import load_program, load_trace, save_program
from icl_compiler.backends.backend import Backend
from icl_compiler.calibration.calibrating import calibrate
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import InputError, TemplateError
from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, Optimised, optimise
from icl_compiler.predictor import Predictions, PromptedPredictor, open_backend
from icl_compiler.program import Program
from icl_compiler.registry import CALIBRATIONS, did_you_mean
from icl_compiler.table import kind, listed
from icl_compiler.templates import Template

_SEARCHED = ("encoder", "retriever", "shots", "order", "per_label", "template")  # unless they are named
_ONE_AT_A_TIME = RLock()


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn publishes no types
    """A frozen language model with shots from the training texts, as a scikit-learn classifier.

    Args:
        model, encoder, template, retriever, shots, budget, examples, order, per_label, layout, clusters, cache_block,
            block_share, ensembles: as of `icl_compiler.compile.compile_program`. `None` is its default or, from level 2
            on, to be searched, as far as that level does.
        level: 0 for random shots, 1 for the nearest ones, 2 and 3 for a search on held-out training texts: `icl compile
            -O`.
        search_queries: most prompts that levels 2 and 3 ask the model; by default 1,500 and 3,000.
        search_layouts: whether levels 2 and 3 search the layout too, beginning with `layout`.
        calibration: a name of the table of calibrations, or "best" for the one of lowest held-out risk; by default the
            best from level 2 on, and none below.
        label_words: the word in the prompt for each class, `{0: "negative", 1: "positive"}`; by default `str(class)`.
        random_state: the seed; an integer gives the program that `icl compile --seed` gives. `None` draws one.
        backend, dtype, server: as of `icl_compiler.predictor.open_backend`.

    Attributes:
        classes_: the classes, sorted.
        label_words_: the label word of each class.
        program_: the compiled program; `icl_compiler.artifact.save_program` keeps it.
        trace_: what levels 2 and 3 tried, empty below.

    >>> texts = ["my card is gone", "the card was stolen", "where is my parcel", "the parcel is late"]
    >>> classifier = PromptClassifier(model="echo", retriever="bm25", shots=1).fit(texts, [0, 0, 1, 1])
    >>> classifier.predict(["a stolen card", "a late parcel"])
    array([0, 1])
    >>> classifier.predict_proba(["a stolen card"]).round(2)
    array([[0.67, 0.33]])
    """

    classes_: Shaped[np.ndarray, " classes"]
    label_words_: list[str]
    program_: Program
    trace_: list[dict[str, Any]]

    # Whatever stands in an argument, scikit-learn wants it to be taken here, and refused in `fit`.
    def __init__(
        self,
        model: Any = "smollm2-135m",
        *,
        encoder: Any = None,
        template: Any = None,
        retriever: Any = None,
        shots: Any = None,
        budget: Any = 1024,
        examples: Any = None,
        order: Any = None,
        per_label: Any = None,
        layout: Any = "per-query",
        clusters: Any = None,
        cache_block: Any = 16,
        block_share: Any = 0.5,
        ensembles: Any = None,
        level: Any = 1,
        search_queries: Any = None,
        search_layouts: Any = False,
        calibration: Any = None,
        label_words: Any = None,
        random_state: Any = 0,
        backend: Any = None,
        dtype: Any = "auto",
        server: Any = None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.template = template
        self.retriever = retriever
        self.shots = shots
        self.budget = budget
        self.examples = examples
        self.order = order
        self.per_label = per_label
        self.layout = layout
        self.clusters = clusters
        self.cache_block = cache_block
        self.block_share = block_share
        self.ensembles = ensembles
        self.level = level
        self.search_queries = search_queries
        self.search_layouts = search_layouts
        self.calibration = calibration
        self.label_words = label_words
        self.random_state = random_state
        self.backend = backend
        self.dtype = dtype
        self.server = server

    @classmethod
    def from_program(
        cls,
        folder: str | Path,
        *,
        label_words: Mapping[Any, str] | None = None,
        backend: str | None = None,
        dtype: str = "auto",
        server: str | None = None,
    ) -> "PromptClassifier":
        """The fitted classifier of a program that `icl compile` or `save_program` wrote.

        A folder knows label words, so these are the classes; `label_words` names others. The classifier's arguments are
        those of the program, so that `clone(...).fit` compiles alike for other texts: without its search, at level 1.

        Raises:
            ArtifactError: if `folder` is no program, or a damaged one.
            InputError: if the program generates text, or `label_words` are not its labels.
        """
        folder = Path(folder)
        program = load_program(folder)
        if program.task != "classification":
            raise InputError(f"{folder} generates text, it has no labels; a classifier needs a program with labels")
        classes = np.unique(_one_array(list(program.labels if label_words is None else label_words)))
        words = _words_of(classes, label_words)
        if set(words) != set(program.labels):
            raise InputError(
                f"label_words should name the labels of {folder}, which are {listed(program.labels)}; "
                f"found {listed(words)}"
            )
        settings = program.settings
        made: PromptClassifier = cls(
            settings.model,
            encoder=settings.encoder,
            template=_name_of(program.template.template, folder),
            retriever=settings.retriever,
            shots=settings.shots,
            budget=settings.budget,
            order=settings.order,
            per_label=settings.per_label,
            layout=settings.layout,
            clusters=settings.clusters or None,
            cache_block=settings.cache_block,
            block_share=settings.block_share,
            ensembles=settings.ensembles,
            calibration=None if program.calibration.method == "none" else program.calibration.method,
            label_words=label_words,
            random_state=settings.seed,
            backend=backend,
            dtype=dtype,
            server=server,
        )
        made.classes_, made.label_words_, made.program_, made.trace_ = classes, words, program, load_trace(folder)
        return made

    def fit(self, X: Any, y: Any, validation: Any = None) -> "PromptClassifier":
        """Compile a program of texts `X` and classes `y`. Rows that stand twice are taken once.

        Args:
            X: texts: a list, a one-dimensional array, a pandas Series.
            y: one class a text.
            validation: a pair of other texts and their classes, which search and calibration ask in place of rows of
                `X`: where classes come as often as in use.

        Raises:
            InputError: a `ValueError`, if `X` holds no texts, or `y` fewer than two classes, or two with one word; if
                `validation` is no such pair, or has other classes; or if nothing is searched or calibrated with it.
            ICLError: as `compile_program` raises.
        """
        texts, y = _rows_of(X, y)
        try:
            check_classification_targets(y)
            classes, codes = np.unique(y, return_inverse=True)
        except TypeError as error:
            raise InputError(
                f"the classes in y cannot be sorted ({error}); make them all strings, or numbers"
            ) from error
        if len(classes) < 2:
            raise InputError(f"y holds one class only, {classes[0]!r}; a classifier needs two or more")
        words = _words_of(classes, self.label_words)
        data = _dataset(texts, [words[code] for code in codes], "X")
        held_out = None if validation is None else _held_out(validation, classes, words)
        program, trace = self._compiled(data, held_out)
        self.classes_, self.label_words_, self.program_, self.trace_ = classes, words, program, trace
        return self

    def _compiled(self, data: Dataset, validation: Dataset | None) -> Optimised:
        level = check_scalar(self.level, "level", Integral, min_val=0, max_val=3)
        if self.calibration not in (None, "best", *CALIBRATIONS):
            known = did_you_mean(str(self.calibration), ("best", *CALIBRATIONS))
            raise InputError(f"unknown calibration {self.calibration!r}. {known}")
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(2**31 - 1)
        program = compile_program(
            data,
            model=self.model,
            encoder=self.encoder or "minilm",
            template=self.template,
            retriever=DEFAULT_RETRIEVERS[level] if self.retriever is None else self.retriever,
            shots=_count("shots", self.shots),
            budget=int(check_scalar(self.budget, "budget", Integral, min_val=1)),
            examples=_count("examples", self.examples),
            seed=int(seed),
            order=self.order,
            per_label=_count("per_label", self.per_label) or 0,
            layout=self.layout,
            clusters=_count("clusters", self.clusters),
            cache_block=int(check_scalar(self.cache_block, "cache_block", Integral, min_val=1)),
            block_share=float(check_scalar(self.block_share, "block_share", Real)),
            ensembles=1 if self.ensembles is None else int(check_scalar(self.ensembles, "ensembles", Integral)),
        )
        wanted = None if self.calibration in (None, "best") else [self.calibration]
        if level < 2 and self.calibration in (None, "none"):
            if validation is not None:
                raise InputError(
                    f"level {level} without a calibration holds nothing out; leave `validation` out, or choose "
                    "calibration='best' or a level of 2 or 3"
                )
            return Optimised(program, [])
        with _ONE_AT_A_TIME:
            if level < 2:
                calibrated, _ = calibrate(
                    program, self._backend(program), candidates=wanted, seed=int(seed), validation=validation
                )
                return Optimised(calibrated, [])
            return optimise(
                program,
                self._backend(program),
                fixed=frozenset(name for name, value in self._named().items() if value is not None),
                level=level,
                queries=_count("search_queries", self.search_queries),
                layouts=bool(self.search_layouts),
                calibrations=wanted,
                validation=validation,
            )

    def _named(self) -> dict[str, Any]:
        """What a search may change; `None` where it may."""
        named = {name: getattr(self, name) for name in _SEARCHED}
        # Averages deal the shots out, and fewer a prompt are no more what was named.
        return {**named, "ensembles": self.shots if self.ensembles is None else self.ensembles}

    def predict(self, X: Any) -> Shaped[np.ndarray, " texts"]:
        """The likeliest class of each text."""
        best = self.predict_proba(X).argmax(axis=1)
        classes: Shaped[np.ndarray, " texts"] = self.classes_[best]
        return classes

    def predict_proba(self, X: Any) -> Float[np.ndarray, "texts classes"]:
        """The probability of each class for each text, given that the answer is a label; rows sum to 1.

        Warns where the engine gives only its likeliest tokens: then these come of lower bounds, and a text for which
        it named no label at all has all classes alike.
        """
        said = self.predict_law(X)
        mass = said.probabilities[:, [said.labels.index(word) for word in self.label_words_]]
        total = mass.sum(axis=1, keepdims=True)
        if said.upper is not None or not total.all():
            warnings.warn(
                f"the engine gave bounds, of its likeliest tokens only: the probabilities come of lower bounds, and "
                f"{np.count_nonzero(total == 0)} of {len(mass)} texts have all classes alike",
                stacklevel=2,
            )
        return np.where(total > 0, mass / np.where(total > 0, total, 1), 1 / mass.shape[1])

    def predict_law(self, X: Any) -> Predictions:
        """What the program says of each text: probabilities as they are, `other`, tokens, time.

        Raises:
            InputError: a `ValueError`, if `X` holds no texts.
            BudgetError: if a text alone exceeds the budget.
        """
        check_is_fitted(self, "program_")
        texts = _texts_of(X)
        with _ONE_AT_A_TIME:
            return PromptedPredictor(self.program_, self._backend(self.program_)).predict(texts)

    def _backend(self, program: Program) -> Backend:
        return _opened(self.backend, program.settings.model, self.dtype, self.server)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "program_" in state:
            state["program_"] = _files_of(state["program_"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "program_" in state:
            state = {**state, "program_": _program_of(state["program_"])}
        super().__setstate__(state)


@cache
def _opened(name: str | None, model: str, dtype: str, server: str | None) -> Backend:
    return open_backend(name, model, dtype=dtype, server=server)


def _texts_of(X: Any) -> list[str]:
    shape = getattr(X, "shape", None)
    if shape is not None and len(shape) != 1:
        raise InputError(
            f"X has the shape {tuple(shape)}, expected one text a row; Reshape your data, or name its column of texts"
        )
    if isinstance(X, str | bytes | Mapping | Set) or not hasattr(X, "__iter__"):
        raise InputError(f"X should be a list of texts, is {kind(X)}")
    texts = list(X)
    if not texts:
        raise InputError("X is empty: found 0 sample(s), and a minimum of 1 is required")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"row {row} of X is {kind(text)}, expected a text")
    return [str(text) for text in texts]


def _rows_of(X: Any, y: Any) -> tuple[list[str], Any]:
    """Texts, and as many classes."""
    texts = _texts_of(X)
    if y is None:
        raise InputError("PromptClassifier requires y to be passed, but the target y is None")
    y = column_or_1d(_one_array(y), warn=True)
    check_consistent_length(texts, y)
    assert_all_finite(y, input_name="y")
    return texts, y


def _dataset(texts: list[str], words: list[str], source: str) -> Dataset:
    """Rows, each once."""
    rows = list(dict.fromkeys(zip(texts, words, strict=True)))
    return Dataset(tuple(text for text, _ in rows), tuple(word for _, word in rows), "classification", source)


def _held_out(validation: Any, classes: Shaped[np.ndarray, " classes"], words: list[str]) -> Dataset:
    """The pair `validation`, texts and classes, with the label words of `classes`."""
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise InputError(f"validation should be a pair, texts and their classes, is {kind(validation)}")
    texts, y = _rows_of(*validation)
    word_of = dict(zip(classes.tolist(), words, strict=True))
    if unknown := [value for value in y.tolist() if value not in word_of]:
        raise InputError(f"validation has the class {unknown[0]!r}, which y has not")
    return _dataset(texts, [word_of[value] for value in y.tolist()], "validation")


def _one_array(values: Any) -> Any:
    """A list as an array; what stands beside strings stays what it is, where numpy would make it a string."""
    if not isinstance(values, list | tuple):
        return values
    mixed = len({isinstance(value, str) for value in values}) > 1
    return np.asarray(values, dtype=object if mixed else None)


def _words_of(classes: Shaped[np.ndarray, " classes"], named: Any) -> list[str]:
    values = classes.tolist()
    if named is None:
        words = [str(value) for value in values]
    else:
        if not isinstance(named, Mapping) or not all(isinstance(word, str) for word in named.values()):
            raise InputError(f"label_words should give a string for each class, is {kind(named)}")
        if without := [value for value in values if value not in named]:
            raise InputError(f"label_words has no word for {listed(without)}; it has {listed(list(named))}")
        words = [str(named[value]) for value in values]
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise InputError(f"several classes have the label word {twice!r}; name others by label_words")
    return words


def _count(name: str, value: Any) -> int | None:
    return None if value is None else int(check_scalar(value, name, Integral, min_val=0))


def _name_of(template: Template, folder: Path) -> str:
    """What finds this template again: its name, or the file in the folder of its program."""
    with suppress(TemplateError):
        if Template.from_name(template.name).source == template.source:
            return template.name
    return str(folder / "template.jinja")


def _files_of(program: Program) -> dict[str, bytes]:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "program")
        save_program(program, folder)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _program_of(files: Mapping[str, bytes]) -> Program:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "program")
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return load_program(folder)
