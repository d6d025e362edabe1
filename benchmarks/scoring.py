"""Exact label scoring beside four peers, and beside what no method can beat; about 1.5 hours on 2 cores.

    ICL_DATASETS=FOLDER python -m benchmarks scoring
    python -m benchmarks.scoring --exact       # float32: do all say the same? about ten minutes
    python -m benchmarks.scoring --memory      # 100, 1,000 and 10,000 queries; about fifteen minutes

Every contender scores the same label words after the same prompts with the same model on the same machine, in a fresh
process; `benchmarks/peers/` has a script for each. Leave the machine alone meanwhile.

- The prompts are those of `icl compile`: 1,200 examples of the training rows, 4 or 16 of them retrieved for each of the
  queries, which are drawn at random from the test rows. None is cut.
- The clock includes what a contender does with prompts in the form it takes them (strings or tokens), and neither
  loading nor warming up. After `--cap` seconds a contender begins no more queries, except that it does two. All
  take them in the same order, ours and the limit as many as should fit the cap, in one call.
- Where two contenders did different numbers of queries, their seconds are compared per token of the prompts.
- The limit is bare forwards over the tokens that no exact method can spare: each distinct beginning of a
  prompt once, and the inner nodes of the tree of label words. Ours and the limit alternate, three times each;
  seconds are medians, their ratio is the median of the three paired ones.
- A peer's batch size is the fastest of three in a trial of 16 pairs, in two rounds. OpenICL takes batches of prompts,
  each with one label word; with many labels a batch would outlast the cap, so there it gets one prompt at a time.
- Agreement is with brute force, on the queries that both did: the largest difference of log-probabilities, and the
  mean total variation of the labels' normalised probabilities. In bfloat16 brute force is itself rounded (a logit
  near 20 to an eighth), so the difference says how alike two roundings are; `--exact` says how far each is off.

Rows are appended to `benchmarks/rows/scoring.jsonl` (`scoring_exact.jsonl`, `scoring_memory.jsonl`), one object a line.
A contender whose row of this commit stands there is not measured again. At the end the table of `docs/results.md`
is printed.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.parts.kept import Row, data_folder, keep, rows_of
from benchmarks.peers.contender import DEVICE, Job, Text
from benchmarks.peers.environments import peers_python

HERE = Path(__file__).parent
ROWS = HERE / "rows"
WORK = Path("bench-scoring")
DATASETS = ("mr", "banking77", "clinc150_oos")
SHOTS = (4, 16)
EXAMPLES, SEED, BUDGET = 1200, 0, 4096
MODEL = "smollm2-135m"
WARM_UP = 16
FEWEST = 2
REPETITIONS = 3
TRIAL_PAIRS = 16
PEER_SIZES = (1, 4, 16)
LIMIT_SIZES = (1, 512, 1024)
MOST_PAIRS_AT_ONCE = 64
EXACT = (
    ("icl", "float32", "brute force", 1e-4),
    ("icl", "float32", "lm-eval", 1e-3),
    ("icl", "bfloat16", "brute force", None),
    ("lm-eval", "bfloat16", "brute force", None),
    ("brute force", "bfloat16", "brute force", None),
)
"""A contender, its number format, the contender in float32 that it is compared with, and the largest difference."""
MEMORY_QUERIES = (100, 1_000, 10_000)
SCRIPTS = {
    "icl": "icl_peer.py",
    "limit": "plain_peer.py",
    "brute force": "plain_peer.py",
    "lm-eval": "lm_eval_peer.py",
    "skorch": "skorch_peer.py",
    "openicl": "openicl_peer.py",
}
WITH_OUR_PACKAGES = ("icl", "limit", "brute force")
KEYS = (
    "dataset", "labels", "shots", "contender", "version", "setting", "queries", "seconds", "queries_per_second",
    "forwards_per_query", "computed_tokens_per_query", "prompt_tokens_per_query", "ratio_to_limit", "icl_speedup",
    "loaded_memory_mib", "peak_memory_mib", "max_difference", "mean_tv", "repetitions", "model", "dtype", "machine",
    "threads", "seed", "commit", "date",
)  # fmt: skip
"""Of each row, in this order."""
COLUMNS = {
    "dataset": "dataset", "labels": "labels", "shots": "shots", "contender": "contender", "setting": "setting",
    "queries": "queries", "queries/s": "queries_per_second", "forwards/query": "forwards_per_query",
    "tokens/query": "computed_tokens_per_query", "of the limit": "ratio_to_limit", "icl is faster by": "icl_speedup",
    "MiB loaded": "loaded_memory_mib", "MiB peak": "peak_memory_mib", "most off": "max_difference", "TV": "mean_tv",
}  # fmt: skip

Result = dict[str, Any]


class Setting(NamedTuple):
    """A dataset, a number of shots, and what they make: prompts and label words."""

    dataset: str
    shots: int
    prompts: list[Text]
    label_words: list[Text]
    warm_up: list[Text]

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.shots} shots"


def make_settings(data: Path, datasets: Sequence[str], shots: Sequence[int], queries: int) -> list[Setting]:
    """The prompts of every dataset with every number of shots, each holding all of its shots."""
    return [setting for name in datasets for setting in _settings_of(data, name, shots, queries)]


def _settings_of(data: Path, dataset: str, shots: Sequence[int], queries: int) -> list[Setting]:
    from icl_compiler.compile import compile_program
    from icl_compiler.data import load_dataset

    train, test = (load_dataset(data / dataset / f"{split}.jsonl") for split in ("train", "test"))
    if queries + WARM_UP > len(test):
        sys.exit(f"{dataset} has {len(test)} test rows; --queries should be at most {len(test) - WARM_UP}")
    program = compile_program(
        train, model=MODEL, shots=max(shots), budget=BUDGET, examples=EXAMPLES, seed=SEED, retriever="dense"
    )
    order = np.random.default_rng(SEED).permutation(len(test))
    texts = [test.texts[i] for i in [*order[:queries], *order[-WARM_UP:]]]
    decode = program.template.tokenizer.decode
    words = [Text(list(ids), decode(ids)) for ids in program.label_words]
    settings = []
    for count in shots:
        prompts = replace(program, settings=replace(program.settings, shots=count)).prompts(texts)
        if short := [prompt for prompt in prompts if len(prompt.selection.rows) < count]:
            sys.exit(f"{len(short)} prompts of {dataset} hold fewer than {count} shots; BUDGET is too small")
        made = [Text(list(prompt.tokens), decode(prompt.tokens)) for prompt in prompts]
        settings.append(Setting(dataset, count, made[:queries], words, made[queries:]))
    return settings


def unshared(prompts: Sequence[Sequence[int]], label_words: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each distinct prompt, in sorted order, the tokens of it that the one before does not begin with, and the
    inner nodes of the tree of label words.

    >>> unshared([[1, 2, 4], [1, 2, 3]], [[7, 9], [8, 9]])
    [[1, 2, 3, 7, 8], [4, 7, 8]]
    """
    from icl_compiler.prefix_tree import WordTree, common_prefix

    inner = WordTree.build(label_words).tokens.tolist()
    arrays = [np.array(prompt) for prompt in sorted({tuple(prompt) for prompt in prompts})]
    shared = [0, *(common_prefix(a, b) for a, b in pairwise(arrays))]
    return [array[count:].tolist() + inner for array, count in zip(arrays, shared, strict=True)]


