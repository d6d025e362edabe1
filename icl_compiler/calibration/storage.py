"""A calibration as plain numbers and arrays, for the folder of its program, and back with everything checked."""

from typing import Any

import numpy as np

from icl_compiler.calibration.law import Anchors, Calibration, Measured
from icl_compiler.calibration.votes import Vote
from icl_compiler.registry import CALIBRATIONS, did_you_mean


def numbers_of(calibration: Calibration) -> dict[str, Any]:
    """What fits into a manifest.

    >>> numbers_of(Calibration("temperature", scale=0.5))["scale"]
    0.5
    """
    return {
        "method": calibration.method,
        "scale": calibration.scale,
        "vote": None if calibration.vote is None else calibration.vote._asdict(),
        "pooling": calibration.pooling,
        "weight": calibration.weight,
        "other": calibration.other,
        "measured": None if calibration.measured is None else calibration.measured._asdict(),
    }


def arrays_of(calibration: Calibration) -> dict[str, np.ndarray]:
    """What does not."""
    found = {} if calibration.offsets is None else {"offsets": calibration.offsets}
    if calibration.anchors is not None:
        found |= {"anchor_rows": calibration.anchors.rows, "anchor_logprobs": calibration.anchors.logprobs}
    return found


def calibration_from(numbers: dict[str, Any], arrays: dict[str, np.ndarray], *, rows: int, labels: int) -> Calibration:
    """The calibration that these are of, for a pool of so many rows.

    Raises:
        ValueError, KeyError, TypeError: if they are of none.
    """
    if numbers["method"] not in CALIBRATIONS:
        raise ValueError(f"unknown calibration {numbers['method']!r}. {did_you_mean(numbers['method'], CALIBRATIONS)}")
    if numbers["method"] == "none":
        return Calibration()
    vote = None if numbers["vote"] is None else Vote(**numbers["vote"])
    measured = None if numbers["measured"] is None else Measured(**numbers["measured"])
    anchors = None
    if "anchor_rows" in arrays:
        anchors = Anchors(arrays["anchor_rows"].astype(np.int64), arrays["anchor_logprobs"].astype(np.float64))
    offsets = arrays["offsets"].astype(np.float64) if "offsets" in arrays else None
    scale, weight = float(numbers["scale"]), float(numbers["weight"])
    other = None if numbers.get("other") is None else float(numbers["other"])  # programs before format 4 have none
    sound = (
        np.isfinite([scale, weight, other or 0.0, *(vote or ())]).all()
        and min(scale, weight) >= 0
        and numbers["pooling"] in ("linear", "log")
        and (numbers["pooling"] == "log" or weight <= 1)
        and (vote is not None or (not weight and anchors is None))
        and (vote is None or (isinstance(vote.k, int) and vote.k > 0 and 0 <= vote.smoothing <= 1))
        and (offsets is None or (offsets.shape == (labels,) and np.isfinite(offsets).all()))
        and (anchors is None or _sound(anchors, rows, labels))
    )
    if not sound:
        raise ValueError("the numbers of the calibration make no sense")
    return Calibration(numbers["method"], scale, offsets, vote, numbers["pooling"], weight, anchors, measured, other)


def _sound(anchors: Anchors, rows: int, labels: int) -> bool:
    inside = ((anchors.rows >= 0) & (anchors.rows < rows)).all()
    return anchors.logprobs.shape == (len(anchors.rows), labels) and bool(inside)
