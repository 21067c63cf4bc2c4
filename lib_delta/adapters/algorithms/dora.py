"""DoRA: an adapter's direction with magnitudes of its own.

Liu et al. 2024 (arXiv 2402.09353).  The names are those of LyCORIS and kohya's scripts (``dora_scale``);
peft's ``lora_magnitude_vector`` is read as that.  The scale of the inner adapter (alpha over rank) counts
before the magnitudes are set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, TensorName, matrix_or_convolution, named
from lib_delta.errors import AdapterError

DORA_SCALE = "dora_scale"
TENSORS = (
    *named(DORA_SCALE),
    TensorName(r"lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", DORA_SCALE, Tensor.flatten),
)


@dataclass(frozen=True)
class Dora(LayerAdapter):
    """``W' = magnitude * (W + dW) / norm(W + dW)``, with dW the ``inner`` adapter's difference.

    The norm is of each output's weights, where ``magnitude`` is ``(out, 1, ...)``, or of each input's,
    where it is ``(1, in, ...)``.
    """

    inner: LayerAdapter
    magnitude: Tensor

    @property
    def algorithm(self) -> str:
        return f"DoRA on {self.inner.algorithm}"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def fit(self, shape: Size) -> Dora:
        matrix_or_convolution(shape, "a DoRA")
        found, ones = tuple(self.magnitude.shape), (1,) * (len(shape) - 2)
        # One number for each output where nothing else is said.
        sides = {(shape[0],): (shape[0], 1), (shape[0], 1): (shape[0], 1), (1, shape[1]): (1, shape[1])}
        wanted = sides.get(found[:2])
        if wanted is None or self.magnitude.numel() != max(wanted):
            raise AdapterError(
                f"{DORA_SCALE} has shape {found} where the model's layer needs one for each output or input"
            )
        return dataclasses.replace(self, inner=self.inner.fit(shape), magnitude=self.magnitude.reshape(wanted + ones))

    def merged_difference(self, weight: Tensor) -> Tensor:
        old = weight.float()
        new = old + self.inner.merged_difference(weight)
        magnitude = self.magnitude.to(weight.device).float()
        others = [side for side in range(new.ndim) if magnitude.shape[side] == 1]
        norm = torch.linalg.vector_norm(new, dim=others, keepdim=True)
        eps = torch.finfo(norm.dtype).eps  # an input that no weight uses has norm 0
        return new.mul_(magnitude / (norm + eps)).sub_(old)

    def map(self, function: Callable[[Tensor], Tensor]) -> Dora:
        return dataclasses.replace(super().map(function), inner=self.inner.map(function))
