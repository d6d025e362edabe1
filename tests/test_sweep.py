"""A sweep on a random model of two layers: rows, keys, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_model import save_tiny_model
from transformers import AutoTokenizer

from evaluation.evaluate import ask_references, evaluate
from evaluation.reference.trainer import load_reference
from evaluation.row_file import read_rows
from evaluation.sweep import in_process, run
from evaluation.sweep_plan import load, plan
from evaluation.sweep_spec import SweepSpec
from icl_compiler.cli import main
from icl_compiler.compile import compile_program
from icl_compiler.errors import SpecError
from icl_compiler.models import locate
from icl_compiler.optimise.levels import QUERIES, optimise
from icl_compiler.optimise.variants import Variants
from icl_compiler.predictor import open_backend

pytestmark = pytest.mark.models
WORDS = {"colour": ("red", "blue", "green", "black"), "animal": ("dog", "cat", "cow", "fox")}


def write_words(folder: Path, train: int = 60, test: int = 12) -> Path:
    """Which of two kinds of word stands at the end."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count, start in (("train", train, 0), ("test", test, 1000)):
        lines = []
        for i in range(start, start + count):
            label = list(WORDS)[i % 2]
            lines.append(json.dumps({"text": f"{i} {rng.choice(WORDS[label])}", "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), vocabulary=49152, scale=0.1)
    AutoTokenizer.from_pretrained(locate("smollm2-135m")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_words(tmp_path / "words")


def settings(tiny: str, words: Path, **changes: object) -> dict[str, Any]:
    return {
        "datasets": [str(words)],
        "sizes": [4, 16, "all"],
        "budgets": [60, 120],
        "retrievers": "bm25",
        "queries": 10,
        "baselines": ["random shots", "zero shots", "floor"],
        "references": {"method": "full", "epochs": 2, "batch_size": 4, "learning_rate": 0.01},
        "model": tiny,
        "dtype": "float32",
        **changes,
    }


def specified(tiny: str, words: Path, **changes: object) -> SweepSpec:
    return SweepSpec.from_mapping(settings(tiny, words, **changes), root=Path())


def swept(spec: SweepSpec, folder: Path) -> list[dict[str, Any]]:
    data = {dataset.name: load(spec, dataset) for dataset in spec.datasets}
    return run(spec, folder, plan(spec, data), engine=in_process())


def planned_keys(spec: SweepSpec) -> list[str]:
    data = {dataset.name: load(spec, dataset) for dataset in spec.datasets}
    return [row.key for job in plan(spec, data).jobs for row in job.rows]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "seconds" not in name}


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepSpec, Path, list[dict[str, Any]]]:
    """A sweep that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    spec = specified(tiny, write_words(folder / "words"))
    return spec, folder / "sweep", swept(spec, folder / "sweep")


def test_rows_are_those_of_the_evaluator(whole: Any) -> None:
    """The gap of one cell, made of the parts that `icl evaluate` is made of."""
    spec, folder, rows = whole
    data = load(spec, spec.datasets[0])
    references = [load_reference(path) for path in sorted((folder / "references").iterdir())]
    assert [reference.seed for reference in references] == [0, 1]
    program = compile_program(data.train, model=spec.model, retriever="bm25", shots=60, budget=120, examples=16, seed=0)
    answers = ask_references(references, data.queries, dtype="float32")
    backend = open_backend(None, spec.model, dtype="float32")
    expected = evaluate(program, backend, answers, data.queries, dataset_name="words", series=("floor",)).rows
    [cell] = [row for row in rows if (row["n_examples"], row["max_prompt_tokens"]) == (16, 120)]
    [floor] = [row for row in rows if row["series"] == "floor"]
    for name in ("gap", "gap_low", "gap_high", "accuracy", "ece", "agreement", "prompt_tokens_per_query", "reference"):
        assert cell[name] == pytest.approx(expected[0][name], abs=1e-6), name
    assert cell["shots_per_query"] == expected[0]["shots_per_query"]
    assert cell["gap"] > 0.1 > 0.001 < floor["gap"], "the references learned something, each something else"
    assert floor["gap"] == pytest.approx(expected[1]["gap"], abs=1e-6)
    assert np.mean(cell["gaps"]) == pytest.approx(cell["gap"], abs=1e-5)


def test_a_reference_that_learned_the_queries_is_said(whole: Any, tiny: str, words: Path) -> None:
    [reference, _] = sorted((whole[1] / "references").iterdir())
    seen = (words / "train.jsonl").read_text().splitlines()[:6]
    (words / "test.jsonl").write_text("\n".join(seen) + "\n")
    spec = specified(tiny, words, references={"folder": str(reference)}, baselines=[], queries=6)
    warnings = plan(spec, {dataset.name: load(spec, dataset) for dataset in spec.datasets}).warnings
    assert any("words: 6 of the 6 test texts stand among the rows that the reference" in each for each in warnings)


def test_every_cell_is_there_once_and_baselines_are_shared(whole: Any) -> None:
    _, folder, rows = whole
    counts = Counter(row["series"] for row in rows)
    assert counts == {"program": 6, "random shots": 2, "zero shots": 1, "floor": 1}
    assert len({row["key"] for row in rows}) == len(rows) == len((folder / "rows.jsonl").read_text().splitlines())
    longer = {row["max_prompt_tokens"]: row["shots_per_query"] for row in rows if row["series"] == "random shots"}
    assert longer[120] > longer[60] > 0  # "fit" fills the budget


def test_pools_are_nested(whole: Any) -> None:
    spec, _, _ = whole
    train = load(spec, spec.datasets[0]).train
    pools = [set(train.subset(n, seed=0).texts) for n in (4, 16, 60)]
    assert pools[0] < pools[1] < pools[2]
    assert Counter(train.subset(4, seed=0).answers) == {"colour": 2, "animal": 2}


def test_seconds_add_up(whole: Any) -> None:
    _, _, rows = whole
    assert all(min(row[f"seconds_{part}"] for part in ("model", "prompts", "evaluator")) >= 0 for row in rows)
    assert all(row["seconds_model"] > 0 for row in rows if row["series"] != "floor")
    assert [row["seconds_model"] for row in rows if row["series"] == "floor"] == [0]


def test_started_again_it_asks_nothing(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder, rows = whole
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr("evaluation.sweep.Worker.rows", None)
    monkeypatch.setattr("evaluation.sweep.Worker.reference", None)
    assert swept(spec, folder) == rows
    assert (folder / "rows.jsonl").read_bytes() == before


def test_keys_follow_the_content(whole: Any, tiny: str, tmp_path: Path) -> None:
    spec, _, _ = whole
    keys = planned_keys(spec)
    assert len(set(keys)) == len(keys)
    elsewhere = write_words(tmp_path / "words")
    assert planned_keys(specified(tiny, elsewhere)) == keys, "a copy of the data elsewhere is the same data"
    more = planned_keys(specified(tiny, elsewhere, sizes=[4, 8, 16, "all"]))
    assert set(keys) < set(more)
    for change in ({"level": 0.9}, {"queries": 11}, {"references": {"method": "full", "epochs": 3}}):
        assert not set(planned_keys(specified(tiny, elsewhere, **change))) & set(keys), change
    seeds = planned_keys(specified(tiny, elsewhere, seeds=[0, 1]))
    assert len(set(seeds)) == len(seeds) > len(keys)
    lines = (elsewhere / "train.jsonl").read_text().splitlines()
    (elsewhere / "train.jsonl").write_text("\n".join([lines[0].replace("0 ", "0 very "), *lines[1:]]) + "\n")
    assert not set(planned_keys(specified(tiny, elsewhere))) & set(keys), "the references learned from other data"


def test_a_reference_on_the_same_examples_needs_enough_of_them(tiny: str, words: Path) -> None:
    spec = specified(tiny, words, reference_on="n", sizes=[2, 16, "all"])
    found = plan(spec, {"words": load(spec, spec.datasets[0])})
    assert {job.ask.n for job in found.jobs if job.ask.series == "program"} == {16, 60}
    [warning] = [text for text in found.warnings if "no full reference" in text]
    assert warning.startswith("words: no full reference on 2 rows: ")
    floors = [row for job in found.jobs if job.ask.series == "floor" for row in job.rows]
    assert [(row.reference.rows, row.reference.draw, row.second.seed) for row in floors] == [(16, 0, 1), (60, 0, 1)]


def test_a_calibrated_prompt_is_a_row_of_its_own(tiny: str, words: Path, tmp_path: Path) -> None:
    changes = {"sizes": [4, 16], "budgets": 60, "calibrations": ["none", "temperature"], "baselines": []}
    spec = specified(tiny, words, **changes)
    rows = swept(spec, tmp_path / "out")
    found = [(row["n_examples"], row["calibration"], row["calibrated_by"]) for row in rows]
    assert found == [(4, "none", "none"), (16, "none", "none"), (16, "temperature", "temperature")]
    plain, calibrated = rows[1:]
    assert calibrated["label_mass"] == pytest.approx(1) != pytest.approx(plain["label_mass"])
    data = load(spec, spec.datasets[0])
    assert "words: not calibrated with 4 examples, which takes 10" in plan(spec, {"words": data}).warnings


def test_a_level_is_a_dimension_and_its_search_goes_on(tiny: str, words: Path, tmp_path: Path) -> None:
    changes = {"sizes": [4, 16], "budgets": 60, "retrievers": [], "baselines": [], "levels": ["O0", "O1", 2]}
    del (given := settings(tiny, words, **changes, search_queries=80))["retrievers"]
    spec = SweepSpec.from_mapping(given, root=Path())
    data = load(spec, spec.datasets[0])
    planned = plan(spec, {"words": data})
    assert [text for text in planned.warnings if "not searched (-O2) with 4 examples and 60 tokens" in text]
    *plain, searched = rows = swept(spec, tmp_path / "out")
    cells = [(row["optimisation"], row["n_examples"], row["retriever"], row["calibration"]) for row in rows]
    own = [("O0", "uniform"), ("O1", "dense")]
    assert cells == [
        *((level, n, retriever, "none") for level, retriever in own for n in (4, 16)),
        ("O2", 16, "searched", "auto"),
    ]
    base = compile_program(data.train, model=tiny, shots=4, budget=60, examples=16, seed=0)  # 4 fit
    backend = open_backend(None, tiny, dtype="float32")
    program, [how, *_] = optimise(base, backend, queries=80)
    assert searched["found"] == str(Variants(program).own)
    assert searched["search_prompts"] == how["prompts_asked"] > 16
    assert searched["calibrated_by"] == program.calibration.method
    reference = load_reference(next((tmp_path / "out" / "references").iterdir()))
    answers = ask_references([reference], data.queries, dtype="float32")
    [expected, *_] = evaluate(program, backend, answers, data.queries, dataset_name="words", series=()).rows
    assert searched["gap"] == pytest.approx(expected["gap"], abs=1e-6)
    assert len({row["gap"] for row in rows[1::2]} | {searched["gap"]}) > 1

    [log] = (tmp_path / "out" / "searches").iterdir()
    asked = log.read_bytes()
    (tmp_path / "out" / "rows.jsonl").unlink()  # as if killed when the search was over
    assert [without_times(row) for row in swept(spec, tmp_path / "out")] == [without_times(row) for row in rows]
    assert log.read_bytes() == asked, "what was asked is not asked again"

    keys = [row["key"] for row in rows]
    assert set(planned_keys(SweepSpec.from_mapping({**given, "levels": "O1"}, root=Path()))) < set(keys)
    for change in ({"search_queries": 81}, {"retrievers": "dense"}, {"calibrations": "none"}):
        changed = planned_keys(SweepSpec.from_mapping({**given, **change}, root=Path()))
        assert changed[:2] == keys[:2], "random shots are random shots"
        assert changed[-1] not in keys, change
    assert len(plain) == 4


def icl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="icl")


def test_killed_and_started_again_it_loses_and_doubles_nothing(whole: Any, tiny: str, tmp_path: Path) -> None:
    spec, _, expected = whole
    write_words(tmp_path / "words")
    (tmp_path / "sweep.yaml").write_text(json.dumps(settings(tiny, Path("words"))))  # JSON is YAML
    command = [
        sys.executable,
        "-c",
        "from icl_compiler.cli import main; main()",
        "sweep",
        "sweep.yaml",
        "-o",
        "out",
        "--data",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    rows = tmp_path / "out" / "rows.jsonl"
    kills = 0
    for wanted in (1, 4):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        with rows.open("ab") as file:
            file.write(b'{"key": "half of')
    assert kills == 2, "the sweep was over before it could be killed"
    before = {row["key"] for row in read_rows(rows)}
    assert 4 <= len(before) < len(expected)
    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows.read_text().splitlines()) == len(expected)
    found = json.loads(done.stdout)["rows"]
    assert [row["key"] for row in found] == [row["key"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["gap"] == pytest.approx(other["gap"], abs=1e-6)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000
    assert spec.model == tiny


def test_rows_of_another_version_are_said_to_stay(tiny: str, words: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps(settings(tiny, words)), encoding="utf-8")
    rows = tmp_path / "out" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text(json.dumps({"key": "old", "version": "0.1.2"}) + "\n", encoding="utf-8")
    told = icl("sweep", sweep, "-o", rows.parent, "--dry-run").stderr
    assert "holds 1 row of version 0.1.2, and this is " in told
    assert "of version" not in icl("sweep", sweep, "-o", tmp_path / "new", "--dry-run").stderr


def test_rows_of_another_version_are_gone_on_with_if_it_is_named(tiny: str, words: Path, tmp_path: Path) -> None:
    out, sweep = tmp_path / "out", tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps(settings(tiny, words) | {"sizes": [4], "baselines": []}), encoding="utf-8")
    as_of_then = ("--rows-of", "0.1.2")
    assert icl("sweep", sweep, "-o", out, *as_of_then).exit_code == 0
    before = (out / "rows.jsonl").read_text()
    shown = icl("sweep", sweep, "-o", out, *as_of_then, "--size", 4, "--size", 8, "--dry-run", "--json")
    assert "of version" not in shown.stderr
    assert {ask["n"] for ask in json.loads(shown.stdout)["to_do"]} == {8}
    assert {row["version"] for row in read_rows(out / "rows.jsonl")} == {version("icl-compiler")}
    assert len(json.loads(icl("sweep", sweep, "-o", out, "--dry-run", "--json").stdout)["to_do"]) == before.count("\n")


def test_a_setting_of_the_training_does_not_change_the_method(tiny: str, words: Path, tmp_path: Path) -> None:
    named = ("sweep", words, "--model", tiny, "--size", 8, "--no-baselines", "--dry-run", "-o", tmp_path / "o")
    for more in ((), ("--epochs", 2), ("--set", "budget=0.01")):
        assert re.search("1 reference to train and ask: .*rsr", icl(*named, *more).stdout)


def test_what_it_would_do_is_told_without_a_model(tiny: str, words: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps(settings(tiny, words)))
    said = icl("sweep", tmp_path / "sweep.yaml", "-o", tmp_path / "out", "--dry-run", "--size", 4, "--json")
    found = json.loads(said.stdout)
    assert found["rows"] == 2 + 2 + 1 + 1
    assert not (tmp_path / "out").exists()
    shown = icl("sweep", tmp_path / "sweep.yaml", "-o", tmp_path / "out", "--dry-run").stdout
    assert "10 rows, of which 10 are to be measured" in shown
    searching = ("-O1", "-O2", "--search-queries", 50, "--size", 16)
    found = json.loads(icl("sweep", tmp_path / "sweep.yaml", "-o", "o", "--dry-run", *searching, "--json").stdout)
    levels = [ask["optimisation"] for ask in found["to_do"] if ask["series"] == "program"]
    assert levels == ["O1", "O1", "O2", "O2"]
    assert found["tokens"]["search_prompts"] == 2 * 50
    own = json.loads(icl("sweep", tmp_path / "sweep.yaml", "-o", "o", "--dry-run", "-O2", "-O3", "--json").stdout)
    searches = Counter(ask["optimisation"] for ask in own["to_do"])
    assert own["tokens"]["search_prompts"] == searches["O2"] * QUERIES[2] + searches["O3"] * QUERIES[3] > 0
    shown = icl("sweep", tmp_path / "sweep.yaml", "-o", "o", "--dry-run", *searching).stdout
    assert "2 searches of the best prompt, which ask 100 prompts at most" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 16}, "unknown key 'size'. Did you mean 'sizes'?"),
        ({"sizes": [16, "al"]}, "sizes should be a whole number from 1 on, or all, is 'al'"),
        ({"sizes": [16, 16]}, "sizes names one thing twice: 16, 16"),
        ({"sizes": []}, "sizes is an empty list"),
        ({"sizes": [True]}, "sizes should be a whole number from 1 on, or all, is True"),
        ({"sizes": [999]}, "words: a size of 999 exceeds the 60 rows of train"),
        ({"queries": 99}, "words: 99 queries exceed the 12 rows of test"),
        ({"retrievers": "bm52"}, "retrievers: unknown name 'bm52'. Did you mean 'bm25'?"),
        ({"retrievers": "static", "levels": "O1"}, "static is a set that a search chooses, and -O1 does not search"),
        ({"baselines": ["flor"]}, "unknown name 'flor'. Did you mean 'floor'?"),
        ({"levels": ["O1", "O9"]}, "levels: unknown name 'O9'. Available: O0, O1"),
        ({"level": 95}, "level should be a number above 0 and below 1, is 95"),
        ({"references": {"method": "lroa"}}, "unknown name 'lroa'. Did you mean 'lora'?"),
        ({"references": {"method": "full", "settings": {"first": 1}}}, "has no setting 'first'"),
        ({"references": {"folder": "x", "epochs": 2}}, "is trained already; leave out epochs"),
        ({"reference_on": "n", "references": {"examples": 20}}, "neither `folder` nor `examples`"),
        ({"datasets": "nowhere"}, "there is no folder nowhere"),
        ({"datasets": {"name": "a", "train": "b"}}, "datasets: test should be text, is nothing"),
        ({"budgets": 10}, "left out the budget of 10 tokens"),
    ],
)
def test_a_description_that_cannot_be_used_says_why(
    tiny: str, words: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(SpecError) as error:
        spec = specified(tiny, words, **changes)
        plan(spec, {dataset.name: load(spec, dataset) for dataset in spec.datasets})
    assert said in str(error.value)


def test_a_file_that_is_no_description(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 16\n")
    (tmp_path / "b.yaml").write_text("datasets: [")
    assert "should hold keys such as `datasets:`" in icl("sweep", tmp_path / "a.yaml", "-o", tmp_path / "o").stderr
    assert "cannot be read as YAML" in icl("sweep", tmp_path / "b.yaml", "-o", tmp_path / "o").stderr
    both = icl("sweep", tmp_path / "a.yaml", "words", "-o", tmp_path / "o")
    assert (both.exit_code, "not both" in both.stderr) == (2, True)
