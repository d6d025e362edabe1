"""Our own contender: `label_logprobs` of the transformers backend, all queries in one call.

The backend says what an answer cost; that it says the truth is checked against the hook.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from contender import Contender, Counter, Job, Text, run

from icl_compiler.backends.hf_transformers import TransformersBackend


class Ours(Contender):
    setting = "all queries in one call"

    def __init__(self, job: Job) -> None:
        self.version = version("icl-compiler")
        self._backend = TransformersBackend(job.model, job.dtype)
        self.model = self._backend.network
        self._counter = Counter(self.model)

    def use(self, size: int) -> None:
        return None

    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        before = self._counter.tokens
        scores = self._backend.label_logprobs([each.ids for each in prompts], [each.ids for each in label_words])
        counted = self._counter.tokens - before
        if counted != scores.usage.computed_tokens:
            sys.exit(f"the backend says that it computed {scores.usage.computed_tokens} tokens; it was {counted}")
        rows: list[list[float]] = scores.logprobs.tolist()
        return rows

    def forget(self) -> None:
        """The cache holds the beginning of the last prompt; this one has another."""
        self._backend.label_logprobs([[0]], [[0]])


if __name__ == "__main__":
    run(Ours)
