import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_model import save_tiny_model
from transformers import AutoTokenizer

from evaluation.evaluate import ask_references, evaluate
from evaluation.reference.full import Full
from evaluation.reference.loop import LoopSettings
from evaluation.reference.trainer import finetune, load_reference, same_labels
from icl_compiler.cli import main
from icl_compiler.compile import compile_program, load_tokenizer
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, ContextLengthError, DataError, EvaluationError, LabelError, TrainingError
from icl_compiler.models import locate
from icl_compiler.predictor import open_backend

pytestmark = pytest.mark.models

COLOURS, ANIMALS = ("red", "blue", "green", "black"), ("dog", "cat", "cow", "fox")


def words(count: int, seed: int) -> Dataset:
    """Which of two kinds of word stands at the end: easy enough for a model of two layers."""
    rng = np.random.default_rng(seed)
    texts = [f"{i} {rng.choice(COLOURS if i % 2 else ANIMALS)}" for i in range(1000 * seed, 1000 * seed + count)]
    labels = tuple("colour" if i % 2 else "animal" for i in range(count))
    return Dataset(tuple(texts), labels, "classification", "words")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the vocabulary and the tokenizer of SmolLM2."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), vocabulary=49152, scale=0.1)
    AutoTokenizer.from_pretrained(locate("smollm2-135m")).save_pretrained(folder)
    return str(folder)


SETTINGS = LoopSettings(epochs=8, batch_size=16, learning_rate=1e-2, patience=20)


