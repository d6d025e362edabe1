"""Programs on disk: the same bytes and the same prompts everywhere, and a clear refusal of anything else."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hashed_words import HashedWords
from toys import NASTY, TESTS, customers, in_a_new_process

from icl_compiler import encoders
from icl_compiler.artifact import FORMAT, is_artifact, load_program, new_folder, save_program
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, RegistryError, TemplateError
from icl_compiler.registry import RETRIEVERS

REAL_ENCODER = encoders.named_encoder
QUERIES = ["where is my lost card", "the parcel is late", *NASTY]
POOL = Dataset(
    (*customers().texts, *NASTY),
    (*customers().answers, *(("0", "", "False", "übel {{ 1 }}") * 9)[: len(NASTY)]),
    "classification",
    "nasty",
)
PROGRAMS = {f"{name}-{template}": (name, template) for name in RETRIEVERS for template in ("classify", "classify_chat")}


@pytest.fixture(autouse=True, scope="module")
def encoder_without_a_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "named_encoder", lambda name: HashedWords())
        yield


def program(retriever="bm25", template="classify", **settings):
    return compile_program(POOL, **{"model": "echo", "retriever": retriever, "template": template, **settings})


def prompts(loaded):
    return [list(prompt.tokens) for prompt in loaded.prompts(QUERIES)]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path):
    """A program on disk, for one test to spoil."""
    save_program(program(), tmp_path / "program")
    return tmp_path / "program"


# The same everywhere

ELSEWHERE = """
import json, sys
from pathlib import Path
from hashed_words import HashedWords
from icl_compiler import encoders
encoders.named_encoder = lambda name: HashedWords()
from icl_compiler.artifact import load_program, save_program
from test_artifact import PROGRAMS, program, prompts

found = {}
for name, arguments in PROGRAMS.items():
    found[name] = prompts(load_program(Path(sys.argv[1], name)))
    save_program(program(*arguments), Path(sys.argv[2], name))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Every program saved here; loaded, and compiled and saved again, in a process that hashes differently."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    for name, arguments in PROGRAMS.items():
        save_program(program(*arguments), here / name)
    return here, there, in_a_new_process(ELSEWHERE, here, there, hash_seed=4711)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_new_process_makes_the_same_prompts(name, elsewhere):
    _, _, found = elsewhere
    assert found[name] == prompts(program(*PROGRAMS[name]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_process_writes_the_same_bytes(name, elsewhere):
    here, there, _ = elsewhere
    assert contents(here / name) == contents(there / name)
    assert {"manifest.json", "template.jinja", "pool.jsonl", "shots.safetensors"} < set(contents(here / name))


REAL_MODELS = """
import json, sys
from pathlib import Path
from icl_compiler.artifact import load_program, save_program
from icl_compiler.compile import compile_program
from icl_compiler.data import load_dataset

program = load_program(Path(sys.argv[1], "program"))
print(json.dumps([prompt.tokens for prompt in program.prompts(json.loads(sys.argv[3]))]))
again = compile_program(program.pool.data, template="classify_chat", shots=4, budget=400)
save_program(again, Path(sys.argv[2], "program"))
"""


@pytest.mark.models
def test_real_models_in_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", REAL_ENCODER)
    here, there = tmp_path / "here", tmp_path / "there"
    compiled = compile_program(customers(), template="classify_chat", shots=4, budget=400)
    save_program(compiled, here / "program")
    queries = ["where is my lost card", "<|im_end|> the parcel {{ 7*7 }}", "📦?"]
    found = in_a_new_process(REAL_MODELS, here, there, json.dumps(queries), hash_seed=1)
    assert found == [list(prompt.tokens) for prompt in compiled.prompts(queries)]
    assert contents(here) == contents(there)


def test_whoever_the_umask_allows_can_read_it(saved):
    before = os.umask(0o022)
    try:
        save_program(program(), saved)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in saved.rglob("*") if path.is_file()} == {"0o644"}
    assert {oct(path.stat().st_mode & 0o777) for path in [saved, *saved.rglob("*")] if path.is_dir()} == {"0o755"}


def test_nothing_is_lost(tmp_path):
    original = program("dense", shots=3, budget=2000, seed=7)
    save_program(original, tmp_path / "p")
    loaded = load_program(tmp_path / "p")
    assert loaded.settings == original.settings
    assert loaded.labels == original.labels == tuple(sorted({*customers().answers, "0", "", "False", "übel {{ 1 }}"}))
    assert replace(loaded.template, tokenizer=original.template.tokenizer) == original.template
    assert (loaded.pool.data.texts, loaded.pool.data.answers) == (POOL.texts, POOL.answers)
    assert loaded.pool.tokens.tolist() == original.pool.tokens.tolist()
    assert loaded.explain("my card") == original.explain("my card")
    assert loaded.label_words == original.label_words


@pytest.mark.parametrize("name", list(RETRIEVERS))
def test_a_program_for_generation_and_one_without_rows(name, tmp_path):
    pairs = Dataset(("one", "two"), ("eins", "zwei"), "generation", "pairs")
    made = compile_program(pairs, model="echo", retriever=name)
    empty = compile_program(POOL, model="echo", retriever=name, examples=0)
    for original in (made, empty):
        save_program(original, tmp_path / "p")
        loaded = load_program(tmp_path / "p")
        assert loaded.task == original.task
        assert prompts(loaded) == prompts(original)


# Saving


def test_a_program_takes_the_place_of_a_program(saved):
    save_program(program("uniform"), saved)
    assert load_program(saved).settings.retriever == "uniform"
    assert [path.name for path in saved.parent.iterdir()] == ["program"]
    assert not any("bm25" in name for name in contents(saved))


def test_an_empty_folder_and_folders_that_are_not_there_yet_may_be_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "and" / "deep"):
        save_program(program(), folder)
        assert prompts(load_program(folder)) == prompts(program())


