"""What the contenders of the scoring benchmark share: the job, the clock, the counts, the memory.

- A contender is a script, `python X_peer.py JOB RESULT`, in a process and an environment of its own; this module
  needs torch and nothing else, and imports nothing of the compiler.
- The clock runs while prompts are scored: not while the model is loaded, nor while it is warmed up.
- Forwards and tokens are counted by a hook on the base model, whatever the contender says about itself; tokens are
  those of the tensor that goes in, padding included.
- Memory is the peak of the process, once when the model is loaded and once at the end.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Text(NamedTuple):
    """A prompt or a label word."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Job:
    """What to score, and for how long.

    Attributes:
        contender: its name in the table.
        model: a folder with weights.
        dtype: `bfloat16` or `float32`.
        prompts: the queries, in the order in which they are scored.
        label_words: what is scored after each of them.
        warm_up: other prompts of the same kind, scored before the clock starts.
        cap_s: no query is begun after that many seconds, once `at_least` are done; none: all of them.
        at_least: see `cap_s`.
        sizes: batch sizes; of more than one each is timed on all prompts, and that is the result.
    """

    contender: str
    model: str
    dtype: str
    prompts: list[Text]
    label_words: list[Text]
    warm_up: list[Text]
    cap_s: float | None
    at_least: int
    sizes: list[int]
    repetition: int = 0

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job of a file that the benchmark wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in ("prompts", "label_words", "warm_up"):
            fields[name] = [Text(*each) for each in fields[name]]
        return cls(**fields)


class Contender:
    """Something that scores label words after prompts.

    Attributes:
        model: the causal language model of `transformers` that it runs, on whose base model the hook sits.
        version: of the package that is measured.
        setting: what was chosen among its settings, in words.
        relative: whether its log-probabilities are known only up to a constant per prompt.
    """

    model: Any
    version: str
    setting: str
    relative = False

    def use(self, size: int) -> int | None:
        """Take this batch size; the answer is how many prompts it wants at a time, none for all."""
        return 1

    def score(self, prompts: Sequence[Text], label_words: Sequence[Text]) -> list[list[float]]:
        """Log-probability of each label word after each prompt, in nats."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what the warm-up left in a cache."""


class Counter:
    """Counts the forward passes of a model and the tokens that go in."""

    def __init__(self, model: Any) -> None:
        self.forwards = self.tokens = 0
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        self.forwards += 1
        self.tokens += given.numel() if given is not None else kwargs["inputs_embeds"].shape[:2].numel()


def run(load: Callable[[Job], Contender]) -> None:
    """Do the job named on the command line with the contender that `load` makes, and write the result."""
    source, target = map(Path, sys.argv[1:])
    job = Job.read(source)
    contender = load(job)
    loaded = peak_memory_mib()
    counter = Counter(contender.model)
    if len(job.sizes) > 1:
        result: dict[str, object] = {"seconds_by_size": _trial(job, contender)}
    else:
        result = _measure(job, contender, counter) | {"loaded_memory_mib": loaded}
    result |= {
        "version": contender.version,
        "setting": contender.setting,
        "relative": contender.relative,
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory_mib(),
    }
    target.write_text(json.dumps(result), encoding="utf-8")


def _measure(job: Job, contender: Contender, counter: Counter) -> dict[str, object]:
    [size] = job.sizes
    at_once = contender.use(size)
    contender.score(job.warm_up[:1], job.label_words[:2])
    prompts = job.prompts
    if at_once is None:
        prompts = prompts[: _affordable(job, contender)]
    contender.forget()
    counter.forwards = counter.tokens = 0
    answers: list[list[float]] = []
    began = time.perf_counter()
    while len(answers) < len(prompts):
        late = job.cap_s is not None and time.perf_counter() - began > job.cap_s
        if late and len(answers) >= job.at_least:
            break
        answers += contender.score(prompts[len(answers) : len(answers) + (at_once or len(prompts))], job.label_words)
    seconds = time.perf_counter() - began
    return {
        "queries": len(answers),
        "seconds": seconds,
        "forwards": counter.forwards,
        "computed_tokens": counter.tokens,
        "prompt_tokens": sum(len(prompt.ids) for prompt in prompts[: len(answers)]),
        "logprobs": [[each if math.isfinite(each) else None for each in row] for row in answers],
    }


def _affordable(job: Job, contender: Contender) -> int:
    """How many prompts, scored in one call, should end within the cap, by the time that the warm-up takes."""
    if job.cap_s is None:
        return len(job.prompts)
    began = time.perf_counter()
    contender.score(job.warm_up, job.label_words)
    each = (time.perf_counter() - began) / len(job.warm_up)
    return min(len(job.prompts), max(job.at_least, int(job.cap_s / each)))


def _trial(job: Job, contender: Contender) -> dict[int, float]:
    """The faster of two rounds for each size, the sizes in turns."""
    contender.score(job.prompts[:1], job.label_words[:2])
    seconds = dict.fromkeys(job.sizes, math.inf)
    for size in [*job.sizes, *job.sizes]:
        at_once = contender.use(size) or len(job.prompts)
        began = time.perf_counter()
        for first in range(0, len(job.prompts), at_once):
            contender.score(job.prompts[first : first + at_once], job.label_words)
        seconds[size] = min(seconds[size], time.perf_counter() - began)
    return seconds


def peak_memory_mib() -> float:
    """The largest resident memory of this process so far.

    Linux counts the memory of the process that started this one into `ru_maxrss`, so its own mark is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def load_plain(job: Job) -> Any:
    """The model as `transformers` loads it, ready to score."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    return model.to(DEVICE).eval()


def same_tokens(encode: Callable[[str], list[int]], job: Job) -> bool:
    """Whether the strings of the job are encoded as its tokens: each prompt, and each label word after the first."""
    [first, *rest] = job.prompts
    pairs = [(first, word) for word in job.label_words] + [(prompt, job.label_words[0]) for prompt in rest]
    return all(encode(prompt.text + word.text) == prompt.ids + word.ids for prompt, word in pairs)


def require_same_tokens(encode: Callable[[str], list[int]], job: Job) -> None:
    """Stop unless the strings of the job are encoded as its tokens."""
    if not same_tokens(encode, job):
        sys.exit(f"{job.contender} encodes a prompt of this job as other tokens than ours; nothing was measured")
