"""What other programs write (csv, json, pandas, pyarrow, datasets) is read back equal, or refused."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.errors import ColumnError, DataError, DataFormatError
from icl_compiler.readers import read_lines, read_table

# What can be encoded, without NUL (refused in text files). U+2028, quotes and line ends are made frequent.
CELL = st.text(
    st.one_of(
        st.sampled_from("\u2028\u2029\x85\x1c\"',;\t\n\r \ufeff"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=12,
)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def columns(path: Path | str) -> list[list[object]]:
    table = read_table(path)
    return [table.column(name) for name in table.names]


def or_none(cells: list[str]) -> list[str | None]:
    return [cell if cell.strip() else None for cell in cells]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
@settings(max_examples=150, deadline=None)
@given(rows=ROWS, line_end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), quote_all=st.booleans())
def test_what_the_csv_module_writes_is_read_back(
    folder: Path,
    suffix: str,
    separator: str,
    rows: list[tuple[str, str]],
    line_end: str,
    bom: bool,
    quote_all: bool,
) -> None:
    buffer = io.StringIO(newline="")
    # QUOTE_MINIMAL leaves a lone carriage return bare where line_end is "\n": no reader could tell it apart.
    quoting = csv.QUOTE_ALL if quote_all or any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    writer = csv.writer(buffer, delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writerows([("text", "label"), *rows])
    path = write(folder, f"property.{suffix}", buffer.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    assert columns(path) == [or_none([row[0] for row in rows]), or_none([row[1] for row in rows])]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@settings(max_examples=100, deadline=None)
@given(rows=ROWS, ascii_only=st.booleans())
def test_what_json_and_pyarrow_write_is_read_back(
    folder: Path, suffix: str, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    objects = [{"text": text, "label": label} for text, label in rows]
    path = folder / f"property.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(objects), path)
    elif suffix == "json":
        path.write_text(json.dumps(objects, ensure_ascii=ascii_only), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in objects]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert columns(path) == [[row[0] for row in rows], [row[1] for row in rows]]


def test_numbers_of_rows_are_those_that_a_person_sees(tmp_path: Path) -> None:
    plain = read_table(write(tmp_path, "plain.csv", "text,label\na,x\n\nb,y\n"))
    assert [plain.place(0), plain.place(1)] == ["row 2", "row 4"]
    several = read_table(write(tmp_path, "several.csv", 'text,label\n"a\nb",x\nc,y\n'))
    assert [several.place(0), several.place(1)] == ["line 2", "line 4"]
    lines = read_table(write(tmp_path, "lines.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'))
    assert lines.place(1) == "row 3"
    array = read_table(write(tmp_path, "array.json", '[{"text": "a"},\n\n{"text": "b"}]'))
    assert array.place(1) == "row 2"


def test_a_long_list_of_rows_is_shortened(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.jsonl", '{"a": 1}\n' * 9))
    assert table.places([0]) == "row 1"
    assert table.places([0, 2, 4]) == "rows 1, 3, 5"
    assert table.places(range(9)) == "rows 1, 2, 3 and 6 more"


def test_missing_values_are_none_and_their_names_are_not(tmp_path: Path) -> None:
    strings = ["nan", "None", "NA", "null", "0", "0.0", "False"]
    path = write(tmp_path, "a.csv", "text,label\n" + "".join(f"t,{word}\n" for word in [*strings, "", "  "]))
    assert columns(path)[1] == [*strings, None, None]
    path = write(tmp_path, "a.jsonl", '{"l": 0}\n{"l": ""}\n{"l": false}\n{"l": null}\n{}\n{"l": NaN}\n{"l": "nan"}')
    assert columns(path)[0] == [0, "", False, None, None, None, "nan"]


def test_quotes_that_do_not_pair_in_a_tsv_are_characters(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "glue.tsv", 'sentence\tlabel\n" what a film !\t1\nso "so" bad\t0\n'))
    assert table.column("sentence") == ['" what a film !', 'so "so" bad']
    assert table.warnings == ("quotes do not pair (1 cell begins with one), so all were read as characters.",)
    quoted = read_table(write(tmp_path, "excel.tsv", 'sentence\tlabel\n"a\tb"\t1\n"say ""hi"""\t0\n'))
    assert (quoted.column("sentence"), quoted.warnings) == (["a\tb", 'say "hi"'], ())


def test_a_cell_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "word " * 40_000
    assert columns(write(tmp_path, "a.csv", f"text,label\n{text},x\n"))[0] == [text]
    assert csv.field_size_limit() == limit < len(text)


