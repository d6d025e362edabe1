"""What the base model's reading adds to a sentence embedding in the neighbours' vote; two minutes a dataset on a core.

    ICL_DATASETS=FOLDER python -m benchmarks.reading [--datasets mr subj] [--pool 1000] [--queries 300]

For each dataset, a label-balanced pool and queries drawn at random from the test rows. The neighbours of a query are
the rows of the pool with the highest cosine, and vote; how, is chosen for each encoder by itself, by the log-loss of
rows of the pool, each left out. No prompt with shots is asked, and no reference: log-loss is that of the right label in
nats, with a hundredth of each law spread over all labels.

- `minilm` is the sentence encoder alone, `base` the reading alone, `minilm+base` both, as `--encoder` takes them.
- `minilm+mean` and `minilm+last` have one of the reading's two vectors each, as weighty as the sentence embedding.

Rows are appended to `benchmarks/rows/reading.jsonl`; what stands there is not measured again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from evaluation.evaluate import commit, machine
from icl_compiler.calibration.vote_choice import best_vote, drawn_rows, losses_of_vote, voters_among
from icl_compiler.calibration.votes import law_of_votes
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset, load_dataset, normalise_text
from icl_compiler.encoders import encoder_of, named_encoder
from retrievers.dense import Dense
from retrievers.encoder import Concatenated
from retrievers.retriever import Encoder, Resources

ROWS = Path(__file__).parent / "rows" / "reading.jsonl"
DATASETS = ("banking77", "clinc150_oos", "hwu64", "mr", "subj", "goemotions_single")
MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Part:
    """One of the two vectors of a reading."""

    reading: Encoder
    number: int

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts width"]:
        """The first or the second half of each vector."""
        return np.split(self.reading.encode(texts), 2, axis=1)[self.number]


def encoders(pool: Dataset) -> dict[str, Encoder]:
    """All that are compared, by name."""
    program = compile_program(pool, model=MODEL, encoder="minilm+base", retriever="bm25")
    words, reading = named_encoder("minilm"), program.reading
    assert reading is not None
    return {
        "minilm": words,
        "minilm+mean": Concatenated([words, Part(reading, 0)]),
        "minilm+last": Concatenated([words, Part(reading, 1)]),
        "base": reading,
        "minilm+base": encoder_of(program),
    }


def vote(encoder: Encoder, pool: Dataset, queries: Dataset) -> Row:
    """How well the neighbours of the queries vote."""
    index = Dense(Resources(seed=0, encoder=encoder))
    index.fit(pool.texts)
    number = {label: i for i, label in enumerate(pool.labels)}
    answers, right = (np.array([number[answer] for answer in data.answers]) for data in (pool, queries))
    texts, rows = [normalise_text(text) for text in pool.texts], drawn_rows(len(pool))
    left_out = voters_among(index, texts, answers, [pool.texts[row] for row in rows.tolist()])
    how = best_vote(left_out, answers[rows], len(number))
    voters = voters_among(index, texts, answers, queries.texts)
    losses = losses_of_vote(voters, how, right, len(number))
    law = law_of_votes(voters, how, len(number))
    return {
        "log_loss": float(losses.mean()),
        "error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
        "accuracy": float((law.argmax(axis=1) == right).mean()),
        "left_out": float(losses_of_vote(left_out, how, answers[rows], len(number)).mean()),
        "k": how.k,
        "sharpness": how.sharpness,
    }


def table() -> str:
    """What was measured, in Markdown: log-loss and accuracy of each encoder."""
    rows = rows_of(ROWS)
    names = list(dict.fromkeys(row["encoder"] for row in rows))
    lines = [f"| | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        found = {row["encoder"]: row for row in rows if row["dataset"] == dataset}
        cells = [
            f"{found[name]['log_loss']:.2f}, {found[name]['accuracy']:.2f}" if name in found else "" for name in names
        ]
        lines.append(f"| {dataset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    asked = parser.parse_args()
    data = data_folder(DATASETS)
    for name in asked.datasets:
        known = [row["key"] for row in rows_of(ROWS)]
        train, test = (load_dataset(data / name / f"{part}.jsonl") for part in ("train", "test"))
        train, _ = train.without_texts(test.texts)
        pool = train.subset(min(asked.pool, len(train)), seed=0)
        there = [row for row, answer in enumerate(test.answers) if answer in pool.labels]
        queries = test.take(np.random.default_rng(0).permutation(there)[: asked.queries].tolist())
        found = None
        for encoder in ("minilm", "minilm+mean", "minilm+last", "base", "minilm+base"):
            key = [name, encoder, asked.pool, asked.queries]
            if key in known:
                continue
            found = found or encoders(pool)
            row = {"key": key, "dataset": name, "encoder": encoder, **vote(found[encoder], pool, queries)}
            keep(ROWS, row | {"machine": machine(), "commit": commit()})
            print(row, flush=True)
    print(table())


if __name__ == "__main__":
    main()
