"""Anything with label probabilities per text; first of all a program on a backend."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from icl_compiler.backends.backend import Backend, Generation, Progress, Usage
from icl_compiler.calibration.law import NO_CALIBRATION, Evidence
from icl_compiler.errors import LabelError, RegistryError
from icl_compiler.program import Program
from icl_compiler.registry import BACKENDS, resolve
from icl_compiler.templates import EncodedTemplate


class Predictions(NamedTuple):
    """The law of the answer to each text, and what it cost.

    Attributes:
        probabilities: of each label, in the order of `labels`; a row sums to at most 1, the rest is the mass
            of all other continuations ("other"). Lower bounds where `upper` is given: "other" then is an upper bound.
        prompt_tokens: tokens of the prompt of each text; of all its prompts, where there are several.
        usage: tokens computed and forward passes, over all texts; tokens that the base model reads so that the nearest
            rows are found count as computed.
        seconds: wall time, making the prompts included.
        upper: upper bounds on the probabilities, from an engine that gives only its likeliest tokens; else `None`.
        uncalibrated: the same without the program's calibration, where it has one.
    """

    labels: tuple[str, ...]
    probabilities: Float[np.ndarray, "texts labels"]
    prompt_tokens: Int64[np.ndarray, " texts"]
    usage: Usage
    seconds: float
    upper: Float[np.ndarray, "texts labels"] | None = None
    uncalibrated: "Predictions | None" = None

    @property
    def best(self) -> Int64[np.ndarray, " texts"]:
        """Position of the likeliest label of each text; of bounds, the largest lower one."""
        best: Int64[np.ndarray, " texts"] = self.probabilities.argmax(axis=1)
        return best

    @property
    def other(self) -> Float[np.ndarray, " texts"]:
        """Mass of everything that is not a label word, in [0, 1]."""
        other: Float[np.ndarray, " texts"] = np.clip(1 - self.probabilities.sum(axis=1), 0, 1)
        return other


def joined(parts: Sequence[Predictions]) -> Predictions:
    """What was said to several lists of texts, one after the other; at least one list, all about the same labels.

    Where the probabilities of one are bounds, those of the others are bounds too, with both ends the same.
    """
    uppers = None
    if any(part.upper is not None for part in parts):
        uppers = np.concatenate([part.probabilities if part.upper is None else part.upper for part in parts])
    raw = [part.uncalibrated for part in parts if part.uncalibrated is not None]
    return Predictions(
        parts[0].labels,
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.prompt_tokens for part in parts]),
        reduce(Usage.plus, [part.usage for part in parts]),
        sum(part.seconds for part in parts),
        uppers,
        joined(raw) if len(raw) == len(parts) else None,
    )


@runtime_checkable
class Predictor(Protocol):
    """Gives the probability of every label for every text."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the probabilities."""

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """The law of the answer to each text."""


@dataclass(frozen=True)
class PromptedPredictor:
    """A program on a backend: the frozen model's own law, at temperature 1, calibrated as the program says."""

    program: Program
    backend: Backend

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the program."""
        return self.program.labels

    def predict(self, texts: Sequence[str], *, progress: Progress | None = None) -> Predictions:
        """Score every label word after the prompt of every text.

        Raises:
            LabelError: if the program generates text instead of labels.
        """
        if self.program.task != "classification":
            raise LabelError("this program generates text, it has no labels; use `generate`")
        started = time.perf_counter()
        sets, count = self.program.prompt_sets(texts), self.program.settings.ensembles
        scores = self.backend.label_logprobs(
            [prompt.tokens for prompts in sets for prompt in prompts],
            self.program.label_words,
            progress=_of_sets(progress, count),
        ).averaged(count)
        raw = NO_CALIBRATION.law(Evidence(scores.logprobs, scores.upper))
        tokens = np.array([sum(len(prompt.tokens) for prompt in prompts) for prompts in sets], dtype=np.int64)
        law = self.program.law([prompts[0] for prompts in sets], scores.logprobs, scores.upper)
        seconds = time.perf_counter() - started
        usage = scores.usage.plus(self.program.reading_cost(texts))
        said = Predictions(self.labels, law.probabilities, tokens, usage, seconds, law.upper)
        if self.program.calibration.method == "none":
            return said
        return said._replace(uncalibrated=said._replace(probabilities=raw.probabilities, upper=raw.upper))


def _of_sets(progress: Progress | None, prompts: int) -> Progress | None:
    """`progress` of texts as one of prompts, of which a text has so many."""
    if progress is None or prompts == 1:
        return progress
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        progress((done + more) // prompts - done // prompts)
        done += more

    return advance


def answer_text(template: EncodedTemplate, answer: Generation) -> str:
    """A generated answer as text, without its terminator."""
    tokens = answer.tokens[: -len(template.terminator_ids)] if answer.finished else answer.tokens
    return template.tokenizer.decode(tokens).strip()


def open_backend(
    name: str | None, model: str, *, dtype: str = "auto", server: str | None = None, in_flight: int | None = None
) -> Backend:
    """The backend `name` with `model` loaded; the model `echo` brings its own backend.

    Args:
        name: a name of the table, or `package.module:Class`; `None` is `vllm_server` where a `server` is given, else
            `transformers`.
        server: URL of a vLLM server, for the backend `vllm_server`.
        in_flight: most requests to the server at once.

    Raises:
        RegistryError: if there is no such backend, or it takes no server.
    """
    settings = {key: value for key, value in (("server", server), ("in_flight", in_flight)) if value is not None}
    chosen = name or ("vllm_server" if server is not None else "transformers")
    if settings and chosen != "vllm_server" and ":" not in chosen:
        raise RegistryError(
            f"--{next(iter(settings)).replace('_', '-')} is about a vLLM server, and the backend is {chosen!r}; "
            "leave it out, or take --backend vllm_server"
        )
    if model == "echo":
        chosen, settings = "echo", {}
    found = resolve("backend", BACKENDS, chosen)
    lacking = [part for part in ("label_logprobs", "generate", "sequence_logprobs") if not hasattr(found, part)]
    if lacking:
        raise RegistryError(f"{chosen!r} is no backend, it has no {', '.join(lacking)}; see backends/backend.py")
    backend: Backend = found(model, dtype, **settings)
    return backend
