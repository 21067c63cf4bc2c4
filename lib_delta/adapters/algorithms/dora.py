"""DoRA: an adapter's direction with trained magnitudes.

Liu et al. 2024 (arXiv 2402.09353).  LyCORIS and kohya's scripts name the magnitudes ``dora_scale``, peft
``lora_magnitude_vector``.  The scale of the inner adapter (alpha over rank) applies before the magnitudes are set.
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

    The norm is over each output's weights if ``magnitude`` is ``(out, 1, ...)``, and over each input's if it is
    ``(1, in, ...)``.
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
        stored, ones = tuple(self.magnitude.shape), (1,) * (len(shape) - 2)
        # A vector has one number for each output.
        sides = {(shape[0],): (shape[0], 1), (shape[0], 1): (shape[0], 1), (1, shape[1]): (1, shape[1])}
        side = sides.get(stored[:2])
        if side is None or self.magnitude.numel() != max(side):
            raise AdapterError(
                f"{DORA_SCALE} has shape {stored} where the model's layer needs one for each output or input"
            )
        return dataclasses.replace(self, inner=self.inner.fit(shape), magnitude=self.magnitude.reshape(side + ones))

    def merged_difference(self, weight: Tensor) -> Tensor:
        old = weight.float()
        new = old + self.inner.merged_difference(weight)
        magnitude = self.magnitude.to(weight.device).float()
        normed = [dim for dim in range(new.ndim) if magnitude.shape[dim] == 1]
        norm = torch.linalg.vector_norm(new, dim=normed, keepdim=True)
        eps = torch.finfo(norm.dtype).eps  # an input that no weight uses has norm 0
        return new.mul_(magnitude / (norm + eps)).sub_(old)

    def map(self, function: Callable[[Tensor], Tensor]) -> Dora:
        return dataclasses.replace(super().map(function), inner=self.inner.map(function))
