"""The search of -O2: a race of retrievers, one of numbers of shots, one of orders and templates, and a final.

- One thing at a time, each time around the best so far. All combinations would be hundreds; which retriever is best
  hardly depends on the order of the shots. The two best retrievers go into the race of numbers, as the best number is
  one that depends on it.
- All races ask the same held-out queries in the same order: what one paid for is free in the next.
- The final is between the winner and the settings that -O1 would have taken, for what is left of the budget, so that
  luck in an early race does not decide.
- The trace tells of every variant in every race what it was, what it cost, and why it left.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from icl_compiler.errors import ICLError
from icl_compiler.optimise.judges import Judge
from icl_compiler.optimise.racing import LEAST, Race, is_worse, race
from icl_compiler.optimise.variants import Variant, Variants
from icl_compiler.selection import Order

SHARES = {"retriever": 0.35, "shots": 0.5, "order, labels and template": 0.6, "final": 1.0}
"""The races, and which part of the queries that are left each may use."""
LEVEL = 0.05
"""Of the paired test that a challenger has to pass."""


class Space(NamedTuple):
    """What is tried: of each setting these values, one at least."""

    retrievers: Sequence[str]
    shots: Sequence[int]
    orders: Sequence[Order]
    per_label: Sequence[int]
    templates: Sequence[str]


class Found(NamedTuple):
    """The winner, and a row for each variant in each race."""

    variant: Variant
    trace: list[dict[str, Any]]


def search(variants: Variants, judge: Judge, space: Space, *, budget: int) -> Found:
    """The best of the variants in `space`, the base among them, for at most `budget` model calls."""
    races = Races(variants, judge, budget)
    return Found(races.level_2(space), races.trace)


class Races:
    """Races of variants, all for one budget.

    Attributes:
        left: model calls that may still be paid for.
        trace: a row for each variant in each race, and what else was done.
    """

    def __init__(self, variants: Variants, judge: Judge, budget: int) -> None:
        self.variants = variants
        self.judge = judge
        self.left = budget
        self.trace: list[dict[str, Any]] = []
        self._paid: dict[Variant, int] = {}

    def level_2(self, space: Space) -> Variant:
        """The races of the module's first lines."""
        base = self.variants.own
        best = self._race("retriever", [base, *(base.found_by(name) for name in space.retrievers)])
        near = sorted(space.shots, key=lambda shots: (abs(shots - base.shots), shots))
        best = self._race("shots", [v._replace(shots=shots) for v in best[:2] for shots in [v.shots, *near]])
        now = best[0]
        orders = [now._replace(order=order) for order in space.orders] if now.shots > 1 else []
        balanced = [now._replace(per_label=count) for count in space.per_label]
        templates = [now._replace(template=template) for template in space.templates]
        best = self._race("order, labels and template", [now, *orders, *balanced, *templates])
        return self._race("final", [base, best[0]])[0]

    def challenge(self, name: str, holder: Variant, challenger: Variant) -> Variant:
        """The challenger, if it is better by a paired test on all queries that can be paid for, else the holder."""
        [winner, *others] = self.race(name, [holder, challenger], share=1.0)
        if winner == holder or not others:
            return holder
        asked = min(self._paid[variant] for variant in (holder, challenger))
        losses = [self.judge.losses(v, self.variants.program(v), asked) for v in (holder, challenger)]
        if asked >= LEAST and is_worse(losses[0] - losses[1], LEVEL):
            return challenger
        self.trace.append({"note": f"{challenger} is not better by a paired test: {holder} stays"})
        return holder

    def _race(self, name: str, entered: Sequence[Variant]) -> list[Variant]:
        return self.race(name, entered, share=SHARES[name])

    def race(self, name: str, entered: Sequence[Variant], *, share: float) -> list[Variant]:
        """Those that could run, the winner first, then those that left last.

        Args:
            entered: the likeliest winner first.
            share: of what is left of the budget, in (0, 1].
        """
        runners = []
        for variant in dict.fromkeys(variant.distinct() for variant in entered):
            try:
                self.variants.require_askable(variant, self.judge.rows)
                runners.append(variant)
            except ICLError as error:
                self._tell(name, variant, queries=0, why=f"not tried: {error}")
        if len(runners) == 1:
            return runners
        budget = int(self.left * share)
        paid = [self.paid(variant) for variant in runners]
        found = race(
            lambda i, n: self.judge.losses(runners[i], self.variants.program(runners[i]), n),
            len(runners),
            queries=len(self.judge.rows),
            budget=budget,
            seen=paid,
            costs=[variant.ensembles for variant in runners],
        )
        self.record(name, runners, found)
        ranked = sorted(found.standings, key=lambda s: (-_lasted(s.out), s.mean if s.queries else float("inf")))
        return [runners[standing.candidate] for standing in ranked]

    def paid(self, variant: Variant) -> int:
        """How many queries of the variant were paid for."""
        return self._paid.get(variant, 0)

    def record(self, name: str, runners: Sequence[Variant], found: Race) -> None:
        """Pay for a race, and tell of it in the trace."""
        self.left -= found.calls
        for ended in found.standings:
            runner = runners[ended.candidate]
            self._paid[runner] = max(ended.queries, self.paid(runner))
        for number, variant, queries, mean, low, high, out, why in (
            (s.candidate, runners[s.candidate], *s[1:]) for s in found.standings
        ):
            measured = {"queries": queries, "risk": mean, "low": low, "high": high}
            told = {key: round(value, 4) if math.isfinite(value) else None for key, value in measured.items()}
            self._tell(name, variant, candidate=number, **told, round=out, why=why)

    def _tell(self, race_name: str, variant: Variant, **facts: Any) -> None:
        self.trace.append({"race": race_name, **variant._asdict(), **facts})


def _lasted(out: int | None) -> float:
    return float("inf") if out is None else float(out)
