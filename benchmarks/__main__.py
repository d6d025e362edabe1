"""`python -m benchmarks [NAME ...]`: runs the benchmarks named, or all of them, one after the other.

A benchmark is a module of this folder that can also be run by itself: `python -m benchmarks.NAME`. The first
line of its docstring says what it measures and how long that takes.
"""

import ast
import runpy
import sys
from pathlib import Path


def main(names: list[str]) -> int:
    """Run the benchmarks of these names, or all; the exit code is 2 for a name that is not known."""
    modules = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem[0] != "_"}
    if unknown := [name for name in names if name not in modules]:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(modules) or 'none yet'}", file=sys.stderr)
        return 2
    if not modules:
        print("There are no benchmarks yet.")
    for name in names or modules:
        told = ast.get_docstring(ast.parse(modules[name].read_text(encoding="utf-8"))) or ""
        print(f"== {name}: {told.partition(chr(10))[0]}", flush=True)
        sys.argv[1:] = []  # the names are ours: a benchmark that reads arguments has none
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
