"""Rows of `benchmarks.known_truths` to panels: curves with bounds beside them, tables, and one sentence for each curve.

- A panel is one size that grows (n, V, l, m or d) with all others fixed, and the curves along it, seed by seed. Only
  seeds that have all sizes of a curve count.
- Intervals are Student's over seeds, 95 % each, not corrected for how many there are. A slope is that of the
  logarithms, each size weighing the same (`evaluation.curves.slope`); a floor is that of a fitted curve.
- The provable bounds are those of `evaluation.bounds`. The orders S1 to S4 of arXiv 2506.08060 have an unknown
  constant: they are scaled to go through the first point of the panel's first prompt, and only their slopes are judged.
- Sentences are made from the numbers alone: what an interval does not settle is said to be open.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from evaluation import bounds
from evaluation.curve_points import Points
from evaluation.curves import Estimate, fitted_curve, slope

LEVEL = 0.95
DELTA = 0.05
# An order is judged along the sizes that it names.
NAMED = {"S1": "nVm", "S2": "nVl", "S3": "nd", "S4": "n"}
ROUNDING = 0.01  # in bfloat16 smaller differences mean nothing
WORDS_ONLY = ", words only"
PROMPTS = ("own", "all", "random", "nearest")
YARDSTICKS = ("counting", "logistic regression")
Row = Mapping[str, Any]


class Line(NamedTuple):
    """One curve: what was measured at each size, seed by seed, in [0, 1]."""

    sizes: tuple[int, ...]
    gaps: Float[np.ndarray, "seeds sizes"]

    def mean(self) -> Float[np.ndarray, " sizes"]:
        """The mean over seeds."""
        means: Float[np.ndarray, " sizes"] = self.gaps.mean(axis=0)
        return means

    def radius(self) -> Float[np.ndarray, " sizes"]:
        """Half of the interval's width; not a number with one seed."""
        return _radius(self.gaps)


@dataclass(frozen=True)
class Panel:
    """What grows, what is fixed, and the curves.

    Attributes:
        axis: what grows: n, V, l, m or d.
        value: what the curves show.
        provable: edges of the band for learners without a prior, or other bounds with constants, at each size.
        orders: what an order says at each size, the constant unknown.
    """

    title: str
    axis: str
    value: str
    lines: dict[str, Line]
    provable: dict[str, dict[int, float]] = field(default_factory=dict)
    orders: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """All sizes of any curve."""
        return sorted({size for line in self.lines.values() for size in line.sizes})

    def scaled(self, order: str) -> dict[int, float]:
        """An order with the constant that leads it through the first point of the first prompt."""
        line = next((self.lines[name] for name in PROMPTS if name in self.lines), None)
        if line is None:
            return {}
        at = self.orders[order]
        constant = float(line.mean()[0]) / at[line.sizes[0]]
        return {size: constant * value for size, value in at.items()}


def panels(rows: Sequence[Row]) -> list[Panel]:
    """All panels for which there are rows."""
    found = []
    for stage in ("categorical", "sequences", "reference"):
        here = [row for row in rows if row["stage"] == stage]
        for title, axis, fixed, worst in _text_panels(stage):
            chosen = [row for row in here if all(row[name] == value for name, value in fixed.items())]
            key = {"m": "contexts", "V": "vocabulary", "l": "length", "n": "n"}[axis]
            lines = _lines(chosen, key, "gaps", max if worst else _mean)
            if lines:
                found.append(_text_panel(f"{stage}: {title}", axis, key, lines, chosen, worst=worst))
    linear = [row for row in rows if row["stage"] == "linear"]
    for dimension, noise in sorted({(row["dimension"], row["noise"]) for row in linear}):
        chosen = [row for row in linear if (row["dimension"], row["noise"]) == (dimension, noise)]
        wrong = f", {noise:.0%} of the labels wrong" if noise else ", no label wrong"
        found.append(_linear_panel(f"linear: d = {dimension}{wrong}", "n", "n", chosen))
    for n in (16, 128):
        if chosen := [row for row in linear if row["n"] == n and not row["noise"]]:
            found.append(_linear_panel(f"linear: n = {n}, no label wrong", "d", "dimension", chosen))
    return [panel for panel in found if panel.lines]


