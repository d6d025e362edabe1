"""What the contenders of the selection and quality benchmarks share: the job, the encoder, the clock.

- A contender is a script, `python selection_X.py JOB RESULT`, in a process and an environment of its own; this module
  needs numpy and nothing else, and imports nothing of the compiler.
- The encoder is a table of vectors made beforehand: the time to encode counts for nobody.
- The clock runs from texts to finished prompts. Making the index is not in it.
- A job that names a `method` asks for rows of the pool in place of prompts, and nothing is timed but the whole.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

INSTRUCTION = "Say which label fits the text.\n"


class Job(NamedTuple):
    """A pool with its vectors, and the queries, whose vectors stand there too."""

    texts: list[str]
    labels: list[str]
    queries: list[str]
    shots: int
    model: str
    vectors: Any
    """The table: `[place of a text among texts and queries, width]`, float32, of length 1."""
    method: str = ""
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job of a file that the benchmark wrote; the vectors lie beside it."""
        return cls(**json.loads(path.read_text(encoding="utf-8")), vectors=np.load(path.with_suffix(".npy")))


class Table:
    """The encoder of all contenders: a vector for each text of the job, looked up."""

    def __init__(self, job: Job) -> None:
        self._vectors = job.vectors
        self._place = {text: place for place, text in enumerate([*job.texts, *job.queries])}

    def encode(self, texts: Sequence[str]) -> Any:
        """The vectors of these texts."""
        return self._vectors[[self._place[text] for text in texts]]


class Found(NamedTuple):
    """What a contender made of the queries.

    Attributes:
        shots: for each query the texts of its shots, or where it does not tell, the prompt.
        characters: of all prompts.
    """

    shots: list[list[str]] | list[str]
    characters: int


class Chosen(NamedTuple):
    """The rows of the pool that a contender shows.

    Attributes:
        rows: for each query as many as the job asks for, the most important first.
        order: in which they stand in the contender's prompts: `best-first`, `best-last` or `random`.
        version: of the contender.
    """

    rows: list[list[int]]
    order: str
    version: str


def run(
    load: Callable[[Job], tuple[Callable[[list[str]], Found], str]] | None = None,
    choose: Callable[[Job], Chosen] | None = None,
) -> None:
    """Do the job named on the command line.

    `load` gives a function that makes the prompts of all queries, of which the fastest of three rounds counts; where
    the job names a method, `choose` gives rows.
    """
    source, target = map(Path, sys.argv[1:])
    job = Job.read(source)
    began = time.perf_counter()
    if job.method:
        chosen = choose(job)
        seconds = time.perf_counter() - began
        target.write_text(json.dumps(chosen._asdict() | {"seconds": seconds}), encoding="utf-8")
        return
    make, version = load(job)
    make(job.queries[:20])
    rounds = []
    for _ in range(3):
        began = time.process_time(), time.perf_counter()
        found = make(job.queries)
        rounds.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    cpu_seconds, seconds = min(rounds)
    result = {
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "version": version,
        "characters": found.characters,
        "shots": found.shots,
    }
    target.write_text(json.dumps(result), encoding="utf-8")
