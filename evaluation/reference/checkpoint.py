"""Where a training stands, on disk, so that one that was killed goes on.

A file beside the output, complete or not at all; it holds numbers only, and is read without pickle's code. What was
written by another training (other data, settings, model) is not taken up. It vanishes when the training is done.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from icl_compiler.errors import TrainingError


class Checkpoint:
    """The state of one training.

    Args:
        path: the file; `None` keeps nothing.
        key: says which training it is.
        every_s: least time between two writes, in seconds.
    """

    def __init__(self, path: Path | None = None, key: str = "", *, every_s: float = 120.0) -> None:
        self._path, self._key, self._every_s = path, key, every_s
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was last saved by this training; `None` if nothing was."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception:  # whatever a file that is none makes torch raise
            return None
        return found["state"] if found.get("key") == self._key else None

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return self._path is not None and time.monotonic() - self._written >= self._every_s

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state`: tensors, numbers, text, and lists and dicts of these.

        Raises:
            TrainingError: if it cannot be written; what was saved before is there still.
        """
        assert self._path is not None
        draft = self._path.with_name(self._path.name + ".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # the output is written when all is done
            torch.save({"key": self._key, "state": dict(state)}, draft)
            draft.replace(self._path)
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise TrainingError(
                f"the state of the training could not be written to {self._path}: {reason}; make space, and start the "
                "same command again"
            ) from error
        self._written = time.monotonic()

    def remove(self) -> None:
        """The training is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