def _named(orders: dict[str, dict[int, float]], axis: str) -> dict[str, dict[int, float]]:
    return {name: values for name, values in orders.items() if axis in NAMED[name]}


def _text_panels(stage: str) -> Iterator[tuple[str, str, dict[str, int], bool]]:
    """Title, what grows, what is fixed, and whether the worst context counts or the mean of all."""
    if stage == "categorical":
        m, v, n = {"contexts": 8}, {"vocabulary": 4}, {"n": 32}
        yield "m = 8 contexts, V = 4 words", "n", m | v, False
        yield "m = 8 contexts, n = 32 samples of each", "V", m | n, False
        yield "V = 4 words, n = 32 samples of each context", "m", v | n, False
        yield "V = 4 words, n = 32 samples of each context, the worst context", "m", v | n, True
    elif stage == "reference":
        yield "m = 8 contexts, V = 4 words, and a fine-tuned model", "n", {}, False
    else:
        for words in (2, 4):
            for length in (1, 2, 3):
                fixed = {"vocabulary": words, "length": length}
                yield f"V = {words}, l = {length}, m = 4 contexts", "n", fixed, False
            yield f"V = {words}, m = 4 contexts, n = 64 samples of each", "l", {"vocabulary": words, "n": 64}, False


def _text_panel(title: str, axis: str, key: str, lines: dict[str, Line], rows: Sequence[Row], *, worst: bool) -> Panel:
    provable: dict[str, dict[int, float]] = {}
    orders: dict[str, dict[int, float]] = {}
    for row in {row[key]: row for row in rows}.values():
        size, m, v, n = row[key], row["contexts"], row["vocabulary"], row["n"]
        outcomes, part = v ** row["length"], DELTA
        if worst:
            say = {"all contexts within, 95 %": bounds.eps_tv(n, outcomes, delta=part / m)}
        else:
            say = {
                "band, low": bounds.assouad_lower(m * n, outcomes, contexts=m),
                "band, high": bounds.mean_tv(m * n, outcomes, contexts=m),
                "Laplace, high": bounds.laplace_tv(n, outcomes),
            }
        for name, value in say.items():
            provable.setdefault(name, {})[size] = value
        # All four orders but S3 go as 1 / eps^2; S1 counts the samples of all contexts, S2 those of one.
        orders.setdefault("S1", {})[size] = math.sqrt(bounds.sharma_s1(m, v, epsilon=0.5, delta=part) / (m * n)) / 2
        orders.setdefault("S2", {})[size] = (
            math.sqrt(bounds.sharma_s2(row["length"], v, epsilon=0.5, delta=part) / n) / 2
        )
    return Panel(title, axis, "TV to the truth", lines, provable, _named(orders, axis))


def _linear_panel(title: str, axis: str, key: str, rows: Sequence[Row]) -> Panel:
    lines = _lines(rows, key, "errors", float)
    lines |= {f"{name}, TV": line for name, line in _lines(rows, key, "gaps", float).items()}
    provable: dict[str, dict[int, float]] = {}
    orders: dict[str, dict[int, float]] = {}
    for size, row in {row[key]: row for row in rows}.items():
        d, n = row["dimension"], row["n"]
        if not row["noise"]:
            # Inverses of `bounds.n_loo`, `n_svm` and `n_ehkv`; d is the VC dimension of planes through the origin.
            high = 2 / (n - 2 * d) * (d * math.log(4) - math.log(DELTA)) if n > 2 * d else 1.0
            provable.setdefault("max margin, mean", {})[size] = min(1.0, d / (n + 1))
            provable.setdefault("max margin, 95 %", {})[size] = min(1.0, high)
            provable.setdefault("no learner always below", {})[size] = min(1 / 8, (d - 1) / (32 * n))
        orders.setdefault("S3", {})[size] = bounds.sharma_s3(d, epsilon=0.5) / n / 2
        orders.setdefault("S4", {})[size] = math.sqrt(bounds.sharma_s4(epsilon=0.5, delta=DELTA) / n) / 2
    return Panel(title, axis, "error", lines, provable, _named(orders, axis))


