"""Prompts beside known truths, and beside what theory says of learners without a prior; about an hour on one core.

    python -m benchmarks.known_truths [--stages categorical sequences linear reference] [--seeds 6] [--html FILE]

- categorical: m contexts, each with a law over V words that is known; n samples of each context are the shots, the
  query's own context among them. TV of the prompted model's law to the truth, beside that of the counted law and of
  Laplace's, which is Bayes' here, on the same samples. "own": the query's n samples, found by BM25; "all": those of
  all contexts in one prompt. Along n, along V, along m.
- sequences: the same for answers of l words, V**l outcomes, scored exactly.
- linear: points of d whole numbers and the side of a plane they lie on. Error on fresh points with all n points as
  shots ("random"), with the 7 nearest of n ("nearest"), of logistic regression, the vote of the 7 nearest, and the
  max-margin rule. Along n and d; once with a tenth of the labels wrong.
- reference: the upper layers fine-tuned on the samples of some cells of "categorical".

A seed draws the truths and the samples; intervals are over seeds. Rows are appended to
`benchmarks/rows/known-truths.jsonl`; what stands there is not measured again, so that the command can be stopped at any
time, and stages run apart. At the end tables and sentences are printed; `--fill FILE` puts them into a document between
two marks, `--html FILE` draws them. See `docs/known-truths.md`.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.truths import findings, laws
from evaluation.evaluate import commit, machine
from evaluation.tv import tv_distance, with_other
from icl_compiler.backends.backend import Backend
from icl_compiler.compile import load_tokenizer, new_retriever, zero_shot_program
from icl_compiler.data import Dataset
from icl_compiler.encoders import named_encoder
from icl_compiler.predictor import PromptedPredictor, open_backend
from icl_compiler.program import Program, Settings, encode_pool
from icl_compiler.templates import EncodedTemplate, Template
from retrievers.retriever import Hits, Retriever

HERE = Path(__file__).parent
ROWS = HERE / "rows" / "known-truths.jsonl"
TEMPLATE = HERE / "known_truths.jinja"
STAGES = ("categorical", "sequences", "linear", "reference")
SIDES = ("red", "blue")
NEAREST, QUERIES, FRESH = 7, 32, 2000
FIRST_LAYER, EPOCHS, RATE = 24, 12, 5e-4
MOST_RANDOM = 256  # points in a prompt: with 8 numbers each, nearly what the model's context of 8,192 tokens holds
Row = dict[str, Any]


class TextCell(NamedTuple):
    """A law of text and the samples of each of its contexts."""

    stage: str
    contexts: int
    vocabulary: int
    length: int
    n: int
    seed: int


class LinearCell(NamedTuple):
    """A rule and the points whose labels are known."""

    stage: str
    dimension: int
    noise: float
    n: int
    seed: int


Cell = TextCell | LinearCell


def cells(stage: str, seed: int) -> Iterator[Cell]:
    """What is measured with one seed."""
    if stage == "categorical":
        shapes = [(8, 4, n) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
        shapes += [(8, v, 32) for v in (2, 8, 16, 32)] + [(m, 4, 32) for m in (1, 2, 4, 16, 32)]
        yield from (TextCell(stage, m, v, 1, n, seed) for m, v, n in shapes)
    if stage == "sequences" and seed < 4:
        shapes = [(v, length, n) for v in (2, 4) for length in (1, 2, 3) for n in (1, 4, 16, 64)]
        yield from (TextCell(stage, 4, v, length, n, seed) for v, length, n in shapes)
    if stage == "linear" and seed < 4:
        for dimension, noise in ((2, 0.0), (4, 0.0), (8, 0.0), (4, 0.1)):
            sizes = (4, 8, 16, 32, 64, 128, 256) + (1024,) * (noise == 0)
            yield from (LinearCell(stage, dimension, noise, n, seed) for n in sizes)
    if stage == "reference" and seed < 3:
        yield from (TextCell(stage, 8, 4, 1, n, seed) for n in (8, 64))


class NearestPoints:
    """Rows by Euclidean distance, their texts being whole numbers."""

    score_meaning = "distance, negative"

    def fit(self, texts: Sequence[str]) -> None:
        """Read the numbers."""
        self._points = _numbers(texts)

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The `k` nearest rows, equal ones in the order of the rows."""
        distances = np.linalg.norm(_numbers(texts)[:, None] - self._points, axis=2)
        ids = np.argsort(distances, axis=1, kind="stable")[:, :k].astype(np.int64)
        return Hits(ids, -np.take_along_axis(distances, ids, axis=1).astype(np.float32))

    def save(self, folder: Path) -> None:
        """No program of a benchmark is kept."""
        raise NotImplementedError("the programs of a benchmark are not kept: there is nothing to save or load")

    load = save


