"""Reuse of deltas: the source is evaluated less often, and its last delta is used in between.

A change of the denoised estimate D shrinks with the noise, so the reused value is the change of the velocity v
(arXiv 2202.00512).  From ``D = x / (s^2 + 1) - v * s / (s^2 + 1)^0.5`` it follows that a change of v changes D by
``s / (s^2 + 1)^0.5`` times as much (with the sign reversed).

Noise levels decide when the source is evaluated, not the number of calls: samplers may call several times a step,
go back, or choose their steps themselves.
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
# A noise level this many times the last one means that the sampler has gone back, and the last delta is outdated.
RESTART_RATIO = 1.1
ROUNDING = 1e-4


@dataclass(frozen=True)
class ReusePlan:
    """How often the source is evaluated.

    Attributes:
        every: the number of noise levels that share one evaluation; 1 evaluates each call.
        linear: extrapolate the change of v from the last two evaluations, linearly in log sigma, instead of
            repeating the last one.
        moved: evaluate when the target's estimate has moved by this share of its norm, instead of by noise levels.
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
    """Return a quality's plan, with the details that differ from 0 or "automatic" replaced."""
    plan = REUSE_PLANS[quality]
    linear = plan.linear if between == "automatic" else between == "linear"
    return ReusePlan(every or plan.every, linear, moved or None)


REUSE_PLANS: dict[str, ReusePlan] = {"exact": ReusePlan(), "balanced": ReusePlan(2, linear=True), "fast": ReusePlan(4)}


@dataclass(frozen=True)
class StepState:
    """A step as far as reuse depends on it.

    Attributes:
        sigma: the source's noise levels ``(N,)``.
        denoised: the target's estimate ``(N, C, H, W)``.
        progress: 0 at the first step, 1 at the last.
        levels: the number of the run's noise levels; 0, if unknown, evaluates every call.
        inputs: everything else that the delta depends on; the source is evaluated when it changes.
    """

    sigma: Tensor
    denoised: Tensor
    progress: float
    levels: int
    inputs: tuple[object, ...]

    def interval(self, every: float) -> int:
        """Return the number of the interval, of ``every`` noise levels each, that this step is in."""
        return math.floor(self.progress * (self.levels - 1) / every + ROUNDING)


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation of the source; ``v_changes`` are the changes of v, up to the sign."""

    state: StepState
    v_changes: Deltas


class DeltaReuse:
    """The last evaluations of the source in one pass of a generation, and the deltas that follow from them."""

    def __init__(self, plan: ReusePlan) -> None:
        self.plan = plan
        self._evaluations: list[_Evaluation] = []

    def deltas(self, evaluate: Callable[[], Deltas], state: StepState) -> Deltas:
        """Return ``evaluate()`` if the plan requires an evaluation, else deltas predicted from the last ones."""
        if self.plan.exact or not state.levels:
            return evaluate()
        if self._needs_evaluation(state):
            deltas = evaluate()
            self._remember(deltas, state)
            return deltas
        return self._predict(state)

    def _needs_evaluation(self, state: StepState) -> bool:
        if not self._evaluations:
            return True
        last = self._evaluations[-1].state
        if not _same_inputs(last, state):
            return True
        if self.plan.moved is not None:
            moved = (state.denoised - last.denoised).norm() > self.plan.moved * last.denoised.norm()
            restarted = state.sigma.max() > RESTART_RATIO * last.sigma.max()
            return bool(moved | restarted.to(moved.device))
        return state.interval(self.plan.every) != last.interval(self.plan.every)

    def _remember(self, deltas: Deltas, state: StepState) -> None:
        def as_v_change(images: Tensor | None, delta: Tensor) -> Tensor:
            return delta / _v_scale(select_images(state.sigma, images), delta)

        # The last evaluation is useful for extrapolation only if it has the same inputs and is earlier in the run.
        earlier = [
            evaluation
            for evaluation in self._evaluations[-1:]
            if _same_inputs(evaluation.state, state) and evaluation.state.progress < state.progress
        ]
        self._evaluations = [*earlier, _Evaluation(state, map_changes(as_v_change, deltas))]

    def _predict(self, state: StepState) -> Deltas:
        """Return the deltas of a step without evaluating the source."""
        factor = self._extrapolation_factor(state)

        def as_delta(images: Tensor | None, last: Tensor, earlier: Tensor) -> Tensor:
            v_change = last if factor is None else last + select_images(factor, images) * (last - earlier)
            return v_change * _v_scale(select_images(state.sigma, images), v_change)

        return map_changes(as_delta, self._evaluations[-1].v_changes, self._evaluations[0].v_changes)

    def _extrapolation_factor(self, state: StepState) -> Tensor | None:
        """Return how far to extrapolate beyond the last evaluation, ``(N, 1, 1, 1)``; None to repeat it.

        With L = log sigma, the factor is ``(L_last - L) / (L_earlier - L_last)``: 0 at the last evaluation, and 1 at
        the same distance after it as the earlier one lies before it.  It is clamped to 0..1, so a prediction never
        goes backwards, nor further than the last two evaluations are apart.
        """
        if not self.plan.linear or len(self._evaluations) < 2:
            return None
        earlier, last = (evaluation.state.sigma.log() for evaluation in self._evaluations)
        interval, distance = earlier - last, last - state.sigma.log()
        # A bridge that limits the noise may give both evaluations one level: the last one is then repeated.
        factor = torch.where(interval > ROUNDING, distance / interval.clamp(min=ROUNDING), 0.0).clamp(0, 1)
        return per_image(factor, self._evaluations[-1].v_changes.guided)


def _same_inputs(a: StepState, b: StepState) -> bool:
    """Return whether the deltas of two steps depend on the same inputs: plain values by value, others by identity."""
    return len(a.inputs) == len(b.inputs) and all(
        x is y or (isinstance(x, (bool, int, float, tuple)) and x == y) for x, y in zip(a.inputs, b.inputs)
    )


def _v_scale(sigma: Tensor, like: Tensor) -> Tensor:
    """Return the change of the estimate per change of v, without the sign, which is the same at all levels."""
    s = per_image(sigma, like)
    return s / (s**2 + 1) ** 0.5
