"""BOFT: orthogonal matrices as products of block-diagonal ones with a butterfly's order between them.

Liu et al. 2023 (arXiv 2311.06243).  Parametrisations: LyCORIS (``oft_blocks`` of four dimensions, on the
outputs) and peft (``boft_R`` with ``boft_s``, on the inputs).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_delta.adapters.algorithms.oft import BLOCKS, CONSTRAINT, RESCALE, Unsolved, cayley, constrained, half_skew
from lib_delta.errors import AdapterError

PEFT, PEFT_SCALE = "boft_R", "boft_s"


def match(tensors: Mapping[str, Tensor]) -> Unsolved | None:
    """Make a layer's BOFT of its tensors, ``(factors, blocks, b, b)``."""
    if PEFT in tensors and not tensors.keys() - {PEFT, PEFT_SCALE}:
        data = _even(tensors[PEFT], PEFT)
        _, count, side, _ = data.shape
        return Unsolved(count, side, lambda: cayley(half_skew(data)), tensors.get(PEFT_SCALE), True, "peft")
    if BLOCKS not in tensors or tensors[BLOCKS].ndim != 4 or tensors.keys() - {BLOCKS, RESCALE, CONSTRAINT}:
        return None
    _, count, side, _ = _even(tensors[BLOCKS], BLOCKS).shape
    rescale = tensors.get(RESCALE)
    return Unsolved(count, side, lambda: cayley(constrained(tensors)), rescale, butterfly="lycoris")


def _even(blocks: Tensor, name: str) -> Tensor:
    factors, count, side = (*blocks.shape, 0, 0, 0)[:3]
    # Before its last factor the order reaches over 2**factors halves of blocks.
    if blocks.ndim != 4 or blocks.shape[3] != side or not blocks.numel() or factors > count.bit_length() + 1:
        raise AdapterError(f"{name} has shape {tuple(blocks.shape)}, and (factors, blocks, b, b) is needed")
    if factors > 1 and (side % 2 or count * side % (2 ** (factors - 1) * side)):
        raise AdapterError(f"{name} has {count} blocks of {side}, which {factors} butterfly factors cannot halve")
    return blocks
