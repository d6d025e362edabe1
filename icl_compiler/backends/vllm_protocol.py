"""What is said to a vLLM server, and how its answers are read; whoever carries the messages.

- One token is generated per question, and the log-probabilities of chosen tokens come with it (`logprob_token_ids`);
  `label_walk.py` says which questions score label words of any length. Never `prompt_logprobs` or `echo`: with those
  vLLM leaves its prefix cache aside and computes every prompt anew.
- The first question about a prompt is asked alone. Once it is answered the prompt is in the prefix cache; all others
  about it follow at once, the small ones many to a request (`group_questions`).
- A server that does not know `logprob_token_ids` gives its 20 likeliest tokens; scores are then bounds.
- vLLM tells how many tokens came from its cache for the last prompt of a request only. The others of that request
  begin with the same tokens, and are counted alike.
- Nothing here waits: `vllm_server.py` carries the messages for this process's own runs, `serving/upstream.py` for the
  endpoint.
"""

import math
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from icl_compiler.backends.label_walk import Answer, LabelWalk, Question, answer_from_top
from icl_compiler.errors import BackendError, ICLError, ModelError
from icl_compiler.models import locate
from icl_compiler.tokenizer import TokenIds

Json = dict[str, Any]

COMPLETIONS = "/v1/completions"
MOST_IDS = 128  # that vLLM takes for one question
_MOST_TOP = 20  # that vLLM gives, unless it was started to give more
_ROUNDING = 1e-3
_TOKEN = "token_id:"
# In full: a server takes what is left out from the model's generation_config.json.
_PLAIN_SAMPLING: Json = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


class RefusedError(BackendError):
    """The server understood the request, and will not answer it."""


def group_questions(
    questions: Sequence[Question], *, most_ids: int = 16, most_prompts: int = 32, first: bool = True
) -> list[tuple[int, ...]]:
    """Which questions about one prompt go into one request, by their number.

    The prompts of a request share one list of ids. A question that asks for more than `most_ids` stands alone; the
    others are put together as long as they ask for `most_ids` different tokens at most. If they are the `first` ones
    about the prompt, the very first stands alone too.

    >>> walk = LabelWalk.build([[5, 7, 1], [6, 8, 1], [9, 1]], ids_per_question=128)
    >>> [question.ids for question in walk.questions]
    [(5, 6, 9), (7,), (1,), (8,), (1,), (1,)]
    >>> group_questions(walk.questions)
    [(0,), (2, 4, 5, 1, 3)]
    >>> group_questions(walk.questions, most_ids=1)
    [(0,), (2, 4, 5), (1,), (3,)]
    """
    alone = [n for n, question in enumerate(questions) if (first and n == 0) or len(question.ids) > most_ids]
    often = Counter(question.ids for question in questions)
    rest = sorted(set(range(len(questions))) - set(alone), key=lambda n: (-often[questions[n].ids], questions[n].ids))
    groups: list[tuple[list[int], set[int]]] = []
    for n in rest:
        for members, ids in groups:
            if len(members) < most_prompts and len(ids.union(questions[n].ids)) <= most_ids:
                members.append(n)
                ids.update(questions[n].ids)
                break
        else:
            groups.append(([n], set(questions[n].ids)))
    return [*((n,) for n in alone), *(tuple(members) for members, _ in groups)]


def label_walk(label_words: Sequence[TokenIds]) -> LabelWalk:
    """The questions about `label_words`, each of them small enough for vLLM."""
    return LabelWalk.build(label_words, ids_per_question=MOST_IDS)


def complete(model: str, body: Json) -> Json:
    """A request for completions by the law of the model itself, at temperature 1 unless `body` says otherwise."""
    common = {"model": model, "add_special_tokens": False, "return_tokens_as_token_ids": True}
    return {**common, **_PLAIN_SAMPLING, **body}


class Told(NamedTuple):
    """What one answer says: about some of the questions, by their numbers; and the tokens that it cost."""

    answers: dict[int, Answer]
    computed: int
    prompts: int


