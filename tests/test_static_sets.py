"""A set that was chosen for all texts: a planted one is found, and it stays chosen."""

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import customers

from icl_compiler import encoders
from icl_compiler.artifact import load_program, save_program
from icl_compiler.backends.backend import LabelScores, Usage
from icl_compiler.backends.echo import EchoBackend
from icl_compiler.compile import compile_program, with_pool
from icl_compiler.corrections import Corrector
from icl_compiler.data import Dataset
from icl_compiler.optimise.levels import optimise
from retrievers.retriever import Resources
from retrievers.static import Static

FIXED = frozenset({"retriever", "shots", "order", "per_label", "template"})


@pytest.fixture(autouse=True)
def encoder_without_a_model(monkeypatch):
    monkeypatch.setattr(encoders, "named_encoder", lambda name: HashedWords())


def numbered(rows=60):
    """Texts of which every fifth is a good shot."""
    texts = tuple(f"text {i} {'good' if i % 5 == 0 else 'dull'}" for i in range(rows))
    return Dataset(texts, tuple(("yes", "no")[i % 2] for i in range(rows)), "classification", "numbered")


class KnowsGoodShots(EchoBackend):
    """The more good shots a prompt has, the likelier is the right answer."""

    def __init__(self, worth=2.0):
        self.worth, self.asked = worth, 0

    def label_logprobs(self, prompts, label_words, *, progress=None):
        self.asked += len(prompts)
        laws = []
        for prompt in prompts:
            *shots, query = bytes(prompt).decode().split("Text: ")
            right = ("yes", "no")[int(query.split()[1]) % 2]
            good = sum(" good" in shot for shot in shots)
            noise = (int(query.split()[1]) * 7 % 10) / 10
            words = [bytes(word).decode().strip() for word in label_words]
            laws.append([1 + noise + self.worth * good * (word == right) for word in words])
        law = np.array(laws)
        return LabelScores(np.log(law / (1 + law.sum(axis=1, keepdims=True))), Usage(1, 1, 1))


def searched(backend, queries=1500):
    base = compile_program(numbered(), model="echo", retriever="static", shots=3, budget=400)
    return base, *optimise(base, backend, fixed=FIXED, queries=queries, calibrations=["none"])


def goods(program, texts=("text 1 new",)):
    data = program.pool.data
    return [" good" in data.texts[row] for prompt in program.prompts(texts) for row in prompt.selection.rows]


def test_the_good_set_is_found_and_the_same_for_every_text():
    backend = KnowsGoodShots()
    base, program, trace = searched(backend)
    assert program.settings.retriever == "static"
    assert sum(goods(program)) == 3 > sum(goods(base))
    [one], [other] = (
        [prompt.selection.rows for prompt in program.prompts([text])] for text in ("text 7 x", "text 8 y")
    )
    assert one == other
    assert {"sets", "exchanges 1", "static set"} <= {row.get("race") for row in trace}
    assert backend.asked == trace[0]["prompts_asked"] <= 1500


def test_the_random_set_stays_where_all_are_alike():
    base, program, _ = searched(KnowsGoodShots(worth=0.0))
    assert program.prompts(["text 1 new"]) == base.prompts(["text 1 new"])
    assert program.retriever.chosen == ()


def test_it_stays_chosen_on_the_disk_in_another_pool_and_with_corrections(tmp_path):
    _, program, trace = searched(KnowsGoodShots())
    save_program(program, tmp_path / "p", trace=trace)
    loaded = load_program(tmp_path / "p")
    assert loaded.prompts(["text 7 x"]) == program.prompts(["text 7 x"])
    chosen = [numbered().texts.index(text) for text in loaded.retriever.chosen]
    fewer = with_pool(loaded, numbered().take([row for row in range(60) if row != chosen[0]]))
    kept = [fewer.pool.data.texts[row] for row in fewer.prompts(["text 7 x"])[0].selection.rows]
    assert kept[:2] == [numbered().texts[row] for row in chosen[1:]]
    assert sum(goods(Corrector(loaded).corrected([("something else", "no")]))) == 3


def test_the_chosen_come_first_and_the_others_in_a_random_order():
    retriever = Static(Resources(seed=3, encoder=HashedWords()))
    retriever.choose([customers().texts[5], "gone", customers().texts[2]])
    retriever.fit(customers().texts)
    ids, scores = retriever.search(["a", "b"], 12)
    assert ids[0, :2].tolist() == [5, 2]
    assert sorted(ids[0].tolist()) == list(range(12))
    assert scores[1].tolist() == [1, 1] + [0] * 10