class Bench(NamedTuple):
    """Runs jobs in processes of their own, and keeps what they answered."""

    model: str
    dtype: str
    cap_s: float
    commit: str | None

    def job(self, contender: str, setting: Setting, **changes: Any) -> Job:
        """Score the prompts of a setting until the cap; `changes` are other fields of the job."""
        job = Job(
            contender, self.model, self.dtype, setting.prompts, setting.label_words, setting.warm_up,
            self.cap_s, min(FEWEST, len(setting.prompts)), [1],
        )  # fmt: skip
        return replace(job, **changes)

    def answer(self, job: Job) -> Result:
        """What the job's contender answers; what it answered before, if this very commit asked it the same.

        Raises:
            RuntimeError: if the contender fails; holds the end of what it wrote.
        """
        written = json.dumps(asdict(job))
        digest = hashlib.sha256(f"{self.commit} {written}".encode()).hexdigest()[:16]
        stem = f"{job.contender.replace(' ', '-')}-{digest}"
        source, target, log = (WORK / f"{stem}.{end}" for end in ("job.json", "result.json", "log"))
        if not target.exists() or self.commit is None or self.commit.endswith("+"):
            WORK.mkdir(exist_ok=True)
            source.write_text(written, encoding="utf-8")
            python = sys.executable if job.contender in WITH_OUR_PACKAGES else str(peers_python())
            command = [python, str(HERE / "peers" / SCRIPTS[job.contender]), str(source), str(target)]
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            with log.open("w", encoding="utf-8") as output:
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | offline)
            if done.returncode:
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{tail}\n{job.contender} failed; the whole log is {log}")
        result: Result = json.loads(target.read_text(encoding="utf-8"))
        return result

    def fastest(self, job: Job, sizes: Sequence[int]) -> int:
        """The batch size that takes least time for the job's prompts."""
        if len(sizes) == 1:
            return sizes[0]
        seconds = self.answer(replace(job, sizes=list(sizes)))["seconds_by_size"]
        return int(min(seconds, key=seconds.__getitem__))

    def size_for(self, contender: str, setting: Setting) -> int:
        """The best batch size of a peer, by a trial of a few pairs of prompts and label words."""
        labels = len(setting.label_words)
        if contender == "lm-eval":
            words = min(TRIAL_PAIRS, labels)
            sizes: tuple[int, ...] = PEER_SIZES
        elif contender == "openicl":
            words = 1
            sizes = tuple(size for size in PEER_SIZES if size * labels <= MOST_PAIRS_AT_ONCE) or (1,)
        else:
            return 1
        trial = self.job(
            contender, setting, label_words=setting.label_words[:words], prompts=setting.warm_up[: TRIAL_PAIRS // words]
        )
        return self.fastest(trial, sizes)


class Marks(NamedTuple):
    """What the other contenders are measured by."""

    icl: list[Result]
    limit: list[Result]
    brute: Result


def measure_pairs(bench: Bench, setting: Setting) -> tuple[list[Result], list[Result]]:
    """Ours and the limit, in turns, on as many queries as fit the cap."""
    first = bench.answer(bench.job("icl", setting))
    prompts = setting.prompts[: first["queries"]]
    words = [word.ids for word in setting.label_words]

    def limit(prompts: Sequence[Text], **changes: Any) -> Job:
        bare = [Text(ids, "") for ids in unshared([prompt.ids for prompt in prompts], words)]
        return bench.job("limit", setting, prompts=bare, label_words=[], cap_s=None, **changes)

    size = bench.fastest(limit(setting.warm_up), LIMIT_SIZES)
    ours, limits = [first], []
    for repetition in range(REPETITIONS):
        if repetition:
            ours.append(bench.answer(bench.job("icl", setting, prompts=prompts, cap_s=None, repetition=repetition)))
        bare = bench.answer(limit(prompts, sizes=[size], repetition=repetition))
        limits.append(bare | {key: first[key] for key in ("queries", "prompt_tokens")})
    return ours, limits


def median_of(results: Sequence[Result]) -> Result:
    """One result of several of the same job: the median of their seconds, the largest of their memories."""
    return results[0] | {
        "seconds": statistics.median(each["seconds"] for each in results),
        "peak_memory_mib": max(each["peak_memory_mib"] for each in results),
        "repetitions": [round(each["seconds"], 3) for each in results],
    }


def agreement(result: Result, reference: Result) -> tuple[float, float] | None:
    """Largest difference of log-probabilities, and mean total variation over the labels, on the queries both did.

    Log-probabilities that are known up to a constant only are compared after both sides were normalised. A
    probability of 0, which some contenders give for an underflow, is left out of the first.
    """
    both = min(result["queries"], reference["queries"])
    if not result["logprobs"][0]:
        return None
    ours, theirs = (np.array(each["logprobs"][:both], dtype=float) for each in (result, reference))
    ours, theirs = (np.where(np.isnan(each), -np.inf, each) for each in (ours, theirs))
    normalised = [each - np.logaddexp.reduce(each, axis=1, keepdims=True) for each in (ours, theirs)]
    if result["relative"]:
        ours, theirs = normalised
    known = np.isfinite(ours) & np.isfinite(theirs)
    tv = np.abs(np.exp(normalised[0]) - np.exp(normalised[1])).sum(axis=1) / 2
    return float(np.abs(ours[known] - theirs[known]).max()), float(tv.mean())


def per_token(result: Result) -> float:
    """Seconds per token of the prompts that were scored."""
    return float(result["seconds"] / result["prompt_tokens"])


def make_row(setting: Setting, contender: str, result: Result, marks: Marks, facts: Row) -> Row:
    """The row of a contender; `facts` are machine, seed, commit and the like."""
    queries = result["queries"]
    ours, limit = median_of(marks.icl), median_of(marks.limit)
    ratio = per_token(limit) / per_token(result)
    if contender == "icl":
        pairs = zip(marks.limit, marks.icl, strict=True)
        ratio = statistics.median(bare["seconds"] / our["seconds"] for bare, our in pairs)
    found = None if contender == "brute force" else agreement(result, marks.brute)
    row = facts | {
        "dataset": setting.dataset,
        "labels": len(setting.label_words),
        "shots": setting.shots,
        "contender": contender,
        "queries_per_second": queries / result["seconds"],
        "forwards_per_query": result["forwards"] / queries,
        "computed_tokens_per_query": result["computed_tokens"] / queries,
        "prompt_tokens_per_query": result["prompt_tokens"] / queries,
        "ratio_to_limit": ratio,
        "icl_speedup": per_token(result) / per_token(ours),
        "max_difference": found and found[0],
        "mean_tv": found and found[1],
        "repetitions": result.get("repetitions", [round(result["seconds"], 3)]),
    }
    copied = ("version", "setting", "queries", "seconds", "loaded_memory_mib", "peak_memory_mib", "threads")
    row |= {key: result[key] for key in copied}
    return {key: row[key] for key in KEYS}


def missing(rows: Sequence[Row], setting: Setting, contenders: Sequence[str], commit: str | None) -> list[str]:
    """The contenders that have no row of this setting and commit."""
    there = {
        row["contender"]
        for row in rows
        if (row["dataset"], row["shots"], row["commit"]) == (setting.dataset, setting.shots, commit)
    }
    return [name for name in contenders if name not in there]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    written = {
        "queries_per_second": "{:.3g}",
        "ratio_to_limit": "{:.2g}",
        "icl_speedup": "{:.3g}",
        "max_difference": "{:.2g}",
        "mean_tv": "{:.2g}",
    }

    def cell(value: object, key: str) -> str:
        if value is None:
            return ""
        return written.get(key, "{:,.1f}" if key == "forwards_per_query" else "{:,.0f}").format(value)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [row[key] if isinstance(row[key], str) else cell(row[key], key) for key in COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def race(settings: Sequence[Setting], contenders: Sequence[str], bench: Bench, path: Path, facts: Row) -> int:
    """Measure what is missing, print the table; the number of contenders that failed."""
    failed = 0
    for setting in settings:
        wanted = missing(rows_of(path), setting, contenders, bench.commit)
        if not wanted:
            continue
        ours, limits = measure_pairs(bench, setting)
        marks = Marks(ours, limits, bench.answer(bench.job("brute force", setting)))
        for name in wanted:
            try:
                result = _result(bench, setting, name, marks)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed += 1
                continue
            row = make_row(setting, name, result, marks, facts)
            keep(path, row)
            did = f"{row['queries']} queries in {row['seconds']:.1f} s"
            print(f"{setting.name}: {name} ({row['setting']}): {did}, ours {row['icl_speedup']:.2f} x", flush=True)
    print(table([row for row in rows_of(path) if row["commit"] == bench.commit]))
    return failed


def _result(bench: Bench, setting: Setting, contender: str, marks: Marks) -> Result:
    known: dict[str, Callable[[], Result]] = {
        "icl": lambda: median_of(marks.icl),
        "limit": lambda: median_of(marks.limit),
        "brute force": lambda: marks.brute,
    }
    if contender in known:
        return known[contender]()
    return bench.answer(bench.job(contender, setting, sizes=[bench.size_for(contender, setting)]))


def exact(settings: Sequence[Setting], bench: Bench, path: Path, facts: Row) -> int:
    """Log-probabilities against those of the plain model in float32; the number of bars that were missed."""
    missed = 0
    done = {(row["dataset"], row["shots"], row["commit"]) for row in rows_of(path)}
    for setting in settings:
        if (setting.dataset, setting.shots, bench.commit) in done:
            continue
        asked = dict.fromkeys((name, dtype) for one in EXACT for name, dtype in (one[:2], (one[2], "float32")))
        results = {
            (name, dtype): bench.answer(bench.job(name, setting, dtype=dtype, cap_s=None)) for name, dtype in asked
        }
        for name, dtype, against, bar in EXACT:
            found = agreement(results[name, dtype], results[against, "float32"])
            assert found is not None
            row = {
                "dataset": setting.dataset,
                "labels": len(setting.label_words),
                "shots": setting.shots,
                "queries": len(setting.prompts),
                "contender": name,
                "dtype": dtype,
                "against": f"{against}, float32",
                "max_difference": found[0],
                "bar": bar,
                "mean_tv": found[1],
            }
            keep(path, row | {key: value for key, value in facts.items() if key not in row})
    for kept in rows_of(path):
        if kept["commit"] == bench.commit:
            missed += kept["bar"] is not None and kept["max_difference"] > kept["bar"]
            print(told(kept))
    return missed


def told(row: Row) -> str:
    """A row of the exactness as a sentence."""
    where = f"{row['dataset']}, {row['labels']} labels, {row['shots']} shots, {row['queries']} queries"
    verdict = ""
    if row["bar"] is not None:
        verdict = f", {'within' if row['max_difference'] <= row['bar'] else 'OUTSIDE'} the bar of {row['bar']:g}"
    return f"{where}: {row['contender']} ({row['dtype']}) is {row['max_difference']:.2g} off {row['against']}{verdict}"


def memory(data: Path, bench: Bench, path: Path, counts: Sequence[int], facts: Row) -> None:
    """Peak memory of ours for more and more queries: texts of mr, one in ten with 4 shots, the others with none."""
    from icl_compiler.compile import compile_program
    from icl_compiler.data import load_dataset

    train, test = (load_dataset(data / "mr" / f"{split}.jsonl") for split in ("train", "test"))
    program = compile_program(train, model=MODEL, shots=4, budget=BUDGET, examples=EXAMPLES, seed=SEED)
    bare = replace(program, settings=replace(program.settings, shots=0))
    texts = [*test.texts, *train.texts][: max(counts)]
    prompts = [Text(list(prompt.tokens), "") for prompt in bare.prompts(texts)]
    prompts[::10] = [Text(list(prompt.tokens), "") for prompt in program.prompts(texts[::10])]
    words = [Text(list(ids), "") for ids in program.label_words]
    there = {(row["queries"], row["commit"]) for row in rows_of(path)}
    for count in counts:
        if (min(count, len(prompts)), bench.commit) in there:
            continue
        setting = Setting("mr", 4, prompts[:count], words, prompts[:1])
        result = bench.answer(bench.job("icl", setting, cap_s=None))
        keys = ["queries", "seconds", "forwards", "computed_tokens", "prompt_tokens"]
        keys += ["loaded_memory_mib", "peak_memory_mib", "threads"]
        keep(path, facts | {key: result[key] for key in keys})
    for row in rows_of(path):
        if row["commit"] == bench.commit:
            loaded, peak = row["loaded_memory_mib"], row["peak_memory_mib"]
            print(
                f"{row['queries']:,} queries ({row['prompt_tokens']:,} tokens) in {row['seconds']:.0f} s: "
                f"peak {peak:,.0f} MiB, {peak - loaded:,.0f} above the {loaded:,.0f} of the loaded model"
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)  # what `python -m benchmarks` was asked for
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--exact", action="store_true", help="float32: compare log-probabilities only")
    mode.add_argument("--memory", action="store_true", help="peak memory of ours for more and more queries")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--shots", nargs="+", type=int, help="default: 4 and 16; with --exact 4")
    parser.add_argument("--contenders", nargs="+", choices=SCRIPTS, default=tuple(SCRIPTS))
    parser.add_argument("--queries", type=int, help="most queries: default 60, with --exact 3, with --memory 10,000")
    parser.add_argument("--cap", type=float, default=60.0, help="seconds for a contender (default: 60)")
    parser.add_argument("--rows", type=Path, help="another file for the rows")
    return parser.parse_args()


def main() -> None:
    from evaluation.evaluate import commit, machine
    from icl_compiler.models import locate

    given = arguments()
    data = data_folder(DATASETS)
    dtype = "float32" if given.exact else "bfloat16"
    bench = Bench(locate(MODEL, kind="language model"), dtype, given.cap, commit())
    facts: Row = {
        "model": MODEL,
        "dtype": dtype,
        "machine": f"{machine()}; {DEVICE}",
        "seed": SEED,
        "commit": bench.commit,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if given.memory:
        counts = sorted({min(count, given.queries or count) for count in MEMORY_QUERIES})
        memory(data, bench, given.rows or ROWS / "scoring_memory.jsonl", counts, facts)
        return
    shots = given.shots or ((4,) if given.exact else SHOTS)
    settings = make_settings(data, given.datasets, shots, given.queries or (3 if given.exact else 60))
    if given.exact:
        wrong = exact(settings, bench, given.rows or ROWS / "scoring_exact.jsonl", facts)
    else:
        wrong = race(settings, given.contenders, bench, given.rows or ROWS / "scoring.jsonl", facts)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
