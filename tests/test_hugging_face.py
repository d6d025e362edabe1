"""Datasets of Hugging Face, in and out: the same rows as from a file, and back again."""

import datasets
import numpy as np
import pytest
from toys import TopEcho, customers

from icl_compiler.adapters.hugging_face import from_datasets, pool_dataset, predictions_dataset
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset
from icl_compiler.errors import ColumnError, InputError, LabelError
from icl_compiler.predictor import PromptedPredictor


def program_of(data):
    return compile_program(data, model="echo", retriever="bm25", shots=2)


def test_a_dataset_in_memory_is_read_as_its_file_is(tmp_path):
    rows = [{"sentence": f"text {i % 7}", "intent": i % 2, "body": "x"} for i in range(9)]
    rows += [{"sentence": "  ", "intent": 1, "body": "x"}]
    dataset = datasets.Dataset.from_list(rows).cast_column("intent", datasets.ClassLabel(names=["no", "yes"]))
    dataset.save_to_disk(tmp_path / "saved")
    read, filed = from_datasets(dataset), load_dataset(tmp_path / "saved")
    assert (read.texts, read.answers, read.warnings) == (filed.texts, filed.answers, filed.warnings)
    assert len(read.warnings) > 1
    named = from_datasets(dataset, text_column="body", target_column="sentence")
    assert (named.task, named.texts[0], named.answers[0]) == ("generation", "x", "text 0")
    assert from_datasets(dataset.select([3, 2])).texts == ("text 3", "text 2")


def test_what_is_no_dataset_is_refused():
    two = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(InputError, match=r"'train', 'test'.*data\['train'\]"):
        from_datasets.__wrapped__(datasets.DatasetDict(train=two, test=two))
    with pytest.raises(InputError, match=r"IterableDataset; .*\.take"):
        from_datasets.__wrapped__(two.to_iterable_dataset())
    with pytest.raises(InputError, match="no rows"):
        from_datasets(two.select([]))
    with pytest.raises(ColumnError, match="has no column 'body'"):
        from_datasets(two, text_column="body")
    with pytest.raises(LabelError, match="one label only"):
        from_datasets(two.select([0]))


def test_a_pool_goes_out_and_in(tmp_path):
    program = program_of(customers())
    pool = pool_dataset(program)
    assert pool.features["label"].names == list(program.labels)
    assert pool[5] == {"text": customers().texts[5], "label": program.labels.index(customers().answers[5])}
    assert from_datasets(pool).content_hash == customers().content_hash
    pool.save_to_disk(tmp_path / "pool")
    assert load_dataset(tmp_path / "pool").content_hash == customers().content_hash
    pairs = Dataset(("one", "two"), ("eins", "zwei"), "generation", "pairs")
    assert from_datasets(pool_dataset(program_of(pairs))).content_hash == pairs.content_hash


def test_predictions_stand_beside_their_texts():
    texts = ["my card", "a parcel", "money"]
    program = program_of(customers())
    said = PromptedPredictor(program, EchoBackend()).predict(texts)
    made = predictions_dataset(texts, said)
    assert made["text"][:] == texts
    np.testing.assert_array_equal(np.array(made["probabilities"][:]), said.probabilities)
    np.testing.assert_allclose(np.array(made["other"][:]) + np.sum(made["probabilities"][:], axis=1), 1)
    names = made.features["label"].names
    assert [names[row["label"]] for row in made] == [said.labels[i] for i in said.probabilities.argmax(axis=1)]
    assert made["prompt_tokens"][:] == [len(prompt.tokens) for prompt in program.prompts(texts)]
    assert "at_most" not in made.column_names
    bounds = PromptedPredictor(program, TopEcho(1)).predict(texts)
    np.testing.assert_array_equal(np.array(predictions_dataset(texts, bounds)["at_most"][:]), bounds.upper)
    with pytest.raises(InputError, match="2 texts and 3"):
        predictions_dataset(texts[:2], said)
