"""The environments of the peers, made when they are first needed.

`.venv-peers` takes minutes, and a gigabyte or two; `.venv-peers-selection`, for peers that need no torch, less.

- torch comes first and by itself, in the version that we have, so that all contenders run the same kernels.
- OpenICL asks for packages of 2023; it comes without them, and runs on those that the others need.
- The file `.installed` is written last: a folder without it, or older than the requirements, is made again.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-peers"
SELECTION_VENV = ROOT / ".venv-peers-selection"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CONSTRAINTS = ROOT / "constraints.txt"
OPENICL = "openicl==0.1.8"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Builds of these for another torch break transformers; text models need none of them."""


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made if it is not there.

    Raises:
        RuntimeError: if a package cannot be installed; says which step, and where the log is.
    """
    python = VENV / "bin" / "python"
    mark = VENV / ".installed"
    if mark.exists() and mark.stat().st_mtime >= REQUIREMENTS.stat().st_mtime:
        return python
    print(f"Setting up {VENV.name}, the environment of the peers, once: several minutes ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    log = VENV / "install.log"
    for arguments in pip_commands():
        command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
        with log.open("a", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
            raise RuntimeError(f"{tail}\npip {' '.join(arguments)} failed; the whole log is {log}")
    mark.touch()
    return python


def selection_python() -> Path:
    """The interpreter of the environment of LangChain and DSPy, which is made if it is not there.

    Raises:
        CalledProcessError: if a package cannot be installed.
    """
    venv, requirements = SELECTION_VENV, REQUIREMENTS.with_name("requirements_selection.txt")
    mark = venv / ".installed"
    if not mark.exists() or mark.stat().st_mtime < requirements.stat().st_mtime:
        print(f"Setting up {venv.name}, once: a minute or two ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", "-r", str(requirements)], check=True)
        mark.touch()
    return venv / "bin" / "python"


def pip_commands() -> list[list[str]]:
    """What pip is asked for, in this order."""
    pinned = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    [torch] = [line for line in pinned if line.startswith("torch==")]
    return [
        ["install", torch],
        ["install", "-r", str(REQUIREMENTS)],
        ["install", "--no-deps", OPENICL],
        ["uninstall", "--yes", *UNWANTED],
    ]
