from pathlib import Path

import pytest
from tiny_model import save_tiny_model
from toys import RoundedEcho

from evaluation import float32
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.errors import ModelError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def memory(tmp_path, monkeypatch):
    def has(kilobytes):
        file = tmp_path / "meminfo"
        file.write_text(
            f"MemTotal:       99999999 kB\nMemFree: 1 kB\nMemAvailable: {kilobytes} kB\nHugePages_Total: 0\n"
        )
        monkeypatch.setattr(float32, "_MEMINFO", file)

    return has


def test_an_engine_that_rounds_is_measured_by_its_model_in_float32(tiny, monkeypatch):
    engine = RoundedEcho()
    monkeypatch.setattr(engine, "model", tiny, raising=False)
    opener = float32.float32_opener(engine, tiny)
    assert opener().device.endswith(", float32")


def test_float32_and_no_model_need_no_other(monkeypatch):
    exact = EchoBackend()
    assert float32.float32_opener(exact, "echo") is None
    monkeypatch.setattr(exact, "model", "smollm2-135m", raising=False)
    monkeypatch.setattr(exact, "device", "cpu, float32", raising=False)
    assert float32.float32_opener(exact, "smollm2-135m") is None


def test_a_model_that_does_not_fit_is_not_opened(tiny, memory):
    size = (Path(tiny) / "model.safetensors").stat().st_size
    memory(2 * size // 1024 + 1)
    assert float32.float32_backend(tiny).device.endswith(", float32")
    memory(2 * size // 1024 - 1)
    with pytest.raises(ModelError, match=r"takes 0\.0 GB of memory in float32, and 0\.0 GB are available"):
        float32.float32_backend(tiny)


def test_where_the_system_does_not_say_the_model_is_opened(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(float32, "_MEMINFO", tmp_path / "not there")
    assert float32.float32_backend(tiny).model == tiny


def test_weights_that_are_elsewhere_are_not_fetched(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("icl_compiler.models.without_hub_use_its_cache", lambda: None)
    monkeypatch.setattr(float32, "open_backend", lambda *_, **__: pytest.fail("opened"))
    for model in (str(tmp_path), "nobody/there"):
        with pytest.raises(ModelError, match=f"the weights of {model!r} are not on this machine"):
            float32.float32_backend(model)


def test_a_model_of_the_hub_is_found_in_its_cache(tiny, monkeypatch):
    monkeypatch.setattr("icl_compiler.models.without_hub_use_its_cache", lambda: None)
    found = str(Path(tiny) / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: found)
    opened = []
    monkeypatch.setattr(float32, "open_backend", lambda *names, dtype: opened.append((*names, dtype)) or EchoBackend())
    float32.float32_backend("someone/something")
    assert opened == [("transformers", "someone/something", "float32")]
