"""The project's own dataset: customer messages in 16 intents, drawn from a grammar whose label law is known.

A demo needs sentences that are nobody else's, and a measure needs a truth. Here each message carries the law
p(label | text) that its label was drawn from: the distance of any predictor to the truth can be computed, and
none can be expected to be right more often than `bayes_accuracy`. Kinds of message, with their shares:

- `plain` (40 %): what happened, a request, or both, with small talk around it.
- `typo` (15 %): a plain message with one to three slips: swapped, missing, doubled or neighbouring keys.
- `negated` (15 %): another intent is named and denied; the label is the intent that is not denied.
- `two_intents` (15 %): two intents are named; the label is the request that is open. The other one is
  settled, withdrawn, or put off, before or behind it.
- `ambiguous` (15 %): vague, or hesitating between two intents; the label is a draw from the message's law.

Choices:

- The law is exact, not estimated: every other kind has one possible label, and no text comes from two laws
  (a test draws 12,000 from six seeds and looks).
- Messages that differ only in case and punctuation count as the same text: train and test must not overlap.
- Message number i depends on the seed and on the messages before it, never on how many are asked for.
- The words stand in `messages_grammar.py`; intents share them, so that neighbours and word counts are fooled.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from icl_compiler import messages_grammar as grammar
from icl_compiler.errors import DataError

Kind = Literal["plain", "typo", "negated", "two_intents", "ambiguous"]

INTENTS: Final[tuple[str, ...]] = tuple(grammar.PHRASES)
SHARES: Final[Mapping[Kind, float]] = {
    "plain": 0.40,
    "typo": 0.15,
    "negated": 0.15,
    "two_intents": 0.15,
    "ambiguous": 0.15,
}
MAX_MESSAGES: Final = 20_000

_KEY_ROWS: Final = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@dataclass(frozen=True)
class Message:
    """One row: `law[i]` is the true probability of `INTENTS[i]` given `text`; `label` is one draw from it."""

    text: str
    label: str
    law: tuple[float, ...]
    kind: Kind


def generate(n: int, *, seed: int) -> list[Message]:
    """`n` messages with distinct texts; equal seeds give equal messages, and fewer are the first of more.

    `n` is between 0 and `MAX_MESSAGES`.

    Raises:
        DataError: if `n` is outside that range (beyond it, new texts become rare), or `seed` is negative.

    >>> message = generate(3, seed=0)[2]
    >>> message.label in INTENTS, sum(message.law)
    (True, 1.0)
    """
    if not 0 <= n <= MAX_MESSAGES:
        raise DataError(f"n should be between 0 and {MAX_MESSAGES} distinct messages, is now {n}")
    if seed < 0:
        raise DataError(f"seed should be >= 0, is now {seed}")
    rng = np.random.default_rng(seed)
    messages: list[Message] = []
    seen: set[str] = set()
    while len(messages) < n:
        message = _Draft(rng).message()
        key = "".join(filter(str.isalnum, message.text.casefold()))
        if key not in seen:
            seen.add(key)
            messages.append(message)
    return messages


def train_test(n_train: int = 4000, n_test: int = 1000, *, seed: int = 0) -> tuple[list[Message], list[Message]]:
    """`n_train` messages to learn from and `n_test` others, with no text in both.

    Raises:
        DataError: if either number is negative, or both together exceed `MAX_MESSAGES`.

    >>> train, test = train_test(20, 5, seed=1)
    >>> len(train), len(test)
    (20, 5)
    """
    if n_train < 0 or n_test < 0:
        raise DataError(f"n_train and n_test should be >= 0, are now {n_train} and {n_test}")
    messages = generate(n_train + n_test, seed=seed)
    return messages[:n_train], messages[n_train:]


def bayes_accuracy(messages: Sequence[Message]) -> float:
    """The expected accuracy of who knows the law and answers its most likely label, in (0, 1].

    Raises:
        DataError: if there are no messages.

    >>> law = (0.7, 0.3) + (0.0,) * 14
    >>> bayes_accuracy([Message("Could I ...", INTENTS[1], law, "ambiguous")])
    0.7
    """
    if not messages:
        raise DataError("the Bayes accuracy needs at least one message, got none")
    return float(np.mean([max(message.law) for message in messages]))


def require_messages(path: Path) -> None:
    """Check that a file may be replaced by messages: it is not there, or it holds messages.

    Raises:
        DataError: if it holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        ours = isinstance(row, dict) and list(row) == ["text", "label", "law", "kind"]
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise DataError(f"{path} is there and holds no messages of `icl messages`; choose another folder, or move it")


def write_jsonl(messages: Sequence[Message], path: str | os.PathLike[str]) -> None:
    """Write one JSON row per message: text, label, law (intents of probability above 0), kind.

    The file appears whole or not at all: it is written beside `path` and then renamed.

    Raises:
        DataError: if `path` cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "messages.jsonl")
    ...     write_jsonl(generate(2, seed=0), path)
    ...     [list(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    [['text', 'label', 'law', 'kind'], ['text', 'label', 'law', 'kind']]
    """
    target = Path(path)
    rows = (
        {
            "text": message.text,
            "label": message.label,
            "law": {intent: p for intent, p in zip(INTENTS, message.law, strict=True) if p > 0},
            "kind": message.kind,
        }
        for message in messages
    )
    try:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a file name, such as "."
        raise DataError(f"cannot write the messages to {str(target)!r}: {error}") from error


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line for line in block.splitlines() if line)