class Ability(NamedTuple):
    """What a server answers for: any token (`top` is 0), or its `top` likeliest ones."""

    top: int

    @property
    def exact(self) -> bool:
        """Whether scores are exact; else they are bounds."""
        return self.top == 0

    def groups(self, walk: LabelWalk) -> list[tuple[int, ...]]:
        """Which questions go into one request: the first one alone, before all others."""
        return group_questions(walk.questions, most_ids=self._most_ids)

    def groups_of(self, walk: LabelWalk, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Which of some later questions, given by number, go into one request."""
        questions = [walk.questions[n] for n in numbers]
        found = group_questions(questions, most_ids=self._most_ids, first=False)
        return [tuple(numbers[place] for place in group) for group in found]

    @property
    def _most_ids(self) -> int:
        return 16 if self.exact else 1 << 30

    def ask(self, model: str, prompt: list[int], walk: LabelWalk, group: tuple[int, ...]) -> Json:
        """The request for the questions of a group about one prompt."""
        questions = [walk.questions[n] for n in group]
        prompts = [[*prompt, *question.suffix] for question in questions]
        ids = sorted({token for question in questions for token in question.ids})
        wanted = {"logprobs": len(ids), "logprob_token_ids": ids} if self.exact else {"logprobs": self.top}
        return complete(model, {"prompt": prompts, "max_tokens": 1, "temperature": 0, **wanted})

    def told(self, reply: Json, prompt: list[int], walk: LabelWalk, group: tuple[int, ...]) -> Told:
        """What the answer to `ask` says; within `sense`."""
        tops = [_top(choice) for choice in choices(reply, len(group))]
        answers = {n: self._answer(walk.questions[n], top) for n, top in zip(group, tops, strict=True)}
        lengths = [len(prompt) + len(walk.questions[n].suffix) for n in group]
        return Told(answers, computed(reply, lengths), len(group))

    def _answer(self, question: Question, top: dict[int, float]) -> Answer:
        if not self.exact:
            return answer_from_top(question.ids, top, self.top)
        found = np.array([top[token] for token in question.ids])
        return Answer(found, found)


def examination(model: str, prompt: list[int]) -> Generator[Json, Json | RefusedError, Ability]:
    """The requests that find out what a server answers for: each yielded, its answer or its refusal sent back.

    A server that ignores the ids tells one token, the likeliest. One that heeds them tells the asked one too; of
    two tokens at least one is not the likeliest.
    """
    ask = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    for token in (0, 1):
        reply = yield complete(model, {**ask, "logprobs": 1, "logprob_token_ids": [token]})
        if isinstance(reply, RefusedError):
            break
        top = _top(choices(reply, 1)[0])
        if token not in top:
            break
        if len(top) > 1:
            return Ability(0)
    count = _MOST_TOP
    while True:
        reply = yield complete(model, {**ask, "logprobs": count})
        if not isinstance(reply, RefusedError):
            return Ability(min(count, len(_top(choices(reply, 1)[0]))))
        smaller = [int(number) for number in re.findall(r"\d+", str(reply)) if 0 < int(number) < count]
        if not smaller:
            raise reply
        count = smaller[-1]


def choose_model(reply: Json, model: str, *, server: str) -> tuple[str, int]:
    """The server's own name of `model`, and the length of its context, from its list of models; within `sense`.

    Raises:
        ModelError: if the server does not have the model.
        BackendError: if it does not tell the length of its context.
    """
    served = [(card["id"], card.get("root"), card.get("max_model_len")) for card in reply["data"]]
    wanted = [model]
    if model not in {name for card in served for name in card[:2]}:
        with suppress(ICLError):  # a name that means something to the server only
            wanted.append(locate(model))
    for name, root, length in served:
        if name in wanted or root in wanted:
            if not isinstance(length, int):
                raise BackendError(
                    f"the server at {server} does not tell the context of {name!r} (max_model_len); "
                    "expected a vLLM server"
                )
            return name, length
    raise ModelError(
        f"the server at {server} has {', '.join(repr(name) for name, _, _ in served) or 'no model'}, "
        f"expected {model!r}; name what it has, or start another one: icl vllm {model} --port 8001"
    )


@contextmanager
def sense(server: str) -> Iterator[None]:
    """While an answer is read: what is not as vLLM answers becomes an error with the server's address."""
    try:
        yield
    except _NoLogprobError as error:
        raise BackendError(
            f"the server at {server} gave log-probabilities that are none ({error}); check that the "
            "model's weights are complete, and that the server was started without --logprobs-mode"
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(
            f"the server at {server} answered what no vLLM answers ({type(error).__name__}: {error})"
        ) from error


def choices(reply: Json, count: int) -> list[Json]:
    """The `count` choices of an answer, in the order of the prompts."""
    found: list[Json] = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
    if len(found) != count:
        raise ValueError(f"{len(found)} choices, expected {count}")
    return found


def _top(choice: Json) -> dict[int, float]:
    """Log-probability by token, of the first token generated."""
    found: Json = choice["logprobs"]["top_logprobs"][0]
    if not found:
        raise ValueError("no log-probabilities")
    return {_token(name): _logprob(value) for name, value in found.items()}


def drawn(choice: Json) -> tuple[list[int], list[float]]:
    """The tokens generated, and their log-probabilities."""
    found: Json = choice["logprobs"]
    return [_token(name) for name in found["tokens"]], [_logprob(value) for value in found["token_logprobs"]]


def _token(name: str) -> int:
    """The number in `token_id:198`."""
    if not name.startswith(_TOKEN):
        raise ValueError(f"{name!r} is not written like {_TOKEN}198")
    return int(name.removeprefix(_TOKEN))


def _logprob(value: float | None) -> float:
    if value is None or not math.isfinite(value) or value > _ROUNDING:
        raise _NoLogprobError(f"{value}")
    return float(value)


def computed(reply: Json, lengths: Sequence[int]) -> int:
    """Tokens of the prompts that did not come from the cache, of which the last one is always computed."""
    details: Json = reply["usage"].get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return sum(length - min(cached, length - 1) for length in lengths)


class _NoLogprobError(Exception):
    pass
