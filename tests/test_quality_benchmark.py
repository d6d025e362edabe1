"""The benchmark of the levels, on a toy and without a model: all systems answer, and figures are those by hand."""

import numpy as np
import pytest
from hashed_words import HashedWords

from benchmarks import quality
from icl_compiler import compile as compiling
from icl_compiler.backends.backend import Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.data import Dataset
from icl_compiler.predictor import Predictions


@pytest.fixture
def task(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "named_encoder", lambda name: HashedWords())
    monkeypatch.chdir(tmp_path)
    texts = [f"{word} {i}" for i in range(30) for word in ("card", "parcel")]
    data = Dataset(tuple(texts), tuple(text.split()[0] for text in texts), "classification", "toy")
    pool, queries = data.take(range(40)), data.take(range(40, 60))
    return quality.Task("toy", pool, queries, 400, 100, 0, EchoBackend(), None)


@pytest.mark.parametrize("system", quality.SYSTEMS)
def test_every_system_answers(system, task):
    row = quality.measure(system, task)
    assert 0 <= row["accuracy"] <= 1
    assert row["calls"] <= 100 + 100 * (system == "O1-calibrated")
    assert (row["calls"] > 0) == (system in ("O1-calibrated", "O2"))
    if system == "vote":
        assert row["accuracy"] == 1  # the words tell the labels


def test_figures_by_hand(task, monkeypatch):
    said = Predictions(
        ("card", "parcel"), np.tile([0.4, 0.1], (20, 1)), np.full(20, 7), Usage(0, 0, 0), 10.0
    )  # fmt: skip
    monkeypatch.setitem(quality.SYSTEMS, "fixed", lambda task: quality.Answer(said, 3.0, 5, {}))
    row = quality.measure("fixed", task)
    assert (row["accuracy"], row["label_mass"], row["tokens"], row["seconds"]) == (0.5, 0.5, 7, 0.5)
    assert row["log_loss"] == pytest.approx(-(np.log(0.4) + np.log(0.1)) / 2)
    assert row["log_loss_of_labels"] == pytest.approx(-(np.log(0.8) + np.log(0.2)) / 2)
