"""`icl finetune`, `icl merge` and `icl evaluate` in normal use, of a random model of two layers that reads bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import compiled, done, icl, write_rows
from tiny_model import save_byte_model

from evaluation.reference.trainer import load_reference
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.compile import zero_shot_program
from icl_compiler.errors import BackendError
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path)


@pytest.fixture
def program(here: Path) -> Path:
    return compiled(here)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("reference"))
    out = folder / "seed-0"
    finetuned = [
        "finetune",
        folder / "train.csv",
        "-o",
        out,
        "--model",
        tiny,
        "--epochs",
        1,
        "--held-out",
        0.2,
        "--json",
    ]
    said = json.loads(done(*finetuned))
    assert said["reference"] == str(out)
    assert (said["method"], said["examples"], said["seed"]) == ("RSR, 2.00% of the parameters", 14, 0)
    assert said["held_out_loss"] == min(check["held_out_loss"] for check in said["curve"])
    return out


def test_finetune_says_what_it_made(tiny: Path, here: Path) -> None:
    said = done("finetune", "train.csv", "-o", "r", "--model", tiny, "--epochs", 1, "--first-layer", 1, "--seed", 3)
    assert said.startswith("r: RSR, 2.00% of the parameters, seed 3, 16 examples; held-out loss ")
    assert load_reference(here / "r").labels == ("card", "refund", "track")


def test_finetune_on_named_columns_and_rows_without_those_of_the_test(tiny: Path, here: Path) -> None:
    rows = [
        f"{i} {colour},a {colour} thing,{part}" for i in range(12) for colour, part in (("red", "x"), ("blue", "y"))
    ]
    (here / "pairs.csv").write_text("\n".join(["said,meant,part", *rows]))
    (here / "asked.csv").write_text("\n".join(["said,meant,part", *rows[:4]]))
    asked = ["finetune", "pairs.csv", "-o", "writer", "--model", tiny, "--epochs", 1, "--held-out", 0.2]
    asked += ["--text-column", "said", "--target-column", "meant"]
    result = icl(*asked, "--where", "part=x", "--test", "asked.csv", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == "Warning: 2 rows of pairs.csv left out: in asked.csv too\n"
    assert json.loads(result.stdout)["examples"] == 8  # of twelve red ones, less the test's two and the held-out two
    reference = load_reference(here / "writer")
    assert (reference.labels, reference.examples) == ((), 8)
    done("compile", "pairs.csv", "-o", "p", "--model", tiny, "--retriever", "bm25", "--shots", 1, *asked[10:])
    evaluate = ["evaluate", "p", "--reference", "writer", "--no-baselines", "--max-new-tokens", 4, *asked[10:]]
    said = icl(*evaluate, "--data", "asked.csv", "--where", "part=x", "--json")
    assert said.exit_code == 0, said.output
    assert [row["n_queries"] for row in json.loads(said.stdout)["rows"]] == [2]
    lost = icl(*asked, "--where", "part=z")
    assert (lost.exit_code, "no row of pairs.csv is left where part=z" in " ".join(lost.stderr.split())) == (1, True)


@pytest.mark.parametrize(
    ("method", "settings", "described"),
    [
        ("rsr", ["budget=0.05", "rounds=2", "unit=8"], "RSR, 5.00% of the parameters"),
        ("lora", ["rank=2"], "LoRA, rank 2"),
        ("shira", ["share=0.05"], "SHiRA"),
        ("loreft", ["layers=[1]"], "LoReFT"),
    ],
)
def test_finetune_by_each_method_and_merge(
    tiny: Path, here: Path, method: str, settings: list[str], described: str
) -> None:
    told = [part for setting in settings for part in ("--set", setting)]
    asked = ["finetune", "train.csv", "-o", "r", "--model", tiny, "--epochs", 2, "--method", method, *told]
    said = json.loads(done(*asked, "--json"))
    assert said["method"].startswith(described)
    reference = load_reference(here / "r")
    before = reference.predictor(dtype="float32").predict(["my card was stolen"]).probabilities
    assert done("merge", "r", "-o", "merged").startswith("merged: ")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (here / "merged").iterdir()}
    if method != "loreft":  # which transformers does not know
        program = zero_shot_program(reference.labels, reference.template, model=str(here / "merged"))
        merged = PromptedPredictor(program, TransformersBackend(str(here / "merged"), "float32"))
        after = merged.predict(["my card was stolen"]).probabilities
        np.testing.assert_allclose(after, before, atol=0.02)  # the checkpoint is in bfloat16
    again = icl("merge", "r", "-o", "merged")
    assert (again.exit_code, "merged exists" in again.stderr) == (1, True)


def test_a_probe_is_no_model_to_merge(tiny: Path, here: Path) -> None:
    done("finetune", "train.csv", "-o", "r", "--model", tiny, "--method", "head")
    said = icl("merge", "r", "-o", "merged")
    assert said.exit_code == 1
    assert "Traceback" not in said.output
    assert not (here / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--method", "rsr", "--set", "budgte=1"], 1, "has no setting 'budgte'. Did you mean 'budget'?"),
        (["--method", "lora", "--set", "rank=high"], 1, "rank should be a whole number, is 'high'"),
        (["--method", "lora", "--set", "rank"], 2, "--set is NAME=VALUE, such as rank=16, not 'rank'"),
        (["--method", "lora", "--first-layer", "1"], 2, "--first-layer is for the methods full and rsr, not for lora"),
        (["--method", "rsr", "--set", "revert=7"], 1, "revert should be true or false, is '7'"),
        (["--method", "head", "--set", "rank=1"], 1, "has no setting 'rank'. It has none."),
    ],
)
def test_settings_that_no_method_has(here: Path, tiny: Path, arguments: list[str], code: int, said: str) -> None:
    found = icl("finetune", "train.csv", "-o", "r", "--model", tiny, *arguments)
    assert (found.exit_code, said in " ".join(found.stderr.split())) == (code, True), found.stderr
    assert not (here / "r").exists()


def test_evaluate_writes_rows_and_a_report(program: Path, reference: Path, here: Path) -> None:
    asked = ["evaluate", program, "--reference", reference, "--data", "test.csv", "--no-baselines", "--examples", 6]
    said = json.loads(done(*asked, "--rows", "rows.jsonl", "-o", "report.html", "--json"))
    assert [(row["series"], row["n_examples"]) for row in said["rows"]] == [("program", 6), ("program", 18)]
    assert all(0 <= row["gap_low"] <= row["gap"] <= row["gap_high"] <= 1 for row in said["rows"])
    kept = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    assert [len(row.pop("gaps")) for row in kept] == [3, 3]  # which nobody reads on a screen
    assert kept == said["rows"]
    page = (here / "report.html").read_text(encoding="utf-8")
    assert f"icl evaluate {program} --reference {reference} --data test.csv" in page
    # Again, in words; rows are appended.
    words = done(*asked, "--rows", "rows.jsonl", "--queries", 2)
    assert words.startswith("series ")
    assert len((here / "rows.jsonl").read_text().splitlines()) == 4


def test_a_test_on_what_the_reference_learned_is_said(program: Path, reference: Path, here: Path) -> None:
    (here / "seen.csv").write_text("text,label\nWhere is  my parcel 0,track\nis my card lost,card\nmoney,refund\n")
    asked = ["evaluate", program, "--reference", reference, "--no-baselines", "--json"]
    said = json.loads(icl(*asked, "--data", "seen.csv").stdout)["warnings"]
    assert any(f"1 of the 3 test texts stands among the rows that the reference {reference}" in each for each in said)
    assert json.loads(icl(*asked, "--data", "test.csv").stdout)["warnings"] == []
    assert load_reference(reference).learned_from(["my card was stolen 3", "no such text"]) == 1


def test_evaluate_asks_until_it_is_decided(program: Path, reference: Path, here: Path) -> None:
    lines = [
        f"{text} {i},{label}" for i in range(20) for text, label in (("where is it", "track"), ("my card", "card"))
    ]
    (here / "many.csv").write_text("\n".join(["text,label", *lines]))
    asked = ["evaluate", program, "--reference", reference, "--data", "many.csv", "--no-baselines", "--epsilon", 0.999]
    said = json.loads(done(*asked, "--rows", "rows.jsonl", "--per-query", "gaps.jsonl", "--json"))
    [row] = said["rows"]
    assert (row["decision"], row["epsilon"], row["queries_asked"], row["queries_max"]) == ("within", 0.999, 16, 40)
    assert "Within 0.999: decided after 16 of at most 40 queries, 24 saved." in " ".join(said["verdict"])
    each = json.loads((here / "gaps.jsonl").read_text())
    assert len(each["gaps"]) == len(each["correct"]) == 16
    assert row["gap"] == pytest.approx(sum(each["gaps"]) / 16)
    assert json.loads(done("compare", "gaps.jsonl", "gaps.jsonl", "--json"))["differences"][0]["p_value"] == 1
    assert "16 of at most 40 queries" in " ".join(done("decide", "rows.jsonl", "--epsilon", 0.999).split())
    found = json.loads(done(*asked, "--examples", 6, "--json"))["rows"]
    assert [(row["n_examples"], row["decision"], row["queries_asked"]) for row in found] == [
        (6, "within", 16), (18, "within", 16)
    ]  # fmt: skip
    assert (found[1]["gap"], found[1]["gap_low"]) == (row["gap"], row["gap_low"])


def test_evaluate_texts(tiny: Path, here: Path) -> None:
    rows = [f"{i} {colour},a {colour} thing" for i in range(8) for colour in ("red", "blue")]
    (here / "pairs.csv").write_text("\n".join(["input,output", *rows]))
    (here / "asked.csv").write_text("\n".join(["input,output", *(f"9{row}" for row in rows)]))
    done("finetune", "pairs.csv", "-o", "writer", "--model", tiny, "--epochs", 1, "--held-out", 0.2)
    done("compile", "pairs.csv", "-o", "p", "--model", tiny, "--retriever", "bm25", "--shots", 1, "--budget", 200)
    asked = ["evaluate", "p", "--reference", "writer", "--no-baselines", "--examples", 4, "--queries", 5]
    asked += ["--max-new-tokens", 6, "--samples", 2]
    result = icl(*asked, "--data", "asked.csv", "--rows", "rows.jsonl", "-o", "report.html", "--json")
    said = json.loads(result.stdout)
    assert [(row["n_examples"], row["n_queries"], row["samples"]) for row in said["rows"]] == [(4, 5, 2), (16, 5, 2)]
    assert all(0 <= row["gap_low"] <= row["gap"] <= row["gap_high"] <= 1 for row in said["rows"])
    assert all(row["output_tokens_per_query"] <= 6 for row in said["rows"])
    assert "--max-new-tokens 6 --samples 2" in (here / "report.html").read_text(encoding="utf-8")
    assert "That is about whole answers of up to 6 tokens" in " ".join(said["verdict"])
    assert '"not within"' in done("decide", "rows.jsonl", "--json")
    decided = json.loads(icl(*asked, "--data", "asked.csv", "--epsilon", 0.999, "--json").stdout)["rows"]
    assert [(row["n_examples"], row["queries_max"], row["samples"]) for row in decided] == [(4, 5, 2), (16, 5, 2)]
    assert all(row["queries_asked"] <= 5 and row["gap_low"] <= row["gap"] <= row["gap_high"] for row in decided)
    for data, more, words in (
        ("test.csv", ("--queries", 2), "and test.csv has labels; name the column of the targets"),
    ):
        result = icl(*asked, "--data", data, *more)
        assert words in " ".join(result.stderr.split())
    # Of another tokenizer.
    done("compile", "pairs.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--shots", 1)
    assert "echo and " in icl(*asked, "--data", "asked.csv").stderr


@pytest.mark.parametrize(
    ("pool", "data", "said"),
    [
        ("text,label\na,x\nb,y\n", "test.csv", "other labels: only the program has 'x', 'y'; only the reference has"),
        (
            "text,label\na,track\nb,card\nc,refund\n",
            "unknown.csv",
            "1 label that the program does not know ('banana')",
        ),
        ("text,label\na,track\nb,card\nc,refund\n", "long.csv", "the budget is 150; compile with a larger --budget"),
        (
            "text,label\nwhere is it,track\nmy lost card,card\nmoney please,refund\n",
            "test.csv",
            "no row is left in the",
        ),
        ("input,output\na b,A B\nc d,C D\n", "test.csv", "this program generates texts, and the reference"),
    ],
)
def test_evaluate_finds_out_before_a_model_runs(
    pool: str, data: str, said: str, reference: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "other.csv").write_text(pool)
    (here / "unknown.csv").write_text("text,label\nwhere is it,track\nyellow,banana\n")
    (here / "long.csv").write_text(f"text,label\nwhere is it,track\n{'word ' * 90},card\n")
    done("compile", "other.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--budget", 150)
    monkeypatch.setattr("evaluation.evaluate.ask_references", None)
    result = icl("evaluate", "p", "--reference", reference, "--data", data)
    assert result.exit_code == 1
    assert said in result.stderr


def test_the_results_are_printed_although_they_cannot_be_written(
    program: Path, reference: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("evaluation.report.write_report", full)
    result = icl("evaluate", program, "--reference", reference, "--data", "test.csv", "--no-baselines", "-o", "r.html")
    assert result.exit_code == 1
    assert result.stdout.startswith("series ")
    assert result.stderr.endswith("Error: r.html: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_the_results_are_printed_although_no_row_can_be_kept(program: Path, reference: Path) -> None:
    asked = ["evaluate", program, "--reference", reference, "--data", "test.csv", "--no-baselines"]
    result = icl(*asked, "--rows", "/dev/full")
    assert (result.exit_code, "No space left on device" in result.stderr) == (1, True)
    assert result.stdout.startswith("series ")


def test_rows_are_kept_although_nobody_reads_the_results(
    program: Path, reference: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("evaluation.cli.click.echo", closed)
    icl("evaluate", program, "--reference", reference, "--data", "test.csv", "--no-baselines", "--rows", "rows.jsonl")
    assert len((here / "rows.jsonl").read_text().splitlines()) == 1


def test_rows_of_what_was_measured_are_kept_although_the_rest_fails(
    program: Path, reference: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.evaluate import evaluate

    def fails_with_all(program: Program, *arguments: Any, **named: Any) -> Any:
        if len(program.pool.data) == 18:
            raise BackendError("the server is gone")
        return evaluate(program, *arguments, **named)

    monkeypatch.setattr("evaluation.evaluate.evaluate", fails_with_all)
    asked = ["evaluate", program, "--reference", reference, "--data", "test.csv", "--examples", 6]
    result = icl(*asked, "--rows", "rows.jsonl", "--per-query", "gaps.jsonl")
    assert (result.exit_code, result.stderr) == (1, "Error: the server is gone\n")
    for file in ("rows.jsonl", "gaps.jsonl"):
        assert [json.loads(line)["n_examples"] for line in (here / file).read_text().splitlines()] == [6, 6]
