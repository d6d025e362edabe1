import re

from measured_rows import VOTE, row

from evaluation.summary import summary_lines


def test_summary_lines_are_aligned():
    lines = summary_lines([row(), row("floor", 0.09, accuracy=None, n_examples=None), row(VOTE, None)])
    header, *body, note = lines
    assert note == "(- not measured)"
    for name in ("n", "accuracy", "agreement", "ECE", "tokens/query", "s/query"):
        end = re.search(rf"(?<!\S){name}(?!\S)", header).end()
        for line in body:
            assert line[end - 1] != " ", (name, line)
            assert line[end : end + 1] in ("", " "), (name, line)
    assert " ".join(body[0].split()) == "program 512 0.210 [0.180, 0.240] 0.834 0.805 0.072 731 0.513"


def test_summary_lines_tell_apart_what_varies():
    header = summary_lines([row(), row(max_prompt_tokens=2048), row(retriever="bm25"), row(dataset="mr")])[0]
    assert header.split()[:4] == ["dataset", "series", "budget", "retriever"]
    assert summary_lines([row()])[0].split()[:2] == ["series", "n"]


def test_the_terminal_gets_no_control_characters():
    rows = [row(dataset="a\x1b[2J\n"), row(dataset="b")]
    assert all(character.isprintable() for line in summary_lines(rows) for character in line)
