"""Additions inside the adapted model by adaptations that change no weights, for one evaluation.

- ControlNet (arXiv 2302.05543) adds to the decoder's inputs, so that base and adapted model still share the encoder.
- T2I-Adapter (arXiv 2302.08453) adds inside the encoder.
- IP-Adapter (arXiv 2308.06721) makes queries attend to a picture in addition to the text.

The base's branch never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_delta.models.forked_layers import add_to_adapted

Position = TypeVar("Position")
Addition = TypeVar("Addition")
# Maps queries ``(N, T, C)`` and the number of heads to the addition to the attention's output.
ExtraAttention = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Injection:
    """Additions to the adapted branch; tensors are ``(N, C, h, w)``, with N rows as in the UNet.

    ``blocks`` are added to the outputs of the input blocks with these numbers.  ``decoder`` is added only to the copies
    for the decoder; there the middle block's output has the number after the last input block's.
    ``extra_attention`` adds to the outputs of cross-attentions.  With ``single_branch``, the adapted branch is the only
    one (:func:`lib_delta.models.forked_layers.single_branch`).
    """

    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    decoder: Mapping[int, Tensor] = field(default_factory=dict)
    extra_attention: Mapping[nn.Module, ExtraAttention] = field(default_factory=dict)
    single_branch: bool = False

    def after_block(self, number: int, h: Tensor) -> Tensor:
        """Add to the output ``(R, N, C, h, w)`` of an input block."""
        return self._added(h, self.blocks[number]) if number in self.blocks else h

    def into_decoder(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Add to the outputs of all input blocks and of the middle block."""
        return [self._added(h, self.decoder[i]) if i in self.decoder else h for i, h in enumerate(outputs)]

    def beside_text(self, attention: nn.Module, q: Tensor, h: Tensor, heads: int) -> Tensor:
        """Add the extra attention of queries ``(R, N, T, C)`` to ``h``, the cross-attention's output for the text."""
        extra = self.extra_attention.get(attention)
        return h if extra is None else self._added(h, extra(q[-1], heads))

    def _added(self, h: Tensor, added: Tensor) -> Tensor:
        return h + added if self.single_branch else add_to_adapted(h, added)

    def __add__(self, other: Injection) -> Injection:
        """Return both injections combined."""
        return Injection(
            _merged(self.blocks, other.blocks, torch.add),
            _merged(self.decoder, other.decoder, torch.add),
            _merged(self.extra_attention, other.extra_attention, _sum_attention),
            self.single_branch or other.single_branch,
        )


def _merged(
    a: Mapping[Position, Addition], b: Mapping[Position, Addition], both: Callable[..., Any]
) -> dict[Position, Addition]:
    return {**a, **b, **{place: both(a[place], b[place]) for place in a if place in b}}


def _sum_attention(first: ExtraAttention, second: ExtraAttention) -> ExtraAttention:
    return lambda q, heads: first(q, heads) + second(q, heads)
