"""Whether the base model's own reading stands beside the sentence encoder: decided by the neighbours' vote on the pool.

- Rows of the pool, each left out, are judged by the vote of their neighbours: the nearest by sentence embeddings alone,
  and with what the base model makes of a text beside them (`icl_compiler.reading`). Lower log-loss wins. No prompt with
  shots is asked, and many more rows can be looked at than a race may ask about.
- Texts are read where the engine is in this process, the model has no more than a billion parameters (whoever serves
  the program reads each query with it), and the pool has no more tokens than half of those that the search may ask.
  With a time limit the reading is broken off when half of that is up; what was read is not read again.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from icl_compiler.backends.backend import Backend
from icl_compiler.calibration.vote_choice import best_vote, drawn_rows, losses_of_vote, voters_among
from icl_compiler.compile import with_dense, with_reading
from icl_compiler.data import normalise_text
from icl_compiler.program import Program
from icl_compiler.reading import read_ahead

MOST_PARAMETERS = 1_000_000_000
"""Of a model that reads each query beside the engine that answers it."""
OF_SEARCH = 0.5
"""Tokens of the pool as a share of those that a search may ask."""


class Chosen(NamedTuple):
    """The program, and rows for the trace."""

    program: Program
    told: list[dict[str, Any]]


def choose_encoder(base: Program, backend: Backend, *, queries: int, until: float = float("inf")) -> Chosen:
    """`base` with the base model's reading beside its encoder, if the pool's neighbours vote better so.

    Args:
        queries: most prompts of the search.
        until: of `time.monotonic`, when the reading is broken off.
    """
    if base.reading is not None or not base.labels:
        return Chosen(base, [])
    if reason := _why_not(base, backend, queries):
        return Chosen(base, [{"note": f"the encoder stays {base.settings.encoder}: {reason}"}])
    if not read_ahead(base.pool.data.texts, base.settings.model, base.template, until=until):
        return Chosen(base, [{"note": f"the encoder stays {base.settings.encoder}: half the time was up"}])
    tried = [with_dense(base), with_reading(with_dense(base))]
    losses = [_losses(program) for program in tried]
    best = int(np.argmin([each.mean() for each in losses]))
    difference = losses[1] - losses[0]
    error = float(difference.std() / np.sqrt(len(difference)))
    names = [program.settings.encoder for program in tried]
    note = (
        f"encoder: {names[best]}, as the vote of the neighbours of {len(difference):,} rows, each left out, has a "
        f"log-loss of {losses[0].mean():.3f} with {names[0]} and {losses[1].mean():.3f} with {names[1]} "
        f"(difference {difference.mean():+.3f}, standard error {error:.3f})"
    )
    return Chosen(replace(tried[1], voters=base.voters and tried[1].voters) if best else base, [{"note": note}])


def _why_not(base: Program, backend: Backend, queries: int) -> str:
    """Why texts are not read; nothing if they are."""
    network = getattr(backend, "network", None)
    if network is None:
        return "the engine does not tell what the model makes of a text; --encoder minilm+base reads it here"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if parameters > MOST_PARAMETERS:
        return f"{base.settings.model} has {parameters:,} parameters, and a query is read by up to {MOST_PARAMETERS:,}"
    most = int(OF_SEARCH * queries * base.settings.budget)
    if len(base.pool.tokens) > most:
        return f"the pool has {len(base.pool.tokens):,} tokens, and up to {most:,} are read for such a search"
    return ""


def _losses(program: Program) -> Float[np.ndarray, " rows"]:
    """The log-loss of rows of the pool, each left out, by the best vote of their neighbours."""
    data = program.pool.data
    number = {label: i for i, label in enumerate(program.labels)}
    answers = np.array([number[answer] for answer in data.answers], dtype=np.int64)
    rows = drawn_rows(len(data))
    texts = [normalise_text(text) for text in data.texts]
    assert program.dense is not None
    voters = voters_among(program.dense, texts, answers, [data.texts[row] for row in rows.tolist()])
    vote = best_vote(voters, answers[rows], len(program.labels))
    return losses_of_vote(voters, vote, answers[rows], len(program.labels))
