"""The benchmark of levels and peers, on a toy and without a model: systems answer, figures are those by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hashed_words import HashedWords

from benchmarks import quality
from benchmarks.peers import asking, environments
from evaluation.reference.rsr.rsr import RSR
from icl_compiler import encoders
from icl_compiler.backends.backend import Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.data import Dataset
from icl_compiler.predictor import Predictions
from icl_compiler.tokenizer import ByteTokenizer

OURS = ("vote", "O0", "O1", "O1-calibrated", "O2", "O3")
FAKE = """
import sys
sys.path.insert(0, {folder!r})
from lookup import Chosen, Job, run

def choose(job):
    rows = [[job.texts.index(query.rsplit(" ", 1)[0] + f" {{i}}") for i in range(3)] for query in job.queries]
    return Chosen(rows, "best-last", "0.0 " + job.method)

run(choose=choose)
"""


class Sees(EchoBackend):
    """The echo backend; it keeps the prompts."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        self.prompts = [ByteTokenizer().decode(prompt) for prompt in prompts]
        return super().label_logprobs(prompts, label_words, progress=progress)


class Says:
    """A predictor of one law."""

    labels = ("parcel", "card")

    def __init__(self, law):
        self.law = law
        self.asked = 0

    def predict(self, texts, *, progress=None):
        self.asked += 1
        return said(self.law, len(texts), self.labels)


def said(law, texts=20, labels=("card", "parcel")):
    return Predictions(labels, np.tile(law, (texts, 1)), np.full(texts, 7), Usage(0, 0, 0), 10.0)


@pytest.fixture
def task(monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "ROWS", tmp_path / "rows" / "quality.jsonl")
    monkeypatch.setattr(quality, "EACH_QUERY", tmp_path / "rows" / "quality")
    texts = [f"{word} {i}" for i in range(30) for word in ("card", "parcel")]
    data = Dataset(tuple(texts), tuple(text.split()[0] for text in texts), "classification", "toy")
    pool, queries = data.take(range(40)), data.take(range(40, 60))
    return quality.Task("toy", pool, queries, 400, 100, 0, Sees())


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A peer that shows the first three rows of the query's own label, in this interpreter."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(folder=str(asking.HERE)))
    monkeypatch.setitem(asking.PEERS, "fake", asking.Peer(str(script), "three", lambda: Path(sys.executable)))
    monkeypatch.setitem(quality.SYSTEMS, "fake", quality.chosen_by("fake"))
    monkeypatch.setattr(asking, "locate", lambda model: model)
    return script


@pytest.mark.parametrize("system", OURS)
def test_every_level_answers(system, task):
    row, each = quality.measure(system, task)
    assert 0 <= row["accuracy"] <= 1
    assert row["accuracy"] == np.mean(each["accuracy"])
    assert row["calls"] <= 100 + 100 * (system in ("O1-calibrated", "O3"))
    assert (row["calls"] > 0) == (system in ("O1-calibrated", "O2", "O3"))
    if system == "vote":
        assert row["accuracy"] == 1  # the words tell the labels


def test_figures_by_hand(task, monkeypatch):
    first, second = Says([0.5, 0.5]), Says([0.25, 0.75])  # of parcel, of card
    monkeypatch.setitem(quality.SYSTEMS, "fixed", lambda task: quality.Answer(said([0.4, 0.1]), 3.0, 5, {}))
    references = [quality.Remembering(first), quality.Remembering(second)]
    row, each = quality.measure("fixed", task._replace(references=references))
    assert (row["accuracy"], row["label_mass"], row["tokens"], row["seconds"]) == (0.5, 0.5, 7, 0.5)
    assert row["log_loss"] == pytest.approx(-(np.log(0.4) + np.log(0.1)) / 2)
    assert row["log_loss_of_labels"] == pytest.approx(-(np.log(0.8) + np.log(0.2)) / 2)
    assert each["log_loss"][:2] == pytest.approx([-np.log(0.4), -np.log(0.1)], abs=1e-5)
    assert row["tv"] == pytest.approx(0.5)  # of card .1 apart, of parcel .4, of neither .5
    assert row["floor"] == pytest.approx(0.25)
    tuned, _ = quality.measure("fine-tuned", task._replace(references=references))
    assert tuned["tv"] == tuned["floor"] == row["floor"]
    assert first.asked == second.asked == 1


