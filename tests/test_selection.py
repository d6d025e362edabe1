import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.selection import arranged, candidates, in_rounds, joined, pack, random_keys


@st.composite
def cases(draw):
    queries, width = draw(st.integers(1, 4)), draw(st.integers(0, 12))

    def table(values, dtype):
        rows = st.lists(values, min_size=width, max_size=width)
        return np.array(draw(st.lists(rows, min_size=queries, max_size=queries)), dtype=dtype).reshape(queries, width)

    def each(values):
        return np.array(draw(st.lists(values, min_size=queries, max_size=queries)), dtype=np.int64)

    return {
        "tokens": table(st.integers(0, 20), np.int64),
        "barred": table(st.booleans(), bool),
        "room": each(st.integers(0, 100)),
        "shots": each(st.integers(0, 12)),
    }


@settings(deadline=None)
@given(cases())
def test_pack_is_what_one_does_by_hand(case):
    found = pack(**case)
    for query in range(len(case["room"])):
        room, shots = case["room"][query], case["shots"][query]
        taken, passed = [], []
        for cost, barred in zip(case["tokens"][query], case["barred"][query], strict=True):
            full = sum(taken) == shots
            fits = not full and not barred and cost <= room
            room -= cost * fits
            taken.append(fits)
            passed.append(not full and not fits)
        assert found.taken[query].tolist() == taken
        assert found.passed[query].tolist() == passed


def in_order(order, **keys):
    queries, places = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 0, 4, 2, 3, 0])
    found = arranged(queries, places, order, **keys)
    assert queries[found].tolist() == queries.tolist()
    return places[found].tolist()


def test_the_best_stands_last_or_first():
    assert in_order("best-last") == [4, 1, 0, 3, 2, 0]
    assert in_order("best-first") == [0, 1, 4, 2, 3, 0]


def test_labels_stand_together_and_the_best_of_the_best_last():
    assert in_order("by-label", labels=np.array([7, 5, 5, 7, 7, 0])) == [1, 4, 0, 3, 2, 0]
    assert in_order("by-label", labels=np.array([7, 5, 7, 7, 5, 0])) == [4, 1, 0, 3, 2, 0]


def test_a_random_order_is_that_of_the_keys():
    keys = np.array([9, 5, 7, 1, 0, 3], dtype=np.uint64)
    assert in_order("random", keys=keys) == [0, 4, 1, 3, 2, 0]


def test_random_keys_depend_on_text_row_and_seed_alone():
    rows, queries = np.array([3, 8, 3, 8]), np.array([0, 0, 1, 1])
    keys = random_keys(["a", "b"], rows, queries, seed=0).tolist()
    assert len(set(keys)) == 4
    assert random_keys(["b"], rows[2:], queries[:2], seed=0).tolist() == keys[2:]
    assert not {*random_keys(["a", "b"], rows, queries, seed=1).tolist()} & {*keys}


def test_every_order_of_three_shots_comes_as_often_as_the_others():
    texts = [f"text {i}" for i in range(6000)]
    queries = np.repeat(np.arange(6000), 3)
    keys = random_keys(texts, np.tile([0, 1, 2], 6000), queries, seed=0)
    found = arranged(queries, np.tile([0, 1, 2], 6000), "random", keys=keys).reshape(-1, 3) % 3
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 130  # four and a half standard deviations


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 3))
def test_rounds_give_every_label_its_turn(labels, per_label):
    found = in_rounds(np.array(labels, dtype=np.int64), per_label)
    for row, order in zip(labels, found.tolist(), strict=True):
        turns = [row[:place].count(label) // per_label for place, label in enumerate(row)]
        assert order == sorted(range(7), key=lambda place: (turns[place], place))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=9), st.integers(1, 3))
def test_who_is_barred_takes_no_turn(candidates, per_label):
    labels = np.array([[label for label, _ in candidates]], dtype=np.int64)
    barred = np.array([[bar for _, bar in candidates]])
    [found] = in_rounds(labels, per_label, barred).tolist()
    free = [place for place in range(len(candidates)) if not barred[0, place]]
    alone = in_rounds(labels[:, free], per_label)[0].tolist()
    assert [place for place in found if place in free] == [free[place] for place in alone]


@pytest.mark.parametrize("rows", [[], [2], [1, 1, 0], [0, 2, 1]])
def test_pieces_are_joined(rows):
    flat, offsets = np.array([5, 6, 7, 8, 9], dtype=np.int32), np.array([0, 2, 2, 5])
    expected = [token for row in rows for token in flat[offsets[row] : offsets[row + 1]].tolist()]
    assert joined(flat, offsets, np.array(rows, dtype=np.int64)).tolist() == expected


@settings(deadline=None)
@given(shots=st.integers(0, 100), rows=st.integers(0, 300), per_label=st.integers(0, 2))
def test_candidates_are_enough_and_exist(shots, rows, per_label):
    k = candidates(shots, rows, per_label=per_label)
    assert min(shots, rows) <= k <= rows
    assert (k == 0) == (shots == 0 or rows == 0)
