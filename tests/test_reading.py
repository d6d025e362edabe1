"""What the base model makes of a text, beside a sentence encoder: vectors, programs, and when -O2 wants them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hashed_words import WIDTH, HashedWords
from test_artifact import contents
from tiny_model import save_byte_model
from toys import CountingEcho, customers, in_a_new_process
from transformers import AutoModelForCausalLM

from benchmarks import reading as benchmark
from evaluation.evaluate import predictor_of
from evaluation.neighbours import NeighboursVote
from icl_compiler import encoders
from icl_compiler import reading as reading_module
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.backend import Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.cli import main
from icl_compiler.compile import compile_program, with_pool, with_reading
from icl_compiler.corrections import Corrector
from icl_compiler.data import Dataset
from icl_compiler.encoders import encoder_of
from icl_compiler.errors import ArtifactError, ModelError
from icl_compiler.optimise import encoder_choice
from icl_compiler.optimise.encoder_choice import choose_encoder
from icl_compiler.optimise.levels import optimise
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.reading import MOST_TOKENS, Reading, shortened

QUERIES = ["where is my lost card", "the parcel is late", "x", ""]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def no_cache_and_no_real_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())
    monkeypatch.setenv("ICL_CACHE", str(tmp_path / "cache"))
    reading_module._states.cache_clear()


def program(model: str, data: Dataset | None = None, encoder: str = "minilm+base", **settings):
    settings = {"retriever": "dense", "shots": 3, "budget": 250} | settings
    return compile_program(data or customers(), model=model, encoder=encoder, **settings)


@torch.no_grad()
def states_by_hand(model: str, made, texts) -> np.ndarray:
    """Each text alone: the mean over the query after the first of two layers, and the last state."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model
    head = len(made.template.head)
    prompts = [[*made.template.head, *query] for query in made.template.queries(list(texts))]
    found = [network(torch.tensor([prompt]), output_hidden_states=True) for prompt in prompts]
    means = [said.hidden_states[1][0, head:].mean(dim=0).numpy() for said in found]
    return np.hstack([np.stack(means), np.stack([said.last_hidden_state[0, -1].numpy() for said in found])])


def test_is_the_standardised_mean_hidden_state_beside_the_sentence_vector(tiny: str) -> None:
    made = program(tiny)
    pool = states_by_hand(tiny, made, made.pool.data.texts)
    expected = (states_by_hand(tiny, made, QUERIES) - pool.mean(axis=0)) / pool.std(axis=0)
    first, last = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in np.split(expected, 2, axis=1))
    expected = np.hstack([first, last]) / np.sqrt(2)
    np.testing.assert_allclose(made.reading.encode(QUERIES), expected, atol=1e-3)
    both = encoder_of(made).encode(QUERIES)
    words = HashedWords().encode(QUERIES)
    cosines = (words @ words.T + first @ first.T + last @ last.T) / 3
    np.testing.assert_allclose(both @ both.T, cosines, atol=1e-3)
    assert both.shape == (4, WIDTH + 64)


def test_alone_it_finds_the_rows_that_the_model_takes_for_alike(tiny: str) -> None:
    made = program(tiny, encoder="base")
    vectors = made.reading.encode(made.pool.data.texts)
    hits = made.retriever.search([made.pool.data.texts[7]], 3)
    assert hits.ids[0].tolist() == np.argsort(-vectors @ vectors[7], kind="stable")[:3].tolist()
    assert made.prompts(QUERIES)[0].tokens != program(tiny, encoder="minilm").prompts(QUERIES)[0].tokens


def test_what_differs_in_no_row_counts_for_nothing(tiny: str) -> None:
    same = Reading.fitted_to(["one text"] * 3, tiny, program(tiny).template)
    assert (same.scale == 1).all()
    assert np.isfinite(same.encode(["one text", "another"])).all()


def test_a_long_text_is_read_without_its_middle(tiny: str) -> None:
    reading = program(tiny, encoder="base", budget=100_000).reading
    long = "a" * MOST_TOKENS
    assert shortened(list(range(9)), 4) == [0, 1, 7, 8]
    np.testing.assert_allclose(
        reading.encode([long + "b" * 300 + long]), reading.encode([long + "c" * 400 + long]), atol=1e-5
    )
    assert not np.allclose(reading.encode([long]), reading.encode(["b" * MOST_TOKENS]), atol=1e-3)


