import sys

import pytest

from icl_compiler.errors import MissingDependencyError, RegistryError
from icl_compiler.registry import BACKENDS, RETRIEVERS, resolve


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported, and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        made.append(name)

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_a_name_gives_what_its_path_says():
    from icl_compiler.backends.echo import EchoBackend
    from retrievers.uniform import Uniform

    assert resolve("retriever", RETRIEVERS, "uniform") is Uniform
    assert resolve("backend", BACKENDS, "echo") is EchoBackend


def test_a_dotted_path_works_in_place_of_a_name(module):
    module("my_retriever", "class Mine: pass")
    assert resolve("retriever", RETRIEVERS, "my_retriever:Mine").__name__ == "Mine"


def test_a_dotted_path_that_is_not_trusted_is_not_even_imported(module):
    module("foreign_code", "raise SystemExit('foreign code ran')")
    with pytest.raises(RegistryError, match="unknown retriever 'foreign_code:Mine'"):
        resolve("retriever", RETRIEVERS, "foreign_code:Mine", trusted=False)
    assert "foreign_code" not in sys.modules


def test_a_name_of_the_table_wins_over_a_path():
    assert resolve("thing", {"json:dumps": "json:loads"}, "json:dumps").__name__ == "loads"


def test_unknown_names_get_a_hint():
    with pytest.raises(RegistryError) as caught:
        resolve("retriever", {"bm25": "a:B", "dense": "c:D"}, "bm52")
    assert str(caught.value) == "unknown retriever 'bm52'. Did you mean 'bm25'? Available: bm25, dense."
    with pytest.raises(RegistryError, match=r"unknown retriever ''. Available: bm25\.$"):
        resolve("retriever", {"bm25": "a:B"}, "")


@pytest.mark.parametrize("name", [":", ":Mine", "mine:", ".mine:Mine", "mine.:Mine", "my mine:Mine", "a:b:c", "../a:B"])
def test_what_is_no_path_is_refused_in_words(name):
    with pytest.raises(RegistryError, match=r"should look like 'my_package\.my_module:MyClass'"):
        resolve("retriever", RETRIEVERS, name)


def test_paths_that_lead_nowhere_are_told_apart(module):
    with pytest.raises(RegistryError, match="retriever 'no_such:Mine': there is no module 'no_such'"):
        resolve("retriever", RETRIEVERS, "no_such:Mine")
    with pytest.raises(RegistryError, match=r"there is no module 'json\.no_such'"):
        resolve("retriever", RETRIEVERS, "json.no_such:Mine")
    with pytest.raises(RegistryError, match="module 'json' has no 'Mine'"):
        resolve("retriever", RETRIEVERS, "json:Mine")


@pytest.mark.parametrize("module_name", ["wants_a_package", "no_such_package_either"])
def test_a_package_that_the_module_needs_is_named(module, module_name):
    # The second name begins like that of the missing package.
    module(module_name, "import no_such_package")
    with pytest.raises(MissingDependencyError, match=f"'{module_name}:X' needs .*: pip install no_such_package$"):
        resolve("retriever", RETRIEVERS, f"{module_name}:X")
