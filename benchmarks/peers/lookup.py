"""What the contenders of the selection benchmark share: the job, the encoder, the clock.

- A contender is a script, `python selection_X.py JOB RESULT`, in a process and an environment of its own; this module
  needs numpy and nothing else, and imports nothing of the compiler.
- The encoder is a table of vectors made beforehand: the time to encode counts for nobody.
- The clock runs from texts to finished prompts. Making the index is not in it.
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


def run(load: Callable[[Job], tuple[Callable[[list[str]], Found], str]]) -> None:
    """Time the function that `load` gives, which makes the prompts of all queries: the fastest of three rounds."""
    source, target = map(Path, sys.argv[1:])
    job = Job.read(source)
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
