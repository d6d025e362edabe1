"""The tables of `docs/references.md`, from the rows of `benchmarks.references`, in Markdown.

    python -m benchmarks.parts.reference_tables [ROWS]

Where a method was measured with several seeds it is the mean over them, with the least and the largest. Processor
seconds are those of one machine, the one with the most rows, unless the cell names another.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.parts.kept import Row, rows_of

ROWS = Path(__file__).parents[1] / "rows" / "references.jsonl"
METHODS = ("rsr", "lora", "full", "shira", "loreft", "head")
_PARAMETERS = 134_515_008  # of SmolLM2-135M


def tables(rows: list[Row]) -> str:
    """All of them; those of which there are no rows are left out."""
    made = (methods_table, same_loss_table, search_table, ablation_table, workers_table, cascade_table)
    return "\n\n".join(table for each in made if (table := each(rows)))


def methods_table(rows: list[Row]) -> str:
    """Each method on each dataset, with the floor between its seeds."""
    usual = Counter(row["machine"] for row in rows if row["stage"] == "main").most_common(1)
    lines = []
    for key, group in _groups(rows, "main"):
        apart = [row["tv"] for other, floors in _groups(rows, "floor") if other == key for row in floors]
        timed = [row for row in group if row["machine"] == usual[0][0]]
        elsewhere = "" if timed else f" ({group[0]['machine'].partition(',')[0]})"
        lines.append(
            [
                *_named(key),
                str(len(group)),
                _mean(group, "held_out_loss", "{:.2f}"),
                _mean(group, "accuracy", "{:.3f}"),
                _mean(group, "nll", "{:.2f}"),
                f"{np.mean(apart):.2f}" if apart else "",
                f"{group[0]['trained_parameters'] / _PARAMETERS:.2%}",
                _mean(timed or group, "cpu_seconds", "{:,.0f}") + elsewhere,
                _mean(group, "peak_mib", "{:,.0f}"),
                _mean(group, "artefact_mb", "{:.1f}"),
            ]
        )
    heads = "method | learning rate | seeds | held-out loss, nats | accuracy | negative log-likelihood | floor"
    return _table(f"{heads} | trained | processor seconds | peak, MiB | artefact, MB", lines)


def same_loss_table(rows: list[Row]) -> str:
    """RSR's time to its lowest held-out loss, as a share of what another method takes to that loss, seed by seed."""
    main = [row for row in rows if row["stage"] == "main"]
    shares: dict[tuple[str, str], list[str]] = {}
    for rsr in (row for row in main if (row["method"], row["variant"]) == ("rsr", "")):
        for other in main:
            same = all(rsr[name] == other[name] for name in ("dataset", "seed", "machine"))
            if same and other["method"] not in ("rsr", "head"):
                own, its = (_seconds_to(row, rsr["held_out_loss"]) for row in (rsr, other))
                share = "never there" if own is None or its is None else f"{own / its:.2f}"
                name = f"{other['method']}, {other['rate']:g}"
                shares.setdefault((rsr["dataset"], name), []).append(f"{rsr['seed']}: {share}")
    lines = [[*key, ", ".join(sorted(by_seed))] for key, by_seed in sorted(shares.items())]
    return _table("beside | RSR's share of the time to its held-out loss, by seed", lines)


def search_table(rows: list[Row]) -> str:
    """What the search of the learning rates found."""
    lines = [
        [
            *_named(key),
            _mean(group, "held_out_loss", "{:.2f}"),
            f"{group[0]['trained_parameters'] / _PARAMETERS:.2%}",
            _mean(group, "cpu_seconds", "{:,.0f}"),
            _mean(group, "peak_mib", "{:,.0f}"),
        ]
        for key, group in _groups(rows, "search")
    ]
    return _table("method | learning rate | held-out loss, nats | trained | processor seconds | peak, MiB", lines)