def test_what_a_peer_chooses_is_shown_in_its_order_and_packed_into_the_budget(task, fake):
    row, _ = quality.measure("fake", task)
    settings = row["settings"]
    assert (settings["retriever"], settings["version"], settings["order"]) == ("fake", "0.0 three", "best-last")
    places = [task.backend.prompts[1].index(text) for text in ("parcel 2", "parcel 1", "parcel 0", "parcel 20")]
    assert places == sorted(places)
    room = row["tokens"] - len("Text: parcel 1\nLabel: parcel\n\n")  # for two of its three
    quality.measure("fake", task._replace(budget=int(room) + len(" parcel\n")))
    assert "parcel 0\n" in task.backend.prompts[1]
    assert "parcel 2\n" not in task.backend.prompts[1]


def test_a_peer_that_gives_other_rows_than_there_are_is_told(task, fake):
    fake.write_text(fake.read_text().replace("rows = [[", "rows = [[1000 + "))
    with pytest.raises(RuntimeError, match="20 lists of"):
        quality.measure("fake", task)


@pytest.mark.parametrize("name", quality.PEERS)
def test_a_peer_chooses_rows(name, task, tmp_path):
    peer = asking.PEERS[name]
    folder = environments.VENV if peer.python is environments.peers_python else environments.SELECTION_VENV
    if not (folder / ".installed").exists():
        pytest.skip(f"{folder.name} is not there; `python -m benchmarks.quality` makes it")
    few = ("card 20", "parcel 20", "my card 3 again", "parcel 7 please")
    vectors = HashedWords().encode(task.pool.texts) @ HashedWords().encode(few).T
    found = asking.choose(
        peer, task.pool, few, tmp_path / "job.json", model="smollm2-135m", encoder="minilm", shots=4, seed=0
    )
    assert {len(set(rows)) for rows in found.rows} == {16}  # 2 * 4 + 8
    if name in ("openicl-topk", "dspy-knn", "langchain-mmr"):
        assert [vectors[rows[0], i] for i, rows in enumerate(found.rows)] == pytest.approx(vectors.max(axis=0))
    if name in ("openicl-topk", "dspy-knn"):
        scores = np.array([vectors[rows, i] for i, rows in enumerate(found.rows)])
        assert (np.diff(scores) <= 1e-6).all()
        assert scores[:, -1] == pytest.approx(np.sort(vectors, axis=0)[-16])
    if name == "skorch-few-shot":
        assert {task.pool.answers[row] for row in found.rows[0][:2]} == {"card", "parcel"}
        assert found.order == "best-last"
    if name in ("skorch-few-shot", "openicl-votek"):
        assert all(rows == found.rows[0] for rows in found.rows)
    if name == "openicl-bm25":
        assert [task.pool.texts[rows[0]].split()[1] for rows in found.rows[2:]] == ["3", "7"]  # the rarest words


def test_the_table_shows_old_rows_and_compares_new_ones(task):
    old = {"key": ["toy", 400, "O1", 0, 40, 20, 100, False], "dataset": "toy", "budget": 400, "system": "O1"}
    shown = dict.fromkeys(("accuracy", "log_loss", "log_loss_of_labels", "label_mass", "seconds", "tokens"), 0.125)
    shown |= {"calls": 0, "compile_seconds": 1.0}
    quality.keep(quality.ROWS, old | shown)
    for system, right in (("vote", 0.0), ("O2", 1.0)):
        key = ["toy", 400, system, 0, 40, 20, 100, [], 16]
        each = {"accuracy": [right] * 20, "log_loss": [2.0 - right, 2.5 - right] * 10}
        quality.keep(quality.EACH_QUERY / "toy.jsonl", {"key": key, **each})
        quality.keep(quality.ROWS, {**old, **shown, "key": key, "system": system})
    lines = quality.table().splitlines()
    assert [line.split(" | ")[4] for line in lines[2:5]] == ["O1", "vote", "O2"]
    assert lines[2].endswith("|  |  |  |") and lines[4].endswith("|  |  |  |")
    assert "| +1.000 [+0.575, +1.000] |" in lines[3] and "| -1.000 [-1.000, -1.000] |" in lines[3]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[6:] == [
        "accuracy of -O2 beside the vote alone, of 1: better in 1 (clearly in 1), worse in 0 (clearly in 0)",
        "log_loss of -O2 beside the vote alone, of 1: better in 1 (clearly in 1), worse in 0 (clearly in 0)",
    ]


