"""The source: base and adapted model, evaluated together, and the delta between them."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib_delta.deltas import Deltas, Parts, Weights
from lib_delta.devices import out_of_memory, release_cached, without_autocast
from lib_delta.fork import alone, expand, forks
from lib_delta.injection import Guide, Injection, Inputs, counts
from lib_delta.models.unet import Text, UNet
from lib_delta.parameterization import Parameterization

# Prompts may alternate from step to step: of so many at a time is known what layers make of them.
MOST_PROMPTS = 4


@dataclass(frozen=True)
class Conditioning:
    """What one model is told: encoded prompts, for SDXL with label embeddings.

    ``cond`` is ``(M or 1, T, C)`` and ``uncond`` ``(N or 1, T, C)`` (T may differ), the labels
    ``(M or 1, L)`` and ``(N or 1, L)``.  M is N, unless prompts are joined by AND (compositional
    diffusion, arXiv 2206.01714): then ``weights`` has, for each image, the weights of its rows of cond.
    """

    cond: Tensor
    uncond: Tensor
    cond_label: Tensor | None = None
    uncond_label: Tensor | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if (self.cond_label is None) != (self.uncond_label is None):
            raise ValueError("a label embedding is needed for both the prompt and the negative prompt, or for neither")
        if self.weights is not None and sum(map(len, self.weights)) != len(self.cond):
            raise ValueError(f"{len(self.cond)} rows of cond need as many weights, not {self.weights}")


# Prompts may change during the run (prompt editing): what a model is told at the step of that number.
Prompts = Callable[[int], Conditioning]


class Source:
    """A base UNet with its adaptations attached, ready to be asked for the delta.

    One pass through the UNet serves base and adapted, cond and uncond, unless memory is too short for all of them at
    once.
    """

    def __init__(
        self,
        unet: UNet,
        parameterization: Parameterization,
        base: Conditioning | Prompts,
        adapted: Conditioning | Prompts | None = None,
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
        self._parts = 1
        # The source without those of its guides that do not count, by which do.
        self._during: dict[tuple[bool, ...], Source] = {}
        self._told = [_prompts(base)] if adapted is None else [_prompts(base), _prompts(adapted)]
        self._joined: OrderedDict[tuple[int, ...], tuple[tuple[Conditioning, ...], _Joined]] = OrderedDict()

    @property
    def evaluations(self) -> int:
        """The passes through the UNet so far."""
        return self._evaluations + sum(part.evaluations for part in self._during.values())

    def during(self, progress: float) -> Source:
        """Return the source with those of its guides that count at a point of the run; always the same object."""
        flags = tuple(counts(guide, progress) for guide in self.guides)
        if all(flags):
            return self
        if flags not in self._during:
            part = copy(self)
            part.guides = tuple(itertools.compress(self.guides, flags))
            part._evaluations, part._during = 0, {}
            self._during[flags] = part
        return self._during[flags]

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
        return Deltas(delta, uncond, Parts(_difference(estimates.parts, x), estimates.weights, images))

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
        joined = self._at(step, len(x))
        with_uncond = not uncond_skipped and (cfg_scale != 1 or joined.weights is not None)
        told = joined.on(weight.device, weight.dtype, with_uncond)
        model_x, t = self.parameterization.model_input(x, sigma, self.quantize)
        numbers = torch.arange(len(told.rows), device=weight.device)
        prompts, of_uncond = numbers[: len(told.images)], numbers >= len(told.images)
        batch = _Batch(model_x.to(weight.dtype), t, told.text, told.label, told.rows, of_uncond, prompts)
        output = self._evaluated(batch)
        denoised = self.parameterization.denoised(output.float(), x[told.rows], sigma[told.rows])
        cond, uncond = denoised[:, : len(told.images)], denoised[:, len(told.images) :]
        if told.weights is None and not with_uncond:
            return _Estimates(cond, cond)
        if not with_uncond:
            uncond = torch.zeros_like(x)[None] if uncond_zero else cond[:, told.first]
            cfg_scale = 1.0
        if told.weights is None:
            return _Estimates(uncond + cfg_scale * (cond - uncond), uncond)
        guided = _compose(cond, uncond, cfg_scale * told.weights, told.images)
        if joined.stated is None:
            return _Estimates(guided, uncond)
        own = uncond[:, told.images]
        return _Estimates(guided, uncond, own + cfg_scale * (cond - own), joined.stated, told.images)

    def _evaluated(self, batch: _Batch) -> Tensor:
        """Return the UNet's output ``(R, rows, C, H, W)``, in as many parts as memory asks for; that is remembered.

        First base and adapted go apart, then cond and uncond, then images.
        """
        while True:
            try:
                with without_autocast(batch.x.device):
                    return self._in_parts(batch)
            except Exception as error:
                most = batch.rows * len(self._branches(batch))
                if not out_of_memory(error) or self._parts >= most:
                    raise
            # Only out here has the error let go of what the failed pass had computed.
            self._parts = min(2 * self._parts, most)
            release_cached(batch.x.device)

    def _in_parts(self, batch: _Batch) -> Tensor:
        if self._parts == 1:
            output = batch.evaluate(self.unet, self.guides, None)
            self._evaluations += 1
            return output
        branches = self._branches(batch)
        pieces = batch.split(min(batch.rows, self._parts // len(branches)))
        output = torch.cat(
            [torch.cat([piece.evaluate(self.unet, self.guides, b) for piece in pieces], 1) for b in branches]
        )
        self._evaluations += len(branches) * len(pieces)
        return output

    def _may_differ(self) -> bool:
        return len(self._told) > 1 or bool(self.guides) or forks(self.unet)

    def _branches(self, batch: _Batch) -> tuple[int | None, ...]:
        return (0, 1) if batch.forks or self.guides or forks(self.unet) else (None,)

    def told(self, step: int) -> tuple[Conditioning, ...]:
        """Return what base and, where it is told something of its own, the adapted model are told at a step."""
        return tuple(prompts(step) for prompts in self._told)

    def _at(self, step: int, batch: int) -> _Joined:
        """Join what the models are told at a step; while it stays the same, it is joined once."""
        told = self.told(step)
        key = (batch, *map(id, told))
        if key not in self._joined:
            # What is told is kept with it, or another's id may be the same.
            self._joined[key] = told, _join(list(told), batch)
        self._joined.move_to_end(key)
        while len(self._joined) > MOST_PROMPTS:
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
    text: Text
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
        contexts = map(Text, self.text.context.tensor_split(count, 1))
        plain = zip(*(tensor.tensor_split(count) for tensor in (x, t, self.images, self.uncond)))
        told = zip(contexts, labels)
        return [_Batch(x, t, *own, images, uncond) for (x, t, images, uncond), own in zip(plain, told)]

    def evaluate(self, unet: UNet, guides: Sequence[Guide], branch: int | None) -> Tensor:
        """Return the UNet's output ``(R, M, C, H, W)``, of both branches or of one of them alone."""
        if branch is None:
            return unet(self.x[None], self.t, self.text, self.label, self._injection(guides))
        context = self.text.context[min(branch, len(self.text.context) - 1)][None]
        label = None if self.label is None else self.label[min(branch, len(self.label) - 1)][None]
        injection = replace(self._injection(guides), alone=True) if branch else Injection()
        with alone(unet, branch):
            return unet(self.x[None], self.t, Text(context), label, injection)

    def _injection(self, guides: Sequence[Guide]) -> Injection:
        """Ask the guides what they add to the adapted model."""
        if not guides:
            return Injection()
        rows = self.text.rows
        x, t = (self.x, self.t) if rows is None else (self.x[rows], self.t[rows])
        label = None if self.label is None else self.label[-1]
        inputs = Inputs(x, t, self.text.adapted, label, self.images, self.uncond, self.prompts)
        return sum((guide(inputs) for guide in guides), Injection())


