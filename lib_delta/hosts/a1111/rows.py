"""The rows that ``CFGDenoiser`` evaluates together: which image each is of, and how guidance combines them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, PromptWeights
from lib_delta.diffusion.parameterization import per_image

# Below this, guidance cannot be divided by its scale.
SMALLEST_SCALE = 0.01


@dataclass(frozen=True)
class RowLayout:
    """The rows of N images with M prompts: image after image with its prompts, then N rows without the prompt.

    An editing model (InstructPix2Pix) has ``image_cfg_scale``, M = N, and 2 N rows without the prompt: N with the
    image to edit, and N without it.  The tensors are made once in a pass, so that no step moves any to the device.
    """

    weights: PromptWeights
    images: Tensor  # (rows,): the number of each row's image
    prompt_weights: Tensor  # (M,)
    weight_sums: Tensor  # (N,)
    prompt_counts: Tensor  # (N,)
    first_rows: Tensor  # (N,): the row of each image's first prompt
    image_cfg_scale: float | None

    @classmethod
    def of(
        cls, weights: PromptWeights, without_prompt: int, image_cfg_scale: float | None, device: torch.device
    ) -> RowLayout:
        """Return the layout of prompts with these weights, and ``without_prompt`` rows of each image without it."""
        counts = torch.tensor([len(image) for image in weights])
        images = torch.arange(len(weights))
        return cls(
            weights,
            torch.cat((images.repeat_interleave(counts), images.repeat(without_prompt))).to(device),
            torch.tensor([weight for image in weights for weight in image]).to(device),
            torch.tensor([sum(image) for image in weights]).to(device),
            counts.to(device),
            (counts.cumsum(0) - counts).to(device),
            image_cfg_scale,
        )

    def positions(self, x: Tensor) -> Tensor:
        """Return where each row is among the latents ``(rows, C, H, W)`` that the model evaluates.

        Extensions (Regional Prompter) reorder the prompts' rows of a batch.  A row is of the image with the same
        latent, and the rows of one image keep their order.  If two images have the same latent, this returns the
        rows as they were.  The device computes all of it, and is not waited for.
        """
        original = torch.arange(len(x), device=x.device)
        if len(self.weights) == 1 or self.image_cfg_scale is not None:
            return original
        prompts = len(x) - len(self.weights)  # the last rows have each image once, in order
        matches = torch.stack([(x[:prompts] == image).flatten(1).all(1) for image in x[prompts:]])  # (N, M)
        # For each image its rows in their order, then those of the others.
        ordered = (original[:prompts] + prompts * ~matches).float().argsort(1)
        reordered = torch.cat([rows[: len(image)] for rows, image in zip(ordered, self.weights)])
        distinct = (matches.sum(1) == self.prompt_counts).all()
        return torch.cat((torch.where(distinct, reordered, original[:prompts]), original[prompts:]))

    def uncond_skipped(self, out: Tensor, evaluated: int) -> bool:
        """Return whether the WebUI skipped guidance to save time: the model did not evaluate the last rows.

        The WebUI then repeats each image's first prompt there.  Comparing these rows would mistake equal prompts
        for it, so they are compared only if extensions made the model evaluate yet other rows.
        """
        count = len(self.weights)
        if self.image_cfg_scale is not None:
            return False
        if evaluated in (len(out), len(out) - count):
            return evaluated < len(out)
        return torch.equal(out[-count:], out[self.first_rows])

    def guided(self, estimates: Tensor, cfg_scale: float) -> Tensor:
        """Combine the estimates of all rows into one for each image, as ``CFGDenoiser`` does next."""
        count = len(self.weights)
        if self.image_cfg_scale is not None:
            cond, image_cond, uncond = estimates.chunk(3)
            return uncond + cfg_scale * (cond - image_cond) + self.image_cfg_scale * (image_cond - uncond)
        uncond, cond = estimates[-count:], estimates[:-count]
        images = self.images[: len(cond)]
        weights = per_image(cfg_scale * self.prompt_weights, cond)
        return uncond.clone().index_add_(0, images, (cond - uncond[images]) * weights)

    def row_changes(self, changes: Deltas, cfg_scale: float) -> Tensor:
        """Return the change of each row, so that guidance combines them into ``changes.guided``.

        At scale s, guidance combines the prompts' changes c_i, of weights w_i, and the negative prompt's u into
        ``u + s * sum(w_i * (c_i - u))``.  The sum is right with ``c_i = u + (part_i - u) / s``, the adaptation's
        change of each part of AND; and, if the side model has other parts, with
        ``c = u + (guided - u) / (s * sum(w_i))`` for all prompts of an image.

        The same change for all rows would give the same sum.  But CFG++ samplers read the negative prompt's rows,
        previews and interrupted pictures the prompt's, and extensions give each part of AND a region.
        """
        guided, uncond, parts = changes
        if self.image_cfg_scale is not None:
            return guided[self.images]
        images = self.images[: -len(self.weights)]
        if parts is not None and parts.weights == self.weights and abs(cfg_scale) > SMALLEST_SCALE:
            return torch.cat((uncond[images] + (parts.change - uncond[images]) / cfg_scale, uncond))
        if not all(abs(cfg_scale * sum(image)) > SMALLEST_SCALE for image in self.weights):
            return guided[self.images]
        cond = uncond + (guided - uncond) / per_image(cfg_scale * self.weight_sums, guided)
        return torch.cat((cond[images], uncond))
