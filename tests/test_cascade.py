"""Pruning against hooks on the whole model, and the cascade on a random model of six layers that reads bytes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_model import save_byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from evaluation.reference import cascade
from evaluation.reference.cascade import Generation, Lesson, Recipe, run_cascade
from evaluation.reference.full import Full
from evaluation.reference.head import Head
from evaluation.reference.loop import LoopSettings
from evaluation.reference.objective import TrainingExample
from evaluation.reference.pruning import (
    Shape,
    drop_groups,
    drop_layers,
    group_importance,
    layer_losses,
    narrow,
    neuron_importance,
)
from evaluation.reference.trainer import Reference, load_reference
from icl_compiler.cli import main
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, ModelError, TrainingError

EXAMPLES = [
    TrainingExample([3, 4, 20, 21], [5, 9]),
    TrainingExample([3, 4, 22], [6, 9]),
    TrainingExample([3, 4, 20, 21, 23, 24], [5, 7, 9]),
    TrainingExample([30], [8]),
    TrainingExample(list(range(40, 82)), [8, 9]),  # from 32 tokens on, a batch may be padded, and here is
]
IDS = torch.tensor([[3, 4, 20, 21, 5, 50, 7]])
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=["llama", "llama with biases", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Six layers; of Qwen2 the configuration says of each layer how it attends."""
    torch.manual_seed(0)
    if request.param == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.3))
    else:
        made = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, mlp_bias="biases" in request.param))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made.eval()


@contextmanager
def skipping(model: Any, layers: list[int]) -> Iterator[None]:
    hooks = [
        model.base_model.layers[layer].register_forward_hook(lambda _, inputs, output: inputs[0]) for layer in layers
    ]
    yield
    for hook in hooks:
        hook.remove()


def plain_loss(model: Any) -> float:
    """Each example alone, by the model's own loss on labels."""
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        labels = ids.clone()
        labels[0, : len(example.prompt)] = -100
        losses.append(model(ids, labels=labels).loss.item() * len(example.answer))
    return float(np.mean(losses))


