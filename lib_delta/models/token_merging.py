"""Token merging: similar pixels of a feature map attend as one (Bolya & Hoffman 2023, arXiv 2303.17604).

One pixel of each cell is a destination.  The other pixels that are most similar to a destination are merged into it,
and get its value after attention.  Each block compares anew, separately for the base and the adapted model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_delta.models import forked_layers

# Returns the destination's number within each cell, ``(rows, columns)`` of cells.  Arguments: the attention, the pixels
# of a cell, the rows and columns of cells, and the device.
Choice = Callable[[nn.Module, int, tuple[int, int], torch.device], Tensor]


def first_of_cell(_attention: nn.Module, _pixels: int, cells: tuple[int, int], device: torch.device) -> Tensor:
    """Choose the first pixel of each cell."""
    return torch.zeros(cells, dtype=torch.long, device=device)


class RandomChoice:
    """Chooses at random, and returns the same choice at each call for an attention."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: dict[tuple[nn.Module, tuple[int, int]], Tensor] = {}

    @classmethod
    def as_next_on(cls, device: torch.device) -> RandomChoice:
        """Draw the next numbers of torch's generator for a device, without advancing that generator."""
        cuda = device.type == "cuda"
        generator = torch.Generator(device if cuda else "cpu")
        generator.set_state(torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state())
        return cls(generator)

    def __call__(self, attention: nn.Module, pixels: int, cells: tuple[int, int], device: torch.device) -> Tensor:
        if (attention, cells) not in self._drawn:
            drawn = torch.randint(pixels, (*cells, 1), device=self._generator.device, generator=self._generator)
            self._drawn[attention, cells] = drawn[..., 0].to(device)
        return self._drawn[attention, cells]


@dataclass(frozen=True)
class TokenMerging:
    """The settings of token merging.

    ``ratio`` is the share of merged pixels, ``stride`` the side of a cell, ``downsample`` the largest reduction of a
    feature map against the latent.  With ``queries``, only queries are merged, not keys and values, and normed pixels
    are compared (as in Forge).  Otherwise all are merged, and pixels before the norm are compared (as in ``tomesd``).
    """

    ratio: float
    stride: int = 2
    downsample: int = 1
    queries: bool = False
    choice: Choice = first_of_cell

    def attend(self, attention: nn.Module, x: Tensor, normed: Tensor, size: torch.Size) -> Tensor:
        """Return a block's self-attention for its pixels ``(R, N, T, C)``: ``x`` before, ``normed`` after the norm.

        ``size`` is that of the feature maps.  ``attention`` takes queries and, if only these are merged, all pixels as
        ``keys``.
        """
        height, width = size
        cells = height // self.stride, width // self.stride
        if min(cells) < 1 or (self.queries and min(size) == 1) or int(height * width * self.ratio) < 1:
            return attention(normed)
        x, normed = forked_layers.expand(x, normed)
        chosen = self.choice(attention, self.stride**2, cells, x.device)
        count = min(height * width - chosen.numel(), int(height * width * self.ratio))
        pairs = _TokenPairs.of(normed if self.queries else x, *_in_map(chosen, size, self.stride), count)
        return pairs.spread(attention(pairs.merged(normed), keys=normed if self.queries else None))


def _in_map(chosen: Tensor, size: torch.Size, stride: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of a feature map's pixels that are no destinations, and of the destinations, in order.

    Their counts are known in advance, so that nothing waits for the device.
    """
    rows, columns = (torch.arange(count, device=chosen.device) * stride for count in chosen.shape)
    places = ((rows[:, None] + chosen // stride) * size[1] + columns + chosen % stride).flatten()
    pixels = torch.arange(size.numel(), device=chosen.device)
    # Sorts destinations after all other pixels.
    order = pixels.index_add(0, places, torch.full_like(places, size.numel())).argsort()
    return order[: -len(places)], order[-len(places) :]


@dataclass(frozen=True)
class _TokenPairs:
    """The numbers of merged pixels and of their destinations, ``(R, N, count, 1)``.

    ``unmerged`` and ``merging`` are no destinations.  ``into`` has the index in ``destinations`` for each of
    ``merging``.
    """

    unmerged: Tensor
    merging: Tensor
    into: Tensor
    destinations: Tensor

    @classmethod
    def of(cls, x: Tensor, source: Tensor, target: Tensor, count: int) -> _TokenPairs:
        """Merge the ``count`` pixels of ``source`` that are most similar to one of ``target``, by cosine.

        ``x`` are all pixels ``(R, N, T, C)``; ``source`` and ``target`` are numbers of pixels.
        """
        x = x / x.norm(dim=-1, keepdim=True)
        most, into = (x[:, :, source] @ x[:, :, target].transpose(-1, -2)).max(-1)
        order = most.argsort(-1, descending=True)
        merging, unmerged = order[..., :count], order[..., count:]
        return cls(
            source[unmerged][..., None],
            source[merging][..., None],
            into.gather(-1, merging)[..., None],
            target.expand(*x.shape[:2], -1)[..., None],
        )

    def merged(self, x: Tensor) -> Tensor:
        """Return the unmerged pixels of ``(R, N, T, C)``, then each destination's mean with its merged pixels."""
        source = _gather(x, self.merging)
        means = _gather(x, self.destinations).scatter_reduce(2, self.into.expand(source.shape), source, "mean")
        return torch.cat((_gather(x, self.unmerged), means), 2)

    def spread(self, x: Tensor) -> Tensor:
        """Return T pixels: each has its result, or its destination's."""
        unmerged, merged = x.split((self.unmerged.shape[2], self.destinations.shape[2]), 2)
        pixels = torch.cat((self.unmerged, self.merging, self.destinations), 2)
        values = torch.cat((unmerged, _gather(merged, self.into), merged), 2)
        return torch.empty_like(values).scatter_(2, pixels.expand(values.shape), values)


def _gather(x: Tensor, pixels: Tensor) -> Tensor:
    return x.gather(2, pixels.expand(*x.shape[:2], -1, x.shape[-1]))
