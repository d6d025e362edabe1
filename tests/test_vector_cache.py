"""The file of vectors: what is added is found, by every process, whatever happens to the file."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import NASTY, TESTS

from icl_compiler.models import locate
from retrievers.encoder import SentenceEncoder, model_identity
from retrievers.vector_cache import VectorCache

TEXTS = [*NASTY, "a text", "\ud800 half a pair"]


def vectors(texts, width=8):
    return {
        text: np.random.default_rng([ord(letter) for letter in text]).normal(size=width).astype(np.float32)
        for text in texts
    }


def same(found, expected):
    return list(found) == list(expected) and all(found[text].tolist() == expected[text].tolist() for text in found)


@pytest.fixture
def filled(tmp_path):
    VectorCache(tmp_path, "a model").add(vectors(TEXTS))
    [path] = tmp_path.iterdir()
    return path


def read(path, texts=TEXTS, identity="a model"):
    return VectorCache(path.parent, identity).get(texts)


def test_what_is_added_is_found(filled):
    assert same(read(filled), vectors(TEXTS))
    assert read(filled, ["not there", "a text", "a text"]).keys() == {"a text"}
    assert read(filled, identity="another model") == {}


def test_nothing_is_found_where_nothing_is(tmp_path):
    cache = VectorCache(tmp_path / "not" / "yet", "a model")
    assert cache.get(TEXTS) == {}
    cache.add({})
    assert not (tmp_path / "not").exists()
    cache.add(vectors(["a text"]))
    assert same(cache.get(["a text"]), vectors(["a text"]))


def test_what_another_adds_is_found_later(tmp_path):
    first, second = VectorCache(tmp_path, "a model"), VectorCache(tmp_path, "a model")
    for number in range(5):
        first.add(vectors([f"first {number}"]))
        second.add(vectors([f"second {number}"]))
    texts = [f"{who} {number}" for who in ("first", "second") for number in range(5)]
    assert same(first.get(texts), vectors(texts))
    assert same(second.get(texts), vectors(texts))


@pytest.mark.parametrize("lost", [1, 20, 67, 68])
def test_a_torn_write_costs_one_vector(filled, lost):
    os.truncate(filled, filled.stat().st_size - lost)
    assert same(read(filled), vectors(TEXTS[:-1]))
    reader = VectorCache(filled.parent, "a model")
    assert same(reader.get(TEXTS), vectors(TEXTS[:-1]))
    # The next writer begins where the last whole record ends.
    VectorCache(filled.parent, "a model").add(vectors(["new", TEXTS[-1]]))
    assert same(read(filled, [*TEXTS, "new"]), vectors([*TEXTS, "new"]))
    assert same(reader.get([*TEXTS, "new"]), vectors([*TEXTS, "new"]))


@pytest.mark.parametrize("place", [0, 40, 60, 67])
def test_a_damaged_record_is_as_if_not_there(filled, place):
    content = bytearray(filled.read_bytes())
    content[16 + 3 * 68 + place] ^= 1
    filled.write_bytes(content)
    assert read(filled).keys() == set(TEXTS) - {TEXTS[3]}
    VectorCache(filled.parent, "a model").add(vectors([TEXTS[3]]))
    assert same(read(filled), vectors(TEXTS))


@pytest.mark.parametrize("content", [b"", b"icl", b"\0" * 16, b"something else" * 100])
def test_a_file_of_something_else_is_begun_anew(filled, content):
    filled.write_bytes(content)
    reader = VectorCache(filled.parent, "a model")
    assert reader.get(TEXTS) == {}
    VectorCache(filled.parent, "a model").add(vectors(TEXTS))
    assert same(reader.get(TEXTS), vectors(TEXTS))


def test_a_file_that_shrinks_or_vanishes_under_a_reader(filled):
    reader = VectorCache(filled.parent, "a model")
    assert len(reader.get(TEXTS)) == len(TEXTS)
    os.truncate(filled, 16 + 2 * 68)
    assert same(reader.get(TEXTS), vectors(TEXTS[:2]))
    filled.unlink()
    assert reader.get(TEXTS) == {}
    reader.add(vectors(["a text"]))
    assert same(reader.get(TEXTS), vectors(["a text"]))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = VectorCache(tmp_path / "file" / "folder", "a model")
    cache.add(vectors(["a text"]))
    assert cache.get(["a text"]) == {}


def test_more_records_than_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("retrievers.vector_cache._BLOCK", 3)
    texts = [f"text {number}" for number in range(20)]
    cache = VectorCache(tmp_path, "a model")
    cache.add(vectors(texts))
    assert same(cache.get(texts), vectors(texts))
    assert same(VectorCache(tmp_path, "a model").get(texts), vectors(texts))


def test_a_full_file_gives_way_to_its_newer_half(tmp_path, monkeypatch):
    monkeypatch.setattr("retrievers.vector_cache._MOST_BYTES", 40 * 68)
    reader, writer = VectorCache(tmp_path, "a model"), VectorCache(tmp_path, "a model")
    texts = [f"text {number}" for number in range(100)]
    for number, text in enumerate(texts):
        writer.add(vectors([text]))
        assert same(reader.get([text]), vectors([text]))
        [path] = tmp_path.iterdir()
        assert path.stat().st_size <= 40 * 68
        kept = list(reader.get(texts))
        assert kept == texts[number + 1 - len(kept) : number + 1]
        assert len(kept) >= min(number + 1, 20)


WRITER = """
import sys
from pathlib import Path
from test_vector_cache import vectors
from retrievers.vector_cache import VectorCache
cache = VectorCache(Path(sys.argv[1]), "a model")
for number in range(150):
    cache.add(vectors([f"{sys.argv[2]} {number} {place}" for place in range(3)]))
    assert len(cache.get([f"{sys.argv[2]} {number} {place}" for place in range(3)])) == 3