def at_each_token(model: Any, module: torch.nn.Module, wanted: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What `wanted` makes of the inputs and the output of a module, after each distinct beginning of an example."""
    found = {}
    for example in EXAMPLES:
        ids = [*example.prompt, *example.answer[:-1]]
        made: list[torch.Tensor] = []
        hook = module.register_forward_hook(lambda *seen, made=made: made.append(wanted(*seen)[0]))
        model(torch.tensor([ids]))
        hook.remove()
        for end in range(len(ids)):
            found[tuple(ids[: end + 1])] = made[0][end]
    return torch.stack(list(found.values()))


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0], [5], [4, 1, 2]])
def test_a_model_without_layers_is_the_whole_one_with_these_skipped(model: Any, layers: list[int]) -> None:
    with skipping(model, layers):
        expected = model(IDS).logits
    before = model(IDS).logits
    torch.testing.assert_close(drop_layers(model, layers)(IDS).logits, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(IDS).logits, before, atol=0, rtol=0)


@torch.no_grad()
def test_a_pruned_model_is_an_ordinary_one(model: Any, tmp_path: Path) -> None:
    importance = neuron_importance(model, EXAMPLES, bfloat16=False)
    pruned = drop_layers(narrow(model, importance, 32), [1, 3])
    pruned = drop_groups(pruned, group_importance(pruned, EXAMPLES, bfloat16=False), 1)
    pruned.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(loaded(IDS).logits, pruned(IDS).logits, atol=1e-6, rtol=0)
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (4, 32)
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads, loaded.config.head_dim) == (2, 1, 8)
    assert len(getattr(loaded.config, "layer_types", None) or range(4)) == 4
    whole = pruned(IDS, use_cache=True)
    step = pruned(IDS[:, -1:], past_key_values=pruned(IDS[:, :-1], use_cache=True).past_key_values)
    torch.testing.assert_close(step.logits[0, -1], whole.logits[0, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_are_judged_by_the_loss_without_them_and_by_influence(model: Any) -> None:
    found = layer_losses(model, EXAMPLES, bfloat16=False)
    assert found.whole == pytest.approx(plain_loss(model), abs=1e-4)
    for layer in range(6):
        with skipping(model, [layer]):
            assert found.skipped[layer] == pytest.approx(plain_loss(model), abs=1e-4)
        cosines = at_each_token(
            model,
            model.base_model.layers[layer],
            lambda _, inputs, output: torch.nn.functional.cosine_similarity(inputs[0], output, dim=-1),
        )
        assert found.influence[layer] == pytest.approx(1 - cosines.mean().item(), abs=1e-5)
    assert layer_losses(model, EXAMPLES, bfloat16=False) == found, "nothing of it stays in the model"


@torch.no_grad()
def test_a_narrow_model_is_the_whole_one_without_the_least_neurons(model: Any) -> None:
    importance = neuron_importance(model, EXAMPLES, bfloat16=False)
    pruned = narrow(model, importance, 48)
    for layer, scores in zip(model.base_model.layers, importance, strict=True):
        down = layer.mlp.down_proj
        activations = at_each_token(model, down, lambda _, inputs, output: inputs[0])
        expected = activations.abs().mean(0) * down.weight.square().sum(0).sqrt()
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    for layer, scores in zip(model.base_model.layers, importance, strict=True):
        layer.mlp.down_proj.weight[:, scores.argsort()[:16]] = 0
    torch.testing.assert_close(pruned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_model_without_heads_is_the_whole_one_with_the_least_groups_silent(model: Any) -> None:
    importance = group_importance(model, EXAMPLES, bfloat16=False)
    assert importance.shape == (6, 2)
    for layer, scores in zip(model.base_model.layers, importance, strict=True):
        out = layer.self_attn.o_proj
        entering = at_each_token(model, out, lambda _, inputs, output: inputs[0])
        for group in range(2):
            mine = slice(16 * group, 16 * group + 16)
            added = (entering[:, mine] @ out.weight[:, mine].T).square().sum(1).sqrt()
            torch.testing.assert_close(scores[group], added.mean(), atol=1e-4, rtol=1e-4)
    pruned = drop_groups(model, importance, 1)
    for layer, scores in zip(model.base_model.layers, importance, strict=True):
        least = int(scores.argmin())
        layer.self_attn.o_proj.weight[:, 16 * least : 16 * least + 16] = 0
    torch.testing.assert_close(pruned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-5)


def test_shape_says_beforehand_what_is_left(model: Any) -> None:
    whole = Shape.of(model)
    assert whole.parameters == model.num_parameters()
    for share, depth in product((0.8, 0.5), (0.0, 0.5, 1.0)):
        wanted = whole.pruned(share, depth=depth)
        dropped = drop_layers(model, range(whole.layers - wanted.layers))
        assert Shape.of(narrow(dropped, torch.rand(wanted.layers, 64), wanted.width)) == wanted
        assert wanted.parameters / whole.parameters == pytest.approx(share, abs=0.08)
        fewer = whole.pruned(share, depth=depth, fewer_groups=1)
        dropped = drop_groups(dropped, torch.rand(fewer.layers, 2), 1)
        assert Shape.of(narrow(dropped, torch.rand(fewer.layers, 64), fewer.width)) == fewer
        assert fewer.width >= wanted.width


def test_what_cannot_be_pruned(model: Any) -> None:
    with pytest.raises(TrainingError, match=r"leaves 1 of 6 layers, expected at least 2; use a larger --share"):
        Shape.of(model).pruned(0.25, depth=1.0)
    with pytest.raises(TrainingError, match=r"leaves 6 layers without an MLP, expected at least 16 of its 64 neurons"):
        Shape.of(model).pruned(0.3, depth=0.0)
    with pytest.raises(TrainingError, match=r"of 2 groups of heads 2 cannot go"):
        Shape.of(model).pruned(0.8, depth=0.5, fewer_groups=2)
    with pytest.raises(TrainingError, match=r"of 6 layers, numbered from 0, \[6\] cannot be dropped"):
        drop_layers(model, [6])
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(ModelError, match="a GPT2LMHeadModel is not built as Llama is"):
        Shape.of(gpt)
    with pytest.raises(TrainingError, match="linear probe leaves no ordinary checkpoint"):
        Recipe(method=Head())


# The cascade


def ends(count: int, seed: int, kinds: tuple[str, str] = ("ax", "by")) -> Dataset:
    """The label is which letter stands at the end."""
    rng = np.random.default_rng(seed)
    labels = tuple(kinds[i % 2] for i in range(count))
    texts = tuple(
        f"{''.join(rng.choice(list('cdefgh'), 5))}{i + 1000 * seed} {label[0]}" for i, label in enumerate(labels)
    )
    return Dataset(texts, labels, "classification", f"ends-{kinds[0]}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return str(folder)


LOOP = LoopSettings(epochs=6, learning_rate=1e-2, patience=20)
BRIEF = LoopSettings(epochs=1, learning_rate=1e-2)
RECIPE = Recipe(method=Full(), healing=Full(), loop=LOOP, healing_loop=LOOP, share=0.75)
QUICK = Recipe(method=Full(), healing=Full(), loop=BRIEF, healing_loop=BRIEF)
LESSON = Lesson(ends(120, 1), ends(40, 2))


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Generation]]:
    folder = tmp_path_factory.mktemp("whole") / "cascade"
    found = run_cascade([LESSON], folder, model=tiny, generations=2, recipe=RECIPE, tolerance=1e9)
    assert found.stopped is None
    return folder, found.rows


def untimed(rows: list[Generation]) -> list[Generation]:
    return [row._replace(seconds_per_text=0.0, trained_s=0.0) for row in rows]


def right(folder: Path, labels: tuple[str, ...], data: Dataset) -> float:
    """By transformers alone: which label's bytes are likelier after the prompt, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_reference(folder.parent / "specialised").template
    hits = []
    for text, answer in zip(data.texts, data.answers, strict=True):
        prompt = template.instruction(labels) + template.query(text)
        scores = []
        for label in labels:
            whole = tokenizer(prompt + template.answer(label), return_tensors="pt").input_ids
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                laws = model(whole).logits[0].double().log_softmax(-1)
            scores.append(sum(laws[i - 1, whole[0, i]].item() for i in range(start, whole.shape[1])))
        hits.append(labels[int(np.argmax(scores))] == answer)
    return float(np.mean(hits))


def test_rows_say_what_is_on_disk(whole: tuple[Path, list[Generation]], tiny: str) -> None:
    folder, rows = whole
    assert [(row.generation, row.first) for row in rows] == [(0, True), (1, False), (2, False)]
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == [
        {**row._asdict(), "dropped": list(row.dropped)} for row in rows
    ]
    for row in rows[1:]:
        here = folder / f"generation-{row.generation}"
        model = AutoModelForCausalLM.from_pretrained(here / "model")
        assert (row.parameters, row.layers) == (model.num_parameters(), model.config.num_hidden_layers)
        assert row.width == model.config.intermediate_size
        assert row.accuracy == pytest.approx(right(here / "model", ("ax", "by"), LESSON.test), abs=0.026)
        assert row.quality_kept == row.accuracy / rows[0].accuracy
        curves = [load_reference(here / name).curve for name in ("specialised", "healed")]
        best = [min(check.held_out_loss for check in curve) for curve in curves]
        assert [row.specialised_loss, row.healed_loss] == pytest.approx(best, abs=0.03), "the same held-out rows"
        assert max(row.pruned_loss, 1e-3) > row.healed_loss, "what is learned to nothing cannot be healed further"
        why = json.loads((here / "pruned" / "pruning.json").read_text())
        assert row.dropped == tuple(step["layers"][int(np.argmin(step["skipped"]))] for step in why["layers"])
        heads = rows[row.generation - 1].heads
        assert [one["heads"] for one in why["widths"]] == [heads, heads - 2][: heads // 2]
        taken = min(why["widths"], key=lambda one: one["loss"])
        assert (row.heads, row.width) == (taken["heads"], taken["width"])
        assert row.heads == model.config.num_attention_heads
        assert row.layers == rows[row.generation - 1].layers - len(row.dropped)
        assert row.parameters / rows[row.generation - 1].parameters == pytest.approx(0.75, abs=0.06)
    assert rows[0].accuracy > 0.9
    assert (rows[0].texts, rows[0].measured_on) == (40, "test")
    assert load_reference(folder / "generation-2" / "specialised").base_model == str(folder / "generation-1" / "model")


def test_killed_again_and_again_it_ends_as_if_it_never_was(
    whole: tuple[Path, list[Generation]], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def run() -> list[Generation]:
        return run_cascade([LESSON], tmp_path / "c", model=tiny, generations=2, recipe=RECIPE, tolerance=1e9).rows

    finetune, trained = cascade.finetune, []

    def counted(*arguments: Any, **more: Any) -> Reference:
        trained.append(Path(arguments[1]).relative_to(tmp_path / "c").as_posix())
        return finetune(*arguments, **more)

    monkeypatch.setattr(cascade, "finetune", counted)
    places = [(cascade, "narrow"), (Reference, "merge"), (cascade, "_write_rows"), (cascade, "layer_losses")]
    for place, name in places:
        with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
            once.setattr(place, name, killed)
            run()
    rows = run()
    assert untimed(rows) == untimed(whole[1])
    steps = ("generation-1/specialised", "generation-1/healed", "generation-2/specialised", "generation-2/healed")
    assert tuple(trained) == steps, "what was done was not done again"
    last = Path("generation-2", "model", "model.safetensors")
    assert (tmp_path / "c" / last).read_bytes() == (whole[0] / last).read_bytes()
    assert run() == rows
    assert len(list((tmp_path / "c").iterdir())) == 4, "nothing is left behind"


def test_stops_above_the_tolerance_and_goes_on_with_another(tiny: str, tmp_path: Path) -> None:
    found = run_cascade([LESSON], tmp_path / "c", model=tiny, generations=2, recipe=QUICK, tolerance=1e-9)
    assert found.stopped is not None
    assert found.stopped.startswith("stopped after generation 1: its held-out loss of ")
    assert [row.generation for row in found.rows] == [0, 1]
    assert not (tmp_path / "c" / "generation-2").exists()
    on = run_cascade([LESSON], tmp_path / "c", model=tiny, generations=2, recipe=QUICK, tolerance=1e9)
    assert on.rows[:2] == found.rows
    assert len(on.rows) == 3


def test_another_lesson_has_a_first_row_of_its_own(tiny: str, tmp_path: Path) -> None:
    lessons = [Lesson(ends(60, 1)), Lesson(ends(60, 3, ("cw", "dz")))]
    found = run_cascade(lessons, tmp_path / "c", model=tiny, generations=2, recipe=QUICK, tolerance=1e9)
    kinds = [(row.generation, row.data, row.first) for row in found.rows]
    assert kinds == [(0, "ends-ax", True), (1, "ends-ax", False), (1, "ends-cw", True), (2, "ends-cw", False)]
    assert found.rows[1].parameters == found.rows[2].parameters > found.rows[3].parameters
    assert found.rows[3].quality_kept == found.rows[3].accuracy / found.rows[2].accuracy
    manifest = json.loads((tmp_path / "c" / "generation-1" / "healed" / "manifest.json").read_text())
    assert {(row.measured_on, row.texts) for row in found.rows} == {("held-out", manifest["data"]["held_out_rows"])}
    assert load_reference(tmp_path / "c" / "generation-2" / "healed").labels == ("cw", "dz")


def test_what_cannot_be_cascaded_is_refused_before_anything_is_trained(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="use a larger --share, or fewer --generations"):
        run_cascade([LESSON], tmp_path / "c", model=tiny, generations=9)
    with pytest.raises(TrainingError, match="ends-cw has the label 'cw', which ends-ax has not"):
        run_cascade([Lesson(ends(40, 1), ends(9, 1, ("cw", "dz")))], tmp_path / "c", model=tiny)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="exists and is not a cascade"):
        run_cascade([LESSON], tmp_path / "mine", model=tiny, generations=1)


def test_other_settings_do_not_go_on_in_the_same_folder(whole: tuple[Path, list[Generation]], tiny: str) -> None:
    other = Recipe(method=Full(), healing=Full(), loop=LOOP, healing_loop=LOOP, share=0.7)
    with pytest.raises(ArtifactError, match="a cascade that was begun with another recipe and lessons"):
        run_cascade([Lesson(ends(60, 1))], whole[0], model=tiny, generations=1, recipe=other)


def icl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="icl")


def test_the_command_says_what_it_made(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = Dataset(("new a", *ends(3, 1).texts), ("ax", "ax", "by", "ax"), "classification", "test")
    for name, data in (("train", ends(60, 1)), ("test", test)):
        lines = [f"{text},{label}" for text, label in zip(data.texts, data.answers, strict=True)]
        Path(f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    asked = f"cascade train.csv -o c --model {tiny} --epochs 4 --healing-epochs 4 --generations 1".split()
    asked += ["--test", "test.csv", "--set", "budget=0.2", "--tolerance", "100"]
    result = icl(*asked, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "Warning: 3 rows of train.csv left out: in test.csv too",
        "generation 1: from 6 to 5 layers",
    ]
    rows = json.loads(result.stdout)["rows"]
    assert [(row["generation"], row["texts"]) for row in rows] == [(0, 4), (1, 4)]
    manifests = [
        json.loads(Path(f"c/generation-1/{name}/manifest.json").read_text()) for name in ("specialised", "healed")
    ]
    assert [(m["how"]["frontier"], m["how"]["budget"]) for m in manifests] == [(None, 0.2), (0, 0.2)]
    table = icl(*asked).stdout.splitlines()
    assert len(table) == 4
    assert table[2].split()[:3] == ["1", "train.csv", f"{rows[1]['parameters'] / 1e6:.1f}"]
    assert table[3] == "Accuracy and its share that is kept: on the test data."
    assert "there are 1 DATA and 2 --test" in icl(*asked, "--test", "test.csv").stderr
