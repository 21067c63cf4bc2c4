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
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.errors import NotFiniteError

if TYPE_CHECKING:
    from lib_delta.bridges import Bridge


@dataclass(frozen=True)
class DenoiseStep:
    """What the target's sampler knows when the target has denoised.

    ``x`` ``(N, C, H, W)`` is ``x0 + sigma * noise`` with ``sigma`` ``(N,)``, ``denoised`` the target's
    estimate of x0 after classifier-free guidance.  ``progress`` runs from 0 at the first step to 1
    at the last; ``step`` counts the evaluations.  ``uncond_skipped`` tells that the target did
    without guidance in this step, to save time; ``uncond_zero`` that nothing then stood in for the
    estimate without the prompt (see :meth:`lib_delta.core.source.Source.deltas`).  ``levels`` is the number
    of the run's noise levels, 0 where it is not known.
    """

    x: Tensor
    sigma: Tensor
    denoised: Tensor
    cfg_scale: float
    progress: float
    step: int = 0
    uncond_skipped: bool = False
    uncond_zero: bool = False
    levels: int = 0


class DeltaSource(Protocol):
    """Base and adapted model, as :class:`lib_delta.core.source.Source` brings them."""

    def at_progress(self, progress: float) -> DeltaSource:
        """Return what of it counts at a point of the run (0 to 1): the same object for as long as it is the same."""
        ...

    def deltas(
        self, x: Tensor, sigma: Tensor, cfg_scale: float, step: int, uncond_skipped: bool, uncond_zero: bool
    ) -> Deltas:
        """Return ``D_adapted(x, sigma) - D_base(x, sigma)``, in float32 on the device of ``x``."""
        ...

    def conditioning_at(self, step: int) -> tuple[object, ...]:
        """Return what the two models are told at a step: the same objects for as long as it is the same."""
        ...


@dataclass(frozen=True)
class DeltaGuidance:
    """Add what adapting the source changes to what the target denoises.

    ``reuse`` is what is known of the delta in this pass of a generation, where the source is not to be asked in
    every step; it is the pass's own.  Where changes are not ``checked``, those that are no numbers are the caller's
    to find: to look at them is to wait for the device.
    """

    strength: Strength
    bridge: Bridge
    source: DeltaSource
    reuse: DeltaReuse | None = None
    checked: bool = True

    def __call__(self, step: DenoiseStep) -> Tensor:
        """Return ``D_target + lambda * (D_adapted - D_base)``; at lambda 0 the target's own, untouched.

        Raises :class:`NotFiniteError` if the source's delta is not finite.
        """
        changes = self.changes(step)
        return step.denoised if changes is None else (step.denoised.float() + changes[0]).to(step.denoised.dtype)

    def changes(self, step: DenoiseStep) -> Deltas | None:
        """Return what is to be added to the target's estimates.

        None at lambda 0, where no side model is called.  Raises as calling does.
        """
        strength = self.strength.at(step.progress)
        if strength == 0:
            return None
        x, sigma, crossing = self.bridge.to_source(step.x, step.sigma, step.denoised)

        def to_target(images: Tensor | None, delta: Tensor) -> Tensor:
            image_crossing = crossing if images is None else crossing.of(images)
            return strength * self.bridge.delta_to_target(delta, image_crossing).float()

        changes = map_changes(to_target, self._deltas(x, sigma, step))
        if self.checked and not torch.isfinite(changes.guided).all():
            raise not_finite_error(step.step, float(step.sigma.max()))
        return changes

    def _deltas(self, x: Tensor, sigma: Tensor, step: DenoiseStep) -> Deltas:
        guidance_flags = step.cfg_scale, step.uncond_skipped, step.uncond_zero
        source = self.source.at_progress(step.progress)

        def evaluate() -> Deltas:
            scale, skipped, zero = guidance_flags
            return source.deltas(x, sigma, scale, step.step, skipped, zero)

        if self.reuse is None:
            return evaluate()
        inputs = (source, *source.conditioning_at(step.step), guidance_flags, tuple(x.shape))
        return self.reuse.deltas(evaluate, StepState(sigma, step.denoised, step.progress, step.levels, inputs))


def not_finite_error(step: int, sigma: float) -> NotFiniteError:
    """Return the error that says where a delta was not a number."""
    return NotFiniteError(f"the side model's delta is not a number at step {step + 1} (sigma {sigma:.4g})")


class DeltaDenoiser:
    """A target denoiser with the delta added, for k-diffusion's samplers to drive."""

    def __init__(
        self, target: Callable[..., Tensor], guidance: DeltaGuidance, sigmas: Tensor, cfg_scale: float = 1.0
    ) -> None:
        """Take the target's ``(x, sigma, **kwargs) -> denoised`` (after guidance) and the run's noise levels.

        ``sigmas`` ``(steps + 1,)`` tell how far along the run a sigma is; ``cfg_scale`` is the source's.
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


MIN_SIDE_CFG = 3.0  # of those that the method was shown with


def side_cfg(main: float, base: Family, target: Family, asked: float | None = None) -> float:
    """Return the guidance scale of the side model where the main one runs at ``main``.

    ``asked`` is the user's number; None is automatic: the main one's, or 3 where that is less.  Few-step
    and distilled models run at 1 or 2, where a ``base`` of another family says little of its prompt.
    A target of the base's own family keeps its scale, so that the delta is what the adapter does to it.
    """
    if asked is not None:
        return asked
    return main if base is target else max(main, MIN_SIDE_CFG)
