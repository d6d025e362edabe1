"""OpenICL: its TopkRetriever, and its templates, up to the prompt of each query.

Its model of sentence embeddings is the table that all contenders share; what it does around that (it tokenises and
decodes each text again, one at a time) is its own. It was written for transformers 4: the method that version 5 has no
more is given back, and one of its own takes the argument that version 5 adds.

Rows are chosen by its TopkRetriever, BM25Retriever, VotekRetriever or RandomRetriever, as the job says, with their own
settings. BM25 splits a text into words without splitting it into sentences first, for which a model would be
downloaded.
"""

import logging
import random
from functools import partial
from importlib.metadata import version

import numpy as np
from datasets import Dataset, DatasetDict
from lookup import INSTRUCTION, Chosen, Found, Job, Table, run
from openicl import DatasetReader, PromptTemplate
from openicl.icl_retriever import (
    BM25Retriever,
    RandomRetriever,
    TopkRetriever,
    VotekRetriever,
    icl_bm25_retriever,
    icl_topk_retriever,
)
from openicl.utils import collators
from transformers import PreTrainedTokenizerBase

PreTrainedTokenizerBase.encode_plus = PreTrainedTokenizerBase.__call__
_to = collators.ListWrapper.to
collators.ListWrapper.to = lambda self, device, **added: _to(self, device)


class Shared:
    """Stands in the place of SentenceTransformer."""

    table: Table

    def __init__(self, name: str) -> None:
        self.width = Shared.table.encode([]).shape[1]

    def to(self, device: str) -> "Shared":
        return self

    def eval(self) -> None:
        """Nothing to switch off."""

    def get_sentence_embedding_dimension(self) -> int:
        return int(self.width)

    def encode(self, texts: list[str], show_progress_bar: bool = False) -> np.ndarray:
        return Shared.table.encode(texts)


def share(job: Job) -> None:
    """Puts the table in the place of the model of sentence embeddings."""
    logging.disable(logging.INFO)
    Shared.table = Table(job)
    icl_topk_retriever.SentenceTransformer = Shared


def load(job: Job) -> object:
    share(job)
    pool = Dataset.from_dict({"text": job.texts, "label": job.labels})
    template = PromptTemplate(
        "</E>Text: </text>\nLabel: </label>", {"text": "</text>", "label": "</label>"}, ice_token="</E>"
    )

    def make(queries: list[str]) -> Found:
        asked = Dataset.from_dict({"text": queries, "label": [""] * len(queries)})
        reader = DatasetReader(DatasetDict(train=pool, test=asked), input_columns=["text"], output_column="label")
        retriever.dataset_reader, retriever.test_ds = reader, asked
        datalist = reader.generate_input_field_corpus(asked)
        retriever.encode_dataset = icl_topk_retriever.DatasetEncoder(datalist, tokenizer=retriever.tokenizer)
        collate = icl_topk_retriever.DataCollatorWithPaddingAndCuda(tokenizer=retriever.tokenizer, device="cpu")
        retriever.dataloader = icl_topk_retriever.DataLoader(retriever.encode_dataset, batch_size=1, collate_fn=collate)
        prompts = [
            INSTRUCTION
            + retriever.generate_prompt_for_generate_task(
                place, retriever.generate_ice(rows, ice_template=template), ice_template=template
            )
            for place, rows in enumerate(retriever.retrieve())
        ]
        return Found(prompts, sum(map(len, prompts)))

    first = Dataset.from_dict({"text": job.queries[:1], "label": [""]})
    reader = DatasetReader(DatasetDict(train=pool, test=first), input_columns=["text"], output_column="label")
    retriever = TopkRetriever(
        reader, ice_num=job.shots, tokenizer_name=job.model, sentence_transformers_model_name="the table"
    )
    return make, version("openicl")


def choose(job: Job) -> Chosen:
    share(job)
    random.seed(job.seed)  # VotekRetriever fills up at random where votes do not suffice
    icl_bm25_retriever.word_tokenize = partial(icl_bm25_retriever.word_tokenize, preserve_line=True)
    pool = Dataset.from_dict({"text": job.texts, "label": job.labels})
    asked = Dataset.from_dict({"text": job.queries, "label": [""] * len(job.queries)})
    reader = DatasetReader(DatasetDict(train=pool, test=asked), input_columns=["text"], output_column="label")
    dense = {"tokenizer_name": job.model, "sentence_transformers_model_name": "the table"}
    make = {
        "topk": partial(TopkRetriever, **dense),
        "votek": partial(VotekRetriever, **dense),
        "bm25": BM25Retriever,
        "random": partial(RandomRetriever, seed=job.seed),
    }[job.method]
    return Chosen(make(reader, ice_num=job.shots).retrieve(), "best-first", version("openicl"))


if __name__ == "__main__":
    run(load, choose)
