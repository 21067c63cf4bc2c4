"""Map states through pixels: one tiny autoencoder decodes them, another encodes the image."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.bridges.base import BridgeForm, BridgeSettings
from lib_delta.bridges.latent_maps import set_circular
from lib_delta.bridges.learned import LearnedBridge, load_bridge, weights_path
from lib_delta.bridges.resizing import resized
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError, SettingError
from lib_delta.files.weight_file import FileState
from lib_delta.models import taesd

LABEL = "TAESD bridge"
TINY = {Space.SD1: "taesd", Space.SDXL: "taesdxl", Space.SD3: "taesd3", Space.FLUX1: "taef1"}
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
# Measured agreement of a test image with itself after encoding and decoding: at least .89 for autoencoders of the
# right spaces, at most .77 if one belongs to another space.
MIN_AGREEMENT = 0.83


class ThroughPixels(nn.Module):
    """Decode the target's clean latent to an image and encode that in the source's space, one image at a time.

    The image is resized to the requested size; unlike latents, images can be averaged.
    """

    def __init__(self, decoder: nn.Module, encoder: nn.Module, channels: tuple[int, int]) -> None:
        super().__init__()
        self.decoder, self.encoder, self.channels = decoder, encoder, channels

    def forward(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map latents ``(N, A, H, W)`` to ``(N, B, *size)``."""
        return torch.cat([self._encoded(latent, size or (z.shape[-2], z.shape[-1])) for latent in z.split(1)])

    def _encoded(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        picture = self.decoder(latent).clamp(0, 1)
        if size != tuple(latent.shape[-2:]):
            picture = resized(picture, (taesd.FACTOR * size[0], taesd.FACTOR * size[1]))
        encoded: Tensor = self.encoder(picture)
        return encoded


def taesd_bridge(settings: BridgeSettings) -> LearnedBridge:
    """Return the bridge through the tiny autoencoders of a folder; unchanged files are read once.

    Deltas return by the learned map, which is more accurate for them than images are.  Raises :class:`SettingError` for
    a missing file, and :class:`CheckpointError` for one whose content does not match its name.
    """
    source, target, folder = settings.source, settings.target, settings.autoencoders
    for space in (source, target):
        if space not in TINY:
            raise SettingError(f"the bridge taesd does not know latents of {space.label}: choose the stitched bridge")
    decoder = FileState.of(_taesd_file(folder, target, "decoder"))
    encoder = FileState.of(_taesd_file(folder, source, "encoder"))
    state = _loaded(decoder, encoder, source, target, tiled=settings.tiled)
    difference = load_bridge(weights_path(source, target), tiled=settings.tiled).difference
    return LearnedBridge(state, difference, name="taesd", resolution=settings.resolution, label=LABEL)


TAESD = BridgeForm("taesd", LABEL, taesd_bridge)


def _taesd_file(folder: Path | None, space: Space, part: str) -> Path:
    name = f"{TINY[space]}_{part}"
    candidates = (folder / f"{name}{ending}" for ending in WEIGHT_SUFFIXES) if folder is not None else ()
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        place = "the folder VAE-taesd of the WebUI's models" if folder is None else folder
        raise SettingError(
            f"the bridge taesd needs {name} ({' or '.join(WEIGHT_SUFFIXES)}) in {place}, and there is none: download "
            "it from github.com/madebyollin/taesd, or choose the learned bridge"
        )
    return file


@lru_cache(maxsize=8)
def _loaded(decoder: FileState, encoder: FileState, source: Space, target: Space, *, tiled: bool) -> ThroughPixels:
    parts = _part(decoder.path, "decoder", target), _part(encoder.path, "encoder", source)
    _check_fit(*parts, source, target, f"{decoder.path.name} and {encoder.path.name}")
    state = ThroughPixels(*parts, (target.channels, source.channels))
    if tiled:
        set_circular(state)
    return state


def _part(path: Path, part: str, space: Space) -> nn.Module:
    module = taesd.load_taesd(path, part)
    channels = taesd.latent_channels(module, part)
    if channels != space.channels:
        raise CheckpointError(
            f"{path.name} is a tiny autoencoder for latents of {channels} channels, and those of {space.label} have "
            f"{space.channels}: it is another file than its name says"
        )
    return module


@torch.no_grad()
def _check_fit(decoder: nn.Module, encoder: nn.Module, source: Space, target: Space, names: str) -> None:
    """Raise :class:`CheckpointError` unless both belong to their spaces, which shapes do not show.

    A test image is encoded, mapped to the target's space by the learned map, and decoded.
    """
    picture = _probe()
    mapped = load_bridge(weights_path(target, source)).state(encoder(picture))
    images = torch.cat((decoder(mapped), picture)).flatten(2)
    agreement = float(F.cosine_similarity(*(images - images.mean(2, keepdim=True)).flatten(1).split(1)))
    if not agreement > MIN_AGREEMENT:
        raise CheckpointError(
            f"{names} do not fit together as those of {target.label} and of {source.label} do (a picture that goes "
            f"through both agrees with itself by {agreement:.2f}): one is another file than its name says"
        )


def _probe(side: int = 96) -> Tensor:
    """Return a test image ``(1, 3, side, side)`` of smooth colours."""
    down, across = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = 5 * across + 2 * down, math.pi / 2 - 3 * across + 4 * down, 7 * (across - 0.5) ** 2 + 6 * down
    return torch.stack([0.5 + 0.4 * wave.sin() for wave in waves])[None]