class Prompts(NamedTuple):
    """How a law is asked for: one model, one template, any shots."""

    backend: Backend
    model: str

    def program(self, data: Dataset, answers: Sequence[str], retriever: Retriever, shots: int) -> Program:
        """`answers` are all that may be said, whether or not `data` has them; a row with the query's text may stand."""
        encoded = EncodedTemplate.build(_template(), load_tokenizer(self.model), answers)
        retriever.fit(data.texts)
        budget = self.backend.max_prompt_tokens
        name = type(retriever).__name__.lower()
        order: Any = "best-first" if name == "uniform" else "best-last"
        settings = Settings(self.model, "none", name, shots, budget, order, 0)
        return Program(settings, "classification", encoded, encode_pool(encoded, data), retriever, without_itself=False)

    def law(self, program: Program, texts: Sequence[str]) -> "Said":
        """What the model says, with "other" as the last outcome."""
        said = PromptedPredictor(program, self.backend).predict(texts)
        return Said(with_other(said.probabilities), said.usage.computed_tokens)


class Said(NamedTuple):
    """A law for each text, and what it cost."""

    law: np.ndarray[Any, Any]
    tokens: int

    @property
    def of_words(self) -> np.ndarray[Any, Any]:
        """The law given that the answer is one of those that can be: "other" then has nothing."""
        words = np.maximum(self.law[:, :-1], 1e-12)
        return with_other(words / words.sum(axis=1, keepdims=True))


def measure_text(cell: TextCell, prompts: Prompts) -> Row:
    """The TV to the truth in each context of each way to know its law."""
    truth = laws.text(cell.contexts, cell.vocabulary, cell.length, seed=cell.seed)
    drawn = laws.samples(truth.law, cell.n, seed=cell.seed)
    pairs = [(context, truth.answers[i]) for context, row in zip(truth.contexts, drawn, strict=True) for i in row]
    data = _dataset(pairs)
    asked = {
        "zero": prompts.program(data, truth.answers, _random(cell.seed), 0),
        "own": prompts.program(data, truth.answers, _by_words(), cell.n),
        "all": prompts.program(data, truth.answers, _random(cell.seed), len(data)),
    }
    said = {name: prompts.law(program, truth.contexts) for name, program in asked.items()}
    known = with_other(truth.law)
    found = {name: each.law for name, each in said.items()}
    found |= {f"{name}, words only": each.of_words for name, each in said.items()}
    for name, more in (("counting", 0.0), ("Laplace", 1.0)):
        found[name] = with_other(laws.counted(drawn, len(truth.answers), more=more))
    if cell.length > 1:
        found["word by word"] = with_other(laws.word_by_word(drawn, cell.vocabulary, cell.length))
    gaps = {name: tv_distance(law, known) for name, law in found.items()}
    if cell.stage == "reference":
        learned = fine_tuned(pairs, truth, prompts.model, cell.seed)
        gaps["fine-tuned"] = tv_distance(learned, known)
        gaps |= {f"{name} to fine-tuned": tv_distance(found[name], learned) for name in ("own", "all")}
    tokens = sum(each.tokens for each in said.values())
    return {"gaps": {name: np.round(gap, 6).tolist() for name, gap in gaps.items()}, "computed_tokens": tokens}


def fine_tuned(pairs: Sequence[tuple[str, str]], truth: laws.Text, model: str, seed: int) -> np.ndarray[Any, Any]:
    """The law of a model whose upper layers were fine-tuned on the samples, for a few epochs."""
    from evaluation.reference.full import Full
    from evaluation.reference.loop import LoopSettings
    from evaluation.reference.trainer import finetune
    from icl_compiler.backends.hf_transformers import TransformersBackend

    # As targets, not labels: a word that was never drawn is no label of the data, yet an answer that can be asked for.
    data = _dataset(pairs, "generation")
    with tempfile.TemporaryDirectory() as scratch:
        loop = LoopSettings(epochs=EPOCHS, learning_rate=RATE, seed=seed)
        reference = finetune(
            data,
            Path(scratch) / "reference",
            model=model,
            method=Full(FIRST_LAYER),
            template=str(TEMPLATE),
            settings=loop,
        )
        program = zero_shot_program(truth.answers, _template(), model=model)
        return Prompts(TransformersBackend(model, network=reference.network()), model).law(program, truth.contexts).law


