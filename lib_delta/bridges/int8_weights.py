"""Weights of large maps in 8 bits: whole numbers from -127 to 127, and what each output channel's are multiplied by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_delta.files.weight_file import WeightFile

SCALE_SUFFIX = ".scale"
MIN_INT8_NUMBERS = 10_000  # numbers: smaller weights stay in half precision


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a file is to hold: large weights ``(C, ...)`` in 8 bits, the others in half precision."""
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
    """Return a file's weights as they were before :func:`pack`, to within a 254th of each channel's largest."""
    return {key: _unpacked(file, key) for key in file.shapes if not key.endswith(SCALE_SUFFIX)}


def _unpacked(file: WeightFile, key: str) -> Tensor:
    value = file.tensor(key)
    if key + SCALE_SUFFIX not in file.shapes:
        return value
    return value.float() * _along(file.tensor(key + SCALE_SUFFIX), value)


def _along(scale: Tensor, value: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (value.ndim - 1))
