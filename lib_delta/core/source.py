"""The source: base and adapted model, evaluated together, and the delta between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lib_delta.core.combine import Estimates, combine
from lib_delta.core.conditioning import Conditioning, JoinedConditioning, PromptSchedule, as_schedule, join_branches
from lib_delta.core.deltas import Deltas
from lib_delta.core.evaluator import Evaluator
from lib_delta.core.guides import Guide, is_active
from lib_delta.core.rows import Rows
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.lru_cache import LRUCache
from lib_delta.models.network import Network

# Prompts may alternate from step to step: the layers' results are cached for this many.
MAX_CACHED_PROMPTS = 4


class Source:
    """A base UNet with its adaptations attached, which returns the delta of a step.

    One forward pass computes base and adapted, for the prompt and the negative prompt, unless memory is too short.
    """

    def __init__(
        self,
        unet: Network,
        parameterization: Parameterization,
        base: Conditioning | PromptSchedule,
        adapted: Conditioning | PromptSchedule | None = None,
        quantize: bool = False,
        guides: Sequence[Guide] = (),
    ) -> None:
        """Take the model and its conditioning.

        Args:
            unet: the base with its adapters attached.
            parameterization: what the UNet predicts, and its noise schedule.
            base: the base's conditioning.
            adapted: the adapted model's conditioning; None for the base's.
            quantize: evaluate at whole timesteps only, as ComfyUI and Forge do; A1111 and k-diffusion interpolate.
            guides: the adaptations that are not weights: ControlNets and image prompts.
        """
        self.unet = unet
        self.parameterization = parameterization
        self.quantize = quantize
        self.guides = tuple(guides)
        self._evaluator = Evaluator(unet, self.guides)
        self._schedules = [as_schedule(base)] if adapted is None else [as_schedule(base), as_schedule(adapted)]
        self._joined: LRUCache[tuple[int, ...], tuple[tuple[Conditioning, ...], JoinedConditioning]] = LRUCache(
            max_count=MAX_CACHED_PROMPTS
        )
        # The source with only some of its guides, by which of them are active.
        self._at_progress: dict[tuple[bool, ...], Source] = {}

    @property
    def evaluations(self) -> int:
        """The number of forward passes of the UNet so far."""
        return self._evaluator.evaluations + sum(part.evaluations for part in self._at_progress.values())

    def at_progress(self, progress: float) -> Source:
        """Return the source with the guides that are active at ``progress`` (0 to 1).

        The same guides give the same object.
        """
        flags = tuple(is_active(guide, progress) for guide in self.guides)
        if all(flags):
            return self
        if flags not in self._at_progress:
            part = copy(self)
            part.guides = tuple(itertools.compress(self.guides, flags))
            part._evaluator = Evaluator(self.unet, part.guides, self._evaluator.parts)
            part._at_progress = {}
            self._at_progress[flags] = part
        return self._at_progress[flags]

    def delta(self, step: SourceStep) -> Tensor:
        """Return the change of the guided estimate, ``D_adapted - D_base``: the first of :meth:`deltas`."""
        return self.deltas(step).guided

    @torch.no_grad()
    def deltas(self, step: SourceStep) -> Deltas:
        """Return the adaptation's changes of the guided estimate, the negative prompt's, and each part's.

        They are float32 on the device of ``step.x``.  They are exactly 0 if base and adapted are equal; if nothing
        could make them differ, the UNet is not evaluated.
        """
        if len(self._schedules) == 1 and not self._evaluator.adapts:
            zero = torch.zeros_like(step.x, dtype=torch.float32)
            return Deltas(zero, zero)
        return self._estimates(step).deltas(step.x)

    @torch.no_grad()
    def denoised(self, step: SourceStep) -> Tensor:
        """Return the guided estimates of base and adapted, ``(R, N, C, H, W)``; R is 1 if they are the same."""
        return self._estimates(step).guided

    def conditioning_at(self, step: int) -> tuple[Conditioning, ...]:
        """Return the conditioning of the base, and of the adapted model if it differs, at a step."""
        return tuple(schedule(step) for schedule in self._schedules)

    def _estimates(self, step: SourceStep) -> Estimates:
        weight = self.unet.entry
        x, sigma = step.x.to(weight.device, torch.float32), step.sigma.to(weight.device, torch.float32)
        joined = self._joined_at(step.step, len(x))
        with_uncond = not step.uncond_skipped and (step.cfg_scale != 1 or joined.weights is not None)
        conditioning = joined.on(weight.device, weight.dtype, with_uncond)
        model_x, t = self.parameterization.model_input(x, sigma, self.quantize)
        output = self._evaluator(Rows.of(model_x.to(weight.dtype), t, conditioning))
        images = conditioning.row_images
        denoised = self.parameterization.denoised(output.float(), x[images], sigma[images])
        return combine(denoised, conditioning, step)

    def _joined_at(self, step: int, batch: int) -> JoinedConditioning:
        """Return the two models' conditioning at a step, joined; equal conditioning is joined once."""
        conditioning = self.conditioning_at(step)
        key = (batch, *map(id, conditioning))
        cached = self._joined.get(key)
        if cached is None:
            # The conditioning is cached too, so that no other object gets its id.
            cached = conditioning, join_branches(list(conditioning), batch)
            self._joined.put(key, cached)
        return cached[1]
