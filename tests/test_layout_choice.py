"""Layouts that a search may choose: the cheapest of those that are not worse, and told what each would compute."""

import numpy as np
import pytest
from hashed_words import HashedWords

from icl_compiler import encoders
from icl_compiler.backends.backend import LabelScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.optimise.levels import optimise

FIXED = frozenset({"retriever", "shots", "order", "per_label", "template"})
LABELS = ("card", "parcel", "refund")


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def searched(backend, queries=1000):
    rng = np.random.default_rng(0)
    texts = tuple(f"{LABELS[i % 3]} x{rng.integers(10**6)}" for i in range(90))
    data = Dataset(texts, tuple(LABELS[i % 3] for i in range(90)), "classification", "words")
    base = compile_program(data, model="echo", retriever="bm25", shots=3, budget=400)
    return optimise(base, backend, fixed=FIXED, queries=queries, calibrations=["none"], layouts=True)


class DoesNotLookAtShots(EchoBackend):
    """Its answer depends on the query alone."""

    def label_logprobs(self, prompts, label_words, *, progress=None):
        queries = [bytes(prompt).decode().split("Text: ")[-1] for prompt in prompts]
        weights = np.array([[1 + (bytes(word).decode().strip() in query) for word in label_words] for query in queries])
        return LabelScores(np.log(weights / (1 + weights.sum(axis=1, keepdims=True))), Usage(1, 1, 1))


def test_where_shots_do_not_matter_the_cheapest_layout_is_taken():
    program, trace = searched(DoesNotLookAtShots())
    raced = {row["layout"]: row for row in trace if row.get("race") == "layouts"}
    assert set(raced) == {None, "shared", "clustered", "mixed"}
    tokens = {layout: int(row["why"].split("computes ")[1].split()[0]) for layout, row in raced.items()}
    assert tokens[program.settings.layout] == min(tokens.values()) < tokens[None]
    assert program.blocks is not None
    assert program.expected.computed_tokens == pytest.approx(min(tokens.values()), abs=1)
    assert trace[0]["prompts_asked"] <= 1000


def test_where_shots_of_ones_own_help_they_stay():
    program, trace = searched(EchoBackend())
    assert program.settings.layout in ("per-query", "clustered")  # by cluster the label is found as well
    [shared] = [row for row in trace if row.get("race") == "layouts" and row["layout"] == "shared"]
    assert "worse than" in shared["why"]


def test_on_few_rows_the_layout_stays():
    program, trace = searched(DoesNotLookAtShots(), queries=40)
    assert program.settings.layout == "per-query"
    assert any("layouts were not compared: " in row.get("note", "") for row in trace)
