import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_compiler.data import normalise_text
from icl_compiler.selection import candidates, matches, pack


@st.composite
def cases(draw):
    rows = draw(st.integers(1, 12))
    ids = draw(st.permutations(range(rows)))[: draw(st.integers(0, rows))]
    return {
        "ids": np.array(ids, dtype=np.int64),
        "scores": np.array(
            sorted(draw(st.lists(st.integers(-9, 9), min_size=len(ids), max_size=len(ids))))[::-1], "f4"
        ),
        "shot_tokens": np.array(draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows)), dtype=np.int64),
        "is_query": np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=bool),
        "room": draw(st.integers(0, 100)),
        "shots": draw(st.integers(0, 12)),
        "order": draw(st.sampled_from(["best-last", "best-first"])),
    }


@settings(deadline=None)
@given(cases())
def test_pack_keeps_every_promise(case):
    found = pack(case["ids"], case["scores"], **{k: v for k, v in case.items() if k not in ("ids", "scores")})
    ids, tokens, room = case["ids"].tolist(), case["shot_tokens"], case["room"]
    best_first = slice(None, None, -1 if case["order"] == "best-last" else 1)
    rows, ranks = found.rows[best_first], found.ranks[best_first]
    # Whole shots, each once, within the budget, best first; the query is none of them.
    assert sum(tokens[row] for row in rows) <= room
    assert len(rows) == len(set(rows)) <= case["shots"]
    assert ranks == sorted(ranks)
    assert rows == [ids[rank - 1] for rank in ranks]
    assert found.scores[best_first] == [case["scores"][rank - 1] for rank in ranks]
    assert not any(case["is_query"][rank - 1] for rank in ranks)
    # Nothing was passed over that would have fitted when its turn came; all that was passed over is counted.
    full_at = ranks[-1] if rows and len(rows) == case["shots"] else len(ids) if case["shots"] else 0
    passed = [rank for rank in range(1, full_at + 1) if rank not in ranks]
    queries = [rank for rank in passed if case["is_query"][rank - 1]]
    for rank in set(passed) - set(queries):
        left = room - sum(tokens[row] for row, other in zip(rows, ranks, strict=True) if other < rank)
        assert tokens[ids[rank - 1]] > left
    assert (found.itself, found.too_long) == (len(queries), len(passed) - len(queries))


def test_the_best_stands_last_or_first():
    def rows(order):
        ids, scores = np.array([4, 0, 2]), np.array([3, 2, 1], dtype=np.float32)
        none = np.zeros(3, dtype=bool)
        return pack(ids, scores, shot_tokens=np.ones(5, "i8"), is_query=none, room=9, shots=2, order=order).rows

    assert rows("best-last") == [0, 4]
    assert rows("best-first") == [4, 0]


@settings(deadline=None)
@given(shots=st.integers(0, 100), rows=st.integers(0, 300))
def test_candidates_are_enough_and_exist(shots, rows):
    k = candidates(shots, rows)
    assert min(shots, rows) <= k <= rows
    assert (k == 0) == (shots == 0 or rows == 0)


def test_a_query_is_recognised_by_its_normalised_text():
    pool = ["Where is  my CARD?\n", "where is my card", "WHERE IS MY CARD?"]
    found = matches([normalise_text(text) for text in pool], normalise_text(" where is my card? "))
    assert found.tolist() == [True, False, True]
    assert matches([], "x").shape == (0,)
