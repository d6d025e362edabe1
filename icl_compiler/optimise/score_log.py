"""What the model said of each prompt, kept at once: a search that was killed goes on and pays for no prompt twice.

- A line of the file is what was asked at once, keyed by content: the model, where and how it runs, what is scored, and
  the tokens of each prompt. So the file may outlive a change of the command: what still fits is used.
- All prompts of a line stand or fall together: half a line, as a killed process leaves it, is asked again in the same
  company. What a model says in bfloat16 depends on that company.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from icl_compiler.errors import ArtifactError
from icl_compiler.tokenizer import TokenIds

Answer = list[list[float]]
"""What is known of one prompt: one row of numbers, or a lower and an upper one."""


class ScoreLog:
    """Answers by prompt.

    Args:
        path: the file; what stands there is used, and further lines are appended. `None` keeps nothing on the disk.

    >>> log = ScoreLog(None)
    >>> log.answers("echo", [[1, 2], [3], [1, 2]], lambda prompts: [[[float(len(prompt))]] for prompt in prompts])
    [[[2.0]], [[1.0]], [[2.0]]]
    >>> log.asked
    2
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._kept: dict[str, Answer] = {} if path is None else _read(path)
        self._used: set[str] = set()

    @property
    def asked(self) -> int:
        """How many different prompts were asked about, by this process or the one before it."""
        return len(self._used)

    def answers(
        self, about: str, prompts: Sequence[TokenIds], ask: Callable[[list[TokenIds]], list[Answer]]
    ) -> list[Answer]:
        """The answer to each prompt; `ask` is called once, with those that are new.

        Args:
            about: what else an answer depends on: the model, its device, what is scored.
        """
        keys = [_key(about, prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._kept}
        if new:
            found = dict(zip(new, ask(list(new.values())), strict=True))
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)  # the program is written when all is done
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
            self._kept |= found
        self._used |= set(keys)
        return [self._kept[key] for key in keys]


def _key(about: str, prompt: TokenIds) -> str:
    return sha256(f"{about}\n{' '.join(map(str, prompt))}".encode()).hexdigest()


def _read(path: Path) -> dict[str, Answer]:
    """What stands in the file; half a line at its end is cut off.

    Raises:
        ArtifactError: if it is no such file.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found: dict[str, Answer] = {}
    try:
        for line in whole.decode().splitlines():
            found |= {str(key): list(answer) for key, answer in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} does not hold the answers of a search ({error}); move it, or choose another name for the program"
        ) from error
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return found
