"""Attention branch by branch against the same model with a mask, and what is left of it outside training."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.reference.method import Task
from evaluation.reference.objective import AnswerLoss, TrainingExample
from evaluation.reference.tree_attention import TREE_ATTENTION, Branches, attend_by_branches
from icl_compiler.prefix_tree import PrefixTree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def examples(trunk: int, *, alike: int, lengths: tuple[int, int]) -> list[TrainingExample]:
    """Twelve that share `trunk` tokens; of each three neighbours, `alike` more."""
    rng = np.random.default_rng(trunk + 10 * alike)
    begin, found = rng.integers(3, 97, trunk).tolist(), []
    for row in range(12):
        third = np.random.default_rng([row // 3, alike]).integers(3, 97, alike).tolist()
        own = rng.integers(3, 97, rng.integers(*lengths)).tolist()
        found.append(TrainingExample([*begin, *third, 3 + row, *own], [row % 2 + 5, 9]))
    return found


def loss_and_gradients(folder: Path, rows: list[TrainingExample], attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if attention == TREE_ATTENTION:
        attend_by_branches(model)
    losses = AnswerLoss(model, rows, rows, bfloat16=False).losses(range(len(rows)), held_out=False)
    losses.mean().backward()
    return losses.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("trunk", "alike", "lengths"), [*product((0, 1, 7), (0, 4), ((2, 9),)), (20, 0, (1, 2)), (5, 9, (2, 4))]
)
def test_losses_and_gradients_are_those_of_a_mask(
    folder: Path, trunk: int, alike: int, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.reference.tree_attention._LEAST_SAVED", 0)  # so small a tree would not be worth it
    rows = examples(trunk, alike=alike, lengths=lengths)
    tree = PrefixTree.build([[*row.prompt, *row.answer[:-1]] for row in rows]).padded()
    branches = Branches.of(tree)
    assert branches is not None
    assert branches.trunk == trunk
    everything = [*range(trunk), *branches.nodes.tolist()]
    assert sorted(everything) == list(range(len(everything))), "each node once, and no padding"
    by_mask, by_branch = (loss_and_gradients(folder, rows, name) for name in ("sdpa", TREE_ATTENTION))
    torch.testing.assert_close(by_branch, by_mask, atol=1e-5, rtol=1e-4)


def test_one_long_text_among_short_ones_is_left_to_the_mask(folder: Path) -> None:
    rows = [*examples(3, alike=0, lengths=(1, 3)), TrainingExample([3, *range(4, 90)], [5, 9])]
    assert Branches.of(PrefixTree.build([row.prompt for row in rows])) is None
    by_mask, by_branch = (loss_and_gradients(folder, rows, name) for name in ("sdpa", TREE_ATTENTION))
    assert torch.equal(by_branch[1], by_mask[1])


def test_a_single_text_is_all_trunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.reference.tree_attention._LEAST_SAVED", 0)
    rows = examples(3, alike=0, lengths=(9, 10))[:1]
    by_mask, by_branch = (loss_and_gradients(folder, rows, name) for name in ("sdpa", TREE_ATTENTION))
    torch.testing.assert_close(by_branch, by_mask, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_was_trained_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    model = Task(str(folder), (), (), gpu=False).load(torch.float32)
    assert model.config._attn_implementation == TREE_ATTENTION
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[3, 9, 20, 31, 5]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    ended = torch.tensor([[1, 1, 1, 1, 0]])
    torch.testing.assert_close(
        model(ids, attention_mask=ended).logits[:, :4], plain(ids, attention_mask=ended).logits[:, :4]
    )
    torch.testing.assert_close(model.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    model.save_pretrained(tmp_path)
    assert TREE_ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != TREE_ATTENTION
