"""The program's model in float32, by which the rounding of an engine is measured.

It is opened only if its weights are on this machine and fit its memory: the noise is a footnote to an evaluation, not
worth a download of gigabytes, nor a process that is killed before the results are printed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from icl_compiler.backends.backend import Backend
from icl_compiler.errors import ModelError
from icl_compiler.models import locate
from icl_compiler.predictor import open_backend

_MEMINFO = Path("/proc/meminfo")


def float32_opener(engine: Backend, model: str) -> Callable[[], Backend] | None:
    """What opens `model` in float32; `None` where `engine` computes in float32 already, or has no model.

    >>> from icl_compiler.backends.echo import EchoBackend
    >>> float32_opener(EchoBackend(), "echo") is None
    True
    """
    if engine.model == "echo" or "float32" in engine.device:
        return None
    return partial(float32_backend, model)


def float32_backend(model: str) -> Backend:
    """`model` in float32 on the transformers backend.

    Raises:
        ModelError: if its weights are not on this machine, or do not fit its memory.
    """
    folder = _folder(model)
    weights = (list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))) if folder is not None else []
    if not weights:
        raise ModelError(f"the weights of {model!r} are not on this machine")
    # They are stored in 16 bits a number, as a rule.
    needed = 2 * sum(file.stat().st_size for file in weights)
    available = _available_memory()
    if available is not None and needed > available:
        raise ModelError(
            f"{model!r} takes {needed / 1e9:.1f} GB of memory in float32, and {available / 1e9:.1f} GB are available"
        )
    return open_backend("transformers", model, dtype="float32")


def _folder(model: str) -> Path | None:
    """The folder with the files of `model`; of a hub name, that in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    located = locate(model, kind="language model")
    if Path(located).is_dir():
        return Path(located)
    config = try_to_load_from_cache(located, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _available_memory() -> int | None:
    """Bytes that can be taken without swapping; `None` where the system does not say."""
    if not _MEMINFO.is_file():
        return None
    facts = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    return 1024 * int(facts["MemAvailable"].split()[0]) if "MemAvailable" in facts else None
