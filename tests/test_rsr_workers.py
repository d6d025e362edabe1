import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import save_tiny_model

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import Task
from evaluation.reference.objective import TrainingExample
from evaluation.reference.rsr import training
from evaluation.reference.rsr.modules import MOST_ASPECTS, aspects_of, co_cluster, modules_of
from evaluation.reference.rsr.rsr import RSR
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.workers import Outcome, Workers, train_together
from icl_compiler.errors import TrainingError

LABELS = ("0", "1", "2", "3")
LOOP = LoopSettings(epochs=4, batch_size=8, learning_rate=1e-2, patience=9)
METHOD = RSR(
    budget=0.16, frontier=1, unit=8, rounds=4, line_search=False, importance="agreement", replaced=0.3, trails=True
)


@pytest.fixture(autouse=True)
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "bfloat16", False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # the same, in processes that are started


@pytest.fixture(autouse=True)
def one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers cannot load in several threads at once."""
    lock, load = threading.Lock(), Task.load

    def alone(task: Task, dtype: torch.dtype) -> torch.nn.Module:
        with lock:
            return load(task, dtype)

    monkeypatch.setattr(Task, "load", alone)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Of 50 examples: the last batch of an epoch has two, too few for three workers."""
    rng = np.random.default_rng(0)
    classes = [int(c) for c in rng.integers(4, size=62)]
    words = [[*rng.integers(20, 24, 3).tolist(), 30 + 5 * c + int(rng.integers(5))] for c in classes]
    examples = [TrainingExample([3, 4, *word], [60 + c, 9]) for word, c in zip(words, classes, strict=True)]
    answers = tuple(str(c) for c in classes)
    folder = str(save_tiny_model(tmp_path / "model"))
    return Task(folder, examples[:50], examples[50:], LABELS, answers[:50], answers[50:], gpu=False)


@dataclass
class Table:
    """Where threads lay down what they have, until all have."""

    barrier: threading.Barrier
    things: dict[int, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Threads(Workers):
    """Workers in threads, in place of processes: sums and gathers as they are meant."""

    table: Table = field(default_factory=lambda: Table(threading.Barrier(1)))

    def _add_up(self, flat: torch.Tensor) -> None:
        flat.copy_(torch.stack(self._gather(flat.clone())).sum(dim=0))

    def _gather(self, value: object) -> list:
        self.table.things[self.rank] = value
        self.table.barrier.wait(60)
        found = [self.table.things[rank] for rank in range(self.count)]
        self.table.barrier.wait(60)
        return found


def train_in_threads(method: RSR, task: Task, loop: LoopSettings = LOOP) -> list[Outcome]:
    table = Table(threading.Barrier(method.workers))
    outcomes: dict[int, Outcome] = {}
    errors: list[Exception] = []

    def work(rank: int) -> None:
        try:
            outcomes[rank] = method.train(task, loop, None, Threads(rank, method.workers, table))
        except Exception as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(method.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [outcomes[rank] for rank in range(method.workers)]


def losses(outcome: Outcome) -> np.ndarray:
    return np.array([(check.train_loss, check.held_out_loss) for check in outcome.curve])


def assert_same(found: Outcome, expected: Outcome, within: float = 1e-4) -> None:
    np.testing.assert_array_equal(found.units, expected.units)
    np.testing.assert_allclose(found.change, expected.change, atol=within, rtol=0)
    np.testing.assert_allclose(losses(found), losses(expected), atol=within, rtol=0)


def assert_all_alike(outcomes: Sequence[Outcome]) -> None:
    for other in outcomes[1:]:
        assert_same(other, outcomes[0], within=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 2},
        {"workers": 3, "modules": 2, "sampling": 0.3},
        {"workers": 13, "trails": False, "importance": "fisher"},
    ],
)
def test_shared_batches_are_those_of_one_worker(task: Task, settings: dict) -> None:
    """Thirteen: more than examples in a batch, and than are held out."""
    method = replace(METHOD, **settings)
    outcomes = train_in_threads(method, task)
    assert_all_alike(outcomes)
    assert_same(outcomes[0], replace(method, workers=1).train(task, LOOP))


def test_modules_put_together_after_each_step_are_one_worker(task: Task) -> None:
    method = replace(METHOD, workers=3, modules=3, schedule="modules", exchange_every=1)
    outcomes = train_in_threads(method, task)
    assert_all_alike(outcomes)
    assert_same(outcomes[0], replace(method, workers=1, schedule="data").train(task, LOOP))


@pytest.mark.parametrize("exchange_every", [1, 3])
def test_the_mean_of_workers_who_saw_the_same_is_one_worker(task: Task, exchange_every: int) -> None:
    same = replace(task, train=[task.train[0]] * 48, answers=("0",) * 48)
    method = replace(METHOD, workers=2, schedule="local", exchange_every=exchange_every)
    assert_same(train_in_threads(method, same)[0], replace(method, workers=1).train(same, LOOP))


