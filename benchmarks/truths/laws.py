"""Truths that are known: laws of text and linear rules, drawn by seed, and samples of them. Pure functions.

- A law of text has m contexts. In each of them an answer is `length` words out of V, and the next word after every
  beginning has a law of its own, drawn from the flat Dirichlet law: nothing is shared between contexts or beginnings.
  So `word_by_word` is what Bayes' rule makes of samples. Which words stand for what is drawn too.
- A rule sorts points of whole numbers by the side of a plane through the origin; points nearer to it than `MARGIN` are
  drawn again. With `noise` a label is the wrong one with that probability.
- Everything is nested: fewer contexts are the first of more, fewer samples the first of more. So curves over m and n
  compare like with like.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Each is one token of SmolLM2, the contexts at the beginning of a line, the words behind a blank (a test looks).
# fmt: off
CONTEXTS = (
    "north", "south", "east", "west", "river", "house", "school", "market", "station", "forest", "bridge", "castle",
    "tower", "church", "street", "ocean", "lake", "city", "farm", "hospital", "library", "museum", "office", "factory",
    "road", "port", "park", "court", "field", "hill", "room", "door",
)
WORDS = (
    "red", "blue", "green", "black", "white", "yellow", "brown", "orange", "purple", "pink", "gray", "silver", "gold",
    "cat", "dog", "bird", "fish", "horse", "cow", "sheep", "lion", "tiger", "bear", "wolf", "fox", "snake", "mouse",
    "rabbit", "apple", "bread", "milk", "water",
)
# fmt: on
MOST = 99  # coordinates are from -99 to 99
MARGIN = 5.0  # least distance of a point from the plane
_BLOCK = 64


class Text(NamedTuple):
    """The law of the answer in each context; `answers` are words with blanks between them."""

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    law: Float[np.ndarray, "contexts answers"]


class Rule(NamedTuple):
    """The plane through the origin orthogonal to `weights` (of length 1), and how often a label is wrong."""

    weights: Float[np.ndarray, " d"]
    noise: float

    def is_right(self, points: Int[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        """On which side of the plane each point lies."""
        sides: Bool[np.ndarray, " n"] = points @ self.weights > 0
        return sides


def text(contexts: int, vocabulary: int, length: int, *, seed: int) -> Text:
    """`contexts` laws over the `vocabulary` ** `length` answers, at most 32 contexts and 32 words.

    >>> truth = text(2, 3, 2, seed=0)
    >>> truth.law.shape, truth.law.sum(axis=1).round(9).tolist(), truth.answers[:4]
    ((2, 9), [1.0, 1.0], ('orange orange', 'orange silver', 'orange tiger', 'silver orange'))
    """
    if contexts > len(CONTEXTS) or vocabulary > len(WORDS):
        raise ValueError(f"there are {len(CONTEXTS)} contexts and {len(WORDS)} words, not {contexts}, {vocabulary}")
    names = np.random.default_rng([seed, 0])
    places, words = names.permutation(CONTEXTS).tolist(), names.permutation(WORDS).tolist()
    laws = []
    for context in range(contexts):
        rng = np.random.default_rng([seed, 1, vocabulary, length, context])
        law = np.ones(1)
        for _ in range(length):
            law = (law[:, None] * rng.dirichlet(np.ones(vocabulary), size=len(law))).ravel()
        laws.append(law)
    answers = tuple(" ".join(answer) for answer in product(words[:vocabulary], repeat=length))
    return Text(tuple(places[:contexts]), answers, np.stack(laws))


def samples(law: Float[np.ndarray, "contexts answers"], n: int, *, seed: int) -> Int[np.ndarray, "contexts n"]:
    """`n` answers drawn independently in each context, by their place in the law.

    >>> law = np.array([[0.5, 0.5], [0.0, 1.0]])
    >>> samples(law, 3, seed=0).tolist(), samples(law, 2, seed=0).tolist()
    ([[0, 0, 1], [1, 1, 1]], [[0, 0], [1, 1]])
    """
    uniform = np.stack([np.random.default_rng([seed, 2, context]).random(n) for context in range(len(law))])
    drawn: Int[np.ndarray, "contexts n"] = (uniform[:, :, None] >= law.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    return drawn


def counted(
    drawn: Int[np.ndarray, "contexts n"], outcomes: int, *, more: float = 0.0
) -> Float[np.ndarray, "contexts outcomes"]:
    """The law that counting gives: (count + more) / (n + more * outcomes); `more` = 1 is Laplace's.

    >>> counted(np.array([[0, 1, 1]]), 3).round(2).tolist(), counted(np.array([[0, 1, 1]]), 3, more=1.0).tolist()
    ([[0.33, 0.67, 0.0]], [[0.3333333333333333, 0.5, 0.16666666666666666]])
    """
    counts = np.stack([np.bincount(row, minlength=outcomes) for row in drawn]) + more
    return _rows(counts)


def word_by_word(
    drawn: Int[np.ndarray, "contexts n"], vocabulary: int, length: int
) -> Float[np.ndarray, "contexts outcomes"]:
    """Laplace's law of the next word after every beginning, multiplied: with one word Laplace's law itself.

    >>> word_by_word(np.array([[0, 1]]), 2, 2).tolist()
    [[0.375, 0.375, 0.125, 0.125]]
    """
    law = np.ones((len(drawn), 1))
    for words in range(1, length + 1):
        beginnings = counted(drawn // vocabulary ** (length - words), vocabulary**words) * drawn.shape[1] + 1
        law = (law[:, :, None] * _rows(beginnings.reshape(len(drawn), -1, vocabulary))).reshape(len(drawn), -1)
    return law


def rule(dimension: int, *, noise: float, seed: int) -> Rule:
    """A rule in so many dimensions, its direction uniform on the sphere."""
    weights = np.random.default_rng([seed, 3, dimension]).normal(size=dimension)
    return Rule(weights / np.linalg.norm(weights), noise)


def points(of: Rule, n: int, *, seed: int) -> Int[np.ndarray, "n d"]:
    """`n` points, each coordinate uniform in -99 to 99, at least `MARGIN` away from the plane."""
    rng, kept = np.random.default_rng([seed, 4]), np.empty((0, len(of.weights)), dtype=np.int64)
    while len(kept) < n:
        block = rng.integers(-MOST, MOST, size=(_BLOCK, len(of.weights)), endpoint=True)
        kept = np.concatenate([kept, block[np.abs(block @ of.weights) >= MARGIN]])
    return kept[:n]


def labels(of: Rule, at: Int[np.ndarray, "n d"], *, seed: int) -> Bool[np.ndarray, " n"]:
    """The side of each point, the wrong one with the probability of the rule's noise."""
    flipped = np.random.default_rng([seed, 5]).random(len(at)) < of.noise
    seen: Bool[np.ndarray, " n"] = of.is_right(at) != flipped
    return seen


def _rows(counts: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    laws: Float[np.ndarray, "*shape"] = counts / counts.sum(axis=-1, keepdims=True)
    return laws
