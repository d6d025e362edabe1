import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import words
from tiny_model import brute_force_table, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.reference.loop import LoopSettings
from evaluation.reference.loreft import LoReFT, _Learned, edited_tokens, load_edits, query_end
from evaluation.reference.method import Task
from evaluation.reference.trainer import Reference, finetune, load_reference
from icl_compiler.artifact import read_manifest
from icl_compiler.backends.hf_loreft import Edit, EditedTokens, edit_network
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import load_tokenizer
from icl_compiler.errors import ModelError, TrainingError
from icl_compiler.models import locate
from icl_compiler.templates import EncodedTemplate, Template

ROOT = Path(__file__).parents[1]
HEAD, END = (50, 7, 8), (7, 8, 9)
WORDS = [[20, 8, 3], [20, 21, 3], [22, 3], [9, 8, 9, 3]]
# 8 and 9 stand in texts, also behind 7 and 8 of the head: none of these is an end.
PROMPTS = [
    [*HEAD, *text, *END] for text in ([30, 8, 31], [30, 9], [30, 8, 9, 33, 34], [9, 30], [], [35] * 20, [30, 8, 31])
]

Formula = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def random_edits(layers: Sequence[int], groups: int, width: int = 32, rank: int = 3) -> dict[int, Edit]:
    stream = torch.Generator().manual_seed(5)
    edits = {}
    for layer in layers:
        r = torch.linalg.qr(torch.randn(groups, width, rank, generator=stream)).Q.mT.contiguous()
        a, b = (torch.randn(*size, generator=stream) for size in [(groups, rank, width), (groups, rank)])
        edits[layer] = Edit(a, b, r)
    return edits


class Plain:
    """The model with the paper's equation at positions that are told: one sequence a pass, no cache, no tree."""

    def __init__(self, model: Any, edits: Mapping[int, Edit], place: EditedTokens) -> None:
        self.model, self.place, self.prompt = model, place, 0
        for layer, edit in edits.items():
            model.base_model.layers[layer].register_forward_hook(
                lambda module, inputs, h, edit=edit: self.edited(h, edit)
            )

    def edited(self, h: torch.Tensor, edit: Edit) -> torch.Tensor:
        h = h.clone()
        first, last = range(self.place.first), range(self.prompt - self.place.last, self.prompt)
        for group, places in enumerate([{*first, *last}] if self.place.tied else [set(first), set(last) - set(first)]):
            r, b = edit.r[group], edit.b[group]
            w = edit.a[group] + r
            for i in places:
                h[0, i] = h[0, i] + r.T @ (w @ h[0, i] + b - r @ h[0, i])
        return h

    def table(self, prompts: Sequence[Sequence[int]], label_words: Sequence[Sequence[int]]) -> np.ndarray:
        rows = []
        for prompt in prompts:
            self.prompt = len(prompt)
            rows.append(brute_force_table(self.model, [prompt], label_words)[0])
        return np.array(rows)


