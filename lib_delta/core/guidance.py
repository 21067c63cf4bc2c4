"""One step of Delta Sampling: Algorithm 1 of arXiv 2512.03056."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lib_delta.core.delta_reuse import DeltaReuse, StepState
from lib_delta.core.deltas import Deltas, map_changes
from lib_delta.core.progress import Progress
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.errors import NotFiniteError

if TYPE_CHECKING:
    from lib_delta.bridges import Bridge

MIN_SIDE_CFG = 3.0  # the smallest guidance scale that the method was shown with


class DeltaSource(Protocol):
    """Base and adapted model: :class:`lib_delta.core.source.Source`."""

    def at_progress(self, progress: float) -> DeltaSource:
        """Return the source with what is active at ``progress`` (0 to 1), the same object while that stays the same."""
        ...

    def deltas(self, step: SourceStep) -> Deltas:
        """Return ``D_adapted - D_base``, in float32 on the device of ``step.x``."""
        ...

    def conditioning_at(self, step: int) -> tuple[object, ...]:
        """Return the two models' conditioning at a step, the same objects while it stays the same."""
        ...


@dataclass(frozen=True)
class DeltaGuidance:
    """Adds the source's delta to the target's estimate.

    ``reuse`` holds the earlier deltas of this pass of a generation; None evaluates the source in every step.
    ``checked`` False leaves it to the caller to find changes that are not finite, as looking at them waits for the
    device.
    """

    strength: Strength
    bridge: Bridge
    source: DeltaSource
    reuse: DeltaReuse | None = None
    checked: bool = True

    def __call__(self, step: DenoiseStep) -> Tensor:
        """Return ``D_target + lambda * (D_adapted - D_base)``; at lambda 0 ``step.denoised`` itself.

        Raises:
            NotFiniteError: if the source's delta is not finite.
        """
        changes = self.changes(step)
        return step.denoised if changes is None else (step.denoised.float() + changes.guided).to(step.denoised.dtype)

    def changes(self, step: DenoiseStep) -> Deltas | None:
        """Return the changes to add to the target's estimates, or None at lambda 0, without evaluating the source.

        Raises:
            NotFiniteError: if the source's delta is not finite.
        """
        strength = self.strength.at(step.progress)
        if strength == 0:
            return None
        x, sigma, crossing = self.bridge.to_source(step.x, step.sigma, step.denoised)

        def to_target(images: Tensor | None, delta: Tensor) -> Tensor:
            image_crossing = crossing if images is None else crossing.of(images)
            return strength * self.bridge.delta_to_target(delta, image_crossing).float()

        changes = map_changes(to_target, self._deltas(step, step.for_source(x, sigma)))
        if self.checked and not torch.isfinite(changes.guided).all():
            raise not_finite_error(step.step, float(step.sigma.max()))
        return changes

    def _deltas(self, step: DenoiseStep, source_step: SourceStep) -> Deltas:
        source = self.source.at_progress(step.progress)
        if self.reuse is None:
            return source.deltas(source_step)
        inputs = (source, *source.conditioning_at(step.step), source_step.guidance, tuple(source_step.x.shape))
        state = StepState(source_step.sigma, step.denoised, step.progress, step.levels, inputs)
        return self.reuse.deltas(lambda: source.deltas(source_step), state)


def not_finite_error(step: int, sigma: float) -> NotFiniteError:
    """Return the error for a delta with values that are not finite at a step."""
    return NotFiniteError(f"the side model's delta is not a number at step {step + 1} (sigma {sigma:.4g})")


class DeltaDenoiser:
    """A target denoiser with the delta added, for k-diffusion's samplers."""

    def __init__(
        self, target: Callable[..., Tensor], guidance: DeltaGuidance, sigmas: Tensor, cfg_scale: float = 1.0
    ) -> None:
        """Take the target's ``(x, sigma, **kwargs) -> denoised`` after guidance.

        ``sigmas`` ``(steps + 1,)`` are the run's noise levels; ``cfg_scale`` is the source's guidance scale.
        """
        self.target = target
        self.guidance = guidance
        self.cfg_scale = cfg_scale
        self.steps = 0
        self.progress = Progress(sigmas)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """Return the denoised estimate of ``x`` ``(N, C, H, W)`` at ``sigma`` ``(N,)``."""
        denoised = self.target(x, sigma, **kwargs)
        progress, levels = self.progress(sigma), self.progress.levels
        step = DenoiseStep(x, sigma, denoised, self.cfg_scale, progress, self.steps, levels=levels)
        self.steps += 1
        return self.guidance(step)


def side_cfg(main_scale: float, base: Family, target: Family, user_scale: float | None = None) -> float:
    """Return the side model's guidance scale: ``user_scale`` if set, else one that follows ``main_scale``.

    A target of the base's family keeps its scale, so that the delta equals the adapter's effect on that model.
    For other targets the scale is at least 3: few-step and distilled models run at 1 or 2, where the base hardly
    follows its prompt.
    """
    if user_scale is not None:
        return user_scale
    return main_scale if base is target else max(main_scale, MIN_SIDE_CFG)
