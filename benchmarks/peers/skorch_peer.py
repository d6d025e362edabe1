"""skorch: `predict_proba` of its FewShotClassifier, not normalised, the label words as its classes.

- Its template is reduced to the text, which holds our shots already; it samples none of its own.
- Its cache is on, as by default: label words that begin alike share the logits of that beginning. The prompt itself
  goes through the model once for every label word whose logits are not in the cache.
- The cache is kept from query to query, as by default: `predict_proba` never empties it.
"""

import math
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from contender import Contender, Job, Text, load_plain, require_same_tokens, run
from skorch.llm import FewShotClassifier
from transformers import AutoTokenizer


class FewShot(Contender):
    setting = "use_caching=True"

    def __init__(self, job: Job) -> None:
        warnings.filterwarnings("ignore", message="The prompt may not be correct")
        self.version = version("skorch")
        self.model = load_plain(job)
        self._tokenizer = AutoTokenizer.from_pretrained(job.model)
        require_same_tokens(lambda text: self._tokenizer(text)["input_ids"], job)
        self._classes: list[str] = []

    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        if self._classes != [word.text for word in label_words]:
            self._fit(label_words)
        probabilities = self._classifier.predict_proba([prompt.text for prompt in prompts]).tolist()
        ours = [self._column[word.text] for word in label_words]
        return [[math.log(row[i]) if row[i] else -math.inf for i in ours] for row in probabilities]

    def forget(self) -> None:
        self._classifier.clear_model_cache()

    def _fit(self, label_words: Sequence[Text]) -> None:
        self._classes = [word.text for word in label_words]
        self._classifier = FewShotClassifier(
            model=self.model, tokenizer=self._tokenizer, prompt="{text}", probas_sum_to_1=False, max_samples=1
        )
        self._classifier.fit(self._classes, self._classes)
        self._column = {name: i for i, name in enumerate(self._classifier.classes_.tolist())}
        encoded = {name: self._classifier.label_ids_[i] for name, i in self._column.items()}
        if any(encoded[word.text] != word.ids for word in label_words):
            raise SystemExit("skorch encodes a label word as other tokens than ours; nothing was measured")


if __name__ == "__main__":
    run(FewShot)
