"""From a dataset to a program: choose the rows, encode them as shots, index them.

Nothing here runs the base model; only its tokenizer is read, and the encoder unless the retriever is uniform, bm25 or
coverage.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache

from icl_compiler.data import Dataset
from icl_compiler.errors import BudgetError, DataError, RegistryError
from icl_compiler.models import cache_folder, locate
from icl_compiler.program import SAME_FOR_ALL, Program, Settings, encode_pool
from icl_compiler.registry import RETRIEVERS, resolve
from icl_compiler.selection import Order
from icl_compiler.templates import EncodedTemplate, Template
from icl_compiler.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from retrievers.encoder import SentenceEncoder
from retrievers.retriever import Resources, Retriever

Notify = Callable[[str], object]
"""Called with a sentence about the pass that begins."""

DEFAULT_TEMPLATES = {"classification": "classify", "generation": "generate"}


def compile_program(
    data: Dataset,
    *,
    model: str = "smollm2-135m",
    encoder: str = "minilm",
    template: str | None = None,
    retriever: str = "dense",
    shots: int = 16,
    budget: int = 1024,
    examples: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    per_label: int = 0,
    notify: Notify | None = None,
) -> Program:
    """Make a program of `data` for the frozen `model`.

    Args:
        template: name in `prompts/` or path of a Jinja file; by default the plain one for the task.
        shots: most shots in a prompt; 0 for none.
        budget: most tokens in a prompt, its answer included.
        examples: how many rows of `data` the pool takes (a nested, label-balanced draw); by default all.
        order: of the shots; by default the best last, and best first where all prompts have the same.
        per_label: take candidates in rounds of so many of each label; 0: labels do not matter.

    Raises:
        DataError: if `data` has no rows, or fewer than `examples`, or no labels to order shots by.
        LabelError: if a label word is a prefix of another.
        BudgetError: if not even the instruction fits the budget.
    """
    notify = notify or (lambda _: None)
    if shots < 0:
        raise DataError(f"shots should be >= 0, is now {shots}")
    if per_label < 0:
        raise DataError(f"per_label should be >= 0, is now {per_label}")
    if not len(data):
        raise DataError(f"{data.source} has no rows to compile")
    if data.task == "generation" and (per_label or order == "by-label"):
        raise DataError(f"{data.source} has targets, and no labels that shots could be ordered or balanced by")
    pool_data = data if examples is None else data.subset(examples, seed=seed)
    tokenizer = load_tokenizer(model)
    text_template = Template.from_name(DEFAULT_TEMPLATES[data.task] if template is None else template)
    labels = data.labels if data.task == "classification" else ()
    encoded = EncodedTemplate.build(text_template, tokenizer, labels)
    longest = max((len(word) for word in encoded.label_words()), default=0)
    if len(encoded.head) + longest >= budget:
        raise BudgetError(
            f"the instruction has {len(encoded.head)} tokens and the longest answer {longest}, which leaves "
            f"no room for a query in a budget of {budget}; choose a larger --budget"
        )
    notify(f"encoding {len(pool_data):,} rows as shots")
    pool = encode_pool(encoded, pool_data)
    notify(f"indexing them with {retriever}")
    index = new_retriever(retriever, encoder=encoder, seed=seed)
    index.fit(pool_data.texts)
    order = order or ("best-first" if retriever in SAME_FOR_ALL else "best-last")
    settings = Settings(model, encoder, retriever, shots, budget, order, seed, per_label)
    return Program(settings, data.task, encoded, pool, index)


def zero_shot_program(
    labels: tuple[str, ...], template: Template, *, model: str, tokenizer_model: str | None = None
) -> Program:
    """A program without shots, only the template around the query; also how a fine-tuned model is asked."""
    encoded = EncodedTemplate.build(template, load_tokenizer(tokenizer_model or model), labels)
    empty = Dataset((), (), "classification", "none")
    settings = Settings(model, "minilm", "uniform", 0, 1_000_000, "best-first", 0)
    index = new_retriever("uniform", encoder="minilm", seed=0)
    index.fit(())
    return Program(settings, "classification", encoded, encode_pool(encoded, empty), index)


def with_pool(program: Program, data: Dataset) -> Program:
    """The same program over another pool with the same labels.

    Raises:
        DataError: if `data` has no rows.
    """
    if not len(data):
        raise DataError(
            "no row is left in the program's pool: all of them stand in the test data too; "
            "evaluate on texts that the pool does not hold"
        )
    index = new_retriever(program.settings.retriever, encoder=program.settings.encoder, seed=program.settings.seed)
    index.fit(data.texts)
    return replace(program, pool=encode_pool(program.template, data), retriever=index)


def without_rows(program: Program, texts: Collection[str]) -> tuple[Program, int]:
    """The program without the rows whose text stands in `texts`, and how many rows that were."""
    data, dropped = program.pool.data.without_texts(texts)
    return (with_pool(program, data), dropped) if dropped else (program, 0)


def new_retriever(name: str, *, encoder: str, seed: int, trusted: bool = True) -> Retriever:
    """An empty retriever by its name in the table; `encoder` is loaded only if it is used."""
    found = resolve("retriever", RETRIEVERS, name, trusted=trusted)
    lacking = [part for part in ("score_meaning", "fit", "search", "save", "load") if not hasattr(found, part)]
    if lacking:
        raise RegistryError(f"{name!r} is no retriever, it has no {', '.join(lacking)}; see retrievers/retriever.py")
    made: Retriever = found(Resources(seed=seed, encoder=named_encoder(encoder)))
    return made


@cache
def named_encoder(name: str) -> SentenceEncoder:
    """The encoder `name`, one for all retrievers of this process; its model is loaded on first use.

    What it encodes in a compilation stays in the folder `vectors` of the cache, for the next one.
    """
    return SentenceEncoder(lambda: locate(name, kind="encoder"), cache=cache_folder() / "vectors")


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model by its name."""
    return ByteTokenizer() if model == "echo" else HFTokenizer(locate(model, kind="language model"))
