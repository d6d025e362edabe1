"""The rules that no linter knows: which way imports run, what is documented, what a file may hold."""

import ast
import re
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from icl_compiler import registry
from icl_compiler.models import EMBEDDED

ROOT = Path(__file__).parents[1]
# Each package with those that it may not import.
ABOVE = {
    "retrievers": {"icl_compiler", "evaluation", "serving"},
    "icl_compiler": {"evaluation", "serving"},
    "evaluation": {"serving"},
    "serving": set(),
}
HEAVY = {"torch", "transformers", "faiss", "vllm", "datasets", "sentence_transformers", "pandas", "plotly"}
# Files that are nothing without torch, and are imported only where they are used.
TORCH_AT_TOP = ("icl_compiler/backends/hf_", "evaluation/reference/")
MACHINE = {
    "a path of one machine": r"[/](?:work|root|farm|tmp|home)[/]\w",
    "a folder of wheels": r"[/]opt[/](?:wheels|pypi)",
    "a registry host": r"py[p]i[.]org|python[h]osted|registry[.]npmjs|deb[.]debian",
}


@cache
def modules():
    """Every file of the packages, parsed, by its path."""
    paths = [path for package in ABOVE for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(nodes):
    """The top-level packages that import statements among the nodes name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def run_at_import(node):
    """What runs when a module is imported: no bodies of functions, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_at_import(child)


def run(*arguments, folder=ROOT):
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def setup():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(section, option):
    return [Requirement(line) for line in setup()[section][option].split("\n") if line]


def test_imports_run_one_way():
    against = [
        f"{path} imports {name}"
        for path, tree in modules().items()
        for name in set(imported(ast.walk(tree))) & ABOVE[path.partition("/")[0]]
    ]
    assert against == []


def test_heavy_imports_happen_where_they_are_used():
    at_top = [
        f"{path} imports {name} at its top"
        for path, tree in modules().items()
        for name in set(imported(run_at_import(tree))) & HEAVY
        if not (name == "torch" and path.startswith(TORCH_AT_TOP))
    ]
    assert at_top == []


def test_help_loads_nothing_heavy():
    code = f"""
import sys
sys.argv = ["icl", "--help"]
from icl_compiler.cli import main
try:
    main()
finally:
    print("loaded:", sorted({HEAVY} & set(sys.modules)))
"""
    said = run(sys.executable, "-c", code)
    assert said.startswith("Usage: icl ")
    assert said.endswith("loaded: []\n")


def test_everything_public_has_a_docstring():
    without = []
    for path, tree in modules().items():
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        without += [f"{path}: {getattr(n, 'name', 'module')}" for n in [tree, *public] if not ast.get_docstring(n)]
    assert without == []


def test_module_names_are_unique():
    names = Counter(Path(path).stem for path in modules())
    assert {name for name, count in names.items() if count > 1} <= {"__init__", "cli"}


@pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, name, id=f"{table_name.lower()}-{name}")
        for table_name, table in vars(registry).items()
        if table_name.isupper()
        for name in table
    ],
)
def test_entries_of_the_tables_lead_somewhere(table, name):
    assert callable(registry.resolve("entry", table, name))


@pytest.mark.parametrize("package", ABOVE)
def test_the_installed_package_is_the_checkout(package, tmp_path):
    file = run(sys.executable, "-I", "-c", f"import {package}; print({package}.__file__)", folder=tmp_path)
    assert Path(file.strip()) == ROOT / package / "__init__.py"


def test_changelog_begins_with_the_version_of_the_package():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == setup()["metadata"]["version"]


def test_constraints_pin_what_setup_asks_for():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    asked = requirements("options", "install_requires") + requirements("options.extras_require", "dev")
    wanted = {canonicalize_name(each.name): each.specifier for each in asked}
    unmet = [f"{name}{wish}" for name, wish in wanted.items() if name not in pins or pins[name] not in wish]
    assert unmet == []


def test_embedded_models_are_pinned_alike():
    named = {f"{model.package}=={model.package_version}" for model in EMBEDDED.values()}
    assert {str(each) for each in requirements("options.extras_require", "embedded")} == named


def test_nothing_names_a_machine_or_a_registry():
    try:
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    except (FileNotFoundError, AssertionError):
        pytest.skip("not a git checkout, so what belongs to it is not known")
    found = []
    for path in filter(Path.is_file, (ROOT / name for name in listed.split("\0") if name)):
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in MACHINE.items():
            found += [f"{path.relative_to(ROOT)}: {what}: {hit}" for hit in re.findall(pattern, text)]
    assert found == []


def test_a_benchmark_named_reads_no_arguments_of_the_one_who_names_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "quality"])
    seen = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
    assert import_module("benchmarks.__main__").main(["quality"]) == 0
    assert seen == [("benchmarks.quality", [])]
