"""Norms: differences of a normalisation layer's weight and bias, with the names of LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_delta.adapters.algorithms.base import named
from lib_delta.adapters.algorithms.full import Diff

NORM_WEIGHT, NORM_BIAS = "w_norm", "b_norm"
TENSORS = named(NORM_WEIGHT, NORM_BIAS)


def match(tensors: Mapping[str, Tensor]) -> Diff | None:
    """Make a norm's difference of its tensors; None for tensors of another algorithm."""
    if NORM_WEIGHT not in tensors or tensors.keys() - {NORM_WEIGHT, NORM_BIAS}:
        return None
    return Diff(tensors[NORM_WEIGHT], tensors.get(NORM_BIAS), "Norm")