def test_the_largest_pool_is_compared_with_the_others(task):
    for system, pool, right in (("O2", 40, 1.0), ("O2", 10, 0.0), ("O2", 20, 0.5), ("vote", 10, 0.0), ("O1", 40, 1.0)):
        key = ["toy", 400, system, 0, pool, 20, 100, [], 16]
        quality.keep(quality.ROWS, {"key": key, "dataset": "toy", "budget": 400, "system": system})
        quality.keep(quality.EACH_QUERY / "toy.jsonl", {"key": key, "tv": [0.75 - right / 2] * 20})
    assert [line.partition(" [")[0] for line in quality.more_data()] == [
        "toy, 400 tokens, O2: 40 rows less 10: tv -0.500",
        "toy, 400 tokens, O2: 40 rows less 20: tv -0.250",
    ]


@pytest.fixture
def data(tmp_path, monkeypatch, task):
    folder = tmp_path / "data" / "subj"
    folder.mkdir(parents=True)
    for part, rows in (("train", task.pool), ("test", task.queries)):
        pairs = zip(rows.texts, rows.answers, strict=True)
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        (folder / f"{part}.jsonl").write_text("".join(lines))
    monkeypatch.setenv("ICL_DATASETS", str(tmp_path / "data"))
    monkeypatch.setattr(quality, "open_backend", lambda *_: task.backend)
    return folder


def run(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["quality", "--datasets", "subj", "--budgets", "400", "--queries", "8", *more])
    quality.main()


def test_what_is_measured_is_not_measured_again(data, monkeypatch, fake, capsys):
    run(monkeypatch, "--systems", "vote", "fake", "fine-tuned")
    before = quality.ROWS.read_text()
    assert [json.loads(line)["system"] for line in before.splitlines()] == ["vote", "fake"]
    fake.write_text("raise SystemExit(3)")
    run(monkeypatch, "--systems", "vote", "fake")
    assert quality.ROWS.read_text() == before
    with pytest.raises(SystemExit, match=r"not measured: fake: .*exit status 3"):
        run(monkeypatch, "--systems", "fake", "O0", "--shots", "2")
    assert [row["system"] for row in quality.rows_of(quality.ROWS)] == ["vote", "fake", "O0"]
    assert len(quality.rows_of(quality.EACH_QUERY / "subj.jsonl")) == 3


def test_validation_rows_are_test_rows_that_are_no_queries(data, monkeypatch, task):
    held_out = []

    def calibrate(program, backend, *, validation, among, **more):
        held_out.append(validation)
        return real(program, backend, validation=validation, among=among, **more)

    real = quality.calibrate
    monkeypatch.setattr(quality, "calibrate", calibrate)
    systems = ["O1-validated", "O2", "O2-validated"]
    run(monkeypatch, "--systems", *systems, "--validation", "11", "--search-queries", "60")
    first, _, last = rows = quality.rows_of(quality.ROWS)
    assert [row["system"] for row in rows] == systems
    assert first["key"][9:] == last["key"][9:] == [11]
    [validation] = held_out
    queries = np.sort(np.random.default_rng(0).permutation(20)[:8]).tolist()
    assert len(validation) == 11
    assert not set(validation.texts) & {task.queries.texts[row] for row in queries}
    assert set(quality.differences(last)) == {"accuracy", "log_loss"}
    run(monkeypatch, "--systems", *systems, "--search-queries", "60")
    assert len(quality.rows_of(quality.ROWS)) == 3


def test_missing_references_are_trained(data, monkeypatch, tmp_path):
    made = []

    class Made:
        description = "a toy"

        def predictor(self):
            return Says([0.5, 0.5])

        def trained_on(self, texts):
            return np.ones(len(texts), dtype=bool)

    def train(rows, path, *, model, method, settings):
        path.mkdir()
        made.append((path.name, len(rows), type(method).__name__, settings.seed, settings.learning_rate))

    monkeypatch.setattr(quality, "finetune", train)
    monkeypatch.setattr(quality, "load_reference", lambda path: Made())
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "subj-0").mkdir()
    run(monkeypatch, "--systems", "vote", "--references", str(tmp_path / "ref"), "--reference-examples", "30")
    assert made == [("subj-1", 30, "RSR", 1, RSR.learning_rate)]
    [row] = quality.rows_of(quality.ROWS)
    assert row["tv"] == pytest.approx(0.5)
    assert row["floor"] == 0
    assert row["key"][7] == ["a toy", "a toy"]