@pytest.fixture(scope="module")
def references(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("references") / f"seed-{seed}"
        finetune(words(140, 1), folder, model=tiny, method=Full(), settings=replace(SETTINGS, seed=seed))
        folders.append(folder)
    return folders


def test_really_learns_and_reloads_the_same(references: list[Path]) -> None:
    reference = load_reference(references[0])
    test = words(60, 2)
    said = reference.predictor(dtype="float32").predict(test.texts)
    right = np.mean([said.labels[i] == answer for i, answer in zip(said.best, test.answers, strict=True)])
    assert right > 0.9
    assert said.other.mean() < 0.1
    again = load_reference(references[0]).predictor(dtype="float32").predict(test.texts)
    np.testing.assert_array_equal(said.probabilities, again.probabilities)
    assert reference.curve[0].held_out_loss > 2 * min(check.held_out_loss for check in reference.curve)
    assert (reference.seed, reference.examples, reference.method) == (0, 126, "full fine-tuning")


def test_learns_to_generate(tiny: str, tmp_path: Path) -> None:
    def pairs(count: int, seed: int) -> Dataset:
        chosen = np.random.default_rng(seed).choice(len(COLOURS), count)
        return Dataset(
            tuple(f"{i} {COLOURS[c]}" for i, c in enumerate(chosen)),
            tuple(f"a {ANIMALS[c]} is {COLOURS[c]}" for c in chosen),
            "generation",
            "pairs",
        )

    reference = finetune(pairs(140, 0), tmp_path / "r", model=tiny, method=Full(), settings=SETTINGS)
    assert reference.labels == ()
    with pytest.raises(LabelError, match="generates text, it has no labels; `icl merge`"):
        reference.predictor()
    reference.merge(tmp_path / "merged")
    backend = open_backend("transformers", str(tmp_path / "merged"))
    program = compile_program(pairs(4, 1), model=tiny, retriever="bm25", shots=0)
    asked = [prompt.tokens for prompt in program.prompts([f"{900 + i} {colour}" for i, colour in enumerate(COLOURS)])]
    said = backend.generate(asked, program.template.terminator_ids, max_new_tokens=20, temperature=0.0)
    decode = load_tokenizer(tiny).decode
    assert [decode(item.tokens).strip() for item in said.items] == [
        f"a {animal} is {colour}" for animal, colour in zip(ANIMALS, COLOURS, strict=True)
    ]


def test_a_changed_weight_file_is_refused(references: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in references[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    load_reference(copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.safetensors was changed"):
        load_reference(copy)


def test_evaluation_rows_of_a_whole_run(tiny: str, references: list[Path]) -> None:
    pool, test = words(80, 3), words(30, 2)
    pool = Dataset((*pool.texts, test.texts[0]), (*pool.answers, "animal"), "classification", "words")
    program = compile_program(pool, model=tiny, retriever="bm25", shots=3, budget=200)
    answers = ask_references([load_reference(folder) for folder in references], test)
    series = ("random shots", "zero shots", "floor", "scoring noise")
    result = evaluate(program, open_backend("transformers", tiny), answers, test, dataset_name="words", series=series)
    rows = {row["series"]: row for row in result.rows}
    assert set(rows) == {"program", *series}
    for row in rows.values():
        assert 0 <= row["gap_low"] <= row["gap"] <= row["gap_high"] <= 1
    assert rows["floor"]["gap"] < 0.2 < rows["program"]["gap"], "two trainings agree, an untrained model does not"
    assert rows["scoring noise"]["gap"] < 0.02
    assert rows["program"]["n_examples"] == 80
    assert rows["program"]["shots_per_query"] == 3
    assert "1 row of the pool stands in the test data too" in result.warnings[0]
    assert json.loads(json.dumps(result.rows)) == result.rows
    assert result.worst[0]["tv"] == max(query["tv"] for query in result.worst)
    assert test.texts[0] in {query["text"] for query in result.worst} or len(result.worst) == 10


def test_other_labels_are_refused(tiny: str, references: list[Path]) -> None:
    other = Dataset(("x", "y"), ("colour", "plant"), "classification", "other")
    program = compile_program(other, model=tiny, retriever="bm25")
    answers = ask_references([load_reference(references[0])], words(4, 2))
    with pytest.raises(EvaluationError, match="only the first has 'plant'; only the second has 'animal'"):
        evaluate(program, open_backend("echo", "echo"), answers, words(4, 2), dataset_name="words")


def test_two_references_of_one_seed_are_no_floor(references: list[Path]) -> None:
    with pytest.raises(EvaluationError, match="the seeds 0, 0"):
        ask_references([load_reference(references[0])] * 2, words(4, 2))


def test_bad_training_data(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="2 labels have no example left to train on"):
        data = Dataset(("x", "y", "z"), ("a", "b", "c"), "classification", "three")
        finetune(data, tmp_path / "r", model=tiny, held_out=0.6)
    with pytest.raises(
        ContextLengthError, match=r"1 of the texts exceed the context .*, 256 tokens; the longest has 3"
    ):
        long = words(20, 1)
        data = Dataset((*long.texts, "dog " * 300), (*long.answers, "animal"), "classification", "long")
        finetune(data, tmp_path / "r", model=tiny)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="is not a reference"):
        finetune(words(40, 1), tmp_path / "mine", model=tiny)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"


def test_other_data_are_stopped_on_in_place_of_a_share(tiny: str, tmp_path: Path) -> None:
    data, dev = words(60, 1), words(230, 2)
    both = Dataset((*data.texts, dev.texts[0].upper()), (*data.answers, dev.answers[0]), "classification", "words")
    asked = {"model": tiny, "method": Full(), "settings": SETTINGS}
    reference = finetune(both, tmp_path / "r", **asked, validation=dev)
    facts = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert (facts["data"]["rows"], facts["data"]["held_out_rows"]) == (60, 200)
    assert facts["settings"]["held_out"] == "words"
    assert reference.trained_on(both.texts).tolist() == [True] * 60 + [False]
    assert reference.learned_from(dev.texts) == 200
    wrong = Dataset(dev.texts, tuple({"colour": "animal", "animal": "colour"}[a] for a in dev.answers), dev.task, "dev")
    with_wrong = finetune(both, tmp_path / "w", **asked, validation=wrong)
    assert with_wrong.curve[-1].train_loss == reference.curve[-1].train_loss
    assert with_wrong.curve[-1].held_out_loss > reference.curve[-1].held_out_loss + 0.2
    few = finetune(data, tmp_path / "f", **asked, validation=dev.take(range(3)))
    assert few.learned_from(dev.texts) == 3


def test_validation_data_that_do_not_suit(tiny: str, tmp_path: Path) -> None:
    data = words(20, 1)
    with pytest.raises(LabelError, match=r"dev has the label 'plant', which words lacks"):
        other = Dataset(("x", "y"), ("colour", "plant"), "classification", "dev")
        finetune(data, tmp_path / "r", model=tiny, validation=other)
    with pytest.raises(DataError, match="dev is for generation, and words for classification"):
        finetune(data, tmp_path / "r", model=tiny, validation=Dataset(("x",), ("y",), "generation", "dev"))
    with pytest.raises(TrainingError, match="all 20 rows of words stand in words too, so none is left to train on"):
        finetune(data, tmp_path / "r", model=tiny, validation=data)
    with pytest.raises(TrainingError, match="words has no rows to stop on"):
        finetune(data, tmp_path / "r", model=tiny, validation=data.take([]))
    assert not (tmp_path / "r").exists()


def test_validation_from_the_command_line(tiny: str, tmp_path: Path) -> None:
    def written(name: str, data: Dataset) -> str:
        lines = [f"{text},{answer}" for text, answer in zip(data.texts, data.answers, strict=True)]
        (tmp_path / name).write_text("\n".join(["text,label", *lines]))
        return str(tmp_path / name)

    train, dev = words(40, 1), words(20, 2)
    more = Dataset((*train.texts, dev.texts[3]), (*train.answers, dev.answers[3]), train.task, "train")
    paths = [written("train.csv", more), written("dev.csv", dev), written("test.csv", dev.take(range(5)))]
    arguments = ["finetune", paths[0], "-o", str(tmp_path / "r"), "--model", tiny, "--method", "full", "--epochs", "1"]
    arguments += ["--validation", paths[1]]
    refused = CliRunner().invoke(main, [*arguments, "--held-out", "0.2"])
    assert refused.exit_code == 2
    assert "--validation is held out in its place; give one" in refused.output
    done = CliRunner().invoke(main, [*arguments, "--test", paths[2]])
    assert done.exit_code == 0, done.output
    assert "5 rows of" in done.stderr and "dev.csv left out: in" in done.stderr
    facts = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert (facts["data"]["rows"], facts["data"]["held_out_rows"]) == (40, 15)
    done = CliRunner().invoke(main, arguments)
    assert "1 row of" in done.stderr and "not trained on: in" in done.stderr


def test_a_killed_training_goes_on_and_then_leaves_nothing_behind(tiny: str, tmp_path: Path) -> None:
    def killed(step: int, *_: object) -> None:
        if step == 30:
            raise KeyboardInterrupt

    asked = {"model": tiny, "method": Full(), "settings": SETTINGS, "checkpoint_every_s": 0.0}
    whole = finetune(words(140, 1), tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        finetune(words(140, 1), tmp_path / "new" / "r", **asked, report=killed)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".r.training"]
    steps: list[int] = []
    resumed = finetune(words(140, 1), tmp_path / "new" / "r", **asked, report=lambda step, *_: steps.append(step))
    assert 24 < steps[0] <= 30
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r"]
    assert [(c.step, pytest.approx(c.held_out_loss, rel=1e-3)) for c in resumed.curve] == [
        (c.step, c.held_out_loss) for c in whole.curve
    ]


def test_a_diverging_run_leaves_nothing_behind(tiny: str, tmp_path: Path) -> None:
    settings = LoopSettings(epochs=2, learning_rate=float("inf"))
    with pytest.raises(TrainingError, match="learning-rate"):
        finetune(words(40, 1), tmp_path / "r", model=tiny, method=Full(), settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_label_sets_in_words() -> None:
    many = tuple(str(i) for i in range(9))
    assert same_labels(many, ("0",)) == "only the first has '1', '2', '3', '4', '5' and 3 more"
