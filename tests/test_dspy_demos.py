"""Demos for DSPy: what its own `Predict` loads and puts into a prompt."""

import json

import pytest
from toys import customers

from icl_compiler.adapters.dspy_demos import dspy_demos, write_dspy_state
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import ArtifactError, InputError

QUERY = "where is my parcel now"


def compiled(retriever="bm25", data=None):
    return compile_program(data or customers(), model="echo", retriever=retriever, shots=3, budget=2000)


def shots(program, text):
    return [(shot.text, shot.label) for shot in program.explain(text).shots]


def test_demos_are_the_shots_in_their_order():
    program = compiled()
    assert [(demo["text"], demo["label"]) for demo in dspy_demos(program, QUERY)] == shots(program, QUERY)
    assert dspy_demos(program, QUERY, text_field="q", answer_field="a")[0].keys() == {"q", "a"}


def test_a_fixed_set_needs_a_retriever_that_finds_the_same_for_every_text(tmp_path):
    with pytest.raises(InputError, match=r"other shots for every text.*uniform, votek"):
        write_dspy_state(compiled(), tmp_path / "demos.json")
    write_dspy_state(compiled("uniform"), tmp_path / "demos.json")
    demos = json.loads((tmp_path / "demos.json").read_text(encoding="utf-8"))["demos"]
    assert [(demo["text"], demo["label"]) for demo in demos] == shots(compiled("uniform"), "anything else")


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.txt"):
        write_dspy_state(compiled(), tmp_path / "demos.txt", text="x")
    (tmp_path / "taken.json").mkdir()
    for path in (tmp_path / "nowhere" / "demos.json", tmp_path / "taken.json"):
        with pytest.raises(ArtifactError, match="cannot be written"):
            write_dspy_state(compiled(), path, text="x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_dspy_loads_the_file_and_shows_the_demos(tmp_path):
    dspy = pytest.importorskip("dspy", reason="needs DSPy, which is heavy: pip install dspy")
    program = compiled(data=Dataset(("Größe, \"x\" {y}", *customers().texts), ("card", *customers().answers),
                                    "classification", "more"))  # fmt: skip
    write_dspy_state(program, tmp_path / "demos.json", text="größe y card")
    loaded = dspy.Predict("text -> label")
    loaded.load(tmp_path / "demos.json")
    assert [(demo["text"], demo["label"]) for demo in loaded.demos] == shots(program, "größe y card")
    assert loaded.signature.instructions == "Say which label fits the text. Labels: card, parcel, refund."
    assert [field.json_schema_extra["prefix"] for field in loaded.signature.fields.values()] == ["Text:", "Label:"]

    own = dspy.Predict("text -> label")
    own.signature, own.demos = loaded.signature, [dspy.Example(demo) for demo in loaded.demos]
    own.save(tmp_path / "own.json")
    ours, theirs = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("demos.json", "own.json"))
    assert ours.keys() == theirs.keys()
    assert ours["demos"] == theirs["demos"]

    prompts = dspy.ChatAdapter().format(loaded.signature, loaded.demos, {"text": QUERY})
    turns = [message["content"] for message in prompts if message["role"] == "assistant"]
    assert ["[[ ## label ## ]]\n" + label in turn for turn, (_, label) in zip(turns, shots(program, "größe y card"),
            strict=True)] == [True] * 3  # fmt: skip


def test_dspy_takes_demos_with_each_call():
    dspy = pytest.importorskip("dspy", reason="needs DSPy, which is heavy: pip install dspy")
    from dspy.utils import DummyLM

    program, model = compiled(), DummyLM([{"label": "parcel"}])
    with dspy.context(lm=model):
        said = dspy.Predict("text -> label")(text=QUERY, demos=dspy_demos(program, QUERY))
    assert said.label == "parcel"
    asked = json.dumps(model.history[-1]["messages"])
    assert all(text in asked for text, _ in shots(program, QUERY))
    assert [text for text in customers().texts if text in asked] == sorted(
        [text for text, _ in shots(program, QUERY)], key=customers().texts.index
    )
