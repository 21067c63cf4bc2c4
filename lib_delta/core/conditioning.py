"""What a model is told: encoded prompts, for base and adapted model side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib_delta.core.deltas import PromptWeights
from lib_delta.models.forked_layers import expand
from lib_delta.models.unet import TextContext


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
    weights: PromptWeights | None = None

    def __post_init__(self) -> None:
        if (self.cond_label is None) != (self.uncond_label is None):
            raise ValueError("a label embedding is needed for both the prompt and the negative prompt, or for neither")
        if self.weights is not None and sum(map(len, self.weights)) != len(self.cond):
            raise ValueError(f"{len(self.cond)} rows of cond need as many weights, not {self.weights}")


# Prompts may change during the run (prompt editing): what a model is told at the step of that number.
PromptSchedule = Callable[[int], Conditioning]


@dataclass(frozen=True)
class PlacedConditioning:
    """What base and adapted are told in a pass, on its device: nothing is moved there from step to step."""

    text: TextContext
    label: Tensor | None
    rows: Tensor
    images: Tensor
    first: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class JoinedConditioning:
    """What base and adapted are told, with the branch axis: contexts ``(R, rows, T, C)``, labels ``(R, rows, L)``.

    Row m of cond belongs to image ``images[m]``, whose first row is ``first[image]``.  ``weights``
    ``(R or 1, M)`` is None where each image has one prompt of weight 1; ``shared_weights`` are those that base and
    adapted have in common, None where they have not.
    """

    contexts: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor] | None
    images: Tensor
    first: Tensor
    weights: Tensor | None
    shared_weights: PromptWeights | None
    by_device: dict[tuple[torch.device, torch.dtype, bool], PlacedConditioning] = field(default_factory=dict)

    def on(self, device: torch.device, dtype: torch.dtype, with_uncond: bool) -> PlacedConditioning:
        """Return what the rows of a pass are told: cond, then uncond if it is asked for."""
        key = device, dtype, with_uncond
        if key not in self.by_device:
            context, label = self._model_rows(with_uncond)
            images = self.images.to(device)
            rows = torch.cat((images, torch.arange(len(self.first), device=device))) if with_uncond else images
            shared = rows if len(rows) > len(self.first) else None
            self.by_device[key] = PlacedConditioning(
                TextContext(context.to(device, dtype), shared, {}),
                None if label is None else label.to(device, dtype),
                rows,
                images,
                self.first.to(device),
                None if self.weights is None else self.weights.to(device),
            )
        return self.by_device[key]

    def _model_rows(self, with_uncond: bool) -> tuple[Tensor, Tensor | None]:
        if not with_uncond:
            return self.contexts[0], None if self.labels is None else self.labels[0]
        label = None if self.labels is None else torch.cat(expand(*self.labels), 1)
        return torch.cat(expand(*_repeat_to_same_length(self.contexts)), 1), label


def as_prompts(conditionings: Conditioning | PromptSchedule) -> PromptSchedule:
    return (lambda step: conditionings) if isinstance(conditionings, Conditioning) else conditionings


def join_branches(conditionings: list[Conditioning], batch: int) -> JoinedConditioning:
    conditionings = _equal_part_counts([_expand_to_batch(c, batch) for c in conditionings])
    parts = conditionings[0].weights or ((1.0,),) * batch
    counts = torch.tensor([len(p) for p in parts])
    weights = [torch.tensor([w for p in c.weights for w in p]) for c in conditionings if c.weights]
    labels = [
        (c.cond_label, c.uncond_label) for c in conditionings if c.cond_label is not None and c.uncond_label is not None
    ]
    return JoinedConditioning(
        (_stack_branches([c.cond for c in conditionings]), _stack_branches([c.uncond for c in conditionings])),
        (_stack_branches([c for c, _ in labels]), _stack_branches([u for _, u in labels])) if labels else None,
        torch.arange(batch).repeat_interleave(counts),
        counts.cumsum(0) - counts,
        torch.stack(weights) if weights else None,
        conditionings[0].weights if all(c.weights == conditionings[0].weights for c in conditionings) else None,
    )


def _expand_to_batch(conditionings: Conditioning, batch: int) -> Conditioning:
    """Give each of ``batch`` images its rows."""

    def each(tensor: Tensor) -> Tensor:
        return tensor.expand(batch, *tensor.shape[1:])

    def each_label(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else each(tensor)

    uncond, uncond_label = each(conditionings.uncond), each_label(conditionings.uncond_label)
    if conditionings.weights is None:
        return Conditioning(each(conditionings.cond), uncond, each_label(conditionings.cond_label), uncond_label)
    trivial = all(parts == (1.0,) for parts in conditionings.weights)
    return replace(
        conditionings, uncond=uncond, uncond_label=uncond_label, weights=None if trivial else conditionings.weights
    )


def _equal_part_counts(conditionings: list[Conditioning]) -> list[Conditioning]:
    """Give every image as many rows of cond in base and adapted: rows of weight 0 fill up."""
    if all(c.weights is None for c in conditionings):
        return conditionings
    stated = [c.weights or ((1.0,),) * len(c.cond) for c in conditionings]
    counts = [max(map(len, parts)) for parts in zip(*stated)]
    return [_pad_parts(c, weights, counts) for c, weights in zip(conditionings, stated)]


def _pad_parts(conditionings: Conditioning, weights: PromptWeights, counts: list[int]) -> Conditioning:
    rows: list[int] = []
    filled: list[tuple[float, ...]] = []
    start = 0
    for parts, count in zip(weights, counts):
        missing = count - len(parts)
        rows += [*range(start, start + len(parts)), *[start] * missing]
        filled.append(parts + (0.0,) * missing)
        start += len(parts)
    label = None if conditionings.cond_label is None else conditionings.cond_label[rows]
    return replace(conditionings, cond=conditionings.cond[rows], cond_label=label, weights=tuple(filled))


def _stack_branches(conditionings: list[Tensor]) -> Tensor:
    """Give contexts ``(N, T, C)`` or labels ``(N, L)`` the branch axis: one branch if they are all equal."""
    if all(t is conditionings[0] or torch.equal(t, conditionings[0]) for t in conditionings):
        return conditionings[0][None]
    if conditionings[0].ndim == 3:
        conditionings = list(_repeat_to_same_length(conditionings))
    return torch.stack(conditionings)


def _repeat_to_same_length(contexts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Repeat contexts ``(..., T, C)`` to one length; attention over a repeated context is unchanged."""
    length = math.lcm(*(c.shape[-2] for c in contexts))
    return tuple(torch.cat([c] * (length // c.shape[-2]), -2) for c in contexts)
