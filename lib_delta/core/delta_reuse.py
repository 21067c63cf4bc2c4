"""The delta of fewer evaluations: held between them, as what it changes in the velocity.

Between two evaluations of the source the delta is not held as a change of the estimate, which shrinks with
the noise, but of v (arXiv 2202.00512): ``D = x / (s^2 + 1) - v * s / (s^2 + 1)^0.5``, so that a held change of
the estimate is scaled by ``s / (s^2 + 1)^0.5`` now over then.

When the source is asked is decided by noise levels and never by a count of calls: samplers may call
several times a step, go back, or take steps of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, map_changes, select_images
from lib_delta.diffusion.parameterization import per_image
from lib_delta.errors import SettingError

Quality = Literal["exact", "balanced", "fast"]
# Beyond its last noise level by more than this, a sampler has gone back, and what was held is of another time.
RESTART_RATIO = 1.1
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ReusePlan:
    """How often the source is asked.

    ``every``: how many of the run's noise levels one evaluation serves (1: each call is evaluated).  ``linear``:
    the change of v goes on as it went from one evaluation to the next, linearly in log sigma.  ``moved``: the
    source is asked again, instead, when the target's estimate has moved by this share of its size.
    """

    every: float = 1.0
    linear: bool = False
    moved: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every) and self.every >= 1):
            raise SettingError(f"quality: one evaluation serves 1 step or more, not {self.every}")
        if self.moved is not None and not 0 < self.moved <= 1:
            raise SettingError(f"quality: the share that an estimate may move lies between 0 and 1, not {self.moved}")

    @property
    def exact(self) -> bool:
        """Whether every call is evaluated."""
        return self.every == 1 and self.moved is None


def reuse_plan(quality: str, every: float = 0.0, between: str = "automatic", moved: float = 0.0) -> ReusePlan:
    """Return the plan of a quality, with its details in the place of what it says of them: 0 and automatic leave it."""
    plan = REUSE_PLANS[quality]
    linear = plan.linear if between == "automatic" else between == "linear"
    return ReusePlan(every or plan.every, linear, moved or None)


REUSE_PLANS: dict[str, ReusePlan] = {"exact": ReusePlan(), "balanced": ReusePlan(2, linear=True), "fast": ReusePlan(4)}


@dataclass(frozen=True)
class StepState:
    """Where a run is.

    ``sigma`` ``(N,)`` is the source's noise level, ``denoised`` the target's estimate.  ``progress`` (0 to 1) and
    ``levels``, the number of the run's noise levels, say which of them this is; where ``levels`` is 0, as it is not
    known, every call is evaluated.  ``inputs`` are the things that a delta is of: others force an evaluation.
    """

    sigma: Tensor
    denoised: Tensor
    progress: float
    levels: int
    inputs: tuple[object, ...]

    def interval(self, every: float) -> int:
        """Return which of the run's parts, of ``every`` levels each, this is in."""
        return math.floor(self.progress * (self.levels - 1) / every + TOLERANCE)


@dataclass(frozen=True)
class _Evaluation:
    state: StepState
    # Those of v.
    changes: Deltas


class DeltaReuse:
    """What is known of the delta in one pass of a generation."""

    def __init__(self, plan: ReusePlan) -> None:
        self.plan = plan
        self._evaluations: list[_Evaluation] = []

    def deltas(self, evaluate: Callable[[], Deltas], state: StepState) -> Deltas:
        """Return the source's deltas: those of ``evaluate()`` where the plan asks for it, or what is held of them."""
        if self.plan.exact or not state.levels:
            return evaluate()
        if self._needs_evaluation(state):
            deltas = evaluate()
            self._remember(deltas, state)
            return deltas
        return self._predicted(self._extrapolation(state), state)

    def _needs_evaluation(self, state: StepState) -> bool:
        if not self._evaluations:
            return True
        last = self._evaluations[-1].state
        if not _same_inputs(last, state):
            return True
        if self.plan.moved is not None:
            moved = (state.denoised - last.denoised).norm() > self.plan.moved * last.denoised.norm()
            back = state.sigma.max() > RESTART_RATIO * last.sigma.max()
            return bool(moved | back.to(moved.device))
        return state.interval(self.plan.every) != last.interval(self.plan.every)

    def _remember(self, deltas: Deltas, state: StepState) -> None:
        changes = map_changes(lambda images, delta: delta / _v_scale(select_images(state.sigma, images), delta), deltas)
        # Of what came before, only what leads here: of the same things, and at more noise.
        before = [
            k for k in self._evaluations[-1:] if _same_inputs(k.state, state) and k.state.progress < state.progress
        ]
        self._evaluations = [*before, _Evaluation(state, changes)]

    def _extrapolation(self, state: StepState) -> Tensor | None:
        """Return how far beyond the last evaluation this is, in ways from the one before it to it, ``(N, 1, 1, 1)``."""
        if not self.plan.linear or len(self._evaluations) < 2:
            return None
        before, last = (evaluation.state.sigma.log() for evaluation in self._evaluations)
        way, beyond = before - last, last - state.sigma.log()
        # No further than from there to here, and not backwards.
        factor = torch.where(way > TOLERANCE, beyond / way.clamp(min=TOLERANCE), 0.0).clamp(0, 1)
        return per_image(factor, self._evaluations[-1].changes.guided)

    def _predicted(self, factor: Tensor | None, state: StepState) -> Deltas:
        def now(images: Tensor | None, change: Tensor, before: Tensor) -> Tensor:
            if factor is not None:
                change = change + select_images(factor, images) * (change - before)
            return change * _v_scale(select_images(state.sigma, images), change)

        return map_changes(now, self._evaluations[-1].changes, self._evaluations[0].changes)


def _same_inputs(a: StepState, b: StepState) -> bool:
    """Tell whether deltas of two moments are of the same things."""
    return len(a.inputs) == len(b.inputs) and all(
        x is y or (isinstance(x, (bool, int, float, tuple)) and x == y) for x, y in zip(a.inputs, b.inputs)
    )


def _v_scale(sigma: Tensor, like: Tensor) -> Tensor:
    """Return what a change of v comes to in the estimate, but for the sign, which is the same at all levels."""
    s = per_image(sigma, like)
    return s / (s**2 + 1) ** 0.5
