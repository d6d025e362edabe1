from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import Fitted, Task, make_method
from evaluation.reference.objective import AnswerLogits, AnswerLoss, TrainingExample
from evaluation.reference.rsr import synapses as synapses_module
from evaluation.reference.rsr.boosting import best_steps, one_sided
from evaluation.reference.rsr.importance import allocate, probe
from evaluation.reference.rsr.rsr import RSR
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.training import Refinement
from icl_compiler.errors import TrainingError

EXAMPLES = [
    TrainingExample([3, 4, 20, 21], [5, 9]),
    TrainingExample([3, 4, 22], [6, 9]),
    TrainingExample([3, 4, 20, 21, 23, 24], [5, 7, 9]),
    TrainingExample([30], [8]),
]
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def oriented(weight: torch.Tensor, kind: str) -> torch.Tensor:
    return weight.T if kind in COLUMNS else weight


def whole_gradients(folder: Path, rows: list[int], frontier: int) -> torch.Tensor:
    """By torch alone, on the untouched model: all gradients, oriented, in the order of the units."""
    model = load(folder)
    AnswerLoss(model, EXAMPLES, EXAMPLES, bfloat16=False).losses(rows, held_out=False).mean().backward()
    parts = []
    for layer in list(model.base_model.layers)[frontier:]:
        for kind in (*KINDS, "mlp.down_proj"):
            parts.append(oriented(layer.get_submodule(kind).weight.grad, kind).reshape(-1))
    return torch.cat(parts)


def backward(model: torch.nn.Module, rows: list[int], frontier: int) -> None:
    objective = AnswerLoss(model, EXAMPLES, EXAMPLES, frontier=frontier, bfloat16=False)
    objective.losses(rows, held_out=False).mean().backward()


