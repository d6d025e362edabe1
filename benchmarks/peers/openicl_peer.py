"""OpenICL: its PPLInferencer, which ranks labels by the perplexity of the whole prompt with each of them.

- Its template is reduced to the text and the label word; the text holds our shots already, so its retriever is the one
  that retrieves nothing.
- It was written for transformers 4.28. What of it is used here runs on newer ones as it is, but
  its sums go to numpy, which has no bfloat16, so the output layer's logits are handed to it as float32.
- A mean over all tokens of prompt and label word gives log-probabilities up to a constant per prompt.
- Its batches are prompts with the same label.
"""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from contender import Contender, Job, Text, load_plain, require_same_tokens, run
from datasets import Dataset, DatasetDict
from openicl import DatasetReader, PPLInferencer, PromptTemplate, ZeroRetriever
from transformers import AutoTokenizer

SHOTS, TEXT = "</shots>", "</text>"


class Perplexity(Contender):
    relative = True

    def __init__(self, job: Job) -> None:
        logging.disable(logging.INFO)
        self.version = version("openicl")
        self.model = load_plain(job)
        self.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits.float())
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        require_same_tokens(lambda text: tokenizer(text)["input_ids"], job)
        self._folder = tempfile.TemporaryDirectory()
        self._inferencer = PPLInferencer(self.model, tokenizer, output_json_filepath=self._folder.name)

    @property
    def setting(self) -> str:
        return f"batch size {self._inferencer.batch_size}"

    def use(self, size: int) -> int:
        self._inferencer.batch_size = size
        return size

    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        rows = Dataset.from_dict(
            {"prompt": [prompt.text for prompt in prompts], "label": [label_words[0].text] * len(prompts)}
        )
        reader = DatasetReader(DatasetDict(train=rows, test=rows), input_columns=["prompt"], output_column="label")
        templates = {word.text: SHOTS + TEXT + word.text for word in label_words}
        template = PromptTemplate(templates, {"prompt": TEXT}, ice_token=SHOTS)
        with contextlib.redirect_stderr(io.StringIO()):
            self._inferencer.inference(ZeroRetriever(reader), prompt_template=template)
        found = json.loads(Path(self._folder.name, "predictions.json").read_text(encoding="utf-8"))
        return [
            [-found[str(i)][f"label: {word.text}"]["PPL"] * (len(prompt.ids) + len(word.ids)) for word in label_words]
            for i, prompt in enumerate(prompts)
        ]


if __name__ == "__main__":
    run(Perplexity)
