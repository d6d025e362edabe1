from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

from evaluation.reference.full import unfreeze
from evaluation.reference.objective import AnswerLoss, TrainingExample, count_tokens
from icl_compiler.errors import TrainingError

EXAMPLES = [
    TrainingExample([3, 4, 20, 21], [5, 9]),
    TrainingExample([3, 4, 22], [6, 9]),
    TrainingExample([3, 4, 20, 21, 23, 24], [5, 7, 9]),
    TrainingExample([30], [8]),
]


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path), dtype=torch.float32)


def plain_loss(model: torch.nn.Module, example: TrainingExample) -> torch.Tensor:
    """One example alone, by the model's own loss on labels."""
    ids = torch.tensor([[*example.prompt, *example.answer]])
    labels = ids.clone()
    labels[0, : len(example.prompt)] = -100
    return model(ids, labels=labels).loss * len(example.answer)


def method(model: torch.nn.Module, first_layer: int = 0) -> AnswerLoss:
    unfreeze(model, first_layer)
    return AnswerLoss(model, EXAMPLES, EXAMPLES[:2], frontier=first_layer, bfloat16=False)


@pytest.mark.parametrize("first_layer", [0, 1])
def test_losses_are_those_of_each_example_alone(model: torch.nn.Module, first_layer: int) -> None:
    expected = torch.stack([plain_loss(model, example) for example in EXAMPLES])
    trained = method(model, first_layer=first_layer)
    for _ in range(2):  # the second time what lies below first_layer comes from memory
        torch.testing.assert_close(trained.losses(range(4), held_out=False), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.losses([1], held_out=True), expected[1:2], atol=1e-5, rtol=0)


def test_gradient_is_that_of_each_example_alone(model: torch.nn.Module) -> None:
    torch.stack([plain_loss(model, example) for example in EXAMPLES]).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    method(model).losses(range(4), held_out=False).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_frozen_part_has_no_gradient_and_the_rest_the_same(model: torch.nn.Module) -> None:
    method(model).losses(range(4), held_out=False).mean().backward()
    expected = model.base_model.layers[1].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    trained = method(model, first_layer=1)
    trained.losses(range(4), held_out=False).mean().backward()
    torch.testing.assert_close(model.base_model.layers[1].mlp.down_proj.weight.grad, expected, atol=1e-6, rtol=1e-4)
    assert model.base_model.layers[0].mlp.down_proj.weight.grad is None
    assert model.get_input_embeddings().weight.grad is None
    moving = sum(p.numel() for p in trained.parameters())
    upper = [*model.base_model.layers[1].parameters(), *model.base_model.norm.parameters()]
    assert moving == sum(parameter.numel() for parameter in upper)


def test_no_such_layer(model: torch.nn.Module) -> None:
    with pytest.raises(TrainingError, match="from 0 to 1 for this model, is now 2"):
        method(model, first_layer=2)


def test_tokens_are_counted() -> None:
    np.testing.assert_array_equal(count_tokens(EXAMPLES), [6, 5, 9, 2])


def test_what_is_kept_of_the_frozen_layers_may_lie_on_the_disk(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = method(model, first_layer=1).losses(range(4), held_out=False)
    monkeypatch.setattr("evaluation.reference.frozen_part.IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made: list[str] = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **more: made.append(name) or from_file(name, **more))
    on_disk = method(model, first_layer=1)
    assert [Path(name).parent for name in made] == [tmp_path, tmp_path]
    assert not list(tmp_path.glob("icl-frozen-*")), "nothing is left behind, even if the process is killed"
    for _ in range(2):
        torch.testing.assert_close(on_disk.losses(range(4), held_out=False), expected, atol=1e-6, rtol=0)


def test_no_space_for_what_the_frozen_layers_give(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.reference.frozen_part.IN_MEMORY", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"No space left on device\); set TMPDIR to a folder that has"):
        method(model, first_layer=1)
