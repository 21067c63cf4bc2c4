"""The maps that learned bridges are made of: from one latent space to another, for states and for differences."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.bridges.area_average import averaged
from lib_delta.files.stored_file import Shapes
from lib_delta.models import taesd
from lib_delta.models.unpatched import Conv2d

REGRESSION_RIDGE = 0.01  # of latents, whose variance is about 1


class Filter(nn.Module):
    """A linear filter over a latent's surroundings: ``(N, A, H, W)`` to ``(N, B, H, W)``.

    Beyond its edges a latent is continued by them, or by what lies at the other one (:func:`set_circular`).  With a
    ``stride`` of 2 what comes out is half as large along each side.
    """

    edges = "replicate"

    def __init__(self, channels_in: int, channels_out: int, width: int, bias: bool, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in, width, width))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        reach = (self.weight.shape[-1] - self.stride + 1) // 2
        return F.conv2d(F.pad(z, [reach] * 4, mode=self.edges), self.weight, self.bias, self.stride)


def set_circular(module: nn.Module) -> None:
    """Have the convolutions of a map see beyond an edge what lies at the other one, for pictures that can be tiled."""
    for layer in module.modules():
        if isinstance(layer, Filter):
            layer.edges = "circular"
        elif isinstance(layer, Conv2d):
            layer.padding_mode = "circular"


class Residual(nn.Module):
    """Two 3x3 convolutions, and what came in added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _network(channels_in: int, hidden: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        Conv2d(channels_in, hidden, 3, padding=1), *(Residual(hidden) for _ in range(blocks)), nn.ReLU()
    )


def _network_shape(shapes: Shapes) -> tuple[int, int]:
    """Read width and blocks of a network off its weights' shapes; 0 where there is none."""
    blocks = sum(1 for key in shapes if key.startswith("network.") and key.endswith("conv1.weight"))
    return shapes.get("network.0.weight", (0,))[0], blocks


