"""The log of a search: what it answers from, what it keeps, and what a killed process leaves."""

import pytest

from icl_compiler.errors import ArtifactError
from icl_compiler.optimise.score_log import ScoreLog


class Model:
    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append([list(prompt) for prompt in prompts])
        return [[[float(sum(prompt)), float("-inf")]] for prompt in prompts]


@pytest.fixture
def model():
    return Model()


def test_no_prompt_is_asked_twice_not_even_by_another_process(tmp_path, model):
    path = tmp_path / "new" / "log.jsonl"  # its folder is made, as that of the program beside it will be
    log = ScoreLog(path)
    assert log.answers("m", [[1], (2,), [1]], model) == [
        [[1.0, float("-inf")]],
        [[2.0, float("-inf")]],
        [[1.0, float("-inf")]],
    ]
    assert log.answers("m", [[2], [3]], model)[1] == [[3.0, float("-inf")]]
    again = ScoreLog(path)
    assert again.answers("m", [[3], [2]], model) == [[[3.0, float("-inf")]], [[2.0, float("-inf")]]]
    assert model.calls == [[[1], [2]], [[3]]]
    assert (log.asked, again.asked) == (3, 2)


def test_another_model_is_asked_again(tmp_path, model):
    for name in ("one", "two"):
        ScoreLog(tmp_path / "log.jsonl").answers(name, [[1]], model)
    assert len(model.calls) == 2


def test_half_a_line_is_asked_again_as_a_whole(tmp_path, model):
    path = tmp_path / "log.jsonl"
    log = ScoreLog(path)
    log.answers("m", [[1]], model)
    log.answers("m", [[2], [3]], model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = ScoreLog(path)
    again.answers("m", [[1]], model)
    again.answers("m", [[2], [3]], model)
    assert model.calls == [[[1]], [[2], [3]], [[2], [3]]]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["a,b\n", "[1]\n", '{"a": 1}\n', "\xff\n"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ArtifactError, match="does not hold the answers of a search"):
        ScoreLog(path)
    assert path.read_text(encoding="latin-1") == content