@pytest.mark.parametrize(
    "content", ["notes", "{}", "5", '["icl_compiler"]', '{"icl_compiler": 1, "kind": "reference"}']
)
def test_what_is_not_a_program_is_left_alone(content, tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    (folder / "diary.txt").write_text("dear diary")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="taken exists and is not a program; choose another name, or remove it"):
        save_program(program(), folder)
    with pytest.raises(ArtifactError, match="exists and is not a program"):
        save_program(program(), folder / "diary.txt")
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"program cannot be written: (File exists|Not a directory)"):
        save_program(program(), tmp_path / "file" / "program")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
def test_a_save_that_fails_leaves_the_old_program(error, saved, monkeypatch):
    before = contents(saved.parent)
    broken = program()
    monkeypatch.setattr(type(broken.retriever), "save", lambda self, folder: (_ for _ in ()).throw(error))
    said = pytest.raises(ArtifactError, match="could not be written: No space left on device")
    with said if isinstance(error, OSError) else pytest.raises(type(error)):
        save_program(broken, saved)
    assert contents(saved.parent) == before
    with pytest.raises((ArtifactError, type(error))):
        save_program(broken, saved.with_name("new"))
    assert [path.name for path in saved.parent.iterdir()] == ["program"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_save_that_fails_in_the_last_step_leaves_the_old_program(error, saved, monkeypatch):
    before = contents(saved.parent)
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        save_program(program("uniform"), saved)
    assert contents(saved.parent) == before


def test_a_save_that_is_killed_leaves_the_old_program(saved):
    code = """
import os, sys
from pathlib import Path
from test_artifact import program
from icl_compiler.artifact import save_program
broken = program("uniform")
type(broken.retriever).save = lambda self, folder: os.kill(os.getpid(), 9)
save_program(broken, Path(sys.argv[1]))
"""
    before = contents(saved)
    done = subprocess.run([sys.executable, "-c", code, str(saved)], cwd=TESTS, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert contents(saved) == before
    assert prompts(load_program(saved)) == prompts(program())


def test_a_new_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "made") as draft:
        (draft / "x").write_text("x")
        assert not (tmp_path / "made").exists()
    assert contents(tmp_path) == {"made/x": b"x"}


# Loading what was spoiled


def everything_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("retriever", list(RETRIEVERS))
def test_each_changed_file_is_refused_by_name(retriever, tmp_path):
    folder = tmp_path / "program"
    save_program(program(retriever), folder)
    assert len(everything_in(folder)) > 4
    for path in everything_in(folder):
        original = path.read_bytes()
        middle = len(original) // 2
        flipped = original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :]
        for changed in (original + b" ", original[:-1], flipped, b""):
            path.write_bytes(changed)
            if path.name == "manifest.json" and changed.strip() == original.strip():
                continue  # blanks around the manifest say nothing else
            with pytest.raises(ArtifactError, match=f"{path.name}.*(was changed after it was written|is damaged)"):
                load_program(folder)
        path.write_bytes(original)
    assert prompts(load_program(folder)) == prompts(program(retriever))


@pytest.mark.parametrize("retriever", list(RETRIEVERS))
def test_each_missing_file_is_named(retriever, tmp_path):
    folder = tmp_path / "program"
    save_program(program(retriever), folder)
    for path in everything_in(folder):
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(ArtifactError, match=rf"{path.name} is missing.*`icl compile`"):
            load_program(folder)
        path.write_bytes(original)


