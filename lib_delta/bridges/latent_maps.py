"""The networks of learned bridges, which map states and differences from one latent space to another."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.bridges.resizing import resized
from lib_delta.files.stored_file import Shapes
from lib_delta.models import taesd
from lib_delta.models.unpatched import Conv2d

REGRESSION_RIDGE = 0.01  # relative to the variance of latents, about 1


class Filter(nn.Module):
    """A linear filter over a latent's neighbourhood: ``(N, A, H, W)`` to ``(N, B, H, W)``.

    The edges are padded by replication, or circularly after :func:`set_circular`.  A ``stride`` of 2 halves the size
    along each side.
    """

    edges = "replicate"

    def __init__(self, channels_in: int, channels_out: int, width: int, *, bias: bool, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in, width, width))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        reach = (self.weight.shape[-1] - self.stride + 1) // 2
        return F.conv2d(F.pad(z, [reach] * 4, mode=self.edges), self.weight, self.bias, self.stride)


def set_circular(module: nn.Module) -> None:
    """Make the convolutions of a map pad circularly, for images that can be tiled."""
    for layer in module.modules():
        if isinstance(layer, Filter):
            layer.edges = "circular"
        elif isinstance(layer, Conv2d):
            layer.padding_mode = "circular"


class Residual(nn.Module):
    """Two 3x3 convolutions with a skip connection."""

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
    """Read width and number of blocks of a network off its weight shapes; 0 and 0 if there is no network."""
    blocks = sum(1 for key in shapes if key.startswith("network.") and key.endswith("conv1.weight"))
    return shapes.get("network.0.weight", (0,))[0], blocks


class StateMap(nn.Module, ABC):
    """Map the target's clean latent ``(N, A, H, W)`` to the source's ``(N, B, H, W)``.

    Some maps also predict the source's latent of the image at half the size, which differs from an average of latents,
    or at twice the size.
    """

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """The number of channels of the target's latents, and of the source's."""

    def known(self, z: Tensor) -> Tensor:
        """Return the map's reading of a latent, ``(N, K, H, W)``: by default the latent itself."""
        return z

    @abstractmethod
    def at_same_size(self, known: Tensor) -> Tensor:
        """Map the reading of a latent to a latent of the same size."""

    @abstractmethod
    def at_half_size(self, known: Tensor) -> Tensor | None:
        """Map the reading of a latent to that of the image at half the size; return None if the map cannot."""

    def at_twice_size(self, known: Tensor) -> Tensor | None:
        """Map the reading of a latent to that of the image at twice the size; return None if the map cannot."""
        return None

    def forward(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map a latent, and resize it to ``size`` if given."""
        return self.mapped(self.known(z), size)

    def mapped(self, known: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map the reading of a latent, as :meth:`forward` maps the latent."""
        full = tuple(known.shape[-2:])
        if size is not None and full == (2 * size[0], 2 * size[1]) and (halved := self.at_half_size(known)) is not None:
            return halved
        twice = 2 * full[0], 2 * full[1]
        if size == twice and (doubled := self.at_twice_size(known)) is not None:
            return doubled
        mapped = self.at_same_size(known)
        return mapped if size is None or size == full else resized(mapped, size)


class FilteredState(StateMap):
    """A state map that adds the output of a small network to that of a filter."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        width: int = 5,
        *,
        hidden: int = 0,
        blocks: int = 0,
        half: int = 0,
        twice: int = 0,
    ) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=True)
        self.network = _network(channels_in, hidden, blocks) if hidden else None
        self.head = Filter(hidden, channels_out, 3, bias=True) if hidden else None
        self.halving = Filter(channels_in, channels_out, half, bias=True, stride=2) if half else None
        # To the four points of each square, which a pixel shuffle puts in place.
        self.doubling = Filter(channels_in, 4 * channels_out, twice, bias=True) if twice else None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FilteredState:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` for another module's."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        half, twice = (shapes.get(f"{part}.weight", (0,))[-1] for part in ("halving", "doubling"))
        hidden, blocks = _network_shape(shapes)
        return cls(channels_in, channels_out, width, hidden=hidden, blocks=blocks, half=half, twice=twice)

    @property
    def channels(self) -> tuple[int, int]:
        channels_out, channels_in, _, _ = self.filter.weight.shape
        return channels_in, channels_out

    def at_same_size(self, known: Tensor) -> Tensor:
        mapped: Tensor = self.filter(known)
        return mapped if self.network is None or self.head is None else mapped + self.head(self.network(known))

    def at_half_size(self, known: Tensor) -> Tensor | None:
        return None if self.halving is None else self.halving(known)

    def at_twice_size(self, known: Tensor) -> Tensor | None:
        return None if self.doubling is None else F.pixel_shuffle(self.doubling(known), 2)


class StitchedState(StateMap):
    """A state map of two tiny autoencoders that skips the image between them.

    The first layers of the target's decoder and the last of the source's encoder work at the latents' size.  A filter
    maps the decoder's features to the encoder's, which replaces drawing the image and encoding it (stitching: Lenc &
    Vedaldi 2015).  A second filter, with a stride of 2, maps to the image at half the size.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, reading: int, writing: int, width: int, half: int
    ) -> None:
        super().__init__()
        self.reading = taesd.first_of_decoder(channels_in, reading)
        self.middle = Filter(taesd.CHANNELS + channels_in, taesd.CHANNELS, width, bias=True)
        self.halving = Filter(taesd.CHANNELS + channels_in, taesd.CHANNELS, half, bias=True, stride=2)
        self.writing = taesd.last_of_encoder(channels_out, writing)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> StitchedState:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` for another module's."""
        reading, writing = stitched_blocks(shapes)
        channels_in, channels_out = shapes["reading.1.weight"][1], shapes[f"writing.{writing}.weight"][0]
        width, half = shapes["middle.weight"][-1], shapes["halving.weight"][-1]
        return cls(channels_in, channels_out, reading=reading, writing=writing, width=width, half=half)

    @property
    def channels(self) -> tuple[int, int]:
        last = self.writing[-1]
        return self.middle.weight.shape[1] - taesd.CHANNELS, last.weight.shape[0]

    def known(self, z: Tensor) -> Tensor:
        """Return the filters' input: the features of the decoder's layers, and the latent."""
        return torch.cat((self.reading(z), z), 1)

    def at_same_size(self, known: Tensor) -> Tensor:
        mapped: Tensor = self.writing(self.middle(known))
        return mapped

    def at_half_size(self, known: Tensor) -> Tensor:
        mapped: Tensor = self.writing(self.halving(known))
        return mapped


def stitched_blocks(shapes: Shapes) -> tuple[int, int]:
    """Read the numbers of blocks of the decoder's layers and of the encoder's off weight shapes."""
    reading, writing = (
        sum(1 for key in shapes if key.startswith(part) and key.endswith("conv.0.weight"))
        for part in ("reading.", "writing.")
    )
    return reading, writing


def state_map(shapes: Shapes) -> StateMap:
    """Return the state map, of either kind, for weights of these shapes; raises the errors of its ``from_shapes``."""
    kind = StitchedState if "middle.weight" in shapes else FilteredState
    return kind.from_shapes(shapes)


class DifferenceMap(nn.Module):
    """Map a difference of source latents ``(N, A, H, W)`` to one of target latents ``(N, B, H, W)``.

    A filter without bias maps the difference.  A second filter, if there is one, also receives the part of it that
    follows the target's latent (:func:`regress_on_state`), which adds detail that the source's latent lacks.  Both are
    linear in the difference: a delta may have any size, and a delta of 0 stays exactly 0.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int = 5, *, detailed: bool = False) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=False)
        self.detail = Filter(2 * channels_out, channels_out, width, bias=False) if detailed else None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> DifferenceMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` for another module's."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width, detailed="detail.weight" in shapes)

    def forward(self, difference: Tensor, target: Tensor) -> Tensor:
        """Map a difference at the target's clean latent ``target`` ``(N, B, H, W)``."""
        if self.detail is None:
            carried: Tensor = self.filter(difference)
            return carried
        return self.from_features(self.features(difference, target))

    def features(self, difference: Tensor, target: Tensor) -> Tensor:
        """Return the filtered difference, and the part of it that follows the target's latent: ``(N, 2 * B, H, W)``."""
        filtered = self.filter(difference)
        return torch.cat((filtered, regress_on_state(filtered, target, self.filter.edges)), 1)

    def from_features(self, features: Tensor) -> Tensor:
        """Map a difference whose :meth:`features` are known."""
        carried: Tensor = features.chunk(2, 1)[0] if self.detail is None else self.detail(features)
        return carried


