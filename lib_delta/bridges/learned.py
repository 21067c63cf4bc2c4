"""Bridges between latent spaces of independently trained autoencoders, fitted on pairs of encodings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lib_delta.bridges.base import Bridge, BridgeForm, BridgeSettings, Crossing
from lib_delta.bridges.identity import SAME_SIZE
from lib_delta.bridges.int8_weights import unpacked
from lib_delta.bridges.latent_maps import DifferenceMap, set_circular, state_map
from lib_delta.devices import without_autocast
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError, SettingError
from lib_delta.files.stored_file import Shapes
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_weights

WEIGHTS = Path(__file__).with_name("weights")
LABEL = "learned bridge"
MapT = TypeVar("MapT", bound=nn.Module)


class StateMapping(Protocol):
    """A torch module that maps the target's clean latents ``(N, A, H, W)`` to the source's ``(N, B, h, w)``."""

    @property
    def channels(self) -> tuple[int, int]:
        """The numbers of channels A and B."""
        ...

    def __call__(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor: ...

    def to(self, device: torch.device) -> StateMapping: ...


@dataclass(frozen=True)
class LearnedBridge:
    """Two maps, fitted on the same images encoded by both autoencoders (see ``weights/README.md``).

    ``state`` maps the target's clean latent ``(N, A, H, W)`` to the source's ``(N, B, h, w)``.  ``resolution`` sets h
    and w, and resizes the noise.  ``difference`` maps the source's delta to the target's space, given the target's
    clean latent.  Both maps compute in float32, even if the host runs under autocast.
    """

    state: StateMapping
    difference: DifferenceMap
    name: str = "learned"
    resolution: Bridge = SAME_SIZE
    label: str = LABEL

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        return self.resolution.source_size(height, width)

    @torch.no_grad()
    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        target, (known, channels) = denoised.float(), self.state.channels
        if target.shape[1] != known:
            raise SettingError(
                f"the bridge {self.name} is for latents of {known} channels, and the main model's have "
                f"{target.shape[1]}: its checkpoint is of another family than it was taken for"
            )
        noise = with_channels(x.float() - target, channels)
        noise, sigma, resized = self.resolution.to_source(noise, sigma, torch.zeros_like(noise))
        with without_autocast(x.device):
            clean, reading = self._source_state(target, (noise.shape[-2], noise.shape[-1]))
        return clean + noise, sigma, Crossing(clean, (resized,), target, reading)

    def _source_state(self, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Return the source's clean latent, and the reading of the target's if the way back needs it."""
        return self.state.to(target.device)(target, size), None

    @torch.no_grad()
    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        assert crossing.target is not None
        delta = self.resolution.delta_to_target(delta.float(), crossing.parts[0])
        with without_autocast(delta.device):
            carried: Tensor = self.difference.to(delta.device)(delta, crossing.target)
        return carried


def with_channels(noise: Tensor, channels: int) -> Tensor:
    """Return white noise ``(N, channels, H, W)`` made of white noise ``(N, C, H, W)``, of the same variance.

    Surplus channels are summed in groups.  Missing channels repeat the noise, shifted so that no two channels agree at
    any point.
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


def weights_path(source: Space, target: Space) -> Path:
    """Return the file of the maps for an ordered pair of spaces."""
    return WEIGHTS / f"{source.key}-{target.key}.safetensors"


@cache
def load_bridge(path: Path, *, tiled: bool = False) -> LearnedBridge:
    """Read a bridge's file; cached for the lifetime of the process, by path and ``tiled``.

    ``tiled`` makes the maps pad circularly, for images that can be tiled.  Raises :class:`CheckpointError` for a
    damaged file or one of another kind.
    """
    with WeightFile.open(path) as file:
        state = load_map(state_map, file.below("state."), path.name)
        difference = load_map(DifferenceMap.from_shapes, file.below("difference."), path.name)
    if tiled:
        set_circular(state)
        set_circular(difference)
    return LearnedBridge(state, difference, path.stem)


def learned_bridge(settings: BridgeSettings) -> LearnedBridge:
    """Return the bridge of the maps that come with the extension."""
    bridge = load_bridge(weights_path(settings.source, settings.target), tiled=settings.tiled)
    return replace(bridge, resolution=settings.resolution)


LEARNED = BridgeForm("learned", LABEL, learned_bridge)


def load_map(map_of: Callable[[Shapes], MapT], file: WeightFile, name: str) -> MapT:
    try:
        with torch.device("meta"):
            module = map_of(file.shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name} holds no bridge (no usable entry {error})") from error
    load_weights(module, unpacked(file), name)
    return module
