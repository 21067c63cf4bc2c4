"""The autoencoders whose latent spaces bridges connect: tiny stand-ins for them, or those of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import detect_family
from lib_delta.files.weight_file import WeightFile
from lib_delta.models import taesd
from lib_delta.models.loading import load_vae
from lib_delta.models.vae import VAE

TINY = {Space.SD1: "taesd", Space.SDXL: "taesdxl", Space.SD3: "taesd3", Space.FLUX1: "taef1"}
ALSO_TINY = {Space.FLUX2: "taef2"}  # used if it is there
WHERE = (
    "the tiny autoencoders (taesd, taesdxl, taesd3 and taef1, each as NAME_encoder and NAME_decoder, .safetensors "
    "or .pth) are needed: WebUIs download them for previews into models/VAE-taesd, and github.com/madebyollin/taesd "
    "has them; give their folder with --taesd DIR"
)


@dataclass(frozen=True)
class Autoencoder:
    """Map pictures ``(N, 3, H, W)`` in 0..1 to denoising models' latents and back, computed in ``dtype``."""

    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Return latents ``(N, C, H/8, W/8)`` in single precision."""
        return self.encoder(pictures.to(self.dtype, memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures in 0..1, in single precision."""
        return self.decoder(latents.to(self.dtype, memory_format=torch.channels_last)).float().clamp(0, 1)


def tiny(folder: Path) -> dict[Space, Autoencoder]:
    """Read the tiny autoencoders of a folder, which compute in their stored type, bfloat16.

    Raises :class:`CheckpointError` if some are missing, with the address to download them from.
    """
    missing = [name for name in TINY.values() for part in taesd.PARTS if not _file(folder, name, part).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]}: {WHERE}")
    spaces = [*TINY]
    for space, name in ALSO_TINY.items():
        if all(_file(folder, name, part).is_file() for part in taesd.PARTS):
            spaces.append(space)
    return {space: _tiny(folder, space) for space in spaces}


def tiny_part(folder: Path, space: Space, part: str) -> nn.Sequential:
    """Read the "encoder" or the "decoder" of a tiny autoencoder, in single precision."""
    return taesd.load_taesd(_file(folder, (TINY | ALSO_TINY)[space], part), part)


def _tiny(folder: Path, space: Space) -> Autoencoder:
    encoder, decoder = (tiny_part(folder, space, part).bfloat16() for part in taesd.PARTS)
    channels_last = {"memory_format": torch.channels_last}
    return Autoencoder(encoder.to(**channels_last), decoder.to(**channels_last), torch.bfloat16)


def _file(folder: Path, name: str, part: str) -> Path:
    safe, pickled = (folder / f"{name}_{part}.{end}" for end in ("safetensors", "pth"))
    return pickled if pickled.is_file() and not safe.is_file() else safe


def of_checkpoints(paths: Sequence[Path]) -> dict[Space, Autoencoder]:
    """Read the autoencoders of checkpoints, each in the space of its family.

    Raises :class:`CheckpointError` if one has none, or two share a space.
    """
    found: dict[Space, Autoencoder] = {}
    for path in paths:
        with WeightFile.open(path) as file:
            space = detect_family(file.shapes, path.name).space
            if space in found:
                raise CheckpointError(f"{path.name} shares its latent space, {space.label}, with another of the files")
            found[space] = of_vae(load_vae(file), space.scale_factor, space.shift)
    return found


def of_vae(vae: VAE, scale_factor: float, shift: float = 0.0) -> Autoencoder:
    """Wrap an autoencoder that works on pictures in -1..1 and latents without scale."""
    return Autoencoder(
        lambda pictures: scale_factor * (vae.encode(2 * pictures - 1) - shift),
        lambda latents: vae.decode(latents / scale_factor + shift) / 2 + 0.5,
    )
