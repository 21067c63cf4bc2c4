"""The algorithms in the order in which a layer's tensors are offered to them."""

from __future__ import annotations

from typing import cast

from lib_delta.adapters.algorithms import boft, dylora, full, glora, ia3, loha, lokr, lora, norm, oft
from lib_delta.adapters.algorithms.base import Algorithm

ALGORITHMS = cast("tuple[Algorithm, ...]", (lora, loha, lokr, full, norm, ia3, oft, boft, glora, dylora))
