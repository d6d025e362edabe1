"""What -O3 does after -O2: instructions, a learned reranker, averages over prompts, raced against what -O2 found.

- Half of the budget, and of the time, is -O2's. A quarter at most pays for single shots, from which a reranker is
  learned (`shot_utility`).
- All go on from the winner of -O2, which is always among them.
- An average over 2 or 4 prompts deals out as many shots as before, so that each prompt has a half or a quarter of them;
  instruction and query are read as often as there are prompts, and each prompt counts as a model call.
- The last race is between what -O2 found and the best of these. The new one is taken only if a paired test says that
  it is better: whoever tries more finds more by luck.
- What a reranker is learned from, and what the model is shown to write instructions, are rows that no race asks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from icl_compiler.errors import ICLError
from icl_compiler.optimise.instructions import WRITTEN, bundled, written
from icl_compiler.optimise.judges import Asker
from icl_compiler.optimise.racing import OutOfTime
from icl_compiler.optimise.search import Races
from icl_compiler.optimise.shot_utility import SHOTS_PER_QUERY, learn_reranker
from icl_compiler.optimise.variants import Variant

OF_LEVEL_2, OF_SINGLE_SHOTS = 0.5, 0.25
"""Shares of the budget: what the races of -O2 and single shots may take."""
OF_INSTRUCTIONS, OF_RERANKER, OF_ENSEMBLES = 0.3, 0.3, 0.5
"""Shares of what is left then: what these races may take."""
ENSEMBLES = (2, 4)
"""Numbers of prompts that are tried."""
_OF_ROWS = 4  # of so many rows one is kept apart


class Apart(NamedTuple):
    """Rows that are kept apart from those by which variants are judged."""

    judged: Int64[np.ndarray, " queries"]
    learned: Int64[np.ndarray, " queries"]


def set_apart(rows: Int64[np.ndarray, " queries"], budget: int) -> Apart:
    """The last of `rows` to learn from: as many as a quarter of the budget pays for, and a quarter of them at most.

    >>> set_apart(np.arange(100), 160).learned.tolist()
    [95, 96, 97, 98, 99]
    """
    count = min(len(rows) // _OF_ROWS, int(OF_SINGLE_SHOTS * budget) // SHOTS_PER_QUERY)
    return Apart(rows[: len(rows) - count], rows[len(rows) - count :])


def level_3(
    races: Races, found: Variant, asker: Asker, learned_from: Int64[np.ndarray, " queries"], *, fixed: frozenset[str]
) -> Variant:
    """The best of `found`, of it with other instructions, of that with its candidates reranked or dealt out.

    Args:
        found: the winner of -O2.
        learned_from: rows of the pool that no race asks.
        fixed: `instruction`, `rerank` or `ensembles`, if that stays as it is.
    """
    best, variants, seed = found, races.variants, races.variants.base.settings.seed
    if "instruction" not in fixed:
        texts = bundled(variants.base.task)
        with _told(races, "the model wrote no instruction"):
            texts |= written(variants.program(found), asker, learned_from, seed=seed)
            races.left -= WRITTEN
        template = variants.program(found).template.template
        for name, text in texts.items():
            said = template.with_instruction(name, text).instruction(variants.base.labels).strip()
            races.trace.append({"note": f"instruction {name}: {said!r}"})
        variants.instructions |= texts
        instructed = [found._replace(instruction=name) for name in texts]
        best = races.race("instruction", [found, *instructed], share=OF_INSTRUCTIONS)[0]
    if "rerank" not in fixed and best.shots:
        with _told(races, "no reranker was learned"):
            variants.reranker, told = learn_reranker(variants.program(best), races.judge, learned_from, seed=seed)
            races.left -= told["prompts"]
            races.trace.append(told)
            best = races.race("reranker", [best, best._replace(rerank=True)], share=OF_RERANKER)[0]
    if "ensembles" not in fixed and variants.base.labels and best.ensembles == 1:
        dealt = [best._replace(ensembles=n, shots=max(1, best.shots // n)) for n in ENSEMBLES if best.shots >= n]
        if variants.base.settings.layout in ("per-query", "mixed"):
            best = races.race("ensembles", [best, *dealt], share=OF_ENSEMBLES)[0]
    return found if best == found else races.challenge("last", found, best)


@contextmanager
def _told(races: Races, what: str) -> Iterator[None]:
    """What cannot be done, or not in time, is left out and told in the trace."""
    try:
        yield
    except (ICLError, OutOfTime) as error:
        races.trace.append({"note": f"{what}: {str(error) or 'the time was up'}"})