def regress_on_state(change: Tensor, state: Tensor, edges: str = "replicate") -> Tensor:
    """Return the part of a change ``(N, B, H, W)`` that is linear in the state ``(N, B, H, W)``, with the state's
    detail.

    For each image, the change is regressed on the state and on its 3x3 average.  If an edit maps equal colours to equal
    colours, as a change to grey does, this part is nearly the whole change.
    """
    soft = F.avg_pool2d(F.pad(state, [1] * 4, mode=edges), 3, 1)
    features = torch.cat((state, soft), 1).flatten(2).transpose(1, 2)
    changes = change.flatten(2).transpose(1, 2)
    mean = changes.mean(1, keepdim=True)
    features = features - features.mean(1, keepdim=True)
    gram = features.transpose(1, 2) @ features / features.shape[1]
    moment = features.transpose(1, 2) @ (changes - mean) / features.shape[1]
    ridged = gram + REGRESSION_RIDGE * torch.eye(gram.shape[-1], device=gram.device)
    return (features @ solve_positive_definite(ridged, moment) + mean).transpose(1, 2).reshape(change.shape)


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` for positive definite ``(N, n, n)`` and ``(N, n, m)``; return x ``(N, n, m)``.

    Uses Gauss-Jordan elimination, which needs no pivots for such matrices.  Not every device has a solver, and solvers
    may wait for the device to check for success.
    """
    count, rows = matrix.shape[-1], torch.cat((matrix, right), 2)
    unit = torch.eye(count, device=matrix.device)
    for i in range(count):
        row = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        rows = rows - (rows[:, :, i : i + 1] - unit[:, i : i + 1]) * row
    return rows[:, :, count:]
