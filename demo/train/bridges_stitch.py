"""Fit state maps that are stitched of tiny autoencoders: filters by least squares, then all of a map by descent."""

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
BARELY_SEEN = 0.002  # squared error of a picture in 0..1: about what the source's own autoencoder makes


@dataclass(frozen=True)
class Layers:
    """How many blocks of the decoder and of the encoder are kept, and how wide the filters between them are."""

    reading: int = taesd.BLOCKS_PER_SIZE
    writing: int = taesd.BLOCKS_PER_SIZE
    width: int = 3
    half: int = 4


class Seam(NamedTuple):
    """What a source's encoder makes of pictures on its way, ``(N, 64, h, w)`` of the latents' size and half of it.

    ``pixels`` ``(N, 3 * 64, h, w)`` are the pictures themselves, those of a latent's point as its channels.
    """

    same: Tensor
    half: Tensor
    pixels: Tensor


def until_seam(encoder: nn.Sequential) -> nn.Sequential:
    """Return the layers of an encoder up to those that work at the latents' size alone."""
    return encoder[: len(encoder) - 1 - taesd.BLOCKS_PER_SIZE]


@torch.no_grad()
def stitched(decoder: nn.Sequential, encoder: nn.Sequential, layers: Layers, z: Tensor, seam: Seam) -> StitchedState:
    """Stitch a target's decoder to a source's encoder by filters of least squares, without any training.

    ``z`` ``(N, C, h, w)`` are the target's latents of the pictures that ``seam`` was made of.
    """
    channels = taesd.latent_channels(decoder, "decoder"), taesd.latent_channels(encoder, "encoder")
    state = StitchedState(*channels, layers.reading, layers.writing, layers.width, layers.half)
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
    """Give layers the weights of others, whose numbers in their own network may be others."""
    layers.load_state_dict(nn.Sequential(*trained).state_dict())


def seen_through(z: Tensor, pixels: Tensor) -> Filter:
    """Return the filter that makes of a source's latents ``(N, C, h, w)`` their pictures, as well as a filter can.

    It tells how much of an error in a latent would be seen, at next to no cost.
    """
    pairs = [(a, b) for a, b in zip(z.split(64), pixels.split(64))]
    return fit_filter(pairs, 3, bias=True, ridge=RIDGE).requires_grad_(False)


def tuned(
    state: StitchedState, z: Tensor, wanted: tuple[Tensor, Tensor], look: Filter, run: Run, name: str, folder: Path
) -> StitchedState:
    """Train all of a stitched map on a target's latents ``(N, C, h, w)``; resumes from a save in ``folder``.

    ``wanted`` are the source's of the same pictures, and of these at half the size.
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
    """Give latents a share of the two before them; at two thirds all three count alike."""
    others = (latents.roll(1, 0) + latents.roll(2, 0)) / 2
    return latents + share * (others - latents)


def _error(error: Tensor, variance: float, look: Filter) -> Tensor:
    """Weigh an error of latents by its size, and by how much of it would be seen in decibels."""
    seen = F.conv2d(F.pad(error, [1] * 4, mode=look.edges), look.weight).square().mean((1, 2, 3))
    return error.square().mean() / variance + 0.15 * torch.log1p(seen / BARELY_SEEN).mean()
