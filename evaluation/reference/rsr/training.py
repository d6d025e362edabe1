"""The rounds of RSR: probe, choose, train, step, deposit, choose again."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from evaluation.reference.checkpoint import Checkpoint
from evaluation.reference.loop import Check, LoopSettings, Report, rate_at
from evaluation.reference.objective import AnswerLogits, AnswerLoss
from evaluation.reference.rsr.boosting import Sample, best_steps, one_sided
from evaluation.reference.rsr.importance import Allocation, Importance, allocate, probe
from evaluation.reference.rsr.modules import co_cluster, modules_of
from evaluation.reference.rsr.synapses import Synapses
from evaluation.reference.rsr.trails import Trails
from evaluation.reference.rsr.workers import Workers
from icl_compiler.errors import TrainingError

_BETAS, _EPSILON, _LONGEST_GRADIENT = (0.9, 0.99), 1e-8, 1.0
_RATE_RANGE, _TRAIL_RANGE = (0.25, 4.0), (0.5, 2.0)
_AS_IT_IS = 0.05
_FIRST_PAIRS, _LATER_PAIRS = 4, 1

Schedule = Literal["data", "local", "modules"]


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
    modules: int = 1
    schedule: Schedule = "data"
    exchange_every: int = 10


def replaced_after(share: float, rounds: int) -> list[float]:
    """The share of the units that is replaced after each round but the last: from `share` down to 0 with a cosine.

    >>> replaced_after(0.3, 3)
    [0.3, 0.15]
    """
    return [share * 0.5 * (1 + math.cos(math.pi * done / (rounds - 1))) for done in range(rounds - 1)]


@dataclass
class _State:
    """All that changes from round to round beside the changes themselves."""

    active: Int[torch.Tensor, " active"]
    first: Float[torch.Tensor, "active size"]
    second: Float[torch.Tensor, "active size"]
    ages: Float[torch.Tensor, "2 active"]
    trail: Float[torch.Tensor, " units"]
    residuals: Float[np.ndarray, " examples"]
    modules: Int[torch.Tensor, " active"]
    aspect_modules: Int[torch.Tensor, " aspects"]
    rates: list[float]
    step: int = 0
    round: int = 0
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    curve: list[Check] = field(default_factory=list)


class Refinement:
    """One run of RSR, on one process or as one of several workers that do the same.

    What every worker computes of a batch, a probe or the held-out examples is its share; sums and gathered answers are
    the same for all, and so is all that follows from them. Schedules of the steps:

    - `data`: gradients are added up in each step, which is then that of one worker.
    - `local`: each worker takes its own steps on its share of each batch; the mean of all is taken now and then.
    - `modules`: each worker sees the whole batch and moves one module; the modules are put together now and then.

    Args:
        synapses: of the model of `objective`.
        train, held_out: how many examples there are.
        aspects: of each example to train on, for modules.
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
        workers: Workers | None = None,
        aspects: Int[np.ndarray, " examples"] | None = None,
    ) -> None:
        if not train or not held_out:
            raise TrainingError(f"there are {train} examples to train on and {held_out} held out; both need at least 1")
        self._synapses, self._objective = synapses, objective
        self._train, self._held_out = train, held_out
        self._plan, self._loop = plan, loop
        self._workers = workers or Workers()
        self._aspects = np.zeros(train, dtype=np.int64) if aspects is None else aspects
        self._together = self._workers.count == 1 or plan.schedule == "data"
        self._steps = loop.steps(train)
        self._rounds = min(plan.rounds, self._steps)
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
        for number in range(state.round, self._rounds):
            state.round = number
            start = self._synapses.change.clone()
            sample = self._sample(state)
            loss, credit = self._train_round(state, sample, report)
            before, steps = self._end_round(state, before, start)
            held_out = float(before.losses().mean()) if before is not None else self._held_out_loss()
            if not math.isfinite(held_out):
                raise TrainingError("the held-out loss is not a finite number; train with a smaller --learning-rate")
            state.curve.append(Check(state.step, loss, held_out, time.perf_counter() - started))
            losses = [check.held_out_loss for check in state.curve]
            if held_out == min(losses):
                state.best = self._synapses.changes()
            elif len(losses) - 1 - int(np.argmin(losses)) >= self._loop.patience:
                break
            if number + 1 < self._rounds:
                self._adapt(state, credit, steps)
                # Units that left took what they had learned with them.
                if before is not None and self._plan.revert and self._plan.replaced:
                    before = self._held_out_logits()
                if checkpoint.due and self._workers.rank == 0:
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
        modules, aspect_modules = self._modules()
        return _State(
            active,
            zeros,
            zeros.clone(),
            torch.zeros(2, count, device=self._device),
            torch.ones(len(synapses), device=self._device),
            np.ones(self._train),
            modules,
            aspect_modules,
            [1.0] * self._plan.modules,
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

        return probe(self._synapses, self._backward, halves, self._plan.importance, self._workers.add_up)

    def _backward(self, rows: Sequence[int]) -> None:
        """This worker's share of the gradient of the mean loss."""
        places, counts = self._workers.share(np.asarray(rows))
        losses = self._objective.losses([rows[place] for place in places], held_out=False)
        ((losses * torch.from_numpy(counts).to(self._device)).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]

    def _modules(self) -> tuple[Int[torch.Tensor, " active"], Int[torch.Tensor, " aspects"]]:
        """The modules of the active units and of the aspects, found anew."""
        if self._plan.modules == 1:
            return torch.zeros(len(self._synapses.active), dtype=torch.long, device=self._device), torch.zeros(1).long()
        norms = self._norms()
        found = self._workers.agree(co_cluster(norms, self._plan.modules, seed=self._loop.seed))
        return torch.from_numpy(found.units).to(self._device), torch.from_numpy(found.aspects)

    def _norms(self) -> Float[np.ndarray, "active aspects"]:
        """The norm of the gradient by each active unit on a batch of each aspect."""
        gradient, columns = self._synapses.gradient, []
        for aspect in range(int(self._aspects.max()) + 1):
            members = self._stream.permutation(np.flatnonzero(self._aspects == aspect))
            self._backward(members[: self._loop.batch_size].tolist())
            self._workers.add_up(gradient)
            columns.append(gradient.norm(dim=1).double().cpu().numpy())
            gradient.zero_()
        return np.stack(columns, axis=1)

    def _sample(self, state: _State) -> Sample:
        if not self._plan.sampling or state.round == 0:  # no residual is known yet
            return Sample(np.arange(self._train), np.ones(self._train, dtype=np.float32))
        return one_sided(state.residuals, self._plan.sampling, self._stream)

    def _train_round(
        self, state: _State, sample: Sample, report: Report | None
    ) -> tuple[float, Float[torch.Tensor, " active"]]:
        """The steps of a round: the mean training loss, and what each unit is credited with."""
        plan, workers = self._plan, self._workers
        end = round((state.round + 1) * self._steps / self._rounds)
        credit = torch.zeros(len(state.active), device=self._device)
        rates = self._unit_rates(state)
        running: list[float] = []
        order: list[int] = []
        met = state.step
        own = torch.zeros(plan.exchange_every, device=self._device)
        heard = torch.zeros(2, self._train, device=self._device)
        while state.step < end:
            if not order:
                order = self._stream.permutation(len(sample.rows)).tolist()
            places, order = order[: self._loop.batch_size], order[self._loop.batch_size :]
            loss = self._hear(sample, np.asarray(places), heard)
            own[state.step - met] = loss
            if self._together:
                workers.add_up(self._synapses.gradient, own, heard)
                self._require_finite(own, state.step)
            self._step(state, rates, credit)
            state.step += 1
            if not self._together:
                if state.step - met < plan.exchange_every and state.step < end:
                    continue
                self._meet(state, credit, own, heard)
                self._require_finite(own, met)
            known = (heard[1] > 0).cpu()
            state.residuals[known.numpy()] = -np.expm1(-(heard[0] / heard[1]).cpu()[known].double().numpy())
            running += own[: state.step - met].tolist()
            met = state.step
            own.zero_()
            heard.zero_()
            if report is not None:
                report(state.step, self._steps, running[-1], min((c.held_out_loss for c in state.curve), default=None))
        return float(np.mean(running)), credit

    def _hear(self, sample: Sample, places: Int[np.ndarray, " places"], heard: torch.Tensor) -> torch.Tensor:
        """One backward pass of what this worker computes of a batch; its part of the batch's mean loss.

        Adds to `heard` the loss of each example, and how often it was seen.
        """
        plan, workers = self._plan, self._workers
        alike = self._together or plan.schedule == "local"
        share = (workers if alike else Workers()).share(sample.rows[places])
        places, whole = places[share.places], len(places)
        counts = torch.from_numpy(share.counts).to(self._device)
        losses = self._objective.losses(sample.rows[places].tolist(), held_out=False)
        loss = (losses * torch.from_numpy(sample.weights[places]).to(self._device) * counts).sum()
        (loss / (whole if self._together else len(places))).backward()  # type: ignore[no-untyped-call]
        rows = torch.from_numpy(sample.rows[places]).to(self._device)
        heard[0, rows] += losses.detach() * counts
        heard[1, rows] += counts
        return loss.detach() / (whole if alike else whole * workers.count)

    def _meet(self, state: _State, credit: torch.Tensor, own: torch.Tensor, heard: torch.Tensor) -> None:
        """Put together what the workers learned apart: the mean, or of each module what its worker made of it."""
        workers, parts = self._workers, (self._synapses.change, state.first, state.second, credit)
        if self._plan.schedule == "local":
            weight = torch.full_like(credit, 1 / workers.count)
        else:
            weight = (state.modules == workers.rank).float()
        for part in parts:
            part *= weight if part is credit else weight[:, None]
        workers.add_up(*parts, own, heard)
        self._synapses.show()

    def _require_finite(self, losses: torch.Tensor, before: int) -> None:
        if bool(torch.isfinite(losses).all()):
            return
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise TrainingError(
            f"the loss is {losses[step].item()} at step {before + step + 1} of {self._steps}; train with a smaller "
            f"--learning-rate (now {self._loop.learning_rate:g})"
        )

    def _step(self, state: _State, rates: torch.Tensor, credit: torch.Tensor) -> None:
        """One step of Adam, each unit with its own age and rate, and each module with its own."""
        gradient = self._synapses.gradient
        gradient.mul_(torch.clamp(_LONGEST_GRADIENT / gradient.norm().clamp_min(1e-30), max=1.0))
        state.first.lerp_(gradient, 1 - _BETAS[0])
        state.second.lerp_(gradient.square(), 1 - _BETAS[1])
        state.ages += 1
        scale = [(1 - beta**ages)[:, None] for beta, ages in zip(_BETAS, state.ages, strict=True)]
        now = self._loop.learning_rate * rate_at(state.step, self._steps)
        rate = torch.tensor([now * rate for rate in state.rates], device=self._device)[state.modules] * rates
        step = rate[:, None] * (state.first / scale[0]) / ((state.second / scale[1]).sqrt_().add_(_EPSILON))
        credit += (gradient * step).sum(dim=1)
        self._synapses.change -= step
        self._synapses.show()
        gradient.zero_()

    def _unit_rates(self, state: _State) -> Float[torch.Tensor, " active"]:
        rates = torch.ones(len(state.active), device=self._device)
        if self._plan.trails is not None:
            trail = state.trail[state.active]
            rates = (trail / trail.mean()).pow(self._plan.trail_in_rate).clamp(*_TRAIL_RANGE)
        if not self._together and self._plan.schedule == "modules":
            rates = rates * (state.modules == self._workers.rank)
        return rates

    def _end_round(
        self, state: _State, before: AnswerLogits | None, start: torch.Tensor
    ) -> tuple[AnswerLogits | None, Float[np.ndarray, " modules"]]:
        """Search the step of each module in this round, and go there; the held-out logits then."""
        count = self._plan.modules
        if before is None:
            return None, np.ones(count)
        end = self._synapses.change.clone()
        after = self._held_out_logits()
        alone = [after]
        if count > 1:
            members = [(state.modules == module)[:, None] for module in range(count)]
            alone = [self._held_out_logits_at(torch.where(member, end, start)) for member in members]
        steps = best_steps(before, alone)
        if abs(steps - 1).max() >= _AS_IT_IS:
            lengths = torch.from_numpy(steps).float().to(self._device)[state.modules]
            moved = self._held_out_logits_at(start + lengths[:, None] * (end - start))
            if moved.losses().mean() <= after.losses().mean():
                return moved, steps
        self._go(end)
        return after, steps

    def _go(self, change: Float[torch.Tensor, "active size"]) -> None:
        self._synapses.change.copy_(change)
        self._synapses.show()

    def _adapt(self, state: _State, credit: torch.Tensor, steps: Float[np.ndarray, " modules"]) -> None:
        """Learn from a round: trails, rates, and which units move in the next."""
        plan, synapses = self._plan, self._synapses
        if plan.trails is not None:
            state.trail = plan.trails.after(state.trail, state.active, credit, synapses.matrices)
        if plan.adaptive_rate and plan.line_search:
            grown = np.array(state.rates) * np.sqrt(np.clip(steps, 0.5, 1.5))
            state.rates = np.clip(grown, *_RATE_RANGE).tolist()
        count = int(replaced_after(plan.replaced, self._rounds)[state.round] * len(state.active))
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
        state.modules = torch.cat([state.modules[~leave], torch.zeros_like(enter)])[order]
        synapses.select(state.active)
        if plan.modules > 1:
            new = torch.isin(state.active, enter)
            placed = modules_of(self._norms()[new.cpu().numpy()], state.aspect_modules.cpu().numpy())
            state.modules[new] = torch.from_numpy(placed).to(self._device)

    def _mean_second(self, state: _State, units: torch.Tensor) -> Float[torch.Tensor, " units"]:
        """The mean second moment in each unit's matrix; 0 without trails, or where nothing moved there."""
        if self._plan.trails is None:
            return torch.zeros(len(units), device=self._device)
        matrices, count = self._synapses.matrix_of(state.active), len(self._synapses.matrices)
        corrected = (state.second / (1 - _BETAS[1] ** state.ages[1])[:, None]).mean(dim=1)
        sums = torch.zeros(count, device=self._device).index_add_(0, matrices, corrected)
        return (sums / torch.bincount(matrices, minlength=count).clamp_min(1))[self._synapses.matrix_of(units)]

    def _held_out_logits_at(self, change: Float[torch.Tensor, "active size"]) -> AnswerLogits:
        self._go(change)
        return self._held_out_logits()

    @torch.no_grad()
    def _held_out_logits(self) -> AnswerLogits:
        found = (self._objective.logits(rows, held_out=True) for rows in self._held_out_parts())
        own = [part._replace(logits=part.logits.bfloat16()) for part in found]  # a vocabulary is wide
        parts = [part for parts in self._workers.gather(own) for part in parts]
        return AnswerLogits(
            torch.cat([part.logits.to(self._device) for part in parts]),
            torch.cat([part.targets.to(self._device) for part in parts]),
            [length for part in parts for length in part.lengths],
        )

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        own = [self._objective.losses(rows, held_out=True).cpu() for rows in self._held_out_parts()]
        return float(torch.cat([part for parts in self._workers.gather(own) for part in parts]).mean())

    def _held_out_parts(self) -> list[range]:
        """What this worker computes of the held-out examples, in batches."""
        part, size = self._workers.part(self._held_out), 4 * self._loop.batch_size
        return [part[first : first + size] for first in range(0, len(part), size)]
