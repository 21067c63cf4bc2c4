"""Fit state maps stitched from tiny autoencoders: filters by least squares, then the whole map by descent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.train.bridges_fit import fit_filter
from demo.train.common import Run, train
from lib_delta.bridges.latent_maps import Filter, StitchedState
from lib_delta.models import taesd

RIDGE = 1e-3
BARELY_SEEN = 0.002  # squared error of a picture in 0..1: about that of the source's autoencoder


@dataclass(frozen=True)
class Layers:
    """The number of blocks taken from decoder and encoder, and the width of the filters between them."""

    reading: int = taesd.BLOCKS_PER_SIZE
    writing: int = taesd.BLOCKS_PER_SIZE
    width: int = 3
    half: int = 4


class Seam(NamedTuple):
    """A source encoder's intermediate features of pictures, ``(N, 64, h, w)``, at the latents' size and at half of it.

    ``pixels`` ``(N, 3 * 64, h, w)`` are the pictures, with the pixels of a latent's point as its channels.
    """

    same: Tensor
    half: Tensor
    pixels: Tensor


def until_seam(encoder: nn.Sequential) -> nn.Sequential:
    """Return the layers of an encoder before those that work at the latents' size."""
    return encoder[: len(encoder) - 1 - taesd.BLOCKS_PER_SIZE]


@torch.no_grad()
def stitched(decoder: nn.Sequential, encoder: nn.Sequential, layers: Layers, z: Tensor, seam: Seam) -> StitchedState:
    """Stitch a target's decoder to a source's encoder by least-squares filters, without any training.

    ``z`` ``(N, C, h, w)`` are the target's latents of the pictures of ``seam``.
    """
    channels = taesd.latent_channels(decoder, "decoder"), taesd.latent_channels(encoder, "encoder")
    state = StitchedState(
        *channels, reading=layers.reading, writing=layers.writing, width=layers.width, half=layers.half
    )
    copy_layers(state.reading, decoder[: len(state.reading)])
    copy_layers(state.writing, encoder[-len(state.writing) :])
    between = encoder[len(until_seam(encoder)) : -len(state.writing)]
    known = [state.known(part.float()) for part in z.split(64)]
    for name, wanted in (("middle", seam.same), ("halving", seam.half)):
        width, stride = (layers.width, 1) if name == "middle" else (layers.half, 2)
        pairs = [(a, between(b.float())) for a, b in zip(known, wanted.split(64))]
        setattr(state, name, fit_filter(pairs, width, bias=True, ridge=RIDGE, stride=stride))
    return state


def copy_layers(layers: nn.Sequential, trained: nn.Sequential) -> None:
    """Copy weights between layers that may have other numbers in their networks.

    A map sees one latent at a time, often a crop, so it leaves out what TAEF2 normalises over the whole image.
    """
    weights = nn.Sequential(*trained).state_dict()
    layers.load_state_dict({key: value for key, value in weights.items() if ".pool." not in key})


def seen_through(z: Tensor, pixels: Tensor) -> Filter:
    """Return the filter that best predicts pictures from a source's latents ``(N, C, h, w)``.

    It estimates the visible part of an error in a latent at little cost.
    """
    pairs = [(a, b) for a, b in zip(z.split(64), pixels.split(64))]
    return fit_filter(pairs, 3, bias=True, ridge=RIDGE).requires_grad_(False)


def tuned(
    state: StitchedState, z: Tensor, wanted: tuple[Tensor, Tensor], look: Filter, run: Run, name: str, folder: Path
) -> StitchedState:
    """Train a whole stitched map on a target's latents ``(N, C, h, w)``; resumes from a save in ``folder``.

    ``wanted`` are the source's latents of the same pictures, and of these at half the size.
    """
    spread = [float(each.float().var()) for each in wanted]

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(z), (run.batch,), generator=generator)
        # Estimates at high noise are averages of latents.
        share = torch.rand(2, run.batch, 1, 1, 1, generator=generator)
        share = 0.67 * share[0] * (share[1] < 0.3)
        shown, *truths = (averaged_with_others(each[rows].float(), share) for each in (z, *wanted))
        with torch.autocast("cpu", torch.bfloat16):
            known = state.known(shown)
            made = [state.writing(stitch(known)).float() for stitch in (state.middle, state.halving)]
        same, half = (_error(a - b, variance, look) for a, b, variance in zip(made, truths, spread))
        return same + 0.5 * half

    trained = train(name, state.requires_grad_(True), loss, folder, run)
    assert isinstance(trained, StitchedState)
    return trained.eval()


def averaged_with_others(latents: Tensor, share: Tensor) -> Tensor:
    """Mix latents with a share of the two before them; at two thirds all three have equal weight."""
    others = (latents.roll(1, 0) + latents.roll(2, 0)) / 2
    return latents + share * (others - latents)


def _error(error: Tensor, variance: float, look: Filter) -> Tensor:
    """Weigh an error of latents by its size, and by its visible part in decibels."""
    seen = F.conv2d(F.pad(error, [1] * 4, mode=look.edges), look.weight).square().mean((1, 2, 3))
    return error.square().mean() / variance + 0.15 * torch.log1p(seen / BARELY_SEEN).mean()