@pytest.mark.parametrize("frontier", [0, 1])
@pytest.mark.parametrize("size", [None, 8, 1])
@pytest.mark.parametrize("step", [1, 1000])  # piece by piece, where few units of each piece move; and whole matrices
def test_gradient_of_chosen_units_is_torchs(
    folder: Path, frontier: int, size: int | None, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synapses_module, "_ROWS_STEP", step)
    expected = whole_gradients(folder, [0, 1, 2, 3], frontier).reshape(-1, size or 32)
    model = load(folder)
    synapses = Synapses(model, frontier=frontier, size=size)
    assert len(synapses) == len(expected)
    units = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(synapses))[: len(synapses) // 3]))
    synapses.select(units)
    backward(model, [0, 1, 2, 3], frontier)
    torch.testing.assert_close(synapses.gradient, expected[units], atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_changes_are_written_kept_taken_up_again_and_taken_back(folder: Path) -> None:
    model = load(folder)
    synapses = Synapses(model)
    before = torch.cat([synapses.weight(n).reshape(-1, 32).clone() for n in range(len(synapses.matrices))])

    def now() -> torch.Tensor:
        return torch.cat([synapses.weight(n).reshape(-1, 32) for n in range(len(synapses.matrices))]) - before

    first, second = torch.tensor([1, 40, 200]), torch.tensor([1, 7, 300])
    synapses.select(first)
    synapses.change += 1.0
    synapses.show()
    synapses.select(second)
    assert synapses.change[:, 0].tolist() == [1, 0, 0]
    synapses.change += 2.0
    synapses.show()
    synapses.forget(torch.tensor([7]))
    moved = now()
    expected = torch.zeros_like(moved)
    for unit, value in ((1, 3.0), (40, 1.0), (200, 1.0), (300, 2.0)):
        expected[unit] = value
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)
    units, change = synapses.changes()
    assert units.tolist() == [1, 40, 200, 300]
    assert change[:, 0].tolist() == [3, 1, 1, 2]
    assert synapses.touched.tolist() == [1, 7, 40, 200, 300]


def test_small_steps_add_up_in_a_coarse_format(folder: Path) -> None:
    synapses = Synapses(load(folder).to(torch.bfloat16))
    synapses.select(torch.tensor([5]))
    before = synapses.weight(0)[5].float().clone()
    for _ in range(1000):
        synapses.change += 1e-4
        synapses.show()
    torch.testing.assert_close(synapses.weight(0)[5].float(), before + 0.1, atol=1e-3, rtol=1e-2)


def test_a_model_with_changes_added_is_an_ordinary_one(folder: Path) -> None:
    model, ids = load(folder), torch.tensor([[3, 4, 5]])
    plain = load(folder)
    with torch.no_grad():
        plain.base_model.layers[0].self_attn.q_proj.weight[2] += 0.5
    Synapses(model).add(torch.tensor([2]), torch.full((1, 32), 0.5))
    assert {name for name, _ in model.named_modules()} == {name for name, _ in plain.named_modules()}
    assert type(model.base_model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", ["agreement", "l1", "fisher", "sensitivity"])
def test_importance_is_its_formula_on_torchs_gradients(folder: Path, kind: str) -> None:
    pairs = [([0], [1]), ([2], [3])]
    g = {i: whole_gradients(folder, [i], 0).reshape(-1, 32) for i in range(4)}
    model = load(folder)
    synapses = Synapses(model)
    found = probe(synapses, lambda rows: backward(model, list(rows), 0), pairs, kind)  # type: ignore[arg-type]
    weights = torch.cat([synapses.weight(n).reshape(-1, 32) for n in range(len(synapses.matrices))])
    expected = {
        "agreement": ((g[0] * g[1] + g[2] * g[3]).sum(1) / 2).clamp_min(0).sqrt(),
        "l1": sum(x.abs().sum(1) for x in g.values()) / 4,
        "fisher": sum(x.square().sum(1) for x in g.values()) / 4,
        "sensitivity": sum((x * weights).sum(1).abs() for x in g.values()) / 4,
    }[kind]
    rounding = 2e-3 if kind == "agreement" else 1e-4  # the first of a pair is kept in bfloat16
    torch.testing.assert_close(found, expected, atol=rounding, rtol=2e-2)


def test_allocation(folder: Path) -> None:
    synapses = Synapses(load(folder))
    scores = torch.zeros(len(synapses))
    scores[[3, 50, 90]] = torch.tensor([1.0, 2.0, 3.0])

    def chosen(kind: str, count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return allocate(synapses, scores, count, kind, generator).tolist()  # type: ignore[arg-type]

    assert chosen("top", 2) == [50, 90]
    assert chosen("gumbel", 3) == [3, 50, 90], "what has a score goes before what has none"
    share = np.mean([90 in chosen("gumbel", 1, seed) for seed in range(400)])
    assert abs(share - 0.5) < 0.08, "drawn in proportion: 3 of 6"
    by_matrix = np.bincount(synapses.matrix_of(torch.tensor(chosen("matrix", 56))).numpy())
    rows = np.array([matrix.rows for matrix in synapses.matrices])
    assert abs(by_matrix - 56 * rows / rows.sum()).max() < 1
    assert len(set(chosen("top", 100))) == 100


def test_units_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(TrainingError, match="a divisor of the model's width 32 long, is now 5"):
        Synapses(load(folder), size=5)
    with pytest.raises(TrainingError, match="from 0 to 1, is now 2"):
        Synapses(load(folder), frontier=2)


def examples(count: int, seed: int) -> list[TrainingExample]:
    """The answer is told by the token before it, two of which stand for each answer."""
    rng = np.random.default_rng(seed)
    return [
        TrainingExample([3, *rng.integers(40, 90, 4).tolist(), 20 + kind], [5 + kind % 4, 9])
        for kind in rng.integers(0, 8, count).tolist()
    ]


@pytest.fixture
def task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(Task, "bfloat16", False)
    return Task(str(folder), examples(96, 0), examples(32, 1), gpu=False)


LOOP = LoopSettings(epochs=10, batch_size=16, learning_rate=2e-2, patience=10)
EVERY_PART = RSR(importance="agreement", replaced=0.3, trails=True)
SMALL = replace(EVERY_PART, budget=0.1, frontier=0, rounds=5)


def saved(fitted: Fitted, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder.mkdir()
    fitted.save(folder)
    return load_file(folder / "difference.safetensors")


@pytest.mark.parametrize(
    "method",
    [
        SMALL,
        replace(SMALL, unit=8, revert=True),
        replace(SMALL, sampling=0.3, importance="fisher", allocation="matrix"),
        replace(SMALL, replaced=0.0, line_search=False, trails=False),
        RSR(budget=0.1, frontier=0),
    ],
)
def test_learns_with_few_numbers_and_the_kept_difference_is_what_was_trained(
    task: Task, tmp_path: Path, method: RSR
) -> None:
    fitted = method.fit(task, LOOP)
    losses = [check.held_out_loss for check in fitted.curve]
    assert min(losses) < 0.5 * losses[0]
    kept = saved(fitted, tmp_path / "r")
    assert kept["change"].numel() <= fitted.trained_parameters
    manifest = {"base_model": task.model, **fitted.facts}
    model = RSR.network(tmp_path / "r", manifest)
    with torch.no_grad():
        again = task.objective(model).losses(range(32), held_out=True).mean().item()
    # The line search measures with logits in bfloat16.
    assert again == pytest.approx(min(losses), rel=2e-2 if method.line_search else 1e-4)


def test_same_seed_same_result(task: Task, tmp_path: Path) -> None:
    first, second = (saved(SMALL.fit(task, LOOP), tmp_path / name) for name in "ab")
    assert torch.equal(first["units"], second["units"])
    assert torch.equal(first["change"], second["change"])


def test_killed_and_resumed_equals_uninterrupted(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SMALL.fit(task, LOOP)
    kept = replace(task, checkpoint=Checkpoint(tmp_path / "state", "key", every_s=0.0))
    train_round = Refinement._train_round

    def killed(self: Refinement, state: Any, *others: Any) -> Any:
        if state.round == 3:
            raise KeyboardInterrupt
        return train_round(self, state, *others)

    monkeypatch.setattr(Refinement, "_train_round", killed)
    with pytest.raises(KeyboardInterrupt):
        SMALL.fit(kept, LOOP)
    monkeypatch.undo()
    monkeypatch.setattr(Task, "bfloat16", False)
    rounds: list[int] = []
    monkeypatch.setattr(
        Refinement, "_train_round", lambda self, state, *o: rounds.append(state.round) or train_round(self, state, *o)
    )
    resumed = SMALL.fit(kept, LOOP)
    assert rounds == [3, 4]
    for a, b in zip(whole.curve, resumed.curve, strict=True):
        assert (a.step, a.held_out_loss) == (b.step, pytest.approx(b.held_out_loss, abs=1e-5))
    first, second = saved(whole, tmp_path / "a"), saved(resumed, tmp_path / "b")
    assert torch.equal(first["units"], second["units"])
    torch.testing.assert_close(first["change"], second["change"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [SMALL, replace(SMALL, rounds=1), replace(SMALL, rounds=2, replaced=0.9), replace(SMALL, revert=False)]
)
def test_never_more_than_the_budget_moves(task: Task, method: RSR) -> None:
    """Whatever enters and leaves; and not much less either."""
    parameters = sum(weight.numel() for weight in load(Path(task.model)).parameters())
    share = method.fit(task, replace(LOOP, patience=100)).trained_parameters / parameters
    assert 0.9 * method.budget < share <= method.budget


def test_steps_of_a_round_minimise_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 6, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    ways = [torch.nn.functional.one_hot(targets, 6) + torch.randn(40, 6, generator=generator) for _ in range(2)]
    before = AnswerLogits(logits, targets, [1] * 40)
    found = best_steps(before, [before._replace(logits=logits + way) for way in ways])
    grid = np.linspace(0, 2, 81)
    losses = [
        [AnswerLogits(logits + x * ways[0] + y * ways[1], targets, [1] * 40).losses().mean().item() for y in grid]
        for x in grid
    ]
    x, y = np.unravel_index(np.argmin(losses), (81, 81))
    np.testing.assert_allclose(found, [grid[x], grid[y]], atol=0.06)


def test_one_sided_sampling_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    residuals = rng.random(50)
    values = rng.random(50)
    means = []
    for seed in range(3000):
        sample = one_sided(residuals, 0.2, np.random.default_rng(seed))
        assert len(sample.rows) == 20
        assert set(np.argsort(-residuals)[:10]) <= set(sample.rows)
        means.append((values[sample.rows] * sample.weights).sum() / 50)
    assert np.mean(means) == pytest.approx(values.mean(), abs=0.005)


def test_settings_that_mean_nothing(task: Task) -> None:
    with pytest.raises(TrainingError, match=r"importance should be one of agreement, .* is 'guess'"):
        make_method("rsr", {"importance": "guess"})
    with pytest.raises(TrainingError, match="budget should be a share"):
        RSR(budget=1.5)
    with pytest.raises(TrainingError, match="expected at least one at a time and at most these"):
        replace(SMALL, budget=0.99).fit(task, LOOP)
    with pytest.raises(TrainingError, match=r"the loss is nan at step .* smaller --learning-rate \(now 1e\+30\)"):
        SMALL.fit(task, replace(LOOP, learning_rate=1e30))
