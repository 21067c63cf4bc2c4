"""What an adaptation that is not weights adds inside the adapted model, in one evaluation.

ControlNet (arXiv 2302.05543) adds to what the decoder is given, so the encoder is still shared by base
and adapted; T2I-Adapter (arXiv 2302.08453) adds inside the encoder; IP-Adapter (arXiv 2308.06721) lets
queries attend to a picture besides the text.  The base's branch gets nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_delta.models.forked_layers import add_to_adapted

Place = TypeVar("Place")
What = TypeVar("What")
# From queries ``(N, T, C)`` and the number of heads to what is added to the attention's outcome.
Attended = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Injection:
    """Additions to the adapted branch; tensors are ``(N, C, h, w)``, N being the UNet's rows.

    ``blocks`` are added to the output of the input blocks of these numbers, ``decoder`` only to what the
    decoder is given of them; there the middle block's output has the number after the last of them.
    ``attended`` is what cross-attentions see besides the text.  ``alone`` says that the adapted branch is
    the only one there is (:func:`lib_delta.models.forked_layers.alone`).
    """

    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    decoder: Mapping[int, Tensor] = field(default_factory=dict)
    attended: Mapping[nn.Module, Attended] = field(default_factory=dict)
    alone: bool = False

    def after(self, number: int, h: Tensor) -> Tensor:
        """Add to the output ``(R, N, C, h, w)`` of an input block."""
        return self._added(h, self.blocks[number]) if number in self.blocks else h

    def into_decoder(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Add to the outputs of all input blocks and of the middle block."""
        return [self._added(h, self.decoder[i]) if i in self.decoder else h for i, h in enumerate(outputs)]

    def beside(self, attention: nn.Module, q: Tensor, h: Tensor, heads: int) -> Tensor:
        """Add what queries ``(R, N, T, C)`` of a cross-attention find besides the text to what they found in it."""
        seen = self.attended.get(attention)
        return h if seen is None else self._added(h, seen(q[-1], heads))

    def _added(self, h: Tensor, added: Tensor) -> Tensor:
        return h + added if self.alone else add_to_adapted(h, added)

    def __add__(self, other: Injection) -> Injection:
        """Return both together."""
        return Injection(
            _together(self.blocks, other.blocks, torch.add),
            _together(self.decoder, other.decoder, torch.add),
            _together(self.attended, other.attended, _both),
            self.alone or other.alone,
        )


def _together(a: Mapping[Place, What], b: Mapping[Place, What], both: Callable[..., Any]) -> dict[Place, What]:
    return {**a, **b, **{place: both(a[place], b[place]) for place in a if place in b}}


def _both(first: Attended, second: Attended) -> Attended:
    return lambda q, heads: first(q, heads) + second(q, heads)
