"""Label words scored by asking an engine for the law of the next token, at chosen tokens.

An engine such as vLLM answers one question: after these tokens, how probable is each of those as the next? A label
word of several tokens is then a path through the tree of label words (`prefix_tree.WordTree`); each inner node of the
tree is one question, its tokens in front mostly in the engine's prefix cache. The word's log-probability is the sum
over its path, so that it is exact wherever the answers are.

- At most `ids_per_question` tokens can be asked for at once; a node with more children is asked several times.
- An engine that answers for its k likeliest tokens only gives bounds: a token that is not among them is at most as
  probable as the least of them, and at most as probable as all that is left.
- Who wants the likeliest labels only need not ask everything (`LabelWalk.open`): a label word is at most as probable
  as its beginning, so that no label below an improbable beginning can win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from icl_compiler.prefix_tree import WordTree
from icl_compiler.tokenizer import TokenIds

_SPREAD = float(np.log(8))
"""How much less probable than the best beginning, in nats, another one may be to be asked about with it."""
_ROUNDING = 1e-6
"""By how much probabilities in single precision may miss a sum of one."""


class Question(NamedTuple):
    """How probable is each of `ids` after the prompt and `suffix`?"""

    suffix: tuple[int, ...]
    ids: tuple[int, ...]
    edges: Int[np.ndarray, " ids"]
    """The edges of the word tree that the answer is about, in the order of `ids`."""


class Answer(NamedTuple):
    """Log-probabilities of the tokens of a question, in nats; `upper` differs where the engine gave only bounds."""

    lower: Float[np.ndarray, " ids"]
    upper: Float[np.ndarray, " ids"]


@dataclass(frozen=True)
class LabelWalk:
    """The questions that score a set of label words after any prompt."""

    words: WordTree
    questions: tuple[Question, ...]

    @classmethod
    def build(cls, label_words: Sequence[TokenIds], *, ids_per_question: int) -> "LabelWalk":
        """The questions for `label_words`, parents before children.

        >>> walk = LabelWalk.build([[5, 1], [6, 7, 1]], ids_per_question=128)
        >>> [(question.suffix, question.ids) for question in walk.questions]
        [((), (5, 6)), ((5,), (1,)), ((6,), (7,)), ((6, 7), (1,))]
        """
        words = WordTree.build(label_words)
        suffixes: dict[int, tuple[int, ...]] = {-1: ()}
        for node, (token, parent) in enumerate(zip(words.tokens.tolist(), words.parents.tolist(), strict=True)):
            suffixes[node] = (*suffixes[parent], token)
        questions = []
        for node in words.predicting.tolist():
            edges = np.flatnonzero(words.edge_nodes == node)
            for part in np.array_split(edges, -(-len(edges) // ids_per_question)):
                questions.append(Question(suffixes[node], tuple(words.edge_tokens[part].tolist()), part))
        return cls(words, tuple(questions))

    def open(self, answers: Mapping[int, Answer], count: int) -> list[int]:
        """The questions to ask next, by number, so that the `count` likeliest labels are known; none when they are.

        Best-first search with the probability of a label word's beginning as its bound. The questions below the most
        probable beginnings are asked at once, and no others: few rounds, few questions. In the end `scores` is exact
        for the `count` likeliest labels (as far as the answers are), and no other label can be likelier.

        >>> walk = LabelWalk.build([[5, 1], [6, 1], [7, 8, 1]], ids_per_question=128)
        >>> walk.open({}, 1)
        [0]
        >>> begin = np.log([0.75, 0.05, 0.0625])
        >>> walk.open({0: Answer(begin, begin)}, 1)
        [1]
        >>> end = np.log([0.5])
        >>> walk.open({0: Answer(begin, begin), 1: Answer(end, end)}, 1)
        []
        """
        lower, upper = self.scores(answers)
        threshold = np.sort(lower)[-min(count, len(lower))]
        bounds: dict[int, float] = {}
        for word in np.flatnonzero(upper > np.maximum(lower, threshold)):
            for question in self._path[word]:
                if question not in answers:
                    bounds[question] = max(bounds.get(question, -np.inf), float(upper[word]))
                    break
        if not bounds:
            return []
        least = max(bounds.values()) - _SPREAD
        return sorted(question for question, bound in bounds.items() if bound >= least)

    @cached_property
    def _path(self) -> list[list[int]]:
        """The questions about each word's edges, from its beginning."""
        asks = {int(edge): number for number, question in enumerate(self.questions) for edge in question.edges}
        return [[asks[int(edge)] for edge in edges] for edges in self.words.word_edges]

    def scores(
        self, answers: Mapping[int, Answer]
    ) -> tuple[Float[np.ndarray, " labels"], Float[np.ndarray, " labels"]]:
        """Lower and upper log-probability of every label word, from the answers to questions, by their number.

        What was not asked is between 0 and 1, so that a label of which only the beginning was asked has bounds.

        >>> walk = LabelWalk.build([[5, 1], [6, 1]], ids_per_question=128)
        >>> half, sure = np.log([0.5, 0.25]), np.zeros(1)
        >>> lower, upper = walk.scores({0: Answer(half, half), 1: Answer(sure, sure)})
        >>> np.exp(lower), np.exp(upper)
        (array([0.5, 0. ]), array([0.5 , 0.25]))
        """
        edges = np.zeros((2, len(self.words.edge_tokens)))
        edges[0] = -np.inf
        for number, answer in answers.items():
            edges[0, self.questions[number].edges] = answer.lower
            edges[1, self.questions[number].edges] = answer.upper
        sums = np.array([edges[:, path].sum(axis=1) for path in self.words.word_edges])
        return sums[:, 0], sums[:, 1]


def answer_from_top(ids: Sequence[int], top: dict[int, float], count: int) -> Answer:
    """What the log-probabilities of an engine's likeliest tokens say about `ids`.

    Args:
        top: log-probability by token; the `count` likeliest of the vocabulary, and perhaps the sampled token.

    >>> answer = answer_from_top([3, 9], {3: np.log(0.6), 4: np.log(0.3)}, 2)
    >>> np.exp(answer.lower), np.exp(answer.upper).round(3)
    (array([0.6, 0. ]), array([0.6, 0.1]))
    """
    least = sorted(top.values(), reverse=True)[:count][-1]
    left = max(0.0, 1 - float(np.exp(list(top.values())).sum())) + _ROUNDING
    ceiling = min(least, float(np.log(left)))
    lower = np.array([top.get(token, -np.inf) for token in ids])
    upper = np.array([top.get(token, ceiling) for token in ids])
    return Answer(lower, upper)
