"""Every error that this project raises on purpose, as one tree.

    ICLError
    ├── DataError                 a labelled file that cannot be used as it is
    │   ├── DataFormatError       not readable as CSV, JSONL, Parquet ... (names the row)
    │   ├── ColumnError           the column is not there (names those that are)
    │   └── InputError            texts or labels handed over from Python that cannot be used; a ValueError too
    ├── LabelError                labels that cannot serve as outcomes (one only, prefixes, unknown)
    ├── TemplateError             a template that does not render, or lacks a part
    ├── CalibrationError          held-out queries that a calibration cannot be fitted to
    ├── EnsembleError             several prompts for one text, where one can be asked
    ├── BudgetError               the instruction and the query alone exceed the token budget
    ├── ModelError                a model that cannot be found, loaded or used
    │   └── ContextLengthError    a prompt longer than the model's context
    ├── ArtifactError             a program or reference folder that is damaged, missing or too new
    ├── RegistryError             a name that stands in no table
    ├── MissingDependencyError    an optional package is not installed (names the command)
    ├── BackendError              the engine that runs the model failed or answered nonsense
    ├── TrainingError             training could not be done (NaN loss, empty split ...)
    ├── EvaluationError           a measurement that would not mean anything
    │   ├── NotADistributionError   rows that do not sum to one
    │   └── SpecError               the description of a sweep that cannot be used
    └── ServingError              the endpoint cannot start, or not keep what it was given (keys, corrections, versions)

An error says what was found, what was expected, and what to do. The command line prints it
and exits with 1; nothing but a defect of ours ends in a traceback.
"""


class ICLError(Exception):
    """Root of the tree: catch this to catch everything raised here on purpose."""


class DataError(ICLError):
    """A labelled file that cannot be used as it is."""


class DataFormatError(DataError):
    """A file that cannot be read in the format its name announces."""


class ColumnError(DataError):
    """A column that is not there, or cannot be told from the others."""


class InputError(DataError, ValueError):
    """Texts or labels handed over from Python that cannot be used; other libraries look for a `ValueError`."""


class LabelError(ICLError):
    """Labels that cannot serve as the outcomes of a classification."""


class TemplateError(ICLError):
    """A template that does not render, or lacks a part."""


class CalibrationError(ICLError):
    """Held-out queries that a calibration cannot be fitted to."""


class EnsembleError(ICLError):
    """Several prompts for one text, where one can be asked."""


class BudgetError(ICLError):
    """The instruction and the query alone exceed the token budget."""


class ModelError(ICLError):
    """A model that cannot be found, loaded or used."""


class ContextLengthError(ModelError):
    """A prompt longer than the model's context."""


class ArtifactError(ICLError):
    """A program or reference folder that is damaged, incomplete or too new."""


class RegistryError(ICLError):
    """A name that stands in no table."""


class MissingDependencyError(ICLError):
    """An optional package is not installed."""


class BackendError(ICLError):
    """The engine that runs the model failed, or answered nonsense."""


class TrainingError(ICLError):
    """Training could not be started or finished."""


class EvaluationError(ICLError):
    """A measurement that would not mean anything."""


class NotADistributionError(EvaluationError):
    """Rows that were to be probabilities do not sum to one."""


class SpecError(EvaluationError):
    """The description of a sweep cannot be used as it is."""


class ServingError(ICLError):
    """The endpoint cannot start, or cannot keep what it was given."""
