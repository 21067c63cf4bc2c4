"""BOFT: products of block-diagonal orthogonal matrices, with a butterfly permutation between them.

Liu et al. 2023 (arXiv 2311.06243).  Parametrisations: LyCORIS (``oft_blocks`` of four dimensions, on the
outputs) and peft (``boft_R`` with ``boft_s``, on the inputs).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_delta.adapters.algorithms.base import named
from lib_delta.adapters.algorithms.oft import (
    CONSTRAINT,
    OFT_BLOCKS,
    RESCALE,
    UnsolvedOft,
    cayley,
    constrained,
    half_skew,
)
from lib_delta.errors import AdapterError

BOFT_R, BOFT_S = "boft_R", "boft_s"
TENSORS = named(BOFT_R, BOFT_S, OFT_BLOCKS, RESCALE, CONSTRAINT)


def match(tensors: Mapping[str, Tensor]) -> UnsolvedOft | None:
    """Make a layer's BOFT of its tensor ``(factors, blocks, b, b)``."""
    if BOFT_R in tensors and not tensors.keys() - {BOFT_R, BOFT_S}:
        data = _even(tensors[BOFT_R], BOFT_R)
        _, count, side, _ = data.shape
        return UnsolvedOft(
            count, side, lambda: cayley(half_skew(data)), tensors.get(BOFT_S), on_input=True, butterfly="peft"
        )
    if OFT_BLOCKS not in tensors or tensors[OFT_BLOCKS].ndim != 4 or tensors.keys() - {OFT_BLOCKS, RESCALE, CONSTRAINT}:
        return None
    _, count, side, _ = _even(tensors[OFT_BLOCKS], OFT_BLOCKS).shape
    rescale = tensors.get(RESCALE)
    return UnsolvedOft(count, side, lambda: cayley(constrained(tensors)), rescale, butterfly="lycoris")


def _even(blocks: Tensor, name: str) -> Tensor:
    factors, count, side = (*blocks.shape, 0, 0, 0)[:3]
    # The permutation of the last factor spans 2**factors halves of blocks.
    if blocks.ndim != 4 or blocks.shape[3] != side or not blocks.numel() or factors > count.bit_length() + 1:
        raise AdapterError(f"{name} has shape {tuple(blocks.shape)}, and (factors, blocks, b, b) is needed")
    if factors > 1 and (side % 2 or count * side % (2 ** (factors - 1) * side)):
        raise AdapterError(f"{name} has {count} blocks of {side}, which {factors} butterfly factors cannot halve")
    return blocks
