import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import LoopSettings, held_out_loss, train
from icl_compiler.errors import TrainingError


class Line:
    """Least squares on one parameter: its best value is the mean of the targets."""

    def __init__(self, targets: list[float], held_out: list[float]) -> None:
        self.value = torch.nn.Parameter(torch.zeros(()))
        self.targets = {False: torch.tensor(targets), True: torch.tensor(held_out)}
        self.seen: list[list[int]] = []

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.value]

    def losses(self, rows, *, held_out: bool) -> torch.Tensor:
        if not held_out:
            self.seen.append(list(rows))
        return (self.value - self.targets[held_out][list(rows)]) ** 2


def test_reaches_the_minimum_and_sees_every_row_once_an_epoch() -> None:
    line = Line([1.0, 3.0] * 16, [2.0] * 4)
    settings = LoopSettings(epochs=40, batch_size=8, learning_rate=0.2, patience=100)
    curve = train(line, examples=32, held_out=4, settings=settings)
    assert line.value.item() == pytest.approx(2, abs=0.1)
    assert sorted(row for rows in line.seen[:4] for row in rows) == list(range(32))
    assert curve[-1].held_out_loss < 0.1 < curve[0].held_out_loss


def test_ends_with_the_best_weights_not_the_last() -> None:
    line = Line([10.0] * 8, [1.0])  # training leads away from what is held out
    settings = LoopSettings(epochs=30, batch_size=4, learning_rate=0.5, patience=3)
    curve = train(line, examples=8, held_out=1, settings=settings)
    best = min(check.held_out_loss for check in curve)
    assert held_out_loss(line, 1, 4) == pytest.approx(best)
    assert best < curve[-1].held_out_loss
    assert len(curve) < 60, "it stops early"


def test_same_seed_same_order() -> None:
    orders = []
    for seed in (0, 0, 1):
        line = Line(list(np.arange(8.0)), [1.0])
        train(line, examples=8, held_out=1, settings=LoopSettings(learning_rate=0.1, epochs=2, batch_size=3, seed=seed))
        orders.append(line.seen)
    assert orders[0] == orders[1] != orders[2]


def test_a_loss_that_is_no_number_is_an_error() -> None:
    line = Line([math.nan] * 4, [1.0])
    with pytest.raises(TrainingError, match="smaller --learning-rate"):
        train(line, examples=4, held_out=1, settings=LoopSettings(learning_rate=0.1))


@pytest.mark.parametrize(("examples", "held_out"), [(0, 3), (3, 0)])
def test_empty_split(examples: int, held_out: int) -> None:
    with pytest.raises(TrainingError, match="both need at least one"):
        train(Line([1.0], [1.0]), examples=examples, held_out=held_out, settings=LoopSettings(learning_rate=0.1))


def test_reports_every_step() -> None:
    seen = []
    settings = LoopSettings(learning_rate=0.1, epochs=2, batch_size=4)
    train(Line([1.0] * 8, [1.0]), examples=8, held_out=1, settings=settings, report=lambda *args: seen.append(args[:2]))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = LoopSettings(epochs=10, batch_size=8, learning_rate=0.2, patience=100)
    targets = np.random.default_rng(0).random(64).tolist()

    def report(step: int, *_: object) -> None:
        if step == 50:
            raise KeyboardInterrupt

    whole, killed, resumed = (Line(targets, [0.3, 0.6]) for _ in range(3))
    expected = train(whole, examples=64, held_out=2, settings=settings)
    kept = Checkpoint(tmp_path / "state", "this training", every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(killed, examples=64, held_out=2, settings=settings, report=report, checkpoint=kept)
    found = train(resumed, examples=64, held_out=2, settings=settings, checkpoint=kept)
    assert [check[:3] for check in found] == [check[:3] for check in expected]
    assert resumed.value.item() == whole.value.item()
    assert resumed.seen == whole.seen[48:], "what was done before the last look is not done again"


def test_the_state_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "state", "one").save({"step": 3})
    assert Checkpoint(tmp_path / "state", "one").load() == {"step": 3}
    assert Checkpoint(tmp_path / "state", "other").load() is None
    (tmp_path / "state").write_bytes(b"half a file")
    assert Checkpoint(tmp_path / "state", "one").load() is None


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint(tmp_path / "state", "one")
    kept.save({"step": 3})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device; make space, and start the same command again"):
        kept.save({"step": 4})
    monkeypatch.undo()
    assert kept.load() == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
