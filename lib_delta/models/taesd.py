"""The tiny autoencoders of the released latent spaces: TAESD and its relatives, by Ollin Boer Bohan (MIT).

They are distilled from the released autoencoders, fast enough for previews, and replace them when these are not
available.  Keys are those of the release's ``nn.Sequential``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_weights
from lib_delta.models.unpatched import Conv2d

CHANNELS = 64
BLOCKS_PER_SIZE = 3  # at every size except the picture's
FACTOR = 8  # picture pixels per latent pixel along one side
PARTS = ("encoder", "decoder")


class Block(nn.Module):
    """Three convolutions with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class PooledBlock(Block):
    """A block that first adds features normalised over the whole image, as TAEF2's at the latents' size do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        wide = 4 * channels
        self.pool = nn.Sequential(
            Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = super().forward(x + self.pool(x))
        return added


class SoftClamp(nn.Module):
    """Limit latents to the decoder's training range."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


def _convolution(channels: int, stride: int = 1) -> Conv2d:
    return Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)


def encoder(latent_channels: int) -> nn.Sequential:
    """Return a network from pictures ``(N, 3, H, W)`` in 0..1 to latents ``(N, C, H/8, W/8)``.

    Latents are in the scale of denoising models.
    """
    layers: list[nn.Module] = [Conv2d(3, CHANNELS, 3, padding=1), Block(CHANNELS)]
    for blocks in (BLOCKS_PER_SIZE, BLOCKS_PER_SIZE, 0):
        layers += [_convolution(CHANNELS, stride=2), *(Block(CHANNELS) for _ in range(blocks))]
    return nn.Sequential(*layers, *last_of_encoder(latent_channels))


def decoder(latent_channels: int) -> nn.Sequential:
    """Return a network from latents ``(N, C, H/8, W/8)`` to pictures ``(N, 3, H, W)`` in 0..1.

    Latents are in the scale of denoising models.
    """
    layers: list[nn.Module] = [*first_of_decoder(latent_channels)]
    for blocks in (BLOCKS_PER_SIZE, BLOCKS_PER_SIZE, 1):
        layers += [nn.Upsample(scale_factor=2), _convolution(CHANNELS), *(Block(CHANNELS) for _ in range(blocks))]
    return nn.Sequential(*layers, Conv2d(CHANNELS, 3, 3, padding=1))


def first_of_decoder(latent_channels: int, blocks: int = BLOCKS_PER_SIZE) -> nn.Sequential:
    """Return the decoder's layers at the latents' size; fewer ``blocks`` return only the first of them."""
    start = SoftClamp(), Conv2d(latent_channels, CHANNELS, 3, padding=1), nn.ReLU()
    return nn.Sequential(*start, *(Block(CHANNELS) for _ in range(blocks)))


def last_of_encoder(latent_channels: int, blocks: int = BLOCKS_PER_SIZE) -> nn.Sequential:
    """Return the encoder's layers at the latents' size; fewer ``blocks`` return only the last of them."""
    return nn.Sequential(*(Block(CHANNELS) for _ in range(blocks)), Conv2d(CHANNELS, latent_channels, 3, padding=1))


def load_taesd(path: Path, part: str) -> nn.Sequential:
    """Load one file; ``part`` is "encoder" or "decoder".

    Raises :class:`CheckpointError` if the file is not that part of a tiny autoencoder.
    """
    with WeightFile.open(path) as file:
        channels = _latent_channels(file.shapes, part)
        if channels is None:
            raise CheckpointError(f"{path.name} is not the {part} of a tiny autoencoder (TAESD)")
        with torch.device("meta"):
            module = encoder(channels) if part == "encoder" else decoder(channels)
            for number in {int(key.split(".")[0]) for key in file.shapes if re.match(r"\d+\.pool\.", key)}:
                if number < len(module) and isinstance(module[number], Block):
                    module[number] = PooledBlock(CHANNELS)
        unknown = sorted(key for key in file.shapes.keys() - module.state_dict().keys() if key[0].isdigit())
        if unknown:  # without them the others would compute something else
            raise CheckpointError(f"{path.name} is a tiny autoencoder with other layers than TAESD's ({unknown[0]})")
        load_weights(module, {key: file.tensor(key) for key in file.shapes}, path.name)
    return module


def latent_channels(module: nn.Sequential, part: str) -> int:
    """Return the latent channels of an encoder's output or a decoder's input."""
    channels = _latent_channels({key: tuple(value.shape) for key, value in module.state_dict().items()}, part)
    assert channels is not None
    return channels


def _latent_channels(shapes: Mapping[str, tuple[int, ...]], part: str) -> int | None:
    """Return the latent channels by the first (decoder) or the last (encoder) convolution; None for other files."""
    numbers = [int(m[1]) for key in shapes if (m := re.match(r"(\d+)\.", key))]
    first, last = shapes.get("1.weight"), shapes.get(f"{max(numbers, default=0)}.weight")
    if part == "decoder" and first is not None and last is not None and last[0] == 3:
        return first[1]
    if part == "encoder" and shapes.get("0.weight", ())[1:2] == (3,) and last is not None:
        return last[0]
    return None
