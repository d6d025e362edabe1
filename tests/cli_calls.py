"""Calling `icl` as tests do, with a few rows to compile and a program of them."""

from pathlib import Path

from click.testing import CliRunner, Result

from icl_compiler.cli import main

ROWS = [
    (f"{text} {i}", label)
    for i in range(6)
    for text, label in [
        ("where is my parcel", "track"),
        ("my card was stolen", "card"),
        ("send my money back", "refund"),
    ]
]


def icl(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text, prog_name="icl")


def done(*arguments: object, text: str | None = None) -> str:
    """What the command wrote to standard output; it must succeed, and say nothing on standard error."""
    result = icl(*arguments, text=text)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def write_rows(folder: Path) -> Path:
    """`train.csv` of the rows above, and a small `test.csv`, in `folder`."""
    lines = [f"{text},{label}" for text, label in ROWS]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    (folder / "test.csv").write_text("text,label\nwhere is it,track\nmy lost card,card\nmoney please,refund\n")
    return folder


def compiled(folder: Path) -> Path:
    """A program of `train.csv` in `folder`, where this process now is."""
    done("compile", "train.csv", "-o", "program", "--model", "echo", "--retriever", "bm25", "--shots", 2)
    return folder / "program"