@pytest.mark.parametrize("schedule", ["local", "modules"])
def test_workers_with_steps_of_their_own_learn_and_agree(task: Task, schedule: str) -> None:
    method = replace(METHOD, workers=2, modules=2, schedule=schedule, exchange_every=3, line_search=True)
    outcomes = train_in_threads(method, task)
    assert_all_alike(outcomes)
    curve = losses(outcomes[0])
    assert (curve[-1] < 0.8 * curve[0]).all()
    alone = replace(method, workers=1, schedule="data").train(task, LOOP)
    assert np.abs(curve[-1] / losses(alone)[-1] - 1).max() < 0.25
    assert np.abs(curve - losses(alone)).max() > 1e-3, "between two meetings they do not see each other's steps"


def test_a_loss_that_is_no_number_is_told_by_all(task: Task) -> None:
    method = replace(METHOD, workers=2, schedule="local", exchange_every=3)
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+ of 28; train with a smaller"):
        train_in_threads(method, task, replace(LOOP, learning_rate=float("inf")))


def test_a_killed_worker_ends_all_and_the_same_call_goes_on(task: Task, tmp_path: Path) -> None:
    task = replace(task, checkpoint=Checkpoint(tmp_path / "state", every_s=0.0))
    method = replace(METHOD, workers=2)
    killed = []

    def kill(step: int, *_: object) -> None:
        if step == 16:
            second = max(multiprocessing.active_children(), key=lambda process: process.name)
            os.kill(second.pid, signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(TrainingError, match="worker 2 of 2 was killed by SIGKILL before the training was done"):
        method.fit(task, LOOP, kill)
    assert time.monotonic() - killed[0] < 10
    assert not multiprocessing.active_children()
    steps: list[int] = []
    outcomes = train_together(method, task, LOOP, lambda step, *_: steps.append(step))
    assert steps[0] > 7, "what was learned before was taken up"
    assert steps[-1] == 28
    assert_all_alike(outcomes)
    assert_same(outcomes[0], replace(method, workers=1).train(replace(task, checkpoint=Checkpoint()), LOOP))


def test_each_module_goes_its_own_step(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out is what training leads away from: so less is better, and what the search says is done."""
    task = replace(task, held_out=[example._replace(answer=[20, 21]) for example in task.held_out])
    method = replace(METHOD, modules=2, rounds=1, line_search=True)
    asked = []

    def train(*steps: float) -> Outcome:
        monkeypatch.setattr(training, "best_steps", lambda *given: asked.append(given) or np.array(steps))
        return method.train(task, replace(LOOP, learning_rate=0.1))

    both, first, second = train(1.0, 1.0), train(1.0, 0.0), train(0.0, 1.0)
    order = np.argsort(np.concatenate([first.units, second.units]))
    np.testing.assert_array_equal(np.concatenate([first.units, second.units])[order], both.units)
    np.testing.assert_allclose(np.concatenate([first.change, second.change])[order], both.change, rtol=1e-6)
    _, ends = asked[0]
    for outcome, end in zip((first, second), ends, strict=True):
        model = task.load(torch.float32)
        Synapses(model, frontier=1, size=8).add(torch.from_numpy(outcome.units), torch.from_numpy(outcome.change))
        expected = task.objective(model).logits(range(12), held_out=True).logits
        torch.testing.assert_close(end.logits.float(), expected, atol=0.1, rtol=0.01)


def test_co_clustering_finds_the_blocks() -> None:
    rng = np.random.default_rng(0)
    units, aspects = rng.permutation(np.arange(90) % 3), rng.permutation(np.arange(9) % 3)
    norms = np.where(units[:, None] == aspects, 1.0, 0.05) * rng.uniform(0.5, 1.5, (90, 9))
    norms *= rng.lognormal(0, 1, (90, 1))  # some units have more gradient than others
    found = co_cluster(np.vstack([norms, np.zeros((1, 9))]), 3, seed=0)
    assert len(set(zip(units, found.units[:90], strict=True))) == 3
    assert len(set(zip(aspects, found.aspects, strict=True))) == 3
    np.testing.assert_array_equal(modules_of(norms, found.aspects), found.units[:90])


def test_labels_of_the_same_words_are_one_aspect() -> None:
    labels = list(range(2 * MOST_ASPECTS)) * 3
    examples = [TrainingExample([3, 4, 5, 6, 50 + label // 2, 20 + i % 3], [7]) for i, label in enumerate(labels)]
    found = aspects_of(examples, [f"{label:02}" for label in labels], seed=0)
    assert len(set(found)) == MOST_ASPECTS
    assert len({(label // 2, aspect) for label, aspect in zip(labels, found, strict=True)}) == MOST_ASPECTS
    assert aspects_of(examples[:5], seed=0).tolist() == [0, 1, 2, 3, 4]


def test_settings_that_do_not_fit(task: Task) -> None:
    with pytest.raises(TrainingError, match="there are 2 workers for 1 modules; give both the same number"):
        RSR(workers=2, schedule="modules")
    with pytest.raises(TrainingError, match="at most 16, is 17"):
        RSR(modules=17)
    with pytest.raises(TrainingError, match="exchange_every should be at least 1, is 0"):
        RSR(exchange_every=0)
    with pytest.raises(TrainingError, match="at most the number of labels, 4; is 5"):
        replace(METHOD, modules=5).train(task, LOOP)
