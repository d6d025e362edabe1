"""DSPy: its KNNFewShot around a Predict, up to the prompt that its adapter hands to the language model.

The language model answers at once and does nothing. No demonstration is bootstrapped (which would call it), the 16
nearest are taken as they are.

Rows are those of its KNN, which KNNFewShot asks; it then shuffles them, in the same way for every query.
"""

from importlib.metadata import version
from typing import Any

import dspy
from lookup import INSTRUCTION, Chosen, Found, Job, Table, run


class Silent(dspy.BaseLM):
    """Keeps the prompt, and says the same always."""

    def __init__(self) -> None:
        super().__init__(model="silent")
        self.prompts: list[str] = []

    def forward(self, prompt: Any = None, messages: Any = None, **settings: Any) -> Any:
        self.prompts.append("\n".join(message["content"] for message in messages))
        from litellm import ModelResponse

        said = "[[ ## label ## ]]\nnone\n\n[[ ## completed ## ]]"
        return ModelResponse(choices=[{"message": {"content": said, "role": "assistant"}}], usage={}, model="silent")


def load(job: Job) -> object:
    model = Silent()
    dspy.configure(lm=model, adapter=dspy.ChatAdapter())
    examples = [
        dspy.Example(text=text, label=label).with_inputs("text")
        for text, label in zip(job.texts, job.labels, strict=True)
    ]
    optimizer = dspy.KNNFewShot(
        k=job.shots,
        trainset=examples,
        vectorizer=vectorizer(job),
        max_bootstrapped_demos=0,
        max_labeled_demos=job.shots,
    )
    program = optimizer.compile(dspy.Predict(dspy.Signature("text -> label", INSTRUCTION)))

    def make(queries: list[str]) -> Found:
        model.prompts.clear()
        for text in queries:
            program(text=text)
        return Found(list(model.prompts), sum(map(len, model.prompts)))

    return make, version("dspy")


def choose(job: Job) -> Chosen:
    examples = [dspy.Example(text=text, row=row).with_inputs("text") for row, text in enumerate(job.texts)]
    nearest = dspy.KNN(k=job.shots, trainset=examples, vectorizer=vectorizer(job))
    return Chosen([[each.row for each in nearest(text=text)] for text in job.queries], "random", version("dspy"))


def vectorizer(job: Job) -> dspy.Embedder:
    table = Table(job)
    return dspy.Embedder(lambda texts: table.encode([text.removeprefix("text: ") for text in texts]), caching=False)


if __name__ == "__main__":
    run(load, choose)
