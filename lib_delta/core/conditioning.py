"""Encoded prompts, and those of base and adapted joined on the branch axis."""

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
    """One model's encoded prompts, for SDXL with label embeddings.

    ``cond`` is ``(M or 1, T, C)`` and ``uncond`` ``(N or 1, T, C)`` for N images; T may differ.  The labels are
    ``(M or 1, L)`` and ``(N or 1, L)``.  M equals N, unless prompts are joined by AND (compositional diffusion,
    arXiv 2206.01714): ``weights`` then has, for each image, the weights of its rows of ``cond``.
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


# The conditioning at a step's number, for prompts that change during the run (prompt editing).
PromptSchedule = Callable[[int], Conditioning]


@dataclass(frozen=True)
class PlacedConditioning:
    """The conditioning of base and adapted on the UNet's device, so that steps move nothing there.

    ``text`` and ``label`` have a row for each prompt of each image and, if the pass has guidance, a row for each
    negative prompt after these.  ``row_images`` is the image of each row, ``cond_images`` ``(M,)`` that of each
    prompt's row.  ``first_rows`` ``(N,)``, ``weights`` and ``shared_weights`` are as in :class:`JoinedConditioning`.
    """

    text: TextContext
    label: Tensor | None
    row_images: Tensor
    cond_images: Tensor
    first_rows: Tensor
    weights: Tensor | None
    shared_weights: PromptWeights | None


@dataclass(frozen=True)
class JoinedConditioning:
    """The conditioning of base and adapted with the branch axis R.

    ``contexts`` are those of cond and uncond ``(R, rows, T, C)``, ``labels`` theirs ``(R, rows, L)``.
    ``cond_images`` ``(M,)`` is the image of each row of cond, ``first_rows`` ``(N,)`` the first row of each image.
    ``weights`` ``(R or 1, M)`` is None if each image has one prompt of weight 1.  ``shared_weights`` are the weights
    if base and adapted have the same ones, else None.
    """

    contexts: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor] | None
    cond_images: Tensor
    first_rows: Tensor
    weights: Tensor | None
    shared_weights: PromptWeights | None
    by_device: dict[tuple[torch.device, torch.dtype, bool], PlacedConditioning] = field(default_factory=dict)

    def on(self, device: torch.device, dtype: torch.dtype, with_uncond: bool) -> PlacedConditioning:
        """Return the conditioning of a pass's rows on a device: cond, then uncond if requested.  It is cached."""
        key = device, dtype, with_uncond
        if key not in self.by_device:
            self.by_device[key] = self._place(device, dtype, with_uncond)
        return self.by_device[key]

    def _place(self, device: torch.device, dtype: torch.dtype, with_uncond: bool) -> PlacedConditioning:
        context, label = self._model_rows(with_uncond)
        images = self.cond_images.to(device)
        rows = torch.cat((images, torch.arange(len(self.first_rows), device=device))) if with_uncond else images
        shared_rows = rows if len(rows) > len(self.first_rows) else None
        return PlacedConditioning(
            TextContext(context.to(device, dtype), shared_rows, {}),
            None if label is None else label.to(device, dtype),
            rows,
            images,
            self.first_rows.to(device),
            None if self.weights is None else self.weights.to(device),
            self.shared_weights,
        )

    def _model_rows(self, with_uncond: bool) -> tuple[Tensor, Tensor | None]:
        if not with_uncond:
            return self.contexts[0], None if self.labels is None else self.labels[0]
        label = None if self.labels is None else torch.cat(expand(*self.labels), 1)
        return torch.cat(expand(*_repeat_to_same_length(self.contexts)), 1), label


def as_schedule(conditioning: Conditioning | PromptSchedule) -> PromptSchedule:
    """Return a schedule as it is, and one conditioning as a schedule that does not change."""
    return (lambda step: conditioning) if isinstance(conditioning, Conditioning) else conditioning


def join_branches(branches: list[Conditioning], batch: int) -> JoinedConditioning:
    """Join the conditioning of base and adapted (or of both, if there is one) for ``batch`` images."""
    branches = _equal_part_counts([_expand_to_batch(branch, batch) for branch in branches])
    parts = branches[0].weights or ((1.0,),) * batch
    counts = torch.tensor([len(weights) for weights in parts])
    weights = [torch.tensor([w for part in branch.weights for w in part]) for branch in branches if branch.weights]
    labels = [
        (b.cond_label, b.uncond_label) for b in branches if b.cond_label is not None and b.uncond_label is not None
    ]
    return JoinedConditioning(
        (_stack_branches([b.cond for b in branches]), _stack_branches([b.uncond for b in branches])),
        (_stack_branches([c for c, _ in labels]), _stack_branches([u for _, u in labels])) if labels else None,
        torch.arange(batch).repeat_interleave(counts),
        counts.cumsum(0) - counts,
        torch.stack(weights) if weights else None,
        branches[0].weights if all(b.weights == branches[0].weights for b in branches) else None,
    )


def _expand_to_batch(conditioning: Conditioning, batch: int) -> Conditioning:
    """Return conditioning with rows for each of ``batch`` images; weights that are all 1 become None."""

    def expanded(tensor: Tensor) -> Tensor:
        return tensor.expand(batch, *tensor.shape[1:])

    def expanded_label(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else expanded(tensor)

    uncond, uncond_label = expanded(conditioning.uncond), expanded_label(conditioning.uncond_label)
    if conditioning.weights is None:
        return Conditioning(expanded(conditioning.cond), uncond, expanded_label(conditioning.cond_label), uncond_label)
    trivial = all(parts == (1.0,) for parts in conditioning.weights)
    weights = None if trivial else conditioning.weights
    return replace(conditioning, uncond=uncond, uncond_label=uncond_label, weights=weights)


def _equal_part_counts(branches: list[Conditioning]) -> list[Conditioning]:
    """Give every image the same number of cond rows in base and adapted, by adding rows of weight 0."""
    if all(branch.weights is None for branch in branches):
        return branches
    weights = [branch.weights or ((1.0,),) * len(branch.cond) for branch in branches]
    counts = [max(map(len, parts)) for parts in zip(*weights)]
    return [_pad_parts(branch, parts, counts) for branch, parts in zip(branches, weights)]


def _pad_parts(conditioning: Conditioning, weights: PromptWeights, counts: list[int]) -> Conditioning:
    """Repeat each image's first row with weight 0, until the image has as many rows as ``counts`` says."""
    rows: list[int] = []
    padded: list[tuple[float, ...]] = []
    start = 0
    for parts, count in zip(weights, counts):
        missing = count - len(parts)
        rows += [*range(start, start + len(parts)), *[start] * missing]
        padded.append(parts + (0.0,) * missing)
        start += len(parts)
    label = None if conditioning.cond_label is None else conditioning.cond_label[rows]
    return replace(conditioning, cond=conditioning.cond[rows], cond_label=label, weights=tuple(padded))


def _stack_branches(branches: list[Tensor]) -> Tensor:
    """Stack contexts ``(N, T, C)`` or labels ``(N, L)`` on the branch axis R; R is 1 if they are all equal."""
    if all(tensor is branches[0] or torch.equal(tensor, branches[0]) for tensor in branches):
        return branches[0][None]
    if branches[0].ndim == 3:
        branches = list(_repeat_to_same_length(branches))
    return torch.stack(branches)


def _repeat_to_same_length(contexts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Repeat contexts ``(..., T, C)`` to one length; attention over a repeated context is unchanged."""
    length = math.lcm(*(context.shape[-2] for context in contexts))
    return tuple(torch.cat([context] * (length // context.shape[-2]), -2) for context in contexts)
