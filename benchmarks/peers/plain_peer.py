"""Two marks to measure by, both with the plain model of `transformers`: brute force, and the limit.

- `brute force`: one whole forward for each prompt and label word, one after the other.
- `limit`: bare forwards of the base model over the token sequences given (those that no two prompts share); causal,
  without a mask, a cache, an output layer or anything done with the result. No exact method that computes each of
  these tokens can be faster with the same kernels. A size of 1 is sequence by sequence; with a larger one, whole
  sequences are joined until they have that many tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from contender import Contender, Job, Text, load_plain, run


class BruteForce(Contender):
    setting = "batch size 1"
    version = transformers.__version__

    def __init__(self, job: Job) -> None:
        self.model = load_plain(job)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        return [[self._one(prompt.ids, word.ids) for word in label_words] for prompt in prompts]

    def _one(self, prompt: list[int], word: list[int]) -> float:
        ids = torch.tensor([prompt + word], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, len(prompt) :, None]).double().sum().item()


class Limit(Contender):
    version = transformers.__version__

    def __init__(self, job: Job) -> None:
        self.model: Any = load_plain(job)
        self._size = 1

    @property
    def setting(self) -> str:
        return "query by query" if self._size == 1 else f"forwards of {self._size} tokens"

    def use(self, size: int) -> None:
        self._size = size

    @torch.inference_mode()
    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        for ids in self._joined(prompts):
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            float(states[0, -1, 0])
        return [[] for _ in prompts]

    def _joined(self, prompts: Sequence[Text]) -> Iterator[torch.Tensor]:
        gathered: list[int] = []
        for i, prompt in enumerate(prompts):
            gathered += prompt.ids
            if len(gathered) >= self._size or i == len(prompts) - 1:
                yield torch.tensor([gathered], device=self.model.device)
                gathered = []


if __name__ == "__main__":
    run(lambda job: Limit(job) if job.contender == "limit" else BruteForce(job))
