"""Which layout: of those that are not worse by a paired test, the one of which a server computes the fewest tokens.

- All layouts are asked the same queries, as many as the budget pays for; none leaves early, as they are to be compared
  in full. Which tokens a server with a prefix cache computes is predicted (`layouts.computed_tokens`), not asked.
- "Not worse" means that a test at 5 % finds no difference. With few queries that is easily so: below 20 the layout
  stays.
"""

import math
from typing import get_args

from icl_compiler.compile import laid_out
from icl_compiler.errors import ICLError
from icl_compiler.layouts import Layout
from icl_compiler.optimise.racing import OutOfTime, Race, deepest, is_worse, standing
from icl_compiler.optimise.search import LEVEL, Races
from icl_compiler.optimise.variants import Variant

LEAST_COMPARED = 20
"""Fewest queries on which layouts are compared."""


def cheapest_layout(races: Races, found: Variant) -> Variant:
    """`found`, in the layout of fewest computed tokens that is not worse."""
    variants, judge = races.variants, races.judge
    if not found.shots:
        return found
    own = variants.base.settings.layout
    others = [layout for layout in get_args(Layout) if layout != own]
    if found.ensembles > 1:
        others = [layout for layout in others if layout in ("per-query", "mixed")]
    runners = [found]
    for layout in others:
        try:
            variants.require_askable(found._replace(layout=layout), judge.rows)
            runners.append(found._replace(layout=layout))
        except ICLError as error:
            races.trace.append({"note": f"layout {layout} was not tried: {error}"})
    paid = [(races.paid(variant), variant.ensembles) for variant in runners]
    n = deepest(paid, races.left, len(judge.rows))
    if n < LEAST_COMPARED:
        races.trace.append({"note": f"layouts were not compared: {n} queries are left, expected {LEAST_COMPARED}"})
        return found
    try:
        losses = [judge.losses(variant, variants.program(variant), n) for variant in runners]
    except OutOfTime:
        races.trace.append({"note": "layouts were not compared: the time was up"})
        return found
    best = min(range(len(runners)), key=lambda i: (round(float(losses[i].mean()), 4), i))
    expected = [laid_out(variants.program(variant)).expected for variant in runners]
    tokens = [math.inf if each is None else each.computed_tokens for each in expected]
    worse = {i for i in range(len(runners)) if is_worse(losses[i] - losses[best], LEVEL)}
    chosen = min((i for i in range(len(runners)) if i not in worse), key=lambda i: (tokens[i], i))
    told = []
    for i in range(len(runners)):
        why = f"worse than {best} by a paired test" if i in worse else f"no fewer tokens than {chosen}"
        why = "the winner" if i == chosen else why
        told.append(standing(i, losses[i], None if i == chosen else 1, f"{why}; computes {tokens[i]:,.0f} tokens"))
    calls = sum(price * max(0, n - before) for before, price in paid)
    races.record("layouts", runners, Race(chosen, tuple(told), calls))
    return runners[chosen]
