import json
import subprocess
import sys

import pytest

from evaluation.row_file import RowFile, read_rows
from icl_compiler.errors import DataError


def written(path, *rows):
    with RowFile(path) as file:
        file.add(rows)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_half_a_line_is_cut_off_and_nothing_else_is_lost(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    written(path, {"key": "a", "gap": 0.5}, {"key": "b", "gap": 0.25})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "gap": 0.125}'[:cut])
    assert [row["key"] for row in read_rows(path)] == ["a", "b"]
    written(path, {"key": "c", "gap": 0.125})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert path.read_bytes().startswith(whole)


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"}')
    written(path, {"key": "b"}, {"key": "c"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n{"key": "c"}\n'


def test_a_key_comes_in_once(tmp_path):
    written(tmp_path / "rows.jsonl", {"key": "a"}, {"key": "a"})
    written(tmp_path / "rows.jsonl", {"key": "a"})
    assert (tmp_path / "rows.jsonl").read_text() == '{"key": "a"}\n'


def test_a_line_of_another_kind_is_an_error_and_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\nnot a row\n{"key": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: expected a row of a sweep"):
        RowFile(path)
    assert path.read_text() == '{"key": "a"}\nnot a row\n{"key": "b"}\n'


def test_a_second_writer_is_told_so(tmp_path):
    code = "import sys, pathlib; from evaluation.row_file import RowFile; RowFile(pathlib.Path(sys.argv[1]))"
    with RowFile(tmp_path / "rows.jsonl"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "rows.jsonl"], capture_output=True, text=True)
    assert "another process writes to" in done.stderr