def test_class_labels_become_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    saved.to_parquet(tmp_path / "a.parquet")
    saved.select([2, 0]).save_to_disk(tmp_path / "saved")
    assert columns(tmp_path / "a.parquet") == [["a", "b", "c"], ["yes", "no", None]]
    assert columns(tmp_path / "saved") == [["c", "a"], [None, "yes"]]


def test_other_parquet_writers(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b"], "label": pd.Categorical(["x", None]), "score": [1.5, None]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert columns(tmp_path / "a.parquet")[:3] == [["a", "b"], ["x", None], [1.5, None]]


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    import datasets

    one, two = (datasets.Dataset.from_dict({"text": [word]}) for word in ("one", "two"))
    datasets.DatasetDict({"test": one, "train": two}).save_to_disk(tmp_path / "both")
    assert columns(tmp_path / "both") == [["two"]]
    assert columns(f"{tmp_path / 'both'}:test") == [["one"]]
    with pytest.raises(DataError, match=r"has no split 'dev'; name one of 'test', 'train', as in .*both:test"):
        read_table(f"{tmp_path / 'both'}:dev")
    datasets.DatasetDict({"dev": one}).save_to_disk(tmp_path / "single")
    assert columns(tmp_path / "single") == [["one"]]
    datasets.DatasetDict({"dev": one, "test": two}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(DataError, match="has several splits and none named 'train'; name one of 'dev', 'test'"):
        read_table(tmp_path / "no_train")
    one.save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match="one dataset without splits"):
        read_table(f"{tmp_path / 'plain'}:train")
    next((tmp_path / "plain").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataFormatError, match="cannot be loaded as a saved dataset"):
        read_table(tmp_path / "plain")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_a_dataset_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    write(tmp_path / "named", "train.csv", "text,label\na,x\nb,y\n")
    write(tmp_path / "named", "test.csv", "text,label\nc,x\n")
    name = f"hf:{tmp_path / 'named'}"
    assert columns(name) == [["a", "b"], ["x", "y"]]
    assert columns(f"{name}:test") == [["c"], ["x"]]
    assert columns(f"{name}:train[:1]") == [["a"], ["x"]]
    assert columns(f"{name}:default:test") == [["c"], ["x"]]


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (":dev", 'hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT .*Unknown split "dev". Should be one of'),
        (":other:train", "hf:NAME:CONFIG:SPLIT .*BuilderConfig 'other' not found. Available: "),
        (":a:b:c", "is not understood; expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"),
        (":", "is not understood"),
        ("/train.csv", "is on this machine; name it without 'hf:', as /"),
        ("/absent", "cannot be loaded: there is no such folder"),
    ],
)
def test_a_name_that_cannot_be_loaded(tmp_path: Path, rest: str, message: str) -> None:
    write(tmp_path, "train.csv", "text,label\na,x\nb,y\n")
    with pytest.raises(DataError, match=message):
        read_table(f"hf:{tmp_path}{rest}")


@pytest.mark.usefixtures("hub_cache")
def test_the_hub_out_of_reach() -> None:
    with pytest.raises(DataError, match=r"there is no folder nobody/nothing, and offline mode .* unset HF_HUB_OFFLINE"):
        read_table("hf:nobody/nothing")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'x/y' on the Hub"),
            "the hub cannot be reached; check the network, or name",
        ),
        (
            FileNotFoundError("Dataset 'x/y' doesn't exist on the Hub"),
            "check that https://huggingface.co/datasets/x/y",
        ),
        (
            PermissionError("Dataset 'x/y' is a gated dataset"),
            "accept its terms on the hub, then run: hf auth login",
        ),
        (RuntimeError(), r"\(datasets says: RuntimeError\)"),
    ],
)
def test_what_the_hub_says_becomes_advice(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=message):
        read_table("hf:x/y")