def ablation_table(rows: list[Row]) -> str:
    """What each part that is switched off, or exchanged, costs in test loss: means over seeds, paired by row.

    The interval of 95 % is over rows, of their means over the seeds.
    """
    ablated = {(r["dataset"], r["variant"], r["seed"]): r["test_losses"] for r in rows if r["stage"] == "ablation"}
    lines = []
    for dataset, variant in dict.fromkeys((dataset, variant) for dataset, variant, _ in ablated):
        both = [s for s in range(3) if {(dataset, variant, s), (dataset, "every part", s)} <= set(ablated)]
        if variant == "every part" or not both:
            continue
        more = np.array([np.subtract(ablated[dataset, variant, s], ablated[dataset, "every part", s]) for s in both])
        low, high = stats.ttest_1samp(more.mean(axis=0), 0).confidence_interval(0.95)
        by_seed = ", ".join(f"{mean:+.2f}" for mean in more.mean(axis=1))
        lines.append([dataset, variant, f"{more.mean():+.2f} [{low:+.2f}, {high:+.2f}]", by_seed])
    return _table("switched off | more loss, nats | by seed", lines)


def workers_table(rows: list[Row]) -> str:
    """One process and two."""
    shown = {"wall_seconds": "{:,.0f}", "held_out_loss": "{:.3f}", "accuracy": "{:.3f}", "nll": "{:.2f}"}
    lines = [
        [row["dataset"], row["variant"], *(form.format(row[name]) for name, form in shown.items())]
        for row in rows
        if row["stage"] == "workers"
    ]
    return _table("| wall seconds | held-out loss, nats | accuracy | negative log-likelihood", lines)


def cascade_table(rows: list[Row]) -> str:
    """The generations of the cascade."""
    losses = ("specialised_loss", "pruned_loss", "healed_loss")
    lines = [
        [
            row["dataset"],
            *(f"{row[name]:,}" for name in ("generation", "parameters", "layers", "heads", "width")),
            *("" if row[name] is None else f"{row[name]:.2f}" for name in losses),
            f"{row['accuracy']:.3f}",
            f"{1000 * row['seconds_per_text']:.1f}",
            f"{row['trained_s']:,.0f}",
        ]
        for row in rows
        if row["stage"] == "cascade"
    ]
    heads = "generation | parameters | layers | heads | width | held-out loss before | pruned | healed | accuracy"
    return _table(f"{heads} | ms a text | training, wall seconds", lines)


_Key = tuple[str, str, str, float]


def _groups(rows: list[Row], stage: str) -> Iterator[tuple[_Key, list[Row]]]:
    """Rows of a stage that differ in their seed only, dataset by dataset and method by method."""
    groups: dict[_Key, list[Row]] = {}
    for row in rows:
        if row["stage"] == stage:
            groups.setdefault((row["dataset"], row["method"], row["variant"], row["rate"]), []).append(row)
    datasets = list(dict.fromkeys(key[0] for key in groups))
    for key in sorted(groups, key=lambda key: (datasets.index(key[0]), METHODS.index(key[1]), *key[2:])):
        yield key, groups[key]


def _named(key: _Key) -> list[str]:
    dataset, method, variant, rate = key
    return [dataset, f"{method}, {variant}" if variant else method, "" if method == "head" else f"{rate:g}"]


def _seconds_to(row: Row, loss: float) -> float | None:
    """Processor seconds until the held-out loss was as low as that; `None` if it never was."""
    at = [seconds for _, _, held_out, seconds in row["curve"] if held_out <= loss]
    used: float = row["cpu_seconds"]
    return used * min(at) / row["curve"][-1][-1] if at else None


def _mean(rows: Sequence[Row], name: str, form: str) -> str:
    values = [row[name] for row in rows]
    low, mean, high = (form.format(value) for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def _table(heads: str, lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"| | {heads} |\n{'|---' * len(lines[0])}|\n{body}"


if __name__ == "__main__":
    print(tables(rows_of(Path(sys.argv[1]) if len(sys.argv) > 1 else ROWS)))
