"""Token merging: pixels of a feature map that are alike attend as one (Bolya & Hoffman 2023, arXiv 2303.17604).

One pixel of each cell is a destination; of all others, those most like a destination are merged into it, and have
after attention what it has.  Which are is found anew by each block, and by base and adapted model each for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_delta.models import forked_layers

# Which pixel of each cell is the destination, ``(rows, columns)`` of cells, in a cell's own count; for an attention,
# on a device.
Choice = Callable[[nn.Module, int, tuple[int, int], torch.device], Tensor]


def first_of_cell(_attention: nn.Module, _pixels: int, cells: tuple[int, int], device: torch.device) -> Tensor:
    """Choose the first pixel of each cell."""
    return torch.zeros(cells, dtype=torch.long, device=device)


class RandomChoice:
    """Chooses at random, for an attention the same however often it is asked."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: dict[tuple[nn.Module, tuple[int, int]], Tensor] = {}

    @classmethod
    def as_next_on(cls, device: torch.device) -> RandomChoice:
        """Draw what torch's own generator for a device is about to give, which stays as it is."""
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
    """How much is merged, and where.

    ``ratio`` is the share of pixels that are merged, ``stride`` the side of a cell, ``downsample`` how much smaller
    than the latent a feature map may be.  ``queries``: only what attends is merged, and not what it attends to, and
    normed pixels are compared (as Forge has it); else all of it, and pixels before the norm (as ``tomesd``).
    """

    ratio: float
    stride: int = 2
    downsample: int = 1
    queries: bool = False
    choice: Choice = first_of_cell

    def attend(self, attention: nn.Module, x: Tensor, normed: Tensor, size: torch.Size) -> Tensor:
        """Return what a block's self-attention gives for its pixels ``x`` ``(R, N, T, C)``, normed, of maps of a size.

        ``attention`` takes queries and, where these are merged alone, the ``keys`` of all pixels.
        """
        height, width = size
        cells = height // self.stride, width // self.stride
        if min(cells) < 1 or (self.queries and min(size) == 1) or int(height * width * self.ratio) < 1:
            return attention(normed)
        x, normed = forked_layers.expand(x, normed)
        chosen = self.choice(attention, self.stride**2, cells, x.device)
        count = min(height * width - chosen.numel(), int(height * width * self.ratio))
        alike = _TokenPairs.of(normed if self.queries else x, *_in_map(chosen, size, self.stride), count)
        return alike.spread(attention(alike.merged(normed), keys=normed if self.queries else None))


def _in_map(chosen: Tensor, size: torch.Size, stride: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of a feature map's pixels that are not chosen of its cells, and of those that are, in order.

    How many there are of each is known, so that no device has to be waited for to count them.
    """
    rows, columns = (torch.arange(count, device=chosen.device) * stride for count in chosen.shape)
    places = ((rows[:, None] + chosen // stride) * size[1] + columns + chosen % stride).flatten()
    pixels = torch.arange(size.numel(), device=chosen.device)
    # The chosen ones after all others, both in their order.
    order = pixels.index_add(0, places, torch.full_like(places, size.numel())).argsort()
    return order[: -len(places)], order[-len(places) :]


@dataclass(frozen=True)
class _TokenPairs:
    """Which pixels are merged into which; numbers of pixels ``(R, N, count, 1)``.

    ``kept`` and ``merging`` are no destinations; ``into`` has for each that is merging the place of its destination
    among ``destinations``.
    """

    kept: Tensor
    merging: Tensor
    into: Tensor
    destinations: Tensor

    @classmethod
    def of(cls, x: Tensor, source: Tensor, target: Tensor, count: int) -> _TokenPairs:
        """Compare pixels ``(R, N, T, C)`` of these numbers by their cosines; ``count`` of ``source`` are merged."""
        x = x / x.norm(dim=-1, keepdim=True)
        most, into = (x[:, :, source] @ x[:, :, target].transpose(-1, -2)).max(-1)
        order = most.argsort(-1, descending=True)
        merging, kept = order[..., :count], order[..., count:]
        return cls(
            source[kept][..., None],
            source[merging][..., None],
            into.gather(-1, merging)[..., None],
            target.expand(*x.shape[:2], -1)[..., None],
        )

    def merged(self, x: Tensor) -> Tensor:
        """Return what is kept of ``(R, N, T, C)``, and the means of destinations and what is merged into them."""
        source = _gather(x, self.merging)
        means = _gather(x, self.destinations).scatter_reduce(2, self.into.expand(source.shape), source, "mean")
        return torch.cat((_gather(x, self.kept), means), 2)

    def spread(self, x: Tensor) -> Tensor:
        """Give each of the T pixels what became of it, or of what it was merged into."""
        kept, merged = x.split((self.kept.shape[2], self.destinations.shape[2]), 2)
        pixels = torch.cat((self.kept, self.merging, self.destinations), 2)
        values = torch.cat((kept, _gather(merged, self.into), merged), 2)
        return torch.empty_like(values).scatter_(2, pixels.expand(values.shape), values)


def _gather(x: Tensor, pixels: Tensor) -> Tensor:
    return x.gather(2, pixels.expand(*x.shape[:2], -1, x.shape[-1]))