REFUSED = [
    ("empty.csv", b"", DataError, r"empty.csv is empty \(0 bytes\)"),
    ("empty.parquet", b"", DataError, r"empty.parquet is empty \(0 bytes\)"),
    ("blank.jsonl", b"\n \n", DataError, r"is empty \(blank lines only\)"),
    ("bom.csv", b"\xef\xbb\xbf", DataError, "is empty"),
    ("header.csv", b"text,label\n", DataError, "holds no rows below its header"),
    ("none.json", b"[]", DataError, "none.json holds no rows"),
    (
        "ragged.csv",
        b"text,label\na,x\nb, c,y\n",
        DataFormatError,
        "row 3, has 3 cells where .* has 2; .*comma",
    ),
    ("short.tsv", b"text\tlabel\na\n", DataFormatError, "row 2, has 1 cell where the header has 2; .*tab"),
    ("deep.csv", b'text,label\n"a\nb",x\nc\n', DataFormatError, "line 4, has 1 cell"),
    ("open.csv", b'text,label\na,x\n"b,y\nc,z\n', DataFormatError, "from line 3 on: unexpected end of data"),
    ("inner.csv", b'text,label\n"a" b,y\n', DataFormatError, "from line 2 on: ',' expected after .*doubled"),
    ("semi.csv", b"text;label\na;x\n", DataFormatError, "'text;label': .* a semicolon, expected a comma"),
    ("tab.csv", b"text\tlabel\na\tx\n", DataFormatError, "a tab, expected a comma.*rename it to .tsv"),
    ("comma.tsv", b"text,label\na,x\n", DataFormatError, "a comma, expected a tab.*rename it to .csv"),
    ("twice.csv", b"text,label,text\na,x,b\n", ColumnError, "has 2 columns named 'text'"),
    (
        "latin.csv",
        b"text,label\na,x\ncaf\xe9,y\n",
        DataFormatError,
        "byte 0xE9 in line 3, after 'caf'. .*iconv",
    ),
    ("latin.jsonl", b'{"text": "a"}\n\xff\n', DataFormatError, "byte 0xFF in line 2. "),
    ("wide.csv", "text,label\na,x\n".encode("utf-16"), DataFormatError, "is UTF-16, not UTF-8.*iconv -f"),
    ("nul.csv", b"text,label\na,x\nb\0,y\n", DataFormatError, "NUL byte in line 3"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', DataFormatError, "row 2, .*: Expecting value, column 10"),
    ("scalar.jsonl", b'{"text": "a"}\n7\n', DataFormatError, r"row 2, is a number \(7\), not an object"),
    ("array.jsonl", b'[{"text": "a"}]\n', DataFormatError, "row 1, is a list .*one array ends in .json"),
    ("pretty.jsonl", b'[\n{"text": "a"}\n]\n', DataFormatError, "row 1, is no JSON .*ends in .json"),
    ("nested.jsonl", b"[" * 200_000, DataFormatError, "row 1, is no JSON object: maximum recursion depth"),
    ("lines.json", b'{"a": "a"}\n{"a": "b"}\n', DataFormatError, "Extra data.*object a line ends in .jsonl"),
    ("object.json", b'{"data": [], "n": 1}', DataFormatError, "the keys 'data', 'n'; expected an array"),
    ("mixed.json", b'[{"text": "a"}, null]', DataFormatError, "row 2, is null, not an object"),
    ("not.parquet", b"PAR1 but no more of it", DataFormatError, "cannot be read as Parquet"),
    ("a.xlsx", b"PK", DataFormatError, "is a spreadsheet; save it as CSV"),
    ("a.csv.gz", b"\x1f\x8b", DataFormatError, "is compressed; unpack it"),
    ("a.txt", b"hello", DataFormatError, "text file, which has no labels; expected one of .csv, .tsv"),
    ("a.dat", b"hello", DataFormatError, "ends in .dat; expected one of .csv"),
    ("noname", b"hello", DataFormatError, "ends in no suffix; expected one of"),
]


@pytest.mark.parametrize(("name", "content", "error", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_with_a_sentence(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read_table(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"text {i}" for i in range(1000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(DataFormatError, match="column 'text', cannot be read"):
        read_table(path).column("text")


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    column = pa.array([b"good", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataFormatError, match="row 2, is not UTF-8"):
        read_table(tmp_path / "a.parquet").column("text")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "text,label\na,x\n")
    with pytest.raises(DataError, match=r"there is no file .*trian.csv; did you mean .*train.csv\?"):
        read_table(tmp_path / "trian.csv")
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        read_table(tmp_path / "nowhere" / "train.csv")
    with pytest.raises(DataError, match=r"is a folder, and none that .* saved.* files of its own: 'train.csv'"):
        read_table(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        read_table("x" * 5000)
    with pytest.raises(DataError, match="no data file is named"):
        read_table("")


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeff one \r\n\r\ntwo\u2028still two\n\n")
    assert read_lines(path) == (" one ", "two\u2028still two")
    with pytest.raises(DataFormatError, match="byte 0xE9 in line 2"):
        read_lines(write(tmp_path, "b.txt", b"a\n\xe9"))
    with pytest.raises(DataError, match="is empty"):
        read_lines(write(tmp_path, "c.txt", "\n\n"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_lines(tmp_path)