def _lines(rows: Sequence[Row], key: str, part: str, of: Callable[[Any], float]) -> dict[str, Line]:
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        for name, values in row[part].items():
            found.setdefault(name, {}).setdefault(row["seed"], {})[row[key]] = of(values)
    lines = {}
    for name, by_seed in found.items():
        sizes = sorted({size for values in by_seed.values() for size in values})
        whole = [[values[size] for size in sizes] for values in by_seed.values() if len(values) == len(sizes)]
        if whole:
            lines[name] = Line(tuple(sizes), np.array(whole))
    return lines


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def slope_of(line: Line) -> Estimate | None:
    """d log gap / d log size; `None` with one seed or size, or where a mean is 0."""
    means = line.mean()
    if len(line.gaps) < 2 or len(line.sizes) < 2 or not (means > 0).all():
        return None
    # Errors in proportion to the gaps: every size weighs the same in the logarithm.
    return slope(Points(np.array(line.sizes), means, 0.1 * means, line.gaps), level=LEVEL)


def order_slope(order: Mapping[int, float], sizes: Sequence[int]) -> float:
    """The slope that an order has over these sizes."""
    values = np.array([order[size] for size in sizes])
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def sentence(panel: Panel, name: str) -> str:
    """What the numbers say of one prompt's curve, and what they leave open."""
    line, axis = panel.lines[name], panel.axis
    found = slope_of(line)
    span = f"{axis} = {line.sizes[0]:,} to {line.sizes[-1]:,}"
    what = "error" if panel.value == "error" else "gap"
    if found is None:
        few = "it is 0 somewhere" if not (line.mean() > 0).all() else "there is one seed or one size only"
        return f'"{name}": no slope of the {what} over {span}, since {few}.'
    low, high = found.interval
    power = f"{axis}^{found.value:.2f} [{low:.2f}, {high:.2f}]"
    way = "falls" if high < 0 else "rises" if low > 0 else None
    parts = [f"the {what} {way} as {power} over {span}" if way else f"no fall or rise over {span} is shown ({power})"]
    judged: dict[str, list[str]] = {}
    for order, values in panel.orders.items():
        expected = order_slope(values, line.sizes)
        place = "inside" if low <= expected <= high else "outside"
        judged.setdefault(f"{axis}^{expected:.2f}, {place} that interval", []).append(order)
    parts += [f"the order of {' and '.join(names)} is {verdict}" for verdict, names in judged.items()]
    if axis == "n":
        parts += [_beside_bound(panel, line), _beside_yardstick(panel, line), _beside_zero(panel, name), _floor(line)]
    said = "; ".join(part for part in parts if part)
    return f'"{name}": {said}.'


def _beside_bound(panel: Panel, line: Line) -> str:
    size, at, radius = line.sizes[-1], line.mean()[-1], line.radius()[-1]
    here = f"at n = {size:,} it is {at:.3f} [{max(0, at - radius):.3f}, {min(1, at + radius):.3f}]"
    if "band, high" in panel.provable:
        low, high = panel.provable["band, low"][size], panel.provable["band, high"][size]
        place = "above" if at - radius > high else "below" if at + radius < low else "within, or not told apart from,"
        return f"{here}, {place} the provable band of learners without a prior [{low:.3f}, {high:.3f}]"
    if "max margin, mean" in panel.provable:
        high = panel.provable["max margin, mean"][size]
        place = "above" if at - radius > high else "below" if at + radius < high else "not told apart from"
        return f"{here}, {place} {high:.3f}, which the max-margin rule keeps in expectation"
    return here


def _beside_yardstick(panel: Panel, line: Line) -> str:
    name = next((known for known in YARDSTICKS if known in panel.lines), "")
    places = _places(line, panel.lines[name]) if name else {}
    said = [f"{words} {_listed(sizes)}" for words, sizes in places.items() if sizes]
    return f"beside {name} on the same samples it is {', '.join(said)}" if said else ""


def _beside_zero(panel: Panel, name: str) -> str:
    zero = panel.lines.get(f"zero{WORDS_ONLY}" if name.endswith(WORDS_ONLY) else "zero")
    if zero is None:
        return ""
    helping = _places(panel.lines[name], zero)["better at"]
    start = f"the shots are shown to help at {_listed(helping)}" if helping else "no help of the shots is shown"
    return f"without shots it is {zero.mean().mean():.3f}, {start}"