@dataclass(frozen=True)
class _Placed:
    """What base and adapted are told in a pass, on its device: nothing is moved there from step to step."""

    text: Text
    label: Tensor | None
    rows: Tensor
    images: Tensor
    first: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class _Joined:
    """What base and adapted are told, with the branch axis: contexts ``(R, rows, T, C)``, labels ``(R, rows, L)``.

    Row m of cond belongs to image ``images[m]``, whose first row is ``first[image]``.  ``weights``
    ``(R or 1, M)`` is None where each image has one prompt of weight 1; ``stated`` are those that base and adapted
    have in common, None where they have not.
    """

    contexts: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor] | None
    images: Tensor
    first: Tensor
    weights: Tensor | None
    stated: Weights | None
    placed: dict[tuple[torch.device, torch.dtype, bool], _Placed] = field(default_factory=dict)

    def on(self, device: torch.device, dtype: torch.dtype, with_uncond: bool) -> _Placed:
        """Return what the rows of a pass are told: cond, then uncond if it is asked for."""
        key = device, dtype, with_uncond
        if key not in self.placed:
            context, label = self._model_rows(with_uncond)
            images = self.images.to(device)
            rows = torch.cat((images, torch.arange(len(self.first), device=device))) if with_uncond else images
            shared = rows if len(rows) > len(self.first) else None
            self.placed[key] = _Placed(
                Text(context.to(device, dtype), shared, {}),
                None if label is None else label.to(device, dtype),
                rows,
                images,
                self.first.to(device),
                None if self.weights is None else self.weights.to(device),
            )
        return self.placed[key]

    def _model_rows(self, with_uncond: bool) -> tuple[Tensor, Tensor | None]:
        if not with_uncond:
            return self.contexts[0], None if self.labels is None else self.labels[0]
        label = None if self.labels is None else torch.cat(expand(*self.labels), 1)
        return torch.cat(expand(*_same_length(self.contexts)), 1), label


