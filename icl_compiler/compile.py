"""From a dataset to a program: choose the rows, encode them as shots, index them.

Nothing here runs the base model; only its tokenizer is read, and the encoder unless the retriever is uniform, bm25 or
coverage.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from jaxtyping import Int64

from icl_compiler.calibration.law import NO_CALIBRATION, Calibration
from icl_compiler.data import Dataset
from icl_compiler.encoders import encoder_of, joint_encoder, reads, with_base
from icl_compiler.errors import BudgetError, DataError, EnsembleError, RegistryError
from icl_compiler.layouts import Expected, Layout, computed_tokens, make_blocks
from icl_compiler.models import locate
from icl_compiler.program import SAME_FOR_ALL, Program, Settings, encode_pool
from icl_compiler.reading import Reading
from icl_compiler.registry import RETRIEVERS, did_you_mean, resolve
from icl_compiler.reranker import Reranker
from icl_compiler.selection import Order, joined
from icl_compiler.templates import EncodedTemplate, Template
from icl_compiler.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from retrievers.retriever import Encoder, Resources, Retriever
from retrievers.static import Static

Notify = Callable[[str], object]
"""Called with a sentence about the pass that begins."""

_USUAL = 0.99  # of the rows are no longer than the room that a block leaves for the query
_ASKED = 100  # rows whose prompts say what is to be expected

DEFAULT_TEMPLATES = {"classification": "classify", "generation": "generate"}


def compile_program(
    data: Dataset,
    *,
    model: str = "smollm2-135m",
    encoder: str = "minilm",
    template: str | None = None,
    retriever: str = "dense",
    shots: int | None = None,
    budget: int = 1024,
    examples: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    per_label: int = 0,
    layout: Layout = "per-query",
    clusters: int | None = None,
    cache_block: int = 16,
    block_share: float = 0.5,
    ensembles: int = 1,
    notify: Notify | None = None,
) -> Program:
    """Make a program of `data` for the frozen `model`.

    Args:
        encoder: model of sentence embeddings; `base` is what the base model makes of a text (`reading`), and `A+B` are
            two encoders side by side.
        retriever: name in the table, or `package.module:Class`; `static` is a random set until a search chooses one.
        template: name in `prompts/` or path of a Jinja file; by default the plain one for the task.
        shots: most shots in a prompt; 0 for none. By default 16, in `mixed` 8, in other blocks all that fit.
        budget: most tokens in a prompt, its answer included.
        examples: how many rows of `data` the pool takes (a nested, label-balanced draw); by default all.
        order: of the shots; by default the best last, and best first where all prompts have the same.
        per_label: take candidates in rounds of so many of each label; 0: labels do not matter.
        layout: whether prompts begin with a fixed block of shots: see `layouts`.
        clusters: number of blocks of `clustered` and `mixed`; by default half the root of the number of rows.
        cache_block: tokens of a block of the engine's prefix cache: of vLLM 16 on a GPU, and 32 on a processor as
            `icl vllm` starts it.
        block_share: share of the shots, and of the tokens for them, that the block takes in `mixed`; in (0, 1).
        ensembles: prompts for each text; the shots of each are others, and the label probabilities are averaged.

    Raises:
        RegistryError: if there is no such retriever, order or layout.
        DataError: if `data` has no rows, or fewer than `examples`, or no labels to order shots by.
        LabelError: if a label word is a prefix of another.
        EnsembleError: if several prompts are wanted for targets, or where all would be the same.
        BudgetError: if not even the instruction fits the budget.
    """
    notify = notify or (lambda _: None)
    _require_known("order", order, get_args(Order))
    _require_known("layout", layout, get_args(Layout))
    if shots is not None and shots < 0:
        raise DataError(f"shots should be >= 0, is now {shots}")
    if cache_block < 1 or (clusters is not None and clusters < 1) or not 0 < block_share < 1:
        raise DataError(
            "clusters and cache_block should be >= 1 and block_share lie between 0 and 1, are now "
            f"{clusters}, {cache_block} and {block_share}"
        )
    if per_label < 0:
        raise DataError(f"per_label should be >= 0, is now {per_label}")
    if not len(data):
        raise DataError(f"{data.source} has no rows to compile")
    if ensembles < 1:
        raise DataError(f"ensembles should be >= 1, is now {ensembles}")
    if ensembles > 1 and data.task == "generation":
        raise EnsembleError(f"{data.source} has targets, and only the probabilities of labels can be averaged")
    if ensembles > 1 and (layout in ("shared", "clustered") or shots == 0):
        raise EnsembleError(
            f"all {ensembles} prompts of a text would be the same, as it has no shots of its own; choose --layout "
            "per-query or mixed and --shots of 1 or more, or leave --ensembles out"
        )
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
    reading = None
    if reads(encoder):
        notify(f"reading {len(pool_data):,} rows with {model}")
        reading = Reading.fitted_to(pool_data.texts, model, encoded)
    notify(f"indexing them with {retriever}")
    index = new_retriever(retriever, encoder=joint_encoder(encoder, reading), seed=seed)
    index.fit(pool_data.texts)
    order = order or ("best-first" if retriever in SAME_FOR_ALL else "best-last")
    if shots is None:
        shots = {"per-query": 16, "mixed": 8}.get(layout, budget)
    settings = Settings(
        model,
        encoder,
        retriever,
        shots,
        budget,
        order,
        seed,
        per_label,
        layout,
        clusters or 0,
        cache_block,
        block_share,
        ensembles,
    )
    return laid_out(Program(settings, data.task, encoded, pool, index, reading=reading))


def _require_known(what: str, name: str | None, known: Collection[str]) -> None:
    """Nothing, if `name` is one of `known`, or `None`.

    >>> _require_known("layout", "cluster", ["shared", "clustered"])
    Traceback (most recent call last):
    icl_compiler.errors.RegistryError: unknown layout 'cluster'. Did you mean 'clustered'? Available: shared, clustered.
    """
    if name is not None and name not in known:
        raise RegistryError(f"unknown {what} {name!r}. {did_you_mean(str(name), known)}")


def laid_out(program: Program) -> Program:
    """The program with the blocks that its settings ask for, and what its prompts are expected to cost."""
    settings, pool = program.settings, program.pool
    rows, head = len(pool.data), len(program.template.head)
    tokens = np.diff(pool.offsets)
    room = settings.budget - head - max((len(word) for word in program.label_words), default=0)
    blocks = None
    if settings.layout != "per-query" and rows:
        share = settings.block_share if settings.layout == "mixed" else 1.0
        usual = int(np.quantile(tokens, _USUAL, method="higher"))
        blocks = make_blocks(
            pool.data.texts,
            tokens,
            encoder=encoder_of(program),
            clusters=1 if settings.layout == "shared" else settings.clusters or max(1, round(rows**0.5 / 2)),
            head=head,
            room=int(share * (room - min(usual, room // 4))),
            shots=int(share * settings.shots),
            cache_block=settings.cache_block,
            seed=settings.seed,
        )
    program = replace(program, blocks=blocks, expected=None)
    return replace(program, expected=_expected(program, np.flatnonzero(tokens <= room)))


def _expected(program: Program, rows: Int64[np.ndarray, " rows"]) -> Expected | None:
    """The cost of prompts for rows of the pool: some that stand in no block, if there are such."""
    blocks = program.blocks
    if blocks is not None and len(free := np.setdiff1d(rows, blocks.rows)):
        rows = free
    if not len(rows):
        return None
    drawn = np.random.default_rng(program.settings.seed).permutation(rows)[:_ASKED]
    sets = program.prompt_sets([program.pool.data.texts[row] for row in drawn])
    prompts = [prompt.tokens for prompts in sets for prompt in prompts]
    head = np.array(program.template.head, dtype=np.int64)
    held = [head]
    if blocks is not None:
        held = [
            np.append(head, joined(program.pool.tokens, program.pool.offsets, blocks[i])) for i in range(len(blocks))
        ]
    computed = computed_tokens(prompts, cache_block=program.settings.cache_block, held=held)
    texts = len(sets)
    return Expected(sum(len(tokens) for tokens in prompts) / texts, float(computed.sum()) / texts)


def zero_shot_program(
    labels: tuple[str, ...], template: Template, *, model: str, tokenizer_model: str | None = None
) -> Program:
    """A program without shots, only the template around the query; also how a fine-tuned model is asked.

    Without labels it generates.
    """
    encoded = EncodedTemplate.build(template, load_tokenizer(tokenizer_model or model), labels)
    empty = Dataset((), (), "classification" if labels else "generation", "none")
    settings = Settings(model, "minilm", "uniform", 0, 1_000_000, "best-first", 0)
    index = new_retriever("uniform", encoder=joint_encoder("minilm", None), seed=0)
    index.fit(())
    return Program(settings, empty.task, encoded, encode_pool(encoded, empty), index)


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
    if program.reading is not None:
        program = replace(program, reading=program.reading.fitted(data.texts))
    index = refitted(program, data.texts)
    place = {text: row for row, text in enumerate(data.texts)}
    places = np.array([place.get(text, -1) for text in program.pool.data.texts], dtype=np.int64)
    bare = replace(program, pool=encode_pool(program.template, data), retriever=index)
    bare = replace(bare, voters=None, calibration=NO_CALIBRATION, reranker=None)
    if program.reranker is not None:
        bare = with_reranker(bare, program.reranker.moved(places, len(data)))
    return with_calibration(laid_out(bare), program.calibration.moved(places))


def with_calibration(program: Program, calibration: Calibration) -> Program:
    """The program with another calibration, and with a dense index of its pool if that counts votes and it has none."""
    program = replace(program, calibration=calibration)
    return with_dense(program) if calibration.neighbours else program


def with_reranker(program: Program, reranker: Reranker) -> Program:
    """The program with its candidates reranked, and with a dense index of its pool if it has none."""
    return with_dense(replace(program, reranker=reranker))


def with_reading(program: Program) -> Program:
    """The program that compares texts by what its base model makes of them, too.

    Raises:
        ModelError: if the model cannot be loaded here.
    """
    settings, texts = program.settings, program.pool.data.texts
    reading = program.reading or Reading.fitted_to(texts, settings.model, program.template)
    settings = replace(settings, encoder=with_base(settings.encoder))
    read = replace(program, settings=settings, reading=reading, voters=None)
    read = replace(read, retriever=refitted(read, texts))
    return laid_out(read if program.voters is None else with_dense(read))


def with_dense(program: Program) -> Program:
    """The program with a dense index of its pool, if it has none."""
    if program.dense is not None:
        return program
    voters = new_retriever("dense", encoder=encoder_of(program), seed=program.settings.seed)
    voters.fit(program.pool.data.texts)
    return replace(program, voters=voters)


def refitted(program: Program, texts: Sequence[str]) -> Retriever:
    """A retriever like the program's, over other texts; a set that was chosen stays chosen."""
    index = new_retriever(program.settings.retriever, encoder=encoder_of(program), seed=program.settings.seed)
    if isinstance(program.retriever, Static) and isinstance(index, Static):
        index.choose(program.retriever.chosen)
    index.fit(texts)
    return index


def without_rows(program: Program, texts: Collection[str]) -> tuple[Program, int]:
    """The program without the rows whose text stands in `texts`, and how many rows that were."""
    data, dropped = program.pool.data.without_texts(texts)
    return (with_pool(program, data), dropped) if dropped else (program, 0)


def new_retriever(name: str, *, encoder: Encoder, seed: int, trusted: bool = True) -> Retriever:
    """An empty retriever by its name in the table; `encoder` is loaded only if it is used."""
    found = resolve("retriever", RETRIEVERS, name, trusted=trusted)
    lacking = [part for part in ("score_meaning", "fit", "search", "save", "load") if not hasattr(found, part)]
    if lacking:
        raise RegistryError(f"{name!r} is no retriever, it has no {', '.join(lacking)}; see retrievers/retriever.py")
    made: Retriever = found(Resources(seed=seed, encoder=encoder))
    return made


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model by its name."""
    return ByteTokenizer() if model == "echo" else HFTokenizer(locate(model, kind="language model"))
