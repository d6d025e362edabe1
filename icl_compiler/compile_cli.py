"""`icl compile`: labelled data in, a program out."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icl_compiler.command_line import (
    FiniteNumber,
    OutputFolder,
    TableName,
    WholeNumber,
    counted,
    engine_options,
    json_option,
    model_option,
    print_json,
    progress_bar,
    say,
    seed_option,
    template_option,
)
from icl_compiler.data_options import Columns, column_options, test_option
from icl_compiler.registry import CALIBRATIONS, REFERENCES, RETRIEVERS, resolve

if TYPE_CHECKING:
    from icl_compiler.backends.backend import Backend
    from icl_compiler.calibration.choosing import Choice
    from icl_compiler.data import Dataset
    from icl_compiler.layouts import Layout
    from icl_compiler.optimise.judges import Metric
    from icl_compiler.predictor import Predictor
    from icl_compiler.program import Program
    from icl_compiler.selection import Order

# Rows that a reference was not trained on; with fewer it is approximated on those it knows, too.
ENOUGH_OTHERS = 50


@click.command("compile")
@click.argument("data")
@click.option(
    "-o", "--output", type=OutputFolder(), required=True, help="Program to write; one that is there is replaced."
)
@click.option(
    "-O",
    "level",
    type=click.Choice(["0", "1", "2", "3"]),
    default="1",
    help="How hard to look for good prompts. 0: random shots. 1: the nearest ones. 2: retriever, number, order and "
    "balance of the shots and the template are searched on held-out rows, which runs the language model. 3: "
    "what 2 does, then other instructions, and a reranker that learns which shots help the model.",
)
@click.option(
    "--search-queries",
    type=WholeNumber(min=1),
    show_default="1500; 3000 at -O3",
    help="Most prompts that -O2 or -O3 asks the model.",
)
@click.option(
    "--time-limit",
    type=FiniteNumber(min=0, min_open=True),
    metavar="MINUTES",
    show_default="none",
    help="After which a search takes the best so far; what that is depends on the machine.",
)
@click.option(
    "--metric",
    type=click.Choice(["likelihood", "exact-match"]),
    default="likelihood",
    help="What a search judges generated targets by; labels are judged by log-loss.",
)
@model_option
@click.option(
    "--shots",
    type=WholeNumber(min=0),
    show_default="16; mixed: 8; other layouts: as many as fit",
    help="Most shots (labelled examples) in a prompt.",
)
@click.option("--budget", default=1024, type=WholeNumber(min=1), help="Most tokens in a prompt, its answer included.")
@click.option(
    "--retriever",
    type=TableName("retriever", RETRIEVERS),
    show_default="dense; uniform at -O0",
    help="How the shots for a text are found: dense (by meaning), bm25 (by words), hybrid (both), mmr or dpp (near, "
    "and unlike each other), coverage (together they hold the words of the text), cluster (its theme first), or the "
    "same for every text: votek (typical and diverse), uniform (random), static (a set that -O2 chooses on held-out "
    "rows).",
)
@click.option(
    "--encoder",
    metavar="NAME",
    show_default="minilm; from -O2 on minilm+base, where neighbours vote better with it",
    help="Model of sentence embeddings, by which texts are near each other. NAME+base: what the language model makes "
    "of a text counts, too (twice as much); it then reads each query once more, in this process. Not used by "
    "uniform, bm25 and coverage.",
)
@click.option(
    "--order",
    type=click.Choice(["best-last", "best-first", "random", "by-label"]),
    show_default="best-last; best-first if all texts get the same",
    help="How the shots stand in the prompt; random is drawn anew for each text, and always the same for one.",
)
@click.option(
    "--per-label",
    type=WholeNumber(min=1),
    metavar="N",
    show_default="labels do not matter",
    help="Take shots in rounds of N of each label, so that one label does not fill the prompt. With --retriever "
    "uniform that is a balanced set.",
)
@click.option(
    "--layout",
    default="per-query",
    type=click.Choice(["per-query", "shared", "clustered", "mixed"]),
    help="per-query: each text has shots of its own. The others begin with a fixed block of shots, which a server "
    "with a prefix cache computes once: one for all (shared), one for each cluster of texts (clustered), or such "
    "a block and shots of the text's own behind it (mixed).",
)
@click.option(
    "--search-layouts",
    is_flag=True,
    help="Let -O2 or -O3 choose the layout too: the fewest tokens to compute among those that are not worse.",
)
@click.option(
    "--clusters",
    type=WholeNumber(min=1),
    show_default="half the root of the number of rows",
    help="Blocks of the layouts clustered and mixed. More fit better; each is computed once.",
)
@click.option(
    "--cache-block",
    default=16,
    type=WholeNumber(min=1),
    help="Tokens that the server's prefix cache keeps together: 16 on a GPU, 32 on a processor with `icl vllm`.",
)
@click.option(
    "--block-share",
    default=0.5,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Share of the shots, and of their tokens, that is the block's in the layout mixed.",
)
@click.option(
    "--ensembles",
    type=WholeNumber(min=1),
    metavar="S",
    show_default="1; searched at -O3",
    help="Ask S prompts for each text and average the label probabilities. The nearest shots are dealt out among them, "
    "--shots to each; a text costs S prompts.",
)
@click.option(
    "--calibration",
    show_default="none; auto from -O2 on",
    metavar="NAME",
    type=TableName("calibration", {**CALIBRATIONS, "auto": ""}),
    help="Make the label probabilities mean what they say. auto: ask the model about rows of DATA, each without "
    "itself, and take the method that serves those best that it was not fitted to. Or one of "
    f"{', '.join(CALIBRATIONS)}.",
)
@click.option(
    "--calibrate-on",
    default=200,
    type=WholeNumber(min=10),
    metavar="N",
    help="Held-out rows asked to calibrate; a search has asked.",
)
@click.option(
    "--validation",
    metavar="DATA",
    help="Other labelled data to hold out, for search and calibration, in place of rows of DATA: where labels come as "
    "often as in use.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Calibrate towards the answers of the reference that `icl finetune` wrote there, not towards the labels.",
)
@template_option
@click.option("--examples", type=WholeNumber(min=1), show_default="all", help="Rows of DATA to use, label-balanced.")
@test_option
@click.option(
    "--from-feedback",
    metavar="[NAME=]FILE",
    help="Put in the corrections that `icl serve` keeps in FILE for the program NAME (default: the output's name).",
)
@column_options
@engine_options
@seed_option
@json_option
def compile_command(
    data: str,
    output: Path,
    level: str,
    search_queries: int | None,
    time_limit: float | None,
    metric: "Metric",
    model: str,
    encoder: str | None,
    template: str | None,
    retriever: str | None,
    shots: int | None,
    budget: int,
    order: "Order | None",
    per_label: int | None,
    layout: "Layout",
    search_layouts: bool,
    clusters: int | None,
    cache_block: int,
    block_share: float,
    ensembles: int | None,
    examples: int | None,
    test: str | None,
    from_feedback: str | None,
    columns: Columns,
    calibration: str | None,
    calibrate_on: int,
    validation: str | None,
    reference: Path | None,
    backend: str | None,
    server: str | None,
    in_flight: int | None,
    dtype: str,
    seed: int,
    as_json: bool,
) -> None:
    """Turn labelled DATA into a program, which makes prompts.

    DATA is a CSV, TSV, JSONL, JSON or Parquet file, a folder that Hugging Face datasets saved
    (FOLDER or FOLDER:SPLIT), or hf:NAME[:SPLIT]. A program is a folder. Up to -O1 compiling does not run the
    language model, unless to calibrate; dense retrieval runs its encoder over all rows. -O2 and -O3 search; a
    setting that you name stays as you say, and a search that is killed goes on with the same command.

    \b
      icl compile train.csv -o program
      icl compile train.csv -o program --label-column intent --budget 2048
      icl compile train.csv -o program --where lang=de --per-label 2
      icl compile train.csv -o program -O2 --budget 512 --time-limit 30
      icl compile train.csv -o program --layout clustered --clusters 20
      icl compile train.csv -o program --calibration auto --validation dev.csv
      icl compile hf:ag_news -o program --examples 1000 --test test.csv
    """
    from icl_compiler.artifact import require_replaceable, save_program
    from icl_compiler.calibration.calibrating import WITH_OWN_PROMPTS
    from icl_compiler.compile import compile_program
    from icl_compiler.optimise.levels import DEFAULT_RETRIEVERS, QUERIES, SEARCHES
    from icl_compiler.optimise.trace import table
    from icl_compiler.predictor import open_backend

    searches = int(level) in SEARCHES
    calibration = calibration or ("auto" if searches else "none")
    if not searches and (time_limit or search_layouts):
        raise click.UsageError(f"-O{level} does not search; --time-limit and --search-layouts are for -O2 and -O3")
    if not searches and calibration == "none" and (backend or server or in_flight or dtype != "auto"):
        raise click.UsageError(
            f"-O{level} runs no model without --calibration; --backend, --server, --in-flight and --dtype are for it, "
            "and for -O2 and -O3"
        )
    if not searches and retriever == "static":
        raise click.UsageError(f"-O{level} chooses no set of shots; --retriever static is for -O2 and -O3")
    require_replaceable(output, kind="program")
    if not searches and calibration == "none" and reference:
        raise click.UsageError("--reference says what to calibrate towards; give --calibration auto too, or -O2")
    if not searches and calibration == "none" and validation:
        raise click.UsageError(
            f"-O{level} holds nothing out; --validation is for --calibration auto, and for -O2 and -O3"
        )
    if calibration == "knn" and validation:
        raise click.UsageError("--calibration knn keeps what the model says of rows of DATA; leave --validation out")
    dataset = columns.load(data)
    warnings = list(dataset.warnings)
    corrections = 0
    if from_feedback is not None:
        dataset, corrections = _with_feedback(dataset, from_feedback, output)
    held_out = None if validation is None else columns.load(validation)
    warnings += () if held_out is None else held_out.warnings
    if test is not None:
        dataset, dropped = columns.without_test(dataset, test)
        warnings += dropped
        if held_out is not None:
            held_out, dropped = columns.apart_from(held_out, test)
            warnings += dropped
    for warning in warnings:
        say(f"Warning: {warning}")
    program = compile_program(
        dataset,
        model=model,
        encoder=encoder or "minilm",
        template=template,
        retriever=retriever or DEFAULT_RETRIEVERS[int(level)],
        shots=shots,
        budget=budget,
        examples=examples,
        seed=seed,
        order=order,
        per_label=per_label or 0,
        layout=layout,
        clusters=clusters,
        cache_block=cache_block,
        block_share=block_share,
        ensembles=ensembles or 1,
        notify=say if sys.stderr.isatty() else None,
    )
    if too_long := _never_fit(program):
        warnings.append(f"{counted(too_long, 'row')} too long to be a shot in a prompt of {budget:,} tokens (--budget)")
        say(f"Warning: {warnings[-1]}")
    engine = None
    if searches or calibration != "none":
        engine = open_backend(backend, model, dtype=dtype, server=server, in_flight=in_flight)
    trace: list[dict[str, Any]] = []
    target, among = None, None
    if reference is not None:
        described = resolve("reference", REFERENCES, "folder")(reference)
        target = described.predictor(dtype=dtype)
        among, told = _not_trained_on(described, program.pool.data if held_out is None else held_out)
        for warning in told:
            say(f"Warning: {warning}")
        warnings += told
    later = calibration in WITH_OWN_PROMPTS or not searches  # else the search calibrates with what it asked
    if engine is not None and searches:
        named = {"retriever": retriever, "shots": shots, "order": order, "per_label": per_label, "template": template}
        named["encoder"] = encoder
        named["ensembles"] = ensembles or shots  # fewer shots a prompt are no more what was named
        log = output.with_name(f"{output.name}.search.jsonl")
        try:
            most = QUERIES[int(level)] if search_queries is None else search_queries
            with progress_bar("searching", most, "prompt") as advance:
                program, trace = SEARCHES[int(level)](
                    program,
                    engine,
                    fixed=frozenset(name for name, value in named.items() if value is not None),
                    queries=most,
                    time_limit_s=60 * (time_limit or math.inf),
                    calibrations=None if calibration == "auto" else ["none" if later else calibration],
                    reference=target,
                    among=among,
                    validation=held_out,
                    metric=metric,
                    layouts=search_layouts,
                    log=log,
                    progress=advance,
                )
        except BaseException:
            if log.exists():
                say(f"What the model said so far is kept in {log}; the same command goes on from there.")
            raise
    choice = None
    if engine is not None and later and calibration != "none":
        program, choice = _calibrated(program, engine, calibration, calibrate_on, target, among, held_out)
    save_program(program, output, trace=trace)
    if trace:
        log.unlink(missing_ok=True)
    summary: dict[str, Any] = {
        "program": str(output),
        "task": program.task,
        "rows": len(program.pool.data),
        "labels": len(program.labels),
        "corrections": corrections,
        "model": model,
        "level": int(level),
        "retriever": program.settings.retriever,
        "encoder": program.settings.encoder,
        "shots": program.settings.shots,
        "layout": program.settings.layout,
        "blocks": 0 if program.blocks is None else len(program.blocks),
        "expected": program.expected and program.expected._asdict(),
        "order": program.settings.order,
        "per_label": program.settings.per_label,
        "ensembles": program.settings.ensembles,
        "template": program.template.template.name,
        "budget": budget,
        "tokens_per_shot": round(len(program.pool.tokens) / max(1, len(program.pool.data)), 1),
        "search": trace[0] if trace else None,
        "calibration": {
            "method": program.calibration.method,
            "description": program.calibration.describe(),
            **(_told(choice) if choice else {}),
        },
        "warnings": warnings,
    }
    if as_json:
        print_json(summary)
        return
    if trace:
        click.echo(f"{table(trace)}\n")
    kind = f"{summary['labels']} labels" if program.labels else "text to text"
    corrected = f" ({counted(corrections, 'correction')} put in)" if from_feedback else ""
    click.echo(
        f"{output}: {counted(summary['rows'], 'row')}{corrected}, {kind}; {_shots_in_words(program)} "
        f"(about {summary['tokens_per_shot']:.0f} tokens each) into {budget:,} tokens for {model}"
    )
    if program.expected is not None:
        several = program.settings.ensembles > 1
        what = f"the {program.settings.ensembles} prompts of a text have" if several else "a prompt has"
        click.echo(
            f"{what} about {program.expected.prompt_tokens:,.0f} tokens, of which a server with a prefix cache "
            f"computes {program.expected.computed_tokens:,.0f}"
        )
    if choice is not None:
        for line in _candidate_lines(choice):
            click.echo(line)


def _calibrated(
    program: "Program",
    engine: "Backend",
    name: str,
    queries: int,
    reference: "Predictor | None",
    among: list[int] | None,
    validation: "Dataset | None",
) -> "tuple[Program, Choice]":
    """The program with the calibration `name`, or with what serves best on held-out rows."""
    from icl_compiler.calibration.calibrating import calibrate
    from icl_compiler.compile import with_calibration

    held_out = program.pool.data if validation is None else validation
    rows = len(held_out if among is None else among)
    with progress_bar("calibrating", min(queries, rows), "text") as advance:
        program, choice = calibrate(
            program,
            engine,
            queries=queries,
            candidates=None if name == "auto" else [name],
            reference=reference,
            among=among,
            validation=validation,
            seed=program.settings.seed,
            progress=advance,
        )
    if name != "auto":
        choice = choice.forced(name)
    return with_calibration(program, choice.calibration), choice


def _candidate_lines(choice: "Choice") -> list[str]:
    """What was compared, as a table, and what was taken."""
    headings = ["calibration", choice.risk, "accuracy"]
    cells = [
        [each.name, f"{each.risk:.3f} [{each.risk_low:.3f}, {each.risk_high:.3f}]", f"{each.accuracy:.3f}"]
        for each in choice.candidates
    ]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [headings, *cells]
    ]
    what = f"{choice.queries:,} rows of the pool, each answered without itself, and calibrated without its fold"
    return [
        "",
        *lines,
        f"on {what}; {choice.usage.computed_tokens:,} tokens computed",
        f"taken: {choice.calibration.describe()}",
        f"because {choice.why}",
    ]


def _told(choice: "Choice") -> dict[str, Any]:
    """The same for machines."""
    return {
        "why": choice.why,
        "risk": choice.risk,
        "queries": choice.queries,
        "computed_tokens": choice.usage.computed_tokens,
        "candidates": [
            {"method": each.name, **each._asdict()} | {"calibration": each.calibration.describe()}
            for each in choice.candidates
        ],
    }


def _shots_in_words(program: "Program") -> str:
    settings, blocks = program.settings, program.blocks
    if blocks is None:
        several = f"{settings.ensembles} times " * (settings.ensembles > 1)
        reranked = ", reranked," * (program.reranker is not None)
        return f"{settings.retriever} retrieval{reranked} of {several}up to {settings.shots} shots"
    least, most = int(blocks.sizes.min()), int(blocks.sizes.max())
    sizes = counted(most, "shot") if least == most else f"{least} to {most} shots"
    one = f"{len(blocks)} fixed blocks of {sizes}" if len(blocks) > 1 else f"one fixed block of {sizes}"
    return f"{one}, then {settings.retriever} retrieval" if settings.layout == "mixed" else one


def _with_feedback(dataset: "Dataset", given: str, output: Path) -> "tuple[Dataset, int]":
    """The rows with the corrections of a program put in, and how many those are."""
    from icl_compiler.corrections import amended
    from icl_compiler.feedback import read_corrections

    name, equals, file = given.rpartition("=")
    found = read_corrections(Path(file), name if equals else output.resolve().name)
    return amended(dataset, [(correction.text, correction.label) for correction in found]), len(found)


def _not_trained_on(reference: Any, data: "Dataset") -> tuple[list[int] | None, list[str]]:
    """Rows to ask the reference about: those it was not trained on, if they are enough; else a warning."""
    trained = reference.trained_on(data.texts)
    if trained is None or not trained.any():
        return None, []
    others = [row for row, known in enumerate(trained.tolist()) if not known]
    if len(others) >= ENOUGH_OTHERS:
        return others, []
    return None, [
        f"the reference was trained on {counted(int(trained.sum()), 'row')} of {data.source}, and answers these more "
        f"surely than others; it is approximated on them, too, as {counted(len(others), 'other row')} would be too few "
        f"(of {ENOUGH_OTHERS}): fine-tune it on other rows, or with a larger --held-out, or give other rows "
        "with --validation"
    ]


def _never_fit(program: "Program") -> int:
    """How many rows of the pool are longer than the room for shots beside the shortest query."""
    template = program.template
    [query] = template.queries(["a"])
    answer = max((len(word) for word in program.label_words), default=0)
    room = program.settings.budget - len(template.head) - len(query) - answer
    sizes = program.pool.offsets[1:] - program.pool.offsets[:-1]
    return int((sizes > room).sum()) if program.settings.shots else 0
