"""lm-evaluation-harness: `loglikelihood` of its model class HFLM, on (prompt, label word) pairs of strings.

- It groups label words that differ in their last token only, and takes all the others apart.
- Its own defaults otherwise; in bfloat16 it then takes the softmax in bfloat16 too.
- Where its tokens of the strings would differ from ours, it is given ours, by the method that `loglikelihood` calls.
"""

from collections.abc import Sequence
from importlib.metadata import version

from contender import DEVICE, Contender, Job, Text, run, same_tokens
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


class Harness(Contender):
    def __init__(self, job: Job) -> None:
        self.version = version("lm-eval")
        self._lm = HFLM(pretrained=job.model, dtype=job.dtype, device=DEVICE, batch_size=1)
        self.model = self._lm.model
        self._labels = len(job.label_words)
        self._strings = same_tokens(self._lm.tok_encode, job)

    @property
    def setting(self) -> str:
        return f"batch size {self._lm.batch_size}" + ("" if self._strings else ", our tokens")

    def use(self, size: int) -> int:
        """Several batches at a time, for it sorts by length before it cuts batches."""
        self._lm.batch_size_per_gpu = size
        return 1 if size == 1 else -(-4 * size // self._labels)

    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        pairs = [(prompt, word) for prompt in prompts for word in label_words]
        if self._strings:
            requests = [Instance("loglikelihood", {}, (prompt.text, word.text), 0) for prompt, word in pairs]
            answers = self._lm.loglikelihood(requests, disable_tqdm=True)
        else:
            encoded = [((prompt.text, word.text), prompt.ids, word.ids) for prompt, word in pairs]
            answers = self._lm._loglikelihood_tokens(encoded, disable_tqdm=True)
        width = len(label_words)
        return [[each for each, _ in answers[i : i + width]] for i in range(0, len(answers), width)]


if __name__ == "__main__":
    run(Harness)