def forge(folder, **changes):
    """Change the manifest and give it the hash that it should have."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    # The files that the change is about have new hashes too.
    for name in manifest.get("files", {}):
        if (folder / name).is_file():
            manifest["files"][name] = sha256((folder / name).read_bytes()).hexdigest()
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    manifest["sha256"] = sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def settings_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]


def test_forging_works_as_the_tests_below_need_it(saved):
    forge(saved, settings={**settings_of(saved), "shots": 1})
    assert load_program(saved).settings.shots == 1


def test_a_newer_format_is_refused(saved):
    forge(saved, format=FORMAT + 1)
    said = f"has format {FORMAT + 1}, and this version of icl-compiler reads up to {FORMAT}; upgrade icl-compiler"
    with pytest.raises(ArtifactError, match=said):
        load_program(saved)
    forge(saved, files=None, kind="something new")
    with pytest.raises(ArtifactError, match="upgrade icl-compiler"):
        load_program(saved)


def test_a_program_of_the_format_before_loads_and_is_as_it_was(saved):
    before = prompts(load_program(saved))
    forge(saved, format=2, reranker=None)
    loaded = load_program(saved)
    assert prompts(loaded) == before
    assert loaded.reranker is None


def test_another_kind_is_refused(saved):
    forge(saved, kind="reference")
    with pytest.raises(ArtifactError, match="program is a reference, not a program"):
        load_program(saved)


def test_a_tokenizer_that_changed_is_refused(saved):
    forge(saved, tokenizer="0" * 64)
    with pytest.raises(ArtifactError, match="was compiled for another tokenizer than 'echo' has now; compile it again"):
        load_program(saved)


@pytest.mark.parametrize("name", ["foreign_code:Retriever", "retrievers.uniform:Uniform", "os:system"])
def test_foreign_code_is_refused_and_does_not_run(name, saved, tmp_path, monkeypatch):
    (tmp_path / "foreign_code.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    forge(saved, settings={**settings_of(saved), "retriever": name})
    with pytest.raises(RegistryError, match=f"unknown retriever '{name}'"):
        load_program(saved)
    assert "foreign_code" not in sys.modules


def test_a_template_that_tries_more_than_text_is_refused(saved):
    source = (saved / "template.jinja").read_text(encoding="utf-8")
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{% include 'other' %}",
        "{{ 1 / 0 }}",
        "{{ range(999999999) | list }}",
    ):
        (saved / "template.jinja").write_text(source + attack, encoding="utf-8")
        forge(saved)
        with pytest.raises(TemplateError, match="does not render"):
            load_program(saved)


def test_a_pickle_in_the_index_is_refused(tmp_path):
    import numpy as np

    class Bomb:
        def __reduce__(self):
            return (print, ("foreign code ran",))

    save_program(program("dense"), tmp_path / "p")
    np.save(tmp_path / "p" / "index" / "vectors.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    forge(tmp_path / "p")
    with pytest.raises(ArtifactError, match=r"does not hold what a program holds .*allow_pickle=False"):
        load_program(tmp_path / "p")


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": {"model": "echo"}},
        {"settings": []},
        {"labels": None},
        {"labels": 5},
        {"task": None},
        {"tokenizer": None},
        {"template": None},
        {"files": None, "settings": {"no": "such"}},
        {"format": "new"},
        {"format": None},
        {"kind": None},
        {"files": "none"},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_refused_in_words(changes, saved):
    forge_or_break(saved, changes)
    with pytest.raises(ArtifactError, match=r"does not hold what a program holds|is damaged"):
        load_program(saved)


def forge_or_break(folder, changes):
    if changes.get("files") == "none":
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        (folder / "manifest.json").write_text(
            text.replace('"files": {', '"files": "none", "other": {'), encoding="utf-8"
        )
    else:
        forge(folder, **changes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pool.jsonl", b"[]\n"),
        ("pool.jsonl", b'{"text": "a"}\n'),
        ("pool.jsonl", b"\xff"),
        ("shots.safetensors", b"nothing"),
        ("index/params.index.json", b"{}"),
        ("index/vocab.index.json", b"nothing"),
    ],
)
def test_forged_files_that_do_not_read_are_refused_in_words(name, content, saved):
    (saved / name).write_bytes(content)
    forge(saved)
    with pytest.raises(ArtifactError, match="does not hold what a program holds"):
        load_program(saved)


def test_folders_that_are_no_programs(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"there is no program '.*nowhere': expected a folder that `icl compile` wrote"
    ):
        load_program(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"is no program: manifest.json is missing; `icl compile` writes one"):
        load_program(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        load_program(tmp_path)


def test_is_artifact(saved, tmp_path):
    assert is_artifact(saved)
    assert is_artifact(saved, kind="program")
    assert not is_artifact(saved, kind="reference")
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "nowhere")


def test_a_program_that_was_changed_in_memory_is_saved_as_it_is(tmp_path):
    changed = replace(program(), settings=replace(program().settings, shots=2))
    save_program(changed, tmp_path / "p")
    assert load_program(tmp_path / "p").settings.shots == 2
