"""Rows of measurements, for the tests of all that is made from them."""

import math

# Every number differs from every other, so that each can be looked for in a page.
PROGRAM = {
    "series": "program",
    "dataset": "banking77",
    "n_examples": 512,
    "max_prompt_tokens": 1024,
    "retriever": "dense",
    "shots_per_query": 15.2,
    "gap": 0.211,
    "gap_low": 0.182,
    "gap_high": 0.253,
    "level": 0.95,
    "n_queries": 217,
    "accuracy": 0.834,
    "accuracy_low": 0.776,
    "accuracy_high": 0.887,
    "reference_accuracy": 0.881,
    "agreement": 0.805,
    "ece": 0.072,
    "label_mass": 0.969,
    "prompt_tokens_per_query": 731.0,
    "computed_tokens_per_query": 702.0,
    "seconds_per_query": 0.513,
    "model": "smollm2-135m",
    "reference": "full fine-tuning, seed 0, 1000 examples",
    "seed": 0,
    "data_sha256": "9f2b" * 16,
    "machine": "2 cores",
    "commit": "4f1c2ab",
    "version": "0.1.0",
}
VOTE = "neighbours' vote"


def row(series="program", gap=0.21, margin=0.03, **changes):
    bounds = {"gap_low": None, "gap_high": None}
    if gap is not None and margin is not None:
        bounds = {"gap_low": round(max(gap - margin, 0), 6), "gap_high": round(min(gap + margin, 1), 6)}
    return PROGRAM | {"series": series, "gap": gap} | bounds | changes


def sweep(dataset="banking77", budgets=(1024,), seeds=(0,)):
    rows = [
        row("program", 0.9 / math.log2(n) + 0.01 * seed, n_examples=n, max_prompt_tokens=budget, seed=seed)
        | {"dataset": dataset, "prompt_tokens_per_query": min(budget, 40.0 * n)}
        for n in (16, 64, 256)
        for budget in budgets
        for seed in seeds
    ]
    return [
        *rows,
        row("zero shots", 0.8, n_examples=0, dataset=dataset, retriever=None),
        row("floor", 0.05, 0.01, n_examples=None, dataset=dataset, accuracy=None, ece=None),
    ]
