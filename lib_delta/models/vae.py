"""The autoencoder of Stable Diffusion 1.x, 2.x and XL, in the key names of the original checkpoints.

Architecture: Rombach et al. 2022 (arXiv 2112.10752, section 3.1).  It decodes latents for the standalone demo; in a
WebUI the host's autoencoder does that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.models import forked_layers


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder's architecture; ``levels[i]`` is the number of channels at 1/2**i of the picture's size."""

    levels: tuple[int, ...]
    res_blocks: int
    latent_channels: int = 4
    picture_channels: int = 3

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel along one side."""
        return int(2 ** (len(self.levels) - 1))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
        """Return the configuration of weights with these shapes; keys are below ``first_stage_model.``."""
        try:
            count = 1 + max(int(m[1]) for k in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
            levels = tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(count))
            if any(width < 4 or width % _groups(width) for width in levels):
                raise ValueError(f"of a width that its norms can group: {levels}")
            return cls(
                levels=levels,
                res_blocks=1
                + max(int(m[1]) for k in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k))),
                latent_channels=shapes["post_quant_conv.weight"][0],
                picture_channels=shapes["encoder.conv_in.weight"][1],
            )
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"these weights are not a Stable Diffusion autoencoder (no usable entry {error})"
            ) from error


def _groups(channels: int) -> int:
    # 32 groups at every real width (128 channels and up).  Narrower models have four channels in a
    # group: with fewer, normalisation would erase the strength of a colour.
    return min(32, channels // 4)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        h = forked_layers.attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Halve (padding right and below, as the original does) or double the size."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


def _middle_block(channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResnetBlock(channels, channels),
            "attn_1": AttnBlock(channels),
            "block_2": ResnetBlock(channels, channels),
        }
    )


def _run_layers(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    for part in parts.values():
        x = part(x)
    return x


class VAEEncoder(nn.Module):
    """Pictures to the mean and log variance of latents, before ``quant_conv``."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.levels[0]
        self.conv_in = nn.Conv2d(config.picture_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(config.levels):
            level = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.res_blocks):
                level["block"].append(ResnetBlock(channels, width))
                channels = width
            if i < len(config.levels) - 1:
                level["downsample"] = Resample(width, down=True)
            self.down.append(level)
        self.mid = _middle_block(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"](x)
        return self.conv_out(F.silu(self.norm_out(_run_layers(self.mid, x))))


class VAEDecoder(nn.Module):
    """Latents after ``post_quant_conv`` to pictures."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.levels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _middle_block(channels)
        levels: list[nn.Module] = []
        for i, width in reversed(list(enumerate(config.levels))):
            level = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.res_blocks + 1):
                level["block"].append(ResnetBlock(channels, width))
                channels = width
            if i > 0:
                level["upsample"] = Resample(width, down=False)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.picture_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = _run_layers(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Pictures ``(N, 3, H, W)`` in [-1, 1] to unscaled latents ``(N, 4, H/f, W/f)`` and back.

    A denoising model works on latents multiplied by its family's scale factor (0.18215 for SD 1.x
    and 2.x, 0.13025 for SDXL); neither method applies it.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = VAEEncoder(config), VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the latents, ``(N, 4, H/f, W/f)`` each."""
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the mean of the latents."""
        return self.moments(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures."""
        return self.decoder(self.post_quant_conv(latents))
