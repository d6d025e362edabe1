"""The rounds of RSR: probe, choose, train, step, deposit, choose again."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import Check, LoopSettings, Report, held_out_loss, rate_at
from evaluation.reference.objective import AnswerLogits, AnswerLoss
from evaluation.reference.rsr.boosting import Sample, best_steps, one_sided
from evaluation.reference.rsr.importance import Allocation, Importance, allocate, probe
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.trails import Trails
from icl_compiler.errors import TrainingError

_BETAS, _EPSILON, _LONGEST_GRADIENT = (0.9, 0.99), 1e-8, 1.0
_RATE_RANGE, _TRAIL_RANGE = (0.25, 4.0), (0.5, 2.0)
_AS_IT_IS = 0.05
_FIRST_PAIRS, _LATER_PAIRS = 4, 1


@dataclass(frozen=True)
class Plan:
    """How RSR trains; `RSR` says what each means."""

    units: int
    rounds: int
    importance: Importance
    allocation: Allocation
    replaced: float
    revert: bool
    line_search: bool
    sampling: float
    trails: Trails | None
    trail_in_choice: float
    trail_in_rate: float
    adaptive_rate: bool


@dataclass
class _State:
    """All that changes from round to round beside the changes themselves."""

    active: Int[torch.Tensor, " active"]
    first: Float[torch.Tensor, "active size"]
    second: Float[torch.Tensor, "active size"]
    ages: Float[torch.Tensor, "2 active"]
    trail: Float[torch.Tensor, " units"]
    residuals: Float[np.ndarray, " examples"]
    rate: float = 1.0
    step: int = 0
    round: int = 0
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    curve: list[Check] = field(default_factory=list)


class Refinement:
    """One run of RSR on one process.

    Args:
        synapses: of the model of `objective`.
        train, held_out: how many examples there are.
    """

    def __init__(
        self,
        synapses: Synapses,
        objective: AnswerLoss,
        *,
        train: int,
        held_out: int,
        plan: Plan,
        loop: LoopSettings,
    ) -> None:
        if not train or not held_out:
            raise TrainingError(f"there are {train} examples to train on and {held_out} held out; both need at least 1")
        self._synapses, self._objective = synapses, objective
        self._train, self._held_out = train, held_out
        self._plan, self._loop = plan, loop
        self._steps = loop.epochs * math.ceil(train / loop.batch_size)
        self._device = synapses.active.device
        self._generator = torch.Generator(self._device).manual_seed(loop.seed)
        self._stream = np.random.default_rng(loop.seed)

    def run(self, report: Report | None = None, checkpoint: Checkpoint | None = None) -> list[Check]:
        """Train; the curve of all rounds. `best` then is what was added to which units at the best held-out loss.

        With a `checkpoint` it goes on where it was killed.

        Raises:
            TrainingError: if the loss is not a finite number.
        """
        checkpoint = checkpoint or Checkpoint()
        started = time.perf_counter()
        kept = checkpoint.load()
        state = self._begin() if kept is None else self._go_on(kept)
        if state.curve:
            started -= state.curve[-1].seconds
        before = self._held_out_logits() if self._plan.line_search else None
        for number in range(state.round, self._plan.rounds):
            state.round = number
            start = self._synapses.change.clone()
            sample = self._sample(state)
            loss, credit = self._train_round(state, sample, report)
            before, step = self._end_round(state, before, start)
            held_out = float(before.losses().mean()) if before is not None else self._held_out_loss()
            if not math.isfinite(held_out):
                raise TrainingError("the held-out loss is not a finite number; train with a smaller --learning-rate")
            state.curve.append(Check(state.step, loss, held_out, time.perf_counter() - started))
            losses = [check.held_out_loss for check in state.curve]
            if held_out == min(losses):
                state.best = self._synapses.changes()
            elif len(losses) - 1 - int(np.argmin(losses)) >= self._loop.patience:
                break
            if number + 1 < self._plan.rounds:
                self._adapt(state, credit, step)
                if checkpoint.due:
                    checkpoint.save(self._kept(state))
        assert state.best is not None
        self.best = state.best
        return state.curve

    def _begin(self) -> _State:
        synapses, count = self._synapses, self._plan.units
        scores = self._probe(_FIRST_PAIRS)
        active = allocate(synapses, scores, count, self._plan.allocation, self._generator)
        synapses.select(active)
        zeros = torch.zeros_like(synapses.change)
        return _State(
            active,
            zeros,
            zeros.clone(),
            torch.zeros(2, count, device=self._device),
            torch.ones(len(synapses), device=self._device),
            np.ones(self._train),
        )

    def _kept(self, state: _State) -> dict[str, Any]:
        """All that a run needs to go on with its next round."""
        return {
            **vars(state),
            "round": state.round + 1,
            "residuals": torch.from_numpy(state.residuals),
            "curve": [tuple(check) for check in state.curve],
            "touched": self._synapses.touched,
            "changes": self._synapses.changes(),
            "stream": self._stream.bit_generator.state,
            "generator": self._generator.get_state(),
        }

    def _go_on(self, kept: dict[str, Any]) -> _State:
        synapses = self._synapses
        synapses.select(kept.pop("touched").to(self._device))
        units, change = kept.pop("changes")
        synapses.change[torch.searchsorted(synapses.active, units.to(self._device))] = change.to(self._device)
        synapses.show()
        self._stream.bit_generator.state = kept.pop("stream")
        self._generator.set_state(kept.pop("generator"))
        there = {name: value.to(self._device) for name, value in kept.items() if isinstance(value, torch.Tensor)}
        state = _State(
            **{**kept, **there, "residuals": kept["residuals"].numpy(), "curve": [Check(*c) for c in kept["curve"]]}
        )
        synapses.select(state.active)
        return state

    def _probe(self, pairs: int) -> Float[torch.Tensor, " units"]:
        size = min(self._loop.batch_size, max(1, self._train // 2))
        drawn = [self._stream.permutation(self._train)[: 2 * size] for _ in range(pairs)]
        halves = [(rows[:size].tolist(), rows[size:].tolist()) for rows in drawn]

        def backward(rows: Sequence[int]) -> None:
            self._objective.losses(rows, held_out=False).mean().backward()  # type: ignore[no-untyped-call]

        return probe(self._synapses, backward, halves, self._plan.importance)

    def _sample(self, state: _State) -> Sample:
        if not self._plan.sampling or state.round == 0:  # no residual is known yet
            return Sample(np.arange(self._train), np.ones(self._train, dtype=np.float32))
        return one_sided(state.residuals, self._plan.sampling, self._stream)

    def _train_round(
        self, state: _State, sample: Sample, report: Report | None
    ) -> tuple[float, Float[torch.Tensor, " active"]]:
        """The steps of a round: the mean training loss, and what each unit is credited with."""
        end = round((state.round + 1) * self._steps / self._plan.rounds)
        credit = torch.zeros(len(state.active), device=self._device)
        rates = self._unit_rates(state)
        running: list[float] = []
        order: list[int] = []
        while state.step < end:
            if not order:
                order = self._stream.permutation(len(sample.rows)).tolist()
            places, order = order[: self._loop.batch_size], order[self._loop.batch_size :]
            rows = sample.rows[places]
            losses = self._objective.losses(rows.tolist(), held_out=False)
            loss = (losses * torch.from_numpy(sample.weights[places]).to(self._device)).mean()
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {state.step + 1} of {self._steps}; train with a smaller "
                    f"--learning-rate (now {self._loop.learning_rate:g})"
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            state.residuals[rows] = -np.expm1(-losses.detach().cpu().double().numpy())
            self._step(state, rates, credit)
            state.step += 1
            running.append(loss.item())
            if report is not None:
                report(state.step, self._steps, running[-1], min((c.held_out_loss for c in state.curve), default=None))
        return float(np.mean(running)), credit

    def _step(self, state: _State, rates: torch.Tensor, credit: torch.Tensor) -> None:
        """One step of Adam, each unit with its own age and rate."""
        gradient = self._synapses.gradient
        gradient.mul_(torch.clamp(_LONGEST_GRADIENT / gradient.norm().clamp_min(1e-30), max=1.0))
        state.first.lerp_(gradient, 1 - _BETAS[0])
        state.second.lerp_(gradient.square(), 1 - _BETAS[1])
        state.ages += 1
        scale = [(1 - beta**ages)[:, None] for beta, ages in zip(_BETAS, state.ages, strict=True)]
        rate = self._loop.learning_rate * rate_at(state.step, self._steps) * state.rate * rates[:, None]
        step = rate * (state.first / scale[0]) / ((state.second / scale[1]).sqrt_().add_(_EPSILON))
        credit += (gradient * step).sum(dim=1)
        self._synapses.change -= step
        self._synapses.show()
        gradient.zero_()

    def _unit_rates(self, state: _State) -> Float[torch.Tensor, " active"]:
        if self._plan.trails is None:
            return torch.ones(len(state.active), device=self._device)
        trail = state.trail[state.active]
        return (trail / trail.mean()).pow(self._plan.trail_in_rate).clamp(*_TRAIL_RANGE)

    def _end_round(
        self, state: _State, before: AnswerLogits | None, start: torch.Tensor
    ) -> tuple[AnswerLogits | None, float]:
        """Search the round's step, and go there; the held-out logits then."""
        if before is None:
            return None, 1.0
        after = self._held_out_logits()
        step = float(best_steps(before, [after.logits.float() - before.logits.float()])[0])
        if abs(step - 1) < _AS_IT_IS:
            return after, step
        end = self._synapses.change.clone()
        self._synapses.change.copy_(start + step * (end - start))
        self._synapses.show()
        moved = self._held_out_logits()
        if moved.losses().mean() <= after.losses().mean():
            return moved, step
        self._synapses.change.copy_(end)
        self._synapses.show()
        return after, step

    def _adapt(self, state: _State, credit: torch.Tensor, step: float) -> None:
        """Learn from a round: trails, rate, and which units move in the next."""
        plan, synapses = self._plan, self._synapses
        if plan.trails is not None:
            state.trail = plan.trails.after(state.trail, state.active, credit, synapses.matrices)
        if plan.adaptive_rate and plan.line_search:
            state.rate = min(max(state.rate * math.sqrt(min(max(step, 0.5), 1.5)), _RATE_RANGE[0]), _RATE_RANGE[1])
        share = plan.replaced * 0.5 * (1 + math.cos(math.pi * state.round / max(1, plan.rounds - 1)))
        count = round(share * len(state.active))
        if count:
            self._replace(state, count)

    def _replace(self, state: _State, count: int) -> None:
        plan, synapses = self._plan, self._synapses
        trail = state.trail.pow(plan.trail_in_choice)
        strength = synapses.change.norm(dim=1) * trail[state.active]
        leave = torch.zeros(len(state.active), dtype=torch.bool, device=self._device)
        leave[strength.topk(count, largest=False).indices] = True
        if plan.revert:
            synapses.forget(state.active[leave])
        scores = self._probe(_LATER_PAIRS) * trail
        scores[state.active] = 0
        enter = allocate(synapses, scores, count, plan.allocation, self._generator)
        old = torch.cat([state.active[~leave], enter])
        order = old.argsort()
        mean_second = self._mean_second(state, enter)
        ages = torch.cat([state.ages[:, ~leave], torch.zeros(2, count, device=self._device)], dim=1)
        # The second moment is taken over from the unit's matrix, where there is one, as of old age.
        known = mean_second > 0
        ages[1, -count:][known] = 1e6
        state.first = torch.cat([state.first[~leave], torch.zeros(count, synapses.size, device=self._device)])[order]
        second = mean_second[:, None].expand(-1, synapses.size)
        state.second = torch.cat([state.second[~leave], second])[order]
        state.ages, state.active = ages[:, order], old[order]
        synapses.select(state.active)

    def _mean_second(self, state: _State, units: torch.Tensor) -> Float[torch.Tensor, " units"]:
        """The mean second moment in each unit's matrix; 0 without trails, or where nothing moved there."""
        if self._plan.trails is None:
            return torch.zeros(len(units), device=self._device)
        matrices, count = self._synapses.matrix_of(state.active), len(self._synapses.matrices)
        corrected = (state.second / (1 - _BETAS[1] ** state.ages[1])[:, None]).mean(dim=1)
        sums = torch.zeros(count, device=self._device).index_add_(0, matrices, corrected)
        return (sums / torch.bincount(matrices, minlength=count).clamp_min(1))[self._synapses.matrix_of(units)]

    @torch.no_grad()
    def _held_out_logits(self) -> AnswerLogits:
        size = 4 * self._loop.batch_size
        parts = [
            self._objective.logits(range(first, min(first + size, self._held_out)), held_out=True)
            for first in range(0, self._held_out, size)
        ]
        return AnswerLogits(
            torch.cat([part.logits.bfloat16() for part in parts]),
            torch.cat([part.targets for part in parts]),
            [length for part in parts for length in part.lengths],
        )

    def _held_out_loss(self) -> float:
        return held_out_loss(self._objective, self._held_out, self._loop.batch_size)