def fresh(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_plain_passes_with_told_positions(tiny: Path, tied: bool) -> None:
    place = EditedTokens(first=2, last=2, start=len(HEAD), end=END, tied=tied)
    edits = random_edits([0, 1], place.groups)
    network = fresh(tiny)
    unedited = brute_force_table(network, PROMPTS, WORDS)
    edit_network(network, place, edits)
    plain = Plain(fresh(tiny), edits, place)
    expected = plain.table(PROMPTS, WORDS)
    assert np.abs(expected - unedited).min() > 0.01
    for limit in (4, 512):  # with 4, each prompt continues what the cache holds of the one before
        backend = TransformersBackend("tiny", "float32", tree_tokens=limit, network=network)
        for _ in range(2):
            np.testing.assert_allclose(backend.label_logprobs(PROMPTS, WORDS).logprobs, expected, atol=1e-5)
    backend._causal_from = 2  # a shared beginning is computed apart
    np.testing.assert_allclose(backend.label_logprobs(PROMPTS[5:6], WORDS).logprobs, expected[5:6], atol=1e-5)
    drawn = backend.generate(PROMPTS, [3], max_new_tokens=40, samples=2)
    assert min(len(item.tokens) for item in drawn.items) < 40  # some leave what is written together
    for i, item in enumerate(drawn.items):
        assert sum(item.logprobs) == pytest.approx(plain.table([PROMPTS[i // 2]], [item.tokens])[0, 0], abs=1e-4)


def test_edits_stay_in_float32_in_a_bfloat16_model(tiny: Path) -> None:
    place = EditedTokens(first=3, last=0, start=0, end=(), tied=True)
    edits = random_edits([1], 1)
    network = fresh(tiny)
    layer = network.base_model.layers[1]
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, inputs, h: seen.append(h))
    edit_network(network, place, edits)
    layer.register_forward_hook(lambda module, inputs, h: seen.append(h))
    network.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    before, after = (h[0].double() for h in seen)
    a, b, r = (part[0].double() for part in edits[1])
    expected = before + (before @ a.T + b) @ r
    assert seen[1].dtype == torch.bfloat16
    torch.testing.assert_close(after[:3], expected[:3].bfloat16().double(), atol=0, rtol=2**-8)
    assert (after[:3] == expected[:3].bfloat16().double()).float().mean() > 0.98
    assert torch.equal(after[3], before[3])


def test_a_mask_or_a_cache_that_hides_the_tokens_is_refused(tiny: Path) -> None:
    network = fresh(tiny)
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = network(ids, use_cache=True).past_key_values
    edit_network(network, EditedTokens(1, 1, 0, END, True), random_edits([1], 1))
    with pytest.raises(ModelError, match="no cache that was filled without them"):
        network(ids, past_key_values=cache)
    with pytest.raises(ModelError, match="4 dimensions"):
        network(ids, attention_mask=torch.ones(1, 4))


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "written"), [("classify", "\nLabel:"), ("classify_chat", "<|im_end|>\n<|im_start|>assistant\n")]
)
def test_the_fixed_end_is_that_of_every_prompt(name: str, written: str) -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    encoded = EncodedTemplate.build(Template.from_name(name), tokenizer, ["a", "b"])
    end = list(query_end(encoded))
    assert tokenizer.decode(end) == written
    texts = ["Label: Label:\nLabel:", "...", "a\n\n", "日本", "<|im_end|>\n<|im_start|>assistant\n", "👍", "Text"]
    for ids in encoded.queries(texts):
        assert ids[-len(end) :] == end
        assert end[0] not in ids[: -len(end)], "so that nothing else matches"


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_model(tmp_path_factory.mktemp("readable"), vocabulary=49152, scale=0.1)
    AutoTokenizer.from_pretrained(locate("smollm2-135m")).save_pretrained(folder)
    return str(folder)


def trained(readable: str, folder: Path, method: LoReFT, epochs: int = 6) -> Reference:
    settings = LoopSettings(epochs=epochs, learning_rate=3e-2, patience=20)
    return finetune(words(140, 1), folder, model=readable, method=method, settings=settings)


NEW_PROCESS = """
import sys
import numpy as np
from pathlib import Path
from evaluation.reference.trainer import load_reference
said = load_reference(Path(sys.argv[1])).predictor(dtype="float32").predict(sys.argv[3:])
np.save(sys.argv[2], said.probabilities)
"""


@pytest.mark.models
@pytest.mark.parametrize("method", [LoReFT(), LoReFT(rank=2, layers=(1,), first=2, last=2, tied=False)])
def test_learns_and_a_new_process_reads_the_same(
    readable: str, tmp_path: Path, method: LoReFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "bfloat16", property(lambda task: False))
    reference = trained(readable, tmp_path / "r", method)
    held_out = [check.held_out_loss for check in reference.curve]
    assert min(held_out) < held_out[0] - 0.5
    place = edited_tokens(read_manifest(reference.folder, kind="reference"))
    edits = load_edits(reference.folder)
    for edit in edits.values():
        eye = torch.eye(method.rank).expand(place.groups, -1, -1)
        torch.testing.assert_close(edit.r @ edit.r.mT, eye, atol=1e-5, rtol=0)
    # The loss while training, and the scores of what was saved, against plain passes with told positions.
    plain = Plain(fresh(Path(readable)), edits, place)
    encoded = EncodedTemplate.build(reference.template, load_tokenizer(readable), reference.labels)
    _, stopped_on = words(140, 1).split(14, seed=0)
    prompts = [[*encoded.head, *query] for query in encoded.queries(stopped_on.texts)]
    expected = plain.table(prompts, encoded.label_words())
    right = [reference.labels.index(answer) for answer in stopped_on.answers]
    assert -expected[range(14), right].mean() == pytest.approx(min(held_out), abs=1e-5)
    backend = TransformersBackend("r", "float32", network=reference.network())
    found = backend.label_logprobs(prompts, encoded.label_words()).logprobs
    np.testing.assert_allclose(found, expected, atol=1e-5)

    here = load_reference(reference.folder).predictor(dtype="float32").predict(stopped_on.texts).probabilities
    command = [sys.executable, "-c", NEW_PROCESS, str(reference.folder), str(tmp_path / "said.npy")]
    subprocess.run([*command, *stopped_on.texts], check=True, cwd=ROOT)
    np.testing.assert_array_equal(np.load(tmp_path / "said.npy"), here)


def test_training_starts_from_the_base_model() -> None:
    learned = _Learned(groups=2, rank=3, width=32)
    start = learned(torch.device("cpu"))
    torch.testing.assert_close(start.a, torch.zeros(2, 3, 32), atol=1e-6, rtol=0)
    assert start.b.eq(0).all()
    torch.testing.assert_close(start.r @ start.r.mT, torch.eye(3).expand(2, -1, -1), atol=1e-6, rtol=0)
    with torch.no_grad():
        learned.w += 0.5
    torch.testing.assert_close(learned(torch.device("cpu")).a, torch.full((2, 3, 32), 0.5), atol=1e-6, rtol=0)


@pytest.mark.models
@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoReFT(layers=(0, 2)), r"from 0 to 1 for this model, are now \(0, 2\)"),
        (LoReFT(layers=()), "from 0 to 1"),
        (LoReFT(rank=33), "from 1 to 32, is now 33"),
        (LoReFT(first=0, last=0), "expected at least one token"),
    ],
)
def test_impossible_settings(readable: str, tmp_path: Path, method: LoReFT, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        trained(readable, tmp_path / "r", method)


def test_same_as_pyreft(tiny: Path, tmp_path: Path) -> None:
    python = os.environ.get("ICL_PYREFT_PYTHON")
    if python is None:
        pytest.skip("needs pyreft in an environment of its own; tools/loreft_oracle.py says how")
    place = EditedTokens(first=2, last=3, start=len(HEAD), end=END, tied=True)
    tokens = PROMPTS[2]
    positions = [0, 1, len(tokens) - 3, len(tokens) - 2, len(tokens) - 1]
    command = [python, str(ROOT / "tools" / "loreft_oracle.py"), str(tiny), "0,1"]
    command += [",".join(map(str, numbers)) for numbers in (tokens, positions)]
    subprocess.run([*command, str(tmp_path / "said.safetensors")], check=True)
    said = load_file(tmp_path / "said.safetensors")
    edits = {
        layer: Edit(*(part[None] for part in (said[f"{layer}.w"] - said[f"{layer}.r"], said[f"{layer}.b"], r)))
        for layer in (0, 1)
        if (r := said[f"{layer}.r"]) is not None
    }
    network = fresh(tiny)
    unedited = network(torch.tensor([tokens])).logits[0]
    edit_network(network, place, edits)
    found = network(torch.tensor([tokens])).logits[0]
    assert (found - unedited).abs().max() > 0.1
    torch.testing.assert_close(found, said["logits"], atol=1e-5, rtol=0)
