"""The algorithms.  To add one, write its module and list it here."""

from __future__ import annotations

from typing import cast

from lib_delta.adapters.algorithms import biased, boft, dora, dylora, full, glora, ia3, loha, lokr, lora, norm, oft
from lib_delta.adapters.algorithms.base import Algorithm, HasTensorNames

# A layer's tensors are offered to the algorithms in this order.
ALGORITHMS = cast("tuple[Algorithm, ...]", (lora, loha, lokr, full, norm, ia3, oft, boft, glora, dylora))
# These change the result of an algorithm, by tensors next to that algorithm's.
WRAPPERS: tuple[HasTensorNames, ...] = (dora, biased)