"""


def test_two_processes_write_at_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who], env=environment, cwd=TESTS.parent)
        for who in ("first", "second")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    texts = [f"{who} {number} {place}" for who in ("first", "second") for number in range(150) for place in range(3)]
    assert same(VectorCache(tmp_path, "a model").get(texts), vectors(texts))
    [path] = tmp_path.iterdir()
    assert path.stat().st_size == 16 + 900 * 68


def test_processes_write_at_once_into_a_file_that_gives_way(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    small = "import retrievers.vector_cache as cache; cache._MOST_BYTES = 50 * 68\n"
    code = small + WRITER.replace("    assert", "    #")  # the other's may have pushed it out
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), who], env=environment, cwd=TESTS.parent)
        for who in ("first", "second")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    [path] = tmp_path.iterdir()
    assert (path.stat().st_size - 16) % 68 == 0
    texts = [f"{who} {number} {place}" for who in ("first", "second") for number in range(150) for place in range(3)]
    found = VectorCache(tmp_path, "a model").get(texts)
    assert 25 <= len(found) <= 50
    assert same(found, vectors(found))


# The encoder with a cache


class Model:
    """Stands for the model of `sentence-transformers`."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts, **settings):
        self.encoded += texts
        return HashedWords().encode(texts)


def encoder(folder, model, name):
    made = SentenceEncoder(lambda: str(name), cache=folder)
    made.__dict__["_encoder"] = model
    return made


def test_a_text_is_encoded_once_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("retrievers.encoder._FEW", 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    first, second, third = Model(), Model(), Model()
    texts = ["a", "b c", "a"]
    np.testing.assert_array_equal(
        encoder(tmp_path / "kept", first, tmp_path / "model").encode(texts), HashedWords().encode(texts)
    )
    np.testing.assert_array_equal(
        encoder(tmp_path / "kept", second, tmp_path / "model").encode([*texts, "d"]),
        HashedWords().encode([*texts, "d"]),
    )
    assert (first.encoded, second.encoded) == (["a", "b c"], ["d"])
    # Another model in the same folder.
    (tmp_path / "model" / "config.json").write_text('{"another": 1}')
    encoder(tmp_path / "kept", third, tmp_path / "model").encode(texts)
    assert third.encoded == ["a", "b c"]


def test_a_few_texts_are_nobodys_to_keep(tmp_path):
    (tmp_path / "model").mkdir()
    encoder(tmp_path / "kept", Model(), tmp_path / "model").encode([f"text {number}" for number in range(100)])
    assert not (tmp_path / "kept").exists()
    encoder(tmp_path / "kept", Model(), tmp_path / "model").encode([f"text {number}" for number in range(101)])
    assert (tmp_path / "kept").exists()


def test_a_model_that_cannot_be_told_from_others_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("retrievers.encoder._FEW", 0)
    model = Model()
    for _ in range(2):
        encoder(tmp_path / "kept", model, "nobody/such-model").encode(["a"])
    assert model.encoded == ["a", "a"]
    assert not (tmp_path / "kept").exists()


def test_the_identity_of_a_model(tmp_path):
    (tmp_path / "a.json").write_text("1")
    before = model_identity(tmp_path, "numpy")
    assert model_identity(tmp_path, "numpy") == before
    (tmp_path / "a.json").write_text("12")
    longer = model_identity(tmp_path, "numpy")
    os.utime(tmp_path / "a.json", ns=(1, 1))
    assert len({before, longer, model_identity(tmp_path, "numpy")}) == 3


@pytest.mark.models
def test_a_model_is_not_loaded_where_all_vectors_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("retrievers.encoder._FEW", 1)
    first, second = (SentenceEncoder(lambda: locate("minilm"), cache=tmp_path) for _ in range(2))
    assert first.encode(["a text", ""]).tolist() == second.encode(["a text", ""]).tolist()
    assert "_encoder" in vars(first)
    assert "_encoder" not in vars(second)
