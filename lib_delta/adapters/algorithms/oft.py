"""OFT: rotates a layer's outputs (or inputs), block by block, by orthogonal matrices.

Qiu et al. 2023 (arXiv 2306.07280).  Cayley's map makes the matrices of skew-symmetric ones.  Parametrisations:

- ``oft_blocks``: kohya's sd-scripts and LyCORIS, with ``alpha`` as COFT's constraint, and ``rescale``;
- ``oft_diag``: the first versions of LyCORIS; the orthogonal matrices;
- ``oft_r``: peft before 0.16;
- ``oft_R``: peft since 0.16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, TensorName, finite_scalar, matrix_or_convolution, named
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer, Linear

OFT_BLOCKS, OFT_DIAG, RESCALE, CONSTRAINT = "oft_blocks", "oft_diag", "rescale", "alpha"
OLD_OFT_R, OFT_R = "oft_r", "oft_R"
# Set by the reader from peft's configuration: the number of terms of the series that replaces the inverse.
PEFT_TERMS = "oft_terms"
# Set with COFT: the largest norm of a block.
PEFT_LIMIT = "oft_eps"
TENSORS = (
    *named(OFT_BLOCKS, OFT_DIAG, RESCALE, CONSTRAINT, OLD_OFT_R),
    TensorName(r"oft_R(?:\.\w+)?\.weight", OFT_R),
)

# The permutation of the entries before each of several factors (:mod:`lib_delta.adapters.algorithms.boft`).
Butterfly = Literal["none", "lycoris", "peft"]


@dataclass(frozen=True)
class Oft(LayerAdapter):
    """``W' = rescale * (M @ W)``; with ``on_input``, ``rescale * (W @ M^T)``.

    M is the product of the ``factors`` ``(m, n, b, b)``, the first applied first.  Each is block-diagonal after the
    ``butterfly``'s permutation of the entries.  ``rescale`` has one number for each output.
    """

    factors: Tensor
    rescale: Tensor | None = None
    on_input: bool = False
    butterfly: Butterfly = "none"

    @property
    def algorithm(self) -> str:
        return "OFT" if self.butterfly == "none" else "BOFT"

    @property
    def bypasses(self) -> bool:
        return not self.on_input

    @property
    def width(self) -> int:
        """The number of rotated entries."""
        return self.factors.shape[1] * self.factors.shape[2]

    def fit(self, shape: Size) -> Oft:
        return self  # UnsolvedOft made it for its layer

    def turn(self, entries: Tensor) -> Tensor:
        """Return M times ``entries`` ``(width, ...)``; fewer entries are padded with zeros."""
        missing = self.width - len(entries)
        if missing:
            return self.turn(torch.cat((entries, entries.new_zeros(missing, *entries.shape[1:]))))[: len(entries)]
        for i, blocks in enumerate(self.factors):
            order = self._order(i, entries.device)
            ordered = entries if order is None else entries[order]
            turned = torch.einsum("nij,nj...->ni...", blocks, ordered.unflatten(0, blocks.shape[:2])).flatten(0, 1)
            entries = turned if order is None else turned[order.argsort()]
        return entries

    def _order(self, i: int, device: torch.device) -> Tensor | None:
        """Return the entries' permutation before factor ``i``: it pairs entries at a distance that grows with ``i``."""
        if self.butterfly == "none":
            return None
        half = self.factors.shape[-1] // 2
        entries = torch.arange(self.width, device=device)
        if self.butterfly == "lycoris":
            return entries.view(-1, 2, 2**i * half).transpose(1, 2).flatten()
        chunks = entries.view(-1, 2 ** (i + 1), half)
        return torch.cat((chunks[:, 0::2], chunks[:, 1::2]), 1).flatten()

    def merged_difference(self, weight: Tensor) -> Tensor:
        exact = self.map(lambda t: t.to(weight.device).float())
        old = weight.float()
        new = exact.turn(old.flatten(1).T).T.view(weight.shape) if self.on_input else exact.turn(old)
        if exact.rescale is not None:
            new = new * exact.rescale.view(-1, *(1,) * (weight.ndim - 1))
        return (new - old).contiguous()

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        """Rotate the layer's outputs without the bias."""
        channels_first = not isinstance(layer, Linear)
        shape = (-1, 1, 1) if channels_first else (-1,)
        old = y if layer.bias is None else y - layer.bias.view(shape)
        side = 1 if channels_first else -1
        new = self.turn(old.movedim(side, 0)).movedim(0, side)
        return (new if self.rescale is None else new * self.rescale.view(shape)) - old


@dataclass(frozen=True)
class UnsolvedOft:
    """Rotations that :meth:`fit` computes once their layer is known: a file may have far more than any layer needs.

    ``make`` returns the factors ``(m, count or 1, side, side)``.  All other fields are those of :class:`Oft`.
    """

    count: int
    side: int
    make: Callable[[], Tensor]
    rescale: Tensor | None = None
    on_input: bool = False
    butterfly: Butterfly = "none"
    padded: bool = False

    def fit(self, shape: Size) -> Oft:
        """Return the rotations for a weight of ``shape``; raise :class:`AdapterError` if they do not fit."""
        matrix_or_convolution(shape, "an OFT")
        needed = shape[1:].numel() if self.on_input else shape[0]
        # All may share one block.
        shared = self.count == 1 and self.butterfly == "none" and (self.padded or needed % self.side == 0)
        # With padding, the last block may extend beyond the layer's entries.
        beyond = self.count * self.side - needed
        if not shared and beyond and not (self.padded and 0 < beyond < self.count):
            blocks = f"{self.count} blocks of {self.side}"
            raise AdapterError(f"its rotations are {blocks} where the model's layer needs {needed} entries in all")
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            raise AdapterError(f"rescale has {self.rescale.numel()} numbers where the model's layer needs {shape[0]}")
        factors = self.make()
        if shared:
            factors = factors.expand(-1, math.ceil(needed / self.side), -1, -1)
        return Oft(factors, None if self.rescale is None else self.rescale.flatten(), self.on_input, self.butterfly)


