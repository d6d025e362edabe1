"""Rows by what stands in their columns."""

import json

import pytest

from icl_compiler.data import load_dataset
from icl_compiler.errors import ColumnError, DataError

ROWS = [
    {"text": "hallo", "label": "greet", "lang": "de", "stars": 5},
    {"text": "bis bald", "label": "part", "lang": " de ", "stars": 3},
    {"text": "hello", "label": "greet", "lang": "en", "stars": 5},
    {"text": "bye", "label": "part", "lang": None, "stars": 1},
    {"text": "who knows", "label": None, "lang": "fr", "stars": 1},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        (["lang=de"], ("hallo", "bis bald")),
        (["lang!=fr"], ("hallo", "bis bald", "hello", "bye")),
        (["lang!=fr", "stars=5", "text!=hi"], ("hallo", "hello")),
        ([" lang = de", "stars=5"], ("hallo",)),
        (["lang="], ("bye",)),
        (["lang!=", "lang!=fr"], ("hallo", "bis bald", "hello")),
    ],
)
def test_rows_that_fulfil_all_conditions(source, where, texts):
    assert load_dataset(source, where=where, need_answers=False).texts == texts


def test_a_row_left_out_needs_no_label(source):
    assert len(load_dataset(source, where=["lang!=fr"])) == 4
    with pytest.raises(DataError, match="no label in 1 of 5 rows"):
        load_dataset(source)


@pytest.mark.parametrize("given", ["", "lang", "=de", "!=de", "lang==de", "__import__('os')=1"])
def test_what_is_no_condition_is_refused_in_words(source, given):
    with pytest.raises((DataError, ColumnError), match=r"expected COLUMN=VALUE|has no column|no row of .* is left"):
        load_dataset(source, where=[given])


def test_a_column_that_is_not_there_and_a_value_that_is_nowhere(source):
    with pytest.raises(ColumnError, match="has no column 'language'; it has 'text', 'label', 'lang', 'stars'"):
        load_dataset(source, where=["language=de"])
    with pytest.raises(DataError, match=r"no row of .* is left where stars=5 and lang=pl; 'lang' holds 'de', 'en'"):
        load_dataset(source, where=["stars=5", "lang=pl"])
