"""The benchmark of references: its floors and its tables, on rows made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import references
from benchmarks.parts.reference_tables import tables


def row(method: str, seed: int, **more: object) -> dict[str, object]:
    """A training that takes 10 s of the clock, and twice as many of the processor, to each of three looks."""
    key = ["main", "subj", method, "", 0.01, seed, 100, 2]
    names = ("stage", "dataset", "method", "variant", "rate", "seed", "rows", "epochs")
    found = {
        "key": key, "held_out_loss": 0.2, "accuracy": 0.9, "nll": 0.25, "trained_parameters": 1_345_150,
        "cpu_seconds": 60.0, "peak_mib": 1000.0, "artefact_mb": 2.0, "machine": "Here, 2 cores", "commit": f"c{seed}",
        "curve": [[1, 9.0, 0.6, 10.0], [2, 5.0, 0.3, 20.0], [3, 1.0, 0.2, 30.0]],
    }  # fmt: skip
    return dict(zip(names, key, strict=True)) | found | more


def line(table: str, *begin: str) -> list[str]:
    [found] = [text.split(" | ") for text in table.splitlines() if text.startswith("| " + " | ".join(begin))]
    return [cell.strip("| ") for cell in found]


def test_floors_are_the_distance_between_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(references, "ANSWERS", tmp_path)
    rows = [row("rsr", seed) for seed in (0, 1, 2)]
    references.keep(references.ROWS, *rows, row("lora", 0))
    for seed, law in ((0, [0.9, 0.1]), (2, [0.5, 0.2])):  # the answers of seed 1 lie on another machine
        np.save(references.answers(json.loads(json.dumps(rows[seed]["key"]))), np.tile(law, (50, 1)))
    [floor] = references.floors("rsr", "subj")
    assert (floor["seed"], floor["tv"], floor["commits"]) == ([0, 2], pytest.approx(0.4), ["c0", "c2"])
    assert floor["interval"][0] <= 0.4 <= floor["interval"][1]
    references.keep(references.ROWS, floor)
    assert list(references.floors("rsr", "subj")) == list(references.floors("lora", "subj")) == []
    shown = line(tables(references.rows_of(references.ROWS)), "subj", "rsr", "0.01")
    assert shown[3:] == ["3", "0.20", "0.900", "0.25", "0.40", "1.00%", "60", "1,000", "2.0"]


def test_time_to_the_same_loss(tmp_path: Path) -> None:
    quick = row("rsr", 0, cpu_seconds=12.0, held_out_loss=0.3, curve=[[1, 1.0, 0.3, 4.0], [2, 0.1, 0.31, 8.0]])
    stuck = row("full", 0, held_out_loss=0.4, curve=[[1, 1.0, 0.4, 10.0]])
    elsewhere = row("shira", 0, machine="There, 2 cores")
    table = tables([quick, row("lora", 0), stuck, elsewhere])
    assert line(table, "subj", "lora, 0.01")[-1] == "0: 0.15"  # 6 of 40 seconds of the processor
    assert line(table, "subj", "full, 0.01")[-1] == "0: never there"
    assert "shira, 0.01" not in table
    assert line(table, "subj", "shira", "0.01")[9] == "60 (There)"


def test_ablations_are_paired_by_row() -> None:
    def ablated(variant: str, seed: int, losses: list[float]) -> dict[str, object]:
        return {"stage": "ablation", "dataset": "subj", "variant": variant, "seed": seed, "test_losses": losses}

    rows = [
        ablated("every part", 0, [1.0, 2.0, 3.0]), ablated("fixed rate", 0, [1.2, 2.1, 3.3]),
        ablated("every part", 1, [1.0, 2.0, 3.0]), ablated("fixed rate", 1, [1.0, 2.3, 2.9]),
        ablated("no trails", 2, [9.0, 9.0, 9.0]),
    ]  # fmt: skip
    table = tables(rows)
    # 0.1, 0.2 and 0.1 after the mean over seeds; Student's t of two degrees of freedom is 4.303.
    assert line(table, "subj", "fixed rate")[2:] == ["+0.13 [-0.01, +0.28]", "+0.20, +0.07"]
    assert "no trails" not in table  # nothing to compare with
