"""LangChain: its SemanticSimilarityExampleSelector on its FAISS vector store, in its FewShotPromptTemplate.

Prompts are strings; nothing is tokenised, and no budget is kept.
"""

from importlib.metadata import version

from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import Embeddings
from langchain_core.example_selectors import SemanticSimilarityExampleSelector
from langchain_core.prompts import FewShotPromptTemplate, PromptTemplate
from lookup import INSTRUCTION, Found, Job, Table, run


class Shared(Embeddings):
    def __init__(self, job: Job) -> None:
        self._table = Table(job)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._table.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self._table.encode([text])[0].tolist()


def load(job: Job) -> object:
    examples = [{"text": text, "label": label} for text, label in zip(job.texts, job.labels, strict=True)]
    selector = SemanticSimilarityExampleSelector.from_examples(
        examples, Shared(job), FAISS, k=job.shots, input_keys=["text"]
    )
    template = FewShotPromptTemplate(
        example_selector=selector,
        example_prompt=PromptTemplate.from_template("Text: {text}\nLabel: {label}"),
        prefix=INSTRUCTION,
        suffix="Text: {text}\nLabel:",
        input_variables=["text"],
    )

    def make(queries: list[str]) -> Found:
        prompts = [template.format(text=text) for text in queries]
        return Found(prompts, sum(map(len, prompts)))

    return make, f"{version('langchain-core')}, community {version('langchain-community')}"


if __name__ == "__main__":
    run(load)
