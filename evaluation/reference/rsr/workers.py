"""Workers that train one model together: processes on this machine, each with its share of the cores.

- Every worker loads the model and runs the same `Refinement` with the same seeds. What they learn apart is added up,
  so that all choose the same units, find the same steps and hold the same state, without its being sent. Only what
  need not be the same twice (k-means on several threads) is taken from the first.
- This process trains nothing: it starts the workers, passes their progress on, and ends them all when one fails.
- An example goes to the same worker whenever the batch allows it, as each keeps what the frozen layers gave for it.
"""

import signal
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from evaluation.reference.loop import Check, LoopSettings, Report
from icl_compiler.errors import ICLError, TrainingError

if TYPE_CHECKING:
    from evaluation.reference.method import Task
    from evaluation.reference.rsr.rsr import RSR

_LONGEST_WAIT = timedelta(minutes=10)
_EXPLANATION_S = 3.0

_T = TypeVar("_T")


class Share(NamedTuple):
    """What one worker computes of some examples: their places, and 1 for each; 0 if it is there to keep step only."""

    places: Int[np.ndarray, " places"]
    counts: Float32[np.ndarray, " places"]


@dataclass(frozen=True)
class Workers:
    """All workers, as one of them sees them.

    Attributes:
        rank: of this one, from 0.
        count: how many there are; one alone never asks another.
    """

    rank: int = 0
    count: int = 1

    def share(self, rows: Int[np.ndarray, " rows"]) -> Share:
        """What this worker computes of `rows`, numbers of examples; never empty.

        >>> Workers(0, 2).share(np.array([4, 7, 6, 2, 9])).places.tolist()  # mostly the even ones
        [0, 2, 3]
        >>> Workers(1, 2).share(np.array([4]))
        Share(places=array([0]), counts=array([0.], dtype=float32))
        """
        order = np.argsort(rows % self.count, kind="stable")
        places = np.array_split(order, self.count)[self.rank]
        if not len(places):
            return Share(order[:1], np.zeros(1, dtype=np.float32))
        return Share(places, np.ones(len(places), dtype=np.float32))

    def part(self, count: int) -> range:
        """This worker's part of `count` things in order; it may be empty.

        >>> [Workers(rank, 3).part(4) for rank in range(3)]
        [range(0, 1), range(1, 2), range(2, 4)]
        """
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def add_up(self, *arrays: Float32[torch.Tensor, "..."]) -> None:
        """Put into each array the sum of all workers'."""
        if self.count == 1:
            return
        flat = torch.cat([array.reshape(-1) for array in arrays])
        self._add_up(flat)
        for array, total in zip(arrays, torch.split(flat, [array.numel() for array in arrays]), strict=True):
            array.copy_(total.reshape(array.shape))

    def gather(self, value: _T) -> list[_T]:
        """Every worker's value, by rank."""
        return [value] if self.count == 1 else self._gather(value)

    def agree(self, value: _T) -> _T:
        """The first worker's value."""
        return self.gather(value)[0]

    def _add_up(self, flat: torch.Tensor) -> None:
        import torch.distributed as together

        together.all_reduce(flat)

    def _gather(self, value: _T) -> list[_T]:
        import torch.distributed as together

        found: list[Any] = [None] * self.count
        together.all_gather_object(found, value)
        return found


class Outcome(NamedTuple):
    """What a training gave: the units that moved, ascending, and what was added to each at the best held-out loss.

    Attributes:
        touched: how many units ever could move.
        frontier, size: of the synapses.
    """

    curve: list[Check]
    units: Int[np.ndarray, " units"]
    change: Float[np.ndarray, "units size"]
    touched: int
    frontier: int
    size: int


def train_together(method: "RSR", task: "Task", loop: LoopSettings, report: Report | None = None) -> list[Outcome]:
    """Train in `method.workers` processes; what each ended with, which is the same.

    Raises:
        TrainingError: if a worker was killed or failed; no process is left behind.
        ICLError: as `method.train`.
    """
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // method.workers)
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(method.workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work,
                    args=(rank, threads, Path(folder) / "meeting", theirs, method, replace(task, template=None), loop),
                    daemon=True,
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _watch(processes, pipes, report)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(
    rank: int, threads: int, meeting: Path, pipe: Connection, method: "RSR", task: "Task", loop: LoopSettings
) -> None:
    """The life of a worker. It tells of each step it knows of, then of its outcome or of its error."""
    import torch.distributed as together

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if task.gpu else 0
    if gpus:
        torch.cuda.set_device(rank % gpus)
    try:
        together.init_process_group(
            "nccl" if gpus >= method.workers else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=method.workers,
            timeout=_LONGEST_WAIT,
        )

        def report(*progress: Any) -> None:
            pipe.send(("step", progress))

        workers = Workers(rank, method.workers)
        outcome = method.train(task, loop, report if rank == 0 else None, workers)
        together.barrier()
        together.destroy_process_group()
        pipe.send(("done", outcome))
    except ICLError as error:
        pipe.send(("error", error))
    except Exception:  # whatever it is, the others wait
        pipe.send(("failed", traceback.format_exc()))


def _watch(processes: Sequence[SpawnProcess], pipes: Sequence[Connection], report: Report | None) -> list[Outcome]:
    """Listen until all workers are done, or one is not.

    Where one dies, the others fail because of it: so after a failure there is time to learn of its cause.
    """
    listening = {pipe: rank for rank, pipe in enumerate(pipes)}
    outcomes: dict[int, Outcome] = {}
    failures: list[tuple[int, str]] = []
    while listening and (ready := wait(list(listening), _EXPLANATION_S if failures else None)):
        for pipe in [pipe for pipe in listening if pipe in ready]:
            rank = listening[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise _died(rank, processes) from None
            if kind == "error":
                raise value
            if kind == "step":
                if report is not None:
                    report(*value)
                continue
            del listening[pipe]
            if kind == "done":
                outcomes[rank] = value
            else:
                failures.append((rank, value))
    if failures:
        rank, story = failures[0]
        reason = story.strip().splitlines()[-1]
        raise TrainingError(
            f"worker {rank + 1} of {len(processes)} failed: {reason}; train with workers=1"
        ) from RuntimeError(story)
    return [outcomes[rank] for rank in range(len(processes))]


def _died(rank: int, processes: Sequence[SpawnProcess]) -> TrainingError:
    process = processes[rank]
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return TrainingError(
        f"worker {rank + 1} of {len(processes)} {how} before the training was done; where memory is short, train with "
        "fewer workers. Start the same command again to go on"
    )
