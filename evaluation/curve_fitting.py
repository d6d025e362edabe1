"""The numbers behind `curves`: the three forms, and the search for the nearest curve of one.

Thousands of fits run at once, as arrays, so that a bootstrap is cheap. For given exponent c and knee n_c the two ends
of a curve solve a linear problem in a box, exactly (variable projection, Golub and Pereyra 1973); c and n_c are
searched on a grid, and from the best point of each quarter of it by Levenberg and Marquardt's method.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

Form = Literal["bounded power", "power", "logistic"]
# n_c lies between a tenth of the smallest size and ten times the largest.
KNEE_BEYOND = 10
# Starting points of a fit: the best grid point in each of so many bands of exponents.
STARTS = 4
ROUNDS = 60
# Fits per step, to bound memory.
CHUNK = 256


def shapes_of(
    form: Form,
    sizes: Float[np.ndarray, " sizes"],
    exponents: Float[np.ndarray, " curves"],
    knees: Float[np.ndarray, " curves"],
) -> Float[np.ndarray, "curves sizes"]:
    """What b is multiplied with: falls to 0 as n grows."""
    c, n_c = exponents[:, None], knees[:, None]
    shapes: Float[np.ndarray, "curves sizes"]
    if form == "power":
        shapes = sizes**-c
    elif form == "bounded power":
        shapes = (1 + sizes / n_c) ** -c
    else:
        shapes = 1 / (1 + (sizes / n_c) ** c)
    return shapes


def values_of(
    form: Form, parameters: Float[np.ndarray, "curves 4"], sizes: Float[np.ndarray, " sizes"]
) -> Float[np.ndarray, "curves sizes"]:
    """The gap that each curve (a row: floor, scale, exponent, knee) gives at each size."""
    floors, scales, exponents, knees = parameters.T
    values: Float[np.ndarray, "curves sizes"]
    values = floors[:, None] + scales[:, None] * shapes_of(form, sizes, exponents, knees)
    return values


def slopes_of(form: Form, parameters: Float[np.ndarray, "curves 4"], n: float) -> Float[np.ndarray, " curves"]:
    """d log gap / d log n of each curve at n; 0 where it is flat."""
    floors, scales, exponents, knees = parameters.T
    shapes = shapes_of(form, np.array([n]), exponents, knees)[:, 0]
    # d log shape / d log n is -c times this.
    part = {"power": np.ones_like(shapes), "bounded power": n / (n + knees), "logistic": 1 - shapes}[form]
    changes = -scales * exponents * shapes * part
    slopes = np.zeros_like(shapes)
    with np.errstate(divide="ignore"):
        np.divide(changes, floors + scales * shapes, out=slopes, where=changes != 0)
    return slopes


def sizes_within(
    form: Form, parameters: Float[np.ndarray, "curves 4"], epsilon: float, least: float
) -> Float[np.ndarray, " curves"]:
    """The smallest n >= `least` at which each curve is at most epsilon; infinite where there is none."""
    floors, scales, exponents, knees = parameters.T
    first = values_of(form, parameters, np.array([least]))[:, 0]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        shapes = (epsilon - floors) / scales
        if form == "power":
            sizes = shapes ** (-1 / exponents)
        elif form == "bounded power":
            sizes = knees * (shapes ** (-1 / exponents) - 1)
        else:
            sizes = knees * (1 / shapes - 1) ** (1 / exponents)
    sizes = np.where((scales > 0) & (floors < epsilon), np.maximum(sizes, least), np.inf)
    found: Float[np.ndarray, " curves"] = np.where(first <= epsilon, least, sizes)
    return found


def fitted_parameters(
    form: Form,
    sizes: Float[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, "curves sizes"],
    errors: Float[np.ndarray, " sizes"],
    exponents: tuple[float, float],
) -> tuple[Float[np.ndarray, "curves 4"], Float[np.ndarray, " curves"]]:
    """Parameters and chi2 of the best curve for each row of gaps."""
    ranges = [exponents] if form == "power" else [exponents, (sizes[0] / KNEE_BEYOND, sizes[-1] * KNEE_BEYOND)]
    bounds = np.log(np.array(ranges))
    found, chi2s = [], []
    for start in range(0, len(gaps), CHUNK):
        chunk = gaps[start : start + CHUNK]
        logs = _starts(form, sizes, chunk, errors, bounds)
        logs = _polished(form, sizes, np.repeat(chunk, STARTS, axis=0), errors, logs, bounds)
        residuals, firsts, floors = _projected(form, sizes, np.repeat(chunk, STARTS, axis=0), errors, logs)
        chi2 = (residuals**2).sum(axis=1)
        # Of starts that lead to equally good curves the first counts.
        best = np.maximum(chi2.reshape(-1, STARTS), 1e-14).argmin(axis=1) + STARTS * np.arange(len(chunk))
        exponent = np.exp(logs[best, 0])
        knee = np.ones_like(exponent) if form == "power" else np.exp(logs[best, 1])
        scale = (firsts - floors)[best] / shapes_of(form, sizes[:1], exponent, knee)[:, 0]
        found.append(np.stack([floors[best], scale, exponent, knee], axis=1))
        chi2s.append(chi2[best])
    return np.concatenate(found), np.concatenate(chi2s)


def _starts(
    form: Form,
    sizes: Float[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, "curves sizes"],
    errors: Float[np.ndarray, " sizes"],
    bounds: Float[np.ndarray, "shape_parameters 2"],
) -> Float[np.ndarray, "starts shape_parameters"]:
    # For each row of gaps the best points of a grid of log c (and log n_c), one in each band of exponents.
    steps = 40 if form == "power" else 20
    axes = [np.linspace(low, high, steps) for low, high in bounds]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(bounds))
    falls = _falls(form, sizes, grid) / errors
    rises = 1 / errors - falls
    scaled = gaps / errors
    products = (falls * falls).sum(axis=1), (falls * rises).sum(axis=1), (rises * rises).sum(axis=1)
    _, _, excess = _best_ends(*products, scaled @ falls.T, scaled @ rises.T)
    # Differences that are rounding errors are none: of equally good points the first counts.
    chi2 = np.maximum((scaled**2).sum(axis=1, keepdims=True) + excess, 1e-9)
    bands = np.array_split(np.arange(len(grid)), STARTS)
    best = np.stack([band[chi2[:, band].argmin(axis=1)] for band in bands], axis=1)
    starts: Float[np.ndarray, "starts shape_parameters"] = grid[best.ravel()]
    return starts


def _polished(
    form: Form,
    sizes: Float[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, "curves sizes"],
    errors: Float[np.ndarray, " sizes"],
    logs: Float[np.ndarray, "curves shape_parameters"],
    bounds: Float[np.ndarray, "shape_parameters 2"],
) -> Float[np.ndarray, "curves shape_parameters"]:
    # Levenberg and Marquardt's method within bounds, for all rows at once; derivatives by differences.
    low, high, unit = bounds[:, 0], bounds[:, 1], np.eye(len(bounds))
    residuals, _, _ = _projected(form, sizes, gaps, errors, logs)
    damping, active = np.full(len(logs), 1e-3), np.arange(len(logs))
    for _ in range(ROUNDS):
        here, before, wanted = logs[active], residuals[active], gaps[active]
        near = np.concatenate([here + 1e-6 * one for one in unit])
        moved, _, _ = _projected(form, sizes, np.tile(wanted, (len(unit), 1)), errors, near)
        slopes = np.moveaxis((moved.reshape(-1, *wanted.shape) - before) / 1e-6, 0, -1)
        gradient = np.einsum("csp,cs->cp", slopes, before)
        # A parameter that would leave its bounds stays, and the others take their best step without it.
        stays = ((here <= low) & (gradient > 0)) | ((here >= high) & (gradient < 0))
        slopes = np.where(stays[:, None, :], 0.0, slopes)
        normal = np.einsum("csp,csq->cpq", slopes, slopes)
        normal = normal * (1 + damping[active, None, None] * unit) + 1e-12 * unit
        steps = np.linalg.solve(normal, np.where(stays, 0.0, -gradient)[..., None])[..., 0]
        tried = np.clip(here + np.clip(steps, -1.0, 1.0), low, high)
        after, _, _ = _projected(form, sizes, wanted, errors, tried)
        chi2 = (before**2).sum(axis=1)
        gain = chi2 - (after**2).sum(axis=1)
        better = gain > 0
        logs[active[better]], residuals[active[better]] = tried[better], after[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.25, 4.0), 1e-9, 1e9)
        settled = better & (gain < 1e-7 * chi2 + 1e-13)
        active = active[~settled & (np.abs(tried - here).max(axis=1) > 1e-7)]
        if len(active) == 0:
            break
    return logs


def _projected(
    form: Form,
    sizes: Float[np.ndarray, " sizes"],
    gaps: Float[np.ndarray, "curves sizes"],
    errors: Float[np.ndarray, " sizes"],
    logs: Float[np.ndarray, "curves shape_parameters"],
) -> tuple[Float[np.ndarray, "curves sizes"], Float[np.ndarray, " curves"], Float[np.ndarray, " curves"]]:
    # Residuals over errors, first value and floor of the best curve with these log c (and log n_c).
    falls = _falls(form, sizes, logs) / errors
    rises, scaled = 1 / errors - falls, gaps / errors
    pairs = ((falls, falls), (falls, rises), (rises, rises), (falls, scaled), (rises, scaled))
    firsts, floors, _ = _best_ends(*((a * b).sum(axis=1) for a, b in pairs))
    return scaled - firsts[:, None] * falls - floors[:, None] * rises, firsts, floors


def _falls(
    form: Form, sizes: Float[np.ndarray, " sizes"], logs: Float[np.ndarray, "curves shape_parameters"]
) -> Float[np.ndarray, "curves sizes"]:
    # The part of the way from the first value to the floor that is left: 1 at the smallest size.
    shapes = shapes_of(form, sizes, np.exp(logs[:, 0]), np.exp(logs[:, -1]))
    falls: Float[np.ndarray, "curves sizes"] = shapes / shapes[:, :1]
    return falls


def _best_ends(
    uu: Float[np.ndarray, "*#many"],
    uv: Float[np.ndarray, "*#many"],
    vv: Float[np.ndarray, "*#many"],
    u: Float[np.ndarray, "*#many"],
    v: Float[np.ndarray, "*#many"],
) -> tuple[Float[np.ndarray, "*many"], Float[np.ndarray, "*many"], Float[np.ndarray, "*many"]]:
    # First value and floor in [0, 1] with the least uu first^2 + 2 uv first floor + vv floor^2 - 2 u first - 2 v floor,
    # and that least value: chi2 but for a constant.
    determinant = uu * vv - uv**2
    with np.errstate(divide="ignore", invalid="ignore"):  # sizes that hardly differ, to the last digit
        first, floor = (vv * u - uv * v) / determinant, (uu * v - uv * u) / determinant
    inside = (first >= 0) & (first <= 1) & (floor >= 0) & (floor <= 1)
    # A convex function: if its least value is outside of the square, the least one inside is on an edge.
    zero, one = np.zeros_like(first), np.ones_like(first)
    edges = [
        (np.clip(u / uu, 0.0, 1.0) + zero, zero),
        (np.clip((u - uv) / uu, 0.0, 1.0) + zero, one),
        (zero, np.clip(v / vv, 0.0, 1.0) + zero),
        (one, np.clip((v - uv) / vv, 0.0, 1.0) + zero),
    ]
    firsts, floors = (np.stack(ends) for ends in zip((first, floor), *edges, strict=True))
    values = firsts * (uu * firsts + 2 * uv * floors - 2 * u) + floors * (vv * floors - 2 * v)
    best = np.where(inside, 0, 1 + values[1:].argmin(axis=0))[None]
    first, floor, least = (np.take_along_axis(each, best, axis=0)[0] for each in (firsts, floors, values))
    return first, floor, least
