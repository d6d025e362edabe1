"""A sweep on a Ray cluster: each reference and each ask is a task, done wherever there is room.

- Rows are written by the process that was started, never by a task. A task whose node dies is done again elsewhere;
  its row arrives once.
- A task that needs a reference waits for the task that trains it. Tasks find trainings and answers in the folder of
  the sweep, which has to be on a file system that all nodes see.
- Each process of a node keeps its `Worker`: the engine is opened once in it. A task takes one processor, and one GPU
  where the cluster has any.
- Without a running cluster (`ray start`, RAY_ADDRESS), one is made of this machine.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from evaluation.sweep import Engine, Measured, Worker, answers_path
from evaluation.sweep_plan import Job, ReferenceJob
from evaluation.sweep_spec import SweepSpec
from icl_compiler.errors import MissingDependencyError

RETRIES = 5
"""How often a task is done again because its node or its process died."""


def on_cluster() -> Engine:
    """The engine of a cluster.

    Raises:
        MissingDependencyError: if Ray is not installed.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--engine ray needs: pip install 'icl-compiler[ray]'") from error

    def engine(
        spec: SweepSpec, folder: Path, references: Sequence[ReferenceJob], jobs: Sequence[Job]
    ) -> Iterator[Measured | ReferenceJob]:
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        train, measure = task(_reference), task(_rows)
        folder = folder.resolve()
        trainings: dict[str, Any] = {
            job.key: train.remote(spec, folder, job) for job in references if not answers_path(folder, job).exists()
        }
        pending = list(trainings.values())
        for job in jobs:
            needed = {each.key for row in job.rows for each in (row.reference, row.second) if each is not None}
            waits = [trainings[key] for key in sorted(needed & trainings.keys())]
            pending.append(measure.remote(spec, folder, job, *waits))
        while pending:
            [ready], pending = ray.wait(pending)
            try:
                yield ray.get(ready)
            except RayTaskError as error:
                raise error.cause from error

    return engine


@cache
def _worker(spec: SweepSpec, folder: Path) -> Worker:
    return Worker(spec, folder)


def _reference(spec: SweepSpec, folder: Path, job: ReferenceJob) -> ReferenceJob:
    _worker(spec, folder).reference(job)
    return job


def _rows(spec: SweepSpec, folder: Path, job: Job, *after: ReferenceJob) -> Measured:
    return _worker(spec, folder).rows(job)
