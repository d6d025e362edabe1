"""Do fitted curves say what lies beyond the sizes measured? Seconds; no model.

    python -m benchmarks extrapolation

The curves are those that Bertsch et al. 2024 published (arXiv 2405.00200): the error of prompting with random and with
retrieved examples, and of fine-tuning, Llama-2-7B on 250 test items of three datasets. Each is fitted on the smaller
half of its sizes, and predicts the larger half. "Covered" counts the sizes there whose measured error lies in the
curve's 95 % interval; "with noise" widens it by the measurement's own 1.96 standard errors. Then, on all sizes: from
how many examples on fine-tuning has the lower error.
"""

import csv
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.crossover import crossover
from evaluation.curve_points import Points
from evaluation.curves import FittedCurve, fitted_curve

ITEMS = 250


class Extrapolation(NamedTuple):
    """How the curve of the smaller half of the sizes predicts the larger half."""

    dataset: str
    method: str
    form: str
    fitted: tuple[int, int]
    predicted: tuple[int, int]
    sizes: int
    covered: int
    covered_with_noise: int
    mean_error: float
    worst_error: float


def published(folder: Path) -> dict[tuple[str, str], Points]:
    """The error at each size: mean over runs, with the standard error of runs and of test items."""
    runs: dict[tuple[str, str], dict[int, list[float]]] = {}
    with (folder / "curves" / "long_context_icl.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_size = runs.setdefault((row["dataset"], row["method"]), {})
            by_size.setdefault(int(row["n_examples"]), []).append(1 - float(row["accuracy"]))
    found = {}
    for name, by_size in runs.items():
        sizes = sorted(n for n in by_size if n > 0)
        means = np.array([np.mean(by_size[n]) for n in sizes])
        of_runs = np.array([np.var(by_size[n], ddof=1) / len(by_size[n]) if len(by_size[n]) > 1 else 0 for n in sizes])
        found[name] = Points(np.array(sizes), means, np.sqrt(of_runs + (means * (1 - means) + 1e-4) / ITEMS))
    return found


def fitted(points: Points) -> FittedCurve:
    return fitted_curve(points, rng=np.random.default_rng(0))


def extrapolate(name: tuple[str, str], points: Points) -> Extrapolation:
    half = (len(points.sizes) + 1) // 2
    curve = fitted(Points(points.sizes[:half], points.gaps[:half], points.errors[:half]))
    said = [curve.predict(int(n)) for n in points.sizes[half:]]
    lows, highs = (np.array([getattr(each.interval, end) for each in said]) for end in ("low", "high"))
    measured, noise = points.gaps[half:], 1.96 * points.errors[half:]
    misses = np.abs(np.array([each.gap for each in said]) - measured)
    return Extrapolation(
        *name,
        curve.fit.curve.form,
        (int(points.sizes[0]), int(points.sizes[half - 1])),
        (int(points.sizes[half]), int(points.sizes[-1])),
        len(misses),
        int(((lows <= measured) & (measured <= highs)).sum()),
        int(((lows - noise <= measured) & (measured <= highs + noise)).sum()),
        float(misses.mean()),
        float(misses.max()),
    )


def main() -> None:
    data = Path(os.environ.get("ICL_DATASETS", Path(__file__).parents[2] / "shared" / "data"))
    if not (data / "curves").is_dir():
        sys.exit(f"there is no folder curves in {data}; set ICL_DATASETS to the folder that holds it")
    curves = published(data)
    print("| dataset | method | form | fitted on | predicted | covered | with noise | mean miss | worst |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = [extrapolate(name, points) for name, points in curves.items()]
    for each in found:
        ranges = [f"{low:,} to {high:,}" for low, high in (each.fitted, each.predicted)]
        cells = [each.dataset, each.method, each.form, *ranges, f"{each.covered} of {each.sizes}"]
        cells += [f"{each.covered_with_noise} of {each.sizes}", f"{each.mean_error:.3f}", f"{each.worst_error:.3f}"]
        print(f"| {' | '.join(cells)} |")
    sizes = sum(each.sizes for each in found)
    covered, noisy = sum(each.covered for each in found), sum(each.covered_with_noise for each in found)
    print(f"\nIn all: {covered} of {sizes} covered, {noisy} with noise.\n")
    print("| dataset | prompting with | fine-tuning has the lower error from |")
    print("|---|---|---|")
    for dataset in dict.fromkeys(name for name, _ in curves):
        for method in ("icl_random", "icl_retrieval"):
            at = crossover(fitted(curves[dataset, method]), fitted(curves[dataset, "fine_tuned"]))
            ends = [f"{end:,}" if end else "never" for end in (at.low, at.high)]
            n = f"{at.n:,} [{ends[0]}, {ends[1]}]" if at.n else f"nowhere searched [{ends[0]}, {ends[1]}]"
            print(f"| {dataset} | {method} | {n}{'; ' + at.warning if at.warning else ''} |")


if __name__ == "__main__":
    main()