def test_states_are_kept_on_disk_block_by_block(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed has lost one block, and the next one reads the rest."""
    texts = [f"text number {i}" for i in range(150)]
    template = program(tiny, encoder="minilm").template
    monkeypatch.setattr(reading_module._States, "block", 60)
    read: list[int] = []
    honest = reading_module._States._computed

    def killed(self, block):
        read.append(len(block))
        if len(read) == 2:
            raise KeyboardInterrupt
        return honest(self, block)

    monkeypatch.setattr(reading_module._States, "_computed", killed)
    with pytest.raises(KeyboardInterrupt):
        Reading.fitted_to(texts, tiny, template)
    reading_module._states.cache_clear()
    again = Reading.fitted_to(texts, tiny, template)
    assert read == [60, 60, 60, 30]
    reading_module._states.cache_clear()
    np.testing.assert_array_equal(Reading.fitted_to(texts, tiny, template).mean, again.mean)
    assert read == [60, 60, 60, 30]


def test_what_is_read_counts_as_computed(tiny: str) -> None:
    made = program(tiny)
    texts = [*QUERIES, QUERIES[0]]
    read = sum(len(made.template.head) + len(query) for query in made.template.queries(QUERIES))  # one of them twice
    assert made.reading_cost(texts) == Usage(0, read, 0)
    assert program(tiny, encoder="minilm").reading_cost(texts) == Usage(0, 0, 0)
    said, prompts = (
        PromptedPredictor(made, EchoBackend()).predict(texts),
        [prompt.tokens for prompt in made.prompts(texts)],
    )
    assert said.usage == EchoBackend().label_logprobs(prompts, made.label_words).usage.plus(Usage(0, read, 0))
    assert said.prompt_tokens.tolist() == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("retriever", ["dense", "mmr", "dpp", "hybrid", "votek", "cluster", "bm25"])
def test_a_program_on_disk_makes_the_same_prompts(retriever: str, tiny: str, tmp_path: Path) -> None:
    layout = {"layout": "mixed", "clusters": 2, "budget": 250} if retriever == "dense" else {}
    made = program(tiny, retriever=retriever, **layout)
    save_program(made, tmp_path / "one")
    reading_module._states.cache_clear()
    loaded = load_program(tmp_path / "one")
    assert [p.tokens for p in loaded.prompts(QUERIES)] == [p.tokens for p in made.prompts(QUERIES)]
    save_program(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {"reading.jinja", "reading.safetensors"} < set(contents(tmp_path / "one"))
    assert not {"reading.jinja", "reading.safetensors"} & set(saved_plain(tiny, tmp_path))


def saved_plain(tiny: str, folder: Path) -> dict[str, bytes]:
    save_program(program(tiny, encoder="minilm"), folder / "plain")
    return contents(folder / "plain")


def test_a_reading_that_makes_no_sense_is_refused(tiny: str, tmp_path: Path) -> None:
    made = program(tiny)
    made.reading.scale[3] = 0
    save_program(made, tmp_path / "program")
    with pytest.raises(ArtifactError, match="the numbers of the reading make no sense"):
        load_program(tmp_path / "program")


def test_another_pool_is_standardised_anew(tiny: str) -> None:
    made = program(tiny)
    half = made.pool.data.take(range(0, len(made.pool.data), 2))
    moved, afresh = with_pool(made, half), program(tiny, half)
    np.testing.assert_allclose(moved.reading.mean, afresh.reading.mean, atol=1e-6)
    assert [p.tokens for p in moved.prompts(QUERIES)] == [p.tokens for p in afresh.prompts(QUERIES)]
    assert with_reading(program(tiny, encoder="minilm")).prompts(QUERIES)[0].tokens == made.prompts(QUERIES)[0].tokens


def test_a_correction_is_found_by_the_same_measure(tiny: str) -> None:
    made = program(tiny)
    corrected = Corrector(made).corrected([("a text of its own", made.labels[0])])
    found = corrected.retriever.search(["a text of its own"], 1)
    assert found.ids.tolist() == [[len(made.pool.data)]]
    np.testing.assert_allclose(found.scores, 1, atol=1e-5)


def test_the_baseline_without_a_language_model_does_without_it(tiny: str) -> None:
    backend = TransformersBackend(tiny, "float32")
    read, plain = (
        predictor_of("neighbours' vote", program(tiny, encoder=e), backend) for e in ("minilm+base", "minilm")
    )
    assert isinstance(read, NeighboursVote)
    np.testing.assert_array_equal(read.predict(QUERIES).probabilities, plain.predict(QUERIES).probabilities)


# When -O2 takes it


class Blind:
    """All texts are alike."""

    def encode(self, texts):
        return np.ones((len(texts), 1), dtype=np.float32)


def first_letters(rows: int = 90) -> Dataset:
    """The label is the last letter, which a model of bytes knows best, and bags of words never saw before."""
    texts = tuple(f"w{i} x{i}y {'abc'[i % 3] * 3}" for i in range(rows))
    return Dataset(texts, tuple(("ant", "bee", "cat")[i % 3] for i in range(rows)), "classification", "letters")


def test_is_taken_where_neighbours_vote_better_with_it(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "named_encoder", lambda name: Blind())
    base = program(tiny, first_letters(), encoder="minilm")
    found = optimise(base, TransformersBackend(tiny, "float32"), queries=80, calibrations=["none"])
    assert found.program.settings.encoder == "minilm+base"
    [note] = [row["note"] for row in found.trace if "note" in row and "encoder" in row["note"]]
    assert "encoder: minilm+base, as the vote of the neighbours of 90 rows" in note
    kept = optimise(
        base, TransformersBackend(tiny, "float32"), queries=80, calibrations=["none"], fixed=frozenset({"encoder"})
    )
    assert kept.program.settings.encoder == "minilm"
    assert kept.program.reading is None


def test_is_left_where_it_does_harm(tiny: str) -> None:
    words = ("card", "parcel", "refund")
    texts = tuple(f"{words[i % 3]} {words[i % 3]} {'abcdefghij'[i % 10] * (i % 17)}" for i in range(90))
    data = Dataset(texts, tuple(words[i % 3] for i in range(90)), "classification", "words")
    found = choose_encoder(program(tiny, data, encoder="minilm"), TransformersBackend(tiny, "float32"), queries=400)
    assert found.program.settings.encoder == "minilm"
    assert found.program.reading is None
    assert found.told[0]["note"].startswith("encoder: minilm, as the vote")


def test_says_why_nothing_is_read(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = program(tiny, encoder="minilm")
    backend = TransformersBackend(tiny, "float32")
    few = choose_encoder(base, backend, queries=1)
    assert few.program is base
    assert f"the pool has {len(base.pool.tokens):,} tokens, and up to 125 are read" in few.told[0]["note"]
    assert "does not tell" in choose_encoder(base, CountingEcho(), queries=10_000).told[0]["note"]
    monkeypatch.setattr(encoder_choice, "MOST_PARAMETERS", 1000)
    assert (
        "parameters, and a query is read by up to 1,000" in choose_encoder(base, backend, queries=9999).told[0]["note"]
    )
    assert choose_encoder(program(tiny), backend, queries=9999).told == []


def test_a_time_limit_ends_the_reading(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module._States, "block", 5)
    base, backend = program(tiny, encoder="minilm"), TransformersBackend(tiny, "float32")
    found = optimise(base, backend, queries=80, time_limit_s=1e-9, calibrations=["none"])
    assert found.program.settings.encoder == "minilm"
    assert {"note": "the encoder stays minilm: half the time was up"} in found.trace
    clock = iter([0.0, 1.0, 2.0, 3.0])  # the pool of twelve has three blocks
    monkeypatch.setattr("icl_compiler.reading.time.monotonic", lambda: next(clock))
    assert choose_encoder(base, backend, queries=9999, until=2.0).told[0]["note"].endswith("half the time was up")
    assert len(reading_module._states(tiny)._known) == 10


def test_a_model_that_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leave 'base' out of the encoder's name"):
        program("echo")
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    arguments = ["compile", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "p"), "--model", "echo"]
    said = CliRunner().invoke(main, [*arguments, "--encoder", "minilm+base"])
    assert said.exit_code == 1
    assert "the model 'echo' makes nothing of a text" in said.output
    assert "Traceback" not in said.output
    assert not (tmp_path / "p").exists()


def test_the_benchmark_takes_the_reading_apart(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MODEL", tiny)
    for module in (benchmark, encoders):
        monkeypatch.setattr(module, "named_encoder", lambda name: Blind())
    letters = first_letters(120)
    pool, queries = letters.take(range(90)), letters.take(range(90, 120))
    found = benchmark.encoders(pool)
    halves = [benchmark.Part(found["base"], number).encode(queries.texts) for number in (0, 1)]
    np.testing.assert_array_equal(np.hstack(halves), found["base"].encode(queries.texts))
    rows = {name: benchmark.vote(encoder, pool, queries) for name, encoder in found.items()}
    assert list(rows) == ["minilm", "minilm+mean", "minilm+last", "base", "minilm+base"]
    assert rows["minilm"]["log_loss"] == pytest.approx(np.log(3), abs=1e-3)  # all rows are alike to it
    assert rows["minilm+base"]["left_out"] < rows["minilm"]["left_out"]


REAL_MODELS = """
import json, sys
import torch
from pathlib import Path
torch.set_num_threads(int(sys.argv[4]))
from icl_compiler.artifact import load_program, save_program
from icl_compiler.compile import compile_program

program = load_program(Path(sys.argv[1]))
print(json.dumps([prompt.tokens for prompt in program.prompts(json.loads(sys.argv[3]))]))
save_program(compile_program(program.pool.data, encoder="minilm+base", shots=4, budget=400), Path(sys.argv[2]))
"""


@pytest.mark.models
def test_real_models_make_the_same_of_it_with_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    made = compile_program(customers(), encoder="minilm+base", shots=4, budget=400)
    save_program(made, tmp_path / "here")
    queries = [text for text in QUERIES if text not in made.pool.data.texts]  # a text keeps the vector it first had
    expected = [list(prompt.tokens) for prompt in made.prompts(queries)]
    for threads in (1, 3):
        there = tmp_path / f"there-{threads}"
        arguments = (tmp_path / "here", there, json.dumps(queries), threads)
        assert in_a_new_process(REAL_MODELS, *arguments, hash_seed=threads) == expected
        assert contents(tmp_path / "here") == contents(there)
