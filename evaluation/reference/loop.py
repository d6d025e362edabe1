"""The training loop that all references share: AdamW, warm-up and cosine, early stopping on a held-out split.

A method says what a batch's loss is and which parameters move; nothing else differs between methods, so that they are
compared on the same batches, in the same order, for the same seed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from evaluation.reference.checkpoint import Checkpoint
from icl_compiler.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a reference is trained.

    Attributes:
        epochs: passes over the training examples, at most.
        batch_size: examples a step.
        learning_rate: of AdamW, at the end of the warm-up (a tenth of all steps); a cosine leads it to zero. Methods
            differ by a factor of a hundred in what suits them: `Method.learning_rate` is where to begin.
        checks_per_epoch: how often the held-out loss is measured.
        patience: stop after this many checks without a new best one.
        seed: of the order of the examples.
    """

    learning_rate: float
    epochs: int = 4
    batch_size: int = 16
    checks_per_epoch: int = 2
    patience: int = 3
    seed: int = 0

    def steps(self, examples: int) -> int:
        """Steps in all, at most."""
        return self.epochs * math.ceil(examples / self.batch_size)


class Check(NamedTuple):
    """One look at the held-out examples."""

    step: int
    train_loss: float
    held_out_loss: float
    seconds: float


@runtime_checkable
class Trainable(Protocol):
    """What the loop needs of a method."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The parameters that move."""

    def losses(self, rows: Sequence[int], *, held_out: bool) -> torch.Tensor:
        """Negative log-likelihood, in nats, of the answer of each example in `rows`."""


Report = Callable[[int, int, float, float | None], object]
"""Called after each step with the step, the number of steps, the loss, and the best held-out loss so far."""


def train(
    method: Trainable,
    *,
    examples: int,
    held_out: int,
    settings: LoopSettings,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Check]:
    """Train `method` in place and leave it at its best held-out loss; the curve of all checks.

    With a `checkpoint` it goes on where it was killed.

    Raises:
        TrainingError: if a split is empty, or the loss is not a finite number.
    """
    if not examples or not held_out:
        raise TrainingError(
            f"there are {examples} examples to train on and {held_out} held out; both need at least one"
        )
    parameters = list(method.parameters())
    steps_per_epoch = math.ceil(examples / settings.batch_size)
    steps = settings.steps(examples)
    check_every = max(1, steps_per_epoch // settings.checks_per_epoch)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    stream = np.random.default_rng(settings.seed)
    checkpoint = checkpoint or Checkpoint()
    curve: list[Check] = []
    best: list[torch.Tensor] = []
    running: list[float] = []
    order: list[int] = []
    done = 0
    started = time.perf_counter()
    if (kept := checkpoint.load()) is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        stream.bit_generator.state = kept["stream"]
        curve = [Check(*check) for check in kept["curve"]]
        best = [value.to(parameter.device) for parameter, value in zip(parameters, kept["best"], strict=True)]
        order, done = kept["order"], kept["step"]
        started -= curve[-1].seconds
    for step in range(done + 1, steps + 1):
        if not order:
            order = stream.permutation(examples).tolist()
        rows, order = order[: settings.batch_size], order[settings.batch_size :]
        loss = method.losses(rows, held_out=False).mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {step} of {steps}; train with a smaller --learning-rate "
                f"(now {settings.learning_rate:g})"
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running.append(loss.item())
        if step % check_every == 0 or step == steps:
            held = held_out_loss(method, held_out, settings.batch_size)
            curve.append(Check(step, float(np.mean(running)), held, time.perf_counter() - started))
            running = []
            losses = [check.held_out_loss for check in curve]
            if held == min(losses):
                best = [parameter.detach().clone() for parameter in parameters]
            elif len(curve) - 1 - int(np.argmin(losses)) >= settings.patience:
                break
            if checkpoint.due:
                checkpoint.save(
                    {
                        "parameters": [parameter.detach() for parameter in parameters],
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "stream": stream.bit_generator.state,
                        "curve": [tuple(check) for check in curve],
                        "best": best,
                        "order": order,
                        "step": step,
                    }
                )
        if report is not None:
            report(step, steps, loss.item(), min((c.held_out_loss for c in curve), default=None))
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return curve


def held_out_loss(method: Trainable, count: int, batch_size: int) -> float:
    """Mean negative log-likelihood over the held-out examples, in nats."""
    with torch.no_grad():
        parts = [
            method.losses(range(first, min(first + 4 * batch_size, count)), held_out=True)
            for first in range(0, count, 4 * batch_size)
        ]
    loss = float(torch.cat(parts).mean())
    if not math.isfinite(loss):
        raise TrainingError("the held-out loss is not a finite number; train with a smaller --learning-rate")
    return loss


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a tenth of all steps up to 1, then a cosine to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
