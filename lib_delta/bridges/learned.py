"""Bridges between latent spaces of autoencoders that were trained apart, fitted on pairs of encodings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lib_delta.bridges.identity import SameSize
from lib_delta.bridges.maps import DifferenceMap, StateMap, wrap
from lib_delta.bridges.protocol import Crossing
from lib_delta.checkpoint import WeightFile, fill
from lib_delta.devices import without_autocast
from lib_delta.errors import CheckpointError, SettingError
from lib_delta.spaces import Space

WEIGHTS = Path(__file__).parent
Map = TypeVar("Map", StateMap, DifferenceMap)


@dataclass(frozen=True)
class LearnedBridge(SameSize):
    """Two maps fitted on the same pictures encoded by both autoencoders (``README.md`` beside this file).

    ``state`` maps the target's clean latent ``(N, A, H, W)`` to the source's ``(N, B, H, W)``;
    ``difference`` maps the source's delta to the target's latent, where that is known.  Both compute in
    float32, whatever autocast a host runs under.
    """

    state: StateMap
    difference: DifferenceMap
    name: str = "learned"

    @property
    def label(self) -> str:
        return "learned bridge"

    @torch.no_grad()
    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        target = denoised.float()
        check_channels(target, self.state.filter.weight.shape[1], self.name)
        with without_autocast(x.device):
            clean = self.state.to(x.device)(target)
        return clean + with_channels(x.float() - target, clean.shape[1]), sigma, Crossing(clean, target=target)

    @torch.no_grad()
    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return carried(self.difference, delta, crossing)


def carried(difference: DifferenceMap, delta: Tensor, crossing: Crossing) -> Tensor:
    """Return a delta of the source's in the target's latent, from where the crossing started."""
    assert crossing.target is not None
    with without_autocast(delta.device):
        mapped: Tensor = difference.to(delta.device)(delta.float(), crossing.target)
    return mapped


def check_channels(target: Tensor, known: int, name: str) -> None:
    """Raise :class:`SettingError` where a target's latent is not of the channels that a bridge is for."""
    if target.shape[1] != known:
        raise SettingError(
            f"the bridge {name} is for latents of {known} channels, and the main model's have "
            f"{target.shape[1]}: its checkpoint is of another family than it was taken for"
        )


def with_channels(noise: Tensor, channels: int) -> Tensor:
    """Return white noise ``(N, channels, H, W)`` made of white noise ``(N, C, H, W)`` of the same variance.

    More channels than are needed are summed in groups; fewer are repeated from elsewhere in the
    picture, so that no two agree in any place.
    """
    count = noise.shape[1]
    if channels == count:
        return noise
    if count % channels == 0:
        group = count // channels
        return noise.unflatten(1, (channels, group)).sum(2) / group**0.5
    height, width = noise.shape[-2:]
    copies = -(-channels // count)
    moved = [noise.roll((i * height // copies, i * width // copies), (-2, -1)) for i in range(copies)]
    return torch.cat(moved, 1)[:, :channels]


def path_of(source: Space, target: Space) -> Path:
    """Return where the maps of an ordered pair of spaces are."""
    return WEIGHTS / f"{source.key}-{target.key}.safetensors"


@cache
def load(path: Path, tiled: bool = False) -> LearnedBridge:
    """Read a bridge's file; while the process lives, it is read once for pictures that can be ``tiled``, and once else.

    Raises :class:`CheckpointError` if the file is damaged or of another kind.
    """
    with WeightFile.open(path) as file:
        state = _filled(StateMap, file.below("state."), path.name)
        difference = _filled(DifferenceMap, file.below("difference."), path.name)
    if tiled:
        wrap(state)
        wrap(difference)
    return LearnedBridge(state, difference, path.stem)


def _filled(kind: type[Map], file: WeightFile, name: str) -> Map:
    try:
        with torch.device("meta"):
            module = kind.from_shapes(file.shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name} holds no bridge (no usable entry {error})") from error
    fill(module, {key: file.tensor(key) for key in file.shapes}, name, torch.float32, "cpu")
    return module
