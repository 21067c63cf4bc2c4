"""ControlNet and T2I-Adapter: networks that read a map (edges, depth, a pose) and steer a UNet by it.

ControlNet: Zhang et al. 2023 (arXiv 2302.05543), a copy of the UNet's encoder whose outputs pass zero-initialised
convolutions.  T2I-Adapter: Mou et al. 2023 (arXiv 2302.08453), a small network that depends on neither the step nor
the prompt.  Key names are those of the original releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.models.forked_layers import Conv2d
from lib_delta.models.injection import Injection
from lib_delta.models.unet import Downsample, TextContext, UNet, UNetConfig, UNetEncoder


class ControlNet(UNetEncoder):
    """A ControlNet for a UNet of the given configuration.

    ``hint_widths`` are the channels before, between and after the convolutions that read the map: 3, 16, 16, 32, 32,
    96, 96, 256 and the UNet's width in the released models.  Of the convolutions in the middle, every other one halves
    the size.
    """

    def __init__(self, config: UNetConfig, hint_widths: Sequence[int]) -> None:
        super().__init__(config)
        last = len(hint_widths) - 2
        self.factor = 2 ** ((last - 1) // 2)
        self.hint_channels = hint_widths[0]
        self.input_hint_block = nn.ModuleDict(
            {
                str(2 * i): Conv2d(inputs, outputs, 3, stride=2 if i % 2 == 0 and 0 < i < last else 1)
                for i, (inputs, outputs) in enumerate(pairwise(hint_widths))
            }
        )
        self.zero_convs = nn.ModuleList(nn.ModuleList([Conv2d(width, width, 1)]) for width in self.skips)
        self.middle_block_out = nn.ModuleList([Conv2d(self.skips[-1], self.skips[-1], 1)])

    def hint(self, picture: Tensor) -> Tensor:
        """Return features ``(N, C, h, w)`` of maps ``(N, hint_channels, factor * h, factor * w)`` in [0, 1]."""
        first, *rest = self.input_hint_block.values()
        h = first(picture[None])
        for convolution in rest:
            h = convolution(F.silu(h))
        return h[0]

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | TextContext, hint: Tensor, label: Tensor | None = None
    ) -> list[Tensor]:
        """Return the residuals for each input block's output, and last for the middle block's.

        Args:
            x: latents ``(N, C, h, w)``, in the scale of the UNet's input.
            t: timesteps ``(N,)``.
            context: encoded text ``(N, T, context_width)``, or a :class:`TextContext` of one branch and N rows.
            hint: the map's features (:meth:`hint`).
            label: pooled text and size embedding ``(N, label_width)``, for SDXL.
        """
        emb = self.embed(t, None if label is None else label[None], x.dtype)
        text = context if isinstance(context, TextContext) else TextContext(context[None])
        outputs = self.encode(x[None], emb, text, Injection({0: hint}, single_branch=True))
        zero_convs = [*(parts[0] for parts in self.zero_convs), self.middle_block_out[0]]
        return [convolution(output)[0] for convolution, output in zip(zero_convs, outputs)]


class AdapterBlock(nn.Module):
    """Two convolutions with a residual, after an optional one that changes the number of channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_conv = Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.block1, self.block2 = Conv2d(outputs, outputs, 3), Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.in_conv is None else self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class LightBlock(nn.Module):
    """One level of the light T2I-Adapter: residual blocks on a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, inner: int, count: int) -> None:
        super().__init__()
        self.in_conv, self.out_conv = Conv2d(inputs, inner, 1), Conv2d(inner, outputs, 1)
        self.body = nn.ModuleList(LightResidual(inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(x)
        for block in self.body:
            x = block(x)
        return self.out_conv(x)


class LightResidual(nn.Module):
    """Two convolutions with a residual, of the light T2I-Adapter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1, self.block2 = Conv2d(channels, channels, 3), Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


@dataclass(frozen=True)
class T2IConfig:
    """A T2I-Adapter's architecture, as its weights show it: the map's channels, and the blocks at each width.

    ``unshuffled`` is the factor by which pixels of the map become channels (8, for SDXL 16).  ``halved`` are the levels
    that start by halving the size.  ``inner`` is the light form's narrow width at each level.
    """

    picture_channels: int
    widths: tuple[int, ...]
    blocks: int
    unshuffled: int
    halved: tuple[int, ...]
    inner: tuple[int, ...] = ()


class T2IAdapter(nn.Module):
    """Features of a map at each level of the UNet's encoder."""

    def __init__(self, config: T2IConfig) -> None:
        super().__init__()
        self.config = config
        folded = config.picture_channels * config.unshuffled**2
        first = folded if config.inner else config.widths[0]
        inputs = (first, *config.widths)
        if config.inner:
            self.body = nn.ModuleList(
                LightBlock(inputs[i], width, config.inner[i], config.blocks) for i, width in enumerate(config.widths)
            )
            return
        self.conv_in = Conv2d(folded, first, 3)
        self.body = nn.ModuleList(
            AdapterBlock(inputs[i] if j == 0 else width, width)
            for i, width in enumerate(config.widths)
            for j in range(config.blocks)
        )

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Return features ``(N, C, h, w)`` for each level of maps ``(N, picture_channels, H, W)`` in [0, 1]."""
        h = F.pixel_unshuffle(picture, self.config.unshuffled)[None]
        if not self.config.inner:
            h = self.conv_in(h)
        per_level = 1 if self.config.inner else self.config.blocks
        features = []
        for level in range(len(self.config.widths)):
            if level in self.config.halved:
                h = F.avg_pool2d(h[0], 2, ceil_mode=True)[None]
            for block in self.body[level * per_level : (level + 1) * per_level]:
                h = block(h)
            features.append(h[0])
        return features


def level_ends(unet: UNet) -> list[int]:
    """Return the number of the last input block of each level, before the size is halved."""
    halving = [i for i, parts in enumerate(unet.input_blocks) if isinstance(parts[0], Downsample)]
    return [*(i - 1 for i in halving), len(unet.input_blocks) - 1]


def feature_injection(unet: UNet, features: Sequence[Tensor]) -> Injection:
    """Add a T2I-Adapter's features where it was trained to add them: at the end of each level.

    SDXL's first features belong after the first halving, and its last ones at the middle block.
    """
    ends = level_ends(unet)
    if not unet.config.label_width:
        return Injection(blocks=dict(zip(ends, features)))
    *inside, middle = features
    return Injection(blocks=dict(zip([ends[0] + 1, *ends[1:]], inside)), decoder={len(unet.input_blocks): middle})


def batch_of(residuals: Sequence[Tensor], rows: Tensor | None, count: int) -> list[Tensor]:
    """Spread residuals ``(M, C, h, w)`` of the rows with the numbers ``(M,)`` over ``count`` rows; the rest are zeros.

    With ``rows`` None, the residuals already cover all rows.
    """
    if rows is None:
        return list(residuals)
    return [residual.new_zeros(count, *residual.shape[1:]).index_copy_(0, rows, residual) for residual in residuals]
