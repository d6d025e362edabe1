"""Text to token ids and back, for one model.

- The program writes prompts as token ids, so everything it needs of a tokenizer is here, behind a small
  protocol: the Hugging Face one, and one token per byte for the `echo` backend.
- Text of users is encoded as plain text: `<|im_end|>` inside a message is eleven characters, never the
  end of a turn.
- A piece is encoded in its context. Some tokenizers put a blank before the first word of whatever they are
  given; encoding `context + piece` and cutting the context off gives the ids the piece has inside a prompt.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError as JinjaError

from icl_compiler.errors import ModelError, TemplateError

TokenIds = Sequence[int] | Int[np.ndarray, " _"]


@runtime_checkable
class Tokenizer(Protocol):
    """What a program needs of a tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any text may be encoded differently."""

    @property
    def bos(self) -> list[int]:
        """Ids that stand before every prompt of this model; often none."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that plain text never gives."""

    def encode(self, texts: Sequence[str], *, context: str = "", special: bool = False) -> list[list[int]]:
        """Ids of each text as it stands after `context`; `special`: markup like `<|im_end|>` is one token."""

    def decode(self, ids: TokenIds) -> str:
        """The text of `ids`, special tokens included."""

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """The text of a conversation by the model's own chat template."""


class HFTokenizer:
    """A tokenizer of Hugging Face `transformers`, from a folder or a hub name."""

    def __init__(self, model: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        except Exception as error:  # the library has no errors of its own for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"no tokenizer could be loaded from {str(model)!r} ({reason}); "
                "expected a folder with tokenizer files, a name on the model hub, or one of `icl models list`"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        backend = self._tokenizer.backend_tokenizer.to_str()
        template = self._tokenizer.chat_template or ""
        return sha256(f"{backend}\0{template}\0{self.bos}".encode()).hexdigest()

    @cached_property
    def bos(self) -> list[int]:
        with_special: list[int] = self._tokenizer("a").input_ids
        [plain] = self.encode(["a"])
        return with_special[: with_special.index(plain[0])]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str], *, context: str = "", special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            [context + text for text in texts],
            add_special_tokens=False,
            split_special_tokens=not special,
            verbose=False,
        ).input_ids
        if not context:
            return encoded
        head = self._context(context, special)
        for text, ids in zip(texts, encoded, strict=True):
            if ids[: len(head)] != head:
                raise TemplateError(
                    f"the tokenizer merges {context[-20:]!r} with the text after it, {text[:40]!r}; "
                    "end that part of the template with a newline or punctuation, "
                    "and start the next one with a letter or a blank"
                )
        return [ids[len(head) :] for ids in encoded]

    def _context(self, context: str, special: bool) -> list[int]:
        """The tokens of `context`, which is the same few texts again and again."""
        key = context, special
        if key not in self._contexts:
            [self._contexts[key]] = self.encode([context], special=special)
        return self._contexts[key]

    @cached_property
    def _contexts(self) -> dict[tuple[str, bool], list[int]]:
        return {}

    def decode(self, ids: TokenIds) -> str:
        text: str = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise TemplateError("this model has no chat template; use a plain one, such as `--template classify`")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_next
            )
        except JinjaError as error:
            raise TemplateError(
                f"the model's chat template refuses the conversation ({error}); "
                "use a plain template, such as `--template classify`"
            ) from error
        return text


class ByteTokenizer:
    """One token per byte of UTF-8, 256 for the end of a turn: what the `echo` backend reads.

    >>> ByteTokenizer().encode(["ab"])
    [[97, 98]]
    """

    fingerprint = "bytes"
    bos: list[int] = []  # noqa: RUF012 - never changed
    special_ids = frozenset({256})
    _end = "\x03"

    def encode(self, texts: Sequence[str], *, context: str = "", special: bool = False) -> list[list[int]]:
        def ids(text: str) -> list[int]:
            codes = list(text.encode())
            return [256 if special and code == 3 else code for code in codes]

        return [ids(text) for text in texts]

    def decode(self, ids: TokenIds) -> str:
        return bytes(3 if i == 256 else i for i in ids).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        turns = "".join(f"{m['role']}\n{m['content']}{self._end}\n" for m in messages)
        return turns + ("assistant\n" if answer_next else "")
