"""The UNet's inputs: one row for each prompt of each image, then one for each negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_delta.core.conditioning import PlacedConditioning
from lib_delta.core.guides import Guide, GuideInputs
from lib_delta.models.forked_layers import single_branch
from lib_delta.models.injection import Injection
from lib_delta.models.network import Network
from lib_delta.models.unet import TextContext


@dataclass(frozen=True)
class Rows:
    """The UNet's inputs for M rows.

    ``x`` ``(N, C, H, W)`` are scaled latents and ``t`` ``(N,)`` timesteps, of N images or, after :meth:`split`, of the
    M rows.  ``text`` and ``label`` ``(R, M, L)`` are the conditioning.  ``images`` ``(M,)`` is the image of each row,
    ``uncond`` ``(M,)`` marks the negative prompts' rows.  ``prompts`` are the indices ``(K,)`` of the other rows,
    None if finding them would need a transfer from the device.
    """

    x: Tensor
    t: Tensor
    text: TextContext
    label: Tensor | None
    images: Tensor
    uncond: Tensor
    prompts: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, t: Tensor, conditioning: PlacedConditioning) -> Rows:
        """Return the rows of a pass for scaled latents ``x`` ``(N, C, H, W)`` at timesteps ``t`` ``(N,)``."""
        indices = torch.arange(len(conditioning.row_images), device=x.device)
        prompts = len(conditioning.cond_images)
        return cls(
            x,
            t,
            conditioning.text,
            conditioning.label,
            conditioning.row_images,
            uncond=indices >= prompts,
            prompts=indices[:prompts],
        )

    @property
    def count(self) -> int:
        """The number of rows M."""
        return self.text.context.shape[1]

    @property
    def differ(self) -> bool:
        """Whether base and adapted have different conditioning."""
        return len(self.text.context) > 1 or (self.label is not None and len(self.label) > 1)

    def split(self, count: int) -> list[Rows]:
        """Return the rows in ``count`` independent parts, without caches."""
        x, t = self._per_row()
        per_row = zip(*(tensor.tensor_split(count) for tensor in (x, t, self.images, self.uncond)))
        contexts = map(TextContext, self.text.context.tensor_split(count, 1))
        labels = [None] * count if self.label is None else self.label.tensor_split(count, 1)
        return [
            Rows(x, t, text, label, images, uncond)
            for (x, t, images, uncond), text, label in zip(per_row, contexts, labels)
        ]

    def evaluate(self, unet: Network, guides: Sequence[Guide], branch: int | None) -> Tensor:
        """Return the UNet's output ``(R, M, C, H, W)``, or ``(1, M, C, H, W)`` of one branch: 0 base, 1 adapted."""
        if branch is None:
            return unet(self.x[None], self.t, self.text, self.label, self._injection(guides))
        context = self.text.context[min(branch, len(self.text.context) - 1)][None]
        label = None if self.label is None else self.label[min(branch, len(self.label) - 1)][None]
        injection = replace(self._injection(guides), single_branch=True) if branch else Injection()
        with single_branch(unet, branch):
            return unet(self.x[None], self.t, TextContext(context), label, injection)

    def _injection(self, guides: Sequence[Guide]) -> Injection:
        """Return the sum of the guides' additions to the adapted model."""
        if not guides:
            return Injection()
        x, t = self._per_row()
        label = None if self.label is None else self.label[-1]
        inputs = GuideInputs(x, t, self.text.adapted, label, self.images, self.uncond, self.prompts)
        return sum((guide(inputs) for guide in guides), Injection())

    def _per_row(self) -> tuple[Tensor, Tensor]:
        """Return latents ``(M, C, H, W)`` and timesteps ``(M,)``."""
        rows = self.text.rows
        return (self.x, self.t) if rows is None else (self.x[rows], self.t[rows])
