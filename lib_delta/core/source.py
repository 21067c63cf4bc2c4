"""The source: base and adapted model, evaluated together, and the delta between them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_delta.core.conditioning import Conditioning, JoinedConditioning, PromptSchedule, as_prompts, join_branches
from lib_delta.core.deltas import Deltas, PromptParts, PromptWeights
from lib_delta.core.guides import Guide, GuideInputs, is_active
from lib_delta.devices import empty_cache, out_of_memory, without_autocast
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.models.forked_layers import expand, is_adapted, single_branch
from lib_delta.models.injection import Injection
from lib_delta.models.unet import TextContext, UNet

# Prompts may alternate from step to step: of so many at a time is known what layers make of them.
MAX_CACHED_PROMPTS = 4


class Source:
    """A base UNet with its adaptations attached, ready to be asked for the delta.

    One pass through the UNet serves base and adapted, cond and uncond, unless memory is too short for all of them at
    once.
    """

    def __init__(
        self,
        unet: UNet,
        parameterization: Parameterization,
        base: Conditioning | PromptSchedule,
        adapted: Conditioning | PromptSchedule | None = None,
        quantize: bool = False,
        guides: Sequence[Guide] = (),
    ) -> None:
        """Take what base and adapted are told; ``adapted`` None means the same.

        ``guides`` add to the adapted model what is no matter of weights: ControlNets and image prompts.

        ``quantize`` asks at whole timesteps only, as ComfyUI and Forge do; A1111 and k-diffusion interpolate.
        """
        self.unet = unet
        self.parameterization = parameterization
        self.quantize = quantize
        self.guides = tuple(guides)
        self._evaluations = 0
        self._split = 1
        # The source without those of its guides that do not count, by which do.
        self._at_progress: dict[tuple[bool, ...], Source] = {}
        self._schedules = [as_prompts(base)] if adapted is None else [as_prompts(base), as_prompts(adapted)]
        self._joined: OrderedDict[tuple[int, ...], tuple[tuple[Conditioning, ...], JoinedConditioning]] = OrderedDict()

    @property
    def evaluations(self) -> int:
        """The passes through the UNet so far."""
        return self._evaluations + sum(part.evaluations for part in self._at_progress.values())

    def at_progress(self, progress: float) -> Source:
        """Return the source with those of its guides that count at a point of the run; always the same object."""
        flags = tuple(is_active(guide, progress) for guide in self.guides)
        if all(flags):
            return self
        if flags not in self._at_progress:
            part = copy(self)
            part.guides = tuple(itertools.compress(self.guides, flags))
            part._evaluations, part._at_progress = 0, {}
            self._at_progress[flags] = part
        return self._at_progress[flags]

    def delta(self, x: Tensor, sigma: Tensor, cfg_scale: float, step: int = 0, uncond_skipped: bool = False) -> Tensor:
        """Return ``D_adapted(x, sigma) - D_base(x, sigma)``, each after classifier-free guidance.

        The first of :meth:`deltas`.
        """
        return self.deltas(x, sigma, cfg_scale, step, uncond_skipped).guided

    @torch.no_grad()
    def deltas(
        self,
        x: Tensor,
        sigma: Tensor,
        cfg_scale: float,
        step: int = 0,
        uncond_skipped: bool = False,
        uncond_zero: bool = False,
    ) -> Deltas:
        """Return what the adaptation changes in the guided estimate, in the one for the negative prompt, and by parts.

        Args:
            x: the source's noisy latents ``(N, C, H, W)``.
            sigma: their noise levels ``(N,)``.
            cfg_scale: guidance scale; at 1 the unconditional half is not evaluated, and both deltas are one.
            step: the number of the step, for prompts that change.
            uncond_skipped: do without guidance, as the target did in this step.
            uncond_zero: prompts joined by AND are then added to nothing (as Forge does), and not to
                each image's first prompt (as AUTOMATIC1111 does).

        Returns:
            All in float32 on the device of ``x``; exactly 0 if nothing tells the two models apart, and without a pass
            where nothing could.
        """
        if not self._may_differ():
            nothing = torch.zeros_like(x, dtype=torch.float32)
            return Deltas(nothing, nothing)
        estimates = self._estimates(x, sigma, cfg_scale, step, uncond_skipped, uncond_zero)
        delta = _difference(estimates.guided, x)
        uncond = delta if estimates.uncond is estimates.guided else _difference(estimates.uncond, x)
        if estimates.parts is None or estimates.weights is None or estimates.images is None:
            return Deltas(delta, uncond)
        images = estimates.images.to(x.device)
        return Deltas(delta, uncond, PromptParts(_difference(estimates.parts, x), estimates.weights, images))

    @torch.no_grad()
    def denoised(
        self,
        x: Tensor,
        sigma: Tensor,
        cfg_scale: float,
        step: int = 0,
        uncond_skipped: bool = False,
        uncond_zero: bool = False,
    ) -> Tensor:
        """Return the guided estimates of base and adapted, ``(R, N, C, H, W)``; R is 1 if they are the same."""
        return self._estimates(x, sigma, cfg_scale, step, uncond_skipped, uncond_zero).guided

    def _estimates(
        self, x: Tensor, sigma: Tensor, cfg_scale: float, step: int, uncond_skipped: bool, uncond_zero: bool
    ) -> _Estimates:
        weight = self.unet.time_embed["0"].weight
        x, sigma = x.to(weight.device, torch.float32), sigma.to(weight.device, torch.float32)
        joined = self._joined_at(step, len(x))
        with_uncond = not uncond_skipped and (cfg_scale != 1 or joined.weights is not None)
        conditioning = joined.on(weight.device, weight.dtype, with_uncond)
        model_x, t = self.parameterization.model_input(x, sigma, self.quantize)
        numbers = torch.arange(len(conditioning.rows), device=weight.device)
        prompts, of_uncond = numbers[: len(conditioning.images)], numbers >= len(conditioning.images)
        batch = _Batch(
            model_x.to(weight.dtype), t, conditioning.text, conditioning.label, conditioning.rows, of_uncond, prompts
        )
        output = self._evaluate_in_memory(batch)
        denoised = self.parameterization.denoised(output.float(), x[conditioning.rows], sigma[conditioning.rows])
        cond, uncond = denoised[:, : len(conditioning.images)], denoised[:, len(conditioning.images) :]
        if conditioning.weights is None and not with_uncond:
            return _Estimates(cond, cond)
        if not with_uncond:
            uncond = torch.zeros_like(x)[None] if uncond_zero else cond[:, conditioning.first]
            cfg_scale = 1.0
        if conditioning.weights is None:
            return _Estimates(uncond + cfg_scale * (cond - uncond), uncond)
        guided = _compose(cond, uncond, cfg_scale * conditioning.weights, conditioning.images)
        if joined.shared_weights is None:
            return _Estimates(guided, uncond)
        own = uncond[:, conditioning.images]
        return _Estimates(guided, uncond, own + cfg_scale * (cond - own), joined.shared_weights, conditioning.images)

    def _evaluate_in_memory(self, batch: _Batch) -> Tensor:
        """Return the UNet's output ``(R, rows, C, H, W)``, in as many parts as memory asks for; that is remembered.

        First base and adapted go apart, then cond and uncond, then images.
        """
        while True:
            try:
                with without_autocast(batch.x.device):
                    return self._evaluate_split(batch)
            except Exception as error:
                most = batch.rows * len(self._branches(batch))
                if not out_of_memory(error) or self._split >= most:
                    raise
            # Only out here has the error let go of what the failed pass had computed.
            self._split = min(2 * self._split, most)
            empty_cache(batch.x.device)

    def _evaluate_split(self, batch: _Batch) -> Tensor:
        if self._split == 1:
            output = batch.evaluate(self.unet, self.guides, None)
            self._evaluations += 1
            return output
        branches = self._branches(batch)
        pieces = batch.split(min(batch.rows, self._split // len(branches)))
        output = torch.cat(
            [torch.cat([piece.evaluate(self.unet, self.guides, b) for piece in pieces], 1) for b in branches]
        )
        self._evaluations += len(branches) * len(pieces)
        return output

    def _may_differ(self) -> bool:
        return len(self._schedules) > 1 or bool(self.guides) or is_adapted(self.unet)

    def _branches(self, batch: _Batch) -> tuple[int | None, ...]:
        return (0, 1) if batch.forks or self.guides or is_adapted(self.unet) else (None,)

    def conditioning_at(self, step: int) -> tuple[Conditioning, ...]:
        """Return what base and, where it is told something of its own, the adapted model are told at a step."""
        return tuple(prompts(step) for prompts in self._schedules)

    def _joined_at(self, step: int, batch: int) -> JoinedConditioning:
        """Join what the models are told at a step; while it stays the same, it is joined once."""
        conditioning = self.conditioning_at(step)
        key = (batch, *map(id, conditioning))
        if key not in self._joined:
            # What is told is kept with it, or another's id may be the same.
            self._joined[key] = conditioning, join_branches(list(conditioning), batch)
        self._joined.move_to_end(key)
        while len(self._joined) > MAX_CACHED_PROMPTS:
            self._joined.popitem(last=False)
        return self._joined[key][1]


@dataclass(frozen=True)
class _Batch:
    """What the UNet is given: latents ``(N, C, H, W)``, timesteps ``(N,)``, and what their M rows are told.

    Labels are ``(R, M, L)``; ``images`` ``(M,)`` is each row's image, ``uncond`` marks those of negative prompts, and
    ``prompts`` are the numbers of the others, where they are known without a look at the device.
    """

    x: Tensor
    t: Tensor
    text: TextContext
    label: Tensor | None
    images: Tensor
    uncond: Tensor
    prompts: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number of rows, of which an image has one for each prompt."""
        return self.text.context.shape[1]

    @property
    def forks(self) -> bool:
        """Whether base and adapted are told apart already here."""
        return len(self.text.context) > 1 or (self.label is not None and len(self.label) > 1)

    def split(self, count: int) -> list[_Batch]:
        """Return the rows in ``count`` parts, that share nothing and keep nothing."""
        rows = self.text.rows
        x, t = (self.x, self.t) if rows is None else (self.x[rows], self.t[rows])
        labels = [None] * count if self.label is None else self.label.tensor_split(count, 1)
        contexts = map(TextContext, self.text.context.tensor_split(count, 1))
        plain = zip(*(tensor.tensor_split(count) for tensor in (x, t, self.images, self.uncond)))
        conditioning = zip(contexts, labels)
        return [_Batch(x, t, *own, images, uncond) for (x, t, images, uncond), own in zip(plain, conditioning)]

    def evaluate(self, unet: UNet, guides: Sequence[Guide], branch: int | None) -> Tensor:
        """Return the UNet's output ``(R, M, C, H, W)``, of both branches or of one of them alone."""
        if branch is None:
            return unet(self.x[None], self.t, self.text, self.label, self._injection(guides))
        context = self.text.context[min(branch, len(self.text.context) - 1)][None]
        label = None if self.label is None else self.label[min(branch, len(self.label) - 1)][None]
        injection = replace(self._injection(guides), single_branch=True) if branch else Injection()
        with single_branch(unet, branch):
            return unet(self.x[None], self.t, TextContext(context), label, injection)

    def _injection(self, guides: Sequence[Guide]) -> Injection:
        """Ask the guides what they add to the adapted model."""
        if not guides:
            return Injection()
        rows = self.text.rows
        x, t = (self.x, self.t) if rows is None else (self.x[rows], self.t[rows])
        label = None if self.label is None else self.label[-1]
        inputs = GuideInputs(x, t, self.text.adapted, label, self.images, self.uncond, self.prompts)
        return sum((guide(inputs) for guide in guides), Injection())


@dataclass(frozen=True)
class _Estimates:
    """Base's and adapted's estimates: guided and for the negative prompt ``(R, N, ...)``, of each part ``(R, M, ...)``.

    ``weights`` say how parts are joined, if both models are told the same, and ``images`` ``(M,)`` which is whose.
    """

    guided: Tensor
    uncond: Tensor
    parts: Tensor | None = None
    weights: PromptWeights | None = None
    images: Tensor | None = None


def _difference(branches: Tensor, x: Tensor) -> Tensor:
    """Return adapted minus base of ``(R, N, C, H, W)``, on the device of ``x``."""
    return (branches[-1] - branches[0]).to(x.device) if len(branches) > 1 else torch.zeros_like(x, dtype=torch.float32)


def _compose(cond: Tensor, uncond: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    """Add each row of cond ``(R, M, ...)`` to its image's uncond ``(R, N, ...)``, as far as its weight says."""
    cond, uncond = expand(cond, uncond)
    difference = (cond - uncond[:, images]) * weights[:, :, None, None, None]
    return uncond.index_add(1, images, difference)