def _phrases(block: str) -> dict[str, tuple[str, ...]]:
    parts: dict[str, tuple[str, ...]] = {}
    for line in _lines(block):
        part, _, phrases = line.partition(": ")
        parts[part] = parts.get(part, ()) + tuple(phrases.split(" / "))
    parts["near"] = tuple(parts["near"][0].split(", "))
    return parts


def _vague(block: str) -> tuple[tuple[dict[str, float], tuple[str, ...]], ...]:
    themes = []
    for theme in block.split("law: ")[1:]:
        law, *phrases = _lines(theme)
        shares = (share.rpartition(" ") for share in law.split(", "))
        themes.append(({intent: float(p) for intent, _, p in shares}, tuple(phrases)))
    return tuple(themes)


_PARTS: Final = ("fact", "ask", "want", "done", "deny", "topic")
_PHRASES: Final = {intent: _phrases(block) for intent, block in grammar.PHRASES.items()}
_VAGUE: Final = _vague(grammar.VAGUE)
_FORMS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "plain": _lines(grammar.PLAIN),
    "typo": _lines(grammar.PLAIN),
    "negated": _lines(grammar.NEGATED),
    "two_intents": _lines(grammar.TWO_INTENTS),
}
_HESITATIONS: Final = grammar.HESITATIONS
_OPENERS: Final = _lines(grammar.OPENERS)
_CLOSERS: Final = _lines(grammar.CLOSERS)
_ASIDES: Final = _lines(grammar.ASIDES)
_SLOTS: Final = {name: tuple(values.split("|")) for name, values in grammar.SLOTS.items()}


class _Draft:
    """One message in the making; it remembers what its slots were filled with."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._slots: dict[str, str] = {}

    def message(self) -> Message:
        kind = tuple(SHARES)[self._rng.choice(len(SHARES), p=list(SHARES.values()))]
        if kind == "ambiguous":
            law, body = self._ambiguous()
        else:
            intent = self._pick(INTENTS)
            law, body = {intent: 1.0}, self._one_intent(self._pick(_FORMS[kind]), intent)
        text = self._text(body)
        probabilities = tuple(law.get(intent, 0.0) for intent in INTENTS)
        label = INTENTS[self._rng.choice(len(INTENTS), p=probabilities)]
        return Message(self._with_slips(text) if kind == "typo" else text, label, probabilities, kind)

    def _one_intent(self, form: str, intent: str) -> str:
        denied = "{want2}" in form or "{deny2}" in form
        other = self._pick(_PHRASES[intent]["near"] if denied else tuple(i for i in INTENTS if i != intent))
        return self._expand(form, intent, other)

    def _ambiguous(self) -> tuple[dict[str, float], str]:
        if self._rng.random() < 0.6:
            law, phrases = _VAGUE[self._rng.integers(len(_VAGUE))]
            return law, self._expand(self._pick(phrases))
        pair = grammar.PAIRS[self._rng.integers(len(grammar.PAIRS))]
        first, second = pair if self._rng.random() < 0.5 else pair[::-1]
        p, form = _HESITATIONS[self._rng.integers(len(_HESITATIONS))]
        return {first: p, second: round(1 - p, 2)}, self._expand(form, first, second)

    def _text(self, body: str) -> str:
        sentences = [body]
        if self._rng.random() < 0.22:
            sentences.insert(int(self._rng.integers(2)), self._expand(self._pick(_ASIDES)))
        if self._rng.random() < 0.15:
            sentences.append(self._expand(self._pick(_CLOSERS)))
        text = " ".join(s if s[-1] in ".?" else s + "." for s in sentences)
        text = re.sub(r" +([ .,])", r"\1", text)  # an empty branch leaves two blanks, or one before a stop
        if self._rng.random() < 0.25:
            text = f"{self._pick(_OPENERS)} {text}"
        if self._rng.random() < 0.18:
            return text.lower().rstrip(".")
        return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)

    def _expand(self, template: str, intent: str = "", other: str = "") -> str:
        while (choice := re.search(r"\(([^()]*)\)", template)) is not None:
            template = template[: choice.start()] + self._pick(choice[1].split("|")) + template[choice.end() :]
        return re.sub(r"\{(\w+)\}", lambda slot: self._fill(slot[1], intent, other), template)

    def _fill(self, name: str, intent: str, other: str) -> str:
        base = name.rstrip("2345")
        if base in _PARTS:
            phrases = _PHRASES[other if name != base else intent][base]
            return self._expand(self._pick(phrases))
        if name == "n":
            return str(self._rng.integers(6, 190))
        while name not in self._slots:
            value = self._expand(self._pick(_SLOTS[base]))
            if value not in self._slots.values():
                self._slots[name] = value
        return self._slots[name]

    def _with_slips(self, text: str) -> str:
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
        for i in self._rng.permutation(long)[: self._rng.integers(1, 4)]:
            words[i] = self._slip(words[i])
        return " ".join(words)

    def _slip(self, word: str) -> str:
        at = int(self._rng.integers(1, len(word) - 1))
        before, key, behind = word[:at], word[at], word[at + 1 :]
        match self._rng.integers(4):
            case 0 if behind[0] != key:
                return before + behind[0] + key + behind[1:]
            case 1:
                return before + behind
            case 2:
                return before + key + key + behind
            case _:
                row = next((row for row in _KEY_ROWS if key in row), key)
                column = row.find(key)
                return before + row[column - 1 if column else min(1, len(row) - 1)] + behind

    def _pick(self, among: Sequence[str]) -> str:
        return among[int(self._rng.integers(len(among)))]
