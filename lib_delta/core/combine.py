"""Classifier-free guidance on base and adapted, and the difference between the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_delta.core.conditioning import PlacedConditioning
from lib_delta.core.deltas import Deltas, PromptParts, PromptWeights
from lib_delta.core.steps import SourceStep
from lib_delta.models.forked_layers import expand


@dataclass(frozen=True)
class Estimates:
    """The denoised estimates of base and adapted.

    ``guided`` and ``uncond`` (for the negative prompt) are ``(R, N, C, H, W)``; they are one object without guidance.
    If base and adapted share the weights of prompts joined by AND, ``parts`` ``(R, M, C, H, W)`` is each prompt's
    guided estimate, ``weights`` are those weights, and ``images`` ``(M,)`` is the image of each part.
    """

    guided: Tensor
    uncond: Tensor
    parts: Tensor | None = None
    weights: PromptWeights | None = None
    images: Tensor | None = None

    def deltas(self, like: Tensor) -> Deltas:
        """Return adapted minus base, in float32 on the device of ``like`` ``(N, C, H, W)``."""
        guided = _difference(self.guided, like)
        uncond = guided if self.uncond is self.guided else _difference(self.uncond, like)
        if self.parts is None or self.weights is None or self.images is None:
            return Deltas(guided, uncond)
        parts = PromptParts(_difference(self.parts, like), self.weights, self.images.to(like.device))
        return Deltas(guided, uncond, parts)


def combine(denoised: Tensor, conditioning: PlacedConditioning, step: SourceStep) -> Estimates:
    """Return the guided estimates from each row's estimate ``denoised`` ``(R, rows, C, H, W)``."""
    images, weights = conditioning.cond_images, conditioning.weights
    cond, uncond = denoised[:, : len(images)], denoised[:, len(images) :]
    cfg_scale = step.cfg_scale
    if not uncond.shape[1]:
        if weights is None:
            return Estimates(cond, cond)
        first = cond[:, conditioning.first_rows]
        cfg_scale, uncond = 1.0, torch.zeros_like(first[:1]) if step.uncond_zero else first
    if weights is None:
        return Estimates(uncond + cfg_scale * (cond - uncond), uncond)
    guided = _compose(cond, uncond, cfg_scale * weights, images)
    if conditioning.shared_weights is None:
        return Estimates(guided, uncond)
    part_uncond = uncond[:, images]
    parts = part_uncond + cfg_scale * (cond - part_uncond)
    return Estimates(guided, uncond, parts, conditioning.shared_weights, images)


def _compose(cond: Tensor, uncond: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    """Return ``uncond + sum(weight * (cond - uncond))`` of each image (compositional diffusion, arXiv 2206.01714).

    ``cond`` is ``(R, M, ...)``, ``uncond`` ``(R, N, ...)``, ``weights`` ``(R or 1, M)``, ``images`` ``(M,)``.
    """
    cond, uncond = expand(cond, uncond)
    difference = (cond - uncond[:, images]) * weights[:, :, None, None, None]
    return uncond.index_add(1, images, difference)


def _difference(branches: Tensor, like: Tensor) -> Tensor:
    """Return adapted minus base of ``(R, ..., C, H, W)``; zeros shaped as ``like`` if R is 1."""
    if len(branches) > 1:
        return (branches[-1] - branches[0]).to(like.device)
    return torch.zeros_like(like, dtype=torch.float32)
