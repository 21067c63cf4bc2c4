"""The delta over one pass of a generation: the first pass, or that of hires fix."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from lib_delta.core.delta_reuse import DeltaReuse
from lib_delta.core.deltas import Deltas, distinct_changes, map_changes
from lib_delta.core.guidance import DeltaGuidance, DeltaSource, side_cfg
from lib_delta.core.heatmap import HeatMap
from lib_delta.core.step_stats import PendingStats, Stopwatch
from lib_delta.core.steps import DenoiseStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import from_flow_space

if TYPE_CHECKING:
    from lib_delta.bridges import Bridge


class Target(Protocol):
    """The main checkpoint's traits that decide how the source evaluates a step."""

    @property
    def family(self) -> Family:
        """Its family."""
        ...

    @property
    def flow(self) -> bool:
        """Whether its samplers work with ``(1 - t) * x0 + t * noise`` and call ``t`` sigma."""
        ...


@dataclass
class PassDelta:
    """The delta over one pass.

    Attributes:
        strength: lambda over the pass.
        reuse: the earlier deltas of the pass.
        base: the source's family.
        stats: receives the statistics of the pass's steps.
        user_cfg: the user's guidance scale for the side model, None for automatic.
        heat: receives the changes, if the user wants to see them.
        points: the progress of each step at which the WebUI requested lambda.
    """

    strength: Strength
    reuse: DeltaReuse
    base: Family
    stats: PendingStats
    user_cfg: float | None = None
    heat: HeatMap | None = None
    points: list[float] = field(default_factory=list)

    def changes(
        self, step: DenoiseStep, target: Target, *, source: DeltaSource, bridge: Bridge, stopwatch: Stopwatch
    ) -> Deltas | None:
        """Return the changes to add to the target's estimates, or None at lambda 0.

        The changes of a step whose delta is not finite are 0; its statistics report it later.  ``stopwatch`` is stopped
        when the changes are computed.
        """
        guidance = DeltaGuidance(self.strength, bridge, source, self.reuse, checked=False)
        changes = guidance.changes(self._in_source_terms(step, target))
        stopwatch.stop()
        if changes is None:
            return None
        finite = self.stats.add(step.step, step.sigma, step.denoised, distinct_changes(changes), stopwatch)
        changes = map_changes(lambda _images, change: torch.where(finite, change, 0.0), changes)
        if self.heat is not None:
            self.heat.add(changes.guided, step.denoised)
        return changes

    def _in_source_terms(self, step: DenoiseStep, target: Target) -> DenoiseStep:
        """Return the step at the source's noise scale and guidance scale."""
        if target.flow:
            x, sigma = from_flow_space(step.x, step.sigma, step.denoised)
            step = replace(step, x=x, sigma=sigma)
        scale = side_cfg(step.cfg_scale, self.base, target.family, self.user_cfg)
        # At a scale of its own the source has guidance in every step, even if the target skips it to save time.
        return step if scale == step.cfg_scale else replace(step, cfg_scale=scale, uncond_skipped=False)
