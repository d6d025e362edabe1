import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

from evaluation.reference.loop import LoopSettings
from evaluation.reference.method import Fitted, Method, Task
from evaluation.reference.objective import AnswerLoss, TrainingExample
from evaluation.reference.peft_methods import LoRA, SHiRA
from icl_compiler.errors import MissingDependencyError, ModelError, TrainingError

EXAMPLES = [
    TrainingExample([3, 4, 20, 21], [5, 9]),
    TrainingExample([3, 4, 22], [6, 9]),
    TrainingExample([3, 4, 20, 21, 23, 24], [5, 7, 9]),
    TrainingExample([30], [8]),
]
METHODS = [LoRA(rank=2), SHiRA(share=0.05)]
LOOP = LoopSettings(epochs=8, batch_size=2, learning_rate=1e-2, patience=100)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(save_tiny_model(tmp_path / "base"))


def fitted(method: Method, base: str, folder: Path, loop: LoopSettings = LOOP) -> Fitted:
    torch.manual_seed(0)
    result = method.fit(Task(base, EXAMPLES, EXAMPLES, gpu=False), loop)
    folder.mkdir()
    result.save(folder)
    return result


def plain(base: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def plain_loss(model: torch.nn.Module, example: TrainingExample) -> torch.Tensor:
    """One example alone, by the model's own loss on labels."""
    ids = torch.tensor([[*example.prompt, *example.answer]])
    labels = ids.clone()
    labels[0, : len(example.prompt)] = -100
    return model(input_ids=ids, labels=labels).loss * len(example.answer)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_what_was_trained(
    method: Method, bfloat16: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "bfloat16", bfloat16)
    result = fitted(method, base, tmp_path / "adapter")
    best = min(check.held_out_loss for check in result.curve)
    assert best < 0.7 * result.curve[0].held_out_loss
    by_peft = PeftModel.from_pretrained(plain(base), tmp_path / "adapter").eval()
    here = type(method).network(tmp_path / "adapter", {"base_model": base})
    with torch.no_grad():
        ids = torch.tensor([[*EXAMPLES[2].prompt, *EXAMPLES[2].answer]])
        torch.testing.assert_close(here(ids).logits, by_peft(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        loss = torch.stack([plain_loss(here, example) for example in EXAMPLES]).mean().item()
        assert loss == pytest.approx(best, rel=0.05 if bfloat16 else 1e-5)
        again = type(method).network(tmp_path / "adapter", {"base_model": base})
        assert torch.equal(again(ids).logits, here(ids).logits)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "indices" not in name} == {torch.float32}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_peft_on_each_example_alone(method: Method, base: str, tmp_path: Path) -> None:
    fitted(method, base, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(plain(base), tmp_path / "adapter", is_trainable=True)
    expected = torch.stack([plain_loss(adapted, example) for example in EXAMPLES])
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    losses = AnswerLoss(adapted.get_base_model(), EXAMPLES, EXAMPLES, bfloat16=False).losses(range(4), held_out=False)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    losses.mean().backward()
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0.1
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def changes(method: Method, base: str, folder: Path) -> dict[str, torch.Tensor]:
    """What each weight of the merged model has more than the base model's, where it is another."""
    with torch.no_grad():
        before = dict(plain(base).named_parameters())
        after = type(method).network(folder, {"base_model": base}).named_parameters()
        return {name: weight - before[name] for name, weight in after if not torch.equal(weight, before[name])}


LINEAR = {
    f"model.layers.{layer}.{part}_proj.weight"
    for layer in (0, 1)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


def test_lora_changes_every_linear_layer_by_its_rank(base: str, tmp_path: Path) -> None:
    result = fitted(LoRA(rank=3, alpha=6), base, tmp_path / "adapter")
    changed = changes(LoRA(), base, tmp_path / "adapter")
    assert changed.keys() == LINEAR
    assert {int(torch.linalg.matrix_rank(delta, rtol=1e-3)) for delta in changed.values()} == {3}
    assert result.trained_parameters == 3 * sum(sum(delta.shape) for delta in changed.values())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.model.layers.1.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(changed["model.layers.1.mlp.up_proj.weight"], 6 / 3 * b @ a, atol=1e-6, rtol=1e-5)


def test_shira_changes_its_share_of_entries(base: str, tmp_path: Path) -> None:
    result = fitted(SHiRA(share=0.03), base, tmp_path / "adapter")
    changed = changes(SHiRA(), base, tmp_path / "adapter")
    assert changed.keys() == LINEAR
    moved = {name: int(delta.count_nonzero()) for name, delta in changed.items()}
    everything = sum(parameter.numel() for parameter in plain(base).parameters())
    assert sum(moved.values()) == result.trained_parameters == pytest.approx(0.03 * everything, abs=len(LINEAR) / 2)
    densities = [moved[name] / sum(delta.shape) for name, delta in changed.items()]
    assert max(densities) - min(densities) < 1 / 48, "as many by rows and columns as a LoRA of one rank"
    first, second = (changed[f"model.layers.{layer}.mlp.up_proj.weight"] != 0 for layer in (0, 1))
    assert not torch.equal(first, second)


def test_bad_settings(base: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at least 1 .* are now 0 and 16"):
        LoRA(rank=0)
    for share in (0.0, 1.0):
        with pytest.raises(TrainingError, match=f"between 0 and 1, is now {share:g}"):
            SHiRA(share=share)
    # 16 x 32 entries of k, of which r (16 + 32) with r at most 10
    with pytest.raises(TrainingError, match=r"at most 0\.\d+ for this model, is now 0.9"):
        fitted(SHiRA(share=0.9), base, tmp_path / "adapter")


def test_another_base_model_is_refused(base: str, tmp_path: Path) -> None:
    fitted(LoRA(rank=1), base, tmp_path / "adapter", LoopSettings(learning_rate=1e-3, epochs=1))
    wider = plain(base).config
    wider.hidden_size = 40
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(ModelError, match=r"does not fit the model .*wider"):
        LoRA.network(tmp_path / "adapter", {"base_model": str(tmp_path / "wider")})


def test_without_peft(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'icl-compiler\[lora\]'"):
        LoRA().fit(Task(base, EXAMPLES, EXAMPLES), LOOP)
