"""One step of a sampler: as the target's sampler sees it, and as the source evaluates it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor


@dataclass(frozen=True)
class SourceStep:
    """A step as the source evaluates it.

    Attributes:
        x: the source's noisy latents ``(N, C, H, W)``.
        sigma: their noise levels ``(N,)``.
        cfg_scale: the source's guidance scale; at 1 the negative prompt is not evaluated.
        step: the number of the step, for prompts that change during the run.
        uncond_skipped: the target skips guidance in this step, and so does the source.
        uncond_zero: a skipped estimate for the negative prompt is 0, as in Forge.  Otherwise each image's first
            prompt stands in for it, as in AUTOMATIC1111.  This matters only for prompts joined by AND.
    """

    x: Tensor
    sigma: Tensor
    cfg_scale: float
    step: int = 0
    _: KW_ONLY
    uncond_skipped: bool = False
    uncond_zero: bool = False

    @property
    def guidance(self) -> tuple[float, bool, bool]:
        """The values that guidance depends on."""
        return self.cfg_scale, self.uncond_skipped, self.uncond_zero


@dataclass(frozen=True)
class DenoiseStep:
    """A step as the target's sampler sees it after the target has denoised.

    Attributes:
        x: ``x0 + sigma * noise``, ``(N, C, H, W)``.
        sigma: its noise levels ``(N,)``.
        denoised: the target's estimate of x0 after classifier-free guidance.
        cfg_scale: the guidance scale.
        progress: 0 at the first step, 1 at the last.
        step: the number of evaluations before this one.
        uncond_skipped: the target skipped guidance in this step to save time.
        uncond_zero: see :class:`SourceStep`.
        levels: the number of the run's noise levels, 0 if unknown.
    """

    x: Tensor
    sigma: Tensor
    denoised: Tensor
    cfg_scale: float
    progress: float
    step: int = 0
    _: KW_ONLY
    uncond_skipped: bool = False
    uncond_zero: bool = False
    levels: int = 0

    def for_source(self, x: Tensor, sigma: Tensor) -> SourceStep:
        """Return the step for the source, whose latents are ``x`` ``(N, C, H, W)`` at ``sigma`` ``(N,)``."""
        return SourceStep(
            x, sigma, self.cfg_scale, self.step, uncond_skipped=self.uncond_skipped, uncond_zero=self.uncond_zero
        )