def match(tensors: Mapping[str, Tensor]) -> UnsolvedOft | None:
    """Make a layer's OFT of its tensors; a constraint of 0, or no constraint, does not limit the angles."""
    rescale = tensors.get(RESCALE)
    if OFT_DIAG in tensors and not tensors.keys() - {OFT_DIAG, RESCALE, CONSTRAINT}:
        rotations = _square_blocks(tensors[OFT_DIAG], OFT_DIAG, 3)
        return UnsolvedOft(len(rotations), rotations.shape[-1], lambda: rotations.float()[None].mT, rescale)
    if OLD_OFT_R in tensors and tensors.keys() == {OLD_OFT_R}:
        data = _square_blocks(tensors[OLD_OFT_R], OLD_OFT_R, 3)
        return UnsolvedOft(len(data), data.shape[-1], lambda: cayley(half_skew(data))[None].mT, padded=True)
    if OFT_R in tensors and not tensors.keys() - {OFT_R, PEFT_TERMS, PEFT_LIMIT}:
        side = _triangle_side(tensors[OFT_R])
        return UnsolvedOft(len(tensors[OFT_R]), side, lambda: _peft_rotations(tensors, side)[None], on_input=True)
    if OFT_BLOCKS not in tensors or tensors[OFT_BLOCKS].ndim != 3 or tensors.keys() - {OFT_BLOCKS, RESCALE, CONSTRAINT}:
        return None
    blocks = _square_blocks(tensors[OFT_BLOCKS], OFT_BLOCKS, 3)
    return UnsolvedOft(len(blocks), blocks.shape[-1], lambda: cayley(constrained(tensors))[None].mT, rescale)


def half_skew(data: Tensor) -> Tensor:
    """Return peft's skew-symmetric matrices ``(..., b, b)``, with the sign for :func:`cayley`."""
    return 0.5 * (data.mT.float() - data.float())


def constrained(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the skew-symmetric ``oft_blocks`` ``(..., n, b, b)``, shortened if their norm exceeds the constraint.

    The stored constraint (``alpha``) is per output of the layer.
    """
    blocks = tensors[OFT_BLOCKS].float()
    skew = blocks - blocks.mT
    limit = finite_scalar(tensors[CONSTRAINT], CONSTRAINT) if CONSTRAINT in tensors else 0.0
    limit *= blocks.shape[-3] * blocks.shape[-1]
    norm = float(skew.norm())
    return skew * (limit / norm) if 0 < limit < norm else skew


def cayley(skew: Tensor) -> Tensor:
    """Return ``(I + Q) (I - Q)^-1`` for skew-symmetric Q ``(..., b, b)``: an orthogonal matrix."""
    eye = torch.eye(skew.shape[-1], device=skew.device)
    rotations, failed = torch.linalg.solve_ex(eye - skew, eye + skew)  # the two commute
    # Only numbers beyond fp32's precision fail.
    if failed.any() or not torch.isfinite(rotations).all():
        raise AdapterError("its rotations cannot be computed from numbers so large")
    return rotations


def _triangle_side(vectors: Tensor) -> int:
    side = (1 + math.isqrt(1 + 8 * vectors.shape[-1])) // 2 if vectors.ndim == 2 else 0
    if side < 2 or side * (side - 1) // 2 != vectors.shape[-1] or not len(vectors):
        raise AdapterError(f"{OFT_R} has shape {tuple(vectors.shape)}, and upper triangles of square blocks are needed")
    return side


def _peft_rotations(tensors: Mapping[str, Tensor], side: int) -> Tensor:
    """Return the rotations ``(n, b, b)`` of the inputs from the upper triangles ``(n, b * (b - 1) / 2)``.

    By default peft replaces the inverse by a series of five terms.  ``oft_terms`` 0 stands for the inverse, which peft
    computes with the opposite sign.
    """
    vectors = tensors[OFT_R].float()
    rows, columns = torch.triu_indices(side, side, 1)
    skew = torch.zeros(len(vectors), side, side)
    skew[:, rows, columns] = vectors
    skew = skew - skew.mT
    if PEFT_LIMIT in tensors:
        limit = finite_scalar(tensors[PEFT_LIMIT], PEFT_LIMIT) / math.sqrt(len(vectors))
        norm = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = torch.where(norm <= limit, skew, skew * (limit / norm))
    terms = int(tensors[PEFT_TERMS].item()) if PEFT_TERMS in tensors else 5
    if terms == 0:
        return cayley(-skew)
    terms = 4 if terms == 3 else terms  # as in peft
    total, power = torch.eye(side).repeat(len(vectors), 1, 1), skew
    for i in range(1, terms):
        total = total + power * (1 if i == terms - 1 and i > 1 else 2)
        power = power @ skew
    return total


def _square_blocks(tensor: Tensor, name: str, dimensions: int) -> Tensor:
    if tensor.ndim != dimensions or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() == 0:
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)}, and square blocks are needed")
    return tensor
