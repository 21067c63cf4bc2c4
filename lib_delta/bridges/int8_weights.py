"""8-bit weights of large maps: integers from -127 to 127, with one factor for each output channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_delta.files.weight_file import WeightFile

SCALE_SUFFIX = ".scale"
MIN_INT8_NUMBERS = 10_000  # smaller weights stay in half precision


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors: large weights ``(C, ...)`` in 8 bits with their factors, others in half precision."""
    packed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if value.numel() < MIN_INT8_NUMBERS:
            packed[key] = value.half().contiguous()
            continue
        scale = value.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        packed[key] = (value.float() / _along(scale, value)).round().to(torch.int8).contiguous()
        packed[key + SCALE_SUFFIX] = scale
    return packed


def unpacked(file: WeightFile) -> dict[str, Tensor]:
    """Return a file's weights as before :func:`pack`, to within 1/254 of each channel's largest weight."""
    return {key: _unpacked_tensor(file, key) for key in file.shapes if not key.endswith(SCALE_SUFFIX)}


def _unpacked_tensor(file: WeightFile, key: str) -> Tensor:
    value = file.tensor(key)
    if key + SCALE_SUFFIX not in file.shapes:
        return value
    return value.float() * _along(file.tensor(key + SCALE_SUFFIX), value)


def _along(scale: Tensor, value: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (value.ndim - 1))
