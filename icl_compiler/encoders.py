"""What texts are compared by: encoders by their names, alone or side by side.

`minilm` is a model of sentence embeddings, as is any folder or name on the hub; `base` is what the frozen model makes
of a text (`reading`); `minilm+base` are both, whose cosines are averaged.
"""

from functools import cache
from pathlib import Path

from icl_compiler.models import cache_folder, locate
from icl_compiler.program import Program
from icl_compiler.reading import VECTORS, Reading
from retrievers.encoder import Concatenated, SentenceEncoder
from retrievers.retriever import Encoder

BASE = "base"
"""The part of an encoder's name that stands for the base model."""


def reads(encoder: str) -> bool:
    """Whether the base model reads texts for the encoder of this name.

    >>> reads("minilm"), reads("minilm+base")
    (False, True)
    """
    return BASE in _parts(encoder)


def with_base(encoder: str) -> str:
    """The name of an encoder with what the base model makes of a text beside it.

    >>> with_base("minilm"), with_base("minilm+base")
    ('minilm+base', 'minilm+base')
    """
    return encoder if reads(encoder) else f"{encoder}+{BASE}"


def without_base(encoder: str) -> str:
    """The name without the base model; that of the usual encoder where nothing else is in it.

    >>> without_base("minilm+base"), without_base("base")
    ('minilm', 'minilm')
    """
    return "+".join(part for part in _parts(encoder) if part != BASE) or "minilm"


def _parts(encoder: str) -> list[str]:
    """The encoders that stand side by side; a folder's name may hold a + of its own."""
    return [encoder] if Path(encoder).is_dir() else encoder.split("+")


def encoder_of(program: Program) -> Encoder:
    """What a program's retriever compares texts by."""
    return joint_encoder(program.settings.encoder, program.reading)


def joint_encoder(name: str, reading: Reading | None) -> Encoder:
    """The encoder of this name; `reading` is what `base` stands for in it.

    Raises:
        ValueError: if it is missing.
    """
    parts: list[Encoder] = []
    for part in _parts(name):
        if part == BASE and reading is None:
            raise ValueError(f"the encoder {name!r} reads with the base model, and there is no reading")
        parts.append(reading if part == BASE and reading is not None else named_encoder(part))
    if len(parts) == 1:
        return parts[0]
    return Concatenated(parts, [float(VECTORS) if part is reading else 1.0 for part in parts])


def remember(program: Program, texts: int) -> None:
    """Have the program's encoders keep the vectors of so many texts in memory at most."""
    for part in _parts(program.settings.encoder):
        if part != BASE:
            named_encoder(part).remembered = texts
    if program.reading is not None:
        program.reading.remember(texts)


@cache
def named_encoder(name: str) -> SentenceEncoder:
    """The encoder `name`, one for all retrievers of this process; its model is loaded on first use.

    What it encodes in a compilation stays in the folder `vectors` of the cache, for the next one.
    """
    return SentenceEncoder(lambda: locate(name, kind="encoder"), cache=cache_folder() / "vectors")