def measure_linear(cell: LinearCell, prompts: Prompts) -> Row:
    """Errors against the rule on fresh points, and the TV of prompts to the law of a label, which may be noisy."""
    rule = laws.rule(cell.dimension, noise=cell.noise, seed=cell.seed)
    known = laws.points(rule, cell.n, seed=cell.seed)
    seen = laws.labels(rule, known, seed=cell.seed)
    fresh = laws.points(rule, FRESH, seed=cell.seed + 1000)
    sides = rule.is_right(fresh)
    errors = {name: float((says != sides).mean()) for name, says in classical(cell, known, seen, fresh).items()}
    gaps, tokens = {}, 0
    data = _dataset([(_written(point), SIDES[side]) for point, side in zip(known, seen.astype(int), strict=True)])
    texts = [_written(point) for point in fresh[:QUERIES]]
    ways: dict[str, tuple[Retriever, int]] = {}
    if cell.n <= MOST_RANDOM:
        ways["random"] = (_random(cell.seed), cell.n)
    if cell.noise == 0 and cell.n in (16, 128, 1024):
        ways["nearest"] = (NearestPoints(), NEAREST)
    truth = np.where(sides[:QUERIES, None] == (np.arange(2) == 1), 1 - cell.noise, cell.noise)
    for name, (retriever, shots) in ways.items():
        program = prompts.program(data, SIDES, retriever, shots)
        said = prompts.law(program, texts)
        errors[name] = float((said.law[:, :2].argmax(axis=1) != sides[:QUERIES]).mean())
        gaps[name] = float(tv_distance(said.law, with_other(truth)).mean())
        tokens += said.tokens
    return {"errors": errors, "gaps": gaps, "computed_tokens": tokens}


def classical(
    cell: LinearCell, known: np.ndarray[Any, Any], seen: np.ndarray[Any, Any], fresh: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """What methods without a language model say of fresh points."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    learners: dict[str, Any] = {
        "logistic regression": LogisticRegression(),
        "vote of the nearest": KNeighborsClassifier(min(NEAREST, cell.n - 1 + cell.n % 2)),
    }
    if cell.noise == 0:
        learners["max margin"] = SVC(kernel="linear", C=1e6)
    scale = known.std() or 1.0
    if len(set(seen.tolist())) == 1:  # all points on one side: nothing else can be said
        return {name: np.full(len(fresh), seen[0]) for name in learners}
    return {name: learner.fit(known / scale, seen).predict(fresh / scale) for name, learner in learners.items()}


def measured(path: Path) -> list[Row]:
    """All rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(stages: Sequence[str], seeds: int, model: str, path: Path, *, most: int | None = None) -> None:
    """Measure what is not measured yet, seed after seed; `most` cells at most."""
    done = {json.dumps(row["key"]) for row in measured(path)}
    wanted = [cell for seed in range(seeds) for stage in stages for cell in cells(stage, seed)]
    missing = [cell for cell in wanted if json.dumps([model, *cell]) not in done][:most]
    if not missing:
        return
    prompts = Prompts(open_backend(None, model), model)
    facts = {"model": model, "dtype": prompts.backend.device, "machine": machine(), "commit": commit()}
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(missing, start=1):
        started = time.perf_counter()
        found = measure_text(cell, prompts) if isinstance(cell, TextCell) else measure_linear(cell, prompts)
        row = {"key": [model, *cell], **cell._asdict(), **found, "seconds": time.perf_counter() - started, **facts}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number} of {len(missing)}: {tuple(cell)}, {row['seconds']:.1f} s", file=sys.stderr, flush=True)


def _template() -> Template:
    return Template.from_name(str(TEMPLATE))


def _random(seed: int) -> Retriever:
    return new_retriever("uniform", encoder=named_encoder("none"), seed=seed)


def _by_words() -> Retriever:
    return new_retriever("bm25", encoder=named_encoder("none"), seed=0)


def _dataset(
    pairs: Sequence[tuple[str, str]], task: Literal["classification", "generation"] = "classification"
) -> Dataset:
    return Dataset(tuple(text for text, _ in pairs), tuple(answer for _, answer in pairs), task, "known truths")


def _written(point: np.ndarray[Any, Any]) -> str:
    return " ".join(map(str, point.tolist()))


def _numbers(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([[int(number) for number in text.split()] for text in texts], dtype=np.float64)


def fill(document: Path, told: str) -> None:
    """Put what was found between the marks of a document, in place of what stands there."""
    old = document.read_text(encoding="utf-8")
    begin, end = "<!-- figures: begin -->", "<!-- figures: end -->"
    new, times = re.subn(f"(?s){begin}.*{end}", lambda _: f"{begin}\n\n{told.strip()}\n\n{end}", old)
    if times != 1:
        sys.exit(f"{document} should have the lines {begin} and {end} once, found them {times} times")
    document.write_text(new, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--seeds", type=int, default=6, help="how many; sequences and linear take 4 at most, reference 3"
    )
    parser.add_argument("--cells", type=int, help="stop after so many new cells")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--fill", type=Path, help="document to put tables and sentences into")
    parser.add_argument("--html", type=Path, help="file to draw the plots into")
    asked = parser.parse_args(arguments)
    run(asked.stages, asked.seeds, asked.model, asked.rows, most=asked.cells)
    panels = findings.panels([row for row in measured(asked.rows) if row["model"] == asked.model])
    told = findings.told(panels)
    print(told)
    if asked.fill:
        fill(asked.fill, told)
    if asked.html:
        from benchmarks.truths import plot

        plot.write(asked.html, panels)


if __name__ == "__main__":
    main()
