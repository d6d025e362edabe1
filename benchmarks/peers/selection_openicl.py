"""OpenICL: its TopkRetriever, and its templates, up to the prompt of each query.

Its model of sentence embeddings is the table that all contenders share; what it does around that (it tokenises and
decodes each text again, one at a time) is its own. It was written for transformers 4: the method that version 5 has no
more is given back, and one of its own takes the argument that version 5 adds.
"""

import logging
from importlib.metadata import version

import numpy as np
from datasets import Dataset, DatasetDict
from lookup import INSTRUCTION, Found, Job, Table, run
from openicl import DatasetReader, PromptTemplate
from openicl.icl_retriever import icl_topk_retriever
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


def load(job: Job) -> object:
    logging.disable(logging.INFO)
    Shared.table = Table(job)
    icl_topk_retriever.SentenceTransformer = Shared
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
    retriever = icl_topk_retriever.TopkRetriever(
        reader, ice_num=job.shots, tokenizer_name=job.model, sentence_transformers_model_name="the table"
    )
    return make, version("openicl")


if __name__ == "__main__":
    run(load)