def _places(line: Line, other: Line) -> dict[str, list[int]]:
    """The sizes at which one curve is better or worse than the other, paired by seed, or cannot be told apart."""
    shared = [size for size in line.sizes if size in other.sizes]
    found: dict[str, list[int]] = {"better at": [], "worse at": [], "not told apart at": []}
    if len(line.gaps) == len(other.gaps):
        of, to = (each.gaps[:, [each.sizes.index(size) for size in shared]] for each in (line, other))
        mean, radius = (of - to).mean(axis=0), _radius(of - to)
        for size, at, within in zip(shared, mean, radius, strict=True):
            found["better at" if at + within < 0 else "worse at" if at - within > 0 else "not told apart at"].append(
                size
            )
    return found


def _listed(sizes: Sequence[int]) -> str:
    return "n = " + ", ".join(f"{size:,}" for size in sizes)


def _floor(line: Line) -> str:
    if len(line.sizes) < 4:
        return "too few sizes to tell a floor"
    errors = np.maximum(line.radius() / stdtrit(len(line.gaps) - 1, 0.5 + LEVEL / 2), 1e-3)
    points = Points(np.array(line.sizes), line.mean(), errors, line.gaps)
    curve = fitted_curve(points, rng=np.random.default_rng(0), level=LEVEL)
    if curve.floor_is_unidentified:
        return "whether it levels off above 0 is open"
    low, high = curve.interval("floor")
    if low < ROUNDING:
        return f"no floor above {ROUNDING} is shown"
    return f"a fitted {curve.fit.curve.form} curve levels off at {curve.fit.curve.floor:.3f} [{low:.3f}, {high:.3f}]"


def _radius(values: Float[np.ndarray, "seeds sizes"]) -> Float[np.ndarray, " sizes"]:
    seeds = len(values)
    if seeds < 2:
        return np.full(values.shape[1], np.nan)
    radii: Float[np.ndarray, " sizes"]
    radii = values.std(axis=0, ddof=1) / math.sqrt(seeds) * float(stdtrit(seeds - 1, 0.5 + LEVEL / 2))
    return radii


def told(shown: Sequence[Panel]) -> str:
    """Tables and sentences in Markdown."""
    parts = []
    for panel in shown:
        seeds = sorted({len(line.gaps) for line in panel.lines.values()})
        counts = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
        parts += [f"### {panel.title}", "", f"{panel.value[0].upper()}{panel.value[1:]}, {counts}.", ""]
        parts += [*_table(panel), ""]
        spoken = [name for name in panel.lines if name.removesuffix(WORDS_ONLY) in PROMPTS]
        parts += [f"- {sentence(panel, name)}" for name in spoken] + [""]
    return "\n".join(parts)


def _table(panel: Panel) -> list[str]:
    columns = [panel.axis, *panel.lines, *panel.provable, *(f"{order}, scaled" for order in panel.orders)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    scaled = [panel.scaled(order) for order in panel.orders]
    for size in panel.sizes:
        cells = [f"{size:,}"] + [_cell(line, size) for line in panel.lines.values()]
        cells += [_number(values.get(size)) for values in (*panel.provable.values(), *scaled)]
        lines.append("| " + " | ".join(cells) + " |")
    slopes = []
    for line in panel.lines.values():
        found = slope_of(line)
        slopes.append(
            "" if found is None else f"{found.value:.2f} [{found.interval.low:.2f}, {found.interval.high:.2f}]"
        )
    expected = [
        f"{order_slope(values, panel.sizes):.2f}" if len(panel.sizes) > 1 else "" for values in panel.orders.values()
    ]
    lines.append("| " + " | ".join(["slope", *slopes, *[""] * len(panel.provable), *expected]) + " |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value <= 1 else "above 1"


def _cell(line: Line, size: int) -> str:
    if size not in line.sizes:
        return ""
    place = line.sizes.index(size)
    radius = line.radius()[place]
    return f"{line.mean()[place]:.3f}" + ("" if math.isnan(radius) else f" ± {radius:.3f}")
