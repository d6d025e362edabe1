"""Ours: a program of `icl compile`; dense retrieval, 16 shots packed by their exact tokens, the prompts as tokens.

`one by one` asks for one query at a time, as a server does.
"""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lookup import Found, Job, Table, run

from icl_compiler import compile as compiling
from icl_compiler import encoders
from icl_compiler.data import Dataset
from icl_compiler.templates import Template

ONE_BY_ONE = Path(sys.argv[2]).stem == "icl-one-by-one"


def load(job: Job) -> object:
    encoders.named_encoder = lambda name: Table(job)
    data = Dataset(tuple(job.texts), tuple(job.labels), "classification", "pool")
    plain = Template.from_name("classify")
    program = compiling.compile_program(data, model=job.model, shots=job.shots, budget=8192, template=plain.name)

    def make(queries: list[str]) -> Found:
        prompts = [program.prompts([text])[0] for text in queries] if ONE_BY_ONE else program.prompts(queries)
        texts = [[job.texts[row] for row in prompt.selection.rows] for prompt in prompts]
        return Found(texts, sum(len(prompt.tokens) for prompt in prompts))

    return make, version("icl-compiler")


if __name__ == "__main__":
    run(load)