@dataclass(frozen=True)
class _Estimates:
    """Base's and adapted's estimates: guided and for the negative prompt ``(R, N, ...)``, of each part ``(R, M, ...)``.

    ``weights`` say how parts are joined, if both models are told the same, and ``images`` ``(M,)`` which is whose.
    """

    guided: Tensor
    uncond: Tensor
    parts: Tensor | None = None
    weights: Weights | None = None
    images: Tensor | None = None


def _difference(branches: Tensor, x: Tensor) -> Tensor:
    """Return adapted minus base of ``(R, N, C, H, W)``, on the device of ``x``."""
    return (branches[-1] - branches[0]).to(x.device) if len(branches) > 1 else torch.zeros_like(x, dtype=torch.float32)


def _prompts(told: Conditioning | Prompts) -> Prompts:
    return (lambda step: told) if isinstance(told, Conditioning) else told


def _join(told: list[Conditioning], batch: int) -> _Joined:
    told = _same_parts([_for_batch(c, batch) for c in told])
    parts = told[0].weights or ((1.0,),) * batch
    counts = torch.tensor([len(p) for p in parts])
    weights = [torch.tensor([w for p in c.weights for w in p]) for c in told if c.weights]
    labels = [(c.cond_label, c.uncond_label) for c in told if c.cond_label is not None and c.uncond_label is not None]
    return _Joined(
        (_join_branches([c.cond for c in told]), _join_branches([c.uncond for c in told])),
        (_join_branches([c for c, _ in labels]), _join_branches([u for _, u in labels])) if labels else None,
        torch.arange(batch).repeat_interleave(counts),
        counts.cumsum(0) - counts,
        torch.stack(weights) if weights else None,
        told[0].weights if all(c.weights == told[0].weights for c in told) else None,
    )


def _for_batch(told: Conditioning, batch: int) -> Conditioning:
    """Give each of ``batch`` images its rows."""

    def each(tensor: Tensor) -> Tensor:
        return tensor.expand(batch, *tensor.shape[1:])

    def each_label(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else each(tensor)

    uncond, uncond_label = each(told.uncond), each_label(told.uncond_label)
    if told.weights is None:
        return Conditioning(each(told.cond), uncond, each_label(told.cond_label), uncond_label)
    trivial = all(parts == (1.0,) for parts in told.weights)
    return replace(told, uncond=uncond, uncond_label=uncond_label, weights=None if trivial else told.weights)


def _same_parts(told: list[Conditioning]) -> list[Conditioning]:
    """Give every image as many rows of cond in base and adapted: rows of weight 0 fill up."""
    if all(c.weights is None for c in told):
        return told
    stated = [c.weights or ((1.0,),) * len(c.cond) for c in told]
    counts = [max(map(len, parts)) for parts in zip(*stated)]
    return [_fill_up(c, weights, counts) for c, weights in zip(told, stated)]


def _fill_up(told: Conditioning, weights: Weights, counts: list[int]) -> Conditioning:
    rows: list[int] = []
    filled: list[tuple[float, ...]] = []
    start = 0
    for parts, count in zip(weights, counts):
        missing = count - len(parts)
        rows += [*range(start, start + len(parts)), *[start] * missing]
        filled.append(parts + (0.0,) * missing)
        start += len(parts)
    label = None if told.cond_label is None else told.cond_label[rows]
    return replace(told, cond=told.cond[rows], cond_label=label, weights=tuple(filled))


def _compose(cond: Tensor, uncond: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    """Add each row of cond ``(R, M, ...)`` to its image's uncond ``(R, N, ...)``, as far as its weight says."""
    cond, uncond = expand(cond, uncond)
    difference = (cond - uncond[:, images]) * weights[:, :, None, None, None]
    return uncond.index_add(1, images, difference)


def _join_branches(told: list[Tensor]) -> Tensor:
    """Give contexts ``(N, T, C)`` or labels ``(N, L)`` the branch axis: one branch if they are all equal."""
    if all(t is told[0] or torch.equal(t, told[0]) for t in told):
        return told[0][None]
    if told[0].ndim == 3:
        told = list(_same_length(told))
    return torch.stack(told)


def _same_length(contexts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Repeat contexts ``(..., T, C)`` to one length; attention over a repeated context is unchanged."""
    length = math.lcm(*(c.shape[-2] for c in contexts))
    return tuple(torch.cat([c] * (length // c.shape[-2]), -2) for c in contexts)
