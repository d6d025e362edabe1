"""The gap of models that write: against the enumeration of all answers of two small Markov chains, and on real code."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from tiny_model import save_tiny_model

from evaluation.asking import BATCH, write_until_decided
from evaluation.evaluate import BASELINES
from evaluation.generation import TextAnswers, evaluate_texts
from evaluation.intervals import confidence_sequence
from evaluation.measurement import measurements
from evaluation.reference.trainer import Reference
from evaluation.sentences import verdict_sentence
from evaluation.summary import summary_lines
from evaluation.texts import Lengths, Written, point_gap, reading_noise, text_gap, write
from icl_compiler.backends.backend import Generation, Generations, SequenceScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.predictor import PromptedPredictor
from icl_compiler.program import Program
from icl_compiler.templates import Template

LETTERS = (97, 98, 10)  # a, b, and the line break that ends an answer
MOST = 4
TEXTS = ("x", "xx", "xxx")


class Chain(EchoBackend):
    """Writes a Markov chain of a and b that ends some time, and begins by the length of the prompt."""

    def __init__(self, tilt: float) -> None:
        self.tilt = tilt

    def law(self, prompt: Any, before: Any) -> np.ndarray:
        start = [2.0, 1.0 + len(prompt) % 3, 1.0]
        row = {97: [5.0, 2.0, 2.0], 98: [1.0, 4.0, 3.0]}.get(before[-1], start) if before else start
        tilted = np.array(row) * np.array([1 + self.tilt, 1.0, 1 - self.tilt / 2])
        return tilted / tilted.sum()

    def generate(self, prompts, terminator, *, max_new_tokens, samples=1, temperature=1.0, seed=0, progress=None):
        items = []
        for row, prompt in enumerate(prompts):
            for sample in range(samples):
                rng, tokens, logprobs = np.random.default_rng([seed, row, sample]), [], []
                while len(tokens) < max_new_tokens and tokens[-1:] != [10]:
                    law = self.law(prompt, tokens)
                    drawn = rng.choice(3, p=law) if temperature else int(law.argmax())
                    tokens.append(LETTERS[drawn])
                    logprobs.append(float(np.log(law[drawn])))
                items.append(Generation(tokens, logprobs, tokens[-1:] == [10]))
        return Generations(items, Usage(1, 2, 3))

    def sequence_logprobs(self, prompts, continuations, *, progress=None):
        scores = []
        for prompt, answer in zip(prompts, continuations, strict=True):
            laws = [self.law(prompt, list(answer[:t])) for t in range(len(answer))]
            pairs = zip(laws, answer, strict=True)  # it never writes any other letter
            scores.append(np.log([dict(zip(LETTERS, law, strict=True)).get(token, 1e-9) for law, token in pairs]))
        return SequenceScores(scores, Usage(1, 2, 3))


@pytest.fixture(scope="module")
def program() -> Program:
    rows = Dataset(("one", "two", "three"), ("a", "ab", "ab"), "generation", "letters")
    return compile_program(rows, model="echo", retriever="bm25", shots=1, budget=10_000)


def written(program: Program, tilt: float, lengths: Lengths, *, seed: int, texts: tuple[str, ...] = TEXTS) -> Written:
    return write(PromptedPredictor(program, Chain(tilt)), texts, lengths, seed=seed)


def answers(most: int = MOST) -> list[tuple[int, ...]]:
    """Every answer: letters and then the end, or the most letters without it."""
    ended = [(*letters, 10) for n in range(most) for letters in itertools.product((97, 98), repeat=n)]
    return [*ended, *itertools.product((97, 98), repeat=most)]


def enumerated(program: Program, first: float, second: float, text: str) -> dict[str, float]:
    """All quantities of one text by going through every answer."""
    [prompt] = program.prompts([text])
    every = answers()
    p_tokens, q_tokens = (
        Chain(tilt).sequence_logprobs([prompt.tokens] * len(every), every).logprobs for tilt in (first, second)
    )
    p, q = (np.exp([scores.sum() for scores in tokens]) for tokens in (p_tokens, q_tokens))
    assert p.sum() == pytest.approx(1)
    kept = [np.minimum(1, np.exp(b - a)).prod() for a, b in zip(p_tokens, q_tokens, strict=True)]

    def token_tvs(answer: tuple[int, ...]) -> list[float]:
        laws = [
            [Chain(tilt).law(prompt.tokens, list(answer[:t])) for tilt in (first, second)] for t in range(len(answer))
        ]
        return [float(np.abs(a - b).sum() / 2) for a, b in laws]

    sums = np.array([sum(token_tvs(answer)) for answer in every])
    return {
        "gap": float(np.abs(p - q).sum() / 2),
        "coupling": float(1 - (p * kept).sum()),
        "chain": float((p * sums).sum()),
        "apart": float((q * sums).sum()),
        "length": float((q * np.array([len(answer) for answer in every])).sum()),
    }


def test_every_figure_is_that_of_the_enumeration(program: Program) -> None:
    lengths = Lengths(3000, MOST)
    ours, theirs = written(program, 0.1, lengths, seed=1), written(program, -0.4, lengths, seed=0)
    found = text_gap(ours, theirs, lengths)
    exact = [enumerated(program, 0.1, -0.4, text) for text in TEXTS]
    mean = {name: np.mean([each[name] for each in exact]) for name in exact[0]}
    np.testing.assert_allclose(found.gap.per_query, [each["gap"] for each in exact], atol=0.02)
    assert found.gap.mean == pytest.approx(mean["gap"], abs=0.01)
    assert found.coupling == pytest.approx(mean["coupling"], abs=0.01)
    assert found.chain == pytest.approx(mean["chain"], abs=0.015)
    assert found.token == pytest.approx(mean["apart"] / mean["length"], abs=0.005)
    assert mean["gap"] < mean["coupling"] < mean["chain"] < 1
    assert found.token_interval.low <= found.token <= found.token_interval.high
    # Some answers end, some are cut.
    assert 0.2 < found.finished < 0.95


def test_a_model_is_not_apart_from_itself(program: Program) -> None:
    lengths = Lengths(50, MOST)
    ours, theirs = written(program, 0.1, lengths, seed=1), written(program, 0.1, lengths, seed=0)
    found = text_gap(ours, theirs, lengths)
    assert (found.gap.mean, found.coupling, found.chain, found.token) == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert reading_noise(ours, 2, lengths).per_query == pytest.approx([0, 0])


def test_the_interval_is_over_queries(program: Program) -> None:
    """Covers the mean over all texts, however few samples a query has, and is no narrower for many of one query."""
    lengths, rng, runs = Lengths(2, MOST), np.random.default_rng(0), 120
    truth = np.mean([enumerated(program, 0.1, -0.4, text)["gap"] for text in TEXTS])
    covered = []
    for run in range(runs):
        texts = tuple(rng.choice(TEXTS, 25))
        pair = (written(program, tilt, lengths, seed=2 * run + s, texts=texts) for s, tilt in enumerate((0.1, -0.4)))
        low, high = text_gap(*pair, lengths).gap.interval
        covered.append(low <= truth <= high)
    assert np.sum(covered) >= binom.ppf(0.001, runs, 0.95)
    many = Lengths(400, MOST)
    wide = text_gap(written(program, 0.1, many, seed=1), written(program, -0.4, many, seed=0), many).gap.interval
    assert wide.high - wide.low > 0.5, "three queries are three queries"


def test_a_law_of_a_few_answers_is_compared_exactly(program: Program) -> None:
    theirs = written(program, -0.4, Lengths(1, MOST), seed=0)
    laws = [[((97, 10), 0.75), ((97, 98, 10), 0.25)], [((98, 98, 98, 98), 1.0)], [((10,), 1.0)]]
    found = point_gap(laws, theirs)
    for value, law, prompt in zip(found.per_query, laws, theirs.prompts, strict=True):
        scores = Chain(-0.4).sequence_logprobs([prompt.tokens] * 31, answers()).logprobs
        q = {answer: np.exp(each.sum()) for answer, each in zip(answers(), scores, strict=True)}
        assert value == pytest.approx(sum(abs(dict(law).get(answer, 0.0) - mass) for answer, mass in q.items()) / 2)


def test_a_real_engine_draws_the_law_that_it_reads(program: Program, tmp_path: Path) -> None:
    """Two random models of 256 tokens and answers of one token: the exact total variation is a sum over all tokens."""
    from icl_compiler.backends.hf_transformers import TransformersBackend

    lengths = Lengths(400, 1)
    engines = [
        TransformersBackend(str(save_tiny_model(tmp_path / str(seed), vocabulary=256, seed=seed)), "float32")
        for seed in (0, 1)
    ]
    short = compile_program(program.pool.data, model="echo", retriever="bm25", shots=0, budget=10_000)
    ours, theirs = (
        write(PromptedPredictor(short, engine), TEXTS[:2], lengths, seed=1 - place)
        for place, engine in enumerate(engines)
    )
    found = text_gap(ours, theirs, lengths)
    for i, prompt in enumerate(ours.prompts):
        p, q = (
            np.exp(np.concatenate(engine.sequence_logprobs([prompt.tokens] * 256, [[t] for t in range(256)]).logprobs))
            for engine in engines
        )
        exact = np.abs(p - q).sum() / 2
        assert found.gap.per_query[i] == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 400))
    assert reading_noise(ours, 2, lengths).mean < 1e-3


def test_rows_of_texts(program: Program) -> None:
    data = Dataset(TEXTS * 6, ("b" * MOST, "ab", "a") * 6, "generation", "test")
    lengths = Lengths(3, MOST)
    reference = Reference(Path("r"), (), Template.from_name("generate"), "by hand", "echo", 0, 12, "", ())
    bare = compile_program(program.pool.data, model="echo", retriever="bm25", shots=0, budget=10_000)
    wrote = [
        write(PromptedPredictor(bare, Chain(tilt)), data.texts, lengths, seed=s) for s, tilt in enumerate((0, 0.3))
    ]
    asked = TextAnswers(reference, wrote[0], ((replace(reference, seed=1), wrote[1]),))
    # The neighbours are those of the program's own retriever, where it is dense.
    dense = replace(program, settings=replace(program.settings, retriever="dense"))
    found = evaluate_texts(dense, Chain(0.2), asked, data, lengths, dataset_name="toy", seed=0, series=BASELINES)
    rows = {row["series"]: row for row in found.rows}
    assert list(rows) == [
        "program",
        "random shots",
        "shuffled labels",
        "zero shots",
        "neighbours' vote",
        "floor",
        "scoring noise",
    ]
    assert rows["floor"]["gap"] == text_gap(wrote[1], wrote[0], lengths).gap.mean
    assert rows["scoring noise"]["gap"] == pytest.approx(0, abs=1e-12)
    outputs = write(PromptedPredictor(dense, Chain(0.2)), data.texts, lengths, seed=9).outputs
    assert rows["program"]["accuracy"] == np.mean([o == t for o, t in zip(outputs, data.answers, strict=True)])
    assert rows["program"]["agreement"] == np.mean([o == t for o, t in zip(outputs, wrote[0].outputs, strict=True)])
    assert (rows["program"]["samples"], rows["program"]["max_new_tokens"], rows["program"]["n_labels"]) == (
        3,
        MOST,
        None,
    )
    assert [len(each["gaps"]) for each in found.per_query] == [18] * 6
    assert found.worst[0]["tv"] == max(found.per_query[0]["gaps"])
    assert len(measurements(found.rows)) == 7
    said = " ".join(verdict_sentence(found.rows))
    assert "whole answers of up to 4 tokens" in said
    assert "Right is an output of likeliest tokens that is the target." in said
    assert "token gap" in summary_lines(found.rows)[0]
    assert found.warnings == []


def test_texts_are_asked_until_it_is_decided(program: Program) -> None:
    lengths, most = Lengths(4, MOST), 320
    data = Dataset(tuple(f"{i:03}" for i in range(most)), ("a",) * most, "generation", "test")  # one length, one law
    exact = enumerated(program, 0.6, -0.6, "000")["gap"]
    theirs = PromptedPredictor(program, Chain(-0.6))
    asked = write_until_decided(
        program, Chain(0.6), lambda texts, seed: write(theirs, texts, lengths, seed=seed), data, lengths,
        epsilon=exact - 0.08, seed=0,
    )  # fmt: skip
    assert asked.stopped.answer == "not within"
    assert asked.stopped.queries % BATCH == 0
    assert BATCH < len(asked.data) == asked.stopped.queries < most
    reference = Reference(Path("r"), (), Template.from_name("generate"), "by hand", "echo", 0, 12, "", ())
    found = evaluate_texts(
        program, Chain(0.6), TextAnswers(reference, asked.reference, ()), asked.data, lengths,
        dataset_name="toy", seed=0, series=("neighbours' vote",), asked=asked,
    )  # fmt: skip
    row, vote = found.rows
    assert (row["gap_low"], row["gap_high"]) == asked.stopped.interval
    assert (row["decision"], row["queries_asked"], row["queries_max"]) == ("not within", asked.stopped.queries, most)
    assert row["gap_low"] <= exact <= row["gap_high"]
    for each, line in zip((row, vote), found.per_query, strict=True):
        lows, highs = confidence_sequence(np.array(line["gaps"]))
        assert (each["gap_low"], each["gap_high"]) == (lows[-1], highs[-1])
    again = text_gap(asked.ours, asked.reference, lengths, anytime=True)  # each reads the other once more
    assert again.token_interval == (row["token_gap_low"], row["token_gap_high"])
    assert again.gap.mean == row["gap"]
    parts = [[item.tokens for items in asked.ours.samples[i : i + BATCH] for item in items] for i in (0, BATCH)]
    assert parts[0] != parts[1], "queries share no draws, though these have one law"


def test_answers_that_nearly_always_differ_are_told(program: Program) -> None:
    data, lengths = Dataset(TEXTS, ("a", "b", "a"), "generation", "test"), Lengths(2, 64)
    reference = Reference(Path("r"), (), Template.from_name("generate"), "by hand", "echo", 0, 12, "", ())
    asked = TextAnswers(reference, written(program, -0.99, lengths, seed=0), ())
    found = evaluate_texts(program, Chain(1.99), asked, data, lengths, dataset_name="toy", seed=0)
    assert found.rows[0]["gap"] > 0.9 > found.rows[0]["token_gap"]
    [warning] = found.warnings
    assert warning.startswith("with 3 examples, whole answers of up to 64 tokens differ nearly always")
