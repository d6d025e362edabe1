"""LangChain: its SemanticSimilarityExampleSelector on its FAISS vector store, in its FewShotPromptTemplate.

Prompts are strings; nothing is tokenised, and no budget is kept. Rows are chosen by its
MaxMarginalRelevanceExampleSelector on the same store, with its own weight of diversity, among the 20 nearest as by
default, or as many as are asked for.
"""

from importlib.metadata import version

from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import Embeddings
from langchain_core.example_selectors import MaxMarginalRelevanceExampleSelector, SemanticSimilarityExampleSelector
from langchain_core.prompts import FewShotPromptTemplate, PromptTemplate
from lookup import INSTRUCTION, Chosen, Found, Job, Table, run


class Shared(Embeddings):
    def __init__(self, job: Job) -> None:
        self._table = Table(job)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._table.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self._table.encode([text])[0].tolist()


VERSION = f"{version('langchain-core')}, community {version('langchain-community')}"


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

    return make, VERSION


def choose(job: Job) -> Chosen:
    examples = [{"text": text, "row": str(row)} for row, text in enumerate(job.texts)]
    selector = MaxMarginalRelevanceExampleSelector.from_examples(
        examples, Shared(job), FAISS, k=job.shots, fetch_k=max(20, job.shots), input_keys=["text"]
    )
    rows = [[int(each["row"]) for each in selector.select_examples({"text": text})] for text in job.queries]
    return Chosen(rows, "best-first", VERSION)


if __name__ == "__main__":
    run(load, choose)
