"""What the evaluator itself takes: the gap on 100,000 queries with 150 labels; half a minute, no model.

    python -m benchmarks evaluator

Two predictors' laws are drawn from a Dirichlet law (seed 0), as a model's answers would come; what is timed begins with
them: total variation, interval, accuracy, calibration error. Memory is the most the process held, less what it held
with the laws in it.
"""

import resource
import time

import numpy as np

from evaluation.evaluate import machine
from evaluation.gap import calibration_error, gap
from evaluation.intervals import clopper_pearson
from icl_compiler.backends.backend import Usage
from icl_compiler.predictor import Predictions

QUERIES, LABELS = 100_000, 150


def predictions(rng: np.random.Generator) -> Predictions:
    laws = rng.dirichlet(np.full(LABELS + 1, 0.05), QUERIES)[:, :LABELS]
    labels = tuple(f"label {i}" for i in range(LABELS))
    return Predictions(labels, laws, np.zeros(QUERIES, dtype=np.int64), Usage(0, 0, 0), 0.0)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    rng = np.random.default_rng(0)
    first, second = predictions(rng), predictions(rng)
    held, started = peak_mib(), time.perf_counter()
    found = gap(first, second)
    correct = first.best == rng.integers(0, LABELS, QUERIES)
    calibration_error(first.probabilities.max(axis=1), correct.astype(float))
    clopper_pearson(int(correct.sum()), QUERIES)
    seconds = time.perf_counter() - started
    print(f"{QUERIES:,} queries, {LABELS} labels, {machine()}")
    print(f"gap {found.mean:.4f} [{found.interval.low:.4f}, {found.interval.high:.4f}]")
    print(f"{seconds:.1f} s, {peak_mib() - held:,.0f} MiB more than the {held:,.0f} MiB of the process with both laws")


if __name__ == "__main__":
    main()
