"""The search for the likeliest labels, against the whole law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.backends.label_walk import Answer, LabelWalk


def prefix_free(words: list[list[int]]) -> list[list[int]]:
    """Each word once, with an end that no word has inside."""
    return [[*word, 9] for word in dict.fromkeys(map(tuple, words))]


labels = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=25).map(prefix_free)


def law_of(walk: LabelWalk, seed: int, sharpness: float) -> dict[int, Answer]:
    """Answers to all questions, of one law: the probabilities after a beginning sum to less than one."""
    answers = {}
    for number, question in enumerate(walk.questions):
        logits = sharpness * np.random.default_rng([seed, *question.suffix]).normal(size=10)
        found = (logits - np.log(np.exp(logits).sum()))[list(question.ids)]
        answers[number] = Answer(found, found)
    return answers


@given(words=labels, seed=st.integers(0, 1000), sharpness=st.sampled_from([0.1, 1.0, 4.0]), count=st.integers(1, 5))
@settings(deadline=None)
def test_the_likeliest_labels_are_found(words: list[list[int]], seed: int, sharpness: float, count: int) -> None:
    walk = LabelWalk.build(words, ids_per_question=3)
    law = law_of(walk, seed, sharpness)
    truth, _ = walk.scores(law)
    told: dict[int, Answer] = {}
    while numbers := walk.open(told, count):
        assert not set(numbers) & set(told)
        told |= {number: law[number] for number in numbers}
    lower, upper = walk.scores(told)
    assert (lower <= truth + 1e-12).all() and (truth <= upper + 1e-12).all()
    count = min(count, len(words))
    best = np.sort(truth)[-count:]
    assert np.sort(lower)[-count:] == pytest.approx(best)
    others = lower < best[0] - 1e-12
    assert (upper[others] <= best[0] + 1e-12).all()


def test_a_clear_answer_takes_few_questions() -> None:
    words = prefix_free([[a, b, c] for a in range(6) for b in range(6) for c in range(6)])
    walk = LabelWalk.build(words, ids_per_question=128)
    law = {
        number: Answer(*(2 * [np.log(np.where(np.isin(question.ids, (0, 9)), 0.9, 0.01))]))
        for number, question in enumerate(walk.questions)
    }
    told: dict[int, Answer] = {}
    rounds = 0
    while numbers := walk.open(told, 1):
        told |= {number: law[number] for number in numbers}
        rounds += 1
    assert len(walk.questions) == 1 + 6 + 36 + 216
    assert len(told) <= 4 and rounds <= 4


def test_bounds_do_not_settle_but_end() -> None:
    """Of an old server's answers, which are bounds, every question that matters is asked, and then no other."""
    walk = LabelWalk.build([[1, 9], [2, 9]], ids_per_question=128)
    unsure = {n: Answer(np.log(np.full(len(q.ids), 0.1)), np.log(np.full(len(q.ids), 0.5))) for n, q in
              enumerate(walk.questions)}  # fmt: skip
    told: dict[int, Answer] = {}
    while numbers := walk.open(told, 1):
        told |= {number: unsure[number] for number in numbers}
    assert set(told) == {0, 1, 2}
