"""What the frozen layers give for each example, kept: in memory, or in a file that vanishes with the process."""

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from icl_compiler.errors import TrainingError

IN_MEMORY = 2 << 30
"""Bytes up to which outputs are kept in memory."""


class FrozenOutputs:
    """Hidden states of sequences, one array behind the other; written once or more, read often.

    Args:
        lengths: tokens of each sequence.
        width: numbers a token.
        in_memory: bytes above which they lie on the disk, in the folder for temporary files.

    Raises:
        TrainingError: if there is no space for them there.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, *, in_memory: int | None = None) -> None:
        ends = np.cumsum(lengths)
        self._parts = [slice(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)]
        self._known = [False] * len(lengths)
        count = sum(lengths) * width
        size = count * dtype.itemsize
        if size <= (IN_MEMORY if in_memory is None else in_memory):
            flat = torch.empty(count, dtype=dtype)
        else:
            try:
                with tempfile.NamedTemporaryFile(prefix="icl-frozen-") as file:  # mapped, it outlives its name
                    if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
                        os.posix_fallocate(file.fileno(), 0, size)
                    flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
            except OSError as error:
                raise TrainingError(
                    f"what the frozen layers give takes {size / 1e9:.1f} GB, and {tempfile.gettempdir()} has no space "
                    f"for it ({error.strerror or error}); set TMPDIR to a folder that has, take fewer --examples, or "
                    "train all layers (--first-layer 0)"
                ) from error
        self._all = flat.view(-1, width)

    def __contains__(self, number: int) -> bool:
        """Whether the outputs of sequence `number` are there."""
        return self._known[number]

    def __getitem__(self, number: int) -> Float[torch.Tensor, "tokens width"]:
        """The outputs of sequence `number`."""
        return self._all[self._parts[number]]

    def __setitem__(self, number: int, outputs: Float[torch.Tensor, "tokens width"]) -> None:
        """Keep the outputs of sequence `number`."""
        self._all[self._parts[number]] = outputs.to("cpu", self._all.dtype)
        self._known[number] = True
