"""The source: base and adapted model, evaluated together, and the delta between them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_delta.models.unet import UNet
from lib_delta.parameterization import Parameterization


@dataclass(frozen=True)
class Conditioning:
    """What one model is told: encoded prompts, for SDXL with label embeddings.

    ``cond`` and ``uncond`` are ``(N or 1, T, C)`` (T may differ), the labels ``(N or 1, L)``.
    """

    cond: Tensor
    uncond: Tensor
    cond_label: Tensor | None = None
    uncond_label: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.cond_label is None) != (self.uncond_label is None):
            raise ValueError("a label embedding is needed for both the prompt and the negative prompt, or for neither")


class Source:
    """A base UNet with its adaptations attached, ready to be asked for the delta.

    ``evaluations`` counts the passes through the UNet (one serves base and adapted, cond and uncond).
    """

    def __init__(
        self,
        unet: UNet,
        parameterization: Parameterization,
        base: Conditioning,
        adapted: Conditioning | None = None,
        quantize: bool = False,
    ) -> None:
        """Take what base and adapted are told; ``adapted`` None means the same.

        ``quantize`` asks at whole timesteps only, as ComfyUI does; A1111 and k-diffusion interpolate.
        """
        self.unet = unet
        self.parameterization = parameterization
        self.quantize = quantize
        self.evaluations = 0
        told = (base,) if adapted is None else (base, adapted)
        self._cond = _join_branches([c.cond for c in told]), _join_labels([c.cond_label for c in told])
        self._uncond = _join_branches([c.uncond for c in told]), _join_labels([c.uncond_label for c in told])

    @torch.no_grad()
    def delta(self, x: Tensor, sigma: Tensor, cfg_scale: float) -> Tensor:
        """Return ``D_adapted(x, sigma) - D_base(x, sigma)``, each after classifier-free guidance.

        Args:
            x: the source's noisy latents ``(N, C, H, W)``.
            sigma: their noise levels ``(N,)``.
            cfg_scale: guidance scale; at 1 the unconditional half is not evaluated.

        Returns:
            ``(N, C, H, W)`` in float32 on the device of ``x``; exactly 0 if nothing tells the two models apart.
        """
        denoised = self.denoised(x, sigma, cfg_scale)
        if denoised.shape[0] == 1:
            return torch.zeros_like(x, dtype=torch.float32)
        base, adapted = denoised
        return (adapted - base).to(x.device)

    @torch.no_grad()
    def denoised(self, x: Tensor, sigma: Tensor, cfg_scale: float) -> Tensor:
        """Return the estimates of base and adapted, ``(R, N, C, H, W)``; R is 1 if they are the same."""
        weight = self.unet.time_embed["0"].weight
        x, sigma = x.to(weight.device, torch.float32), sigma.to(weight.device, torch.float32)
        halves = [self._cond] if cfg_scale == 1 else [self._cond, self._uncond]
        context, label = _stack_rows(halves, len(x))
        model_x, t = self.parameterization.model_input(x, sigma, self.quantize)
        rows = model_x.repeat(len(halves), 1, 1, 1)[None]
        with _without_autocast(weight.device):
            output = self.unet(
                rows.to(weight.dtype),
                t.repeat(len(halves)),
                context.to(weight),
                None if label is None else label.to(weight),
            )
        self.evaluations += 1
        # (R, halves, N, C, H, W): x and sigma broadcast over the first two.
        denoised = self.parameterization.denoised(output.float().unflatten(1, (len(halves), -1)), x, sigma)
        if cfg_scale == 1:
            return denoised[:, 0]
        cond, uncond = denoised.unbind(1)
        return uncond + cfg_scale * (cond - uncond)


Rows = tuple[Tensor, "Tensor | None"]


def _join_branches(told: list[Tensor]) -> Tensor:
    """Give contexts ``(N, T, C)`` or labels ``(N, L)`` the branch axis: one branch if they are all equal."""
    if all(t is told[0] or torch.equal(t, told[0]) for t in told):
        return told[0][None]
    if told[0].ndim == 3:
        told = _same_length(told)
    batch = max(len(t) for t in told)
    return torch.stack([t.expand(batch, *t.shape[1:]) for t in told])


def _join_labels(told: list[Tensor | None]) -> Tensor | None:
    present = [t for t in told if t is not None]
    return _join_branches(present) if present else None


def _same_length(contexts: list[Tensor]) -> list[Tensor]:
    """Repeat contexts ``(..., T, C)`` to one length; attention over a repeated context is unchanged."""
    length = math.lcm(*(c.shape[-2] for c in contexts))
    return [torch.cat([c] * (length // c.shape[-2]), -2) for c in contexts]


def _stack_rows(halves: list[Rows], batch: int) -> Rows:
    """Join cond and uncond, each for ``batch`` images, to ``(R, rows, ...)``."""
    contexts = _same_length([context for context, _ in halves])
    labels = [label for _, label in halves if label is not None]
    return _stack(contexts, batch), _stack(labels, batch) if labels else None


def _stack(tensors: list[Tensor], batch: int) -> Tensor:
    branches = max(len(t) for t in tensors)
    return torch.cat([t.expand(branches, batch, *t.shape[2:]) for t in tensors], 1)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch off the autocast a host may be running under: the weights' own type is the one asked for."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:
        # An older torch has no autocast for this device, so there is none to switch off.
        return nullcontext()
