"""Bridges whose difference map is stitched of two tiny autoencoders: stronger and truer than a linear filter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.bridges.base import BridgeForm, BridgeSettings, Crossing
from lib_delta.bridges.latent_maps import Filter, StateMap, set_circular, stitched_blocks
from lib_delta.bridges.learned import WEIGHTS, LearnedBridge, learned_bridge, load_map
from lib_delta.bridges.resizing import resized
from lib_delta.devices import without_autocast
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.files.stored_file import Shapes
from lib_delta.files.weight_file import WeightFile
from lib_delta.models import taesd

LABEL = "stitched bridge"
# For a source of half the size, or more, the mean with the linear map is as good in decoded pictures, and sharper
# (docs/bridges.md).
HALF_SHARE = 0.5


class StitchedDifference(nn.Module):
    """Map a difference of source latents ``(N, A, h, w)`` to the target's ``(N, B, H, W)``.

    The first layers of the source's tiny decoder read the source's latent with the difference and without it. Filters
    lead from what changes there to the last layers of the target's tiny encoder. A filter of the target's latent gives
    these layers the same input without the change. They write both, and a last filter weighs the difference of the two
    against the linear map's output.

    A difference of zero maps to exactly zero: every path subtracts two equal evaluations or has no bias. The map is
    nearly linear, so the delta's strength is applied to its output.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        blocks: tuple[int, int],
        known: int,
        base: int = 3,
        linear: int = 3,
        raised: int = 0,
    ) -> None:
        """Make a map whose filters are zero.

        Args:
            channels: A and B.
            blocks: the numbers of blocks of the decoder's and of the encoder's layers.
            known: the channels of :meth:`StateMap.known`.
            base: the width of the filter of the target's latent.
            linear: the width of the filter of the linear map's output.
            raised: the channels after upsampling from half the size; 0 for a map of the full size only.
        """
        super().__init__()
        a, b = channels
        self.reading = taesd.first_of_decoder(a, blocks[0])
        self.writing = taesd.last_of_encoder(b, blocks[1])
        self.base = Filter(known, taesd.CHANNELS, base, bias=True)
        self.seam = Filter(taesd.CHANNELS + a, taesd.CHANNELS, 3, bias=False)
        self.linear = Filter(2 * b, taesd.CHANNELS, linear, bias=False)
        self.out = Filter(3 * b, b, 3, bias=False)
        self.maps_half = raised > 0
        if raised:
            self.half_seam = Filter(taesd.CHANNELS + a, 4 * raised, 3, bias=False)
            self.half_mix = Filter(raised, taesd.CHANNELS, 1, bias=False)
            self.half_linear = Filter(2 * b, taesd.CHANNELS, linear, bias=False)
            self.half_out = Filter(3 * b, b, 3, bias=False)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> StitchedDifference:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` for another module's."""
        channels = shapes["reading.1.weight"][1], shapes["out.weight"][0]
        _, known, base, _ = shapes["base.weight"]
        raised = shapes.get("half_mix.weight", (0, 0))[1]
        return cls(channels, stitched_blocks(shapes), known, base, shapes["linear.weight"][-1], raised)

    def forward(self, difference: Tensor, source: Tensor, known: Tensor, linear: Tensor) -> Tensor:
        """Map a difference of the target's size, or of half of it.

        Args:
            difference: ``(N, A, h, w)``.
            source: the source's clean latent, of the same shape.
            known: the state map's reading of the target's clean latent, ``(N, K, H, W)``.
            linear: the features of the linear map, ``(N, 2 * B, H, W)``: see :meth:`DifferenceMap.features`.
        """
        half = difference.shape[-2:] != linear.shape[-2:]
        changed = self.written(difference, source, known, linear, half)
        last = self.half_out if half else self.out
        carried: Tensor = last(torch.cat((changed, linear), 1))
        # Devices may evaluate the two rows of a pair with other roundings.
        is_zero = (difference == 0).flatten(1).all(1)
        return carried.masked_fill(is_zero[:, None, None, None], 0)

    def read(self, difference: Tensor, source: Tensor) -> Tensor:
        """Return what the decoder's layers read of the change, and the change: ``(N, 64 + A, h, w)``."""
        with_change, without = self.reading(torch.cat((source + difference, source))).chunk(2)
        return torch.cat((with_change - without, difference), 1)

    def written(self, difference: Tensor, source: Tensor, known: Tensor, linear: Tensor, half: bool) -> Tensor:
        """Return what the encoder's layers write of the change, ``(N, B, H, W)``."""
        read = self.read(difference, source)
        if half:
            change = self.half_mix(F.pixel_shuffle(self.half_seam(read), 2)) + self.half_linear(linear)
        else:
            change = self.seam(read) + self.linear(linear)
        base = self.base(known)
        with_change, without = self.writing(torch.cat((base + change, base))).chunk(2)
        written: Tensor = with_change - without
        return written


@dataclass(frozen=True, kw_only=True)
class StitchedBridge(LearnedBridge):
    """A learned bridge with a stitched map of differences.

    At the target's size ``stitched`` maps the delta, and averages of a larger one. A delta of a smaller size is resized
    to half the target's, where ``stitched`` maps it; down to half the size, the mean of that and of ``difference`` is
    used. The target's latent is read once a step, for the state and for the delta.
    """

    state: StateMap
    stitched: StitchedDifference
    tiled: bool = False
    label: str = LABEL

    def _source_state(self, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        state = self.state.to(target.device)
        known = state.known(target)
        return self._state_at(known, size), known

    def _state_at(self, known: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the source's clean latent at a size, by the target's reading.

        For a size that is neither the target's nor half of it, the reading is resized to twice the size, as if the
        target's image had it. That leaves half of the error of resizing the source's latent (docs/bridges.md).
        """
        twice = 2 * size[0], 2 * size[1]
        if size[0] * size[1] < known.shape[-2] * known.shape[-1]:
            halved = self.state.at_half_size(resized(known, twice, tiled=self.tiled))
            if halved is not None:
                return halved
        return self.state.mapped(known, size)

    @torch.no_grad()
    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        target, known = crossing.target, crossing.known
        assert target is not None and known is not None
        full = target.shape[-2], target.shape[-1]
        smaller = delta.shape[-2] * delta.shape[-1] < full[0] * full[1]
        if smaller and not self.stitched.maps_half:
            return super().delta_to_target(delta, crossing)
        with without_autocast(delta.device):
            if smaller:
                return self._from_smaller(delta.float(), crossing.denoised, known, target)
            same_size = delta.shape[-2:] == full
            source = crossing.denoised if same_size else self.state.at_same_size(known)
            return self._carried(resized(delta.float(), full), source, known, target)[0]

    def _from_smaller(self, delta: Tensor, source: Tensor, known: Tensor, target: Tensor) -> Tensor:
        full, size = (target.shape[-2], target.shape[-1]), (delta.shape[-2], delta.shape[-1])
        half = (full[0] + 1) // 2, (full[1] + 1) // 2
        if size != half:
            source = self._state_at(known, half)
        # Odd sizes have no half; a point more has one.
        even = 2 * half[0], 2 * half[1]
        known, target = (resized(each, even, tiled=self.tiled) for each in (known, target))
        delta = resized(delta, half, tiled=self.tiled)
        carried, linear = self._carried(delta, source, known, target)
        if size[0] * size[1] >= half[0] * half[1]:
            carried = torch.lerp(linear, carried, HALF_SHARE)
        return resized(carried, full, tiled=self.tiled)

    def _carried(self, delta: Tensor, source: Tensor, known: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Map a delta of the target's size or half of it; return that and what the linear map makes of it."""
        difference, stitched = self.difference.to(delta.device), self.stitched.to(delta.device)
        enlarged = resized(delta, (target.shape[-2], target.shape[-1]), tiled=self.tiled)
        features = difference.features(enlarged, target)
        carried: Tensor = stitched(delta, source, known, features)
        return carried, difference.from_features(features)


def stitched_path(source: Space, target: Space) -> Path:
    """Return the file of the stitched map for an ordered pair of spaces; most pairs have none."""
    return WEIGHTS / f"{source.key}-{target.key}-stitched.safetensors"


@cache
def load_stitched(path: Path, *, tiled: bool = False) -> StitchedDifference:
    """Read the file of a stitched map; cached and refused as by
    :func:`lib_delta.bridges.learned.load_bridge`."""
    with WeightFile.open(path) as file:
        stitched = load_map(StitchedDifference.from_shapes, file.below("stitched."), path.name)
    if tiled:
        set_circular(stitched)
    return stitched


def stitched_bridge(settings: BridgeSettings) -> LearnedBridge:
    """Return the bridge with the pair's stitched map; the learned bridge for a pair without one."""
    path, learned = stitched_path(settings.source, settings.target), learned_bridge(settings)
    if not path.exists():
        return learned
    assert isinstance(learned.state, StateMap)
    return StitchedBridge(
        state=learned.state,
        difference=learned.difference,
        name=learned.name,
        resolution=learned.resolution,
        stitched=load_stitched(path, tiled=settings.tiled),
        tiled=settings.tiled,
    )


STITCHED = BridgeForm("stitched", LABEL, stitched_bridge, halves=True)
