"""The examples of README.md and docs/adapters.md, run in the order in which they stand there, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, README.parent / "docs" / "adapters.md"]
# What a reader types before the examples begin, and what ends only when it is stopped.
NOT_RUN = ("make", "git", "cd", "pip", "source", ".", "curl")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\s*\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    line: int
    language: str
    code: str
    reason: str | None


def examples(page=README):
    text = page.read_text(encoding="utf-8")
    return [
        Example(text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


def commands(code):
    """What stands after `$ `, together with the lines that a backslash continues it on."""
    return re.findall(r"^\$ ((?:.*\\\n)*.*)$", code, re.MULTILINE)


def test_few_examples_are_left_out():
    assert {example.language for example in examples()} >= {"python", "console"}
    for page, most in zip(PAGES, (3, 1), strict=True):
        assert len([example for example in examples(page) if example.reason]) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_shell_example_escapes_the_test(page):
    elsewhere = [example for example in examples(page) if example.language in ("bash", "sh", "shell", "py", "pycon")]
    assert elsewhere == [], "write them as ```python, or as ```console with `$ ` before each command"


@pytest.mark.models
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    namespace = {"__name__": page.stem}
    for line, language, code, reason in examples(page):
        if reason:
            continue
        if language == "python":
            # The empty lines before it make a traceback name the line of the page.
            exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
        for command in commands(code) if language == "console" else []:
            if command.split()[0] in NOT_RUN:
                continue
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, f"{page.name}, block at line {line}: {command}\n{done.stdout}{done.stderr}"