class StateMap(nn.Module, ABC):
    """A target's clean latent ``(N, A, H, W)`` as the source's ``(N, B, H, W)``.

    Some know the source's latent of the picture at half the size as well, which no average is.
    """

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """The channels of the target's latents, and of the source's."""

    @abstractmethod
    def at_same_size(self, z: Tensor) -> Tensor:
        """Map a latent to one as large."""

    @abstractmethod
    def at_half_size(self, z: Tensor) -> Tensor | None:
        """Map a latent to that of the picture at half the size; None where that is not known."""

    def forward(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map a latent, to another ``size`` than its own where one is given."""
        full = tuple(z.shape[-2:])
        if size is not None and full == (2 * size[0], 2 * size[1]) and (halved := self.at_half_size(z)) is not None:
            return halved
        mapped = self.at_same_size(z)
        return mapped if size is None or size == full else averaged(mapped, size)


class FilteredState(StateMap):
    """A state map that is a filter, and what a small network adds."""

    def __init__(
        self, channels_in: int, channels_out: int, width: int = 5, hidden: int = 0, blocks: int = 0, half: int = 0
    ) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=True)
        self.network = _network(channels_in, hidden, blocks) if hidden else None
        self.head = Filter(hidden, channels_out, 3, bias=True) if hidden else None
        self.halving = Filter(channels_in, channels_out, half, bias=True, stride=2) if half else None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FilteredState:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        half = shapes.get("halving.weight", (0,))[-1]
        return cls(channels_in, channels_out, width, *_network_shape(shapes), half)

    @property
    def channels(self) -> tuple[int, int]:
        channels_out, channels_in, _, _ = self.filter.weight.shape
        return channels_in, channels_out

    def at_same_size(self, z: Tensor) -> Tensor:
        mapped: Tensor = self.filter(z)
        return mapped if self.network is None or self.head is None else mapped + self.head(self.network(z))

    def at_half_size(self, z: Tensor) -> Tensor | None:
        return None if self.halving is None else self.halving(z)


class StitchedState(StateMap):
    """A state map of two tiny autoencoders, without the pictures between them.

    The first layers of the target's decoder work at the latents' size, as the last of the source's encoder do: a
    filter leads from what the ones know to what the others need, in place of drawing the picture and looking at it
    (stitching: Lenc & Vedaldi 2015).  A second one, with a stride of 2, leads to the picture at half the size.
    """

    def __init__(self, channels_in: int, channels_out: int, reading: int, writing: int, width: int, half: int) -> None:
        super().__init__()
        self.reading = taesd.first_of_decoder(channels_in, reading)
        self.middle = Filter(taesd.CHANNELS + channels_in, taesd.CHANNELS, width, bias=True)
        self.halving = Filter(taesd.CHANNELS + channels_in, taesd.CHANNELS, half, bias=True, stride=2)
        self.writing = taesd.last_of_encoder(channels_out, writing)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> StitchedState:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` if they are of something else."""
        reading, writing = (
            sum(1 for key in shapes if key.startswith(part) and key.endswith("conv.0.weight"))
            for part in ("reading.", "writing.")
        )
        channels_in, channels_out = shapes["reading.1.weight"][1], shapes[f"writing.{writing}.weight"][0]
        width, half = shapes["middle.weight"][-1], shapes["halving.weight"][-1]
        return cls(channels_in, channels_out, reading, writing, width, half)

    @property
    def channels(self) -> tuple[int, int]:
        last = self.writing[-1]
        return self.middle.weight.shape[1] - taesd.CHANNELS, last.weight.shape[0]

    def known(self, z: Tensor) -> Tensor:
        """Return what the filters are given of a latent: what the decoder's layers read in it, and itself."""
        return torch.cat((self.reading(z), z), 1)

    def at_same_size(self, z: Tensor) -> Tensor:
        mapped: Tensor = self.writing(self.middle(self.known(z)))
        return mapped

    def at_half_size(self, z: Tensor) -> Tensor:
        mapped: Tensor = self.writing(self.halving(self.known(z)))
        return mapped


def state_map(shapes: Shapes) -> StateMap:
    """Return the state map, of either kind, that has weights of these shapes; raises as its ``from_shapes`` does."""
    kind = StitchedState if "middle.weight" in shapes else FilteredState
    return kind.from_shapes(shapes)


class DifferenceMap(nn.Module):
    """A difference of source latents ``(N, A, H, W)`` as one of the target's ``(N, B, H, W)``.

    A filter without offset, and, where there is one, a second that is given besides what the change has in common
    with the target's latent (:func:`regress_on_state`), whose detail the source's latent lacks.  Both are linear, so
    that a delta may be of any size, and nothing stays exactly nothing.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int = 5, detailed: bool = False) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=False)
        self.detail = Filter(2 * channels_out, channels_out, width, bias=False) if detailed else None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> DifferenceMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width, "detail.weight" in shapes)

    def forward(self, difference: Tensor, target: Tensor) -> Tensor:
        """Map a difference where the target's clean latent is ``target`` ``(N, B, H, W)``."""
        carried: Tensor = self.filter(difference)
        if self.detail is None:
            return carried
        detailed: Tensor = self.detail(torch.cat((carried, regress_on_state(carried, target, self.filter.edges)), 1))
        return detailed


def regress_on_state(change: Tensor, state: Tensor, edges: str = "replicate") -> Tensor:
    """Return the part of a change ``(N, B, H, W)`` that follows the state ``(N, B, H, W)``, with the state's detail.

    It is the change's regression, one for each image, on the state and on its average over 3x3 points: where an
    edit makes of the same colours the same others, as to grey does, this is nearly all of it.
    """
    soft = F.avg_pool2d(F.pad(state, [1] * 4, mode=edges), 3, 1)
    known = torch.cat((state, soft), 1).flatten(2).transpose(1, 2)
    wanted = change.flatten(2).transpose(1, 2)
    known, mean = known - known.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
    gram = known.transpose(1, 2) @ known / known.shape[1]
    moment = known.transpose(1, 2) @ (wanted - mean) / known.shape[1]
    ridged = gram + REGRESSION_RIDGE * torch.eye(gram.shape[-1], device=gram.device)
    return (known @ solve_positive_definite(ridged, moment) + mean).transpose(1, 2).reshape(change.shape)


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Return ``(N, n, m)`` that positive definite matrices ``(N, n, n)`` map to ``right`` ``(N, n, m)``.

    By Gauss-Jordan elimination, which needs no pivots here: not every device has a solver, and those that have one
    may wait for the device to look whether it succeeded.
    """
    count, rows = matrix.shape[-1], torch.cat((matrix, right), 2)
    unit = torch.eye(count, device=matrix.device)
    for i in range(count):
        row = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        rows = rows - (rows[:, :, i : i + 1] - unit[:, i : i + 1]) * row
    return rows[:, :, count:]
